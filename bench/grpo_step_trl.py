"""TRL's side of `bench.grpo_step`: `GRPOTrainer.train()` with the fastest settings for a small model on a CPU.

TRL is imported inside the functions: the rest of the benchmark runs without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

Reward = Callable[..., list[float]]
Row = dict[str, Any]  # of the prompt file: the prompt, and columns for the reward

# How TRL samples without vLLM, which has no place on a CPU beside the trainer.
MODES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "continuous": {"use_transformers_continuous_batching": True},
}


class TRLRun(TrainerCallback):  # type: ignore[misc]
    """Clock of one `train()`; at the begin of every `block`-th step the other contender takes its turn, untimed."""

    def __init__(self, mode: str, *, turn: Callable[[], None], block: int, untimed: int) -> None:
        self.mode = mode
        self.turn = turn
        self.block = block
        self.untimed = untimed
        self.times: list[tuple[float, float, float]] = []  # of each step: milliseconds in all, sampling, processor
        self.lengths: list[int] = []
        self.started: tuple[float, float] | None = None
        self.rollout = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()
        done = len(self.times) - self.untimed
        if done >= 0 and done % self.block == 0:
            self.turn()
        self.rollout = 0.0
        self.started = perf_counter(), process_time()

    def train(self, folder: Path, rows: Sequence[Row], *, reward: Reward, steps: int, settings: Row) -> None:
        """Train `steps` steps; `times` and `lengths` say how it went."""

        def counted(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
            self.lengths += map(len, completion_ids)
            return reward(**columns)

        settings = settings | {"logging_steps": 10} | MODES[self.mode]
        trainer = _trainer(folder, rows, counted, steps=steps, settings=settings)
        trainer.add_callback(self)
        for name in ("generate", "generate_batch"):
            setattr(trainer.model, name, self._timed(getattr(trainer.model, name)))
        trainer.train()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The last step has no successor whose begin could end it.
        if state.global_step == state.max_steps:
            self._stop()

    def _stop(self) -> None:
        if self.started is not None:
            wall, cpu = perf_counter() - self.started[0], process_time() - self.started[1]
            self.times.append((1e3 * wall, 1e3 * self.rollout, 1e3 * cpu))
        self.started = None

    def _timed(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = perf_counter()
            output = generate(*args, **kwargs)
            self.rollout += perf_counter() - started
            return output

        return timed


def trl_first_step(
    folder: Path,
    rows: Sequence[Row],
    completions: Sequence[tuple[int, ...]],
    *,
    reward: Reward,
    groups: int,
    settings: Row,
) -> dict[str, float]:
    """What TRL logs for one step on given completions of the first batch, group by group."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # rollout_func is the one public way to hand completions in

    def given(asked: list[Any], trainer: Any) -> dict[str, Any]:
        generations = settings["num_generations"]
        if asked != [row["prompt"] for row in rows[:groups] for _ in range(generations)]:
            raise RuntimeError(f"TRL visits other prompts than fastrl: {asked[::generations]}")
        prompt_ids = [_prompt_ids(trainer.processing_class, prompt) for prompt in asked]
        return {"prompt_ids": prompt_ids, "completion_ids": [list(ids) for ids in completions], "logprobs": None}

    trainer = _trainer(folder, rows, reward, steps=1, settings=settings | {"logging_steps": 1}, rollout_func=given)
    trainer.train()
    logged: dict[str, float] = trainer.state.log_history[0]
    return logged


def _prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _trainer(
    folder: Path, rows: Sequence[Row], reward: Reward, *, steps: int, settings: Row, rollout_func: Any = None
) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=steps,
        shuffle_dataset=False,  # the prompts come in fastrl's order
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        rollout_func=rollout_func,
    )
    trainer.remove_callback(PrinterCallback)  # the log is kept in the trainer's state
    return trainer
