"""Optima: the minima of one problem at several l2, each solved from those that were found before.

Each weight is approximately a polynomial in log l2. A new l2 starts from the Lagrange polynomial through the optima around it: as
many on each side, at most MAX_SIDE; beyond the last one, through the last MAX_BEYOND. Optima that are far away are left out,
because a polynomial through them would oscillate. A small l2 is reached through larger ones, which are solved loosely.

>>> optima = Optima(problem, make_solver(problem))
>>> optima.find([1e-2, 1e-3])
>>> weight, bias, objective = optima.found[1e-3]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from embedpipe.heads._problem import TOLERANCE, Float64, Problem, Solve

FIRST = 1e-2  # the l2 from which smaller ones are reached
FAR, FACTOR, LOOSE_TOLERANCE = 13.0, 5.0, 0.1  # a step that is too large, the steps instead, and their tolerance
BATCH_LOGITS, MAX_BATCH = 48, 4  # columns of one matrix product, and l2, that are solved together
SAME = 1e-6  # a distance in log l2 that is negligible
MAX_DISTANCE = 3.5  # in log l2, except for the nearest optima
MAX_SIDE, MAX_BEYOND = 4, 3

Found = tuple[Float64, Float64, float]  # weight (K, D), bias (K,), objective


class Optima:
    """Solutions of one problem.

    Parameters
    ----------
    problem : Problem
    solve : Solve       a solver of it; None if all that is needed is found already

    Attributes
    ----------
    batch : int         l2 that are solved together: few classes alone make narrow matrix products
    found : dict of l2 to (weight (K, D), bias (K,), objective)
    """

    def __init__(self, problem: Problem, solve: Solve | None) -> None:
        self.problem, self._solve = problem, solve
        self.batch = min(MAX_BATCH, max(1, BATCH_LOGITS // problem.n_logits))
        self.found: dict[float, Found] = {}

    def find(self, l2s: Sequence[float], tolerance: float = TOLERANCE) -> None:
        """Solve for every l2, in falling order."""
        if self._solve is None:
            return
        nearest = min((l2 for l2 in self.found if l2 >= l2s[0]), default=FIRST)
        while nearest / FAR > l2s[0]:
            nearest /= FACTOR
            self._find([nearest], LOOSE_TOLERANCE)
        for first in range(0, len(l2s), self.batch):
            self._find(l2s[first : first + self.batch], tolerance)

    def _find(self, l2s: Sequence[float], tolerance: float) -> None:
        assert self._solve
        weight, bias = self.problem.start
        starts = [extrapolate(l2, self.found) if self.found else (weight, bias) for l2 in l2s]
        weights, biases = (np.stack(parts) for parts in zip(*starts, strict=True))
        weights, biases, objectives = self._solve(l2s, weights, biases, tolerance)
        self.found |= zip(l2s, zip(weights, biases, objectives.tolist(), strict=True), strict=True)


def extrapolate(l2: float, found: Mapping[float, Found]) -> tuple[Float64, Float64]:
    """Return a starting point for l2, weight (K, D) and bias (K,), from at least one optimum at other l2."""
    nodes = _choose_nodes(l2, sorted(found, reverse=True))
    distances = np.array([math.log(node / l2) for node in nodes])
    others = [np.delete(distances, index) for index in range(len(nodes))]
    # the value at l2 of the Lagrange basis polynomial of each node
    shares = [float(np.prod(other / (other - own))) for own, other in zip(distances, others, strict=True)]
    weight, bias = (
        sum(share * found[node][part] for share, node in zip(shares, nodes, strict=True)) for part in (0, 1)
    )
    return np.asarray(weight), np.asarray(bias)


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
