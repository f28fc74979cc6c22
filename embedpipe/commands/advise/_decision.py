"""Choose one action from the evidence by a few fixed rules.

In this order:

1. `fix-leaks` if at least 1 % of the val and test images (lower end of the interval: one or two near copies may be chance) are
   copies of images in earlier splits: scores then do not estimate the accuracy on new images.
2. `fix-labels` if at least 3 % of the labels are wrong (lower end of the interval; 3.3 % is the average of ten popular test
   sets: Northcutt, Athalye, Mueller, NeurIPS 2021). This counts only if the heads agree on half of the images, and if doubling
   the images removes less than a fifth of the errors: heads with too little data make the same errors, but more data removes
   them; label noise stays.
3. The cheapest of `linear-head`, `earlier-layer`, `several-layers` and fine-tuning to which no costlier one is expected to add
   a point. An option counts only if the lower end of its interval is at least a point. Fine-tuning is `finetune-all` if even
   the best heads have an error rate of a quarter, else `finetune` from the first layer whose head is nearly as good as the
   best. If no head beats always predicting the largest class, fine-tuning is not expected to gain anything.
4. `more-data` if that leaves the linear head, its error rate is above 5 %, and doubling the images gains a point (lower end).

The gains of layers are measured. The fine-tuning gain is estimated from the errors of the head: REMOVED is the share of the
last layer's errors (low, middle, high) that fine-tuning removed on the data sets that the rules were developed on
(`benchmarks/README.md`, "Advice"): digits and animals on photographs, EfficientNet-Lite0. These are few, so the interval is
wide, and `--verify` measures the gain.

>>> [option.action for option in decide(evidence)]
['several-layers', 'finetune', 'finetune-all', 'more-data', 'linear-head']
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from embedpipe.commands.advise._measurement import Evidence, HeadEvidence, is_near
from embedpipe.evaluation import wilson_interval

LEAKED = 0.01
WRONG, AGREED, FLAT = 0.03, 1 / 2, 1 / 5
WORTH = 0.01  # one point of accuracy
ERRORS = 0.05
LARGE = 300  # training images
REMOVED = {"large": (0.25, 0.65, 0.9), "small, similar": (0.1, 0.45, 0.9), "small, different": (0.0, 0.2, 0.55)}
HARD = 0.25  # error rate of the best heads


@dataclass(frozen=True)
class Option:
    """An action, its expected gain over a head on the last layer, its cost, and the commands that carry it out.

    layers : tuple of str               that the head is fitted on, or the first layer that is unfrozen
    gain, ci95                          in accuracy; None where it cannot be estimated
    cost_minutes : float or None        None for manual work
    """

    action: str
    layers: tuple[str, ...]
    reason: str
    gain: float | None = None
    ci95: tuple[float, float] | None = None
    cost_minutes: float | None = None
    commands: tuple[str, ...] = ()

    @property
    def expected_gain(self) -> float | None:
        """In points of accuracy."""
        return None if self.gain is None else 100 * self.gain

    @property
    def expected_gain_ci95(self) -> list[float] | None:
        return None if self.ci95 is None else [100 * end for end in self.ci95]

    @property
    def is_worth_it(self) -> bool:
        return self.ci95 is not None and self.ci95[0] >= WORTH

    def to_dict(self) -> dict[str, Any]:
        names = ("action", "reason", "expected_gain", "expected_gain_ci95", "cost_minutes")
        layer = self.layers[0] if len(self.layers) == 1 else None
        lists = {"layers": list(self.layers), "layer": layer, "commands": list(self.commands)}
        return {name: getattr(self, name) for name in names} | lists


def decide(evidence: Evidence) -> list[Option]:
    """Return the options, the recommended one first."""
    reason = (
        f"a head on {evidence.last.layers[0]} has an accuracy of {evidence.last.accuracy:.1%}, and no costlier option is "
        "expected to gain a point"
    )
    if not evidence.beats_chance:
        reason = (
            f"no head is better than always predicting the largest class ({evidence.chance:.1%}), so there is no evidence that "
            "the labels can be learned from these images: inspect some of them first"
        )
    linear = Option("linear-head", evidence.last.layers, reason, 0.0, (0.0, 0.0), evidence.last.seconds / 60)
    earlier = _head_choice("earlier-layer", evidence.best, evidence)
    several = _head_choice("several-layers", evidence.several, evidence)
    modes = [linear, earlier, several, *_finetuning(evidence)]
    chosen = linear
    for mode in modes[1:4]:  # the cheapest first; the last one is the other kind of fine-tuning
        if mode.is_worth_it and (mode.gain or 0.0) >= (chosen.gain or 0.0) + WORTH:
            chosen = mode
    more = _more_data(evidence)
    if chosen is linear and 1 - evidence.last.accuracy > ERRORS and more.is_worth_it:
        chosen = more
    first = [*_fixes(evidence), chosen]
    rest = [option for option in (*modes, more) if option not in first]
    return [*first, *sorted(rest, key=lambda option: -(option.gain or 0.0))]


def first_unfrozen(evidence: Evidence) -> str:
    """Return the earliest layer whose head is nearly as good as the best; the layers before it can stay frozen."""
    *earlier, _ = evidence.layers
    near = [one.layers[0] for one in earlier if is_near(one.accuracy, evidence.best.accuracy, evidence.chance)]
    return near[0] if near else earlier[-1].layers[0]


def kind_of(evidence: Evidence) -> str:
    """Return whether the data are large, or small and similar to the pretraining data: no earlier layer is better."""
    if evidence.n_train >= LARGE:
        return "large"
    return "small, different" if evidence.best.difference.ci95[0] > 0 else "small, similar"


def _fixes(evidence: Evidence) -> list[Option]:
    leaked, wrong = evidence.leaked, evidence.wrong_labels
    fixes = []
    if leaked.ci95[0] >= LEAKED:
        reason = (
            f"{len(leaked.paths)} of {leaked.n} images of val and test ({leaked.share:.1%}) are also in an earlier split, so "
            "scores do not estimate the accuracy on new images"
        )
        fixes.append(Option("fix-leaks", (), reason))
    before = 1 - evidence.last.accuracy + evidence.slope.gain  # error rate with half of the images
    learns = evidence.slope.gain >= FLAT * before
    if wrong.ci95[0] >= WRONG and wrong.n >= AGREED * evidence.n_judged and not learns:
        reason = f"{len(wrong.paths)} of the {wrong.n} images on which all heads and the nearest neighbours agree"
        fixes.append(Option("fix-labels", (), f"{reason} ({wrong.share:.1%}) have another label"))
    return fixes


def _head_choice(action: str, head: HeadEvidence, evidence: Evidence) -> Option:
    reason = (
        f"a head on {' + '.join(head.layers)} has an accuracy of {head.accuracy:.1%}, a head on "
        f"{evidence.last.layers[0]} {evidence.last.accuracy:.1%}"
    )
    return Option(action, head.layers, reason, **vars(head.difference), cost_minutes=head.seconds / 60)


def _finetuning(evidence: Evidence) -> list[Option]:
    """Return both kinds of fine-tuning, the suitable one first."""
    n, errors = evidence.n_judged, 1 - evidence.last.accuracy
    least = 1 - max(evidence.best.accuracy, evidence.several.accuracy)
    kind = kind_of(evidence)
    low, middle, high = REMOVED[kind] if evidence.beats_chance else (0.0, 0.0, REMOVED[kind][2])
    fewest, most = wilson_interval(round(errors * n), n)
    gain, interval = middle * errors, (low * fewest, high * most)
    reason = (
        f"the head on {evidence.last.layers[0]} has an error rate of {errors:.1%}, the best head {least:.1%}; on similar data "
        f"({kind}: {evidence.n_train} training images) fine-tuning removed {low:.0%} to {high:.0%} of the errors"
    )
    everything = Option("finetune-all", (), reason, gain, interval)
    if len(evidence.layers) == 1:  # a model whose layers have no names
        return [everything]
    layer = first_unfrozen(evidence)
    later = Option(
        "finetune", (layer,), f"{reason}; heads on {layer} and later are nearly as good as the best", gain, interval
    )
    return [everything, later] if least >= HARD else [later, everything]


def _more_data(evidence: Evidence) -> Option:
    sizes = list(evidence.curve)
    reason = (
        f"a head fitted on {sizes[-1]} images has an accuracy of {evidence.curve[sizes[-1]]:.1%}, on {sizes[-2]} images "
        f"{evidence.curve[sizes[-2]]:.1%}: doubling the images again is expected to gain less than this difference"
    )
    # each doubling gains less than the one before; half of that is a cautious estimate
    gain, (low, high) = evidence.slope.gain, evidence.slope.ci95
    return Option("more-data", (), reason, gain / 2, (low / 2, high))
