"""What a completion pays for nearing the length limit."""

from __future__ import annotations

from torch import Tensor


def soft_overlong(length: Tensor, *, limit: int, buffer: int, penalty: float = 1.0) -> Tensor:
    """DAPO's soft overlong punishment, to be added to the reward.

        0                                          up to limit - buffer
        -penalty (n - (limit - buffer)) / buffer   inside the buffer
        -penalty                                   from limit on

    Args:
        length: [S] tokens of each completion.
        limit: the most tokens a completion may have.
        buffer: tokens before the limit in which the punishment grows; 1 to limit.
        penalty: the punishment at the limit, in units of reward.

    Returns:
        [S] f32, at most 0.

    Raises:
        ValueError: a buffer outside 1 to limit.

    Source: Yu 2025, arXiv:2503.14476, eq. 13.
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"buffer must be 1 to limit = {limit} tokens, got {buffer}; leave the punishment out for none")
    excess = (length - (limit - buffer)).clamp(0, buffer)
    return -penalty * (excess.double() / buffer).float()
