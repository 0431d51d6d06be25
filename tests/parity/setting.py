"""What both sides of the replays start from: tokenizer, rows, first weights, options. It knows neither TRL nor recipes.

Rows and first weights are written down in `vectors/`, so nothing here depends on a generator of random numbers but the
script that makes the vectors.
"""

from __future__ import annotations

import random
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Any

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VECTORS = Path(__file__).with_name("vectors")
STEPS, BATCH, DISTINCT_ROWS = 20, 8, 64
LETTERS = digits + ascii_lowercase + ascii_uppercase[:24]  # with the four special tokens a vocabulary of 64

# Names and meanings are those of transformers' TrainingArguments and of ours.
OPTIMIZER: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
}
# The same for TRL's trainer and our recipe, where the meaning is the same.
OPTIONS: dict[str, dict[str, Any]] = {
    "sft": {"per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2},
    "dft": {"loss_type": "dft"},
    "dpo": {"beta": 0.1},
    "tr_dpo": {"beta": 0.1, "sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 4},
    "ipo": {"beta": 0.3},
    "rpo": {"beta": 0.3, "loss_weights": [0.7, 1.5, 0.4]},
    "kto": {"beta": 0.2, "desirable_weight": 1.2, "undesirable_weight": 0.9},
    "orpo": {"beta": 0.5},
    "cpo": {"beta": 0.2, "cpo_alpha": 0.7, "label_smoothing": 0.1},
    "simpo": {"beta": 2.0, "simpo_gamma": 0.6, "cpo_alpha": 0.0},
    "reward": {"center_rewards_coefficient": 0.05},
    "gkd": {"beta": 0.3, "lmbda": 0.0, "max_new_tokens": 8},  # on the data's completions: samples cannot be the same
}
# Metrics that both sides log under one name with one meaning.
PAIR_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
METRICS: dict[str, tuple[str, ...]] = {
    "sft": (),  # TRL's entropy is a mean of its micro-batches' means, ours a mean over the tokens of the step
    "dft": ("entropy",),
    "dpo": (*PAIR_METRICS, "logps/rejected", "entropy"),
    "tr_dpo": (*PAIR_METRICS, "logps/rejected"),
    "ipo": (*PAIR_METRICS, "logps/rejected"),
    "rpo": (*PAIR_METRICS, "logps/rejected"),
    "kto": ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"),
    "orpo": (*PAIR_METRICS, "logps/rejected", "nll_loss", "log_odds_chosen", "log_odds_ratio"),
    "cpo": (*PAIR_METRICS, "logps/rejected", "nll_loss"),
    "simpo": (*PAIR_METRICS, "logps/rejected"),
    "reward": ("accuracy", "margin", "mean_reward"),
    "gkd": (),
}


def make_tokenizer() -> Any:
    """One token per letter or digit; the template ends a turn with EOS and writes nothing after it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((PAD, END, USER, ASSISTANT, *LETTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, additional_special_tokens=[USER, ASSISTANT]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def visited_rows(method: str) -> list[dict[str, Any]]:
    """The rows of the run, in the order in which its steps visit them; prompts of a step are all different."""
    make = {"sft": _supervised, "dft": _supervised, "gkd": _supervised, "kto": _judged, "reward": _with_margin}.get(
        method, _pair
    )
    return [make(i % DISTINCT_ROWS) for i in range(STEPS * BATCH)]


def _pair(number: int) -> dict[str, Any]:
    source = random.Random(number)  # of it only random(), which no version of Python will change
    prompt = f"{number}" + _word(source, longest=9)
    chosen, rejected = _word(source, longest=10), _word(source, longest=12)
    return {"prompt": _turn("user", prompt), "chosen": _turn("assistant", chosen),
            "rejected": _turn("assistant", rejected + "x")}  # fmt: skip


def _supervised(number: int) -> dict[str, Any]:
    pair = _pair(number)
    return {"prompt": pair["prompt"], "completion": pair["chosen"]}


def _judged(number: int) -> dict[str, Any]:
    """Three in eight are undesirable; some steps have more than others."""
    pair, label = _pair(number), (number * 5 + number // 8) % 8 > 2
    return {"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": label}


def _with_margin(number: int) -> dict[str, Any]:
    return _pair(number) | {"margin": 0.25 * (number % 5)}


def _word(source: random.Random, *, longest: int) -> str:
    length = 1 + int(source.random() * longest)
    return "".join(LETTERS[int(source.random() * len(LETTERS))] for _ in range(length))


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def write_models(folder: Path, weights: dict[str, Any]) -> dict[str, Path]:
    """Write a language model, a reward model, the same but for the head, and a teacher, the same but for its words.

    Args:
        weights: name -> NumPy array, of all parameters and `score.weight`.

    Returns:
        Their directories, by name: "policy", "scorer" and "teacher".
    """
    import torch

    from fastrl.train.export import save_pretrained
    from fastrl.train.score_model import load_score_model, save_score_model

    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    head = tensors.pop("score.weight")
    model = make_model()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    tokenizer = make_tokenizer()
    policy, scorer, teacher = folder / "policy", folder / "scorer", folder / "teacher"
    save_pretrained(model, tokenizer, policy, card="random")
    score_model = load_score_model(policy, dtype=torch.float32, device="cpu", new_head=0.0)
    with torch.no_grad():
        score_model.score.weight.copy_(head)
    save_score_model(score_model, tokenizer, scorer, card="random")
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.flip(0))
    save_pretrained(model, tokenizer, teacher, card="random")
    return {"policy": policy, "scorer": scorer, "teacher": teacher}


def make_model() -> Any:
    """A Qwen3 of 7000 parameters; `vectors/start.npz` has its weights, as sines differ in last digits between CPUs."""
    from fastrl.train.tiny import make_tiny_qwen3

    tokenizer = make_tokenizer()
    return make_tiny_qwen3(
        len(tokenizer),
        hidden_size=16,
        layers=2,
        intermediate_size=32,
        context=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seed=1,
    )
