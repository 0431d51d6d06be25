from __future__ import annotations

import torch

from fastrl.rollout.seeds import request_seed, streams, uniform

CPU = torch.device("cpu")


def splitmix64(state: int) -> int:
    """The published algorithm, in unbounded Python integers."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_first_outputs_of_splitmix64_are_the_published_ones():
    """Seed 1234567, the test vector of the public reference implementations."""
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(splitmix64(state))
        state += 0x9E3779B97F4A7C15
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_is_splitmix64_of_the_mixed_seed_to_the_last_bit():
    seeds = [0, 1, 2, 2**63 - 1, 2**63, 2**64 - 1, -1, 987654321]
    stream = streams(seeds, CPU)
    for position in (0, 1, 2, 1000, 2**31):
        want = []
        for seed in seeds:
            state = (splitmix64(seed % 2**64) + position * 0x9E3779B97F4A7C15) % 2**64
            want.append((splitmix64(state) >> 11) * 2.0**-53)
        assert uniform(stream, position).tolist() == want


def test_a_stream_that_starts_later_gives_the_numbers_of_its_positions():
    seeds = [0, 7, 2**64 - 1]
    for start in ([0, 1, 5], [2**31, 0, 3]):
        moved = uniform(streams(seeds, CPU, start=start), 2)
        want = [uniform(streams([seed], CPU), first + 2).item() for seed, first in zip(seeds, start, strict=True)]
        assert moved.tolist() == want


def test_uniform_numbers_are_even_and_independent_along_seeds_and_positions():
    """4096 seeds x 64 positions: mean 1/2, variance 1/12, correlations 0, each within 5 standard errors."""
    u = torch.stack([uniform(streams(range(4096), CPU), t) for t in range(64)], dim=1)
    n = u.numel()
    assert 0.0 <= float(u.min()) < 1e-4
    assert 1.0 - 1e-4 < float(u.max()) < 1.0
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert abs(float(u.var()) - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    centred = u - 0.5
    for shifted in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(float(shifted.mean())) < 5 / 12 / n**0.5
    count = torch.histc(u.float(), bins=256, min=0.0, max=1.0)
    assert float(((count - n / 256) ** 2 / (n / 256)).sum()) < 330.5  # 99.9 % point of chi2(255)


def test_request_seeds_are_a_pure_function_of_their_place():
    assert request_seed(0, 0, 0) == request_seed(0, 0, 0)
    places = [(run, prompt, sample) for run in range(8) for prompt in range(64) for sample in range(16)]
    seeds = [request_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(1, 2, 3) == splitmix64((splitmix64(splitmix64(1) + 2) + 3) % 2**64) >> 1
