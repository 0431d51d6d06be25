"""The policy loss on a realistic batch: real solutions of GSM8K, a head that was trained on them, masks, clipped rows.

Random weights make flat logits, and a kernel that skips small probabilities skips nearly everything or nothing. Here a
small model (three previous words to the next one) is trained for some seconds on questions and answers of GSM8K; the
batch is groups of solutions with their questions, as a trainer packs them: questions are masked, three groups of ten
have no signal, and the policy has moved since the completions were sampled, so that part of the rows is clipped.

The data is the real file, beside the repository (`FASTRL_GSM8K` names another place); without it the row cannot run.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.linear_logprob import three_products
from bench.peers import bare_products, trl_logprob, verl_logprob
from bench.registry import Compiled, Row, register
from fastrl.ops.linear_cross_entropy import linear_cross_entropy
from fastrl.ops.linear_logprob import linear_logprob
from fastrl.ops.linear_logprob import reference as waist_reference
from fastrl.ops.linear_token_loss import linear_token_loss

FILE = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
CONTEXT = 3  # words before the one that is predicted
LOW, HIGH = 0.2, 0.28
GROUP = 8
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def words(text: str) -> list[str]:
    """Digits one by one, words, and every other sign."""
    return re.findall(r"\d|[A-Za-z]+|[^\sA-Za-z\d]", text)


@cache
def trained(d: int, v: int, steps: int = 150) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train the small model; returns hidden [T, D], weight [V, D], target [T] and whether t is of an answer [T]."""
    path = Path(os.environ.get("FASTRL_GSM8K", FILE))
    if not path.is_file():
        raise RuntimeError(f"needs GSM8K's train.jsonl, and {path} is not there; name it with FASTRL_GSM8K")
    rows = [json.loads(line) for line in path.read_text().splitlines()[:2000]]
    texts = [(words(row["question"]), words(row["answer"])) for row in rows]
    common = Counter(word for pair in texts for part in pair for word in part).most_common(v - 1)
    number = {word: i for i, (word, _) in enumerate(common, 1)}  # 0 is every rare word
    ids = torch.tensor([number.get(word, 0) for pair in texts for part in pair for word in part])
    is_answer = torch.tensor([place == 1 for pair in texts for place, part in enumerate(pair) for _ in part])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tables = nn.ModuleList([nn.Embedding(v, d) for _ in range(CONTEXT)])
        head = nn.Linear(d, v, bias=False)
    optimizer = torch.optim.AdamW([*tables.parameters(), *head.parameters()], lr=3e-3)
    generator = torch.Generator().manual_seed(0)

    def hidden(target: Tensor) -> Tensor:
        """Of the words before each position."""
        return torch.tanh(sum((table(ids[target - i - 1]) for i, table in enumerate(tables)), torch.zeros(())))

    for _ in range(steps):
        at = torch.randint(CONTEXT, len(ids), (512,), generator=generator)
        optimizer.zero_grad()
        linear_cross_entropy(hidden(at), head.weight, ids[at]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        place = torch.arange(CONTEXT, len(ids))
        return hidden(place), head.weight.detach(), ids[CONTEXT:], is_answer[CONTEXT:]


def batch(n: int, d: int, v: int, *, dtype: torch.dtype, device: str) -> Batch:
    """hidden [N, D], weight [V, D], target, advantage, old log-probability and row weight [N]."""
    hidden, weight, target, is_answer = (x[:n] if x.shape[0] != v else x for x in trained(d, v))
    generator = torch.Generator().manual_seed(1)
    # Completions are the runs of answers; eight of them are a group.
    starts = is_answer & ~torch.cat([is_answer.new_zeros(1), is_answer[:-1]])
    completion = starts.cumsum(0)
    advantage = torch.randn(int(completion.max()) + 1, generator=generator)
    is_silent = torch.arange(len(advantage)) // GROUP % 10 % 3 == 1  # groups 1, 4 and 7 of ten
    advantage = torch.where(is_silent, 0.0, advantage)[completion]
    row_weight = is_answer / is_answer.sum().clamp(min=1)
    old = waist_reference(hidden, weight, target).logprob + 0.15 * torch.randn(n, generator=generator)
    wide = torch.promote_types(dtype, torch.float32)
    return (
        hidden.to(device, dtype),
        weight.to(device, dtype),
        target.to(device),
        advantage.to(device, wide),
        old.to(device, wide),
        row_weight.to(device, wide),
    )


def clipped(logprob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """Clip-higher."""
    ratio = (logprob - old.to(logprob.dtype)).exp()
    advantage = advantage.to(logprob.dtype)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - LOW, 1 + HIGH) * advantage)


def after(head: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The loss on log-probabilities that a head returned."""

    def loss(h: Tensor, weight: Tensor, target: Tensor, advantage: Tensor, old: Tensor, row_weight: Tensor) -> Tensor:
        logprob = head(h, weight, target)
        return (row_weight.to(logprob.dtype) * clipped(logprob, old, advantage)).sum()

    return loss


def single_pass(
    h: Tensor, weight: Tensor, target: Tensor, advantage: Tensor, old: Tensor, row_weight: Tensor, *, backend: str
) -> Tensor:
    """The loss inside the chunk loop: masked, silent and clipped rows cost no gradient product."""
    return linear_token_loss(
        h,
        weight,
        target,
        lambda logprob, _entropy, rows: clipped(logprob, old[rows], advantage[rows]),
        row_weight=row_weight,
        backend=backend,
    ).loss


eager = after(lambda h, weight, target: waist_reference(h, weight, target).logprob)

register(
    Row(
        name="policy_loss_gsm8k",
        make_inputs=batch,
        spec=eager,
        contenders={
            "eager": eager,
            "eager, compiled": Compiled(eager),
            "linear_logprob": after(
                lambda h, weight, target: linear_logprob(h, weight, target, backend="torch").logprob
            ),
            "torch": partial(single_pass, backend="torch"),
            "triton": partial(single_pass, backend="triton"),
            "TRL's head": after(lambda h, weight, target: trl_logprob(h, weight, target)[0]),
            "verl's head": after(lambda h, weight, target: verl_logprob(h, weight, target)[0]),
        },
        shapes={"32k words": (32_768, 1024, 4096)},
        quick_shapes={"4k words": (4096, 128, 4096)},
        flops=three_products,
        floor=bare_products,
        differentiable=(0, 1),
        check_rows=2048,
    )
)
