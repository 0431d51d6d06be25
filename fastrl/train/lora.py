"""Low-rank adapters over a frozen base, by peft: named, switched on and off, so that one base plays several parts.

    y = W x + (alpha / r) B A x,    A [r, in] random, B [out, r] zero at first; W never moves

The reference of a run is its policy with the adapter off; a reward model and a critic may be further adapters of the
same base. Nothing here imports peft before an adapter is added.

Source: Hu et al. 2021, arXiv:2106.09685, sec. 4.1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastrl.train.quantize import silence_bitsandbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"
POLICY = "default"  # peft's own name for the adapter of a model that has one


def add_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    seed: int,
    target_modules: Sequence[str] = (ALL_LINEAR,),
    name: str = POLICY,
) -> None:
    """Freeze `model` and add an adapter to its linear layers, in place; until it is trained the values stay the same.

    The first adapter stays the active one, whatever is added later; `adapter` and `adapter_off` switch for a while.
    Parameters of adapters that were there keep their `requires_grad`; all others are frozen (switch a value head's on
    again afterwards). An adapter has the precision its base computes in; the optimizer keeps float32 masters of it.

    Args:
        r: rank.
        alpha: the adapter's product is scaled by alpha / r.
        seed: of A's random values.
        target_modules: names of linear layers ("q_proj", or longer paths that end so) below the head; "all-linear" is
            all of them.
        name: of the adapter; part of its parameters' names.

    Raises:
        ValueError: a target that is no linear layer of the model's layers, or a name that is taken.
    """
    silence_bitsandbytes()
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    if name in adapter_names(model) or "." in name:
        raise ValueError(f"adapter name {name!r} must be new and have no dot; there are {adapter_names(model)}")
    is_first = not adapter_names(model)
    before = {} if is_first else {key: p.requires_grad for key, p in model.named_parameters()}
    chosen = _targets(model, target_modules)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=chosen,
        # GPT-2 keeps its matrices as (in, out).
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=None if model.get_output_embeddings() is None else "CAUSAL_LM",
        base_model_name_or_path=model.config._name_or_path,
    )
    active = active_adapters(model)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        torch.default_generator.manual_seed(seed)  # peft draws A from the global generator
        inject_adapter_in_model(config, model, adapter_name=name)
    _activate(model, (name,) if is_first else active)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(before.get(key, is_of_adapter(key, name)))


def is_of_adapter(parameter: str, name: str = POLICY) -> bool:
    """Whether a parameter's name says that it belongs to the adapter."""
    parts = parameter.split(".")
    return len(parts) > 2 and parts[-3] in ("lora_A", "lora_B") and parts[-2] == name


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of all adapters, in the order they were added; () for a model without any."""
    found = {name: None for layer in lora_layers(model) for name in layer.lora_A}
    return tuple(found)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that the next forward pass uses; () for the base alone."""
    for layer in lora_layers(model):
        return tuple(layer.active_adapters)
    return ()


@contextmanager
def adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Use one adapter instead of the active one inside the block; `requires_grad` of all parameters stays.

    Raises:
        ValueError: the model has no such adapter.
    """
    if name not in adapter_names(model):
        raise ValueError(f"the model has no adapter {name!r}; it has {adapter_names(model)}")
    with _switched(model, (name,)):
        yield


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base inside the block, bit for bit; on a model without adapters this does nothing."""
    with _switched(model, ()):
        yield


def as_in_forward(model: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For activation checkpointing: what is computed again in the backward pass uses the adapter of the forward pass.

    Returns:
        contexts of the forward pass and of its recomputation, as torch's `checkpoint(context_fn=)` wants them.
    """
    if next(lora_layers(model), None) is None:
        return nullcontext(), nullcontext()
    return nullcontext(), _switched(model, active_adapters(model))


def lora_layers(model: nn.Module) -> Iterator[Any]:
    """The modules of peft that hold adapters beside a base layer."""
    return filter(is_lora_layer, model.modules())


def is_lora_layer(module: nn.Module) -> bool:
    """Whether a module is one of peft's; asked without importing that."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


@contextmanager
def _switched(model: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    before = active_adapters(model)
    if before == names:
        yield
        return
    _activate(model, names)
    try:
        yield
    finally:
        _activate(model, before)


def _activate(model: nn.Module, names: tuple[str, ...]) -> None:
    """Change which adapters the forward pass uses; peft would also change which of them are trained."""
    for layer in lora_layers(model):
        flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
        layer.set_adapter(list(names))
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _targets(model: PreTrainedModel, wanted: Sequence[str]) -> list[str]:
    """The chosen layers' last names where those choose the same layers, as adapters are usually written; else paths."""
    from transformers.pytorch_utils import Conv1D

    backbone = model.base_model if model.base_model is not model else model.get_decoder()
    below_head = {id(module) for module in backbone.modules()}
    adapted = {id(layer.get_base_layer()) for layer in lora_layers(model)}
    linear = []
    for path, module in model.named_modules():
        if ".lora_A." in path or ".lora_B." in path or id(module) not in below_head:
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            linear.append(path.removesuffix(".base_layer") if id(module) in adapted else path)
    chosen = []
    for target in wanted:
        fitting = [path for path in linear if target == ALL_LINEAR or f".{path}".endswith(f".{target}")]
        if not fitting:
            known = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
            raise ValueError(
                f"lora_target_modules: {target} is no linear layer below the head of {type(model).__name__}; "
                f"expected all-linear, or some of {known}"
            )
        chosen += fitting
    paths = list(dict.fromkeys(chosen))
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    same = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in names]
    return names if set(same) == set(paths) else paths
