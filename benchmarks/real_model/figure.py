"""The figures: held-out against forget probability, under every repair and in the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from frontier import Curve, mean
from points import ORDER, Source, point
from tables import SHARES, SHARP, TEN

INK = "0.5"  # legible on white and on black, as a README is read on both


def draw_readme(sources: Sequence[Source], path: Path) -> None:
    """The trade-off of one source: the update scaled down, and repaired with rising gain."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sage-hub"
    import matplotlib.pyplot as plt

    s = next(s for s in sources if (s.name, s.level, s.seed) == ("NPO", "strong", 0))
    figure, axes = plt.subplots(figsize=(7.2, 4.0))
    for label, rows, colour, place in (
        ("the update scaled down, αΔ", s.points("scaled", {}), INK, (0.62, 0.66)),
        ("SAGE, with rising gain", s.points("sage", SHARP, **SHARES), "#1f9d6b", (0.5, 1.01)),
    ):
        curve = Curve.of([point(row) for row in rows])
        axes.plot(curve.forget, curve.heldout, "o-", ms=4, lw=2, color=colour)
        axes.annotate(label, place, color=colour, fontsize=11, ha="center")
    for label, row, mark, colour, shift in (
        ("unlearned", s.unlearned, "X", "#d9603b", (10, -4)),
        ("base", s.base, "s", INK, (-40, -16)),
    ):
        at = mean(row["forget"]), mean(row["heldout"])
        axes.plot(*at, mark, ms=10, color=colour)
        axes.annotate(
            label, at, xytext=shift, textcoords="offset points", color=colour, fontsize=11
        )
    axes.set_xlabel("still known of what had to go (answer probability)", color=INK, fontsize=11)
    axes.set_ylabel("known of what should stay", color=INK, fontsize=11)
    axes.set_xlim(-0.02, 1.04)
    axes.tick_params(colors=INK, labelsize=10)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, transparent=True)
    plt.close(figure)


def draw(sources: Sequence[Source], path: Path) -> None:
    """Held-out against forget: one panel for each source of the first seed."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sage-hub"
    import matplotlib.pyplot as plt

    first = [s for s in sources if s.seed == min(t.seed for t in sources)]
    levels = list(dict.fromkeys(s.level for s in first))
    figure, grid = plt.subplots(
        len(levels), len(ORDER), figsize=(3 * len(ORDER), 3 * len(levels)), squeeze=False
    )
    styles = [
        ("αΔ", "scaled", {}, {}, "0.5"),
        ("SAGE λ=100 ρ=.99, shares of a gain", "sage", SHARP, SHARES, "C0"),
        ("SAGE λ=10 ρ=.9, a gain", "sage", TEN, {}, "C1"),
        ("hard ρ=.9, a gain", "hard", {"energy": 0.9}, {}, "C2"),
    ]
    for axes in grid.flat:
        axes.set_visible(False)
    for s in first:
        axes = grid[levels.index(s.level)][ORDER.index(s.name)]
        axes.set_visible(True)
        for label, method, strength, about, colour in styles:
            rows = s.points(method, strength, **about)
            if rows:
                curve = Curve.of([point(row) for row in rows])
                axes.plot(curve.forget, curve.heldout, "o-", ms=3, lw=1, color=colour, label=label)
        for label, row, mark in (
            ("unlearned", s.unlearned, "x"),
            ("base", s.base, "s"),
            ("retain-only", s.reference, "*"),
        ):
            axes.plot(mean(row["forget"]), mean(row["heldout"]), mark, color="k", label=label)
        axes.set_title(f"{s.name}, {s.level}", fontsize=9)
        axes.set_xlabel("forget probability", fontsize=8)
        axes.set_ylabel("held-out probability", fontsize=8)
        axes.tick_params(labelsize=7)
    handles, labels = max(
        (axes.get_legend_handles_labels() for axes in grid.flat), key=lambda pair: len(pair[0])
    )
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
