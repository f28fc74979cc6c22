"""embedpipe advise [DATASET]"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import rich_click as click

from embedpipe.cli._build import Session, command
from embedpipe.commands import advise as advising


@command(advising.advise, example="embedpipe advise --verify --epochs 5")
@click.argument("dataset", required=False)
def advise(session: Session, dataset: str | None, **options: Any) -> None:
    done = advising.advise(dataset, progress=session.progress, **options).to_dict()
    parts = [tell_evidence(done["evidence"]), tell_options(done)]
    parts += [tell_verify(done["verify"])] if done["verify"] else []
    parts += ["\n".join([*done["notes"], f"all of it in run {done['run']}"])]
    session.finish(done, "\n\n".join(parts))


def tell_evidence(found: Mapping[str, Any]) -> str:
    """Return what was measured, a line a layer and a line a question."""
    lines = [f"{'head on':<28} {'accuracy':>8}  to the last layer, points (95 %)"]
    for one in (*found["layers"], found["several"]):
        name = one["layers"][0] if len(one["layers"]) == 1 else f"{one['layers'][0]} to {one['layers'][-1]} together"
        lines.append(
            f"{name:<28} {one['accuracy']:>8.1%}  {_points(one['difference']['gain'], one['difference']['ci95'])}"
        )
    wrong, leaked = found["wrong_labels"], found["leaked"]
    return "\n".join(
        [
            *lines,
            f"{found['n_train']} training images; twice the images: {_points(found['slope']['gain'], found['slope']['ci95'])}",
            f"without penalty a head fits {found['separable']:.1%} of its own images; neighbours are right on {found['knn']:.1%}",
            f"labelled otherwise than heads and neighbours agree: {wrong['share']:.1%} of {wrong['n']}",
            f"of val and test also in an earlier split: {leaked['share']:.1%} of {leaked['n']}",
        ]
    )


def tell_options(done: Mapping[str, Any]) -> str:
    """Return the advice, its commands, and the alternatives."""
    lines = [
        f"advice: {_title(done)}",
        f"  because {done['reason']}",
        *(f"  $ {line}" for line in done["commands"]),
        "else:",
    ]
    return "\n".join([*lines, *(f"  {_title(one)}" for one in done["alternatives"])])


def tell_verify(found: Mapping[str, Any]) -> str:
    lines = [f"tried on {found['n']} images of {found['split']}:"]
    for one in found["tried"]:
        low, high = one["accuracy_ci95"]
        lines.append(f"  {one['action']:<14} {one['accuracy']:.4f} ({low:.4f} - {high:.4f}), {one['minutes']:.1f} min")
    return "\n".join([*lines, f"the advice was {'right' if found['right'] else 'wrong'}: {found['why']}"])


def _title(one: Mapping[str, Any]) -> str:
    name = " ".join([one["action"], *one["layers"]])
    gain = one["expected_gain"]
    expected = (
        "" if gain is None else f", expected {_points(gain / 100, [end / 100 for end in one['expected_gain_ci95']])}"
    )
    cost = "" if one["cost_minutes"] is None else f", {one['cost_minutes']:.1f} min"
    return f"{name}{expected}{cost}"


def _points(gain: float, ci95: Any) -> str:
    return f"{100 * gain:+.1f} ({100 * ci95[0]:+.1f} to {100 * ci95[1]:+.1f})"
