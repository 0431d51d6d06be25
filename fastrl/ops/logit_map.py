"""What lies between the head's product and the softmax: z = softcap(scale raw) / temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LogitMap:
    """z = cap tanh(scale raw / cap) / temperature, without the tanh where softcap is None.

    Attributes:
        scale: Cohere's and Granite's logit scale, before the cap.
        softcap: Gemma's cap on |scale raw|.
        temperature: one number, or [N] one per row; a constant.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float | Tensor = 1.0

    @property
    def row_temperature(self) -> Tensor | None:
        """The temperature where it is a tensor: saved for backward, so that a change before it is noticed."""
        return self.temperature if isinstance(self.temperature, Tensor) else None

    def rows(self, index: Tensor | slice) -> LogitMap:
        """The map of some of the rows."""
        if not isinstance(self.temperature, Tensor):
            return self
        return LogitMap(self.scale, self.softcap, self.temperature[index])

    def factor(self, rows: Tensor) -> float | Tensor:
        """scale / temperature: dz / d raw without the cap; a number, or [C] like `rows` in its dtype."""
        if isinstance(self.temperature, Tensor):
            return self.scale / self.temperature.to(rows.dtype)
        return self.scale / self.temperature

    def apply(self, raw: Tensor) -> Tensor:
        """raw [C, V] -> z [C, V], differentiable; raw itself when the map is the identity."""
        if self.softcap is not None:
            raw = self.softcap * torch.tanh(raw * (self.scale / self.softcap))
        scale = 1.0 if self.softcap is not None else self.scale
        if isinstance(self.temperature, Tensor):
            return raw * (scale / self.temperature.to(raw.dtype))[:, None]
        return raw if scale == self.temperature else raw * (scale / self.temperature)

    def slope(self, raw: Tensor) -> Tensor | None:
        """The cap's derivative 1 - tanh^2 [C, V]; None without a cap."""
        if self.softcap is None:
            return None
        return torch.tanh(raw * (self.scale / self.softcap)).square_().neg_().add_(1)
