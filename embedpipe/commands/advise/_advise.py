"""The command `advise`: measure the data, decide, estimate costs, and on request try the options."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedpipe.errors import UsageError
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    from embedpipe.commands.advise._decision import Option
    from embedpipe.commands.advise._measurement import Evidence
    from embedpipe.features import FeatureSet
    from embedpipe.inference import Progress

NOTE = "all decisions use train and val; test is only searched for copies"
NOTE_VERIFIED = "all decisions use train and val; test, if there is one, was scored only by --verify"
NOTE_COST = (
    "minutes: for heads as measured here; for fine-tuning estimated from timed training steps on the CPU, without "
    "decoding; frozen layers count once where the model can be cut before the first unfrozen layer"
)


@dataclass(frozen=True)
class Advice:
    """The recommended option, the evidence for it, the other options, and the result of trying them."""

    run: str
    dataset: str
    backbone: str
    chosen: Option
    evidence: Evidence
    alternatives: tuple[Option, ...]
    verify: dict[str, Any] | None = None

    @property
    def action(self) -> str:
        return self.chosen.action

    @property
    def commands(self) -> tuple[str, ...]:
        return self.chosen.commands

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "dataset": self.dataset,
            "backbone": self.backbone,
            **self.chosen.to_dict(),
            "evidence": asdict(self.evidence),
            "alternatives": [option.to_dict() for option in self.alternatives],
            "notes": [NOTE_VERIFIED if self.verify else NOTE, NOTE_COST],
            "verify": self.verify,
        }


def advise(
    dataset: FeatureSet | str | None = None,
    *,
    verify: bool = False,
    epochs: int = 10,
    space: str | None = None,
    backbone: str | None = None,
    cache_dir: PathLike = "cache",
    runs_dir: PathLike = "runs",
    seed: int = 0,
    progress: Progress | None = None,
) -> Advice:
    """Measure how large a data set is and how similar to what the backbone was trained on, and recommend one action.

    Wrong labels, and copies of val and test images in train, are searched first. Layers that are not cached are extracted.

    Parameters
    ----------
    dataset : FeatureSet, or name, id or path of a data set
        Default: the data set extracted last.
    verify : bool
        Also run the recommended option and the alternatives, and compare them on test (on val where there is no test).
    epochs : int
        Passes over the train split of each fine-tuning that is estimated or run.
    space : str
        Use the model of this space, if there are several: its folder's name or a prefix.
    backbone : str
        Use this backbone.

    Raises
    ------
    UsageError           nothing extracted, no labels, fewer than two classes, no validation samples
    NonFiniteFeatures    NaN or inf in the features
    """
    from embedpipe.cache import Cache
    from embedpipe.classifier import Reference
    from embedpipe.commands.advise._actions import format_commands, verify_advice
    from embedpipe.commands.advise._cost import estimate_minutes
    from embedpipe.commands.advise._decision import decide
    from embedpipe.commands.advise._measurement import measure
    from embedpipe.commands.advise._preparation import open_layers
    from embedpipe.features import FeatureSet, open_features
    from embedpipe.runs import new_run

    if epochs < 1:
        raise UsageError(f"--epochs {epochs}, expected 1 or more")
    if isinstance(dataset, FeatureSet):
        features = dataset.reopened(space=space or dataset.space.folder.name, backbone=backbone)
    else:
        features = open_features(Cache(Path(cache_dir)), dataset, space=space, backbone=backbone)
    features, runs = open_layers(features, progress), Path(runs_dir)
    evidence = measure(features, seed=seed)
    options = tuple(
        replace(
            option,
            cost_minutes=estimate_minutes(option, features, evidence, epochs),
            commands=format_commands(option, features, evidence, epochs, runs),
        )
        for option in decide(evidence)
    )
    result = None
    if verify:
        result = verify_advice(options, features, evidence, epochs=epochs, runs_dir=runs, seed=seed, progress=progress)
    name = Reference.of([features.space]).name
    with new_run(runs, "advise") as run:
        advice = Advice(run.final.name, features.dataset, name, options[0], evidence, options[1:], result)
        run.write_json("advice.json", advice.to_dict())
        run.write_json("run.json", {"verb": "advise", "dataset": features.dataset, "report": advice.to_dict()})
    return advice
