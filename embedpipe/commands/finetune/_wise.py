"""WiSE-FT: mixtures of the weights before and after fine-tuning, scored on val.

Source: Wortsman et al., CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from embedpipe.training import Score

ALPHAS = tuple(k / 10 for k in range(11))


def sweep(
    network: nn.Module, before: Mapping[str, Tensor], validate: Callable[[], Score], *, keep_best: bool
) -> dict[str, Any]:
    """Score (1 - alpha) * before + alpha * after for each alpha, and leave the best, else alpha 1, in the network.

    Returns
    -------
    dict    sweep: [{alpha, val_loss, val_accuracy}]; chosen: alpha
    """
    state = network.state_dict()
    after = {name: state[name].clone() for name in before}

    def mix(alpha: float) -> None:
        for name, start in before.items():
            counter = after[name] if alpha else start
            state[name].copy_(start.lerp(after[name], alpha) if start.is_floating_point() else counter)

    scores = {}
    for alpha in ALPHAS:
        mix(alpha)
        scores[alpha] = validate()
    chosen = max(ALPHAS, key=lambda alpha: scores[alpha].rank) if keep_best else 1.0
    mix(chosen)
    told = [{"alpha": alpha, "val_loss": one.loss, "val_accuracy": one.accuracy} for alpha, one in scores.items()]
    return {"sweep": told, "chosen": chosen}
