"""Search: the value of a grid with the lowest loss, found with few fits.

The loss is nearly unimodal in log l2, and a small l2 costs most. The search therefore starts at the largest l2, takes large steps
down until the loss rises, and then descends from the best value with smaller steps. It ends at a value whose neighbours on the
grid are worse.

>>> losses = search(evaluate, sorted(L2_GRID, reverse=True))
>>> min(losses, key=losses.get)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

STRIDES = (6, 3, 1)
RISE = 1.1  # a loss that exceeds the lowest one by this factor ends the steps down, as do two rises in a row


def search(
    evaluate: Callable[[Sequence[float]], Sequence[float]], falling: Sequence[float], *, at_once: int = 1
) -> dict[float, float]:
    """Return the losses of the values that were tried.

    Parameters
    ----------
    evaluate : values -> losses    called with some values in falling order
    falling : sequence of float    the grid
    at_once : int                  steps down that are evaluated together
    """
    losses: dict[int, float] = {}

    def try_all(indices: Sequence[int]) -> bool:
        """Evaluate what is new; return whether anything was."""
        new = [index for index in indices if 0 <= index < len(falling) and index not in losses]
        losses.update(zip(new, evaluate([falling[index] for index in new]), strict=True) if new else ())
        return bool(new)

    def best() -> int:
        return min(losses, key=lambda index: (losses[index], index))

    steps = range(0, len(falling), STRIDES[0])
    for first in range(0, len(steps), at_once):
        try_all(steps[first : first + at_once])
        if _rises(list(losses.values())):
            break
    for stride in STRIDES[1:]:
        while try_all([best() - stride, best() + stride]):
            pass
    return {falling[index]: losses[index] for index in sorted(losses)}


def _rises(losses: Sequence[float]) -> bool:
    """Return whether the last losses are past the minimum."""
    return losses[-1] > RISE * min(losses) or (len(losses) > 2 and losses[-1] > losses[-2] > losses[-3])
