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
    parts = [_format_evidence(done["evidence"]), _format_options(done)]
    parts += [_format_verification(done["verify"])] if done["verify"] else []
    parts += ["\n".join([*done["notes"], f"saved as run {done['run']}"])]
    session.finish(done, "\n\n".join(parts))


def _format_evidence(evidence: Mapping[str, Any]) -> str:
    """Return the measurements: a line for each head, and one for each other measurement."""
    lines = [f"{'head on':<28} {'accuracy':>8}  difference to the last layer, points (95 %)"]
    for head in (*evidence["layers"], evidence["several"]):
        layers = head["layers"]
        name = layers[0] if len(layers) == 1 else f"{layers[0]} to {layers[-1]} together"
        lines.append(f"{name:<28} {head['accuracy']:>8.1%}  {_format_points(head['difference'])}")
    wrong, leaked = evidence["wrong_labels"], evidence["leaked"]
    lines += [
        f"{evidence['n_train']} training images; gain by the last doubling: {_format_points(evidence['slope'])}",
        f"training accuracy without penalty: {evidence['separable']:.1%}; nearest neighbours: {evidence['knn']:.1%}",
        f"labels that heads and neighbours contradict: {wrong['share']:.1%} of {wrong['n']}",
        f"images of val and test that are also in an earlier split: {leaked['share']:.1%} of {leaked['n']}",
    ]
    return "\n".join(lines)


def _format_options(done: Mapping[str, Any]) -> str:
    """Return the recommended option, its commands, and the alternatives."""
    commands = [f"  $ {line}" for line in done["commands"]]
    lines = [f"advice: {_format_option(done)}", f"  because {done['reason']}", *commands, "alternatives:"]
    return "\n".join([*lines, *(f"  {_format_option(option)}" for option in done["alternatives"])])


def _format_verification(result: Mapping[str, Any]) -> str:
    lines = [f"tried on {result['n']} images of {result['split']}:"]
    for row in result["tried"]:
        low, high = row["accuracy_ci95"]
        lines.append(f"  {row['action']:<14} {row['accuracy']:.4f} ({low:.4f} - {high:.4f}), {row['minutes']:.1f} min")
    return "\n".join([*lines, f"the advice was {'right' if result['right'] else 'wrong'}: {result['why']}"])


def _format_option(option: Mapping[str, Any]) -> str:
    text = " ".join([option["action"], *option["layers"]])
    if option["expected_gain"] is not None:
        low, high = option["expected_gain_ci95"]
        text += f", expected {option['expected_gain']:+.1f} ({low:+.1f} to {high:+.1f})"
    return text if option["cost_minutes"] is None else f"{text}, {option['cost_minutes']:.1f} min"


def _format_points(difference: Mapping[str, Any]) -> str:
    low, high = difference["ci95"]
    return f"{100 * difference['gain']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
