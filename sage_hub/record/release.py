"""A finished release: what is said of it, and how gates stop it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sage_hub.errors import GateError, UsageError
from sage_hub.evaluation.comparison import Result
from sage_hub.record.card import write_card
from sage_hub.record.gates import Gate, Outcome, facts_of
from sage_hub.record.manifest import REPORT, as_json, read_record, with_results
from sage_hub.record.signing import sign
from sage_hub.record.sums import is_edited, signatures_in, write_sums
from sage_hub.runtime.disk import write_whole


@dataclass(frozen=True)
class Release:
    """A finished release: where it is, and its record."""

    location: str  # the commit's or PR's URL, or the folder
    manifest: Mapping[str, Any]
    report: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    announced: str | None = None  # the URL of the pull request on the unlearned model's repo
    sent: bool = False  # its shards, which are not in that folder any more

    @property
    def lies(self) -> str:
        """What of it lies at its location."""
        return "the record of the release" if self.sent else "the release"


@dataclass(frozen=True)
class Terms:
    """What is said of a release, and does not change it."""

    gates: Sequence[Gate] = ()
    results: Sequence[Result] = ()  # made elsewhere
    card_template: str | None = None
    sign: str | None = None  # a command that signs the sums

    def outcomes(
        self, manifest: Mapping[str, Any], report: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """How each gate comes out."""
        facts = facts_of(manifest, report)
        return [asdict(gate.check(facts)) for gate in self.gates]

    def conclude(
        self, folder: Path, manifest: Mapping[str, Any], report: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The report with results made elsewhere and the gates' outcomes, in `folder` with its
        card."""
        full = with_results(report, self.results)
        full["gates"] = self.outcomes(manifest, full)
        same = full == read_record(folder / REPORT)
        # A report with another sum: a run was stopped between the two.
        unsigned = self.sign is not None and not signatures_in(folder)
        if not same or unsigned or is_edited(folder, REPORT) or self.card_template is not None:
            write_record(folder, manifest, full, self.card_template, self.sign)
        return full


def write_record(
    folder: Path,
    manifest: Mapping[str, Any],
    report: Mapping[str, Any],
    template: str | None = None,
    signer: str | None = None,
) -> None:
    """Write what is said of a release: its card, its report, and last the sums of all of it.

    `signer` is a command that signs these.

    Raises UsageError for a link in `folder`: what is written there would come to lie elsewhere.
    """
    if link := next((path for path in folder.rglob("*") if path.is_symlink()), None):
        raise UsageError(
            f"{link.relative_to(folder)} of {folder} is a link, and what is written to it would "
            "come to lie elsewhere; give a folder that holds the files themselves."
        )
    text = as_json(report)  # what cannot be written leaves the card as it is
    write_card(folder, manifest, report, template)
    write_whole(folder / REPORT, text)
    write_sums(folder, manifest)
    if signer is not None:
        sign(folder, signer)


def stop_at_gates(release: Release) -> Release:
    """The release again. Raises GateError, which has it, if it does not meet a gate."""
    failed = [Outcome(**gate) for gate in release.report["gates"] if not gate["passed"]]
    if failed:
        many = "s are" if len(failed) > 1 else " is"
        public = release.location.startswith("http")
        state = "this release is published already" if public else "nothing was published"
        where = f"The release and its record are in {release.location}."
        if release.sent:
            where = (
                f"Its record is in {release.location}; its shards are sent, seen by nobody, and "
                "not sent again by the same command with other gates."
            )
        raise GateError(
            f"{len(failed)} gate{many} not met, and {state}: "
            f"{'; '.join(outcome.sentence() for outcome in failed)}. {where}",
            release,
        )
    return release
