"""TRL's side of `bench.training_step`: the same step by `trl.GRPOTrainer`, plain, patched, and as `FastGRPOTrainer`.

The completions are padded as TRL's generation leaves them, prompts on the left and completions on the right of the
longest, and are cut into micro-batches of as many sequences as `micro_tokens` holds at that width. TRL is its own
optimizer too (AdamW as its trainer makes it, gradients clipped to 1), on a model of its own with the same weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from bench.training_cases import Case, Replay

Step = Callable[[], dict[str, float]]
NAMES = ("TRL", "TRL, patched", "TRL, FastGRPOTrainer")


def trl_steps(case: Case, replay: Replay, make_model: Callable[[], PreTrainedModel]) -> dict[str, Step]:
    """Name -> one optimizer step that returns its loss and gradient norm; empty where TRL is not installed.

    Args:
        make_model: with the weights that every other contender has; one model serves all three.
    """
    if find_spec("trl") is None:
        return {}
    from trl import GRPOTrainer  # type: ignore[import-not-found]

    from fastrl.integrations.trl import FastGRPOTrainer, patch, unpatch

    model = make_model()
    unpatch()
    plain = _trainer(GRPOTrainer, case, model)
    forward = model.forward
    fast = _trainer(FastGRPOTrainer, case, model)
    packed = model.forward  # both trainers put one of their own into the model
    optimizer = plain.create_optimizer()
    batches = _batches(case, replay, str(model.device))
    kinds: list[tuple[Any, Any, Callable[[], Any]]] = [
        (plain, forward, unpatch),
        (plain, forward, patch),
        (fast, packed, patch),
    ]
    contenders = dict(zip(NAMES, kinds, strict=True))

    def step(name: str) -> dict[str, float]:
        trainer, model.forward, swap = contenders[name]
        swap()
        model.train()
        loss = 0.0
        for batch in batches:
            part = trainer.compute_loss(model, dict(batch))
            part.backward()
            loss += part.detach()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        unpatch()
        return {"loss": float(loss), "grad_norm": float(norm)}

    return {name: partial(step, name) for name in NAMES}


def _trainer(kind: Any, case: Case, model: PreTrainedModel) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig

    is_gpu = model.device.type == "cuda"
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not is_gpu,
        bf16=is_gpu,
        learning_rate=0.0,
        loss_type="dapo",
        num_generations=case.generations,
        per_device_train_batch_size=case.generations,
        max_completion_length=case.lengths.longest,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = kind(
        model=model,
        args=config,
        processing_class=any_tokenizer(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "2 3 4"}] * 8),
    )
    trainer.current_gradient_accumulation_steps = config.steps_per_generation
    return trainer


def any_tokenizer() -> PreTrainedTokenizerFast:
    """What TRL's trainers ask for; the rows of a benchmark are ids already."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(16)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")


def _batches(case: Case, replay: Replay, device: str) -> list[dict[str, Any]]:
    """Micro-batches of padded rows, in the rollouts' order."""
    prompts = [torch.tensor(each.prompt_ids) for each in replay.rollouts]
    completions = [torch.tensor(each.completion_ids) for each in replay.rollouts]
    whole = {
        "prompt_ids": pad_sequence(prompts, batch_first=True, padding_side="left"),
        "prompt_mask": pad_sequence([torch.ones_like(x) for x in prompts], batch_first=True, padding_side="left"),
        "completion_ids": pad_sequence(completions, batch_first=True),
        "completion_mask": pad_sequence([torch.ones_like(x) for x in completions], batch_first=True),
        "advantages": replay.advantage.float(),
    }
    width = whole["prompt_ids"].shape[1] + whole["completion_ids"].shape[1]
    rows = max(1, case.micro_tokens // width)
    parts = zip(*(x.to(device).split(rows) for x in whole.values()), strict=True)
    items = whole["completion_mask"].sum().to(device)
    return [dict(zip(whole, part, strict=True)) | {"num_items_in_batch": items} for part in parts]
