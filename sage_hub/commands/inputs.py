"""The files that the settings name: sets, results and gates, read for all commands alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import UsageError
from sage_hub.evaluation.comparison import Result
from sage_hub.evaluation.evaluate import expected_names
from sage_hub.evaluation.imported import read_results
from sage_hub.record.gates import ALWAYS_KNOWN, Gate, check_names, parse
from sage_hub.record.tables import MODELS
from sage_hub.repair.plan import Plan
from sage_hub.rows.encoding import check_rows
from sage_hub.rows.proxies import Proxy, check_disjoint
from sage_hub.rows.sources import read_proxy
from sage_hub.settings import Settings


@dataclass
class Inputs:
    """The files that the settings name, as far as they could be read."""

    settings: Settings
    calibrates: bool
    proxies: dict[str, Proxy] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    shown: dict[str, str] = field(default_factory=dict)  # the first row of each set, as seen

    def read_results(self, sides: Mapping[str, Checkpoint]) -> None:
        """Results made elsewhere; what they say of a side must be of it."""
        for model, path in self.settings.results.items():
            name, commit = (s.name, s.commit) if (s := sides.get(model)) else ("", None)
            self.results += read_results(model, path, name=name, commit=commit)

    def read_sets(self) -> None:
        """The sets, and whether there are those that the gain is found by."""
        settings = self.settings
        self.proxies |= read_proxies(settings, calibrates=self.calibrates)
        if settings.gain == "match" and self.calibrates and "forget" not in self.proxies:
            raise UsageError("--gain match is measured on the forget proxy; give --forget.")
        if settings.gain_rule == "search" and "retain" not in self.proxies:
            raise UsageError(
                "The gain is searched for on the forget rows, and held back by retain rows, which "
                "statistics don't hold: give --retain beside --stats, or --gain match."
            )
        if settings.target is not None and settings.gain_rule != "search":
            raise UsageError(
                "--target is reached by evaluating the forget set; give --forget, no --low-disk."
            )

    def check_rows(self, plan: Plan, reference: Checkpoint | None) -> None:
        """That every model can be shown every row."""
        models = [plan.unlearned, *([reference] if reference else [])]
        self.shown |= check_rows(self.proxies, plan.base, self.settings, *models)

    def read_gates(self) -> None:
        """The gates, after all that they can be about; nothing if the sets could not be read."""
        settings = self.settings
        self.gates += map(parse, settings.gates)
        if not self.proxies.keys() >= settings.sets.keys():
            return
        models = [*MODELS, *(["reference"] if settings.reference else [])]
        known = {*expected_names(self.proxies, settings, models), *ALWAYS_KNOWN}
        for result in self.results:
            known |= {f"{result.model}.{result.set}.{result.metric}"}
            known |= {f"{result.set}.{result.metric}"} if result.model == "sanitized" else set()
        tasks = [task.strip() for task in (settings.lm_eval or "").split(",")]
        check_names(self.gates, known, tasks)


def read_proxies(settings: Settings, *, calibrates: bool) -> dict[str, Proxy]:
    """The sets that are given, read and checked to be disjoint.

    Without a retain proxy the general-purpose one stands in, if it is to calibrate on.
    """
    sources: dict[str, str | None] = {"retain": None} if calibrates else {}
    proxies = {which: read_proxy(source) for which, source in (sources | settings.sets).items()}
    check_disjoint({which: proxy.hashes for which, proxy in proxies.items()})
    return proxies
