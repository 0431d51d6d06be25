"""Padded batches as packed rows; TRL itself is not needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastrl.integrations.trl_packing import PackedRows, packed_rows, require_isolation

IDS = torch.tensor([[0, 0, 11, 12, 13, 14, 0], [21, 22, 23, 0, 0, 0, 0], [0, 31, 32, 33, 34, 35, 36]])
MASK = (IDS > 0).long()
LABELS = IDS.where((IDS % 10) >= 3, -100)


def places(rows: PackedRows) -> dict[int, tuple[int, int]]:
    """{place in the padded labels: (token fed, token predicted)} of the scored positions."""
    scored = rows.labels != -100
    fed, told, at = rows.input_ids[scored], rows.labels[scored], rows.place[scored]
    return {int(p): (int(a), int(b)) for p, a, b in zip(at, fed, told, strict=True)}


@pytest.mark.parametrize("is_one_row", [True, False])
def test_every_scored_token_is_predicted_once_from_the_token_before_it(is_one_row: bool) -> None:
    rows = packed_rows(IDS, MASK, LABELS, is_one_row=is_one_row)
    expected = {
        s * 6 + t - 1: (int(IDS[s, t - 1]), int(IDS[s, t])) for s in range(3) for t in range(1, 7) if LABELS[s, t] > 0
    }
    assert places(rows) == expected


def test_one_row_has_no_padding_and_positions_restart() -> None:
    rows = packed_rows(IDS, MASK, LABELS, is_one_row=True)
    assert rows.input_ids.tolist() == [[11, 12, 13, 21, 22, 31, 32, 33, 34, 35]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]]


def test_rows_are_as_long_as_the_longest_sequence() -> None:
    rows = packed_rows(IDS, MASK, LABELS, is_one_row=False)
    assert rows.input_ids.tolist() == [[31, 32, 33, 34, 35], [11, 12, 13, 21, 22]]
    assert (rows.position_ids[:, 0] == 0).all()


def test_a_first_tokens_label_is_nobodys() -> None:
    labels = IDS.masked_fill(MASK == 0, -100)
    assert len(places(packed_rows(IDS, MASK, labels, is_one_row=True))) == int(MASK.sum()) - 3


@pytest.mark.parametrize("is_one_row", [True, False])
@pytest.mark.parametrize("length", [0, 1])
def test_a_sequence_too_short_to_predict_anything_is_packed_and_scores_nothing(is_one_row: bool, length: int) -> None:
    """A prompt of one token whose truncated completion TRL masks; with labels there, as the mask decides."""
    mask = MASK.clone()
    mask[1, length:] = 0
    mask[2, : 7 - length] = 0  # at the right end
    expected = {s: pair for s, pair in places(packed_rows(IDS, MASK, LABELS, is_one_row=is_one_row)).items() if s < 6}
    assert places(packed_rows(IDS, mask, LABELS, is_one_row=is_one_row)) == expected


def test_a_batch_in_which_nothing_is_scored_is_packed() -> None:
    mask = torch.eye(3, 7, dtype=torch.int64)
    assert places(packed_rows(IDS, mask, IDS, is_one_row=False)) == {}


def test_a_single_column_is_refused() -> None:
    with pytest.raises(ValueError, match="two columns"):
        packed_rows(IDS[:, 2:3], MASK[:, 2:3], LABELS[:, 2:3], is_one_row=False)


def test_a_mask_with_gaps_is_refused() -> None:
    mask = MASK.clone()
    mask[2, 3] = 0
    with pytest.raises(ValueError, match="one run of ones"):
        packed_rows(IDS, mask, LABELS, is_one_row=True)


def test_labels_of_other_tokens_are_refused() -> None:
    labels = LABELS.clone()
    labels[0, 4] = 99
    with pytest.raises(ValueError, match="other tokens"):
        packed_rows(IDS, MASK, labels, is_one_row=True)


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
LAYERS = {"layer_types": ["conv", "full_attention"]}  # a short convolution runs across the border of two sequences
MODELS: dict[str, tuple[dict[str, Any], bool]] = {
    "Qwen3": ({"head_dim": 4}, True),
    "Gemma2": ({"head_dim": 4}, True),
    "GPT2": ({"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 64}, True),
    "Qwen3Moe": ({"head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, True),
    "Lfm2": (LAYERS, False),
    "FalconMamba": ({"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}, False),
    "Bloom": ({"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 2}, False),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_let_packed_sequences_see_each_other_are_found(name: str, dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    options, keeps_apart = MODELS[name]
    torch.manual_seed(0)
    shared = {} if name in ("GPT2", "FalconMamba", "Bloom") else SMALL
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, head)(getattr(transformers, f"{name}Config")(**shared, **options)).to(dtype)
    if keeps_apart:
        require_isolation(model, model.forward)
        return
    with pytest.raises(ValueError, match="see each other"):
        require_isolation(model, model.forward)
    assert model.training
