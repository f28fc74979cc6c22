"""The path over l2 as a picture: one panel for each score, the chosen l2 marked. Plain SVG, opened by any browser.

>>> run.write_text("l2_path.svg", draw_path(points, chosen=1e-3))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor, log10

WIDTH, HEIGHT, LEFT, GAP = 560, 150, 70, 40  # pixels: of a panel, of its labels, between panels
TITLES = {
    "val_accuracy": "accuracy, held out",
    "val_log_loss": "log loss, held out",
    "val_rmse": "RMSE on val",
    "loo_rmse": "RMSE of train, each left out",
    "objective": "objective on train",
}


def draw_path(points: Sequence[Mapping[str, float | None]], *, chosen: float) -> str:
    """Return an SVG of the scores that points have, over l2 on a logarithmic axis.

    points : {l2, a score: value or None}, in rising order of l2
    """
    names = [name for name in TITLES if all(point.get(name) is not None for point in points)]
    low, high = (log10(points[k]["l2"] or 1) for k in (0, -1))

    def across(l2: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * (log10(l2) - low) / (high - low)

    parts = []
    for number, name in enumerate(names):
        top = GAP + number * (HEIGHT + GAP)
        values = [float(point[name] or 0.0) for point in points]
        least, most = min(values), max(values)
        scale = HEIGHT / (most - least or 1.0)
        line = " ".join(
            f"{across(point['l2'] or 1):.1f},{top + HEIGHT - scale * (value - least):.1f}"
            for point, value in zip(points, values, strict=True)
        )
        parts += [
            f'<text x="{LEFT}" y="{top - 8}">{TITLES[name]}</text>',
            f'<text x="4" y="{top + 8}">{most:.4g}</text><text x="4" y="{top + HEIGHT}">{least:.4g}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT - 10}" height="{HEIGHT}" fill="none" stroke="#bbb"/>',
            f'<line x1="{across(chosen):.1f}" x2="{across(chosen):.1f}" y1="{top}" y2="{top + HEIGHT}" stroke="#d62"/>',
            f'<polyline points="{line}" fill="none" stroke="#247" stroke-width="1.5"/>',
        ]
    foot = GAP + len(names) * (HEIGHT + GAP) - GAP + 16
    decades = range(-floor(-low), floor(high) + 1)
    parts += [f'<text x="{across(10.0**k) - 12:.1f}" y="{foot}">1e{k}</text>' for k in decades]
    parts.append(f'<text x="{LEFT}" y="{foot + 20}" fill="#d62">l2, chosen: {chosen:.3g}</text>')
    style = "font-family:sans-serif;font-size:12px;background:white"
    size = f'width="{WIDTH}" height="{foot + 32}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{style}">\n' + "\n".join(parts) + "\n</svg>\n"
