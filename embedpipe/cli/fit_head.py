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
    """Return the run, how its head was fitted, and the time."""
    l2 = "" if report["l2"] is None else f", l2 {report['l2']:.3g}"
    calibrated = " calibrated" if (report["calibration"] or {}).get("applied") else ""
    fitted = f"{report['solver']}{l2}, {report['n_train']} training images, {report['seconds']:.1f} s"
    return f"run {report['run']}: {fitted}{calibrated}"


def format_ranking(ranking: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the scores of each space on val, the best first."""
    difference = "to the best, 95 % interval"
    lines = [
        f"{'layer':<24} {'pool':<5} {'dim':>5} {'l2':>9} {'val accuracy':>12} {'log loss':>9}  {difference:<28} backbone"
    ]
    for one in ranking:
        low, high = one["difference_ci95"]
        difference = "chosen" if one["chosen"] else f"{one['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
        lines.append(
            f"{one['layer']:<24} {one['pool']:<5} {one['dim']:>5} {one['l2']:>9.3g} {one['val_accuracy']:>12.4f} "
            f"{one['val_log_loss']:>9.4f}  {difference:<28} {one['backbone']}"
        )
    return "\n".join([*lines, ""])


def format_blocks(blocks: Sequence[Mapping[str, Any]], decision: Mapping[str, Any]) -> str:
    """Return a table of the requested spaces, and whether the head uses several or one."""
    lines = [f"{'layer':<24} {'dim':>5} {'alone on val':>12}  {'scale':>7}  backbone"]
    for one in blocks:
        scale = "not used" if not one["chosen"] else "" if one["scale"] is None else f"{one['scale']:.3f}"
        lines.append(f"{one['layer']:<24} {one['dim']:>5} {one['val_accuracy']:>12.4f}  {scale:>8} {one['backbone']}")
    several, last = decision["blocks"], decision["last"]
    used = "several are used" if decision["chosen"] == "blocks" else f"only {last['layer']} is used"
    together = f"{' + '.join(several['layers'])} {several['val_accuracy']:.4f}"
    return "\n".join([*lines, f"on val: {together}, {last['layer']} {last['val_accuracy']:.4f}; {used}", ""])


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
