"""What a run takes and how long it takes here, in words."""

from __future__ import annotations

from collections.abc import Iterator

from sage_hub.calibration.estimate import ROBUST, SEARCHED, Estimate
from sage_hub.cli.terminal import Part
from sage_hub.evaluation.depth import ROWS
from sage_hub.record.tables import Table
from sage_hub.runtime.progress import in_bytes, in_time


def forecast_text(found: Estimate) -> Iterator[Part]:
    """What a run takes, a line per way to calibrate."""
    yield (
        f"{_count(found.parameters)} parameters, {found.sites} places whose inputs are watched, "
        f"of up to {found.widest} features; a block of layers takes "
        f"{in_bytes(found.modes[0].budget.weights)}"
    )
    yield ""
    most = f"at most {found.tokens} tokens{' of each of two sets' if found.sets > 1 else ''}"
    yield f"Calibration on {most} (--max-tokens); the settings say {found.chosen}:"
    header = ["second moments", "statistics", "memory", "spilled", "flops", "time here"]
    rows = [
        [
            mode.name,
            f"≤ {in_bytes(mode.statistics)}",
            in_bytes(mode.budget.total) + (" (too much)" if mode.budget.excess else ""),
            in_bytes(mode.budget.spilled),
            f"{mode.forward + mode.moments + mode.decompositions:.2g}",
            in_time(mode.seconds),
        ]
        for mode in found.modes
    ]
    yield Table(header, rows)
    yield ""
    yield (
        f"The pass over the weights: {in_bytes(found.pass_bytes)} read and written, "
        f"{found.pass_flops:.2g} flops, {in_time(found.pass_seconds)}"
    )
    yield (
        f"The search for the gain with a forget set, {SEARCHED} evaluations or so of at most "
        f"{found.searched_tokens} tokens: {in_time(found.search_seconds)}"
    )
    yield f"Evaluation of four models on as many tokens: {in_time(found.evaluation_seconds)}"
    if found.robustness_seconds:
        yield (
            f"Robustness of {ROBUST} models, each taught at most {found.robustness.trained} tokens "
            f"and sampling {found.robustness.sampled}: {in_time(found.robustness_seconds)}"
        )
    if found.patched_passes:
        yield (
            f"Unlearning depth, with {found.patched_passes} passes of the base over at most "
            f"{ROWS} forget rows, from the patched layer on: {in_time(found.depth_seconds)}"
        )
    if found.written_tokens:
        yield f"The base writes rows, as none are given: {in_time(found.writing_seconds)}"


def _count(number: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
