"""The model card: front matter that the Hub reads, and a page that people read, from the record."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    ModelCard,
    ModelCardData,
)
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sage_hub.calibration.statistics import Origin
from sage_hub.checkpoint.adapter import Adapter
from sage_hub.errors import NotFoundError, UsageError, first_line
from sage_hub.record.metadata import inherited
from sage_hub.record.pictures import draw
from sage_hub.record.tables import (
    highlights,
    metric_table,
    models_of,
    not_run,
    number,
    robustness_table,
)
from sage_hub.repair.plan import Plan
from sage_hub.runtime.disk import write_whole
from sage_hub.runtime.limits import limited, text_of
from sage_hub.settings import MODELS, SETS, as_words

TEMPLATES = {None: "model_card.md.jinja", "short": "short.md.jinja"}


def find_template(name: str | None) -> Path:
    """The card template of that name, as installed or as in a source checkout, or a file.

    Raises NotFoundError if there is neither, UsageError if it is no Jinja template.
    """
    package = Path(__file__).parents[1]
    if name in TEMPLATES:
        installed = package / "model_card_templates" / TEMPLATES[name]
        return installed if installed.is_file() else package.parent / installed.relative_to(package)
    path = Path(str(name)).expanduser()
    if not path.is_file():
        raise NotFoundError(f"The card template {name} does not exist; give a file, or 'short'.")
    try:
        with limited():
            _environment().parse(path.read_text(encoding="utf-8"))
    except Exception as error:  # as deep as its brackets are
        raise UsageError(f"{path.name} is not a Jinja template: {first_line(error)}.") from None
    return path


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


def describe(plan: Plan, name: str, warnings: Sequence[str]) -> dict[str, Any]:
    """What the card of the release `name` says beside its figures, for the report."""
    taken = inherited(plan)
    return {
        "name": name,
        "adapter": isinstance(plan.unlearned, Adapter),
        "inherited": taken | {"pipeline_tag": taken.get("pipeline_tag", "text-generation")},
        "warnings": list(warnings),
    }


def write_card(
    folder: Path,
    manifest: Mapping[str, Any],
    report: Mapping[str, Any],
    template: str | None = None,
) -> None:
    """Write README.md and what belongs to it into `folder`, from the record alone.

    Raises UsageError if the template takes what there is not.
    """
    about = report["card"]
    told = {
        "card_data": front_matter(manifest, report).to_yaml(),
        "name": about["name"],
        "manifest": manifest,
        "report": report,
        "warnings": about["warnings"],
        "command": reproduce_command(manifest, about["name"]),
        "local": local_inputs(manifest),
        "highlights": list(highlights(report)),
        "not_run": not_run(report),
        "metrics": metric_table(report),
        "models": models_of(report),
        "robustness": robustness_table(report),
        "published": about["name"] if "/" in about["name"] else f"./{about['name']}",
        "copied": copied_by_reason(manifest),
        "adapter": about["adapter"],
        "pictures": draw(folder / "sage", manifest, report),
    }
    path = find_template(template)
    try:
        source = path.read_text(encoding="utf-8")
        page = text_of(lambda: str(ModelCard(_environment().from_string(source).render(told))))
    except Exception as error:  # a template is a program, which may fail in any way
        failure = UsageError(f"The card template {path.name} fails: {first_line(error)}.")
        failure.final = False  # all but the card is done, and fits another template
        raise failure from None
    write_whole(folder / "README.md", page)


def _environment() -> ImmutableSandboxedEnvironment:
    """Where card templates run: they see the record, and can change nothing of it."""
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["number"] = number
    return environment


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


def local_inputs(manifest: Mapping[str, Any]) -> list[str]:
    """What `reproduce_command` takes from the current folder, as the record says no other."""
    settings = manifest["settings"]
    names = [recorded_source(side) for side in manifest["sources"].values() if not side["commit"]]
    sets = [*(settings[name] for name in (*SETS, "unseen")), *settings["bystanders"].values()]
    names += [source for source in sets if source and "://" not in source]
    names += [side for name in MODELS if (side := settings[name] or "").startswith("./")]
    statistics = manifest["statistics"].get("file") or ""
    return names + [statistics] * statistics.endswith(".safetensors")


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
    # These change the speed, and the result by rounding at most.
    told = {name: v for name, v in settings.items() if name not in ("device", "batch_size")}
    words += as_words(told)
    return shlex.join(words)


def front_matter(manifest: Mapping[str, Any], report: Mapping[str, Any]) -> ModelCardData:
    """What the Hub reads. Of the sources only what is on the Hub can be linked to."""
    about, sources = report["card"], manifest["sources"]
    sides = ("base",) if about["adapter"] else ("base", "unlearned")
    # A folder in a repo is none that the Hub could link to.
    parents = ["/".join(sources[s]["name"].split("/")[:2]) for s in sides if sources[s]["commit"]]
    relation = "adapter" if about["adapter"] else "merge"
    related: dict[str, Any] = (
        {"base_model": parents, "base_model_relation": relation} if parents else {}
    )
    results = [
        _eval_result(result, report["data"].get(result["set"]))
        for result in report["results"]
        if result["model"] == "sanitized"
        and result["condition"] is None
        and result["set"] != "retain"  # it was calibrated on, so its figures prove nothing
    ]
    return ModelCardData(
        **about["inherited"],
        **related,
        library_name="peft" if about["adapter"] else "transformers",
        tags=["unlearning", "machine-unlearning", "sage-hub", "sage"],
        model_name=about["name"].rpartition("/")[2],
        eval_results=results or None,
    )


def _eval_result(result: Mapping[str, Any], data: Mapping[str, Any] | None) -> EvalResult:
    """A result for the older `model-index`; one made elsewhere has no data of ours."""
    name = data["name"] if data else str(result["source"] or "several sets")
    return EvalResult(
        task_type="text-generation",
        dataset_type=_dataset_id(name) or "custom",
        dataset_name=f"{result['set']} set ({name})",
        dataset_revision=data["revision"] if data else None,
        metric_type=f"{result['set']}_{result['metric']}",
        metric_name=f"{result['set']} {result['metric']} ({result['direction']} is better)",
        metric_value=round(result["value"], 6),
    )


def _dataset_id(name: str) -> str | None:
    """The id of a Hub dataset; None for a file."""
    if not name.startswith("hf://datasets/"):
        return None
    return "/".join(name.removeprefix("hf://datasets/").partition("?")[0].split("/")[:2])
