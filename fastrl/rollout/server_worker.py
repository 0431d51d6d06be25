"""What runs inside a vLLM worker: a weight transfer engine that reads files.

vLLM imports this module in each worker process, before it makes the model:

    vllm serve MODEL --worker-extension-cls fastrl.rollout.server_worker.Worker \
        --weight-transfer-config '{"backend": "fastrl_files"}'

Importing it registers `fastrl_files`, which vLLM's own endpoints then drive as they drive NCCL. On CPU it also turns
oneDNN's and SGL's packing of weights off: a packed layer keeps a copy that an update does not reach, and the server
would go on sampling from the old weights without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import base, factory
from vllm.platforms import current_platform

from fastrl.rollout.vllm_weights import start_without_packing

BACKEND = "fastrl_files"


class Worker:
    """Nothing but a name for `--worker-extension-cls`: vLLM adds it to its worker's bases."""


@dataclass
class FilesInit(base.WeightTransferInitInfo):  # type: ignore[misc]  # vLLM has no types here
    """Said once: the directory that updates lie in, which no update can leave."""

    directory: str


@dataclass
class FilesUpdate(base.WeightTransferUpdateInfo):  # type: ignore[misc]  # vLLM has no types here
    """One update: the names of its safetensors files."""

    files: list[str]


class FilesEngine(base.WeightTransferEngine[FilesInit, FilesUpdate]):  # type: ignore[misc]  # vLLM has no types here
    """Loads safetensors files through the model's own `load_weights`; works on every device, and needs no NCCL."""

    init_info_cls = FilesInit
    update_info_cls = FilesUpdate
    directory: Path | None = None

    def init_transfer_engine(self, init_info: FilesInit) -> None:
        directory = Path(init_info.directory)
        if not directory.is_dir():
            raise ValueError(
                f"this server cannot read {directory}; server and trainer must share rollout.server.directory"
            )
        self.directory = directory.resolve()

    def start_weight_update(self) -> None:
        if not current_platform.is_cpu():  # where layers are packed, quantised or laid out anew after loading
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FilesUpdate) -> None:
        if self.directory is None:
            raise RuntimeError("init_weight_transfer_engine must come first")
        for name in update_info.files:
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not the name of a file")
            with safe_open(self.directory / name, framework="pt") as file:
                self.model.load_weights((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118

    def finish_weight_update(self) -> None:
        if not current_platform.is_cpu():
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, object]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()

    def shutdown(self) -> None:
        self.directory = None


if BACKEND not in factory.WeightTransferEngineFactory._registry:
    factory.WeightTransferEngineFactory.register_engine(BACKEND, FilesEngine)
if current_platform.is_cpu():
    start_without_packing()
