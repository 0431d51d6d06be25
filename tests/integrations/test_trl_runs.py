"""Ten steps of TRL's trainers with fastrl give the losses, metrics and weights of ten steps without."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if find_spec("trl") is None or find_spec("datasets") is None:
    pytest.skip("TRL is not installed (tests/hosts has it)", allow_module_level=True)

from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer

from fastrl.integrations.trl import FastDPOTrainer, FastGRPOTrainer, active, patched, unpatch
from tests.integrations.trl_runs import Log, Run, largest_differences, reward, run, trainer
from tests.parity.setting import make_tokenizer

pytestmark = pytest.mark.filterwarnings("default")
Record = Callable[[str, object], None]  # pytest's record_property
BOUND = {"loss": 1e-5, "metrics": 1e-4, "weights": 1e-5}
# Packed attention sums in another order, which moves gradients by d = 8e-8, and m and sqrt(v) by at most d each. So
# Adam's step lr m / (sqrt(v) + epsilon) moves by about 2 lr d / epsilon at most: with epsilon 1e-8 by anything, for a
# gradient as small (one weight of 7000 starts with 7.6e-9); with 1e-4 and rates that add up to 5.5e-3, by 9e-6 in all.
EPSILON = 1e-4
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
EVERY = (SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer, RLOOTrainer)
ANY: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": True},
    "autocast": {"bf16": True},
}
SPECIAL: dict[Any, dict[str, dict[str, Any]]] = {
    SFTTrainer: {"dft": {"loss_type": "dft"}, "packing": {"packing": True, "max_length": 32}},
    DPOTrainer: {
        "precomputed": {"precompute_ref_log_probs": True},
        "three losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        "ipo": {"loss_type": "ipo"},
        "weighted": {"use_weighting": True},
        "long tails": {"ld_alpha": 0.5},
    },
    KTOTrainer: {"apo": {"loss_type": "apo_zero_unpaired"}},
    GRPOTrainer: {
        "kl": {"beta": 0.1},
        "kl, corrected": {"beta": 0.1, "use_bias_correction_kl": True},
        **{name: {"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")},
        "sequences": {"importance_sampling_level": "sequence"},
        "entropy quantile": {"top_entropy_quantile": 0.5},
        "entropy bonus": {"entropy_coef": 0.01},
        "two iterations, delta": {"num_iterations": 2, "delta": 1.5, "epsilon": 0.01},
        "off-policy mask": {"off_policy_mask_threshold": 0.01, "num_iterations": 2},
        "temperature": {"temperature": 0.7},
        "temperature, plain SGD": {"temperature": 0.7, "optim": "sgd", "learning_rate": 0.3},
        "head in float32": {"cast_lm_head_to_fp32": True},
        "accumulation, kl": {"beta": 0.1, "gradient_accumulation_steps": 2, "loss_type": "grpo"},
    },
    RLOOTrainer: {"kl": {"beta": 0.1}},
}
CASES = [
    pytest.param(kind, settings, id=f"{kind.__name__}: {name}")
    for kind in EVERY
    for name, settings in (ANY | SPECIAL[kind]).items()
]
PACKED: dict[Any, Any] = {DPOTrainer: FastDPOTrainer, GRPOTrainer: FastGRPOTrainer}


@pytest.fixture(autouse=True)
def _leave_trl_as_it_was() -> Iterator[None]:
    yield
    unpatch()


def asked(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run: "lora" is a PEFT configuration."""
    settings = dict(settings)
    if settings.pop("lora", False):
        peft = pytest.importorskip("peft")
        settings["peft_config"] = peft.LoraConfig(**LORA)
    return settings


def assert_same(
    ours: Run, theirs: Run, settings: dict[str, Any], record_property: Record, allowed: dict[str, float]
) -> None:
    if settings.get("bf16"):  # TRL rounds logits to bfloat16, fastrl keeps float32, and Adam makes more of it
        allowed = {"loss": 3e-2, "metrics": 0.5, "weights": 3e-2}
    found = largest_differences(ours, theirs)
    for name, value in found.items():
        record_property(name, value)
    assert all(found[name] <= allowed[name] for name in allowed), found


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_ten_steps_with_patch(kind: Any, settings: dict[str, Any], record_property: Record) -> None:
    theirs = run(kind, **asked(settings))
    with patched():
        ours = run(kind, **asked(settings))
    assert_same(ours, theirs, settings, record_property, BOUND)


