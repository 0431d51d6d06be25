"""pytest plugin: Liger's modules get fastrl's names before Liger's tests import them.

Every `LigerFusedLinear*Function.apply` becomes a call of our loss module: Liger's own signature says which argument is
which, so order and defaults are Liger's.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch

from fastrl.integrations import liger as ours

KINDS = ("DPO", "ORPO", "CPO", "SimPO", "KTO", "JSD", "GRPO")
RENAMED = {"weight": "lin_weight", "input": "_input"}
# Names of what the tests look into, which is Liger's dispatch between its own implementations and not an interface.
ABOUT_LIGER = {
    "test_frontend_uses_fallback_without_sm90_nvidia": "tests which of Liger's implementations is chosen",
    "test_frontend_uses_fallback_for_unsupported_nvidia_compute_capability": "as above",
    "test_frontend_dispatches_sm90_and_forwards_arguments": "as above, with a stand-in for Liger's sm_90 kernel",
    "test_frontend_is_exported_from_ops_root": "tests that the class is defined in a module of Liger",
}


def pytest_configure(config: pytest.Config) -> None:
    """Swap before collection."""
    # The random logits of the large shapes are 100 nats apart: probabilities below 1e-38, whose products take a CPU ten
    # times as long, here and in the tests' references. Nothing is compared to within 1e-38.
    torch.set_flush_denormal(True)
    functional = importlib.import_module("liger_kernel.chunked_loss.functional")
    package = importlib.import_module("liger_kernel.chunked_loss")
    for kind in KINDS:
        module = importlib.import_module(f"liger_kernel.chunked_loss.{kind.lower()}_loss")
        function = _function(getattr(ours, f"LigerFusedLinear{kind}Loss"), getattr(module, _name(kind)))
        setattr(module, _name(kind), function)
        setattr(functional, f"liger_fused_linear_{kind.lower()}", function.apply)
        for owner in (package, module):
            setattr(owner, f"LigerFusedLinear{kind}Loss", getattr(ours, f"LigerFusedLinear{kind}Loss"))
    _swap_cross_entropy()
    ops = importlib.import_module("liger_kernel.ops.grpo_loss")
    ops.fused_selective_log_softmax = ours.fused_selective_log_softmax
    logits = importlib.import_module("liger_kernel.transformers.grpo_loss")
    logits.triton_grpo_loss = ours.triton_grpo_loss


def _swap_cross_entropy() -> None:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    ops = importlib.import_module("liger_kernel.ops")
    theirs = ops.LigerFusedLinearCrossEntropyFunction
    loss = ours.LigerFusedLinearCrossEntropyLoss
    call = _bound(loss, inspect.signature(functional.liger_fused_linear_cross_entropy))
    apply = _bound(loss, _without_context(theirs))

    def as_tuple(*args: Any, **kwargs: Any) -> Any:
        found = apply(*args, **kwargs)
        return found if isinstance(found, tuple) else ours.CrossEntropyOutput(found)

    functional.CrossEntropyOutput = ours.CrossEntropyOutput
    functional.liger_fused_linear_cross_entropy = call
    module.LigerFusedLinearCrossEntropyLoss = loss
    ops.LigerFusedLinearCrossEntropyFunction = type(theirs.__name__, (), {"apply": staticmethod(as_tuple)})


def _name(kind: str) -> str:
    return f"LigerFusedLinear{kind}Function"


def _function(loss: type, theirs: Any) -> Any:
    """A class whose `apply` takes what Liger's takes."""
    return type(theirs.__name__, (), {"apply": staticmethod(_bound(loss, _without_context(theirs)))})


def _without_context(function: Any) -> inspect.Signature:
    signature = inspect.signature(function.forward)
    kept = [parameter for name, parameter in signature.parameters.items() if name not in ("cls", "ctx")]
    return signature.replace(parameters=kept)


def _bound(loss: type, signature: inspect.Signature) -> Any:
    options = set(inspect.signature(loss).parameters)
    tensors = set(inspect.signature(loss.forward).parameters)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = {RENAMED[name] if RENAMED.get(name) in tensors else name: x for name, x in bound.arguments.items()}
        assert set(given) <= options | tensors, set(given) - options - tensors
        made = loss()
        for name in options & set(given):  # Liger's functions take what its modules refuse, and its tests pass it
            setattr(made, name, given[name])
        return made(**{name: x for name, x in given.items() if name in tensors})

    return call


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The scaled cross entropy is loaded from its file, under no name: swap it in the test's module."""
    for item in items:
        frontend = getattr(getattr(item, "module", None), "_FRONTEND", None)
        if frontend is not None:
            frontend.LigerFusedLinearScaledCrossEntropyFunction = ours.LigerFusedLinearScaledCrossEntropyFunction
        reason = ABOUT_LIGER.get(getattr(item, "originalname", item.name))
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"not ours to pass: {reason}"))
