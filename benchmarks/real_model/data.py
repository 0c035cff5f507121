"""The rows of one seed: what is forgotten, kept, held out, and looked at besides. TOFU's authors.

Every author of TOFU has 20 rows in a run, so sets of whole authors share no author. What the model
learns is forget, proxy and held-out rows; no unlearning method and no repair sees a held-out row.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sage_hub.rows.encoding import Encoded, encode
from sage_hub.rows.forms import parse_rows
from sage_hub.rows.proxies import Proxy
from sage_hub.rows.sources import read_proxy

ROWS_PER_AUTHOR = 20
HUB = "locuslab/TOFU"
MAX_LENGTH = 256  # tokens; no row is longer
MAIN = "retain"  # the retain proxy that all but a comparison of proxies is made with
SKETCHED = "sketched"  # the same rows, by sketched second moments
BYSTANDERS = ("world_facts", "real_authors")


@dataclass(frozen=True)
class Size:
    """How much of TOFU is learned and looked at."""

    name: str
    forget: str  # file of the rows to forget
    retain: str  # file of the others
    proxy_authors: int
    heldout_authors: int
    proxy_rows: int  # of the proxy authors, what calibration sees
    evaluated: int  # rows of a set, at most
    bystanders: int  # questions of each other kind


CPU = Size("cpu", "forget01", "retain99", 7, 3, 100, 60, 40)
MIDDLE = Size("middle", "forget05", "retain95", 30, 10, 400, 200, 40)
FULL = Size("full", "forget10", "retain90", 120, 60, 400, 400, 60)
GEMMA = replace(CPU, name="gemma")  # the second model
SIZES = {size.name: size for size in (CPU, MIDDLE, FULL, GEMMA)}


@dataclass(frozen=True)
class Rows:
    """The sets of one seed; `choices` are questions, each with its candidate answers, right first.

    `keep` are all rows of the proxy authors, in random order, `texts` passages of the
    general-purpose proxy. Held-out rows with wrong answers are those of TOFU's retain_perturbed
    that are learned, but not in the main proxy; of few authors there may be none.
    """

    forget: Proxy
    keep: Proxy
    heldout: Proxy
    texts: Proxy
    proxies: Mapping[str, Proxy]  # retain proxies: the main one, and others to compare with it
    choices: Mapping[str, tuple[Proxy, ...]]
    perturbed: Mapping[str, Proxy]  # with wrong answers, as TOFU's own figures want them


def read_rows(tofu: str | None, size: Size, seed: int) -> Rows:
    """Draw the sets of `seed` from the folder `tofu`, or from the Hub where it is None."""
    rng = random.Random(seed)
    retain = _records(tofu, size.retain)
    authors = [
        retain[first : first + ROWS_PER_AUTHOR] for first in range(0, len(retain), ROWS_PER_AUTHOR)
    ]
    rng.shuffle(authors)
    proxy = _join(authors[: size.proxy_authors])
    heldout = _join(authors[size.proxy_authors :][: size.heldout_authors])
    rng.shuffle(proxy)
    general = list(read_proxy(None).rows)
    rng.shuffle(general)
    choices, facts = {}, []
    for name in BYSTANDERS:
        records = _records(tofu, f"{name}_perturbed")
        rng.shuffle(records)
        choices[name] = tuple(_candidates(record) for record in records[: size.bystanders])
        facts += records[size.bystanders :]
    keep = parse_rows(proxy, "proxy")
    parts = {MAIN: size.proxy_rows, "quarter": size.proxy_rows // 4, "half": size.proxy_rows // 2}
    proxies = {name: Proxy("retain", keep[:rows]) for name, rows in parts.items()}
    unseen = {record["question"] for record in proxy[size.proxy_rows :] + heldout}
    perturbed = {
        "forget": _records(tofu, f"{size.forget}_perturbed"),
        "heldout": [
            record for record in _records(tofu, "retain_perturbed") if record["question"] in unseen
        ],
        **{name: _records(tofu, f"{name}_perturbed") for name in BYSTANDERS},
    }
    return Rows(
        forget=Proxy("forget", parse_rows(_records(tofu, size.forget), "forget")),
        keep=Proxy("keep", keep),
        heldout=Proxy("heldout", parse_rows(heldout, "heldout")),
        texts=Proxy("texts", tuple(general[: size.bystanders])),
        proxies=proxies
        | {
            "most": Proxy("retain", keep),
            "general": Proxy("retain", tuple(general[-size.proxy_rows :])),
            "facts": Proxy("retain", parse_rows(facts[: size.proxy_rows], "facts")),
        },
        choices=choices,
        perturbed={
            name: Proxy(name, parse_rows(records, name))
            for name, records in perturbed.items()
            if records
        },
    )


def tokens(proxy: Proxy, tokenizer: Any) -> list[Encoded]:
    """The rows of `proxy` as tokens, in plain "Question: … Answer: …" form."""
    return encode(proxy, tokenizer, chat_template=False, max_length=MAX_LENGTH)


def _records(tofu: str | None, name: str) -> list[dict[str, Any]]:
    if tofu is None:
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(HUB, f"{name}.json", repo_type="dataset"))
    else:
        path = Path(tofu) / f"{name}.json"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _candidates(record: Mapping[str, Any]) -> Proxy:
    answers = [record["answer"], *record["perturbed_answer"]]
    rows = [{"question": record["question"], "answer": answer} for answer in answers]
    return Proxy("choices", parse_rows(rows, "choices"))


def _join(authors: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [record for author in authors for record in author]
