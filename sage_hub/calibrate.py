"""Run the proxies through the base model, block by block, and write what every site has seen."""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
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
from sage_hub.journal import Journal, journal_of
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
from sage_hub.settings import SETS, Settings
from sage_hub.sites import Site, find_sites
from sage_hub.spill import Spill
from sage_hub.statistics import STORED_ENERGY, VERSION, Origin, is_whole, write_statistics
from sage_hub.versions import versions
from sage_hub.weights import loaded_whole, open_weights


@dataclass(frozen=True)
class _Set:
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


def calibrate(
    checkpoint: Checkpoint,
    files: Mapping[Path, Mapping[str, Proxy]],
    settings: Settings,
    *,
    weights: str,
    cache: Path | None = None,
    ranks: Ranks = ALONE,
    progress: Progress,
) -> None:
    """Calibrate `checkpoint` and write statistics files: path -> its proxies (set -> rows).

    Several files come from one pass over the weights, in which a proxy that is in several of them
    is run once; each is, byte for byte on a CPU, what it is if it is made alone. `weights` is the
    checkpoint's fingerprint, which its caller has computed already. The folder `cache` is looked
    into first, and gets what was made; its files are named by all that they depend on.

    Raises OutOfMemoryError if `settings.memory` is too little, NonFiniteError with site and row
    at the first NaN or Inf in an activation. With several `ranks` each takes a part of the rows,
    and the first writes the files, which all must be able to read.
    """
    if cache is None:
        _calibrate(checkpoint, files, settings, weights, ranks, progress)
        return
    kept = {
        path: cache / f"{_key(checkpoint, proxies, settings, weights)}.safetensors"
        for path, proxies in files.items()
    }
    missing = {
        path: proxies
        for path, proxies in files.items()
        if not ranks.once(partial(is_whole, kept[path]))
    }
    if not missing:
        progress.note(f"The statistics are in {cache} already; nothing is calibrated.")
    elif len(missing) < len(files):
        found = len(files) - len(missing)
        progress.note(f"{found} of {len(files)} statistics files are in {cache} already.")
    if missing:
        _calibrate(checkpoint, missing, settings, weights, ranks, progress)
    for path in files:
        there, here = (path, kept[path]) if path in missing else (kept[path], path)
        ranks.once(partial(_link, there, here))


def _link(there: Path, here: Path) -> None:
    """Put the file `there` in the place of what is `here`, or a copy of it."""
    here.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own at first, as another run may be at the same.
    new = here.with_name(f"{here.stem}.{os.getpid()}.safetensors")
    try:
        try:
            new.hardlink_to(there)
        except OSError:  # another disk
            shutil.copyfile(there, new)
        new.replace(here)
    finally:
        new.unlink(missing_ok=True)


def _key(
    checkpoint: Checkpoint, proxies: Mapping[str, Proxy], settings: Settings, weights: str
) -> str:
    """A SHA-256 over all that statistics are made from, and what they say they are of."""
    own = ("rank", "max_tokens", "max_length", "batch_size", "seed", "chat_template")
    described = settings.describe()
    kept = {name: described[name] for name in (*own, "moments", "memory", "device")}
    return digest(
        {
            "model": [checkpoint.name, checkpoint.commit],
            "weights": weights,
            "tokenizer": checkpoint.tokenizer_fingerprint(),
            # In their order, as which of them fit into `max_tokens` depends on it.
            "proxies": {w: [proxy.describe(), proxy.row_hashes] for w, proxy in proxies.items()},
            "settings": {"energy": _stored_energy(settings), **kept},
            "format": VERSION,
            "versions": versions(),
        }
    )


def _calibrate(
    checkpoint: Checkpoint,
    files: Mapping[Path, Mapping[str, Proxy]],
    settings: Settings,
    weights: str,
    ranks: Ranks,
    progress: Progress,
) -> None:
    sites = find_sites(empty_model(checkpoint))
    with ExitStack() as stack:
        reader = stack.enter_context(open_weights(checkpoint))
        model = stack.enter_context(open_blocks(checkpoint, reader, settings.device))
        sets, room = _plan(checkpoint, files, settings, model, sites)
        folder = next(iter(files)).parent
        hidden = [stack.enter_context(Spill(folder, room / len(sets))) for _ in sets]
        keys = [_key(checkpoint, own, settings, weights) for own in files.values()]
        key = digest({"files": keys, "processes": ranks.count})
        journals = {
            path: stack.enter_context(Journal(journal_of(path), key))
            for path in files
            if ranks.first
        }
        within = {path: [part for part in sets if path in part.files] for path in files}
        done = ranks.once(lambda: _go_on(journals, sets))
        if done:
            progress.note(f"{done} of {len(model.blocks)} blocks were calibrated already.")
        total = sum(part.tokens for part in sets)
        bar = stack.enter_context(progress.counter("Calibrating", total, "tok"))
        place = 0  # of two that each batch has, where its hidden states are
        for number, block in enumerate(model.blocks if done < len(model.blocks) else ()):
            # A block that was done is run for what comes behind it alone.
            seen = model.sites_of(block, sites) if number >= done else []
            places = place, 1 - place if any(site.expert for site in seen) else place
            with model.holding(block, reader):
                for part, states in zip(sets, hidden, strict=True):
                    make = partial(_moment, settings=settings, sketched=part.sketched)
                    moments, starved = _observe(
                        model, block, seen, part, make, states, places, ranks, bar
                    )
                    part.starved.extend(starved)
                    for site, found in _decompose(seen, moments, settings, ranks):
                        for path in part.files if ranks.first else ():
                            journals[path].add(f"{part.name}/{site.name}", found)
            place = places[1]
            rows = sum(len(part.rows) for part in sets) * bar.n / total
            bar.set_postfix_str(f"{rows / (bar.format_dict['elapsed'] or 1):.3g} row/s")
            for path, journal in journals.items() if number >= done else ():
                journal.finish_block({part.name: part.starved for part in within[path]})
        for path, journal in journals.items():
            origin = _origin(checkpoint, weights, within[path], settings)
            write_statistics(path, origin, sites, journal)
        for journal in journals.values():
            journal.remove()
        ranks.all(None)  # the files are there when the others go on
    for part in sets:
        for note in _notes(part, sites):
            progress.note(note)


