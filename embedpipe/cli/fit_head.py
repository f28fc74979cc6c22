"""embedpipe fit-head [DATASET]"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import rich_click as click

from embedpipe.cli._build import Session, command, format_scores, format_worst_classes
from embedpipe.commands import fit_head as fitting


@command(fitting.fit_head, example="embedpipe fit-head --layer all --folds 5")
@click.argument("dataset", required=False)
def fit_head(session: Session, dataset: str | None, **options: Any) -> None:
    report = fitting.fit_head(dataset, **options).report
    parts = [format_ranking(report["ranking"])] if "ranking" in report else []
    parts += [format_blocks(report["blocks"], report["decision"])] if "blocks" in report else []
    parts += [
        format_title(report),
        format_scores(report["metrics"], report["chosen_on"]),
        format_worst_classes(report["worst_classes"]),
    ]
    parts += [format_curve(report["curve"])] if "curve" in report else []
    parts += [format_folds(report["folds"])] if "folds" in report else []
    session.finish(report, "\n".join(part for part in parts if part).rstrip())


def format_title(report: Mapping[str, Any]) -> str:
    """Return the run, how its head was fitted and selected, and the time."""
    l2 = "" if report["l2"] is None else f", l2 {report['l2']:.3g}"
    calibrated = " calibrated" if (report["calibration"] or {}).get("applied") else ""
    fitted = f"{report['solver']}{l2}, {report['n_train']} training images, {report['seconds']:.1f} s"
    lines = [f"run {report['run']}: {fitted}{calibrated}"]
    if selection := report["selection"]:
        on = (
            "each training image left out"
            if selection["on"] == "train"
            else f"{selection['n']} images of {selection['on']}"
        )
        near = selection["nearly_as_good"]
        flat = f"; l2 from {near[0]:.1g} to {near[1]:.1g} is at most 1 % worse" if near and near[0] < near[1] else ""
        lines.append(f"selected by {selection['by']}, {on}{flat}")
    if views := report["views"]:
        used = "used" if views["used"] else "not used"
        losses = [views["val_log_loss"], views["val_log_loss_without"]]
        scores = "" if losses[0] is None else f": log loss held out {losses[0]:.4f} with them, {losses[1]:.4f} without"
        lines.append(f"{views['count']} views of each training image ({views['augment']}) are {used}{scores}")
    return "\n".join(lines)


def format_ranking(ranking: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the scores of each space on held-out images, the best first."""
    lines = [
        f"{'layer':<24} {'pool':<5} {'dim':>5} {'l2':>9} {'val accuracy':>12} {'log loss':>9}  "
        f"{'to the best, 95 % interval':<28} backbone"
    ]
    for one in ranking:
        difference = "chosen" if one["chosen"] else _loss_difference(one)
        lines.append(
            f"{one['layer']:<24} {one['pool']:<5} {one['dim']:>5} {one['l2']:>9.3g} {one['val_accuracy']:>12.4f} "
            f"{one['val_log_loss']:>9.4f}  {difference:<28} {one['backbone']}"
        )
    return "\n".join([*lines, ""])


def _loss_difference(one: Mapping[str, Any]) -> str:
    low, high = one["loss_difference_ci95"]
    return f"{one['loss_difference']:+.4f} ({low:+.4f} to {high:+.4f})"


def format_blocks(blocks: Sequence[Mapping[str, Any]], decision: Mapping[str, Any]) -> str:
    """Return a table of the requested spaces, and which of them the head uses."""
    lines = [f"{'layer':<24} {'dim':>5} {'accuracy':>8} {'log loss alone':>14}  {'scale':>8}  backbone"]
    for one in blocks:
        scale = "not used" if not one["chosen"] else "" if one["scale"] is None else f"{one['scale']:.3f}"
        alone = f"{one['val_accuracy']:>8.4f} {one['val_log_loss']:>14.4f}"
        lines.append(f"{one['layer']:<24} {one['dim']:>5} {alone}  {scale:>8}  {one['backbone']}")
    several, last = decision["blocks"], decision["last"]
    used = " + ".join(decision[decision["chosen"]]["layers"])
    together = f"{' + '.join(several['layers'])} {several['val_log_loss']:.4f}"
    difference = f"difference {_loss_difference(decision)}"
    lines.append(
        f"log loss held out: {together}, {last['layers'][0]} {last['val_log_loss']:.4f}, {difference}; used: {used}"
    )
    return "\n".join([*lines, ""])


def format_curve(curve: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of mean accuracies, with a row per number of images and a column per split."""
    splits = list(curve[0]["metrics"])
    lines = [f"\n{'shots':<6} {'n':>6} {'repeats':>7}" + "".join(f"  {split:<24}" for split in splits)]
    for point in curve:
        cells = "".join(f"  {_mean(point['metrics'][split]):<24}" for split in splits)
        lines.append(f"{point['shots']:<6} {point['n_train']:>6} {point['repeats']:>7}{cells}")
    return "\n".join(line.rstrip() for line in lines)


def _mean(metrics: Mapping[str, Any]) -> str:
    interval = metrics["accuracy_ci95"]
    return f"{metrics['accuracy']:.4f}" + (f" ({interval[0]:.4f} - {interval[1]:.4f})" if interval else "")


def format_folds(folds: Mapping[str, Any]) -> str:
    """Return the accuracy over all folds and of each."""
    each = ", ".join(f"{fold['accuracy']:.4f}" for fold in folds["per_fold"])
    return f"\n{folds['k']} folds over train and val, {folds['n']} images: accuracy {_mean(folds)}; each {each}"
