"""Run the proxies through the base model, block by block, and write what every site has seen."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_hub.architecture import empty_model
from sage_hub.blocks import Block, BlockModel, open_blocks
from sage_hub.budget import plan_memory
from sage_hub.checkpoint import Checkpoint, digest
from sage_hub.encoding import Batch, Encoded, batches, row_limit, take_rows
from sage_hub.moments import (
    AxisMoment,
    Moment,
    SecondMoment,
    SketchedMoment,
    Spectrum,
    sketch_width,
    spectrum,
)
from sage_hub.observe import View, watching
from sage_hub.progress import Progress
from sage_hub.proxies import Proxy
from sage_hub.ranks import ALONE, Ranks
from sage_hub.settings import Settings
from sage_hub.sites import Site, find_sites
from sage_hub.spill import Spill
from sage_hub.statistics import STORED_ENERGY, VERSION, Origin, StatisticsWriter, is_whole
from sage_hub.versions import versions
from sage_hub.weights import loaded_whole, open_weights


@dataclass(frozen=True)
class _Set:
    """The rows of one proxy that are used, and what the record says of them."""

    name: str
    rows: Sequence[Encoded]
    batches: Sequence[Batch]
    about: dict[str, Any]

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)


def calibrate(
    checkpoint: Checkpoint,
    proxies: Mapping[str, Proxy],
    settings: Settings,
    path: Path,
    *,
    weights: str,
    cache: Path | None = None,
    ranks: Ranks = ALONE,
    progress: Progress,
) -> None:
    """Calibrate `checkpoint` on `proxies` (set -> rows) and write the statistics file `path`.

    `weights` is the checkpoint's fingerprint, which its caller has computed already. The folder
    `cache` is looked into first, and gets what was made; its files are named by all that they
    depend on. Raises OutOfMemoryError if `settings.memory` is too little, NonFiniteError with
    site and row at the first NaN or Inf in an activation. With several `ranks` each takes a part
    of the rows, and the first writes the file, which all must be able to read.
    """
    if cache is None:
        _calibrate(checkpoint, proxies, settings, path, weights, ranks, progress)
        return
    kept = cache / f"{_key(checkpoint, proxies, settings, weights)}.safetensors"
    if ranks.once(lambda: is_whole(kept)):
        progress.note(f"The statistics are in {cache} already; nothing is calibrated.")
    else:
        # Under a name of its own, as another run may be at the same.
        mine = kept.with_name(f"{kept.stem}.{os.getpid()}.safetensors")
        try:
            _calibrate(checkpoint, proxies, settings, mine, weights, ranks, progress)
            if ranks.first:
                mine.replace(kept)
        finally:
            mine.unlink(missing_ok=True)
    ranks.once(lambda: _link(kept, path))


def _link(kept: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        path.hardlink_to(kept)
    except OSError:  # another disk
        shutil.copyfile(kept, path)


def _key(
    checkpoint: Checkpoint, proxies: Mapping[str, Proxy], settings: Settings, weights: str
) -> str:
    """A SHA-256 over all that statistics are made from."""
    own = ("energy", "rank", "max_tokens", "max_length", "batch_size", "seed", "chat_template")
    described = settings.describe()
    return digest(
        {
            "weights": weights,
            "tokenizer": checkpoint.tokenizer_fingerprint(),
            "proxies": {which: proxy.describe() for which, proxy in proxies.items()},
            "settings": {name: described[name] for name in (*own, "moments", "memory", "device")},
            "format": VERSION,
            "versions": versions(),
        }
    )


def _calibrate(
    checkpoint: Checkpoint,
    proxies: Mapping[str, Proxy],
    settings: Settings,
    path: Path,
    weights: str,
    ranks: Ranks,
    progress: Progress,
) -> None:
    sites = find_sites(empty_model(checkpoint))
    sets = _read_sets(checkpoint, proxies, settings)
    with ExitStack() as stack:
        reader = stack.enter_context(open_weights(checkpoint))
        model = stack.enter_context(open_blocks(checkpoint, reader, settings.device))
        budget = plan_memory(
            model,
            sites,
            settings,
            tokens=sum(batch.ids.numel() for part in sets for batch in part.batches),
            longest=max(len(row.ids) for part in sets for row in part.rows),
            held=checkpoint.weight_bytes if loaded_whole(checkpoint) else 0,
        )
        budget.check()
        writer = stack.enter_context(StatisticsWriter(path)) if ranks.first else None
        hidden = {
            part.name: stack.enter_context(Spill(path.parent, budget.hidden / len(sets)))
            for part in sets
        }
        total = sum(part.tokens for part in sets)
        bar = stack.enter_context(progress.counter("Calibrating", total, "tok"))
        make = partial(_moment, settings=settings, sketched=budget.sketched)
        place = 0  # of two that each batch has, where its hidden states are
        for block in model.blocks:
            seen = model.sites_of(block, sites)
            places = place, 1 - place if any(site.expert for site in seen) else place
            with model.holding(block, reader):
                for part in sets:
                    states = hidden[part.name]
                    moments, rare = _observe(
                        model, block, seen, part, make, states, places, ranks, bar
                    )
                    part.about["experts_shown_block_input"] += rare
                    for site, found in _decompose(seen, moments, settings, ranks):
                        if writer is not None:
                            writer.add(part.name, site, found)
            place = places[1]
            rows = sum(len(part.rows) for part in sets) * bar.n / total
            bar.set_postfix_str(f"{rows / (bar.format_dict['elapsed'] or 1):.3g} row/s")
        if writer is not None:
            writer.finish(_origin(checkpoint, weights, sets, settings), sites)
        ranks.all(None)  # the file is there when the others go on
    for note in _notes(sets, sites, len(budget.sketched)):
        progress.note(note)


def _read_sets(
    checkpoint: Checkpoint, proxies: Mapping[str, Proxy], settings: Settings
) -> list[_Set]:
    """The proxies as tokens, as many as the settings allow."""
    sets = []
    for which, proxy in proxies.items():
        used, places = take_rows(proxy, checkpoint, settings)
        about = {
            **proxy.describe(),
            "rows_used": len(used),
            "tokens_used": sum(len(row.ids) for row in used),
            "rows_truncated": sum(row.truncated for row in used),
            "experts_shown_block_input": [],
            "row_hashes": [proxy.rows[place].hash for place in places],
        }
        sets.append(_Set(which, used, list(batches(used, settings.batch_size)), about))
    return sets


def _notes(sets: Sequence[_Set], sites: Sequence[Site], sketched: int) -> Iterator[str]:
    """What a person should know of the statistics."""
    for part in sets:
        yield f"Calibrated on {len(part.rows)} rows of {part.name}, {part.tokens} tokens."
        if cut := part.about["rows_truncated"]:
            yield f"{cut} rows of the {part.name} proxy are longer than --max-length and were cut."
        wide = [site for site in sites if not site.diagonal and site.size > part.tokens]
        if wide:
            yield (
                f"The {part.name} proxy has {part.tokens} tokens, fewer than {len(wide)} of the "
                f"{len(sites)} sites have features: there it protects {part.tokens} directions at "
                "most. More rows protect more."
            )
        if rare := part.about["experts_shown_block_input"]:
            yield (
                f"{len(rare)} experts got fewer tokens of the {part.name} proxy than they have "
                "features and were shown the input of their block; the record names them."
            )
    if sketched:
        yield f"The second moments of {sketched} sites are sketched."


def _origin(
    checkpoint: Checkpoint, weights: str, sets: Sequence[_Set], settings: Settings
) -> Origin:
    return Origin(
        model=checkpoint.name,
        commit=checkpoint.commit,
        weights=weights,
        tokenizer=checkpoint.tokenizer_fingerprint(),
        data={part.name: part.about for part in sets},
        settings={
            "energy": settings.energy,
            "rank": settings.rank,
            "max_tokens": settings.max_tokens,
            "max_length": row_limit(checkpoint, settings.max_length),
            "seed": settings.seed,
            "chat_template": settings.chat_template,
            "moments": settings.moments,
        },
    )


def _decompose(
    sites: Sequence[Site], moments: dict[str, Moment], settings: Settings, ranks: Ranks
) -> Iterator[tuple[Site, Spectrum]]:
    """The spectra of `moments`, which are dropped as they are done, in the first rank.

    Every rank decomposes every n-th.
    """
    energy = max(settings.energy, STORED_ENERGY)
    for start in range(0, len(sites), ranks.count):
        some = sites[start : start + ranks.count]
        own = [moments[site.name] for site in ranks.mine(some)]
        found = ranks.to_first([spectrum(moment, energy, settings.rank) for moment in own])
        for site in some:
            del moments[site.name]
        for site, (one,) in zip(some, found, strict=False):
            yield site, one


def _add_up(moments: Collection[Moment], ranks: Ranks) -> None:
    """Put what all ranks have seen into each of them."""
    tokens = torch.tensor([moment.tokens for moment in moments])
    sketches = [moment for moment in moments if isinstance(moment, SketchedMoment)]
    squares = torch.tensor([moment.squares for moment in sketches], dtype=torch.float64)
    for tensor in (tokens, squares, *(moment.total for moment in moments)):
        ranks.add_up(tensor)
    for moment, count in zip(moments, tokens.tolist(), strict=True):
        moment.tokens = count
    for sketch, sum_of in zip(sketches, squares.tolist(), strict=True):
        sketch.squares = sum_of


def _moment(site: Site, settings: Settings, sketched: Collection[str]) -> Moment:
    if site.diagonal:
        return AxisMoment(site.size, settings.device)
    if site.name in sketched:
        seed = zlib.crc32(site.name.encode()) ^ settings.seed
        width = sketch_width(site.size, settings.rank)
        return SketchedMoment(site.size, width, seed, settings.device)
    return SecondMoment(site.size, settings.device)


def _observe(
    model: BlockModel,
    block: Block,
    sites: Sequence[Site],
    part: _Set,
    make: Callable[[Site], Moment],
    hidden: Spill,
    places: tuple[int, int],
    ranks: Ranks,
    bar: Any,
) -> tuple[dict[str, Moment], list[str]]:
    """Run `part` through `block`: what its `sites` take in, as moments that `make` makes.

    `hidden` has the states of batch n before the block at 2 n + places[0], and gets those behind
    it at 2 n + places[1]. An expert sees the tokens that are routed to it. Where those are fewer
    than it has features, they say too little, and it is shown the input of its whole block
    instead, in a second pass; the names of these sites come second. Raises NonFiniteError.
    """
    moments = {site.name: make(site) for site in sites}
    view = View(part.rows, part.name)

    def batches_run() -> Iterator[tuple[int, Batch, Tensor]]:
        for number, batch in enumerate(ranks.mine(part.batches)):
            view.show(batch, model.device)
            yield number, batch, model.run(block, batch, hidden.get(2 * number + places[0]))

    with watching(model, sites, moments, view):
        for number, batch, states in batches_run():
            view.observe_ends(sites, moments, states)
            if not block.finishes:
                hidden.put(2 * number + places[1], states)
            bar.update(ranks.count * int(batch.mask.sum()) / len(model.blocks))
    _add_up(moments.values(), ranks)
    starved = [site for site in sites if site.expert and moments[site.name].tokens < site.size]
    moments |= {site.name: make(site) for site in starved}
    with watching(model, starved, moments, view, routed=False):
        for _ in batches_run() if starved else ():
            pass
    _add_up([moments[site.name] for site in starved], ranks)
    return moments, [site.name for site in starved]