@pytest.mark.parametrize(("kind", "settings"), [case for case in CASES if case.values[0] in PACKED])
def test_ten_steps_packed(kind: Any, settings: dict[str, Any], record_property: Record) -> None:
    settings = {"adam_epsilon": EPSILON} | settings
    theirs = run(kind, **asked(settings))
    ours = run(PACKED[kind], **asked(settings))
    assert active() is not None
    assert_same(ours, theirs, settings, record_property, BOUND)


def no_reward_of(rows: Collection[int]) -> Callable[..., list[float | None]]:
    """A judge that has none for some of the eight completions of a batch."""

    def judge(completions: list[Any], **columns: Any) -> list[float | None]:
        return [None if i in rows else value for i, value in enumerate(reward(completions))]

    return judge


TRUNCATED: dict[str, Any] = {"mask_truncated_completions": True}
ENDLESS = TRUNCATED | {"generation_kwargs": {"suppress_tokens": make_tokenizer().all_special_ids}}
LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
UNSCORED: dict[str, dict[str, Any]] = {
    **{f"{name}, all truncated": ENDLESS | {"loss_type": name} for name in LOSS_TYPES},
    **{f"{name}, some truncated": TRUNCATED | {"loss_type": name} for name in LOSS_TYPES},
    "kl, all truncated": ENDLESS | {"beta": 0.1},
    "entropy bonus, all truncated": ENDLESS | {"entropy_coef": 0.01},
    "entropy quantile, all truncated": ENDLESS | {"top_entropy_quantile": 0.5},
    "off-policy mask, all truncated": ENDLESS | {"off_policy_mask_threshold": 0.01, "num_iterations": 2},
    "sequences, all truncated": ENDLESS | {"importance_sampling_level": "sequence"},
    "prompts of one token, all truncated": ENDLESS | {"prompts": list("abcdefgh")},
    "prompts of one token, some truncated": TRUNCATED | {"prompts": ["a", "bcd", "e", "fg"], "beta": 0.1},
    "no reward for a row": {"judge": no_reward_of({0, 5})},
    "no reward for a group": {"judge": no_reward_of(range(4))},
    "no reward": {"judge": no_reward_of(range(8))},
    "no reward, kl": {"judge": no_reward_of(range(8)), "beta": 0.1},
}


@pytest.mark.parametrize("settings", UNSCORED.values(), ids=UNSCORED)
def test_completions_that_are_masked_or_have_no_reward(settings: dict[str, Any], record_property: Record) -> None:
    """No exception and no NaN that TRL alone does not have."""
    settings = {"max_steps": 4, "eval_steps": 2, "adam_epsilon": EPSILON} | settings
    theirs = run(GRPOTrainer, **settings)
    truncated = [line["completions/clipped_ratio"] for line in theirs[0] if "completions/clipped_ratio" in line]
    if "generation_kwargs" in settings:
        assert set(truncated) == {1.0}
    elif "mask_truncated_completions" in settings:
        assert 0 < sum(truncated) < len(truncated)
    with patched():
        for kind in (GRPOTrainer, FastGRPOTrainer):
            assert_same(run(kind, **settings), theirs, settings, record_property, BOUND)


def test_nothing_is_as_far_from_a_number_as_can_be() -> None:
    """The comparison itself: a NaN or a missing metric on one side alone is seen."""
    one = torch.ones(2)
    number: Log = [{"loss": 1.0, "kl": 2.0}]
    nothing: Log = [{"loss": float("nan"), "kl": None}]
    broken = torch.tensor([1.0, float("nan")])
    assert largest_differences((nothing, {"w": one}), (nothing, {"w": one})) == {"loss": 0, "metrics": 0, "weights": 0}
    infinite = {name: float("inf") for name in ("loss", "metrics", "weights")}
    assert largest_differences((number, {"w": one}), (nothing, {"w": broken})) == infinite
    assert largest_differences((nothing, {"w": broken}), (number, {"w": one})) == infinite


