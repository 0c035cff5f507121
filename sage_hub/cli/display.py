"""Plans, releases and audits as lines and tables for people and as JSON for machines."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from sage_hub.calibration.budget import Budget
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.cli.terminal import Part
from sage_hub.commands.job import Job
from sage_hub.errors import printable
from sage_hub.model.compute import name_of
from sage_hub.publish.verify import Verification
from sage_hub.record.gates import Outcome
from sage_hub.record.release import Release
from sage_hub.record.tables import (
    MODELS,
    Cell,
    Table,
    figures,
    highlights,
    interval,
    metric_table,
    not_run,
    robustness_table,
    short,
)
from sage_hub.repair.gain import SOURCE_LEVEL
from sage_hub.repair.plan import Plan
from sage_hub.runtime.machine import GB
from sage_hub.runtime.progress import in_bytes
from sage_hub.settings import GUARD, SETS, Settings

LITTLE = 0.5  # of what was lost: less than that come back is worth a hint


def plan_text(job: Job, *, verbose: bool = False) -> Iterator[Part]:
    """What is going to happen, before it does; tensor by tensor if `verbose`."""
    if verbose:
        yield _operations(job.plan)
        yield ""
    verdicts = {"problem": "failed"}
    rows = [(Cell(f"  {label}", verdicts.get(label, "")), text) for label, text in _plan_lines(job)]
    yield Table((), rows, gap=1)


def _plan_lines(job: Job) -> Iterator[tuple[str, str]]:
    plan, settings = job.plan, job.settings
    described, (strength, energy) = plan.describe(), settings.sharpness
    yield "base", _side(plan.base)
    yield "unlearned", _side(plan.unlearned)
    yield "target", _target(job)
    yield "weights", f"{described['filter']} of {described['tensors']} tensors can be filtered"
    for reason, count in described["copy"].items():
        yield "", f"copied: {count} × {reason}"
    for which in (*SETS, *[GUARD] * (job.settings.gain_rule == "keep")):
        yield which, _set(job, which)
        if which in job.shown:
            yield "", f"as the model sees it: {printable(job.shown[which])}"
    for gate in job.gates:
        yield "gate", gate.text
    yield (
        "settings",
        f"strength λ={strength:g}, energy ρ={energy:g}, rank {settings.rank or 'any'}, "
        f"gain γ={_gain(settings)}; on {settings.device} in {_computing(job)}",
    )
    yield (
        "needs",
        f"{in_bytes(plan.download_bytes)} to download, {in_bytes(plan.output_bytes)} of disk "
        "for the release",
    )
    for line in _memory(job.memory) if job.memory else ():
        yield "", line
    kept = plan.output_bytes if job.target.folder is not None else 2 * plan.largest_output
    if plan.download_bytes and not settings.low_disk:
        yield "", f"with --low-disk {in_bytes(kept + plan.passing_bytes)} of disk in all"
    for warning in job.warnings:
        yield "note", warning
    yield "comes along", ", ".join(plan.carried) or "nothing beside the weights"
    for name, reason in plan.left_behind.items():
        yield "left behind", f"{name} ({reason})"
    yield from _made_again(job.local)
    for problem in job.problems:
        yield "problem", str(problem)
    if not job.problems:
        yield "problems", "none found"


def _made_again(local: Mapping[str, Collection[Path]]) -> Iterator[tuple[str, str]]:
    """What `verify --rebuild` and the card's command will need, where that is no more than here."""
    if local:
        yield (
            "made again",
            "by `verify --rebuild` and the card's command only in a folder that holds "
            f"{', '.join(local)}: the record has their names alone",
        )
    for name, places in local.items():
        if len(places) > 1:
            yield "", f"and not even there, as {len(places)} of these are called {name}; rename one"


def _computing(job: Job) -> str:
    """The type in which models are run."""
    stored = name_of(job.plan.base.architecture.dtype)
    named = job.settings.compute_dtype
    return named if named == stored else f"{named} (the base is stored in {stored})"


def _set(job: Job, which: str) -> str:
    """Where the rows of a set come from."""
    if proxy := job.proxies.get(which):
        return f"{proxy.name}, {len(proxy.rows)} rows"
    if which in job.supply.written:
        return "written by the base before calibration"
    if which == "retain" and job.statistics is not None:
        return f"ready statistics, {job.statistics.name}"
    if getattr(job.settings, which, None) is not None:
        return "cannot be used; see the problem below"
    return f"not given; {which} metrics will not be run"


