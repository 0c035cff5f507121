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

from torch import Tensor

from sage_hub.architecture import empty_model
from sage_hub.blocks import Block, BlockModel, open_blocks
from sage_hub.budget import plan_memory
from sage_hub.checkpoint import Checkpoint, digest
from sage_hub.encoding import (
    Batch,
    Encoded,
    batches,
    encode,
    load_tokenizer,
    row_limit,
    take_tokens,
)
from sage_hub.moments import (
    AxisMoment,
    Moment,
    SecondMoment,
    SketchedMoment,
    sketch_width,
    spectrum,
)
from sage_hub.observe import View, watching
from sage_hub.progress import Progress
from sage_hub.proxies import Proxy
from sage_hub.settings import Settings
from sage_hub.sites import Site, find_sites
from sage_hub.spill import Spill
from sage_hub.statistics import STORED_ENERGY, VERSION, Origin, StatisticsWriter, is_whole
from sage_hub.versions import versions
from sage_hub.weights import open_weights


@dataclass(frozen=True)
class _Set:
    """The rows of one proxy that are used."""

    name: str
    rows: Sequence[Encoded]
    batches: Sequence[Batch]

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
    progress: Progress,
) -> None:
    """Calibrate `checkpoint` on `proxies` (set -> rows) and write the statistics file `path`.

    `weights` is the checkpoint's fingerprint, which its caller has computed already. The folder
    `cache` is looked into first, and gets what was made; its files are named by all that they
    depend on. Raises OutOfMemoryError if `settings.memory` is too little, NonFiniteError with
    site and row at the first NaN or Inf in an activation.
    """
    if cache is None:
        _calibrate(checkpoint, proxies, settings, path, weights, progress)
        return
    kept = cache / f"{_key(checkpoint, proxies, settings, weights)}.safetensors"
    if is_whole(kept):
        progress.note(f"The statistics are in {cache} already; nothing is calibrated.")
    else:
        # Under a name of its own, as another run may be at the same.
        mine = kept.with_name(f"{kept.stem}.{os.getpid()}.safetensors")
        try:
            _calibrate(checkpoint, proxies, settings, mine, weights, progress)
            mine.replace(kept)
        finally:
            mine.unlink(missing_ok=True)
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
            "proxies": {which: proxy.row_hashes for which, proxy in proxies.items()},
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
    progress: Progress,
) -> None:
    sites = find_sites(empty_model(checkpoint))
    tokenizer = load_tokenizer(checkpoint)
    max_length = row_limit(checkpoint, settings.max_length)
    sets, data = [], {}
    for which, proxy in proxies.items():
        rows = encode(proxy, tokenizer, chat_template=settings.chat_template, max_length=max_length)
        places = take_tokens(rows, settings.max_tokens, settings.seed)
        used = [rows[place] for place in places]
        sets.append(_Set(which, used, list(batches(used, settings.batch_size))))
        data[which] = {
            **proxy.describe(),
            "rows_used": len(used),
            "tokens_used": sets[-1].tokens,
            "rows_truncated": sum(row.truncated for row in used),
            "experts_shown_block_input": [],
            "row_hashes": [proxy.rows[place].hash for place in places],
        }
    with ExitStack() as stack:
        reader = stack.enter_context(open_weights(checkpoint))
        model = stack.enter_context(open_blocks(checkpoint, reader, settings.device))
        budget = plan_memory(
            model,
            sites,
            settings,
            tokens=sum(batch.ids.numel() for part in sets for batch in part.batches),
            longest=max(len(row.ids) for part in sets for row in part.rows),
        )
        budget.check()
        writer = stack.enter_context(StatisticsWriter(path))
        hidden = {
            part.name: stack.enter_context(Spill(path.parent, budget.hidden / len(sets)))
            for part in sets
        }
        bar = stack.enter_context(
            progress.counter("Calibrating", sum(part.tokens for part in sets), "tok")
        )
        make = partial(_moment, settings=settings, sketched=budget.sketched)
        place = 0  # of two that each batch has, where its hidden states are
        for block in model.blocks:
            seen = model.sites_of(block, sites)
            after = 1 - place if any(site.expert for site in seen) else place
            with model.holding(block, reader):
                for part in sets:
                    moments, rare = _observe(
                        model, block, seen, part, make, hidden[part.name], (place, after), bar
                    )
                    data[part.name]["experts_shown_block_input"] += rare
                    for site in seen:
                        stored = max(settings.energy, STORED_ENERGY)
                        found = spectrum(moments.pop(site.name), stored, settings.rank)
                        writer.add(part.name, site, found)
            place = after
        origin = Origin(
            model=checkpoint.name,
            commit=checkpoint.commit,
            weights=weights,
            tokenizer=checkpoint.tokenizer_fingerprint(),
            data=data,
            settings={
                "energy": settings.energy,
                "rank": settings.rank,
                "max_tokens": settings.max_tokens,
                "max_length": max_length,
                "seed": settings.seed,
                "chat_template": settings.chat_template,
                "moments": settings.moments,
            },
        )
        writer.finish(origin, sites)


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
        for number, batch in enumerate(part.batches):
            view.show(batch, model.device)
            yield number, batch, model.run(block, batch, hidden.get(2 * number + places[0]))

    with watching(model, sites, moments, view):
        for number, batch, states in batches_run():
            view.observe_ends(sites, moments, states)
            if not block.finishes:
                hidden.put(2 * number + places[1], states)
            bar.update(int(batch.mask.sum()) / len(model.blocks))
    starved = [site for site in sites if site.expert and moments[site.name].tokens < site.size]
    moments |= {site.name: make(site) for site in starved}
    with watching(model, starved, moments, view, routed=False):
        for _ in batches_run() if starved else ():
            pass
    return moments, [site.name for site in starved]
