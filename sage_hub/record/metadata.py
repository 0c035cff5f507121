"""What a card inherits of the sources' cards: what can be read of them, and the Hub takes."""

from __future__ import annotations

import codecs
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from sage_hub.checkpoint.files import is_lfs_pointer
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.checkpoint.yamls import TextLoader
from sage_hub.errors import SageHubError, first_line
from sage_hub.repair.plan import Plan

# The release only inherits what still holds for it; scores, widgets and the like do not.
LICENCE = ("license", "license_name", "license_link")
INHERITED = (*LICENCE, "language", "pipeline_tag")
LISTS = ("license", "language")  # which may be several


def licences() -> frozenset[str]:
    """The identifiers that the Hub takes for `license`; it refuses a card with another."""
    return _words("licences.txt")


def languages() -> frozenset[str]:
    """What the Hub takes for `language`: the codes of ISO 639-1 and 639-3, and words of its own."""
    return _words("languages.txt") | {"code", "multilingual"}


@cache
def _words(name: str) -> frozenset[str]:
    path = Path(__file__).parents[1] / "data" / name
    return frozenset(path.read_text(encoding="ascii").split())


def inherited(plan: Plan) -> dict[str, Any]:
    """The front matter that the card of a release takes over."""
    return _sort(plan)[0]


def metadata_warnings(plan: Plan) -> list[str]:
    """What of the sources' cards cannot be read, is not taken over, or contradicts itself."""
    sides = {"base": plan.base, "unlearned": plan.unlearned}
    found = {side: read_card(checkpoint) for side, checkpoint in sides.items()}
    warnings = [
        f"README.md of the {side} side ({sides[side].name}) {why}; nothing is taken over of it."
        for side, (_, why) in found.items()
        if why
    ]
    base, unlearned = (metadata.get("license") for metadata, _ in found.values())
    if None not in (base, unlearned) and base != unlearned:
        warnings.append(
            f"The licences of the sources differ (base: {base}, unlearned: {unlearned}); the card "
            "states the unlearned one's. Check which applies."
        )
    return warnings + _sort(plan)[1]


def _sort(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """What is taken over, and a warning for each thing that is left out."""
    stated = read_card(plan.base)[0] | read_card(plan.unlearned)[0]
    taken = {name: stated[name] for name in INHERITED if stated.get(name)}
    kept, warnings = {}, []
    for name, value in taken.items():
        fit, why = _fit(name, value, taken)
        if why:
            states = f"does not state {why[0]!r} as its {name}" if fit else f"states no {name}"
            warnings.append(
                f"The card {states}: {why[1]}. Set it on the release's page if it should."
            )
        if fit:
            kept[name] = fit
    if "license" not in kept:
        kept = {name: value for name, value in kept.items() if name not in LICENCE}
    return kept, warnings


def _fit(name: str, value: Any, stated: dict[str, Any]) -> tuple[Any, tuple[Any, str] | None]:
    """What of a field the Hub takes, as it writes it; and the first thing that it does not, why.

    Of several languages those that it knows stay, but a licence that is one of two is none.
    """
    several = isinstance(value, list) and name in LISTS
    values = value if several else [value]
    bad = [(one, why) for one in values if (why := _refusal(name, one, stated))]
    if bad and not (several and name == "language"):
        return None, bad[0]
    wrong = [one for one, _ in bad]
    fit = [one.lower() if name == "license" else one for one in values if one not in wrong]
    fit = list(dict.fromkeys(fit))
    return (fit if several else fit[0]), (bad[0] if bad else None)


def _refusal(name: str, value: Any, stated: dict[str, Any]) -> str | None:
    """Why the Hub would refuse a card with this value of a field; None if it takes it."""
    if not isinstance(value, str):
        return f"the sources' is no text ({value!r})"
    if name == "license" and value.lower() not in licences():
        return f"the sources' is {value!r}, and the Hub refuses a licence that it does not know"
    if name == "license" and value.lower() == "other" and not stated.get("license_name"):
        return "the sources' is 'other', which the Hub takes with a license_name only"
    if name == "language" and value not in languages():
        return f"the sources' is {value!r}, and the Hub wants a code of ISO 639, as 'en'"
    return None


def read_card(checkpoint: Checkpoint) -> tuple[dict[str, Any], str | None]:
    """The front matter of the checkpoint's own card, and what kept it from being read, if any."""
    if "README.md" not in checkpoint.files.sizes:
        return {}, None
    try:
        content = checkpoint.files.path("README.md").read_bytes()
        if is_lfs_pointer(content):
            return {}, "is a Git LFS pointer"
        text = _decode(content)
        # All as text: what YAML takes for a truth value or a date is the language Norwegian, say.
        front = REGEX_YAML_BLOCK.search(text)
        return dict(yaml.load(front[2], TextLoader) or {}) if front else {}, None
    except (ValueError, TypeError, OSError, RecursionError, yaml.YAMLError, SageHubError) as error:
        return {}, f"has metadata that cannot be read ({first_line(error)})"


def _decode(content: bytes) -> str:
    """The text of a file that is UTF-8, as a rule."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    if content[:2].count(0) == 1:  # ASCII in two bytes each
        return content.decode("utf-16-be" if content[0] == 0 else "utf-16-le")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")
