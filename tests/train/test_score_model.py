"""A scalar head over a packed backbone: the scores of transformers on the same text, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from fastrl.data.pack import pack
from fastrl.train.export import save_pretrained
from fastrl.train.model import load_model
from fastrl.train.score_model import (
    has_score_head,
    last_scores,
    load_score_model,
    save_score_model,
    scored_sequence,
    token_scores,
)
from fastrl.train.tiny import make_tiny_qwen3
from tests.train.test_model import WORDS, edit, tiny_tokenizer

TEXTS = ((3, 4, 5, 1), (7, 8, 9, 10, 11, 12, 1), (20, 1), (30,))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = make_tiny_qwen3(len(WORDS), hidden_size=16, layers=2, eos_token_id=1, pad_token_id=0, seed=3)
    return save_pretrained(model, tiny_tokenizer(), tmp_path / "base", card="")


def load(directory: Path, **options: Any) -> Any:
    return load_score_model(directory, **{"dtype": torch.float32, "device": "cpu", **options})


def rewards(model: Any, texts: Any = TEXTS, *, token_budget: int = 64) -> Tensor:
    """[S] score at the last token of each text, in the order given."""
    sequences = [scored_sequence(ids, [0.0] * (len(ids) - 1) + [1.0]) for ids in texts]
    result = torch.full((len(texts),), torch.nan)
    for batch in pack(sequences, token_budget=token_budget):
        result[batch.sequence] = last_scores(token_scores(model, batch), batch)
    return result


def test_transformers_gives_the_saved_model_the_same_reward_on_the_same_text(base: Path, tmp_path: Path) -> None:
    model = load(base, new_head=1.0, seed=5)
    with torch.no_grad():
        ours = rewards(model)
    path = save_score_model(model, tiny_tokenizer(), tmp_path / "reward", card="")
    theirs = AutoModelForSequenceClassification.from_pretrained(path)
    assert theirs.config.num_labels == 1
    longest = max(map(len, TEXTS))
    padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in TEXTS])
    with torch.no_grad():
        logits = theirs(input_ids=padded, attention_mask=(padded != 0).long()).logits
    torch.testing.assert_close(logits[:, 0], ours, rtol=1e-5, atol=1e-5)
    assert ours.std() > 0.3  # a head of no scale would agree as well
    with torch.no_grad():
        assert torch.equal(rewards(load(path)), ours)
    assert set(load_file(path / "model.safetensors")) >= {"score.weight", "model.embed_tokens.weight"}


def test_every_prefix_has_the_score_of_the_prefix_alone_and_the_appended_id_is_not_seen(base: Path) -> None:
    model = load(base, new_head=1.0)
    ids = TEXTS[1]
    (batch,) = pack([scored_sequence(ids, [1.0] * len(ids))], token_budget=64)
    assert batch.input_ids.tolist() == list(ids)
    assert batch.weight.tolist() == [1.0] * len(ids)
    with torch.no_grad():
        whole = token_scores(model, batch)
        alone = rewards(model, [ids[: n + 1] for n in range(len(ids))], token_budget=7)
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_reward_is_that_of_transformers(base: Path, tmp_path: Path) -> None:
    path = save_score_model(load(base, new_head=1.0), tiny_tokenizer(), tmp_path / "reward", card="")
    model, theirs = load(path), AutoModelForSequenceClassification.from_pretrained(path)
    rewards(model, TEXTS[:1])[0].backward()
    theirs(input_ids=torch.tensor(TEXTS[:1])).logits[0, 0].backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_a_fresh_head_is_a_matter_of_its_seed_and_zero_scores_nothing(base: Path) -> None:
    one, again, other = (load(base, new_head=1.0, seed=seed).score.weight for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.std().item() == pytest.approx(17**-0.5, rel=0.5)
    with torch.no_grad():
        assert rewards(load(base, new_head=0.0)).tolist() == [0.0] * len(TEXTS)


def test_the_head_stays_in_float32_below_a_bfloat16_backbone(base: Path) -> None:
    exact, rounded = load(base, new_head=1.0), load(base, new_head=1.0, dtype=torch.bfloat16)
    assert rounded.score.weight.dtype == torch.float32
    assert rounded.model.embed_tokens.weight.dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(rewards(rounded), rewards(exact), rtol=0.1, atol=0.1)


def test_a_head_is_found_in_whole_and_in_sharded_files(base: Path, tmp_path: Path) -> None:
    model = load(base, new_head=1.0)
    whole = save_score_model(model, tiny_tokenizer(), tmp_path / "whole", card="")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    assert [has_score_head(path) for path in (base, whole, tmp_path / "sharded")] == [False, True, True]


def test_a_missing_head_is_named_unless_a_fresh_one_is_asked_for(base: Path) -> None:
    with pytest.raises(ValueError, match=r"base/model\.safetensors has no weight 'score\.weight'.*fastrl reward"):
        load(base)
    load(base, new_head=0.0)


def test_other_missing_weights_are_refused_with_a_fresh_head_too(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"are missing: .*norm\.weight"):
        load(base, new_head=1.0)


def test_a_head_of_several_labels_is_refused_unless_replaced(base: Path, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match=r"of another shape: .*score\.weight"):
        load(tmp_path / "three")
    assert load(tmp_path / "three", new_head=1.0).score.weight.shape == (1, 16)


def test_a_family_without_a_classifier_is_refused(base: Path) -> None:
    edit(base / "config.json", model_type="granite")
    with pytest.raises(ValueError, match="model_type 'granite', of which transformers has no sequence classifier"):
        load(base, new_head=1.0)


def test_damaged_and_pickled_weights_are_refused(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        load(base, new_head=1.0)
    file.unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors file"):
        load(base, new_head=1.0)


def test_a_padding_token_that_ends_texts_is_not_announced(base: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = load(base, new_head=1.0)
    path = save_score_model(model, tokenizer, tmp_path / "reward", card="")
    theirs = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        for ids, ours in zip(TEXTS, rewards(model), strict=True):
            torch.testing.assert_close(theirs(input_ids=torch.tensor([ids])).logits[0, 0], ours, rtol=1e-5, atol=1e-5)


def test_a_reward_model_is_no_policy(base: Path, tmp_path: Path) -> None:
    path = save_score_model(load(base, new_head=1.0), tiny_tokenizer(), tmp_path / "reward", card="")
    with pytest.raises(ValueError, match="is a reward model"):
        load_model(path, dtype=torch.float32, device="cpu")
