"""apply_fastrl against the same models without it: loss, gradient, ten steps of the Trainer, what is refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from fastrl.integrations.transformers import apply_fastrl
from tests.integrations.tiny_models import (
    MODELS,
    VOCABULARY,
    assert_same_with_and_without,
    loss_and_gradients,
    make_batch,
    make_model,
)

# peft asks transformers for a name that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 40}, {"num_items_in_batch": torch.tensor(7)}], ids=str)
def test_loss_and_gradient_are_those_of_the_model(kind: str, options: dict[str, Any]) -> None:
    assert_same_with_and_without(make_model(kind), **make_batch(), **options)


def test_shifted_labels_are_not_shifted_again() -> None:
    batch = make_batch()
    shifted = torch.cat([batch["labels"][:, 3:], batch["labels"][:, :3]], dim=1)
    assert_same_with_and_without(make_model(), **batch, shift_labels=shifted)


def test_a_bias_of_the_head_is_in_the_loss_and_gets_its_gradient() -> None:
    model = make_model()
    model.lm_head = nn.Linear(16, VOCABULARY)
    assert_same_with_and_without(model, **make_batch())


def test_a_frozen_head_and_frozen_embeddings_stay_without_gradient() -> None:
    model = make_model()
    model.lm_head.requires_grad_(False)
    assert_same_with_and_without(model, **make_batch())
    assert model.lm_head.weight.grad is None


def test_logits_are_not_made_in_training_and_are_there_otherwise() -> None:
    model, batch = make_model(), make_batch()
    made: list[tuple[int, ...]] = []
    reference = model.eval()(**batch)
    with apply_fastrl(model):
        linear = nn.functional.linear

        def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            found: Tensor = linear(x, weight, bias)
            if found.shape[-1] == VOCABULARY:
                made.append(tuple(found.shape))
            return found

        nn.functional.linear = counted  # type: ignore[assignment]
        try:
            output = model.train()(**batch)
            assert "logits" not in output
            assert output.logits is None
            assert made == []
            torch.testing.assert_close(model(input_ids=batch["input_ids"]).logits, reference.logits)
            torch.testing.assert_close(model.eval()(**batch).logits, reference.logits)
        finally:
            nn.functional.linear = linear
    assert len(made) == 2


def test_generate_says_the_same() -> None:
    model, ids = make_model(), make_batch()["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.eval().generate(ids, **options)
    with apply_fastrl(model):
        assert torch.equal(model.train().generate(ids, **options), expected)


def test_a_tuple_output_keeps_its_places() -> None:
    model, batch = make_model(), make_batch()
    expected = model.train()(**batch, return_dict=False)
    with apply_fastrl(model):
        loss, logits, *_ = model(**batch, return_dict=False)
    torch.testing.assert_close(loss, expected[0])
    assert logits is None


class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """40 rows whose numbers of labels differ, so that means of means would show."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = [3 + (index * 7 + k * k) % (VOCABULARY - 3) for k in range(12)]
        return {"input_ids": ids, "labels": [-100] * (1 + index % 9) + ids[1 + index % 9 :]}


def train(model: Any, folder: Path, **options: Any) -> tuple[list[float], Any]:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=10, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, seed=3, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"label_smoothing_factor": 0.1}], ids=str)
def test_ten_steps_of_the_trainer_are_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    plain, ours = make_model(spread=1.0), make_model(spread=1.0)
    expected, trainer = train(plain, tmp_path, **options)
    applied = apply_fastrl(ours)
    got, our_trainer = train(ours, tmp_path, **options)
    assert len(got) == 10
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), weight, rtol=1e-4, atol=1e-5, msg=name)
    assert our_trainer.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    applied.revert()


def test_lora_on_other_layers_trains_as_without() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert_same_with_and_without(model, **make_batch())


def test_a_head_that_peft_trains_whole_is_the_copy_that_is_trained() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(), config)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    assert_same_with_and_without(model, **make_batch())


def test_prompt_tuning_trains_as_without() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(make_model(), config)
    batch = make_batch()
    assert_same_with_and_without(model, **batch, attention_mask=torch.ones_like(batch["input_ids"]))


