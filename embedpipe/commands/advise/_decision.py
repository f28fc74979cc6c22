"""From evidence to one action: few plain rules, no learned ones.

In this order:

1. `fix-leaks` where at least 1 % of val and test (lower end of the interval: a near copy or two may be chance) are copies of
   earlier splits: what is measured then is not what new images get.
2. `fix-labels` where at least 3 % of the labels are wrong (lower end of the interval; 3.3 % is the average of ten popular test
   sets: Northcutt, Athalye, Mueller, NeurIPS 2021). That is believed only where heads agree on half of the images, and where
   twice the images remove less than a fifth of the errors: heads that know little err together, but they learn; noise stays.
3. The cheapest of `linear-head`, `earlier-layer`, `several-layers` and fine-tuning to which no dearer one is expected to add a
   point. One with a lower end of its interval below a point does not count. Fine-tuning is `finetune-all` where even the best
   heads err on a quarter of the images, else `finetune` from the first layer whose head is nearly as good as the best.
   Where no head beats always naming the largest class, fine-tuning is not expected to add anything: it may, but nothing shows it.
4. `more-data` where that leaves the linear head, it errs on more than 5 %, and twice the images are worth a point (lower end).

Gains of layers are measured. The gain of fine-tuning cannot be known without doing it: REMOVED says which share of the
last layer's errors (low, middle, high) it took away on the data sets that the rules were written with (`benchmarks/README.md`,
"Advice"): digits and animals on photographs, EfficientNet-Lite0. A thin base: the interval is wide, and `--verify` tries it.

>>> [choice.action for choice in decide(evidence)]
['several-layers', 'finetune', 'finetune-all', 'more-data', 'linear-head']
"""

from __future__ import annotations

from dataclasses import dataclass

from embedpipe.commands.advise._measurement import Evidence, HeadEvidence, is_near
from embedpipe.evaluation import wilson_interval

LEAKED = 0.01
WRONG, AGREED, FLAT = 0.03, 1 / 2, 1 / 5
WORTH = 0.01  # one point
ERRORS = 0.05
LARGE = 300  # training images
REMOVED = {"large": (0.25, 0.65, 0.9), "small, similar": (0.1, 0.45, 0.9), "small, different": (0.0, 0.2, 0.55)}
HARD = 0.25  # errors of the best heads


@dataclass(frozen=True)
class Choice:
    """An action, the layers that it is about, and what it is expected to add to the accuracy of a head on the last layer."""

    action: str
    layers: tuple[str, ...]
    reason: str
    gain: float | None = None
    ci95: tuple[float, float] | None = None

    @property
    def is_worth_it(self) -> bool:
        return self.ci95 is not None and self.ci95[0] >= WORTH


def decide(evidence: Evidence) -> list[Choice]:
    """Return the choices, the advised one first."""
    reason = (
        f"a head on {evidence.last.layers[0]} is right on {evidence.last.accuracy:.1%} of the images, and nothing dearer is "
        "expected to add a point"
    )
    if not evidence.beats_chance:
        reason = (
            f"no head is right more often than always naming the largest class ({evidence.chance:.1%}), so nothing shows that "
            "these labels can be learnt from these images: look at some of them first"
        )
    linear = Choice("linear-head", evidence.last.layers, reason, 0.0, (0.0, 0.0))
    earlier = _head_choice("earlier-layer", evidence.best, evidence)
    several = _head_choice("several-layers", evidence.several, evidence)
    modes = [linear, earlier, several, *_finetuning(evidence)]
    chosen = linear
    for one in modes[1:4]:  # the cheapest first; the last one is the other way to fine-tune
        if one.is_worth_it and (one.gain or 0.0) >= (chosen.gain or 0.0) + WORTH:
            chosen = one
    more = _more_data(evidence)
    if chosen is linear and 1 - evidence.last.accuracy > ERRORS and more.is_worth_it:
        chosen = more
    first = [*_fixes(evidence), chosen]
    rest = sorted((one for one in (*modes, more) if one not in first), key=lambda one: -(one.gain or 0.0))
    return [*first, *rest]


