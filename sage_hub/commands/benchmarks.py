"""Benchmarks by name: the settings that each prescribes, as a sage.yaml that anyone can change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from string import Template

from sage_hub.checkpoint.location import parse_location
from sage_hub.errors import UsageError

# name -> what the file of its first part has to be told
BENCHMARKS: Mapping[str, Mapping[str, str]] = {
    **{
        f"tofu/forget{part}": {
            "forget": f"forget{part}",
            "retain": f"retain{100 - int(part)}",
            "holdout": f"holdout{part}",
        }
        for part in ("01", "05", "10")
    },
    **{f"muse/{corpus.lower()}": {"corpus": corpus} for corpus in ("News", "Books")},
    **{f"wmdp/{field}": {"field": field} for field in ("bio", "cyber")},
}
# What open-unlearning calls the model that never saw what another has to forget.
REFERENCES = {"tofu": (r"(open-unlearning/tofu_.+)_full", r"\1_{retain}")}
# The families to which its configuration gives a system prompt of its own, and that.
SPEAKING = re.compile(r"Llama-3|Qwen2\.5|Phi-3\.5|zephyr", re.IGNORECASE)
SYSTEM_PROMPT = "You are a helpful assistant."


def benchmark_settings(name: str, base: str) -> str:
    """The YAML of the benchmark `name` for a model that began as `base`, if that is known.

    Raises UsageError if there is none of that name.
    """
    if name not in BENCHMARKS:
        raise UsageError(
            f"There is no benchmark {name!r}; --benchmark takes {', '.join(BENCHMARKS)}."
        )
    family, told = name.partition("/")[0], BENCHMARKS[name]
    text = Template((files("sage_hub") / f"data/benchmarks/{family}.yaml").read_text("utf-8"))
    repo = parse_location(base).repo if base else ""
    lines = []
    if family == "tofu" and SPEAKING.search(repo):
        lines.append(f"system_prompt: {SYSTEM_PROMPT}")
    pattern, reference = REFERENCES.get(family, ("", ""))
    if match := re.fullmatch(pattern, repo) if pattern else None:
        lines.append(f"reference: {match.expand(reference.format_map(told))}")
    return text.substitute(told) + "".join(f"{line}\n" for line in lines)
