"""What GitHub Actions shows of a run: job summary, outputs, annotations. Elsewhere none of it.

The runner reads files that it names in the environment, and obeys lines that begin with `::`
wherever they come from. So a run's own lines are not obeyed (`commands_off`), and whatever a
repo, a file or a row has named is escaped.
"""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sage_hub.record.tables import Cell, Table, figures, metric_table, models_of, short

PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")  # what CommonMark lets a backslash take literally


@contextmanager
def commands_off(environ: Mapping[str, str]) -> Iterator[None]:
    """Nothing that is printed within is a command to GitHub's runner, whoever has written it."""
    if not on_github(environ):
        yield
        return
    word = secrets.token_hex(16)  # none that a printed line could guess
    _command(f"::stop-commands::{word}")
    try:
        yield
    finally:
        _command(f"::{word}::")


def annotate(sentence: str, environ: Mapping[str, str]) -> None:
    """Show an error on the page of the workflow's run, and in its job summary."""
    if on_github(environ):
        _command(error_command(sentence))
        _append(environ, "GITHUB_STEP_SUMMARY", f"**sage-hub failed.** {_literal(sentence)}\n\n")


def tell(result: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    """Write the result of a run, as `--json` has it, into the job summary and the outputs."""
    if on_github(environ):
        _append(environ, "GITHUB_STEP_SUMMARY", summary(result))
        _append(environ, "GITHUB_OUTPUT", outputs_text(outputs(result)))


def on_github(environ: Mapping[str, str]) -> bool:
    """Whether this is a step of GitHub Actions."""
    return environ.get("GITHUB_ACTIONS") == "true"


def error_command(sentence: str) -> str:
    """The workflow command that makes an annotation of `sentence`."""
    escaped = sentence.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::error title=sage-hub::{escaped}"


def outputs(result: Mapping[str, Any]) -> dict[str, str]:
    """The outputs of the step; empty where there is no such thing."""
    location, report = str(result["location"]), result["report"]
    met = [gate["passed"] for gate in report.get("gates") or []]
    found = {
        "location": location,
        "commit-url": location if "/commit/" in location else "",
        "pr-url": location if "/discussions/" in location else "",
        "gates": ("passed" if all(met) else "failed") if met else "none",
        "heldout-recovered": (report["retain_recovered"] or {}).get("value"),
        "bias-kept": result["bias"]["kept"],
        "gain": result["gain"],
    }
    lines = {(line["set"], line["metric"]): line for line in metric_table(report)}
    for which in ("forget", "heldout"):
        line = lines.get((which, "probability"), {})
        found[f"{which}-probability-before"] = line.get("unlearned")
        found[f"{which}-probability-after"] = line.get("sanitized")
    return {
        name: f"{value:.6g}" if isinstance(value, (int, float)) else str(value or "")
        for name, value in found.items()
    }


def outputs_text(values: Mapping[str, str]) -> str:
    """`values` as GITHUB_OUTPUT takes them, whatever is in them."""
    end = secrets.token_hex(16)
    return "".join(f"{name}<<{end}\n{value}\n{end}\n" for name, value in values.items())


def summary(result: Mapping[str, Any]) -> str:
    """The result of a run in Markdown: where it is, before and after, gates, what was not run."""
    report = result["report"]
    parts = [f"### sage-hub: {_link(str(result['location']))}"]
    if lines := metric_table(report):
        change = "sanitized − unlearned"
        parts.append(_markdown(figures(lines, models_of(report), change, "{value}, {verdict}")))
    if recovered := report["retain_recovered"]:
        parts.append(
            f"{100 * recovered['value']:.0f} % of the held-out {recovered['metric']} that "
            "unlearning had cost is back."
        )
    kept, gain = result["bias"]["kept"], result["gain"]
    parts.append(
        f"{short(kept)} of the retention activation bias is left; the gain is {short(gain)}."
    )
    parts += _gates(report.get("gates") or [])
    parts += _list("Warnings", result["warnings"])
    parts += _list("Not run", [f"{x['what']}: {x['reason']}" for x in report["not_run"]])
    return "\n\n".join(parts) + "\n\n"


def _gates(gates: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not gates:
        return
    rows = []
    for gate in gates:
        outcome = "passed" if gate["passed"] else "failed"
        sides = (short(gate.get(side)) for side in ("left", "right"))
        rows.append([gate["gate"], Cell(outcome, outcome), *sides, gate.get("reason") or ""])
    failed = sum(not gate["passed"] for gate in gates)
    count = f"{failed} of {len(gates)} failed" if failed else "all passed"
    table = Table(["gate", "outcome", "left", "right", "reason"], rows)
    yield f"**Gates**: {count}.\n\n{_markdown(table)}"


def _markdown(table: Table) -> str:
    """`table` with all of its cells literal, and bold what has failed."""
    rows = [
        [
            f"**{_literal(text)}**" if verdict == "failed" else _literal(text)
            for text, verdict in row
        ]
        for row in table.cells
    ]
    rows.insert(1, ["---"] * len(table.header))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _list(title: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    return [f"**{title}**\n\n" + "\n".join(f"- {_literal(item)}" for item in items)]


def _link(location: str) -> str:
    """A link where `location` is a plain URL, else what it says."""
    url = urlsplit(location)
    if url.scheme in ("http", "https") and re.fullmatch(r"[\w.~:/@%+-]+", location):
        return f"[{_literal(url.path.strip('/'))}](<{location}>)"
    return _literal(location)


def _literal(text: object) -> str:
    """One line of Markdown that shows `text` as it is."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return PUNCTUATION.sub(r"\\\1", line)


def _append(environ: Mapping[str, str], variable: str, text: str) -> None:
    if path := environ.get(variable):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)


def _command(line: str) -> None:
    sys.stdout.flush()  # the runner reads both; what came first has to be read first
    print(line, file=sys.stderr, flush=True)
