"""The rows that calibration runs, in what memory, and what the record says of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sage_hub.calibration.budget import plan_memory
from sage_hub.calibration.statistics import Origin, stored_energy
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.model.blocks import BlockModel
from sage_hub.model.sites import Site
from sage_hub.rows.encoding import Batch, Encoded, batches, encoder_of, row_limit, take_rows
from sage_hub.rows.proxies import Proxy
from sage_hub.settings import OF_PROMPTS, SETS, Settings


@dataclass(frozen=True)
class CalibrationSet:
    """The rows of one proxy that are used, and what the record says of them."""

    name: str
    rows: Sequence[Encoded]
    batches: Sequence[Batch]
    about: dict[str, Any]
    sketched: frozenset[str] = frozenset()  # the sites whose moment is a sketch
    starved: list[str] = field(default_factory=list)  # experts that saw too few of its tokens
    files: list[Path] = field(default_factory=list)  # that what it shows goes into

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)


def plan_sets(
    checkpoint: Checkpoint,
    files: Mapping[Path, Mapping[str, Proxy]],
    settings: Settings,
    model: BlockModel,
    sites: Sequence[Site],
) -> tuple[list[CalibrationSet], float]:
    """What is run for `files`, and how many bytes of its hidden states may stay in memory."""
    read = {
        own: _read_set(*own, checkpoint, settings)
        for proxies in files.values()
        for own in proxies.items()
    }
    sets: dict[tuple[str, Proxy, frozenset[str]], CalibrationSet] = {}
    room = math.inf
    for path, proxies in files.items():
        budget = plan_memory(
            model,
            sites,
            settings,
            tokens=sum(batch.ids.numel() for part in read.values() for batch in part.batches),
            longest=max(len(row.ids) for own in proxies.items() for row in read[own].rows),
        )
        budget.check()
        room = min(room, budget.hidden)
        for own in proxies.items():
            # What is sketched is this file's own matter: other files must not change it.
            part = replace(read[own], sketched=budget.sketched, starved=[], files=[])
            sets.setdefault((*own, budget.sketched), part).files.append(path)
    # The order of the sets in every file.
    return sorted(sets.values(), key=lambda part: SETS.index(part.name)), room


def _read_set(
    which: str, proxy: Proxy, checkpoint: Checkpoint, settings: Settings
) -> CalibrationSet:
    """The proxy as tokens, as many as the settings allow."""
    used, places = take_rows(proxy, encoder_of(checkpoint, settings), settings)
    about = {
        **proxy.describe(),
        "rows_used": len(used),
        "tokens_used": sum(len(row.ids) for row in used),
        "rows_truncated": sum(row.truncated for row in used),
        "row_hashes": [proxy.rows[place].hash for place in places],
    }
    return CalibrationSet(which, used, list(batches(used, settings.batch_size)), about)


def notes_on(part: CalibrationSet, sites: Sequence[Site]) -> Iterator[str]:
    """What a person should know of the statistics."""
    rows, name, tokens = len(part.rows), part.about["name"], part.tokens
    yield f"Calibrated: the base has read {rows} rows of {part.name} ({name}), {tokens} tokens."
    if cut := part.about["rows_truncated"]:
        yield f"{cut} rows of the {part.name} proxy are longer than --max-length and were cut."
    wide = [site for site in sites if site.size > tokens]
    if wide:
        does = "protect" if part.name == "retain" else "show"
        yield (
            f"The {part.name} proxy has {tokens} tokens, fewer than {len(wide)} of the "
            f"{len(sites)} inputs that are watched have features: there it {does}s {tokens} "
            f"directions at most. More rows {does} more."
        )
    if part.starved:
        yield (
            f"{len(part.starved)} experts got fewer tokens of the {part.name} proxy than they have "
            "features and were shown the input of their block; the record names them."
        )
    if part.sketched:
        yield f"The second moments of {len(part.sketched)} sites are sketched."


def origin_of(
    checkpoint: Checkpoint, weights: str, sets: Sequence[CalibrationSet], settings: Settings
) -> Origin:
    return Origin(
        model=checkpoint.name,
        commit=checkpoint.commit,
        weights=weights,
        tokenizer=checkpoint.tokenizer_fingerprint(),
        data={part.name: part.about | {"experts_shown_block_input": part.starved} for part in sets},
        settings={
            "energy": stored_energy(settings),
            "rank": settings.rank,
            "max_tokens": settings.max_tokens,
            "max_length": row_limit(checkpoint, settings.max_length),
            "seed": settings.seed,
            "chat_template": settings.chat_template,
            "moments": settings.moments,
            "compute_dtype": settings.compute_dtype,
            **{name: value for name in OF_PROMPTS if (value := getattr(settings, name))},
        },
    )
