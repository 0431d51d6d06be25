"""New weights into a vLLM in this process: one place that knows how, for vLLM 0.20 to 0.33.

What was read in vLLM's sources at 0.21, 0.26 and 0.32, and has one form in all: `collective_rpc` runs a function on the
worker; between `initialize_` and `finalize_layerwise_reload` a model's `load_weights` goes layer by layer through what
vLLM does to weights after loading; `LoRARequest` names an adapter's folder.

On a CPU oneDNN packs the weights, after which `load_weights` fails, and `reload_weights` from files succeeds and
changes nothing. There the packing is off (`start_without_packing`), and `load_weights` copies into what is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

# Writes an adapter in peft's layout into a folder that does not exist yet.
WriteAdapter = Callable[[nn.Module, Path], object]


def start_without_packing() -> None:
    """Keep the weights of linear layers as they are loaded; call before an `LLM` is made on a CPU."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False


def named_weights(model: Any) -> dict[str, Tensor]:
    """The model's tensors under the names of its files, which is what vLLM's loaders know.

    transformers 5 fuses some layers (experts) in memory; its own `save_pretrained` undoes that, and so does this. A
    tied head is the embedding under a second name, which files do not have and some loaders refuse.
    """
    state: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        if tensor.numel() and (tensor.data_ptr(), tensor.shape) in seen:
            continue
        seen.add((tensor.data_ptr(), tensor.shape))
        state[name] = tensor.detach()
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 has one set of names
        return state
    return dict(revert_weight_conversion(model, state))


def push_weights(llm: Any, model: nn.Module, *, is_cpu: bool) -> None:
    """Overwrite vLLM's weights with the model's.

    Args:
        is_cpu: copy straight into the weights, which nothing has processed (`start_without_packing`).

    Raises:
        ValueError: vLLM's model has weights that the trainer's model does not name.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    weights = named_weights(model)

    def load(worker: Any) -> list[str]:
        own = worker.model_runner.get_model()
        names = {name for name, _ in own.named_parameters()}
        if is_cpu:
            return sorted(names - own.load_weights(iter(weights.items())))
        with set_current_vllm_config(worker.vllm_config):
            initialize_layerwise_reload(own)
            loaded = own.load_weights(iter(weights.items()))
            finalize_layerwise_reload(own, worker.vllm_config.model_config)
        return sorted(names - loaded)

    (missing,) = llm.collective_rpc(load)
    if missing:
        raise ValueError(
            f"vLLM's model has {len(missing)} weights that {type(model).__name__} does not name, {missing[0]} first; "
            "sample with rollout.engine builtin"
        )


class Adapters:
    """Hands a LoRA adapter's versions to vLLM one by one; the base it loaded is never written.

    Every version has a number of its own: vLLM keeps an adapter under its number for as long as it likes.
    """

    def __init__(self, write: WriteAdapter) -> None:
        self.write = write
        self.folder = TemporaryDirectory(prefix="fastrl-adapter-")
        self.count = 0

    def next(self, model: nn.Module) -> Any:
        """The request that makes vLLM sample with the adapter as it is now; the version before it is deleted."""
        from vllm.lora.request import LoRARequest

        for old in self._versions():
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        self.count += 1
        path = Path(self.folder.name) / f"version-{self.count}"
        self.write(model, path)
        return LoRARequest(f"policy-{self.count}", self.count, str(path))

    def close(self) -> None:
        self.folder.cleanup()

    def _versions(self) -> Iterator[Path]:
        return Path(self.folder.name).glob("version-*")
