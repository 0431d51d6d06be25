"""Credit per turn reaches the tokens of its turn, and the metrics and errors of a round of episodes."""

from __future__ import annotations

import torch

from fastrl.algorithms.presets import grpo
from fastrl.rollout.episodes import Episode
from fastrl.train.config import EnvironmentBlock
from fastrl.train.episode_credit import environment_errors, episode_metrics, token_credit
from fastrl.train.prepare import step_sequences
from fastrl.types import Rollout

BLOCK = EnvironmentBlock(tools=("calculator",), turn_advantage_weight=2.0)
GROUP = torch.tensor([0, 0])
JUDGED = torch.tensor([True, True])


def episode(rewards: tuple[float | None, ...], *, error: str = "", limit: str = "", calls: int = 2) -> Episode:
    """Turns of two sampled tokens with one token of an observation between them."""
    n = len(rewards)
    is_sampled = tuple(place % 3 != 2 for place in range(3 * n - 1))
    ids = tuple(range(1, 3 * n))
    rollout = Rollout((9,), ids, tuple(-1.0 * flag for flag in is_sampled), "stop", 0, is_sampled)
    ends = tuple(3 * k + 2 for k in range(n))
    return Episode(rollout, [], ends, rewards, n_calls=calls, n_failures=1, error=error, limit=limit, seconds=3.0)


def test_a_turns_advantage_is_on_its_own_tokens() -> None:
    credit = token_credit([episode((0.0, 1.0)), episode((0.0, 0.0))], GROUP, JUDGED, BLOCK)
    assert credit is not None
    # Returns (1, 1) and (0, 0): each turn's pair normalises to +-sqrt(1/2), weighed by 2.
    high = 2 * 0.5**0.5
    torch.testing.assert_close(torch.tensor(credit), torch.tensor([[high] * 5, [-high] * 5]), rtol=1e-3, atol=0)
    later = token_credit([episode((1.0, 0.0)), episode((0.0, 0.0))], GROUP, JUDGED, BLOCK)
    assert later is not None
    assert later[0][:2] != [0.0, 0.0]
    assert later[0][2:] == [0.0, 0.0, 0.0]  # the second turns are alike


def test_credit_moves_a_group_whose_episodes_earn_the_same() -> None:
    episodes = [episode((1.0, 0.0)), episode((0.0, 0.0))]
    algorithm = grpo()
    step = step_sequences(
        algorithm,
        [each.rollout for each in episodes],
        torch.zeros(2),
        GROUP,
        is_judged=JUDGED,
        is_kept=JUDGED,
        keep_denominator=False,
        credit=token_credit(episodes, GROUP, JUDGED, BLOCK),
    )
    high = 2 * 0.5**0.5
    assert [len(each.ids) for each in step.sequences] == [6, 6]
    for sequence, sign in zip(step.sequences, (1, -1), strict=True):
        advantage = torch.as_tensor(sequence.advantage)
        torch.testing.assert_close(advantage, torch.tensor([0.0, *[sign * high] * 2, 0.0, 0.0, 0.0]), rtol=1e-3, atol=0)
        assert (torch.as_tensor(sequence.weight) != 0).tolist() == [False, True, True, False, True, True]


def test_turns_without_a_reward_and_episodes_without_a_verdict_are_in_no_mean() -> None:
    credit = token_credit([episode((None, 1.0)), episode((5.0,))], GROUP, torch.tensor([True, False]), BLOCK)
    assert credit == [[0.0] * 5, [0.0] * 2]
    assert token_credit([episode((1.0,))], GROUP[:1], JUDGED[:1], EnvironmentBlock()) is None
    assert token_credit([], GROUP[:0], JUDGED[:0], BLOCK) is None


def test_metrics_have_trls_names() -> None:
    episodes = [episode((1.0, 0.0), limit="turns"), episode((None,), error="hung", calls=1)]
    assert episode_metrics(episodes) == {
        "tools/call_frequency": 1.5,
        "tools/failure_frequency": 2 / 3,
        "episodes/turns": 1.5,
        "episodes/seconds": 3.0,
        "episodes/environment_error_rate": 0.5,
        "episodes/turns_limit": 0.5,
        "episodes/tokens_limit": 0.0,
        "episodes/seconds_limit": 0.0,
        "episodes/turn_reward": 0.5,
    }
    assert episode_metrics([]) == {}
    errors = environment_errors(episodes)
    assert (errors["environment"].count, errors["environment"].first) == (1, "hung")
    assert environment_errors(episodes[:1]) == {}
