"""The model card: front matter that the Hub reads, and a page that people read, from the record."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from sage_hub.adapter import Adapter
from sage_hub.checkpoint import Checkpoint
from sage_hub.plan import Plan
from sage_hub.statistics import Origin

TEMPLATE = "model_card.md.jinja"
MODELS = {
    "base": "base",
    "unlearned": "unlearned",
    "control": "control αΔ",
    "sanitized": "**sanitized**",
}
# The release only inherits what still holds for it; scores, widgets and the like do not.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def template_path() -> Path:
    """The card template, as installed or as in a source checkout."""
    package = Path(__file__).parent
    installed = package / "model_card_templates" / TEMPLATE
    return installed if installed.is_file() else package.parent / "model_card_templates" / TEMPLATE


def source_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """The front matter of the checkpoint's own card; empty where there is none that parses."""
    if "README.md" not in checkpoint.files.sizes:
        return {}
    try:
        return dict(metadata_load(checkpoint.files.path("README.md")) or {})
    except (ValueError, OSError, yaml.YAMLError):
        return {}


def statistics_card(origin: Origin) -> str:
    """The README of a repo that holds statistics."""
    at = f"@{origin.commit}" if origin.commit else ""
    data = "\n".join(
        f"- {which}: {about['name']}{'@' + about['revision'] if about['revision'] else ''}, "
        f"{about['rows_used']} rows, {about['tokens_used']} tokens"
        for which, about in origin.data.items()
    )
    front = yaml.safe_dump({"library_name": "sage-hub", "tags": ["sage-hub-statistics"]})
    return (
        f"---\n{front}---\n\n# Activation statistics of {origin.model}{at}\n\n"
        "Second moments of the inputs of its layers, made by sage-hub to repair unlearned models "
        "of this base. They hold directions of activations and hashes of the rows, not the rows.\n"
        f"\n{data}\n\n```bash\nsage-hub push {origin.model}{at} UNLEARNED --stats THIS_REPO\n```\n"
    )


def licence_warnings(plan: Plan) -> list[str]:
    """A warning if the two sides state different licences."""
    licences = [source_metadata(side).get("license") for side in (plan.base, plan.unlearned)]
    if None in licences or licences[0] == licences[1]:
        return []
    return [
        f"The licences of the sources differ (base: {licences[0]}, unlearned: {licences[1]}); "
        "the card states the unlearned one's. Check which applies."
    ]


def write_card(
    folder: Path,
    plan: Plan,
    manifest: Mapping[str, Any],
    report: Mapping[str, Any],
    *,
    name: str,
    warnings: Sequence[str],
) -> None:
    """Write README.md of the release `name` into `folder`."""
    card = ModelCard.from_template(
        _front_matter(plan, report, name),
        template_path=str(template_path()),
        name=name,
        manifest=manifest,
        report=report,
        warnings=warnings,
        command=reproduce_command(manifest, name),
        metrics=metric_table(report),
        published=name if "/" in name else f"./{name}",
        copied=copied_by_reason(manifest),
        adapter=isinstance(plan.unlearned, Adapter),
    )
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def metric_table(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line per set and metric, with the value of each model: for the card and the terminal."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for result in report["results"]:
        line = lines.setdefault(
            (result["set"], result["metric"]),
            {
                "set": result["set"],
                "metric": result["metric"],
                "direction": result["direction"],
                "rows": result["rows"],
            },
        )
        line[result["model"]] = result["value"]
    return list(lines.values())


def copied_by_reason(manifest: Mapping[str, Any]) -> dict[str, int]:
    """How many tensors that differ were copied unfiltered, by reason."""
    counts: dict[str, int] = {}
    for tensor in manifest["tensors"]:
        if tensor["action"] == "copied":
            counts[tensor["reason"]] = counts.get(tensor["reason"], 0) + 1
    return counts


def recorded_source(side: Mapping[str, Any]) -> str:
    """A source of the manifest as a command names it."""
    return f"{side['name']}@{side['commit']}" if side["commit"] else f"./{side['name']}"


def reproduce_command(manifest: Mapping[str, Any], name: str) -> str:
    """The command that makes this release again, from the recorded commits and settings."""

    sources, settings = manifest["sources"], manifest["settings"]
    words = [
        "sage-hub",
        "push",
        *(recorded_source(sources[side]) for side in ("base", "unlearned")),
    ]
    words += ["--to", name if "/" in name else f"./{name}"]
    if file := manifest["statistics"].get("file"):
        words += ["--stats", file]
    for option, value in settings.items():
        if option in ("device", "batch_size") or value is None:
            continue  # they change the speed, and the result by rounding at most
        if option == "chat_template":
            words += [] if value else ["--no-chat-template"]
        elif isinstance(value, bool):
            words += [f"--{option.replace('_', '-')}"] if value else []
        else:
            words += [f"--{option.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _front_matter(plan: Plan, report: Mapping[str, Any], name: str) -> ModelCardData:
    metadata = source_metadata(plan.base) | source_metadata(plan.unlearned)
    inherited = {key: metadata[key] for key in INHERITED if metadata.get(key)}
    inherited.setdefault("pipeline_tag", "text-generation")
    # Only what is on the Hub can be linked to; a folder's name there would be someone else's.
    parents = [side.name for side in (plan.base, plan.unlearned) if side.commit is not None]
    adapter = isinstance(plan.unlearned, Adapter)
    if adapter:
        parents = [name for name in parents if name == plan.base.name]
    relation = "adapter" if adapter else "merge"
    related: dict[str, Any] = (
        {"base_model": parents, "base_model_relation": relation} if parents else {}
    )
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_dataset_type(report["data"][result["set"]]["name"]),
            dataset_name=f"{result['set']} set ({report['data'][result['set']]['name']})",
            dataset_revision=report["data"][result["set"]]["revision"],
            metric_type=f"{result['set']}_{result['metric']}",
            metric_name=f"{result['set']} {result['metric']} ({result['direction']} is better)",
            metric_value=round(result["value"], 6),
        )
        for result in report["results"]
        if result["model"] == "sanitized"
    ]
    return ModelCardData(
        **inherited,
        **related,
        library_name="peft" if adapter else "transformers",
        tags=["unlearning", "machine-unlearning", "sage-hub", "sage"],
        model_name=name.rpartition("/")[2],
        eval_results=results or None,
    )


def _dataset_type(name: str) -> str:
    """A Hub dataset's id, or "custom" for a file."""
    if not name.startswith("hf://datasets/"):
        return "custom"
    return "/".join(name.removeprefix("hf://datasets/").partition("?")[0].split("/")[:2])
