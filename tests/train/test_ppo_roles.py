"""Who answers what: models of their own, adapters of one base, what they take, and directories that do not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from fastrl.data.pack import pack
from fastrl.recipes import ppo, reward, sorting
from fastrl.train.config import PPOConfig, ReportBlock, RewardConfig
from fastrl.train.lora import is_of_adapter
from fastrl.train.model import load_tokenizer
from fastrl.train.model_reward import ModelReward
from fastrl.train.ppo_losses import value_update_loss
from fastrl.train.ppo_roles import Roles, own_bytes, roles_of
from fastrl.train.score_model import load_score_model, save_score_model, token_scores
from fastrl.train.sequences import rollout_sequences
from fastrl.types import Rollout, TokenBatch

LORA: dict[str, Any] = {"use_peft": True, "lora_r": 2, "lora_alpha": 8}
QUIET = ReportBlock(panel=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base of the sorting task; a full reward model of random weights; the adapter of a trained one."""
    path = tmp_path_factory.mktemp("roles")
    sorting.make_base_model(path / "base", seed=0)
    tokenizer = load_tokenizer(path / "base", chat_template=None)
    judge = load_score_model(path / "base", dtype=torch.float32, device="cpu", new_head=1.0, seed=5)
    save_score_model(judge, tokenizer, path / "full", card="")
    sorting.write_task(path / "data", seed=0, n_sft=1, n_prompts=20, n_held_out=1)
    pairs = [
        {"prompt": q, "chosen": sorting.answer(q), "rejected": q} for q in ("483920", "774411", "905612", "130254")
    ]
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    config = RewardConfig(
        model_name_or_path=str(path / "base"),
        output_dir=str(path / "reward"),
        train_dataset=str(path / "pairs.jsonl"),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        report=QUIET,
        **LORA,
    )
    assert reward.run(config) == 0
    return path


def config(folder: Path, **changes: Any) -> PPOConfig:
    return PPOConfig(
        **{
            "model_name_or_path": str(folder / "base"),
            "output_dir": "unused",
            "train_dataset": str(folder / "data" / "prompts.jsonl"),
            "reward_funcs": ("tests.recipes.judges:digit_sum",),
            "report": QUIET,
            **changes,
        }
    )


def roles(folder: Path, **changes: Any) -> Roles:
    return roles_of(config(folder, **changes), load_tokenizer(folder / "base", chat_template=None))


def one_batch() -> TokenBatch:
    rollouts = [
        Rollout((2, 4 + a, 5, 3), (6, 4 + a, 7, 1), (0.0,) * 4, "stop", 0, (True, True, False, True)) for a in range(3)
    ]
    (batch,) = pack(rollout_sequences(rollouts, weight=[0.1] * 3, advantage=[0.0] * 3), token_budget=64)
    return batch


@torch.no_grad()
def answers(found: Roles, batch: TokenBatch) -> dict[str, Tensor]:
    functions = {"logprob": found.logprob, "ref": found.ref_logprob, "reward": found.reward, "value": found.value}
    return {name: function(batch) for name, function in functions.items() if function is not None}


# Memory


def test_four_roles_with_lora_take_at_most_1_3_times_the_policys_parameters(folder: Path) -> None:
    adapters = own_bytes(roles(folder, reward_model_path=str(folder / "reward" / "adapter"), **LORA).parameters)
    assert list(adapters) == ["policy", "reference", "reward model", "critic"]
    assert adapters["reference"] == 0
    assert sum(adapters.values()) <= 1.3 * adapters["policy"]
    separate = own_bytes(roles(folder, reward_model_path=str(folder / "full")).parameters)
    assert sum(separate.values()) > 3.9 * separate["policy"]
    shared = own_bytes(roles(folder, share_backbone=True, kl_coef=0.0).parameters)
    assert shared["critic"] == 4 * 64  # one row of 64 float32


# What each says


