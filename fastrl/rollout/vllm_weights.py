"""New weights into a vLLM in this process: one place that knows how, for vLLM 0.20 to 0.33.

What was read in vLLM's sources at 0.21, 0.26 and 0.32: `collective_rpc` runs a function on the worker,
`worker.reload_weights(weights_iterator=...)` loads layer by layer through vLLM's own processing, `LoRARequest` names an
adapter's folder, `reset_prefix_cache` forgets keys and values of old weights; all have the same form.

On a CPU `reload_weights` succeeds and changes nothing when oneDNN has packed the weights. There the packing is off
(`start_without_packing`) and the model's own `load_weights` copies into the weights that are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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

    transformers 5 fuses some layers (experts) in memory; its own `save_pretrained` undoes that, and so does this.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 has one set of names
        return state
    return dict(revert_weight_conversion(model, state))


def push_weights(llm: Any, model: nn.Module, *, is_cpu: bool) -> None:
    """Overwrite vLLM's weights with the model's.

    Raises:
        ValueError: vLLM's model has weights that the trainer's model does not name.
    """
    weights = named_weights(model)

    def load(worker: Any) -> list[str]:
        if not is_cpu:
            worker.reload_weights(weights_iterator=iter(weights.items()))
            return []
        own = worker.model_runner.model
        loaded = own.load_weights(iter(weights.items()))
        return sorted({name for name, _ in own.named_parameters()} - loaded) if loaded is not None else []

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
