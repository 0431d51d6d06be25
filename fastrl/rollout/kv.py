"""The decoding cache: keys and values preallocated and written in place, rows dropped when they finish.

Transformers' own dynamic cache concatenates, which copies every layer's whole history at each token: at 256 rows of a
small model that is more than half of the decoding time (docs/rollout.md).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

FIRST_ROOM = 64  # tokens; the room then doubles, so that short completions never pay for the longest one allowed


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values, [B, H, room, d] each, of which the first `used` tokens are filled.

    It is a transformers cache layer: attention calls `update` and mask making asks for the length. Both tell the truth
    about `used` alone. The tensors that `update` returns are views: they are valid until the next call.
    """

    def __init__(self, keys: Tensor, values: Tensor, *, batch: int, used: int, limit: int) -> None:
        """Room for `batch` rows, shaped like prefilled keys and values; no row ever holds more than `limit` tokens."""
        super().__init__()
        self.used = used
        self.limit = limit
        room = min(limit, used + FIRST_ROOM)
        # Zeros, not fresh memory: the padding left of a short prompt is masked, and 0 * NaN would be NaN.
        self.keys: Tensor = keys.new_zeros(batch, keys.shape[1], room, keys.shape[3])
        self.values: Tensor = values.new_zeros(batch, values.shape[1], room, values.shape[3])
        self.is_initialized = True

    def place(self, rows: slice, keys: Tensor, values: Tensor, repeat: Tensor) -> None:
        """Copy prefilled prompts into rows, right-aligned before `used`, each repeated for its group.

        Args:
            rows: the B' rows to fill.
            keys: [U, H, n, d] of U different prompts with n <= used tokens; values the same.
            repeat: [B'] the prompt of each row.
        """
        self.keys[rows, :, self.used - keys.shape[2] : self.used] = keys[repeat]
        self.values[rows, :, self.used - keys.shape[2] : self.used] = values[repeat]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append one token per row; returns everything filled so far."""
        place = self.append()
        self.keys[:, :, place : self.used] = key_states
        self.values[:, :, place : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def append(self) -> int:
        """Count one more token per row as filled; returns its place, where the caller writes keys and values."""
        place, self.used = self.used, self.used + 1
        if self.used > self.keys.shape[2]:
            room = min(self.limit, 2 * self.used)
            self.keys, self.values = _roomier(self.keys, room), _roomier(self.values, room)
        return place

    def get_seq_length(self) -> int:
        return self.used

    def keep_rows(self, rows: Tensor) -> None:
        """Drop every row not in `rows` ([B'] int64, rising)."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def decoding_cache(prefilled: list[tuple[slice, DynamicCache, Tensor]], *, batch: int, width: int, limit: int) -> Cache:
    """One cache for all rows of a batch from prompts that were prefilled in several forward passes.

    Args:
        prefilled: per pass its rows, its cache over different prompts, and which prompt each row repeats. Emptied as
            it is read, layer by layer, so that prompts are never held twice as a whole.
        batch: number of rows.
        width: tokens of the longest prompt; shorter ones are aligned right.
        limit: most tokens a row will ever hold, padding included.
    """
    layers = []
    for i, first in enumerate(prefilled[0][1].layers):
        layer = RoomyLayer(first.keys, first.values, batch=batch, used=width, limit=limit)
        for rows, cache, repeat in prefilled:
            layer.place(rows, cache.layers[i].keys, cache.layers[i].values, repeat)
            cache.layers[i].keys = cache.layers[i].values = None
        layers.append(layer)
    return Cache(layers=layers)


def _roomier(x: Tensor, room: int) -> Tensor:
    grown = x.new_zeros(*x.shape[:2], room, x.shape[3])
    grown[:, :, : x.shape[2]] = x
    return grown
