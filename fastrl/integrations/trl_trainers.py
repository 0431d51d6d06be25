"""TRL's GRPO and DPO trainers with packed rows and fastrl's head; losses, metrics and everything else are TRL's.

Both patch TRL for the process when they are made (`fastrl.integrations.trl.patch`). The arguments are TRL's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer

from fastrl.integrations.trl import active, patch
from fastrl.integrations.trl_head import TokenRule
from fastrl.integrations.trl_objective import is_by_token, token_rule
from fastrl.integrations.trl_packing import PackedForward, pack_forward

GRADIENT_TOLERANCE = 1e-3  # of the sum of sizes
TOLERANCE = 1e-4  # between TRL's loss and ours of the same log-probabilities, relative to 1 + |loss|; float32 sums


class FastGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """`trl.GRPOTrainer` on packed rows, in a single pass over the head where the loss is one per token.

    Loss types grpo, bnpo, dr_grpo, dapo, cispo and sapo with token-level ratios take 6 D V operations a token and keep
    nothing of size V; the others, the off-policy mask and the entropy quantile need every log-probability before the
    loss is known, and take `linear_logprob` with its cache. `uses_single_pass` says which it is. TRL's own code works
    out every metric and the value of the loss from the same log-probabilities; a step whose two losses differ raises.

    Raises:
        ValueError: at construction, for a setting that is not supported, with what to do instead.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _require_supported(self)
        self._packed = _pack_models(self)
        self.uses_single_pass = is_by_token(self)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self.uses_single_pass:
            return super()._compute_loss(model, inputs)  # type: ignore[no-any-return]
        rule = self._packed.rule = token_rule(self, inputs)
        try:
            value = super()._compute_loss(model, inputs)
        finally:
            self._packed.rule = None
        loss, given = self._packed.loss, self._packed.given
        assert loss is not None
        assert given is not None
        self._packed.given = None
        # CISPO's two forms differ by a constant; the gradient is the same.
        is_same = torch.isclose(value.float(), loss.float(), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        if self.loss_type != "cispo" and not is_same:
            raise RuntimeError(
                f"TRL's loss is {value.item()} and fastrl's of the same log-probabilities {loss.item()}: this TRL, or "
                "a subclass, computes another loss; use GRPOTrainer with fastrl.integrations.trl.patch()"
            )
        if value.requires_grad:
            _require_same_gradient(value, rule, given)
        return loss + (value - loss).detach()  # type: ignore[no-any-return]


class FastDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """`trl.DPOTrainer` on packed rows, its head on completion tokens alone; all of TRL's loss types.

    The tokens of a pair meet inside one sigmoid, so no loss per token exists: the head is `linear_logprob`, whose cache
    of `patch(cache_gib=...)` makes the rows in it cost one logits product, as in a single pass.

    Raises:
        ValueError: at construction, for a setting that is not supported, with what to do instead.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _require_supported(self)
        self._packed = _pack_models(self)


def _require_same_gradient(value: Tensor, rule: TokenRule, given: tuple[Tensor, Tensor, Tensor]) -> None:
    """Raise where TRL's loss has another gradient than the rule's: on policy, losses of many forms have one value.

    Args:
        value: [] TRL's loss of the given log-probabilities.
        rule: that fastrl has differentiated.
        given: log-probability, entropy (leaves) and place [C]. A backward pass that reaches them later raises too:
            what was made of them besides the loss would be lost, as they end at the head.
    """
    leaves = given[:2]
    theirs = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    ours = torch.autograd.grad(rule(*given).sum(), leaves, allow_unused=True, materialize_grads=True)
    gap = sum(float((x - y).abs().sum()) for x, y in zip(theirs, ours, strict=True))
    # A sum over tokens: one that lies on the edge of a clip may fall on either side.
    if gap > GRADIENT_TOLERANCE * sum(float(x.abs().sum()) for x in ours):
        raise RuntimeError(
            "TRL's loss has another gradient by the log-probabilities than fastrl's: this TRL, or a subclass, computes "
            "another loss; use GRPOTrainer with fastrl.integrations.trl.patch()"
        )

    def lost(gradient: Tensor) -> None:
        raise RuntimeError(
            "a subclass uses log-probabilities or entropies of FastGRPOTrainer's single pass outside the loss, and "
            "their gradient would be lost: use GRPOTrainer with fastrl.integrations.trl.patch()"
        )

    for leaf in leaves:
        leaf.register_hook(lost)


def _require_supported(trainer: Any) -> None:
    """Raise for what packing would get wrong, or nobody has tried."""
    peft_config = getattr(trainer.model, "active_peft_config", None)
    refused = {
        "a vision model": trainer._is_vlm,
        "prompt tuning": peft_config is not None and peft_config.is_prompt_learning,
        "a load-balancing loss (router_aux_loss_coef)": trainer.aux_loss_enabled,
        "noise in proportion to a row's length (neftune_noise_alpha)": trainer.args.neftune_noise_alpha is not None,
        "use_liger_kernel": trainer.args.use_liger_kernel,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        "tensor, context or sequence parallelism": trainer.accelerator.parallelism_config is not None,
        "several GPUs in one process (torch.nn.DataParallel)": trainer.args.n_gpu > 1,
    }
    for name, is_there in refused.items():
        if is_there:
            host = type(trainer).__mro__[1].__name__
            raise ValueError(
                f"{type(trainer).__name__} does not support {name}: use trl.{host} with fastrl.integrations.trl.patch()"
            )


def _pack_models(trainer: Any) -> PackedForward:
    if active() is None:
        patch()
    asked = PackedForward()
    model = trainer.model
    pack_forward(model.get_base_model() if hasattr(model, "get_base_model") else model, asked)
    if trainer.ref_model is not None:
        pack_forward(trainer.ref_model, asked)
    return asked
