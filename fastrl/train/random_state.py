"""Every random stream a run draws from, as one JSON value: forgetting one changes a resumed run without an error."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

Generator = torch.Generator | np.random.Generator | random.Random


def generator_state(own: Mapping[str, Generator]) -> dict[str, Any]:
    """State of the global generators (torch on the CPU and on every CUDA device, Python, numpy) and of our `own`.

    Args:
        own: name -> generator the run made itself.

    Returns:
        JSON values; about 20 kB for the global ones.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - others may draw from it
    return {
        "torch": _encoded(torch.get_rng_state()),
        "cuda": [_encoded(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "own": {name: _state_of(generator) for name, generator in own.items()},
    }


def restore_generators(state: Mapping[str, Any], own: Mapping[str, Generator]) -> None:
    """Put every generator where `generator_state` found it, after a trip through JSON or not.

    Raises:
        ValueError: the named generators or the number of CUDA devices are not those of the saved run.
    """
    if set(state["own"]) != set(own):
        raise ValueError(f"the saved run has the generators {sorted(state['own'])}, and this one {sorted(own)}")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) != devices:
        raise ValueError(f"the saved run had {len(state['cuda'])} CUDA devices, and this machine has {devices}")
    torch.set_rng_state(_decoded(state["torch"]))
    for device, encoded in enumerate(state["cuda"]):
        torch.cuda.set_rng_state(_decoded(encoded), device)
    random.setstate(_python_state(state["python"]))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    for name, generator in own.items():
        saved = state["own"][name]
        if isinstance(generator, torch.Generator):
            generator.set_state(_decoded(saved))
        elif isinstance(generator, np.random.Generator):
            generator.bit_generator.state = saved
        else:
            generator.setstate(_python_state(saved))


def _state_of(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return _encoded(generator.get_state())
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate()


def _python_state(saved: Any) -> tuple[Any, ...]:
    version, words, gauss = saved  # JSON has turned the tuples into lists
    return (version, tuple(words), gauss)


def _encoded(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decoded(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
