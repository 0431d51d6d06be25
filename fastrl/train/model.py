"""A Hugging Face causal language model as two parts: hidden states of a packed batch, and the head above them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrl.train.attention import Implementation, packing, use_packed_attention
from fastrl.train.lora import as_in_forward
from fastrl.train.model_directory import TOKENIZER_FILES, check_weight_files, has_tokenizer, json_file, model_directory
from fastrl.train.native_layers import LayerKernels, use_native_layers, use_triton_layers
from fastrl.train.progress_bars import without_load_report
from fastrl.train.quantize import four_bit, keep_differentiable
from fastrl.train.shared_rows import spread
from fastrl.types import Head, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    attn_implementation: Implementation = "auto",
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    layers: LayerKernels = "transformers",
) -> PreTrainedModel:
    """Read a causal language model from a Hugging Face directory and make it take packed batches.

    The directory is checked before any weight is read; the model is then probed: two short sequences must get the
    values packed that they get alone, and `model_head` must reproduce the model's own logits. Dropout is turned off,
    so that a policy's ratio to itself is 1, and the model stays in eval mode: `hidden_states` turns activation
    checkpointing on for its own pass alone, because transformers drops the KV cache of a checkpointing model.

    Args:
        dtype: of the weights and of the computation; `fastrl.train.optimizer` keeps float32 masters.
        attn_implementation: "auto" is torch's varlen kernel where it can run and bucketed SDPA elsewhere.
        load_in_4bit: quantise the linear layers while reading (`fastrl.train.quantize`); only adapters train then.
        layers: whose small operators run on a GPU (`KernelsBlock.layers`).

    Raises:
        ValueError: no such directory, no configuration, weights or tokenizer that do not fit, remote code without
            `trust_remote_code`, or a family whose sequences cannot be packed.
        RuntimeError: the attention or the layers asked for cannot run on this machine.
    """
    directory = model_directory(path, trust_remote_code=trust_remote_code)
    check_weight_files(directory)
    check_vocabulary(directory, trust_remote_code=trust_remote_code)
    with without_load_report():
        model, report = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **(four_bit(dtype, device) if load_in_4bit else {}),
        )
    if "score.weight" in report["unexpected_keys"]:
        raise ValueError(f"{directory} is a reward model (it has score.weight); name a language model")
    keep_differentiable(model)
    check_weights(model, report, directory)
    make_packed(
        model,
        device=device,
        attn_implementation=attn_implementation,
        gradient_checkpointing=gradient_checkpointing,
        layers=layers,
    )
    check_packing(model)
    return model  # type: ignore[no-any-return]


def check_weights(model: PreTrainedModel, report: Mapping[str, Any], directory: Path) -> None:
    """Refuse weights that the files lack, that have another shape, or that are not finite.

    Args:
        report: what `from_pretrained(..., output_loading_info=True)` says.
    """
    for problem, names in (("missing", report["missing_keys"]), ("of another shape", report["mismatched_keys"])):
        if names:
            raise ValueError(f"weights of {directory} are {problem}: {', '.join(sorted(map(str, names))[:5])}")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"weight {name} of {directory} is not finite; the file is damaged or the run diverged")


def make_packed(
    model: PreTrainedModel,
    *,
    device: torch.device | str,
    attn_implementation: Implementation,
    gradient_checkpointing: bool,
    layers: LayerKernels = "transformers",
) -> None:
    """Put a fresh model on its device, without dropout, with packed attention and fused layers; arguments as above."""
    model.to(device).eval()  # type: ignore[arg-type]
    turn_off_dropout(model)
    use_packed_attention(model, attn_implementation)
    if layers == "triton":
        use_triton_layers(model)
    else:
        use_native_layers(model)
    if gradient_checkpointing:
        checkpoint_activations(model)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """From now on `hidden_states` keeps each layer's input alone and computes the rest again in the backward pass."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # its name before transformers 5
    for module in model.modules():
        # One for each decoder layer, which then looks at its own adapters alone.
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None:
            module._gradient_checkpointing_func = partial(checkpoint, context_fn=partial(as_in_forward, module))