def _go_on(journals: Mapping[Path, Journal], sets: Sequence[_Set]) -> int:
    """How many blocks are done in all `journals`; `sets` get to be as they were behind them."""
    done = min(len(journal.notes) for journal in journals.values())
    for journal in journals.values():
        journal.keep(done)
    for part in sets if done else ():
        part.starved.extend(journals[part.files[0]].notes[-1][part.name])
    return done


def _plan(
    checkpoint: Checkpoint,
    files: Mapping[Path, Mapping[str, Proxy]],
    settings: Settings,
    model: BlockModel,
    sites: Sequence[Site],
) -> tuple[list[_Set], float]:
    """What is run for `files`, and how many bytes of its hidden states may stay in memory."""
    read = {
        own: _read_set(*own, checkpoint, settings)
        for proxies in files.values()
        for own in proxies.items()
    }
    held = checkpoint.weight_bytes if loaded_whole(checkpoint) else 0
    sets: dict[tuple[str, Proxy, frozenset[str]], _Set] = {}
    room = math.inf
    for path, proxies in files.items():
        budget = plan_memory(
            model,
            sites,
            settings,
            tokens=sum(batch.ids.numel() for part in read.values() for batch in part.batches),
            longest=max(len(row.ids) for own in proxies.items() for row in read[own].rows),
            held=held,
        )
        budget.check()
        room = min(room, budget.hidden)
        for own in proxies.items():
            # What is sketched is this file's own matter: other files must not change it.
            part = replace(read[own], sketched=budget.sketched, starved=[], files=[])
            sets.setdefault((*own, budget.sketched), part).files.append(path)
    # The order of the sets in every file.
    return sorted(sets.values(), key=lambda part: SETS.index(part.name)), room


def _read_set(which: str, proxy: Proxy, checkpoint: Checkpoint, settings: Settings) -> _Set:
    """The proxy as tokens, as many as the settings allow."""
    used, places = take_rows(proxy, checkpoint, settings)
    about = {
        **proxy.describe(),
        "rows_used": len(used),
        "tokens_used": sum(len(row.ids) for row in used),
        "rows_truncated": sum(row.truncated for row in used),
        "row_hashes": [proxy.rows[place].hash for place in places],
    }
    return _Set(which, used, list(batches(used, settings.batch_size)), about)


def _notes(part: _Set, sites: Sequence[Site]) -> Iterator[str]:
    """What a person should know of the statistics."""
    rows, name, tokens = len(part.rows), part.about["name"], part.tokens
    yield f"Calibrated on {rows} rows of {part.name} ({name}), {tokens} tokens."
    if cut := part.about["rows_truncated"]:
        yield f"{cut} rows of the {part.name} proxy are longer than --max-length and were cut."
    wide = [site for site in sites if not site.diagonal and site.size > tokens]
    if wide:
        yield (
            f"The {part.name} proxy has {tokens} tokens, fewer than {len(wide)} of the "
            f"{len(sites)} sites have features: there it protects {tokens} directions at "
            "most. More rows protect more."
        )
    if part.starved:
        yield (
            f"{len(part.starved)} experts got fewer tokens of the {part.name} proxy than they have "
            "features and were shown the input of their block; the record names them."
        )
    if part.sketched:
        yield f"The second moments of {len(part.sketched)} sites are sketched."


def _stored_energy(settings: Settings) -> float:
    """How much of each trace the stored directions hold; the filter may use fewer of them."""
    return max(settings.sharpness[1], STORED_ENERGY)


def _origin(
    checkpoint: Checkpoint, weights: str, sets: Sequence[_Set], settings: Settings
) -> Origin:
    return Origin(
        model=checkpoint.name,
        commit=checkpoint.commit,
        weights=weights,
        tokenizer=checkpoint.tokenizer_fingerprint(),
        data={part.name: part.about | {"experts_shown_block_input": part.starved} for part in sets},
        settings={
            "energy": _stored_energy(settings),
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
    energy = _stored_energy(settings)
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
        return AxisMoment(site.size)
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
    view = View(part.rows, f"{part.name} proxy ({part.about['name']})")

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
