"""Plans, releases and audits as text for a terminal and as JSON for machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sage_hub.budget import GB, Budget
from sage_hub.checkpoint import Checkpoint
from sage_hub.estimate import SEARCHED, Estimate
from sage_hub.gain import SOURCE_LEVEL
from sage_hub.gates import Outcome
from sage_hub.jobs import Job
from sage_hub.plan import Plan
from sage_hub.progress import in_bytes
from sage_hub.release import Release
from sage_hub.settings import SETS, Settings
from sage_hub.tables import MODELS, highlights, metric_table, not_run, number, robustness_table
from sage_hub.verify import Verification

LITTLE = 0.5  # of what was lost: less than that come back is worth a hint


def plan_text(job: Job, *, verbose: bool = False) -> str:
    """What is going to happen, before it does; tensor by tensor if `verbose`."""
    plan, settings = job.plan, job.settings
    described, (strength, energy) = plan.describe(), settings.sharpness
    lines = [
        ("base", _side(plan.base)),
        ("unlearned", _side(plan.unlearned)),
        ("target", _target(job)),
        ("weights", f"{described['filter']} of {described['tensors']} tensors can be filtered"),
    ]
    lines += [("", f"copied: {n} × {reason}") for reason, n in described["copy"].items()]
    for which in SETS:
        proxy = job.proxies.get(which)
        if proxy is not None:
            lines.append((which, f"{proxy.name}, {len(proxy.rows)} rows"))
        elif which == "retain" and job.statistics is not None:
            lines.append((which, f"ready statistics, {job.statistics.name}"))
        elif getattr(settings, which) is not None:
            lines.append((which, "cannot be used; see the problem below"))
        else:
            lines.append((which, f"not given; {which} metrics will not be run"))
    lines += [("gate", gate.text) for gate in job.gates]
    lines += [
        (
            "settings",
            f"λ={strength:g} ρ={energy:g} rank={settings.rank or 'any'} "
            f"γ={_gain(settings)} on {settings.device}",
        ),
        (
            "needs",
            f"{in_bytes(plan.download_bytes)} to download, {in_bytes(plan.output_bytes)} of disk "
            "for the release",
        ),
    ]
    if job.memory is not None:
        lines += [("", line) for line in _memory(job.memory)]
    kept = plan.output_bytes if job.target.folder is not None else 2 * plan.largest_output
    if plan.download_bytes and not settings.low_disk:
        lines.append(("", f"with --low-disk {in_bytes(kept + plan.passing_bytes)} of disk in all"))
    lines += [("note", warning) for warning in job.warnings]
    lines.append(("comes along", ", ".join(plan.carried) or "nothing beside the weights"))
    lines += [("left behind", f"{name} ({reason})") for name, reason in plan.left_behind.items()]
    lines += [("problem", str(problem)) for problem in job.problems]
    text = "\n".join(f"  {label:<12}{text}" for label, text in lines)
    return f"{_operations_text(plan)}\n\n{text}" if verbose else text


def _memory(budget: Budget) -> Iterator[str]:
    """What calibration and evaluation take with proxies as long as the settings allow."""
    parts = {
        "a block of weights": budget.weights,
        "a batch": budget.activations,
        "hidden states": budget.hidden,
        "second moments": budget.moments,
    }
    spent = ", ".join(f"{name} {in_bytes(size)}" for name, size in parts.items())
    yield (f"at most {in_bytes(budget.total)} of memory (--memory {budget.limit / GB:g}): {spent}")
    if budget.sketched:
        yield f"{len(budget.sketched)} second moments are sketched, as exact ones don't fit"
    if budget.spilled:
        yield f"{in_bytes(budget.spilled)} of hidden states wait on disk"


def _operations_text(plan: Plan) -> str:
    header = ["tensor", "shape", "type", "what is done", "with the base's"]
    rows = []
    for operation in plan.operations:
        about = operation.describe()
        what = f"copy: {about['reason']}"
        if about["modules"]:
            first, more = about["modules"][0], len(about["modules"]) - 1
            what = f"filter {first}" + (f" and {more} more" if more else "")
        base = "" if about["base"] == [about["tensor"]] else ", ".join(about["base"])
        kind = about["dtype"]
        if about["stored"] != kind:
            kind += f" → {about['stored']}"
        rows.append([about["tensor"], "×".join(map(str, about["shape"])), kind, what, base])
    return _table(header, rows)


def plan_json(job: Job) -> dict[str, Any]:
    """The plan for `--dry-run --json`."""
    return {
        "plan": job.plan.describe(),
        "settings": job.settings.describe(),
        "memory": None if job.memory is None else job.memory.describe(),
        "problems": [{"status": p.status, "message": str(p)} for p in job.problems],
    }


def forecast_text(found: Estimate) -> str:
    """What a run takes, a line per way to calibrate."""
    header = ["second moments", "statistics", "memory", "spilled", "flops", "time here"]
    rows = [
        [
            mode.name,
            f"≤ {in_bytes(mode.statistics)}",
            in_bytes(mode.budget.total) + (" (too much)" if mode.budget.excess else ""),
            in_bytes(mode.budget.spilled),
            f"{mode.forward + mode.moments + mode.decompositions:.2g}",
            _duration(mode.seconds),
        ]
        for mode in found.modes
    ]
    return "\n".join(
        [
            f"{_count(found.parameters)} parameters, {found.sites} places whose inputs are "
            f"watched, of up to {found.widest} features; a block of layers takes "
            f"{in_bytes(found.modes[0].budget.weights)}",
            f"\nCalibration on at most {found.tokens} tokens (--max-tokens); the settings say "
            f"{found.chosen}:",
            _table(header, rows),
            f"\nThe pass over the weights: {in_bytes(found.pass_bytes)} read and written, "
            f"{found.pass_flops:.2g} flops, {_duration(found.pass_seconds)}",
            f"The search for the gain with a forget set, {SEARCHED} evaluations or so of at most "
            f"{found.searched_tokens} tokens: {_duration(found.search_seconds)}",
            f"Evaluation of four models on as many tokens: {_duration(found.evaluation_seconds)}",
        ]
    )


def _count(number: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.2g} s"


def release_text(release: Release) -> str:
    """The result of a run: metrics, bias, gates, and where the release is."""
    report, manifest = release.report, release.manifest
    parts = list(_report_parts(report))
    if recovered := report["retain_recovered"]:
        sure = _interval(recovered["interval"], scale=100)
        parts.append(
            f"held-out {recovered['metric']} recovered: {100 * recovered['value']:.0f} %{sure}"
        )
    bias = manifest["bias"]
    relative = ""
    if bias["before"] is not None:
        relative = f", from {_number(bias['before'])} to {_number(bias['after'])} of the outputs"
    parts.append(
        f"retention activation bias: {_number(bias['kept'])} of the source's is left{relative}; "
        f"gain {manifest['gain']:.4g}{' × shares' if manifest.get('gain_shares') else ''}"
    )
    counts = manifest["counts"]
    parts.append(
        f"tensors: {counts['filtered']} filtered, {counts['identical']} identical, "
        f"{counts['copied']} copied as they were"
    )
    outcomes = [Outcome(**gate) for gate in report["gates"]]
    if hint := _hint(report, manifest):
        parts.append(hint)
    parts += [f"gate {'met' if o.passed else 'NOT met'}: {o.sentence()}" for o in outcomes]
    parts += _not_run(report)
    parts.append(release.location)
    return "\n".join(parts)


def _gain(settings: Settings) -> str:
    if settings.gain_rule == "search":
        if settings.target is not None:
            aim = f"a level of {settings.target:g}"
        else:
            aim = "the reference's level" if settings.reference else "the source's level"
        return f"auto, by evaluating, to {aim}"
    if settings.gain_rule == "match":
        return "by the closed form"
    return "1" if settings.gain == "auto" else f"{settings.gain:g}"


def _hint(report: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """What to try where forgetting is weaker than it need be, or little has come back."""
    search, recovered = manifest["gain_search"], report["retain_recovered"]
    if search and search.get("of") == SOURCE_LEVEL and recovered and recovered["value"] < LITTLE:
        return (
            "hint: little of what was lost has come back. The source may have forgotten more than "
            "a model that never saw the forget set; give such a one with --reference, or a --target"
        )
    forget = next((line for line in highlights(report) if line["set"] == "forget"), None)
    gap = forget["difference"] if forget else None
    if search or not gap or gap["verdict"] != "worse":
        return ""
    return (
        "hint: forgetting is weaker than the source's; --gain auto turns up what remains of the "
        "update until it is not"
    )


def evaluation_text(report: Mapping[str, Any]) -> str:
    """The figures of any models, for a terminal."""
    return "\n".join([*_report_parts(report), *_not_run(report)])


def _not_run(report: Mapping[str, Any]) -> Iterator[str]:
    for entry in not_run(report):
        yield f"not run: {entry['what']} ({entry['reason']})"


def _report_parts(report: Mapping[str, Any]) -> Iterator[str]:
    """The tables of a report; of any models, each figure with its change against the first."""
    gaps = {(g["model"], g["condition"], g["set"], g["metric"]): g for g in report["differences"]}
    for lines, first in ((metric_table(report), ""), (robustness_table(report), "treated by")):
        if not lines:
            continue
        models = [
            name for name in _models(report) if any(line.get(name) is not None for line in lines)
        ]
        change = any(line["difference"] for line in lines)
        header = ["set", "metric", "better", *(MODELS.get(name, name) for name in models)]
        header = [first, *header] if first else header
        rows = []
        for line in lines:
            row = [line["set"], line["metric"], line["direction"]]
            row = [line["condition"], *row] if first else row
            for model in models:
                gap = gaps.get((model, line.get("condition"), line["set"], line["metric"]))
                row.append(number(line.get(model)))
                if gap and not change:
                    row[-1] += f" ({number(gap['value'], True)} {gap['verdict']})"
            rows.append([*row, _change(line)] if change else row)
        if change:
            header.append("change of the last")
        yield _table(header, rows) + "\n"


def _models(report: Mapping[str, Any]) -> list[str]:
    """The models of a report in the order in which they were evaluated."""
    return list(dict.fromkeys(result["model"] for result in report["results"]))


def _change(line: Mapping[str, Any]) -> str:
    gap = line["difference"]
    if gap is None:
        return ""
    return f"{number(gap['value'], True)}{_interval(gap['interval'])} {gap['verdict']}"


def _interval(interval: Sequence[float] | None, scale: float = 1) -> str:
    if interval is None:
        return ""
    low, high = (f"{scale * end:.3g}" for end in interval)
    return f" [{low}, {high}]"


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


def audit_text(audit: Mapping[str, Any], *, top: int) -> str:
    """The audit as a table, the `top` worst modules first."""
    modules: list[dict[str, Any]] = audit["modules"]
    header = ["module", "rank", "share", "retain before", "retain after", "forget kept"]
    rows = [
        [
            module["module"],
            str(module["rank"]),
            _number(module["share"]),
            _number(module["retain_before"]),
            _number(module["retain_after"]),
            _number(module["forget_kept"]),
        ]
        for module in modules[:top]
    ]
    model = audit["model"]
    rows.append(
        [
            f"whole model ({model['weights']} weights)",
            "",
            "1",
            _number(model["retain_before"]),
            _number(model["retain_after"]),
            _number(model["forget_kept"]),
        ]
    )
    settings = audit["settings"]
    words = f"λ = {float(settings['strength']):g}, ρ = {settings['energy']:g}"
    parts = [f"Filtered with {words}, before any gain (γ = 1):", _table(header, rows)]
    if len(modules) > top:
        parts.append(f"({len(modules) - top} more modules; --top N shows more, --json all)")
    if model["matching_gain"] is not None:
        parts.append(
            f"one gain for all that keeps what the update does on the forget set: "
            f"{model['matching_gain']:.4g}"
        )
    return "\n".join(parts)


def verification_text(found: Verification) -> str:
    """What was compared with the manifest, and what differs."""
    where = f"{found.name}{'@' + found.commit if found.commit else ''}"
    lines = [f"differs: {difference}" for difference in found.differences]
    if not lines:
        lines.append(f"{where} is what its manifest says: {len(found.checked)} files.")
    lines.append(f"not covered by the manifest: {', '.join(found.not_covered)}")
    return "\n".join(lines)


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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, ["-" * width for width in widths], *rows)
    )