def load_tokenizer(
    path: str | Path, *, chat_template: str | None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Read the tokenizer beside a model.

    Args:
        chat_template: a file with a Jinja template that replaces the tokenizer's own; None keeps that.

    Raises:
        ValueError: no tokenizer, no end-of-sequence token, no such template, or remote code without the flag.
    """
    directory = model_directory(path, trust_remote_code=trust_remote_code)
    if not has_tokenizer(directory):
        raise ValueError(f"{directory} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the base model's there")
    tokenizer = AutoTokenizer.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=trust_remote_code
    )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {directory} has no eos_token; set it in tokenizer_config.json")
    if chat_template is not None:
        template = Path(chat_template)
        if not template.is_file():
            raise ValueError(f"chat_template must be a file with a Jinja template, and {template} is not there")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer  # type: ignore[no-any-return]


def hidden_states(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The decoder's last hidden state of every packed position: what the head is applied to.

    Positions that sequences share (`batch.shared`) go through the layers once; attention alone sees all of them.

    Returns:
        [T, D] in the model's dtype; differentiable unless gradients are off.
    """
    decoder = _decoder(model)
    is_checkpointed = torch.is_grad_enabled() and any(
        getattr(module, "gradient_checkpointing", False) for module in decoder.modules()
    )
    if is_checkpointed:
        decoder.train()
    ids, positions, shared = batch.input_ids, batch.position_ids, batch.shared
    if shared is not None:
        ids, positions = ids[shared.kept], positions[shared.kept]
    try:
        output = decoder(
            input_ids=ids[None],
            position_ids=positions[None],
            # A 4-D mask passes through transformers unread. Without one it would build a [T, T] mask per forward.
            attention_mask=torch.zeros(1, 1, 0, 0, device=batch.input_ids.device),
            use_cache=False,
            packing=packing(model, batch.cu_seqlens, batch.max_seqlen, shared),
        )
    finally:
        if is_checkpointed:
            decoder.eval()
    hidden: Tensor = output.last_hidden_state[0]
    return hidden if shared is None else spread(hidden, shared)


def model_head(model: PreTrainedModel, *, temperature: float = 1.0) -> Head:
    """The output embedding with everything this family does to its logits.

        z = softcap_tanh(logit_scale * (hidden @ weight.T + bias)) / temperature

    `final_logit_softcapping` is Gemma 2's, `logit_scale` Cohere's, `logits_scaling` (a divisor) Granite's. Any other
    scaling is found by `check_packing` when the model is loaded, and refused.
    """
    output = model.get_output_embeddings()
    if output is None:
        raise ValueError(f"{type(model).__name__} has no output embedding; fastrl trains causal language models")
    config = model.config.get_text_config()
    return Head(
        weight=output.weight,
        bias=output.bias,
        temperature=temperature,
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0),
    )


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Measure on two short sequences that packing and `model_head` give what the model itself gives.

    Raises:
        ValueError: they differ by more than rounding (relative to the spread of the values: 1e-3, or 0.1 in bfloat16).
    """
    check_packed_hidden(model)
    first, second = _probe(model)
    alone = [_decoder(model)(input_ids=ids[None], use_cache=False)[0][0] for ids in (first, second)]
    logits = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in (first, second)])
    if (gap := _relative_gap(_logits(model_head(model), torch.cat(alone)), logits)) > _tolerance(model):
        raise ValueError(
            f"{type(model).__name__} scales its logits in a way fastrl does not know (relative gap {gap:.1e}); known "
            "are final_logit_softcapping, logit_scale and logits_scaling"
        )


@torch.no_grad()
def check_packed_hidden(model: PreTrainedModel) -> None:
    """The first half of `check_packing`, for a model with any head: two sequences packed against the same alone."""
    first, second = _probe(model)
    expected = torch.cat([_decoder(model)(input_ids=ids[None], use_cache=False)[0][0] for ids in (first, second)])
    lengths = (len(first), len(second))
    positions = torch.cat([torch.arange(n) for n in lengths]).to(model.device)
    cu_seqlens = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=model.device)
    ids = torch.cat([first, second])
    batch = TokenBatch(
        input_ids=ids,
        position_ids=positions,
        target=ids,
        weight=torch.ones(len(ids), device=model.device),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        sequence=torch.tensor([0, 1], device=model.device),
    )
    if (gap := _relative_gap(hidden_states(model, batch), expected)) > _tolerance(model):
        raise ValueError(
            f"{type(model).__name__} gives packed sequences other values than the same sequences alone (relative gap "
            f"{gap:.1e}); its attention or its state crosses sequence borders, so fastrl cannot train it"
        )


def _probe(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first, second = ((7 * torch.arange(start, end) % vocabulary).to(model.device) for start, end in ((1, 6), (6, 14)))
    return first, second


def _tolerance(model: PreTrainedModel) -> float:
    return 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The part below the head. Some families and versions answer only one of the two questions asked here."""
    decoder: nn.Module = model.base_model if model.base_model is not model else model.get_decoder()
    return decoder


def _logits(head: Head, hidden: Tensor) -> Tensor:
    logits = head.logit_scale * nn.functional.linear(hidden, head.weight, head.bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _relative_gap(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))


def check_vocabulary(directory: Path, *, trust_remote_code: bool) -> None:
    """Every token the tokenizer can make must have a row in the embedding; more rows than tokens is usual padding."""
    if not has_tokenizer(directory):
        return
    config = json_file(directory / "config.json")
    rows = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    tokenizer = load_tokenizer(directory, chat_template=None, trust_remote_code=trust_remote_code)
    largest = max(tokenizer.get_vocab().values())
    if rows is not None and largest >= rows:
        raise ValueError(
            f"the tokenizer of {directory} makes token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), "
            f"but the model's vocab_size is {rows}; use the model's own tokenizer or resize the embedding"
        )


def turn_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability of `model` to 0: torch's modules, and the numbers of transformers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "dropout_p", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
