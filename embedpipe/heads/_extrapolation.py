"""Starting points: the optimum at a new l2, extrapolated from optima at other l2.

Each weight is approximately a polynomial in log l2. The starting point is the Lagrange polynomial through the optima around the
new l2: as many on each side, at most MAX_SIDE; beyond the last one, through the last MAX_BEYOND. Optima that are far away are
left out, because a polynomial through them would oscillate.

>>> W, b = extrapolate(5e-3, {1e-2: (W1, b1), 1e-3: (W2, b2)})
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

SAME = 1e-6  # a distance in log l2 that is negligible
MAX_DISTANCE = 3.5  # in log l2, except for the nearest optima
MAX_SIDE, MAX_BEYOND = 4, 3


def extrapolate(l2: float, optima: Mapping[float, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return a starting point for l2: weights (1, K, D) and biases (1, K).

    Parameters
    ----------
    l2 : float
    optima : mapping of l2 to W (K, D) and b (K,)    at least one
    """
    nodes = _choose_nodes(l2, sorted(optima, reverse=True))
    distances = np.array([math.log(node / l2) for node in nodes])
    others = [np.delete(distances, index) for index in range(len(nodes))]
    # the value at l2 of the Lagrange basis polynomial of each node
    share = torch.tensor([np.prod(other / (other - own)) for own, other in zip(distances, others, strict=True)])
    return tuple(
        torch.tensordot(share, torch.stack(part), 1)[None] for part in zip(*map(optima.get, nodes), strict=True)
    )


def _choose_nodes(l2: float, falling: list[float]) -> list[float]:
    """Return the l2 that the polynomial passes through."""
    distinct = [falling[0]]
    for value in falling:
        if abs(math.log(value / l2)) <= SAME:
            return [value]
        if math.log(distinct[-1] / value) > SAME:
            distinct.append(value)
    above, below = [value for value in distinct if value > l2], [value for value in distinct if value < l2]
    side = min(len(above), len(below), MAX_SIDE - 1) + 1
    inside = bool(above and below)
    nodes = [*above[-side:], *below[:side]] if inside else [*above[-MAX_BEYOND:], *below[:1]]
    nearest = [*above[-2:], *below[:2]] if inside else [*above[-1:], *below[:1]]
    return [node for node in nodes if node in nearest or abs(math.log(node / l2)) <= MAX_DISTANCE]
