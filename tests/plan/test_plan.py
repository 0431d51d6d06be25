"""The cost model against hand-made numbers, against the code it speaks of, and against itself at other sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.command.plan import plan, run
from fastrl.command.settings import Refused
from fastrl.data import prefixes
from fastrl.ops import head
from fastrl.plan import cost, workload
from fastrl.plan.communication import transfers
from fastrl.plan.cost import mfu, step_seconds, training_terms, useful_operations
from fastrl.plan.layers import BFLOAT16, NATIVE_FLOAT32, TRITON_BFLOAT16, LayerCost
from fastrl.plan.lengths import Lengths
from fastrl.plan.machine import GIB, H200, MACHINES
from fastrl.plan.memory import largest_micro_batch, training_memory
from fastrl.plan.rollout import most_sequences, rollout_seconds
from fastrl.plan.shape import SHAPES, ModelShape, shape_of
from fastrl.plan.workload import Workload
from fastrl.train.native_layers import LayerKernels

SMALL = ModelShape(hidden=8, layers=2, heads=2, kv_heads=1, head_dim=4, intermediate=16, vocab=100, tied=True)
FLAT = Lengths(prompt=10, median=30, longest=100, sigma=0.0)


def work(**changes: object) -> Workload:
    given_ = {"shape": SHAPES["qwen3-0.6b"], "lengths": Lengths(prompt=200, median=400, longest=1848)}
    return Workload(**{**given_, "prompts": 16, "generations": 8, **changes})  # type: ignore[arg-type]


def test_a_layer_of_eight_columns_has_512_weights() -> None:
    # q 8x8, k and v 8x4 each, o 8x8, gate, up and down 8x16 each
    assert SMALL.layer_weights == 64 + 32 + 32 + 64 + 3 * 128 == 576
    assert SMALL.parameters == 2 * 576 + 800
    assert replace(SMALL, tied=False).parameters == 2 * 576 + 1600


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-0.6b", 0.596), ("qwen3-1.7b", 1.72), ("qwen3-4b", 4.02), ("qwen3-8b", 8.19), ("llama-3-8b", 8.03)],
)
def test_published_sizes_come_out(name: str, billions: float) -> None:
    assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert shape_of(name.upper()) == SHAPES[name]


def test_a_shape_is_read_from_a_config_and_experts_are_refused(tmp_path: Path) -> None:
    config = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config, "vocab_size": 50, "model_type": "qwen3", "tie_word_embeddings": True}))
    found = shape_of(str(tmp_path))
    assert (found.head_dim, found.kv_heads, found.qk_norm, found.tied) == (16, 4, True, True)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks vocab_size"):
        shape_of(str(tmp_path))
    file.write_text(json.dumps({**config, "vocab_size": 50, "num_experts": 8}))
    with pytest.raises(ValueError, match="mixture of experts"):
        shape_of(str(tmp_path))
    with pytest.raises(ValueError, match="neither a directory"):
        shape_of("gpt-5")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"num_attention_heads": 0}', "num_attention_heads 0; sizes are at least 1"),
        ('{"num_hidden_layers": -2}', "num_hidden_layers -2; sizes are at least 1"),
        ('{"num_key_value_heads": -1}', "num_key_value_heads -1; sizes are at least 1"),
        ('{"head_dim": "8"}', "head_dim '8'; sizes are at least 1"),
        ('{"hidden_size": 2, "num_key_value_heads": null}', "4 heads in hidden_size 2; give head_dim or fewer heads"),
        ("[]", "is not an object"),
        ('{"text_config": 3}', "is not an object"),
    ],
)
def test_a_config_of_no_model_is_refused_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    changed = json.loads(text)
    whole = {**dict.fromkeys(names, 64), **changed} if isinstance(changed, dict) else changed
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=sentence):
        shape_of(str(tmp_path))


def test_the_head_of_a_hand_made_step_costs_6ndv() -> None:
    step = Workload(shape=SMALL, lengths=FLAT, prompts=2, generations=3)
    assert (step.tokens, step.head_rows, step.attention_pairs) == pytest.approx((6 * 40, 6 * 30, 6 * 40 * 40 / 2))
    terms = {term.name: term for term in training_terms(step)}
    assert terms["head: products and loss"].operations == pytest.approx(6 * 180 * 8 * 100)
    assert step.fed_tokens == 2 * 10 + 6 * 30  # a prompt once
    assert terms["layers: products"].operations == pytest.approx(6 * 200 * 2 * 576)
    # scores and values: 2 products of 2 operations per pair, head and column; 3.5 times for the backward pass
    assert terms["layers: attention"].operations == pytest.approx(3.5 * 4 * 2 * 4 * 2 * 4800)
    assert useful_operations(step) == pytest.approx(6 * 200 * 1152 + 6 * 180 * 800 + 3 * 4 * 2 * 4 * 2 * 4800)


def test_a_prompt_is_fed_again_where_a_group_is_cut_and_always_where_it_saves_too_little() -> None:
    step = Workload(shape=SMALL, lengths=FLAT, prompts=2, generations=4, micro_tokens=320)
    assert step.fed_tokens == 2 * 2 * 10 + 8 * 30  # bundles of 80 positions: two completions of 40
    assert replace(step, micro_tokens=160).fed_tokens == step.tokens
    assert replace(step, lengths=replace(FLAT, prompt=3)).fed_tokens == 8 * 33  # 18 of 264 is less than a tenth


def test_completions_without_signal_cost_nothing_in_training_and_everything_in_sampling() -> None:
    dense, half = work(), work(without_signal=0.5)
    assert half.tokens == dense.tokens / 2
    assert half.sampled_tokens == dense.sampled_tokens
    assert rollout_seconds(half, H200, sequences=64) == rollout_seconds(dense, H200, sequences=64)


def test_checkpointing_and_a_reference_each_cost_a_forward_pass_of_products() -> None:
    def products(step: Workload) -> float:
        return sum(term.operations for term in training_terms(step) if not term.is_attention)

    plain = products(work())
    assert products(work(checkpointing=True)) - plain == pytest.approx(2.0 * work().shape.backbone * work().fed_tokens)
    forward = 2.0 * (work().shape.backbone * work().fed_tokens + work().shape.head * work().head_rows)
    assert products(work(has_reference=True)) - plain == pytest.approx(forward)
    assert products(work(old_passes=1)) - plain == pytest.approx(forward)


def test_adapters_over_a_frozen_model_cost_two_thirds_and_six_times_their_own_numbers() -> None:
    whole = Workload(shape=SMALL, lengths=FLAT, prompts=2, generations=3)
    step = replace(whole, lora_r=4)
    # q 8+8, k and v 8+4 each, o 8+8, gate and up 8+16 each, down 16+8
    assert step.adapter == step.trainable == 4 * 2 * (16 + 12 + 12 + 16 + 24 + 24 + 24)
    assert (whole.adapter, whole.trainable) == (0, SMALL.parameters)
    terms, before = ({term.name: term for term in training_terms(each)} for each in (step, whole))
    for name in ("layers: products", "head: products and loss"):
        assert terms[name].operations == pytest.approx(before[name].operations * 4 / 6)
    assert terms["adapters"].operations == pytest.approx(6 * step.adapter * step.fed_tokens)
    assert before["adapters"].seconds(H200) == before["adapters"].launches == 0
    assert terms["optimizer"].bytes == pytest.approx(before["optimizer"].bytes * step.adapter / SMALL.parameters)
    assert useful_operations(step) == pytest.approx(
        sum(terms[name].operations for name in ("layers: products", "head: products and loss", "adapters"))
        + terms["layers: attention"].operations * 6 / 7
    )
    again = {term.name: term for term in training_terms(replace(step, old_passes=1, has_reference=True))}
    # The reference has no adapters.
    scored = again["log-probabilities of reference and sampling policy"]
    forward = 2 * (SMALL.backbone * step.fed_tokens + SMALL.head * step.head_rows)
    assert scored.operations == pytest.approx(2 * forward + 2 * step.adapter * step.fed_tokens)
    memory = training_memory(replace(step, has_reference=True), ranks=4)
    assert memory["weights, gradients"] == 2 * SMALL.parameters + 6 * step.adapter
    assert memory["optimizer state"] == 12 * step.adapter / 4
    assert memory["reference"] == 0  # the policy with its adapters off
    sent = transfers(step, H200, ranks=8, shards_optimizer=False)
    assert sent[0].bytes == pytest.approx(2 * 7 / 8 * 4 * step.adapter)
    assert sent[-1].bytes == 2 * step.adapter


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_adapters_have_the_numbers_and_move_the_bytes_that_were_counted(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    from bench import layer_traffic
    from fastrl.train.lora import add_lora, is_of_adapter

    monkeypatch.undo()
    sizes = (128, 256, 4, 2)

    def adapted(*arguments: int) -> object:
        model = getattr(layer_traffic, family)(*arguments)
        add_lora(model, r=8, alpha=16, seed=0)
        return model

    shape = ModelShape(hidden=128, layers=3, heads=4, kv_heads=2, head_dim=32, intermediate=256, vocab=64)
    step = work(shape=shape, lora_r=8)
    model = adapted(*sizes, 3)
    numbers = [p.numel() for name, p in model.named_parameters() if is_of_adapter(name)]  # type: ignore[attr-defined]
    assert step.adapter == sum(numbers)
    plain = layer_traffic._of_a_layer(getattr(layer_traffic, family), sizes, torch.bfloat16, "transformers")
    found = layer_traffic._of_a_layer(adapted, sizes, torch.bfloat16, "transformers")  # type: ignore[arg-type]
    counted = found.forward + found.backward - plain.forward - plain.backward
    # Products are not counted: three of an input's and of an output's here are those as thin as the rank. What a frozen
    # norm saves (the gradient of its weight, 16 bytes a column; 8 of queries and keys) is not in the model.
    inputs, outputs = shape.layer_widths
    norms = 16 * 128 + (8 * (4 + 2) * 32 if family == "qwen3" else 0)
    assert counted + norms == pytest.approx(cost.adapter_bytes(step, 2) / 3 - 2 * 3 * (inputs + outputs), rel=1e-3)
    assert found.launches - plain.launches == pytest.approx(cost.ADAPTER_LAUNCHES, rel=0.15)


def test_the_constants_are_those_of_the_code() -> None:
    assert cost.CHUNK_BYTES == head.CUDA_CHUNK_BYTES
    assert workload.LEAST_SAVED == prefixes.LEAST_SAVED


@pytest.mark.parametrize(
    ("dtype", "layers", "stated"),
    [
        (torch.bfloat16, "transformers", BFLOAT16),
        (torch.bfloat16, "triton", TRITON_BFLOAT16),
        (torch.float32, "transformers", NATIVE_FLOAT32),
    ],
)
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_layers_move_keep_and_launch_what_was_counted(
    dtype: torch.dtype, layers: LayerKernels, stated: LayerCost, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import layer_traffic

    monkeypatch.undo()  # fresh memory that is filled would be counted
    if dtype == torch.float32:
        pytest.importorskip("fastrl._C", reason="float32 layers are native only where fastrl._C is built")
    found = layer_traffic.coefficients(getattr(layer_traffic, family), dtype, layers)
    moved = {name: each.forward + each.backward for name, each in found.items()}
    is_qwen = family == "qwen3"
    heads = stated.heads_qk_norm if is_qwen else stated.heads
    kept_heads = stated.kept_heads_qk_norm if is_qwen else stated.kept_heads
    # two query heads for one key head, as most models have at least
    assert (2 * moved["heads"] + moved["kv_heads"]) / 3 == pytest.approx(heads, rel=0.02)
    assert (2 * found["heads"].kept + found["kv_heads"].kept) / 3 == pytest.approx(kept_heads, rel=0.05)
    assert moved["hidden"] == pytest.approx(stated.hidden, rel=0.02)
    assert moved["intermediate"] == pytest.approx(stated.intermediate, rel=0.02)
    assert found["hidden"].kept == pytest.approx(stated.kept_hidden, rel=0.02)
    assert found["intermediate"].kept == pytest.approx(stated.kept_intermediate, rel=0.02)
    assert found["heads"].launches == (stated.launches_qk_norm if is_qwen else stated.launches)


def test_memory_of_a_small_model_is_16_bytes_a_parameter_in_float32_and_18_in_bfloat16() -> None:
    parameters = work().shape.parameters
    for layer, bytes_ in ((NATIVE_FLOAT32, 16), (BFLOAT16, 18)):
        found = training_memory(work(), layer)
        assert found["weights, gradients"] + found["optimizer state"] == bytes_ * parameters
    shared = training_memory(work(), ranks=4)
    assert shared["optimizer state"] == 12 * parameters / 4


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    room = 40 * GIB
    most = largest_micro_batch(work(), room)

    def peak(tokens: int) -> float:
        return sum(training_memory(replace(work(), prompts=1_000_000, micro_tokens=tokens)).values())

    assert most > 0
    assert peak(most) <= room < peak(most + 1024)
    assert largest_micro_batch(work(), 1 * GIB) == 0


def test_one_sequence_is_decoded_token_by_token_at_the_speed_of_reading_the_weights() -> None:
    step = work(lengths=Lengths(prompt=1, median=100, longest=100, sigma=0.0), prompts=1, generations=1)
    weights = 2 * (step.shape.backbone + step.shape.head) / H200.bandwidth
    assert rollout_seconds(step, H200, sequences=1) == pytest.approx(100 * (weights + 1.5e-3), rel=0.01)


def test_a_rollout_of_many_completions_makes_their_quantiles_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Lengths.completions, list[Lengths]()

    def counted(self: Lengths) -> list[float]:
        calls.append(self)
        return real(self)

    monkeypatch.setattr(Lengths, "completions", counted)
    rollout_seconds(work(prompts=100), H200, sequences=64)
    assert len(calls) == 2  # once for the lengths, once for their mean; not at each decoding step


def test_more_places_never_take_longer() -> None:
    times = [rollout_seconds(work(), H200, sequences=n) for n in (1, 2, 8, 32, 128)]
    assert times == sorted(times, reverse=True)
    assert most_sequences(work(), H200) > most_sequences(work(), H200, occupied=60 * GIB) > 0
    with pytest.raises(ValueError, match="no sequence"):
        rollout_seconds(work(), H200, sequences=0)


def test_ranks_send_what_a_ring_sends() -> None:
    parameters = work().shape.parameters
    assert transfers(work(), H200, ranks=1, shards_optimizer=True) == []
    (summed, *_) = transfers(work(), H200, ranks=8, shards_optimizer=False)
    assert summed.bytes == pytest.approx(2 * 7 / 8 * 4 * parameters)
    assert summed.seconds == pytest.approx(summed.bytes / H200.link)
    scattered, gathered, *_ = transfers(work(), H200, ranks=8, shards_optimizer=True)
    assert scattered.bytes + gathered.bytes == pytest.approx(7 / 8 * (4 + 2) * parameters)
    (far, *_) = transfers(work(), H200, ranks=16, shards_optimizer=False)
    between = 2 * 4 * parameters / 8 * 1 / 2
    assert far.bytes - summed.bytes == pytest.approx(between)
    assert far.seconds - summed.seconds == pytest.approx(between / H200.network)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(SHAPES)),
    machine=st.sampled_from(sorted(MACHINES)),
    prompts=st.integers(1, 64),
    median=st.integers(1, 4000),
    checkpointing=st.booleans(),
)
def test_no_step_uses_more_than_the_peak_and_more_prompts_take_longer(
    name: str, machine: str, prompts: int, median: int, checkpointing: bool
) -> None:
    step = work(
        shape=SHAPES[name],
        prompts=prompts,
        checkpointing=checkpointing,
        lengths=Lengths(prompt=100, median=median, longest=8000),
    )
    seconds = step_seconds(training_terms(step), MACHINES[machine])
    assert 0 < mfu(step, seconds, MACHINES[machine]) < 0.8
    # launches of one micro-batch take as long, however full it is
    assert step_seconds(training_terms(replace(step, prompts=prompts + 1)), MACHINES[machine]) >= seconds


def test_the_command_prints_a_plan_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--model", "qwen3-0.6b", "--gpus", "1", "64"]) == 0
    printed = capsys.readouterr().out
    assert "calculated, not measured" in printed
    assert "largest packing.token_budget" in printed
    assert "139: fits" in printed
    assert run(["--model", "qwen3-0.6b", "--micro_tokens", "131072"]) == 0
    assert "DOES NOT FIT: take --micro_tokens 63488" in capsys.readouterr().out
    assert run(["--model", "qwen3-0.6b", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found == plan(work(), H200, ranks=1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "gpt-5"], "neither a directory"),
        (["--model", "qwen3-8b", "--gpu", "tpu"], "no machine is called 'tpu'"),
        (
            ["--model", "llama-3-8b"],
            "143 GiB.*on one GPU.*: take --checkpointing or --lora_r 32 or --gpus 2 or --gpu",
        ),
        (
            ["--model", "qwen3-8b", "--gpu", "h100"],
            "take --lora_r 32 or --gpus 8 or --gpu b200 or a smaller",
        ),
        (["--model", "qwen3-0.6b", "--gpus", "1", "--prompts", "1000000000000"], "plan at most 1,000,000"),
        (["--model", "qwen3-8b", "--context", "100"], "take a longer context or fewer"),
        (
            ["--model", "llama-3-70b", "--lora_r", "64", "--checkpointing"],
            "take --gpus 64 or --gpu b200 or a smaller",
        ),
        (["--model", "llama-3-70b", "--lora_r", "8", "--checkpointing"], "sequence.*: take a shorter --context"),
        (["--model", "qwen3-8b", "--lora_r", "-1"], "--lora_r must be at least 0"),
        (["--model", "qwen3-8b", "--without_signal", "1"], "must be in"),
        (["--model", "qwen3-8b", "--prompts", "0"], "at least 1"),
    ],
)
def test_what_describes_no_step_is_refused_in_a_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        run(arguments)
