"""Distillation on fixed rows, whole: the loss by hand, live and stored teachers, what is refused, stop and resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastrl.recipes import distill, teacher
from fastrl.recipes.sorting import make_tokenizer
from fastrl.train import fit
from fastrl.train.config import KernelsBlock, PackingBlock, TeacherConfig
from fastrl.train.interrupt import EXIT_INTERRUPTED
from fastrl.train.model import load_model, load_tokenizer
from fastrl.train.order import epoch_order
from fastrl.train.supervised import load_examples
from tests.ops.distillation import kl, numpy_divergence, probabilities
from tests.recipes.distillation import distill_config, make_teacher, run_distill, store
from tests.recipes.runs import (
    Base,
    PowerCutError,
    after_call,
    assert_same_run,
    column,
    cut_power,
    send_sigterm,
)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher") / "model")


def loss_by_hand(base: Base, big: Path, beta: float, temperature: float, alpha: float) -> float:
    """Of the first step's rows, one row at a time, from logits of the whole models in NumPy."""
    config = distill_config(base, Path("unused"))
    examples = load_examples(
        config.train_dataset, load_tokenizer(base.model, chat_template=None), config, output_dir=None
    )
    student, wise = (load_model(path, dtype=torch.float64, device="cpu") for path in (base.model, big))
    terms = []
    for row in epoch_order(40, 42, 0)[:8]:
        ids, is_trained = examples.rows[row].ids, examples.rows[row].is_trained
        with torch.no_grad():
            z, t = (model(input_ids=torch.tensor([ids])).logits[0].numpy() for model in (student, wise))
        soft = numpy_divergence(probabilities(z / temperature), probabilities(t / temperature), beta)
        logp = torch.tensor(z).log_softmax(-1)
        terms += [
            (1 - alpha) * soft[i - 1] - alpha * logp[i - 1, ids[i]].item() for i in range(1, len(ids)) if is_trained[i]
        ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize(
    ("options", "beta"),
    [
        ({"loss": "forward_kl", "temperature": 2.0, "alpha": 0.3}, 0.0),
        ({"loss": "reverse_kl"}, 1.0),
        ({"loss": "jsd", "beta": 0.1}, 0.1),
        ({"loss": "jsd"}, 0.5),
    ],
)
def test_the_first_loss_is_the_divergence_of_the_first_rows(
    base: Base, big: Path, tmp_path: Path, options: dict[str, Any], beta: float
) -> None:
    (line,) = run_distill(base, tmp_path / "run", max_steps=1, teacher_model_name_or_path=str(big), **options)
    by_hand = loss_by_hand(base, big, beta, options.get("temperature", 1.0), options.get("alpha", 0.0))
    assert line["loss"] == pytest.approx(by_hand, rel=1e-5)
    if not options.get("alpha"):
        assert line["divergence"] == pytest.approx(by_hand, rel=1e-5)


def test_a_file_of_all_tokens_teaches_what_the_live_teacher_does(base: Base, big: Path, tmp_path: Path) -> None:
    options = {"loss": "jsd", "temperature": 1.5, "alpha": 0.2, "eval_dataset": str(base.files.sft)}
    file = store(base, big, tmp_path / "top.safetensors", temperature=1.5)
    live = run_distill(base, tmp_path / "live", teacher_model_name_or_path=str(big), **options)
    stored = run_distill(base, tmp_path / "stored", teacher_logprobs=file, **options)
    for name in ("loss", "divergence", "logps", "entropy", "grad_norm", "eval/loss"):
        assert column(stored, name) == pytest.approx(column(live, name), rel=1e-3), name


def test_fewer_tokens_see_less_divergence_and_the_file_says_where_it_comes_from(
    base: Base, big: Path, tmp_path: Path
) -> None:
    file = store(base, big, tmp_path / "top.safetensors", top_k=3)
    live = run_distill(base, tmp_path / "live", max_steps=1, teacher_model_name_or_path=str(big))
    stored = run_distill(base, tmp_path / "stored", max_steps=1, teacher_logprobs=file)
    assert 0 < stored[0]["divergence"] < live[0]["divergence"]
    tensors = load_file(file)
    assert tensors["ids"].shape == (40 * 7, 3)  # six digits and the end
    total = tensors["logprob"].exp().sum(-1) + tensors["tail"].exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    with safe_open(file, framework="pt") as opened:
        provenance = json.loads(opened.metadata()["provenance"])
    assert provenance["config"]["top_k"] == 3
    assert any(name.endswith("model.safetensors") for name in provenance["contents"])
    assert str(base.files.sft) in provenance["contents"]


@pytest.mark.parametrize("is_stored", [False, True])
def test_accumulation_and_packing_change_no_curve(base: Base, big: Path, tmp_path: Path, is_stored: bool) -> None:
    source: dict[str, Any] = {"teacher_model_name_or_path": str(big)}
    if is_stored:
        source = {"teacher_logprobs": store(base, big, tmp_path / "top.safetensors", top_k=4)}
    whole = run_distill(base, tmp_path / "whole", **source)
    split = run_distill(
        base,
        tmp_path / "split",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        packing=PackingBlock(token_budget=20),
        max_length=20,
        kernels=KernelsBlock(backend="torch", chunk_rows=3),
        **source,
    )
    for name in ("loss", "divergence", "entropy", "grad_norm"):
        assert column(split, name) == pytest.approx(column(whole, name), rel=1e-3), name


def test_the_student_comes_closer_to_a_teacher_of_another_precision_that_stays_as_it_was(
    base: Base, big: Path, tmp_path: Path
) -> None:
    before = (big / "model.safetensors").read_bytes()
    lines = run_distill(
        base, tmp_path / "run", max_steps=30, teacher_model_name_or_path=str(big), teacher_dtype="bfloat16"
    )
    assert lines[-1]["divergence"] < 0.5 * lines[0]["divergence"]
    assert (big / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("stop", [send_sigterm, cut_power])
@pytest.mark.parametrize("is_stored", [False, True])
def test_a_run_stopped_after_any_step_resumes_bit_for_bit(
    base: Base, big: Path, tmp_path: Path, is_stored: bool, stop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"max_steps": 6, "save_steps": 3, "eval_dataset": str(base.files.sft), "alpha": 0.1}
    if is_stored:
        changes["teacher_logprobs"] = store(base, big, tmp_path / "top.safetensors", top_k=4)
    else:
        changes["teacher_model_name_or_path"] = str(big)
    run_distill(base, tmp_path / "whole", **changes)
    config = distill_config(base, tmp_path / "stopped", **changes)
    with monkeypatch.context() as stopping:
        after_call(stopping, fit, "update", number=5, do=stop)
        if stop is cut_power:
            with pytest.raises(PowerCutError):
                distill.run(config)
        else:
            assert distill.run(config) == EXIT_INTERRUPTED
    assert distill.run(replace(config, resume_from_checkpoint="auto")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", checkpoint=6)


def forget_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no weights can be loaded."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(distill, "model_of", refuse)
    monkeypatch.setattr(distill, "teacher_of", refuse)


def with_another_vocabulary(folder: Path) -> Path:
    make_teacher(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["abc"])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_teacher_of_other_tokens_is_refused_before_weights_are_read(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_to_load(monkeypatch)
    other = with_another_vocabulary(tmp_path / "other")
    config = distill_config(base, tmp_path / "run", teacher_model_name_or_path=str(other))
    with pytest.raises(
        ValueError, match=r"15 tokens and 14\): 'abc' is 14 there and absent here.*choose one of the same family"
    ):
        distill.run(config)


def test_a_file_that_does_not_fit_is_refused_in_one_sentence(
    base: Base, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = store(base, big, tmp_path / "top.safetensors", top_k=2)
    forget_to_load(monkeypatch)

    def refused(message: str, **changes: Any) -> None:
        options = {"teacher_logprobs": file} | changes
        with pytest.raises(ValueError, match=message):
            distill.run(distill_config(base, tmp_path / "run", **options))

    refused("was written at temperature 1.0, and temperature is 2.0", temperature=2.0)
    refused(r"has nothing for row 1 of .*sft\.jsonl", completion_only_loss=False)
    refused("was not written by fastrl teacher", teacher_logprobs=str(base.model / "model.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes(Path(file).read_bytes()[:-1])
    refused("is damaged", teacher_logprobs=str(tmp_path / "cut.safetensors"))
    student = with_another_vocabulary(tmp_path / "student")
    refused("another vocabulary than the student's", model_name_or_path=str(student))


def test_a_file_is_not_overwritten_and_keeps_each_row_once(base: Base, big: Path, tmp_path: Path) -> None:
    file = store(base, big, tmp_path / "top.safetensors", top_k=2, eval_dataset=str(base.files.sft))
    assert len(load_file(file)["rows"]) == 40
    config = TeacherConfig(model_name_or_path=str(big), train_dataset=str(base.files.sft), output_file=file, top_k=2)
    with pytest.raises(ValueError, match="exists; remove it"):
        teacher.run(config)
    with pytest.raises(ValueError, match="top_k: 15 is more than the 14 tokens there are"):
        teacher.run(replace(config, output_file=str(tmp_path / "new.safetensors"), top_k=15))


def test_the_oracle_of_these_tests_is_a_divergence() -> None:
    p, q = probabilities(torch.randn(3, 5).double().numpy()), probabilities(torch.randn(3, 5).double().numpy())
    assert (kl(p, q) > 0).all()
    assert kl(p, p) == pytest.approx(0, abs=1e-12)
