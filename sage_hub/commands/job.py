"""A job as data: everything that a run needs, before anything is computed or written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from sage_hub.calibration.budget import Budget
from sage_hub.calibration.calibrate import calibrate
from sage_hub.calibration.statistics import Ready, Statistics, open_statistics
from sage_hub.checkpoint.files import digest
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.checkpoint.location import Location
from sage_hub.commands.inputs import Supply
from sage_hub.errors import SageHubError
from sage_hub.evaluation.comparison import Result
from sage_hub.kinds import DATE
from sage_hub.publish.target import Publication
from sage_hub.record.gates import Gate
from sage_hub.record.manifest import describe_source
from sage_hub.repair.plan import Plan
from sage_hub.rows.proxies import Proxy
from sage_hub.runtime.run import Run
from sage_hub.runtime.versions import versions
from sage_hub.settings import MODELS, Settings


def output_of(target: Location) -> Path:
    """Where a release to `target` is made."""
    if target.folder is not None:
        return target.folder
    return Path(HF_HOME) / "sage-hub" / target.repo.replace("/", "--")


@dataclass(frozen=True)
class Job:
    """What is to be made of which pair, with what, where to, and what speaks against it."""

    plan: Plan
    settings: Settings
    proxies: Mapping[str, Proxy]  # those of retain, forget, heldout that there are
    fingerprints: Mapping[str, str]  # "tokenizer"; "base" and "unlearned" once weights are checked
    statistics: Ready | None  # instead of calibrating
    target: Location = field(default_factory=lambda: Location(None))
    memory: Budget | None = None  # what calibration and evaluation take, at most
    gates: tuple[Gate, ...] = ()
    results: tuple[Result, ...] = ()  # made elsewhere, for the same record
    reference: Checkpoint | None = None  # a model that never saw the forget set
    of_today: bool = False  # prompts have a date, and it is the clock's: nobody gave one
    publication: Publication = field(default_factory=Publication)  # if the target is on the Hub
    force: bool = False
    run: Run = field(default_factory=Run)
    supply: Supply = field(default_factory=Supply)  # where rows come from that nobody gave
    shown: Mapping[str, str] = field(default_factory=dict)  # the first row of each set, as seen
    warnings: tuple[str, ...] = ()
    problems: tuple[SageHubError, ...] = ()  # each would stop the run

    @property
    def output(self) -> Path:
        """Where the release is made: the target, or a folder of ours until it is published."""
        return output_of(self.target)

    @property
    def keeps_output(self) -> bool:
        """Whether all finished shards stay until the end: the result, or what is evaluated."""
        evaluates = {*self.proxies, *self.supply.written} - {"retain"}
        return self.target.folder is not None or not self.settings.low_disk or bool(evaluates)

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        """Both sides for the record."""
        sides = {"base": self.plan.base, "unlearned": self.plan.unlearned}
        return {
            name: describe_source(side, self.fingerprints[name]) for name, side in sides.items()
        }

    @property
    def local(self) -> dict[str, set[Path]]:
        """What is on this machine alone, as the record names it -> where it lies.

        Of two places under one name no record, and so no rebuild, can tell which is meant.
        """
        own, described = self.settings, self.settings.describe()
        sides = (self.plan.base, self.plan.unlearned)
        named = [(f"./{s.name}", s.files.location.folder) for s in sides if s.commit is None]
        named += [(Path(s).name, Path(s)) for s in own.sets.values() if "://" not in s]
        models = {name: described[name] or "" for name in MODELS}
        named += [(m, Path(getattr(own, n))) for n, m in models.items() if m.startswith("./")]
        if self.statistics is not None and self.statistics.name.endswith(".safetensors"):
            named.append((self.statistics.name, self.statistics.path()))
        found: dict[str, set[Path]] = {}
        for name, place in named:
            found.setdefault(name, set()).add((place or Path()).expanduser().resolve())
        return found

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over all that the release is made from: the same for the same release."""
        unlearned = self.plan.unlearned.files
        beside = [*self.plan.carried, *(["README.md"] if "README.md" in unlearned.sizes else [])]
        return digest(
            {
                "sources": self.sources,
                "tokenizer": self.fingerprints["tokenizer"],
                "beside the weights": {name: unlearned.sha256(name) for name in beside},
                # In their order, as which of them fit into `max_tokens` depends on it.
                "proxies": {w: [p.fingerprint, p.row_hashes] for w, p in self.proxies.items()},
                "reference": self.reference.fingerprint() if self.reference else None,
                "statistics": self.statistics.sha256() if self.statistics else None,
                "settings": self.settings.describe(),
                "versions": versions(),
            }
        )

    def on_day(self, day: Any) -> Job:
        """The same with the date `day` in its prompts, if theirs is that of the clock."""
        if not self.of_today or not DATE.fits(day) or day == self.settings.date:
            return self
        return replace(self, settings=replace(self.settings, date=day))

    def has_made(self, manifest: Mapping[str, Any]) -> bool:
        """Whether this job, begun today or on the day that the manifest has, makes that release."""
        settings = manifest.get("settings")
        day = settings.get("date") if isinstance(settings, Mapping) else None
        return bool(self.on_day(day).fingerprint == manifest.get("fingerprint"))

    @contextmanager
    def calibrated(self, path: Path, *, forget: bool = False) -> Iterator[Statistics]:
        """The ready statistics, or new ones of the base in the file `path`, if not there yet.

        The forget proxy is taken in if asked for, or if the gain is measured on it.
        """
        if self.statistics is None and not self.run.ranks.once(path.exists):
            measured = forget or self.settings.gain_rule != "number"
            sets = ("retain", "forget") if measured else ("retain",)
            base = self.plan.base
            calibrate(
                base.passing(path.parent / "downloads") if self.settings.low_disk else base,
                {path: {which: self.proxies[which] for which in sets if which in self.proxies}},
                self.settings,
                weights=self.fingerprints["base"],
                run=self.run,
            )
        with open_statistics(self.statistics.path() if self.statistics else path) as opened:
            yield opened
