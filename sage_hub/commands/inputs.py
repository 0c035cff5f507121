"""The files that the settings name: sets, results and gates, read for all commands alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sage_hub.calibration.budget import RUNTIME
from sage_hub.calibration.estimate import cache_bytes, weight_bytes
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import NetworkError, UsageError, about
from sage_hub.evaluation.comparison import Result
from sage_hub.evaluation.evaluate import expected_names
from sage_hub.evaluation.imported import read_results
from sage_hub.evaluation.scoring import ROWS_PER_BATCH
from sage_hub.evaluation.written import LONGEST, NAME, check_opening
from sage_hub.model.compute import type_of
from sage_hub.record.gates import ALWAYS_KNOWN, Gate, check_names, parse
from sage_hub.record.tables import MODELS
from sage_hub.repair.plan import Plan
from sage_hub.rows.encoding import check_rows
from sage_hub.rows.forms import parse_rows
from sage_hub.rows.proxies import Proxy, about_set, check_disjoint
from sage_hub.rows.sources import is_dataset, read_proxy
from sage_hub.runtime.machine import GB
from sage_hub.runtime.progress import in_bytes
from sage_hub.settings import GUARD, Settings

# What a set that the base will write is taken for before that, to know the names of its figures.
EXAMPLE = Proxy(NAME, parse_rows([{"question": "What is it?", "answer": "It is this."}], NAME))


@dataclass(frozen=True)
class Supply:
    """Where the rows come from that a run needs and that nobody has given."""

    written: tuple[str, ...] = ()  # the sets that the base writes
    general: tuple[str, ...] = ()  # the sets that general texts stand in for
    why: str = ""  # the base does not write them

    @classmethod
    def of(cls, base: Checkpoint, settings: Settings, *, calibrates: bool) -> Supply:
        """What a run of `settings` needs: the base writes it if it fits into memory as a whole."""
        needs = {
            "retain": settings.retain is None and (calibrates or settings.gain_rule == "search"),
            GUARD: settings.gain_rule == "keep",
        }
        sets = tuple(which for which, needed in needs.items() if needed)
        if not sets:
            return cls()
        if settings.low_disk:
            return cls(general=sets, why="with --low-disk it is never here as a whole")
        model = base.empty_model(type_of(settings.compute_dtype))
        tokens = ROWS_PER_BATCH * settings.batch_size * LONGEST  # as its answers are written
        needed = weight_bytes(model) + cache_bytes(model, tokens) + RUNTIME
        limit = settings.memory * GB
        if needed > limit:
            why = f"it takes {in_bytes(needed)} of memory, and --memory allows {in_bytes(limit)}"
            return cls(general=sets, why=why)
        return cls(written=sets)


@dataclass
class Inputs:
    """The files that the settings name, as far as they could be read."""

    settings: Settings
    calibrates: bool
    supply: Supply
    unreachable: bool = False  # the Hub, for one of them: the others on it are not asked for
    read: dict[str, Proxy] = field(default_factory=dict)  # those that are given
    proxies: dict[str, Proxy] = field(default_factory=dict)  # all, once all could be read
    results: list[Result] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    shown: dict[str, str] = field(default_factory=dict)  # the first row of each set, as seen

    @about("results", "--results")
    def read_results(self, sides: Mapping[str, Checkpoint]) -> None:
        """Results made elsewhere; what they say of a side must be of it."""
        for model, path in self.settings.results.items():
            name, commit = (s.name, s.commit) if (s := sides.get(model)) else ("", None)
            self.results += read_results(model, path, name=name, commit=commit)

    def read_set(self, which: str) -> None:
        """One of the sets that are given, if it is not known that nobody answers for it."""
        source = self.settings.sets[which]
        if self.unreachable and is_dataset(source):
            return
        try:
            with about_set(which):
                self.read[which] = read_proxy(source)
        except NetworkError:
            self.unreachable = True
            raise

    def compare_sets(self) -> None:
        """The sets together, and whether there are those that the gain is found by."""
        settings = self.settings
        if self.read.keys() < settings.sets.keys():
            return  # which is a problem of its own
        self.proxies |= _disjoint(self.read, general_texts(self.supply.general))
        if settings.gain == "match" and self.calibrates and "forget" not in self.proxies:
            raise UsageError("--gain match is measured on the forget proxy; give --forget.")
        if settings.target is not None and settings.gain_rule != "search":
            raise UsageError(
                "--target is reached by evaluating the forget set; give --forget, no --low-disk."
            )

    def check_rows(self, plan: Plan, reference: Checkpoint | None) -> None:
        """That every model can be shown every row."""
        models = [plan.unlearned, *([reference] if reference else [])]
        self.shown |= check_rows(self.proxies, plan.base, self.settings, *models)
        if self.supply.written:  # so that what the base writes can be shown to them too
            check_rows({GUARD: EXAMPLE}, plan.base, self.settings, *models)
            check_opening(plan.base, self.settings)

    @about("gates", "--gate")
    def read_gates(self) -> None:
        """The gates, after all that they can be about; nothing if the sets could not be read."""
        settings = self.settings
        self.gates += map(parse, settings.gates)
        if not self.proxies.keys() >= settings.sets.keys():
            return
        models = [*MODELS, *(["reference"] if settings.reference else [])]
        written = {which: EXAMPLE for which in self.supply.written}
        known = {*expected_names({**written, **self.proxies}, settings, models), *ALWAYS_KNOWN}
        for result in self.results:
            known |= {f"{result.model}.{result.set}.{result.metric}"}
            known |= {f"{result.set}.{result.metric}"} if result.model == "sanitized" else set()
        tasks = [task.strip() for task in (settings.lm_eval or "").split(",")]
        check_names(self.gates, known, tasks)


def read_proxies(settings: Settings, others: Mapping[str, Proxy] = {}) -> dict[str, Proxy]:
    """The sets that are given, and `others` in the place of those that are not; all disjoint."""
    given = {}
    for which, source in settings.sets.items():
        with about_set(which):
            given[which] = read_proxy(source)
    return _disjoint(given, others)


def _disjoint(given: Mapping[str, Proxy], others: Mapping[str, Proxy]) -> dict[str, Proxy]:
    proxies = {**others, **given}
    check_disjoint({which: proxy.hashes for which, proxy in proxies.items()})
    return proxies


def general_texts(sets: Sequence[str] = ("retain",)) -> dict[str, Proxy]:
    """The texts that come with sage-hub as these sets, every third one as a guard row."""
    proxy = read_proxy(None)
    if GUARD not in sets:
        return dict.fromkeys(sets, proxy)
    others = tuple(row for number, row in enumerate(proxy.rows) if number % 3)
    parts = {GUARD: proxy.rows[::3], "retain": others}
    return {which: replace(proxy, rows=parts[which]) for which in sets}