def test_adapters_of_one_base_answer_as_models_of_their_own(folder: Path) -> None:
    batch = one_batch()
    merged, adapter = str(folder / "reward" / "model"), str(folder / "reward" / "adapter")
    apart = answers(roles(folder, reward_model_path=merged), batch)
    together = answers(roles(folder, reward_model_path=adapter, **LORA), batch)
    for name in ("logprob", "ref", "reward", "value"):
        torch.testing.assert_close(together[name], apart[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert (
        apart["reward"] - answers(roles(folder, reward_model_path=str(folder / "full")), batch)["reward"]
    ).abs().max() > 0.1
    torch.testing.assert_close(apart["value"], apart["reward"])  # a critic starts from its reward model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_peft_reads_a_reward_models_adapter_with_its_head(folder: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    adapted = PeftModel.from_pretrained(base, str(folder / "reward" / "adapter"))
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "reward" / "model")
    ids = torch.tensor([[2, 4, 5, 3, 6, 1]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_the_critics_loss_moves_its_own_adapter_and_head_and_nothing_else(folder: Path) -> None:
    found = roles(folder, **LORA)
    batch = one_batch()
    with torch.no_grad():
        for name, parameter in found.policy.named_parameters():
            if is_of_adapter(name, "critic"):
                parameter.add_(0.1)  # away from the start, where only B has a gradient
    before = answers(found, batch)
    assert found.critic_optimizer is not None
    ready = _with_values(batch, before["value"])
    for _ in range(2):  # the head starts at 0: the adapter moves from the second step on
        value_update_loss(config(folder), found.value)(ready).loss.backward()  # type: ignore[no-untyped-call]
        assert found.optimizer.gradients() == {}
        found.critic_optimizer.step(1e-2)
        found.critic_optimizer.zero_grad()
    after = answers(found, batch)
    assert all(torch.equal(after[name], before[name]) for name in ("logprob", "ref"))
    assert (after["value"] - before["value"]).abs().min() > 1e-3
    names = {key.partition(".")[2] for key in found.critic_optimizer.state_dict()}
    assert "value_head" in names
    assert all("critic" in name for name in names - {"value_head"})


def _with_values(batch: TokenBatch, value: Tensor) -> TokenBatch:
    return replace(batch, old_value=value, returns=value + 1)


def test_a_run_with_adapters_moves_no_weight_of_the_base_and_keeps_its_reference(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Roles] = []
    original = ppo.set_up

    def seen(*args: Any, **options: Any) -> Any:
        setup = original(*args, **options)
        made.append(setup.roles)
        return setup

    monkeypatch.setattr(ppo, "set_up", seen)
    batch = one_batch()
    start = answers(roles(folder, **LORA), batch)
    run = config(
        folder,
        output_dir=str(tmp_path / "run"),
        reward_model_path=str(folder / "reward" / "adapter"),
        max_steps=4,
        max_completion_length=6,
        num_ppo_epochs=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        **LORA,
    )
    assert ppo.run(run) == 0
    (found,) = made
    end = answers(found, batch)
    assert torch.equal(end["ref"], start["ref"])
    assert (end["logprob"] - start["logprob"]).abs().max() > 1e-3
    torch.testing.assert_close(
        end["reward"], answers(roles(folder, reward_model_path=run.reward_model_path, **LORA), batch)["reward"]
    )
    # What is exported is the policy alone: its adapter merged, under the names of the base.
    saved, base = (load_file(path / "model.safetensors") for path in (tmp_path / "run" / "model", folder / "base"))
    assert saved.keys() == base.keys()
    torch.testing.assert_close(
        answers(roles(folder, model_name_or_path=str(tmp_path / "run" / "model")), batch)["logprob"],
        end["logprob"],
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_model_judges_as_transformers_scores_the_same_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "base", chat_template=None)
    judge = load_score_model(folder / "full", dtype=torch.float32, device="cpu")
    device = torch.device("cpu")
    ask = ModelReward(lambda batch: token_scores(judge, batch), tokenizer, token_budget=12, device=device)
    prompts = [[{"role": "user", "content": question}] for question in ("1", "23", "1")]
    completions = [[4, 5, 1], [9], [6, 6, 6, 6, 1]]
    theirs = AutoModelForSequenceClassification.from_pretrained(folder / "full")
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        digits = [4 + int(digit) for digit in prompt[0]["content"]]
        with torch.no_grad():
            expected.append(theirs(input_ids=torch.tensor([[2, *digits, 3, *completion]])).logits.item())
    assert ask(prompts, completions) == pytest.approx(expected, rel=1e-4)


# What does not fit


def test_a_value_head_missing_from_a_checkpoint_is_named(folder: Path, tmp_path: Path) -> None:
    for key in ("value_model_path", "reward_model_path"):
        with pytest.raises(ValueError, match=r"model\.safetensors has no weight 'score\.weight'"):
            roles(folder, **{key: str(folder / "base")})
    headless = Path(shutil.copytree(folder / "reward" / "adapter", tmp_path / "adapter"))
    weights = load_file(headless / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if "score" not in k}, headless / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors has no weight .*score\.weight"):
        roles(folder, reward_model_path=str(headless), **LORA)


def test_a_model_with_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder / "full", tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"reward_model_path: .* has another vocabulary .*'0' is 5 there and 4 here"):
        roles(folder, reward_model_path=str(other))
    with pytest.raises(ValueError, match=r"sft_model_path: .* has another vocabulary"):
        roles(folder, sft_model_path=str(other))
