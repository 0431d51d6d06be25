"""Mean and deviation of all the numbers a run has seen so far, as state that goes into its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class RunningMoments:
    """Owner of count, mean and sum of squared distances, merged batch by batch in f64.

        n' = n + m,    mean' = mean + d m / n',    S' = S + S_batch + d^2 n m / n',    d = mean_batch - mean

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
    """

    def __init__(self) -> None:
        self._state = torch.zeros(3, dtype=torch.float64)  # count, mean, sum of squared distances

    def update(self, values: Tensor) -> None:
        """Take in [n] further numbers; n may be 0."""
        if len(values) == 0:
            return
        batch = values.detach().double().cpu()
        count, mean, squares = self._state.unbind()
        total = count + len(batch)
        distance = batch.mean() - mean
        self._state = torch.stack(
            [
                total,
                mean + distance * len(batch) / total,
                squares + (batch - batch.mean()).square().sum() + distance.square() * count * len(batch) / total,
            ]
        )

    def standardized(self, values: Tensor, *, eps: float = 1e-8) -> Tensor:
        """(x - mean) / sqrt(var + eps), var with n - 1; the values as they are before a second number was seen."""
        count, mean, squares = self._state.unbind()
        if count < 2:
            return values
        return ((values.double() - mean) * (squares / (count - 1) + eps).rsqrt()).to(values.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """The three numbers."""
        return {"moments": self._state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        self._state = state["moments"].clone()
