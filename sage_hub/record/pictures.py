"""The pictures of a card: bias by layer, forget against retain, and bias against λ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

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
MAIN = ("probability", "accuracy", "knowmem", "verbmem", "rougeL_recall")


def draw(folder: Path, manifest: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, str]:
    """Draw what the record has figures for into `folder`: name of a picture -> its file's name."""
    folder.mkdir(exist_ok=True)
    for earlier in folder.glob("*.png"):
        earlier.unlink()
    made = {}
    for name, figure in (
        ("tradeoff", tradeoff(report)),
        ("bias", bias_by_layer(manifest)),
        ("profile", bias_by_strength(manifest)),
    ):
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
            made[name] = f"sage/{name}.png"
    return made


def tradeoff(report: Mapping[str, Any]) -> Figure | None:
    """The models with the forget set's figure to the right and the held-out set's upwards."""
    points: dict[str, dict[str, Mapping[str, Any]]] = {}
    for metric in MAIN:
        points = {}
        for result in report["results"]:
            if result["metric"] == metric and result["condition"] is None:
                points.setdefault(result["model"], {})[result["set"]] = result
        points = {name: own for name, own in points.items() if {"forget", "heldout"} <= own.keys()}
        if "sanitized" in points:
            break
    else:
        return None
    figure, axes = _axes(6.0, 4.2)
    for name, own in points.items():
        x, y = own["forget"], own["heldout"]
        axes.errorbar(
            x["value"],
            y["value"],
            xerr=_reach(x),
            yerr=_reach(y),
            fmt=MARKERS.get(name, "o"),
            color=COLOURS.get(name, "#000000"),
            markersize=10 if name == "sanitized" else 8,
            linewidth=1,
            label="control αΔ" if name == "control" else name,
        )
    axes.set_xlabel(f"forget {metric} (lower is better)")
    axes.set_ylabel(f"held-out {metric} (higher is better)")
    axes.set_title("Kept and forgotten, with 95 % intervals", loc="left", fontsize=11)
    axes.margins(0.12)
    axes.legend(frameon=False, fontsize=9)
    return figure


def bias_by_layer(manifest: Mapping[str, Any]) -> Figure | None:
    """Retention activation bias per layer, a line per kind of module, before and after."""
    kinds: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for tensor in manifest["tensors"]:
        layer = re.search(r"\.(\d+)\.", tensor["name"])
        if layer and tensor.get("bias_before") and tensor.get("bias_after"):
            words = [w for w in tensor["name"].split(".") if not w.isdigit() and "lora_" not in w]
            kind = words[-2] if words[-1] in ("weight", "bias") else words[-1]
            own = kinds.setdefault(kind, {}).setdefault(int(layer[1]), [])
            own.append((tensor["bias_before"], tensor["bias_after"]))
    if not kinds:
        return None
    from matplotlib.ticker import MaxNLocator

    figure, (before, after) = _side_by_side(9.0, 3.8)
    for number, (kind, layers) in enumerate(sorted(kinds.items())):
        order = sorted(layers)
        for axes, which in ((before, 0), (after, 1)):
            values = [median(pair[which] for pair in layers[layer]) for layer in order]
            marker = "osv^Dx+*"[number % 8]
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


def _side_by_side(width: float, height: float) -> tuple[Figure, tuple[Axes, Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes in (left, right):
        _plain(axes)
    return figure, (left, right)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
