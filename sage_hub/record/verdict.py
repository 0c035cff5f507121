"""The verdict on a release in words: what came back, what is forgotten, what nobody looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sage_hub.record.gates import Outcome
from sage_hub.record.tables import MODELS, main_lines, not_run, number

NAMED = 4  # of what was not run: more are counted

Record = Mapping[str, Any]


class Remark(NamedTuple):
    """A sentence, and whether it speaks for the release: good, bad, unsure, or only told."""

    tone: str
    text: str


def verdict(manifest: Record, report: Record) -> list[Remark]:
    """What a reader has to know first, by the record alone."""
    lines = {line["set"]: line for line in main_lines(report)}
    return [
        _came_back(report, lines.get("heldout")),
        _forgotten(lines.get("forget")),
        *_forgotten_otherwise(report, lines.get("forget")),
        *_against_control(report, lines.get("heldout")),
        *_search(manifest),
        _gates(report),
        *_not_run(report),
    ]


def _came_back(report: Record, line: Record | None) -> Remark:
    if line is None:
        return Remark(
            "unsure",
            "Nobody knows what came back: there is no held-out set, so retention was not measured "
            "on rows that calibration had not seen.",
        )
    figures = _figures(line)
    found = report["retain_recovered"]
    if found is None:
        lost = "Nothing of the held-out set was lost beyond noise, so there is nothing to come back"
        return Remark("unsure", f"{lost}: {figures}.")
    share, sure = f"{100 * found['value']:.0f} %", ""
    if found["interval"] is not None:
        low, high = found["interval"]
        sure = f" (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"
    if found["value"] < 0:
        return Remark(
            "bad",
            f"Nothing came back: the held-out {found['metric']} fell further than unlearning had "
            f"brought it{sure}: {figures}.",
        )
    sentence = (
        f"{share} of the held-out {found['metric']} that unlearning had cost came back{sure}: "
        f"{figures}."
    )
    certain = found["interval"] is not None and found["interval"][0] > 0
    return Remark("good" if certain else "unsure", sentence)


def _forgotten(line: Record | None) -> Remark:
    if line is None or line["sanitized"] is None or line["unlearned"] is None:
        return Remark(
            "unsure",
            "Nobody knows what is forgotten: no forget set was evaluated, so this release may know "
            "again what had to go.",
        )
    figures, gap = _figures(line), line["difference"]
    if gap is None:
        return Remark("unsure", f"Whether it forgets as much as its source is not sure: {figures}.")
    said = {
        "within noise": ("good", "It forgets as much as its source, as far as these rows can tell"),
        "better": ("good", "It forgets more than its source"),
        "worse": ("bad", "It forgets less than its source: some of what had to go is back"),
    }
    tone, sentence = said[gap["verdict"]]
    low, high = gap["interval"]
    return Remark(
        tone,
        f"{sentence}. {figures[0].upper()}{figures[1:]} (the change from the unlearned model is "
        f"{number(gap['value'], True)}, 95 % interval {number(low, True)} to "
        f"{number(high, True)}).",
    )


def _forgotten_otherwise(report: Record, line: Record | None) -> Iterator[Remark]:
    """Where other figures of the forget set than the main one say that some of it is back."""
    worse = [
        gap["metric"]
        for gap in report["differences"]
        if (gap["model"], gap["other"], gap["set"]) == ("sanitized", "unlearned", "forget")
        and gap["condition"] is None
        and gap["verdict"] == "worse"
        and (line is None or gap["metric"] != line["metric"])
    ]
    if worse:
        yield Remark(
            "unsure",
            f"Other figures of the forget set are worse than the source's: {', '.join(worse)}. "
            "Read the answers to its questions, those first that came back most.",
        )


def said_again(rows: Sequence[Record]) -> Iterator[Remark]:
    """Whether a question to forget is answered again as the base answers it, row by row."""
    asked = [row for row in rows if row["set"] == "forget" and row["said"]]
    again = [row["row"] for row in asked if _is_again(*map(_folded, row["said"]))]
    if again:
        more = len(again) - NAMED
        named = f"{', '.join(again[:NAMED])}{f' and {more} more' * (more > 0)}"
        how = (
            "is answered again as the base answers it"
            if len(again) == 1
            else ("are answered again as the base answers them")
        )
        yield Remark(
            "bad",
            f"{len(again)} of {len(asked)} questions to forget {how}, and not as by the unlearned "
            f"model: {named}.",
        )


def _is_again(base: str, unlearned: str, sanitized: str) -> bool:
    return bool(base) and sanitized == base != unlearned


def _folded(said: str | None) -> str:
    return " ".join((said or "").casefold().split())


def _figures(line: Record) -> str:
    """The figures of a line, model by model."""
    told = [
        f"{MODELS[name]} {number(line[name])}"
        for name in ("base", "unlearned", "reference", "sanitized")
        if line[name] is not None
    ]
    which = "held-out" if line["set"] == "heldout" else line["set"]
    return f"{which} {line['metric']} ({line['direction']} is better) {', '.join(told)}"


def _against_control(report: Record, line: Record | None) -> Iterator[Remark]:
    """Whether it is more than a weaker update, where the control is one."""
    if line is None or report["control_by"] not in ("forgetting", "size"):
        return
    for gap in report["differences"]:
        if (gap["other"], gap["set"], gap["metric"], gap["condition"]) == (
            *("control", "heldout", line["metric"]),
            None,
        ):
            control = f"the control αΔ (α = {report['control_alpha']:.3g})"
            alike = "forgets as much" if report["control_by"] == "forgetting" else "is as large"
            values = f"{number(line['sanitized'])} against {number(line['control'])}"
            if gap["verdict"] == "better":
                yield Remark(
                    "good",
                    f"It keeps more than {control}, a weaker update that {alike}: held-out "
                    f"{line['metric']} {values}.",
                )
            else:
                yield Remark(
                    "bad",
                    f"It keeps no more than {control}, a weaker update that {alike} and takes no "
                    f"repair: held-out {line['metric']} {values} ({gap['verdict']}).",
                )


def _search(manifest: Record) -> Iterator[Remark]:
    search = manifest.get("gain_search") or {}
    if search.get("outcome") == "held back":
        yield Remark(
            "unsure",
            f"The search for the gain ended before it reached {search['of']}: a larger one would "
            "harm retained rows more than the source does.",
        )
    if search.get("outcome") == "largest" and "of" in search:
        yield Remark(
            "bad",
            f"The largest gain that is tried does not reach {search['of']}: the filter leaves too "
            "little of the update. A softer one leaves more (a smaller strength or energy).",
        )


def _gates(report: Record) -> Remark:
    outcomes = [Outcome(**gate) for gate in report["gates"]]
    if not outcomes:
        return Remark("unsure", "No gate was set, so nobody said beforehand what it must meet.")
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if not failed:
        which = "The one gate is" if len(outcomes) == 1 else f"All {len(outcomes)} gates are"
        return Remark("good", f"{which} met.")
    sentences = "; ".join(outcome.sentence() for outcome in failed)
    which = "is" if len(failed) == 1 else "are"
    return Remark("bad", f"{len(failed)} of {len(outcomes)} gates {which} not met: {sentences}.")


def _not_run(report: Record) -> Iterator[Remark]:
    entries = [f"{one['what']} ({one['reason']})" for one in not_run(report)]
    if entries:
        more = len(entries) - NAMED
        rest = f"; and {more} more, which are listed below" if more > 0 else ""
        yield Remark("unsure", f"Not run: {'; '.join(entries[:NAMED])}{rest}.")
