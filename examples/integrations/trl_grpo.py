"""TRL's GRPO on a tiny model with random weights, three ways: TRL alone, TRL patched, fastrl's packed trainer.

    pip install 'trl>=1.16,<2' && python examples/integrations/trl_grpo.py

A minute of one core. The three learn the same: to answer with digits. Nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from fastrl.integrations.trl import FastGRPOTrainer, patched
from fastrl.train.tiny import make_tiny_qwen3

DIGITS = "0123456789"


def make_tokenizer() -> Any:
    """One token per letter or digit."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: i for i, token in enumerate(("<|pad|>", "<|end|>", *letters, *DIGITS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>")


def share_of_digits(completions: list[str], **columns: Any) -> list[float]:
    """The reward."""
    return [sum(letter in DIGITS for letter in text) / max(1, len(text)) for text in completions]


def train(kind: type[GRPOTrainer], folder: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Ten steps; what was logged, and the weights in the end."""
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        reward_funcs=share_of_digits,
        args=GRPOConfig(
            output_dir=str(folder / "run"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_steps=10,
            per_device_train_batch_size=32,
            num_generations=8,
            max_completion_length=16,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": word} for word in ("count", "number", "sum", "add") * 8]),
        processing_class=make_tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [line for line in trainer.state.log_history if "reward" in line], trainer.model.state_dict()


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of any two weights of one place."""
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def main() -> None:
    """Print the rewards of the three side by side."""
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiny_qwen3(
            len(tokenizer),
            hidden_size=64,
            layers=2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            seed=0,
        ).save_pretrained(folder / "model")
        started = perf_counter()
        plain, weights = train(GRPOTrainer, folder)
        with patched() as patch:
            print(f"replaced in TRL {patch.trl_version}: {', '.join(patch.replaced)}")
            ours, patched_weights = train(GRPOTrainer, folder)
            packed, packed_weights = train(FastGRPOTrainer, folder)
    print(f"{'step':>4} {'TRL':>8} {'patched':>8} {'packed':>8}   reward, ({perf_counter() - started:.0f} s in all)")
    for step, rows in enumerate(zip(plain, ours, packed, strict=True), 1):
        print(f"{step:4} " + " ".join(f"{row['reward']:8.4f}" for row in rows))
    # On policy the loss is 0 whatever is learnt: what was learnt is in the weights.
    for name, others in (("patched", patched_weights), ("packed", packed_weights)):
        print(f"largest difference of a weight, TRL and {name}: {largest_difference(weights, others):.1e}")


if __name__ == "__main__":
    main()