def _memory(budget: Budget) -> Iterator[str]:
    """What calibration and evaluation take with proxies as long as the settings allow."""
    parts = {
        "a block of weights": budget.weights,
        "a batch": budget.activations,
        "hidden states": budget.hidden,
        "second moments": budget.moments,
    }
    spent = ", ".join(f"{name} {in_bytes(size)}" for name, size in parts.items())
    yield f"at most {in_bytes(budget.total)} of memory (--memory {budget.limit / GB:g}): {spent}"
    if budget.sketched:
        yield f"{len(budget.sketched)} second moments are sketched, as exact ones don't fit"
    if budget.spilled:
        yield f"{in_bytes(budget.spilled)} of hidden states wait on disk"


def _operations(plan: Plan) -> Table:
    header = ["tensor", "shape", "type", "what is done", "with the base's"]
    rows = []
    for about in (operation.describe() for operation in plan.operations):
        name, modules, base = about["tensor"], about["modules"], about["base"]
        what = f"filter {modules[0]}" if modules else f"copy: {about['reason']}"
        what += f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        kind = " → ".join(dict.fromkeys((about["dtype"], about["stored"])))
        other = "" if base == [name] else ", ".join(base)
        rows.append([name, "×".join(map(str, about["shape"])), kind, what, other])
    return Table(header, rows)


def plan_json(job: Job) -> dict[str, Any]:
    """The plan for `--dry-run --json`."""
    return {
        "plan": job.plan.describe(),
        "settings": job.settings.describe(),
        "memory": None if job.memory is None else job.memory.describe(),
        "problems": [{"status": p.status, "message": str(p)} for p in job.problems],
        "warnings": list(job.warnings),
        "local": list(job.local),
    }


def release_text(release: Release) -> Iterator[Part]:
    """The result of a run: metrics, bias, gates, and where the release is."""
    report, manifest = release.report, release.manifest
    yield from _figures(report)
    if recovered := report["retain_recovered"]:
        sure = interval(recovered["interval"], scale=100)
        yield f"held-out {recovered['metric']} recovered: {100 * recovered['value']:.0f} %{sure}"
    bias, shares = manifest["bias"], " × shares" if manifest.get("gain_shares") else ""
    relative = ""
    if bias["before"] is not None:
        relative = f", from {short(bias['before'])} to {short(bias['after'])} of the outputs"
    yield (
        f"retention activation bias: {short(bias['kept'])} of the source's is left{relative}; "
        f"gain {manifest['gain']:.4g}{shares}"
    )
    counts = manifest["counts"]
    yield (
        f"tensors: {counts['filtered']} filtered, {counts['identical']} identical, "
        f"{counts['copied']} copied as they were"
    )
    if report["control_by"] == "source":
        yield "control: none but the source, as the release forgets as much"
    elif report["control_by"] == "forgetting":
        yield f"control: αΔ forgets as much as the release with α = {report['control_alpha']:.3g}"
    yield from _hints(report, manifest)
    for gate in report["gates"]:
        sentence = Outcome(**gate).sentence()
        if gate["passed"]:
            yield Cell(f"gate met: {sentence}", "passed")
        else:
            yield Cell(f"gate NOT met: {sentence}", "failed")
    yield from _not_run(report)
    yield from filter(None, (release.announced, release.location))


def _gain(settings: Settings) -> str:
    if settings.gain_rule == "search":
        aim = "the reference's level" if settings.reference else "the source's level"
        if settings.target is not None:
            aim = f"a level of {settings.target:g}"
        return f"auto, by evaluating, to {aim}"
    if settings.gain_rule == "match":
        return "by the closed form"
    if settings.gain_rule == "keep":
        return f"auto, as large as keeps {100 * settings.keep:g} % of the loss on guard rows"
    return "1" if settings.gain == "auto" else f"{settings.gain:g}"