def test_lora_on_the_head_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="the head has LoRA"):
        apply_fastrl(model)


def test_a_sharded_head_is_refused() -> None:
    model = make_model()
    model.lm_head.weight.ds_id = 0  # what DeepSpeed ZeRO-3 marks its parameters with
    with pytest.raises(ValueError, match="ZeRO-3"):
        apply_fastrl(model)


def test_an_unknown_backend_is_refused_before_the_first_step() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="backend must be one of reference"):
        apply_fastrl(model, backend="cuda")
    assert "_fastrl_applied" not in vars(model)


def test_other_heads_models_and_losses_are_refused() -> None:
    model = make_model()
    model.lm_head = nn.Sequential(nn.Linear(16, VOCABULARY))
    with pytest.raises(ValueError, match="head of Qwen3ForCausalLM is Sequential"):
        apply_fastrl(model)
    with pytest.raises(ValueError, match="is no model of transformers"):
        apply_fastrl(nn.Linear(2, 2))
    scorer = transformers.Qwen3ForSequenceClassification(make_model().config)
    with pytest.raises(ValueError, match="head of Qwen3ForSequenceClassification is NoneType"):
        apply_fastrl(scorer)
    model = make_model()
    theirs = model.loss_function
    model.loss_function = functools.wraps(theirs)(lambda *args, **others: 2 * theirs(*args, **others))
    with pytest.raises(ValueError, match="ForCausalLMLoss"):
        apply_fastrl(model)
    model.loss_function = lambda logits, labels, **others: logits.sum()
    with pytest.raises(ValueError, match="not with ForCausalLMLoss"):
        apply_fastrl(model)


@pytest.mark.parametrize("change", [lambda z: z + 1, lambda z: z[:, 1], lambda z: z.softmax(-1), torch.relu,
                                    lambda z: 1 / z, lambda z: z * torch.ones(2),
                                    lambda z: torch.tanh(torch.tanh(z))])  # fmt: skip
def test_a_model_that_does_something_else_to_its_logits_is_refused(change: Any) -> None:
    model = make_model()
    applied = apply_fastrl(model)
    made = applied._unmake
    applied._unmake = lambda head, hidden: change(made(head, hidden))  # type: ignore[method-assign]
    with pytest.raises(AttributeError, match=r"which fastrl does not know: call revert\(\)"):
        model.train()(**make_batch())


def test_a_label_that_is_no_token_is_refused_as_the_model_does() -> None:
    model, batch = make_model(), make_batch()
    batch["labels"][0, 5] = -1
    with pytest.raises(IndexError, match="out of bounds"):
        model.train()(**batch)
    apply_fastrl(model)
    with pytest.raises(ValueError, match="target holds -1"):
        model(**batch)


def test_a_batch_without_labels_has_loss_0_and_no_gradient() -> None:
    model, batch = make_model(), make_batch()
    batch["labels"][:] = -100
    apply_fastrl(model)
    for options in ({}, {"num_items_in_batch": 3}):
        loss, gradients = loss_and_gradients(model, **batch, **options)
        assert loss == 0
        assert all(bool((x == 0).all()) for x in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_loss_is_nearer_to_the_truth_than_the_models(dtype: torch.dtype) -> None:
    model, batch = make_model(), make_batch()
    with torch.autocast("cpu", dtype):
        hidden = model.train().model(batch["input_ids"]).last_hidden_state[:, :-1].double()
        rounded, weight = hidden.to(dtype).double(), model.lm_head.weight.to(dtype).double()
        plain = model(**batch).loss.double()
        apply_fastrl(model)
        got = model(**batch).loss.double()
    truth = nn.functional.cross_entropy((rounded @ weight.t()).flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert (got - truth).abs() < 1e-5
    assert (got - truth).abs() < (plain - truth).abs()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_nothing() -> None:
    model = make_model(use_cache=False)
    model.gradient_checkpointing_enable()
    assert_same_with_and_without(model, **make_batch())
