"""Optima: the minima of one problem at several l2, each solved from those that were found before.

Each weight is approximately a polynomial in log l2. A new l2 starts from the Lagrange polynomial through the NODES nearest
optima; one through distant optima would oscillate. A small l2 is reached through larger ones, which are solved loosely.

>>> optima = Optima(problem, make_solver(problem))
>>> optima.find([1e-2, 1e-3])
>>> weight, bias, objective = optima.found[1e-3]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from embedpipe.heads._problem import TOLERANCE, Float64, Problem, Solve

FIRST, LEAST = 1e-2, 1e-12  # the l2 from which smaller ones are reached, and down to which in steps
FAR, FACTOR, LOOSE_TOLERANCE = 13.0, 5.0, 0.1  # a step that is too large, the steps instead, and their tolerance
BATCH_LOGITS, MAX_BATCH = 48, 4  # columns of one matrix product, and l2, that are solved together
NODES = 4  # optima that a polynomial passes through
INSIDE, BEYOND = 9.0, 3.5  # their distance in log l2, except for the nearest one: between optima, and past the last one
SAME = 1e-6  # a distance in log l2 that is negligible

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
        while nearest / FAR > max(l2s[0], LEAST):
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
    nearest, *others = sorted(found, key=lambda value: abs(math.log(value / l2)))
    nodes, most = [nearest], INSIDE if min(found) < l2 < max(found) else BEYOND
    for value in others:
        is_new = all(abs(math.log(value / node)) > SAME for node in nodes)
        if is_new and len(nodes) < NODES and abs(math.log(value / l2)) <= most:
            nodes.append(value)
    distances = np.array([math.log(node / l2) for node in nodes])
    weight, bias = (np.zeros_like(part) for part in found[nodes[0]][:2])
    for number, node in enumerate(nodes):
        rest = np.delete(distances, number)
        share = np.prod(rest / (rest - distances[number]))  # of the Lagrange basis polynomial of the node
        weight += share * found[node][0]
        bias += share * found[node][1]
    return weight, bias
