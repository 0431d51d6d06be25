from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fastrl.train.export import save_pretrained
from fastrl.train.model import check_packing, hidden_states, load_model, load_tokenizer, model_head, turn_off_dropout
from fastrl.train.tiny import make_tiny_qwen3
from tests.train.families import FAMILIES, family
from tests.train.test_attention import logits_of, packed, random_sequences

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(48))]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return wrapped


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    model = make_tiny_qwen3(len(WORDS), hidden_size=16, layers=2, eos_token_id=1, seed=3)
    return save_pretrained(model, tiny_tokenizer(), tmp_path / "model", card="# tiny\n")


def load(directory: Path, **options: object) -> torch.nn.Module:
    arguments = {"dtype": torch.float32, "device": "cpu"} | options
    return load_model(directory, **arguments)  # type: ignore[arg-type]


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_exported_model_loads_in_transformers_and_here_with_the_same_weights_and_logits(directory: Path) -> None:
    original = make_tiny_qwen3(len(WORDS), hidden_size=16, layers=2, eos_token_id=1, seed=3)
    ids = torch.tensor([[3, 4, 5, 1]])
    expected = original(input_ids=ids, use_cache=False).logits
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    weights = original.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in theirs.state_dict().items())
    # Where native layers are built, ours round differently.
    torch.testing.assert_close(theirs(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits_of(load(directory), packed([ids[0]])), expected[0], rtol=1e-5, atol=1e-5)
    assert theirs.config._attn_implementation == "sdpa"
    assert theirs.generation_config.eos_token_id == 1
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer("w0 w5")["input_ids"] == [2, 7]
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    written = {path.name for path in directory.iterdir()}
    assert written >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {name for name in written if "model" in name or name.endswith(".bin")} == {"model.safetensors"}
    assert (directory / "README.md").read_text() == "# tiny\n"


def test_every_end_of_sequence_id_is_kept_and_the_tokenizers_added(tmp_path: Path) -> None:
    model = make_tiny_qwen3(len(WORDS), hidden_size=16, layers=1)
    model.generation_config.eos_token_id = [7, 8]
    path = save_pretrained(model, tiny_tokenizer(), tmp_path / "model", card="")
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == [7, 8, 1]
    assert model.generation_config.eos_token_id == [7, 8]


def test_a_contradictory_generation_config_does_not_lose_the_model_at_the_end(tmp_path: Path) -> None:
    model = make_tiny_qwen3(len(WORDS), hidden_size=16, layers=1)
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.6
    path = save_pretrained(model, tiny_tokenizer(), tmp_path / "model", card="")
    saved = json.loads((path / "generation_config.json").read_text())
    assert saved["do_sample"] is True
    assert saved["temperature"] == 0.6


def test_an_export_replaces_a_model_but_nothing_else(directory: Path, tmp_path: Path) -> None:
    other = make_tiny_qwen3(len(WORDS), hidden_size=16, layers=1, seed=9)
    save_pretrained(other, tiny_tokenizer(), directory, card="again")
    assert (directory / "README.md").read_text() == "again"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(ValueError, match="is no model directory; it would be replaced"):
        save_pretrained(other, tiny_tokenizer(), tmp_path, card="")


def test_bfloat16_is_read_as_asked(directory: Path) -> None:
    model = load(directory, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert hidden_states(model, packed(random_sequences())).dtype == torch.bfloat16  # type: ignore[arg-type]


def test_missing_directories_and_files_are_named(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="model directory nowhere/at/all does not exist; fastrl reads local directories"
    ):
        load(Path("nowhere/at/all"))
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load(tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are never read"):
        load(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load(directory)


def test_a_cut_off_weight_file_is_named(tmp_path: Path) -> None:
    make_tiny_qwen3(50).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged .*download it again"):
        load_model(tmp_path, dtype=torch.float32, device="cpu")


def test_remote_code_and_unknown_families_are_refused(directory: Path) -> None:
    edit(directory / "config.json", model_type="perceptron")
    with pytest.raises(ValueError, match="model_type 'perceptron'"):
        load(directory)
    edit(directory / "config.json", model_type="qwen3", auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ValueError, match="auto_map, which runs Python code"):
        load(directory)
    edit(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    (directory / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json has an auto_map"):
        load_tokenizer(directory, chat_template=None)


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(directory: Path) -> None:
    edit(directory / "config.json", vocab_size=49)
    with pytest.raises(ValueError, match=r"makes token 49 \('w47'\), but the model's vocab_size is 49"):
        load(directory)


def test_missing_and_non_finite_weights_are_named(directory: Path) -> None:
    file = directory / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    bad = weights | {name: weights[name].clone().fill_(torch.nan)}
    save_file(bad, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"weight {name} of .* is not finite"):
        load(directory)
    del bad[name]
    save_file(bad, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"are missing: {name}"):
        load(directory)


def test_a_chat_template_file_replaces_the_tokenizers(directory: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages | length }}")
    tokenizer = load_tokenizer(directory, chat_template=str(template))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "1"
    with pytest.raises(ValueError, match="chat_template must be a file"):
        load_tokenizer(directory, chat_template=str(tmp_path / "none"))
    for file in directory.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer(directory, chat_template=None)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes_the_probe_that_loading_makes(name: str, tmp_path: Path) -> None:
    family(name).save_pretrained(tmp_path)
    load(tmp_path)


def test_the_probe_finds_a_scaling_the_head_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_qwen3(50)
    check_packing(model)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 0.5 * logits)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM scales its logits in a way fastrl does not know"):
        check_packing(model)


def test_the_probe_finds_attention_that_crosses_sequence_borders(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_qwen3(50)
    monkeypatch.setattr("fastrl.train.native_attention.is_available", lambda tensor, max_seqlen: False)
    monkeypatch.setattr("fastrl.train.attention.bucketed", lambda borders: bucketed_as_one(borders))
    with pytest.raises(ValueError, match="gives packed sequences other values than the same sequences alone"):
        check_packing(model)


def bucketed_as_one(borders: torch.Tensor) -> object:
    from fastrl.train.packed_sdpa import bucketed

    return bucketed(borders[[0, -1]])


def test_the_head_carries_the_temperature_and_shares_the_models_weight() -> None:
    model = family("granite")
    head = model_head(model, temperature=0.7)
    assert head.weight is model.lm_head.weight
    assert (head.temperature, head.logit_scale, head.softcap, head.bias) == (0.7, 0.25, None, None)
    assert model_head(family("gemma2")).softcap == 1.5
    assert model_head(family("cohere")).logit_scale == 0.25


def test_dropout_is_off_even_where_checkpointing_trains() -> None:
    model = family("gpt2")
    turn_off_dropout(model)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_a_tiny_model_depends_on_its_seed_alone_and_leaves_the_generators() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make_tiny_qwen3(50, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = make_tiny_qwen3(50, seed=4), make_tiny_qwen3(50, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight.std().item() == pytest.approx(0.5 * 64**-0.5, rel=0.05)
