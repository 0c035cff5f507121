"""What the page about a release or an audit shows, as data that JSON holds."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sage_hub.errors import ResultsError
from sage_hub.evaluation.answers import Answers
from sage_hub.record.card import local_inputs, recorded_source, reproduce_command
from sage_hub.record.curves import bias_of_layers, gain_path, points, relearning
from sage_hub.record.gates import Outcome
from sage_hub.record.tables import (
    MODELS,
    Table,
    figures,
    metric_table,
    models_of,
    not_run,
    robustness_table,
    short,
)
from sage_hub.record.verdict import Remark, said_again, verdict
from sage_hub.settings import SETTINGS, as_words

SIDES = ("base", "unlearned", "sanitized")  # whose answers are read side by side
MOST = 3000  # rows of a set on one page
WORST = 40  # modules in the table
FIRST = {"forget": 0, "heldout": 1, "retain": 9}  # the order of sets; others are 5

Record = Mapping[str, Any]


def release_content(
    manifest: Record, report: Record, answers: Answers | None, lacks: Sequence[str]
) -> dict[str, Any]:
    """The page of a release: its record, and the answers if they are there; what it `lacks`."""
    models = models_of(report)
    tables = [
        _table(figures(lines, models, "sanitized − unlearned", "{value}{interval} {verdict}"))
        for lines in (metric_table(report), robustness_table(report))
        if lines
    ]
    tensors = [one for one in manifest["tensors"] if one["action"] == "filtered"]
    read = None if answers is None else _answers(answers)
    remarks = [*verdict(manifest, report), *(said_again(read["rows"]) if read else ())]
    remarks.sort(key=lambda remark: remark.tone != "bad")  # what is bad is read first
    return {
        "title": report["card"]["name"],
        "about": "A sanitized release: what it keeps, what it forgets, and what it says.",
        "verdict": [remark._asdict() for remark in remarks],
        "pictures": {
            "tradeoff": _tradeoff(report),
            "search": gain_path(manifest, report),
            "keeping": _keeping(manifest),
            "relearning": relearning(report),
            "bias": bias_of_layers(manifest["tensors"]),
            "profile": _profile(manifest),
        },
        "tables": tables,
        "modules": _modules(tensors),
        "gates": [
            {"passed": g["passed"], "text": Outcome(**g).sentence()} for g in report["gates"]
        ],
        "not_run": not_run(report),
        "answers": read,
        "lacks": list(lacks),
        "warnings": report["card"]["warnings"],
        "record": _record(manifest, report),
        "command": reproduce_command(manifest, report["card"]["name"]),
        "in_folder": local_inputs(manifest),
    }


def audit_content(audit: Record) -> dict[str, Any]:
    """The page of what `sage_hub.audit` returns."""
    tensors = [
        {
            "name": f"{module['module']}.weight",
            "bias_before": module["retain_before"],
            "bias_after": module["retain_after"],
        }
        for module in audit["modules"]
    ]
    columns = ("rank", "share", "retain_before", "retain_after", "forget_kept")
    rows = [
        [one["module"], *(short(one[column]) for column in columns)]
        for one in audit["modules"][:WORST]
    ]
    header = ["module", *(column.replace("_", " ") for column in columns)]
    return {
        "title": f"{audit['unlearned']} against {audit['base']}",
        "about": "An audit: what the update does to inputs that are to be kept. Retention "
        "activation bias is the mean of ‖Δx‖² over retained inputs x, relative to that of the "
        "base's outputs ‖Wx‖².",
        "verdict": [remark._asdict() for remark in _audited(audit)],
        "pictures": {"bias": bias_of_layers(tensors), "profile": _profile(audit)},
        "modules": _table(Table(header, rows)),
        "record": {"settings": _settings(audit["settings"])},
    }


def answers_command(manifest: Record, release: str, file: str) -> str:
    """The command that makes the answers of `release` again, in `file`, with its settings."""
    sides = [recorded_source(manifest["sources"][side]) for side in SIDES[:2]]
    own = {
        name: value
        for name, value in manifest["settings"].items()
        if "eval" in SETTINGS[name].commands and name not in ("device", "robustness", "lm_eval")
    }
    words = ["sage-hub", "eval", *sides, release, *as_words(own), "--answers", file]
    return shlex.join(words)


def _audited(audit: Record) -> Iterator[Remark]:
    model, settings = audit["model"], audit["settings"]
    after = f"λ = {float(settings['strength']):g} and ρ = {settings['energy']:g}"
    yield Remark(
        "told",
        f"Over all {model['weights']} weights that can be filtered the update's bias is "
        f"{short(model['retain_before'])} of the base's outputs; filtered with {after} it would "
        f"be {short(model['retain_after'])}.",
    )
    if model["forget_kept"] is not None:
        yield Remark(
            "told",
            f"{100 * model['forget_kept']:.0f} % of the effect on the forget set would stay "
            "before any gain.",
        )
    if model["matching_gain"] is not None:
        yield Remark(
            "told",
            "One gain for all weights that keeps what the update does on the forget set would be "
            f"γ = {model['matching_gain']:.4g}.",
        )


def _tradeoff(report: Record) -> dict[str, Any] | None:
    found = points(report, "heldout")
    if found is None:
        return None
    metric, models = found
    ends = {
        which: {name: own[which]["interval"] for name, own in models.items()}
        for which in ("forget", "heldout")
    }
    return {
        "metric": metric,
        "models": [
            {
                "model": name,
                "shown": MODELS.get(name, name),
                **{which: own[which]["value"] for which in ends},
                **{f"{which}_interval": ends[which][name] for which in ends},
            }
            for name, own in models.items()
        ],
    }


def _keeping(manifest: Record) -> Record | None:
    """The search without a forget set, by what each gain keeps of the guard rows."""
    search = manifest.get("gain_search") or {}
    return {**search, "gain": manifest["gain"]} if "keep" in search else None


def _profile(record: Record) -> dict[str, Any] | None:
    """What other strengths would leave, and where a release is on that curve."""
    strength = record["settings"]["strength"]
    if not record["profile"]:
        return None
    at = None
    if "bias" in record and isinstance(strength, (int, float)):
        at = {"strength": strength, "kept": record["bias"]["kept"], "gain": record["gain"]}
    return {"curve": record["profile"], "chosen": at}


def _modules(tensors: Sequence[Record]) -> dict[str, Any] | None:
    """The filtered tensors that the update disturbed most."""
    worst = sorted(tensors, key=lambda one: -(one.get("bias_before") or 0))[:WORST]
    columns = ("rank", "bias_before", "bias_after", "bias_kept", "norm_ratio")
    header = ["tensor", *(column.replace("_", " ") for column in columns)]
    rows = [[one["name"], *(short(one.get(column)) for column in columns)] for one in worst]
    return _table(Table(header, rows)) if rows else None


def _table(table: Table) -> dict[str, Any]:
    header, *rows = table.cells
    return {"header": [cell.text for cell in header], "rows": rows, "keys": table.keys}


def _answers(answers: Answers) -> dict[str, Any]:
    """The rows, of each of the three sides how well it knows the answer, and what it said."""
    names = SIDES if set(SIDES) <= set(answers.models) else answers.models
    if len(names) != len(SIDES):
        raise ResultsError(
            f"The answers are of {len(names)} models; those of three are read side by side: base, "
            "unlearned and the release, in this order."
        )
    rows, left_out = [], 0
    counts: dict[str, int] = {}
    for row in sorted(answers.rows, key=lambda row: FIRST.get(row["set"], 5)):
        counts[row["set"]] = counts.get(row["set"], 0) + 1
        if counts[row["set"]] > MOST:
            left_out += 1
            continue
        made = [row["models"].get(name, {}) for name in names]
        known = [one.get("probability", one.get("accuracy")) for one in made]
        said = [one.get("said") for one in made]
        kept = {key: row[key] for key in ("set", "row", "question", "wanted")}
        rows.append(
            {**kept, "known": known, "said": said if any(s is not None for s in said) else None}
        )
    shown = [MODELS[side] for side in SIDES]
    own = [name if name != side else "" for name, side in zip(names, SIDES, strict=True)]
    return {"models": shown, "own": own, "rows": rows, "counts": counts, "left_out": left_out}


def _record(manifest: Record, report: Record) -> dict[str, Any]:
    sources = {
        side: f"{_at(about['name'], about['commit'])}, weights {about['fingerprint']}"
        for side, about in manifest["sources"].items()
    }
    data = {
        which: f"{_at(about['name'], about['revision'])}, {about['rows_used']} of {about['rows']} "
        f"rows{', seen by calibration' * about['seen_by_calibration']}"
        for which, about in report["data"].items()
    }
    return {
        "sources": [*sources.items()],
        "sets": [*data.items()],
        "settings": [
            ["gain γ as applied", f"{manifest['gain']:.4g}"],
            *_settings(manifest["settings"]),
        ],
        "files": [*manifest["files"].items()],
        "versions": [[name, str(version)] for name, version in manifest["versions"].items()],
        "hardware": [[name, str(value)] for name, value in report["hardware"].items()],
    }


def _at(name: str, commit: str | None) -> str:
    return f"{name} at {commit}" if commit else name


def _settings(settings: Record) -> list[list[str]]:
    return [[name, _said(value)] for name, value in settings.items() if value not in (None, [], {})]


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {one}" for key, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
