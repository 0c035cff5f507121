"""Run the proxies through the base model, block by block, and write what every site has seen."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sage_hub.calibration.cache import link, statistics_key
from sage_hub.calibration.journal import Journal, begun, journal_of
from sage_hub.calibration.observe import Sight, View, watching
from sage_hub.calibration.sets import CalibrationSet, notes_on, origin_of, plan_sets
from sage_hub.calibration.statistics import is_whole, stored_energy, write_statistics
from sage_hub.checkpoint.files import digest
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.kinds import DATE
from sage_hub.method.moments import Moment, SecondMoment, SketchedMoment, sketch_width
from sage_hub.method.spectra import Spectrum, spectrum
from sage_hub.model.blocks import Block, BlockModel, open_blocks
from sage_hub.model.compute import type_of
from sage_hub.model.sites import Site, find_sites
from sage_hub.model.spill import Spill
from sage_hub.model.weights import open_weights
from sage_hub.rows.encoding import Batch
from sage_hub.rows.proxies import Proxy
from sage_hub.runtime.ranks import Ranks
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings


def calibrate(
    checkpoint: Checkpoint,
    files: Mapping[Path, Mapping[str, Proxy]],
    settings: Settings,
    *,
    weights: str,
    run: Run = Run(),  # noqa: B008 - frozen
) -> None:
    """Calibrate `checkpoint` and write statistics files: path -> its proxies (set -> rows).

    Several files come from one pass over the weights, in which a proxy that is in several of them
    is run once; each is, byte for byte on a CPU, what it is if it is made alone. `weights` is the
    checkpoint's fingerprint, which its caller has computed already. The folder `run.stats_cache` is
    looked into first, and gets what was made; its files are named by all that they depend on.

    Raises OutOfMemoryError if `settings.memory` is too little, NonFiniteError with site and row
    at the first NaN or Inf in an activation. With several ranks each takes a part of the rows,
    and the first writes the files, which all must be able to read.
    """
    cache, ranks, note = run.stats_cache, run.ranks, run.progress.note
    if cache is None:
        _calibrate(checkpoint, files, settings, weights, run)
        return
    kept = {
        path: cache / f"{statistics_key(checkpoint, proxies, settings, weights)}.safetensors"
        for path, proxies in files.items()
    }
    missing = {
        path: proxies
        for path, proxies in files.items()
        if not ranks.once(partial(is_whole, kept[path]))
    }
    if not missing:
        note(f"The statistics are in {cache} already; nothing is calibrated.")
    elif len(missing) < len(files):
        found = len(files) - len(missing)
        note(f"{found} of {len(files)} statistics files are in {cache} already.")
    if missing:
        _calibrate(checkpoint, missing, settings, weights, run)
    for path in files:
        there, here = (path, kept[path]) if path in missing else (kept[path], path)
        ranks.once(partial(link, there, here))


def _calibrate(
    checkpoint: Checkpoint,
    files: Mapping[Path, Mapping[str, Proxy]],
    settings: Settings,
    weights: str,
    run: Run,
) -> None:
    ranks, note = run.ranks, run.progress.note
    sites, dtype = find_sites(checkpoint.empty_model()), type_of(settings.compute_dtype)
    with ExitStack() as stack:
        reader = stack.enter_context(open_weights(checkpoint))
        model = stack.enter_context(open_blocks(checkpoint, reader, settings.device, dtype))
        sets, room = plan_sets(checkpoint, files, settings, model, sites)
        folder = next(iter(files)).parent
        hidden = [stack.enter_context(Spill(folder, room / len(sets))) for _ in sets]
        key = _journal_key(checkpoint, files, settings, weights, ranks)
        journals = {
            path: stack.enter_context(Journal(journal_of(path), key, settings.date))
            for path in files
            if ranks.first
        }
        within = {path: [part for part in sets if path in part.files] for path in files}
        done = ranks.once(lambda: _go_on(journals, sets))
        if done:
            note(f"{done} of {len(model.blocks)} blocks were calibrated already.")
        total = sum(part.tokens for part in sets)
        bar = stack.enter_context(run.progress.counter("Calibrating", total, "tok"))
        place = 0  # of two that each batch has, where its hidden states are
        for number, block in enumerate(model.blocks if done < len(model.blocks) else ()):
            # A block that was done is run for what comes behind it alone.
            seen = model.sites_of(block, sites) if number >= done else []
            places = place, 1 - place if any(site.expert for site in seen) else place
            with model.holding(block, reader):
                for part, states in zip(sets, hidden, strict=True):
                    look = _Look(model, block, part, settings, ranks)
                    sights = look.at(seen, states, places, bar)
                    for site, found, outputs in _decompose(seen, sights, settings, ranks):
                        for path in part.files if ranks.first else ():
                            journals[path].add(f"{part.name}/{site.name}", found, outputs)
            place = places[1]
            rows = sum(len(part.rows) for part in sets) * bar.n / total
            bar.set_postfix_str(f"{rows / (bar.format_dict['elapsed'] or 1):.3g} row/s")
            for path, journal in journals.items() if number >= done else ():
                journal.finish_block({part.name: part.starved for part in within[path]})
        checkpoint.check_unchanged()
        for path, journal in journals.items():
            origin = origin_of(checkpoint, weights, within[path], settings)
            write_statistics(path, origin, sites, journal)
        for journal in journals.values():
            journal.remove()
        ranks.all(None)  # the files are there when the others go on
    for part in sets:
        for sentence in notes_on(part, sites):
            note(sentence)


def on_day_begun(
    checkpoint: Checkpoint,
    files: Mapping[Path, Mapping[str, Proxy]],
    settings: Settings,
    weights: str,
    run: Run,
) -> Settings:
    """`settings` with the date of the run that has begun the same on another day, if one has."""
    day, key = run.ranks.once(lambda: begun(next(iter(files))))
    then = replace(settings, date=day) if DATE.fits(day) else settings
    if then == settings or _journal_key(checkpoint, files, then, weights, run.ranks) != key:
        return settings
    run.progress.note(f"The prompts have the date {day}, as those of the run that began this.")
    return then


def _journal_key(
    checkpoint: Checkpoint,
    files: Mapping[Path, Mapping[str, Proxy]],
    settings: Settings,
    weights: str,
    ranks: Ranks,
) -> str:
    keys = [statistics_key(checkpoint, own, settings, weights) for own in files.values()]
    return digest({"files": keys, "processes": ranks.count})


def _go_on(journals: Mapping[Path, Journal], sets: Sequence[CalibrationSet]) -> int:
    """How many blocks are done in all `journals`; `sets` get to be as they were behind them."""
    done = min(len(journal.notes) for journal in journals.values())
    for journal in journals.values():
        journal.keep(done)
    for part in sets if done else ():
        part.starved.extend(journals[part.files[0]].notes[-1][part.name])
    return done


def _decompose(
    sites: Sequence[Site], sights: dict[str, Sight], settings: Settings, ranks: Ranks
) -> Iterator[tuple[Site, Spectrum, dict[str, float]]]:
    """The spectra of `sights`, which are dropped as they are done, in the first rank.

    With each the mean of ‖W x‖² of its maps.

    Every rank decomposes every n-th.
    """
    energy = stored_energy(settings)
    for start in range(0, len(sites), ranks.count):
        some = sites[start : start + ranks.count]
        own = [sights[site.name].moment for site in ranks.mine(some)]
        found = ranks.to_first([spectrum(moment, energy, settings.rank) for moment in own])
        sums = [sights.pop(site.name).outputs for site in some]
        for site, outputs, (one,) in zip(some, sums, found, strict=False):
            yield site, one, {name: total / one.tokens for name, total in outputs.items()}


def _add_up(sights: Collection[Sight], ranks: Ranks) -> None:
    """Put what all ranks have seen into each of them."""
    if ranks.count == 1:
        return
    moments = [sight.moment for sight in sights]
    tokens = torch.tensor([moment.tokens for moment in moments])
    sketches = [moment for moment in moments if isinstance(moment, SketchedMoment)]
    squares = torch.tensor([moment.squares for moment in sketches], dtype=torch.float64)
    outputs = torch.tensor(
        [one for sight in sights for one in sight.outputs.values()], dtype=torch.float64
    )
    for tensor in (tokens, squares, outputs, *(moment.total for moment in moments)):
        ranks.add_up(tensor)
    left = iter(outputs.tolist())
    for sight in sights:
        sight.outputs = dict(zip(sight.outputs, left, strict=False))
    for moment, count in zip(moments, tokens.tolist(), strict=True):
        moment.tokens = count
    for sketch, sum_of in zip(sketches, squares.tolist(), strict=True):
        sketch.squares = sum_of


@dataclass(frozen=True)
class _Look:
    """One set on its way through one block."""

    model: BlockModel
    block: Block
    part: CalibrationSet
    settings: Settings
    ranks: Ranks

    def at(
        self, sites: Sequence[Site], hidden: Spill, places: tuple[int, int], bar: Any
    ) -> dict[str, Sight]:
        """What is seen of `sites`, by name. Raises NonFiniteError.

        `hidden` has the states of batch n before the block at 2 n + places[0], and gets those
        behind it at 2 n + places[1]. An expert sees the tokens that are routed to it. Where those
        are fewer than it has features, they say too little, and it is shown the input of its whole
        block instead, in a second pass; the set names these.
        """
        part, block, ranks = self.part, self.block, self.ranks
        sights = {site.name: self._sight(site) for site in sites}
        view = View(part.rows, f"{part.name} proxy ({part.about['name']})")

        def batches_run() -> Iterator[tuple[int, Batch, Tensor]]:
            for number, batch in enumerate(ranks.mine(part.batches)):
                view.show(batch, self.model.device)
                before = hidden.get(2 * number + places[0])
                yield number, batch, self.model.run(block, batch, before)

        with watching(self.model, sites, sights, view):
            for number, batch, states in batches_run():
                if not block.finishes:
                    hidden.put(2 * number + places[1], states)
                bar.update(ranks.count * int(batch.mask.sum()) / len(self.model.blocks))
        _add_up(sights.values(), ranks)
        starved = [
            site for site in sites if site.expert and sights[site.name].moment.tokens < site.size
        ]
        sights |= {site.name: self._sight(site) for site in starved}
        with watching(self.model, starved, sights, view, routed=False):
            for _ in batches_run() if starved else ():
                pass
        _add_up([sights[site.name] for site in starved], ranks)
        part.starved.extend(site.name for site in starved)
        return sights

    def _sight(self, site: Site) -> Sight:
        return Sight(self._moment(site), dict.fromkeys(site.modules, 0.0))

    def _moment(self, site: Site) -> Moment:
        if site.name in self.part.sketched:
            seed = zlib.crc32(site.name.encode()) ^ self.settings.seed
            width = sketch_width(site.size, self.settings.rank)
            return SketchedMoment(site.size, width, seed, self.settings.device)
        return SecondMoment(site.size, self.settings.device)