def _hints(report: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterator[str]:
    """What to try where forgetting is weaker than it need be, or little has come back."""
    search, recovered = manifest["gain_search"], report["retain_recovered"]
    if search and search.get("of") == SOURCE_LEVEL and recovered and recovered["value"] < LITTLE:
        yield (
            "hint: little of what was lost has come back. The source may have forgotten more than "
            "a model that never saw the forget set; give such a one with --reference, or a --target"
        )
    gaps = [line["difference"] for line in highlights(report) if line["set"] == "forget"]
    if not search and gaps and gaps[0] and gaps[0]["verdict"] == "worse":
        yield (
            "hint: forgetting is weaker than the source's; --gain auto turns up what remains of "
            "the update until it is not"
        )


def evaluation_text(report: Mapping[str, Any]) -> Iterator[Part]:
    """The figures of any models."""
    yield from _figures(report)
    yield from _not_run(report)


def _not_run(report: Mapping[str, Any]) -> Iterator[str]:
    for entry in not_run(report):
        yield f"not run: {entry['what']} ({entry['reason']})"


def _figures(report: Mapping[str, Any]) -> Iterator[Part]:
    """The tables of a report; of any models, each figure with its change against the first."""
    evaluated = list(dict.fromkeys(result["model"] for result in report["results"]))
    for lines in (metric_table(report), robustness_table(report)):
        there = {model for line in lines for model in line["values"]}
        models = {name: MODELS.get(name, name) for name in evaluated if name in there}
        if any(line["difference"] for line in lines):
            change = "sanitized − unlearned" if "sanitized" in models else "change of the last"
            yield figures(lines, models, change, "{value}{interval} {verdict}")
            yield ""
        elif lines:
            yield figures(lines, models, "", "{value} {verdict}")
            yield ""


def release_json(release: Release) -> dict[str, Any]:
    """The result of a run for `--json`."""
    return {
        "location": release.location,
        "gain": release.manifest["gain"],
        "bias": release.manifest["bias"],
        "counts": release.manifest["counts"],
        "report": dict(release.report),
        "warnings": list(release.warnings),
    }


def audit_text(audit: Mapping[str, Any], *, top: int) -> Iterator[Part]:
    """The audit as a table, the `top` worst modules first."""
    modules, model, settings = audit["modules"], audit["model"], audit["settings"]
    yield (
        f"Filtered with λ = {float(settings['strength']):g}, ρ = {settings['energy']:g}, "
        "before any gain (γ = 1):"
    )
    whole = {**model, "module": f"whole model ({model['weights']} weights)", "rank": "", "share": 1}
    columns = ("share", "retain_before", "retain_after", "forget_kept")
    rows = [
        [one["module"], str(one["rank"]), *(short(one[column]) for column in columns)]
        for one in (*modules[:top], whole)
    ]
    yield Table(["module", "rank", *(column.replace("_", " ") for column in columns)], rows)
    if len(modules) > top:
        yield f"({len(modules) - top} more modules; --top N shows more, --json all)"
    if model["matching_gain"] is not None:
        yield (
            "one gain for all that keeps what the update does on the forget set: "
            f"{model['matching_gain']:.4g}"
        )


def verification_text(found: Verification) -> Iterator[Part]:
    """What was compared with the record, and what differs."""
    for difference in found.differences:
        yield Cell(f"differs: {difference}", "failed")
    if not found.differences:
        where = f"{found.name}{'@' + found.commit if found.commit else ''}"
        yield Cell(f"{where} is what its record says: {len(found.checked)} files.", "passed")
    missing = "" if found.signed else " (SHA256SUMS, which signs off card and report, is missing)"
    yield f"not covered: {', '.join(found.not_covered)}{missing}"


def _side(checkpoint: Checkpoint) -> str:
    where = checkpoint.commit[:12] if checkpoint.commit else "local folder"
    shards = len(checkpoint.headers)
    return (
        f"{checkpoint.name} ({where}, {shards} shard{'s' if shards > 1 else ''}, "
        f"{in_bytes(checkpoint.weight_bytes)})"
    )


def _target(job: Job) -> str:
    if job.target.folder is not None:
        return f"{job.target.folder} (local folder)"
    how = job.publication
    where = "a pull request" if how.create_pr else "one commit"
    where += f" to the branch {how.branch}" if how.branch else ""
    where += f", with the tag {how.tag}" if how.tag else ""
    return f"{job.target.repo} on the Hub, in {where}"