def first_unfrozen(evidence: Evidence) -> str:
    """Return the earliest layer whose head is nearly as good as the best: what is before it may stay as it is."""
    *earlier, _ = evidence.layers
    near = [one.layers[0] for one in earlier if is_near(one.accuracy, evidence.best.accuracy, evidence.chance)]
    return near[0] if near else earlier[-1].layers[0]


def kind_of(evidence: Evidence) -> str:
    """Return how much data there is, and, of few, whether they are like what the backbone knows: no earlier layer does better."""
    if evidence.n_train >= LARGE:
        return "large"
    return "small, different" if evidence.best.difference.ci95[0] > 0 else "small, similar"


def _fixes(evidence: Evidence) -> list[Choice]:
    leaked, wrong = evidence.leaked, evidence.wrong_labels
    fixes = []
    if leaked.ci95[0] >= LEAKED:
        reason = (
            f"{len(leaked.paths)} of {leaked.n} images of val and test ({leaked.share:.1%}) are in an earlier split too"
        )
        fixes.append(Choice("fix-leaks", (), f"{reason}, so no score says what new images get"))
    before = 1 - evidence.last.accuracy + evidence.slope.gain  # errors with half of the images
    learns = evidence.slope.gain >= FLAT * before
    if wrong.ci95[0] >= WRONG and wrong.n >= AGREED * evidence.n_judged and not learns:
        reason = f"{len(wrong.paths)} of the {wrong.n} images that all heads and their neighbours agree on ({wrong.share:.1%})"
        fixes.append(Choice("fix-labels", (), f"{reason} are labelled otherwise"))
    return fixes


def _head_choice(action: str, head: HeadEvidence, evidence: Evidence) -> Choice:
    reason = (
        f"a head on {' + '.join(head.layers)} is right on {head.accuracy:.1%} of the images, one on "
        f"{evidence.last.layers[0]} on {evidence.last.accuracy:.1%}"
    )
    return Choice(action, head.layers, reason, head.difference.gain, head.difference.ci95)


def _finetuning(evidence: Evidence) -> list[Choice]:
    """Return the two ways, the one that fits first."""
    n, errors = evidence.n_judged, 1 - evidence.last.accuracy
    least = 1 - max(evidence.best.accuracy, evidence.several.accuracy)
    kind = kind_of(evidence)
    low, middle, high = REMOVED[kind] if evidence.beats_chance else (0.0, 0.0, REMOVED[kind][2])
    fewest, most = wilson_interval(round(errors * n), n)
    gain, interval = middle * errors, (low * fewest, high * most)
    reason = (
        f"the head on {evidence.last.layers[0]} errs on {errors:.1%} of the images, the best heads on {least:.1%}; of "
        f"such data ({kind}: {evidence.n_train} training images) fine-tuning took away {low:.0%} to {high:.0%} of the errors"
    )
    everything = Choice("finetune-all", (), reason, gain, interval)
    if len(evidence.layers) == 1:  # a model whose layers have no names
        return [everything]
    layer = first_unfrozen(evidence)
    later = Choice("finetune", (layer,), f"{reason}; heads are nearly at their best from {layer} on", gain, interval)
    return [everything, later] if least >= HARD else [later, everything]


def _more_data(evidence: Evidence) -> Choice:
    sizes = list(evidence.curve)
    reason = (
        f"a head on {sizes[-1]} images is right on {evidence.curve[sizes[-1]]:.1%}, one on {sizes[-2]} on "
        f"{evidence.curve[sizes[-2]]:.1%}: twice the images should add less than that again"
    )
    # each doubling adds less than the last one: half of it is a cautious guess
    gain, (low, high) = evidence.slope.gain, evidence.slope.ci95
    return Choice("more-data", (), reason, gain / 2, (low / 2, high))