@pytest.mark.parametrize("kind", PACKED)
def test_a_compiled_model_packs_too(kind: Any, record_property: Record) -> None:
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2, "adam_epsilon": EPSILON}
    theirs = run(kind, **settings)
    assert_same(run(PACKED[kind], **settings), theirs, settings, record_property, BOUND)


def test_the_single_pass_is_taken_where_the_loss_is_by_token(tmp_path: Path) -> None:
    by_token = [trainer(FastGRPOTrainer, tmp_path, loss_type=name) for name in ("dapo", "grpo", "cispo", "sapo")]
    assert all(each.uses_single_pass for each in by_token)
    not_by_token: list[dict[str, Any]] = [
        {"loss_type": "vespo"},
        {"loss_type": "luspo"},
        {"importance_sampling_level": "sequence"},
        {"top_entropy_quantile": 0.5},
        {"off_policy_mask_threshold": 0.1},
    ]
    assert not any(trainer(FastGRPOTrainer, tmp_path, **each).uses_single_pass for each in not_by_token)


@pytest.mark.parametrize("kind", [FastGRPOTrainer, FastDPOTrainer])
def test_what_is_not_supported_is_refused_at_construction(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = pytest.importorskip("peft")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=rf"prompt tuning: use trl.{kind.__name__[4:]}"):
        trainer(kind, tmp_path, peft_config=prompts)
    with pytest.raises(ValueError, match=rf"neftune_noise_alpha.*: use trl.{kind.__name__[4:]}"):
        trainer(kind, tmp_path, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match="lm_head"):
        trainer(kind, tmp_path, peft_config=peft.LoraConfig(**LORA | {"target_modules": ["lm_head"]}))


def test_a_model_whose_packed_sequences_see_each_other_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    with pytest.raises(ValueError, match="see each other"):
        trainer(FastGRPOTrainer, tmp_path)


def test_a_loss_that_trl_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(FastGRPOTrainer, tmp_path)
    theirs = GRPOTrainer._compute_loss
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: theirs(self, model, inputs) + 0.1)
    with pytest.raises(RuntimeError, match="computes another loss"):
        made.train()


def test_a_trainer_that_lost_its_patch_says_so(tmp_path: Path) -> None:
    made = trainer(FastDPOTrainer, tmp_path)
    unpatch()
    with pytest.raises(RuntimeError, match="patch"):
        made.train()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packing_feeds_fewer_positions(implementation: str, tmp_path: Path) -> None:
    made = trainer(FastDPOTrainer, tmp_path, max_steps=1)
    made.model.set_attn_implementation(implementation)
    seen = []
    made.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    padded = []
    theirs = made._compute_loss

    def compute(model: Any, inputs: Any, *args: Any) -> Any:
        padded.append(inputs["input_ids"].shape)
        return theirs(model, inputs, *args)

    made._compute_loss = compute
    made.train()
    assert seen
    assert torch.Size(seen[0]).numel() < padded[0].numel()
    assert seen[0][1] < padded[0][1]


class HalfLogprobs(FastGRPOTrainer):
    """Whose loss has the same value on policy, and half the gradient."""

    def _get_per_token_logps_and_entropies(self, *args: Any, **settings: Any) -> Any:
        logprob, *others = super()._get_per_token_logps_and_entropies(*args, **settings)
        self.seen = logprob
        return (logprob * 0.5, *others)


class TermOfLogprobs(FastGRPOTrainer):
    """Which adds to the loss a term of log-probabilities that end at the head."""

    def _get_per_token_logps_and_entropies(self, *args: Any, **settings: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **settings)
        self.seen = found[0]
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss: Tensor = super()._compute_loss(model, inputs) + self.seen.mean()
        return loss


@pytest.mark.parametrize(
    ("kind", "message"), [(HalfLogprobs, "another gradient"), (TermOfLogprobs, "gradient would be lost")]
)
def test_a_subclass_whose_gradient_the_single_pass_would_miss_is_refused(
    kind: Any, message: str, tmp_path: Path
) -> None:
    made = trainer(kind, tmp_path, steps_per_generation=1)
    assert made.uses_single_pass
    with pytest.raises(RuntimeError, match=message):
        made.train()
