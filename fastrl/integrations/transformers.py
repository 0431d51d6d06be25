"""A causal language model of transformers whose training loss never makes its logits.

    applied = apply_fastrl(model)       # before or after the Trainer is made
    trainer.train()
    applied.revert()

In training, with labels, the output head returns a stand-in that remembers the hidden states. The model's own code
scales and caps it as it would the logits, and hands it to its loss function, which is ours. So the numbers are those
of the model's source, and whatever it does to logits that is not known here is refused, not guessed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastrl.integrations.liger.head import operands, read_target
from fastrl.ops import linear_cross_entropy
from fastrl.ops.backend import BACKENDS


class UnmadeLogits:
    """What a head returns in place of logits: z = scale raw, or cap tanh(scale raw / cap).

    Multiplying, dividing, tanh and changes of dtype are remembered; the loss is made from float32 logits anyway.
    """

    __slots__ = ("cap", "head", "hidden", "scale")

    def __init__(self, hidden: Tensor, head: nn.Linear, scale: float = 1.0, cap: float | None = None) -> None:
        """Hidden [.., D] of a head; `cap` None before a tanh."""
        self.hidden, self.head, self.scale, self.cap = hidden, head, scale, cap

    def __mul__(self, factor: Any) -> UnmadeLogits:
        number = _number(factor)
        if self.cap is None:
            return UnmadeLogits(self.hidden, self.head, self.scale * number)
        return UnmadeLogits(self.hidden, self.head, self.scale * number, self.cap * number)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> UnmadeLogits:
        return self * (1 / _number(divisor))

    def tanh(self) -> UnmadeLogits:
        """tanh(scale raw), a cap of 1."""
        if self.cap is not None:
            raise _unknown("a second tanh")
        return UnmadeLogits(self.hidden, self.head, self.scale, 1.0)

    def float(self) -> UnmadeLogits:
        """Float32, which they are."""
        return self

    def contiguous(self) -> UnmadeLogits:
        """In order, which they are (OPT)."""
        return self

    @property
    def device(self) -> torch.device:
        """Where labels are moved to."""
        return self.hidden.device

    def _refuse(self, *_: Any) -> Any:
        raise _unknown("an index, or arithmetic other than * and /,")

    __getitem__ = __setitem__ = __iter__ = __add__ = __radd__ = __sub__ = __rsub__ = __rtruediv__ = _refuse
    __neg__ = __pow__ = __matmul__ = __floordiv__ = __mod__ = _refuse

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """torch.tanh, torch.mul and torch.div of them."""
        name = getattr(function, "__name__", repr(function))
        if kwargs or name not in ("tanh", "mul", "div", "true_divide"):
            raise _unknown(f"torch.{name}")
        if name == "tanh":
            return args[0].tanh()
        if not isinstance(args[0], cls):
            args = args[::-1] if name == "mul" else args
        return args[0] * args[1] if name == "mul" else args[0] / args[1]

    def __getattr__(self, name: str) -> Any:
        raise _unknown(f".{name}")


def _number(factor: Any) -> float:
    if isinstance(factor, Tensor) and (factor.requires_grad or factor.numel() != 1):
        raise _unknown("a tensor that is trained or is more than one number")
    if not isinstance(factor, (int, float, Tensor)):
        raise _unknown(f"a {type(factor).__name__}")
    return float(factor)


def _unknown(what: str) -> AttributeError:
    return AttributeError(
        f"this model's forward uses {what} on its logits, which fastrl does not know: call revert() and train it as is"
    )


class Applied:
    """Owns the change of one model; `revert()` takes it back, as does leaving it as a context manager.

    The model holds it and nothing else holds the model, so a deep copy of the model has one of its own.
    """

    def __init__(self, model: Any, backend: str | None) -> None:
        """Change `model`."""
        # One that was reverted while another wrapped its forward is called still: its place is taken.
        earlier: Applied | None = vars(model).get("_fastrl_applied")
        self._model, self._backend, self._is_reverted = model, backend, False
        self._loss = model.loss_function
        self._forward: Callable[..., Any] = model.forward if earlier is None else earlier._forward
        self._before: Any = vars(model).get("forward") if earlier is None else earlier._before
        self._function: Callable[..., Any] = (
            _forward_of_applied(self._forward) if earlier is None else earlier._function
        )
        if earlier is None:
            model.forward = MethodType(self._function, model)
        model.loss_function = self._loss_of_unmade
        model._fastrl_applied = self

    @property
    def is_reverted(self) -> bool:
        """Whether the model trains as it was."""
        return self._is_reverted

    def revert(self) -> None:
        """Give the model back its forward and loss, as they were; doing it twice does nothing.

        Where another set a loss or wrapped our forward since (accelerate's mixed precision), that stays, and ours
        hands through.
        """
        if self._is_reverted:
            return
        self._is_reverted = True
        if self._model.loss_function == self._loss_of_unmade:
            self._model.loss_function = self._loss
        if getattr(self._model.forward, "__func__", None) is not self._function:
            return
        if self._before is None:
            del self._model.forward
        else:
            self._model.forward = self._before
        del self._model._fastrl_applied

    def __enter__(self) -> Applied:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; its logits are left out of the output where they were not made."""
        is_plain = self._is_reverted or not self._model.training or kwargs.get("labels") is None
        # A compiled forward keeps the model's own loss: the stand-in is no tensor that a graph could hold.
        if is_plain or torch.compiler.is_compiling():
            return self._forward(*args, **kwargs)
        # Asked for every time: peft, resize_token_embeddings and DeepSpeed change the head behind our back.
        head: Any = _plain_head(self._model)
        head.forward = lambda hidden: self._unmake(head, hidden)
        try:
            output = self._forward(*args, **kwargs)
        finally:
            del head.forward
        return _without_unmade(output)

    def _unmake(self, head: nn.Linear, hidden: Tensor) -> Any:
        return UnmadeLogits(hidden, head)

    def _loss_of_unmade(
        self,
        logits: Any,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """transformers' causal loss; `others` are for it alone, and it does not read them."""
        if not isinstance(logits, UnmadeLogits):
            return self._loss(  # type: ignore[no-any-return]
                logits,
                labels,
                vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **others,
            )
        if shift_labels is None:
            assert labels is not None
            shift_labels = pad(labels, (-1, 1), value=ignore_index)  # transformers' labels are not shifted yet
        head = operands(logits.hidden, logits.head.weight, logits.head.bias)
        target = shift_labels.flatten().to(head.hidden.device)
        is_read = target != ignore_index
        loss = linear_cross_entropy(
            head.hidden,
            head.weight,
            read_target(target, is_read, len(head.weight)),
            token_weight=None if num_items_in_batch is None else is_read.float(),
            bias=head.bias,
            softcap=logits.cap,
            logit_scale=logits.scale,
            backend=self._backend,
        )
        return loss if num_items_in_batch is None else loss / num_items_in_batch


def apply_fastrl(model: Any, *, backend: str | None = None) -> Applied:
    """Let a causal language model train without N x V logits.

    Only its forward in training mode with labels changes: loss to rounding the same, `logits` absent from the output.
    Without labels, in eval mode, in `generate` and under torch.compile the model is as it was. So a Trainer with
    label_smoothing_factor or compute_loss_func, which keeps the labels to itself, gets its logits and its own loss.

    Args:
        model: a causal LM of transformers whose head is one torch.nn.Linear, tied or not, with or without bias; or a
            peft model around one. The LoRA of other layers is untouched.
        backend: see `fastrl.ops.linear_cross_entropy`.

    Returns:
        `Applied`, with `revert()`.

    Raises:
        ValueError: an unknown backend; a head that is no plain linear layer, has LoRA, a forward of its own,
            a forward or backward hook, or is sharded by DeepSpeed ZeRO-3; a model with another loss; a model that was
            applied to already. What has changed since, in the first forward.
        AttributeError: in the first forward, from a model that does something unknown to its logits.

    Cost: as `linear_cross_entropy`, 6 N D V over tokens with a label.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(inner, "_fastrl_applied") and not inner._fastrl_applied.is_reverted:
        raise ValueError("fastrl is applied to this model already: revert() the first one")
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "loss_function"):
        raise ValueError(f"{type(inner).__name__} is no model of transformers: pass a PreTrainedModel")
    _plain_head(inner)
    # By identity: a loss wrapped by functools.wraps has the name and another value.
    if inner.loss_function is not import_module("transformers.loss.loss_utils").ForCausalLMLoss:
        loss = getattr(inner.loss_function, "__qualname__", "a loss")
        raise ValueError(f"{type(inner).__name__} trains with {loss} of its own, not with ForCausalLMLoss")
    return Applied(inner, backend)


def _forward_of_applied(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A method for the model in place of `forward`, with its signature, by which a Trainer drops columns.

    A method, because deepcopy binds it to the copy and accelerate wraps it as one; what it does is in the model's
    Applied.
    """

    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        return model._fastrl_applied.run(*args, **kwargs)

    signature = inspect.signature(forward)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    named: Any = run
    named.__name__, named.__doc__ = "forward", forward.__doc__
    named.__signature__ = signature.replace(parameters=[itself, *signature.parameters.values()])
    return run


def _plain_head(model: Any) -> nn.Linear:
    head = outer = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):  # peft trains a copy of the whole layer
        head = head.modules_to_save[head.active_adapter]
    if hasattr(head, "lora_A"):
        raise ValueError(
            "the head has LoRA, whose product is not in its weight: leave lm_head out of target_modules, or name it in "
            "modules_to_save"
        )
    if type(head) is not nn.Linear:
        raise ValueError(f"the head of {type(model).__name__} is {type(head).__name__}, not one torch.nn.Linear")
    if "forward" in vars(head):
        raise ValueError(
            "the head has a forward of its own, from accelerate's device_map or a second thread in this model: train "
            "with the head on one device, and one model in one thread"
        )
    for layer in (outer, head):
        if layer._backward_hooks or layer._backward_pre_hooks:
            raise ValueError("the head has a backward hook, which would not be called: remove it, or hook its weight")
        # One that asks for a Tensor would do nothing.
        if layer._forward_hooks:
            raise ValueError("the head has a forward hook, which would be given no logits: remove it, or train as is")
    if hasattr(head.weight, "ds_id"):
        raise ValueError(
            "DeepSpeed ZeRO-3 shards the head's weight and gathers it for the head's own forward only, which comes "
            "before the loss: use ZeRO-2, or FSDP with the head in the root unit"
        )
    return head


def _without_unmade(output: Any) -> Any:
    if isinstance(output, UnmadeLogits):
        return None
    if isinstance(output, tuple):
        return tuple(_without_unmade(x) for x in output)
    if not isinstance(output, dict):
        return output
    kept: dict[str, Any] = {name: x for name, x in output.items() if not isinstance(x, UnmadeLogits)}
    rebuild: Callable[..., Any] = type(output)
    return output if len(kept) == len(output) else rebuild(**kept)
