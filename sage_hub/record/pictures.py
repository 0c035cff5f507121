"""The pictures of a card: bias by layer, forget against retain, and bias against λ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sage_hub.record.curves import bias_of_layers, gain_path, points

if TYPE_CHECKING:  # it takes a second to import, and few commands need it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart without colour too, by marker and by place.
COLOURS = {
    "base": "#555555",
    "reference": "#8c6bb1",
    "unlearned": "#d95f02",
    "control": "#7a9cc6",
    "sanitized": "#1b7f5c",
}
MARKERS = {"base": "s", "reference": "P", "unlearned": "X", "control": "v", "sanitized": "o"}


def draw(folder: Path, manifest: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, str]:
    """Draw what the record has figures for into `folder`: name of a picture -> its file's name."""
    figures = {
        "tradeoff": tradeoff(manifest, report),
        "bias": bias_by_layer(manifest),
        "profile": bias_by_strength(manifest),
    }
    folder.mkdir(exist_ok=True)
    for earlier in folder.glob("*.png"):
        earlier.unlink()
    made = {}
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
            made[name] = f"sage/{name}.png"
    return made


def tradeoff(manifest: Mapping[str, Any], report: Mapping[str, Any]) -> Figure | None:
    """The models with the forget set's figure to the right and the held-out set's upwards.

    Beside it what the search for the gain saw, on the forget and the retain set, if it searched.
    """
    found, path = points(report, "heldout"), gain_path(manifest, report)
    if found is None:
        return None
    metric, models = found
    if path is None:
        figure, axes = _axes(6.0, 4.2)
    else:
        figure, (axes, beside) = _side_by_side(10.0, 4.2, sharey=False)
        _draw_path(beside, path)
    for name, own in models.items():
        x, y = own["forget"], own["heldout"]
        axes.errorbar(
            x["value"],
            y["value"],
            xerr=_reach(x),
            yerr=_reach(y),
            markersize=10 if name == "sanitized" else 8,
            linewidth=1,
            label="control αΔ" if name == "control" else name,
            **_look(name),
        )
    axes.set_xlabel(f"forget {metric} (lower is better)")
    axes.set_ylabel(f"held-out {metric} (higher is better)")
    axes.set_title("Kept and forgotten, with 95 % intervals", loc="left", fontsize=11)
    axes.margins(0.12)
    axes.legend(frameon=False, fontsize=9, loc="lower right")  # where no model should be
    return figure


def _draw_path(axes: Axes, path: Mapping[str, Any]) -> None:
    """Every gain that was tried, from small to large, and αΔ's curve from the base to the source.

    First looks are at a part of the rows, and so fainter.
    """
    models, along = path["models"], path["along"]
    axes.plot(
        [models[name]["forget"] for name in along],
        [models[name]["retain"] for name in along],
        linestyle="--",
        color=COLOURS["control"],
        linewidth=1,
        label="αΔ, α from 0 to 1",
    )
    looks = path["first_looks"]
    for label, own, faint in (
        ("first looks, by shares", [one for one in looks if one["shares"]], ":"),
        ("first looks, one gain", [one for one in looks if not one["shares"]], "-."),
        ("gains tried", path["tried"], "-"),
    ):
        line: dict[str, Any] = {"color": COLOURS["sanitized"], "linestyle": faint, "linewidth": 1}
        at = [one["forget"] for one in own], [one["retain"] for one in own]
        if own:
            label = f"{label}: γ {own[0]['gain']:.3g} to {own[-1]['gain']:.3g}"
            axes.plot(*at, marker=".", alpha=1.0 if faint == "-" else 0.5, label=label, **line)
    for name, own in models.items():
        axes.errorbar(own["forget"], own["retain"], markersize=7, **_look(name))
    axes.axvline(path["target"], color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"forget {path['metric']} (dotted: the level to reach)")
    axes.set_ylabel(f"retain {path['metric']}")
    axes.set_title("Gains γ that were tried", loc="left", fontsize=11)
    axes.margins(0.12)
    axes.legend(frameon=False, fontsize=8)


def _look(name: str) -> dict[str, Any]:
    """How a model is drawn, wherever it is."""
    return {"fmt": MARKERS.get(name, "o"), "color": COLOURS.get(name, "#000000")}


def bias_by_layer(manifest: Mapping[str, Any]) -> Figure | None:
    """Retention activation bias per layer, a line per kind of module, before and after."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in bias_of_layers(manifest["tensors"]):
        kinds.setdefault(one["kind"], []).append(one)
    if not kinds:
        return None
    from matplotlib.ticker import MaxNLocator

    figure, (before, after) = _side_by_side(9.0, 3.8)
    for number, (kind, layers) in enumerate(kinds.items()):
        for axes, which in ((before, "before"), (after, "after")):
            marker = "osv^Dx+*"[number % 8]
            order, values = [one["layer"] for one in layers], [one[which] for one in layers]
            axes.plot(order, values, marker=marker, markersize=4, linewidth=1.2, label=kind)
    for axes, title in ((before, "unlearned"), (after, "sanitized")):
        axes.set_yscale("log")
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title, loc="left", fontsize=11)
    before.set_ylabel("retention activation bias,\nrelative to the base's outputs")
    handles, labels = before.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def bias_by_strength(manifest: Mapping[str, Any]) -> Figure | None:
    """What share of the source's retention bias each λ would leave, and the λ that was chosen."""
    curve, chosen = manifest["profile"], manifest["settings"]["strength"]
    if not curve:
        return None
    figure, axes = _axes(6.0, 3.4)
    strengths = [point["strength"] for point in curve]
    axes.plot(strengths, [point["kept"] for point in curve], color=COLOURS["unlearned"])
    if (
        isinstance(chosen, (int, float))
        and "bias" in manifest
        and strengths[0] <= chosen <= strengths[-1]
    ):
        label = f"this release: λ = {chosen:g}, γ = {manifest['gain']:.3g}"
        axes.plot(chosen, manifest["bias"]["kept"], "o", color=COLOURS["sanitized"], label=label)
        axes.legend(frameon=False, fontsize=9)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("strength λ")
    axes.set_ylabel("share of the bias left (γ = 1)")
    axes.set_title("What other strengths would leave", loc="left", fontsize=11)
    return figure


def _reach(result: Mapping[str, Any]) -> list[list[float]] | None:
    """How far the interval of a figure goes to both sides."""
    if result["interval"] is None:
        return None
    low, high = result["interval"]
    return [[max(result["value"] - low, 0)], [max(high - result["value"], 0)]]


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _side_by_side(
    width: float, height: float, *, sharey: bool = True
) -> tuple[Figure, tuple[Axes, Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=sharey)
    for axes in (left, right):
        _plain(axes)
    return figure, (left, right)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
