"""A transformers Trainer on a tiny model made here, without logits in training: the same loss, step by step.

python examples/integrations/transformers_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import transformers

from fastrl.integrations.transformers import apply_fastrl

VOCABULARY, STEPS = 256, 8


def rows() -> list[dict[str, list[int]]]:
    """Counting, with the first tokens left out of the loss."""
    sequences = [[(start + k) % VOCABULARY for k in range(24)] for start in range(64)]
    return [{"input_ids": ids, "labels": [-100] * 4 + ids[4:]} for ids in sequences]


def losses(*, with_fastrl: bool) -> list[float]:
    """The loss of every step."""
    transformers.set_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    model: Any = transformers.Qwen3ForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            learning_rate=3e-3, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows())  # type: ignore[arg-type]
        if with_fastrl:
            with apply_fastrl(model):
                trainer.train()
        else:
            trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def main() -> float:
    """Train twice; returns the largest difference of a step's loss."""
    plain, ours = losses(with_fastrl=False), losses(with_fastrl=True)
    for step, (one, other) in enumerate(zip(plain, ours, strict=True), 1):
        print(f"step {step}: {one:.6f} without, {other:.6f} with fastrl")
    return max(abs(one - other) for one, other in zip(plain, ours, strict=True))


if __name__ == "__main__":
    print(f"largest difference {main():.1e}")
