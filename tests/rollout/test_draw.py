from __future__ import annotations

import math

import pytest
import torch

from fastrl.rollout.draw import drawn, filtered, greedy, penalized
from fastrl.rollout.engine import Sampling
from fastrl.rollout.seeds import streams, uniform

INF = math.inf


def kept(probabilities: list[float], **sampling: float) -> list[int]:
    logits = torch.tensor([probabilities]).log()
    return filtered(logits, Sampling(**sampling))[0].isfinite().nonzero()[:, 0].tolist()


def test_the_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalized(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_top_k_keeps_exactly_k_even_among_ties():
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=2) == [1, 3]
    assert len(kept([0.25, 0.25, 0.25, 0.25], top_k=3)) == 3
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=9) == [0, 1, 2, 3]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    assert kept([0.125, 0.5, 0.125, 0.25], top_p=0.5) == [1]
    assert kept([0.125, 0.5, 0.125, 0.25], top_p=0.51) == [1, 3]
    assert kept([0.125, 0.5, 0.125, 0.25], top_p=0.8) == [0, 1, 3]  # the tie falls to the lower id
    assert kept([0.25, 0.25, 0.25, 0.25], top_p=0.5) == [0, 1]  # two reach it exactly
    assert kept([0.125, 0.5, 0.125, 0.25], top_p=1.0) == [0, 1, 2, 3]
    assert kept([0.125, 0.5, 0.125, 0.25], top_p=1e-9) == [1]


def test_top_p_after_top_k_uses_the_probabilities_of_the_tokens_kept():
    """Of 0.4, 0.3 (kept by top-k) the first has 4/7 = 0.571."""
    assert kept([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.57) == [0]
    assert kept([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.58) == [0, 1]


def test_min_p_compares_with_the_best_token():
    assert kept([0.5, 0.26, 0.14, 0.1], min_p=0.5) == [0, 1]
    assert kept([0.5, 0.26, 0.14, 0.1], min_p=0.27) == [0, 1, 2]
    assert kept([0.5, 0.26, 0.14, 0.1], min_p=1.0) == [0]


def test_filters_act_after_the_temperature():
    """At temperature 2 probabilities go as their square root: 0.64, 0.36 -> 0.8 : 0.6, a share of 0.571."""
    assert kept([0.64, 0.36], temperature=2.0, top_p=0.6) == [0, 1]
    assert kept([0.64, 0.36], temperature=1.0, top_p=0.6) == [0]
    logits = torch.tensor([[1.0, 3.0]])
    torch.testing.assert_close(filtered(logits, Sampling(temperature=0.5)), torch.tensor([[2.0, 6.0]]))


def test_the_draw_inverts_the_distribution_function_at_its_borders():
    z = torch.tensor([[0.25, 0.0, 0.5, 0.25]]).log()
    for u, token in ((0.0, 0), (0.2499, 0), (0.2501, 2), (0.7499, 2), (0.7501, 3), (1 - 2.0**-53, 3)):
        got, logprob = drawn(z, torch.tensor([u], dtype=torch.float64))
        assert got.item() == token
        torch.testing.assert_close(logprob, z[:, token])


def test_a_token_of_probability_zero_is_never_drawn():
    z = torch.tensor([[-INF, 0.0, -INF], [0.0, -INF, -INF], [-INF, -INF, 0.0]])
    for u in (0.0, 0.5, 1 - 2.0**-53):
        token, logprob = drawn(z, torch.full((3,), u, dtype=torch.float64))
        assert token.tolist() == [1, 0, 2]
        assert logprob.tolist() == [0.0, 0.0, 0.0]


def test_draws_follow_the_filtered_distribution():
    """Chi-square over 50000 seeds, at several positions, against the 99.9 % point of chi2(k - 1)."""
    n = 50_000
    torch.manual_seed(0)
    logits = 2.0 * torch.randn(1, 50)
    stream = streams(range(n), torch.device("cpu"))
    for position, (sampling, limit) in enumerate(
        ((Sampling(), 85.4), (Sampling(temperature=0.7, top_k=10), 27.9), (Sampling(top_p=0.9, min_p=0.01), 85.4))
    ):
        z = filtered(logits, sampling)
        token, logprob = drawn(z.expand(n, -1), uniform(stream, position))
        p = z[0].double().softmax(-1)
        torch.testing.assert_close(logprob.double(), p.log()[token], atol=1e-6, rtol=0)
        count = torch.bincount(token, minlength=50).double()
        assert bool((count[p == 0] == 0).all())
        is_common = n * p >= 5
        rest = n * p[~is_common].sum()
        assert float(((count - n * p) ** 2 / (n * p))[is_common].sum()) < limit
        assert abs(float(count[~is_common].sum() - rest)) <= 5 * float(rest) ** 0.5 + 1e-9


def test_a_large_vocabulary_keeps_its_rare_tokens():
    """150000 equal tokens: u = (v + 1/2) / V must give v."""
    v = 150_000
    want = torch.tensor([0, 1, 77_777, v - 2, v - 1])
    u = (want.double() + 0.5) / v
    token, logprob = drawn(torch.zeros(5, v), u)
    assert token.tolist() == want.tolist()
    torch.testing.assert_close(logprob, torch.full((5,), -math.log(v)))


def test_a_token_rarer_than_float32_resolves_keeps_its_share():
    """Probabilities 1 and 1e-9, whose float32 sum is 1: the second token owns u above 1 - 1e-9."""
    z = torch.tensor([[0.0, math.log(1e-9)]]).expand(2, 2)
    token, logprob = drawn(z, torch.tensor([1 - 2e-9, 1 - 5e-10], dtype=torch.float64))
    assert token.tolist() == [0, 1]
    torch.testing.assert_close(logprob, torch.tensor([0.0, math.log(1e-9)]))


def test_greedy_takes_the_best_token_at_temperature_one():
    logits = torch.tensor([[0.1, 0.7, 0.2]]).log() + 3.0
    token, logprob = greedy(logits)
    assert token.tolist() == [1]
    torch.testing.assert_close(logprob, torch.tensor([0.7]).log())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=2), Sampling(top_p=0.5), Sampling(min_p=0.5)])
def test_a_broken_row_is_marked_and_leaves_its_neighbours_alone(bad: float, sampling: Sampling):
    logits = torch.tensor([[1.0, bad, 0.0, 0.5], [1.0, 2.0, 0.0, 0.5]])
    u = torch.tensor([0.5, 0.5], dtype=torch.float64)
    token, logprob = drawn(filtered(logits, sampling), u)
    alone, alone_logprob = drawn(filtered(logits[1:], sampling), u[1:])
    assert logprob.isfinite().tolist() == [False, True]
    assert 0 <= int(token[0]) < 4
    assert (token[1], logprob[1]) == (alone[0], alone_logprob[0])
    assert greedy(logits)[1].isfinite().tolist() == [False, True]
