"""Adapters and what they make of their base, as files: peft's layout, and the layout of a model without adapters."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastrl.train.contents import digest
from fastrl.train.durable import write_directory
from fastrl.train.lora import POLICY, active_adapters, add_lora, is_lora_layer, is_of_adapter
from fastrl.train.model_directory import json_file
from fastrl.train.quantize import dequantized, four_bit_layers, is_four_bit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "base_model.model."  # what peft puts before the names of the model it wraps
WEIGHTS = "adapter_model.safetensors"
HEAD = "score.weight"
BASE = "base"  # of the metadata


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the same model without adapters, its active adapters added to the weights.

        W + (alpha / r) B A        summed in f32 or better, in the base's dtype; a 4-bit base is dequantised

    Returns:
        name -> tensor under the names of the model before `add_lora`; what no adapter changes is not copied.
    """
    matrices = {f"{path}.weight": dequantized(layer) for path, layer in four_bit_layers(model)}
    active = active_adapters(model)
    for path, module in model.named_modules():
        if not is_lora_layer(module):
            continue
        base = module.get_base_layer()
        weight = dequantized(base) if is_four_bit(base) else base.weight
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in active:
            if name in module.lora_A:
                total = total + module.get_delta_weight(name)
        matrices[f"{path}.base_layer.weight"] = total.to(weight.dtype)
    state = {}
    for key, value in model.state_dict().items():
        is_quantization = any(key.startswith(f"{name}.") for name in matrices)
        if ".lora_A." in key or ".lora_B." in key or is_quantization:
            continue
        state[key.replace(".base_layer.", ".")] = matrices.get(key, value)
    return state


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and configuration without adapters, quantisation or memory: for its save_pretrained."""
    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):  # the latter cannot be written as JSON
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):
        plain = type(model)(config).to(model.dtype)  # which its save_pretrained writes into the configuration
    if getattr(model, "generation_config", None) is not None:  # theirs: a model that only scores has none
        plain.generation_config = model.generation_config
    return plain


def save_adapter(model: PreTrainedModel, directory: str | Path, *, name: str = POLICY) -> Path:
    """Write one adapter as peft does, atomically: `PeftModel.from_pretrained(base, directory)` reads it.

    A model with a scalar head gives that too, which its training changed with the adapter. A digest of the base's
    files goes into the metadata: an adapter means nothing on another base, and shapes alone do not tell.

    Returns:
        The directory, with adapter_config.json and adapter_model.safetensors.
    """
    path = Path(directory)
    if path.exists() and not (path / "adapter_config.json").is_file():
        raise ValueError(f"{path} exists and is no adapter; it would be replaced: choose another name")
    weights = {
        PREFIX + key.replace(f".{name}.", "."): parameter.detach().contiguous()
        for key, parameter in model.named_parameters()
        if is_of_adapter(key, name) or key == HEAD
    }

    def write(fresh: Path) -> None:
        config = copy.copy(model.peft_config[name])
        if PREFIX + HEAD in weights:
            config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
        config.inference_mode = True
        config.target_modules = sorted(config.target_modules)
        config.save_pretrained(str(fresh))
        save_file(weights, fresh / WEIGHTS, metadata={"format": "pt", **_base_digest(model)})

    write_directory(path, write)
    return path


@torch.no_grad()
def load_adapter(model: PreTrainedModel, directory: str | Path, *, name: str, is_trainable: bool = False) -> None:
    """Add the adapter that `save_adapter` wrote, in place; the active adapter stays the same unless it is the first.

    A scalar head beside it is left there: see `adapter_head`.

    Raises:
        ValueError: no adapter there, or it was made for another model, or for other weights of it.
    """
    path = Path(directory)
    config: dict[str, Any] = json_file(path / "adapter_config.json")
    file = path / WEIGHTS
    if config.get("peft_type") != "LORA" or not file.is_file():
        raise ValueError(f"{path} has no LoRA adapter (adapter_config.json, adapter_model.safetensors)")
    for option in ("use_rslora", "alpha_pattern"):  # other scales; other shapes and names are found below
        if config.get(option):
            raise ValueError(f"{path} has {option}, which fastrl's adapters do not; merge it into its base with peft")
    with safe_open(file, framework="pt") as saved_file:
        theirs = (saved_file.metadata() or {}).get(BASE)
    ours = _base_digest(model).get(BASE)
    if theirs is not None and ours is not None and theirs != ours:
        raise ValueError(
            f"{path} was trained on {config.get('base_model_name_or_path')}, a base with other weights than "
            f"{model.config._name_or_path}; train it on that, or name its merged model"
        )
    targets = config["target_modules"]
    if not isinstance(targets, list):
        raise ValueError(f"{path}: target_modules must be a list of names, got {targets!r}; write them out")
    add_lora(model, r=config["r"], alpha=config["lora_alpha"], seed=0, target_modules=sorted(targets), name=name)
    saved = load_file(file)
    saved.pop(PREFIX + HEAD, None)
    own = {
        PREFIX + key.replace(f".{name}.", "."): parameter
        for key, parameter in model.named_parameters()
        if is_of_adapter(key, name)
    }
    if saved.keys() != own.keys() or any(saved[key].shape != own[key].shape for key in own):
        raise ValueError(f"{path} is an adapter of another model or of other layers than {type(model).__name__} has")
    for key, parameter in own.items():
        parameter.copy_(saved[key])
        parameter.requires_grad_(is_trainable)


def adapter_head(directory: str | Path) -> Tensor:
    """[1, D] f32 the scalar head that `save_adapter` wrote beside an adapter.

    Raises:
        ValueError: there is none, so the adapter belongs to no reward model.
    """
    saved = load_file(Path(directory) / WEIGHTS)
    if PREFIX + HEAD not in saved:
        raise ValueError(
            f"{Path(directory) / WEIGHTS} has no weight {PREFIX + HEAD!r}, so {directory} is the adapter of no reward "
            "model; train one with fastrl reward --use_peft"
        )
    return saved[PREFIX + HEAD].float()


def _base_digest(model: PreTrainedModel) -> dict[str, str]:
    """BASE -> SHA-256 of the digests of the weight files the model was read from; {} when they are not there."""
    name = model.config._name_or_path
    files = sorted(Path(name).glob("*.safetensors")) if name else []  # a model made in memory has no name
    if not files:
        return {}
    return {BASE: hashlib.sha256("".join(map(digest, files)).encode()).hexdigest()}
