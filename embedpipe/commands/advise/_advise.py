"""The deed: measure what the data say, decide, price it, and try it if asked."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedpipe.errors import UsageError
from embedpipe.storage import PathLike

if TYPE_CHECKING:
    from embedpipe.commands.advise._decision import Choice
    from embedpipe.commands.advise._measurement import Evidence
    from embedpipe.features import FeatureSet
    from embedpipe.inference import Progress

NOTE = "all decisions are taken on train and val; test is only searched for copies"
NOTE_VERIFIED = "all decisions are taken on train and val; test, where there is one, was scored by --verify alone"
NOTE_COST = (
    "minutes: of heads, as measured here; of fine-tuning, from timed training steps on the CPU, decoding left out; "
    "what stays frozen counts once where the model can be cut before what is unfrozen"
)


@dataclass(frozen=True)
class Option:
    """An action with what it is expected to add (points of accuracy), what it costs, and the commands that do it.

    layers : tuple of str                      that the head is fitted on, or the one that is unfrozen with all after it
    expected_gain, expected_gain_ci95          against a head on the last layer; None where it cannot be told
    cost_minutes : float or None               None for people's work
    """

    action: str
    layers: tuple[str, ...]
    reason: str
    expected_gain: float | None
    expected_gain_ci95: list[float] | None
    cost_minutes: float | None
    commands: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        alone = self.layers[0] if len(self.layers) == 1 else None
        return {**vars(self), "layers": list(self.layers), "layer": alone, "commands": list(self.commands)}


@dataclass(frozen=True)
class Advice:
    """The option to take, the evidence for it, the other options, and what came of trying them."""

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
            "evidence": self.evidence.to_dict(),
            "alternatives": [one.to_dict() for one in self.alternatives],
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
    """Measure how much data there is and how like it is to what the backbone knows, and name one action.

    Wrong labels and copies of val and test in train are looked for first. Layers that are not cached are extracted.

    Parameters
    ----------
    dataset : FeatureSet, or name, id or path of a data set
        Default: the data set extracted last.
    verify : bool
        Also do it, and what it was preferred to, and compare them on test (on val where there is none).
    epochs : int
        Passes over the train split, of each fine-tuning that is priced or tried.
    space : str
        Judge the model of this space, when there are several: its folder's name or a prefix.
    backbone : str
        Judge this backbone.

    Raises
    ------
    UsageError           nothing extracted, no labels, fewer than two classes, no validation samples
    NonFiniteFeatures    NaN or inf in the features
    """
    from embedpipe.cache import Cache
    from embedpipe.commands.advise._decision import decide
    from embedpipe.commands.advise._measurement import measure
    from embedpipe.commands.advise._preparation import open_layers
    from embedpipe.commands.advise._verification import Budget
    from embedpipe.commands.advise._verification import verify as try_out
    from embedpipe.features import FeatureSet
    from embedpipe.runs import new_run

    if epochs < 1:
        raise UsageError(f"--epochs {epochs}, expected 1 or more")
    cache, asked = Cache(Path(cache_dir)), {"space": space, "backbone": backbone}
    given = dataset.backbone if isinstance(dataset, FeatureSet) else None
    if isinstance(dataset, FeatureSet):
        cache, asked = Cache(dataset.space.folder.parent.parent), {**asked, "space": space or dataset.space.folder.name}
        dataset = dataset.dataset
    features = replace(open_layers(cache, dataset, **asked, progress=progress), backbone=given)
    evidence = measure(features, seed=seed)
    choices = decide(evidence)
    chosen, *others = (_option(one, features, evidence, cache, Path(runs_dir), epochs) for one in choices)
    budget = Budget(epochs, cache.root, Path(runs_dir), seed, progress)
    tried = try_out(choices, features, evidence, budget) if verify else None
    spec = features.space.spec
    with new_run(Path(runs_dir), "advise") as run:
        model = f"{spec['source']}:{spec['architecture']}"
        advice = Advice(run.final.name, features.dataset, model, chosen, evidence, tuple(others), tried)
        run.write_json("advice.json", advice.to_dict())
        run.write_json("run.json", {"verb": "advise", "dataset": features.dataset, "report": advice.to_dict()})
    return advice


def _option(
    choice: Choice, features: FeatureSet, evidence: Evidence, cache: Any, runs_dir: Path, epochs: int
) -> Option:
    gain = None if choice.gain is None else 100 * choice.gain
    interval = None if choice.ci95 is None else [100 * end for end in choice.ci95]
    cost = _minutes(choice, features, evidence, epochs)
    words = _words(choice, features, evidence, cache, runs_dir, epochs)
    commands = tuple(shlex.join(["embedpipe", *line]) for line in words)
    return Option(choice.action, choice.layers, choice.reason, gain, interval, cost, commands)


def _minutes(choice: Choice, features: FeatureSet, evidence: Evidence, epochs: int) -> float | None:
    """Return what an action costs on this machine: as measured for heads, from timed steps for fine-tuning."""
    from embedpipe.classifier import Reference
    from embedpipe.commands.advise._cost import measure_pace

    fits = {"linear-head": evidence.last, "earlier-layer": evidence.best, "several-layers": evidence.several}
    if choice.action in fits:
        return fits[choice.action].seconds / 60
    if not choice.action.startswith("finetune"):
        return None
    backbone = features.backbone or Reference.of(features.spaces[-1:]).load()
    pace = measure_pace(backbone, choice.layers or ("all",))
    return pace.minutes(n_train=evidence.n_train, n_val=evidence.n_val, epochs=epochs)


def _words(
    choice: Choice, features: FeatureSet, evidence: Evidence, cache: Any, runs_dir: Path, epochs: int
) -> list[list[str]]:
    """Return the arguments of each command that an action takes."""
    from embedpipe.commands.advise._verification import training_options

    kept = _flags("cache", cache.root)
    places = [*kept, *_flags("runs", runs_dir)]
    data = [features.dataset, *places]
    last = _which(features, evidence.last.layers, cache)
    extract = ["extract", *(source.absolute for source in features.manifest.sources), *_loader_flags(features)]
    again = [[*extract, *kept], ["advise", *data]]
    if choice.action == "more-data":
        return again
    if choice.action.startswith("fix-"):
        return [["audit", *data, *last], *again]  # which lists them; the rest is done by hand
    if not choice.action.startswith("finetune"):
        return [["fit-head", *data, *_which(features, choice.layers, cache)]]
    options = ["--unfreeze", *(choice.layers or ("all",)), "--epochs", str(epochs)]
    trained = training_options(choice, evidence.n_train).items()
    options += [word for k, v in trained for word in (f"--{k.replace('_', '-')}", str(v))]
    options += places
    return [["fit-head", *data, *last], ["finetune", *options]]


def _which(features: FeatureSet, layers: tuple[str, ...], cache: Any) -> list[str]:
    """Return --backbone and --layer, or --space where these would not tell the spaces from others in the cache."""
    from embedpipe.commands.advise._preparation import is_sibling
    from embedpipe.features import feature_spaces

    def name(space: Any) -> str:
        return f"{space.spec['source']}:{space.spec['architecture']}"

    mine = features.space
    if any(name(one) == name(mine) and not is_sibling(one, mine) for one in feature_spaces(cache)):
        chosen = [space.folder.name for space in features.spaces if space.spec["layer"] in layers]
        return [word for folder in chosen for word in ("--space", folder)]
    return ["--backbone", name(mine), *(word for layer in layers for word in ("--layer", layer))]


def _loader_flags(features: FeatureSet) -> list[str]:
    """Return the options of `extract` that were not left at their defaults."""
    options = {k: v for k, v in features.loader.items() if v is not None and k not in ("layer", "name", "pixels")}
    usual = {"weights": "pretrained", "pool": "auto", "seed": 0}
    given = {"backbone": features.loader.get("name"), **{k: v for k, v in options.items() if v != usual.get(k)}}
    return [word for k, v in given.items() if v for word in (f"--{k.replace('_', '-')}", str(v))]


def _flags(kind: str, folder: Path) -> list[str]:
    return [] if str(folder) == kind else [f"--{kind}-dir", str(folder)]
