"""The Unlearning Depth Score: how much of what had to go is left in a model's hidden states.

As defined by Lee, Kim and Jo 2026 (arXiv 2605.24614) and in their code. The states of a model that
never saw the forget set are put into the base, behind one layer at a time, at the tokens from which
an answer is predicted. Where the base then finds the answer less probable, that layer carries what
the other lacks. How much of this the states of the unlearned model take away, too, is the score: 0
if they bring everything along, 1 if no more than those of the model that never saw it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import ProxyError, UsageError, about
from sage_hub.evaluation.bootstrap import Estimate, estimate
from sage_hub.evaluation.comparison import Key
from sage_hub.evaluation.look import Candidate
from sage_hub.evaluation.patching import count_layers, patch
from sage_hub.evaluation.suites import EvaluationSet
from sage_hub.model.blocks import cut
from sage_hub.rows.encoding import Encoded, load_tokenizer
from sage_hub.rows.proxies import Proxy, Row, about_set
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings

ROWS = 40  # that are looked at, at most
THRESHOLD = 0.05  # nats per token that a layer has to carry, to count
ENTITIES, ANSWERS = "uds", "uds_answer"  # by what of an answer is scored


def depth_of(lost: Sequence[float], theirs: Sequence[float]) -> float | None:
    """The score of a row, from what each layer's states of two models take away from the base.

    In nats per token: `lost` by the model's, `theirs` by those of the one that never saw the row.
    The mean over the layers where theirs take away more than THRESHOLD of the share that the
    model's do, between 0 and 1, weighted by theirs; None where there is no such layer.
    """
    own, full = np.asarray(lost, np.float64), np.asarray(theirs, np.float64)
    own, full = own[full > THRESHOLD], full[full > THRESHOLD]
    return float(np.clip(own, 0, full).sum() / full.sum()) if len(full) else None


def depth_metric(rows: Sequence[Row]) -> str:
    """What the score of `rows` is called: that of whole answers is another figure."""
    return ENTITIES if rows[0].entity else ANSWERS


@about("depth", "--depth")
def check_depth(
    proxies: Mapping[str, Proxy], settings: Settings, base: Checkpoint, *others: Checkpoint
) -> None:
    """See that the score can be measured, if it is asked for.

    `others` are models whose states are put into `base`, which have to have its layers and width.
    Raises UsageError if they have not, or if there is no reference or no forget set, ProxyError for
    a row whose entity is no part of its answer, or where only some rows name one.
    """
    if not settings.depth:
        return
    if settings.reference is None or settings.forget is None:
        raise UsageError(
            "--depth takes the forget rows and a model that never saw them; give --forget and "
            "--reference."
        )
    shape = _shape(base)
    if not shape[0]:
        raise UsageError(
            f"--depth looks between the layers of a model, and those of {base.name} cannot be run "
            "one by one; leave it out."
        )
    for other in others:
        if (layers := _shape(other)) != shape:
            raise UsageError(
                f"--depth puts hidden states of {other.name} ({layers[0]} layers of {layers[1]} "
                f"features) into {base.name} ({shape[0]} of {shape[1]}); give models of one shape, "
                "or leave it out."
            )
    if "forget" in proxies:  # if it could not be read, that is a problem of its own
        with about_set("forget"):
            _check_entities(proxies["forget"])


def unlearning_depth(
    models: Mapping[str, Candidate],
    origin: str,
    forget: EvaluationSet,
    tokens_of: Checkpoint,
    settings: Settings,
    scratch: Path,
    run: Run,
) -> tuple[dict[Key, Estimate], list[dict[str, str]]]:
    """The score of each of `models`, and what has none and why.

    Without `origin`, into which states are put, and "reference", which never saw the forget set:
    by definition theirs are 0 and 1.
    """
    tokenizer, metric = load_tokenizer(tokens_of), depth_metric(forget.rows)
    some = list(range(len(forget.rows)))
    random.Random(settings.seed).shuffle(some)
    parts = [
        scored_part(forget.told[place].answer, forget.rows[place].entity, tokenizer)
        for place in sorted(some[:ROWS])
    ]
    rows, what = [part for part in parts if part], f"{metric} on forget"
    if not rows:
        return {}, [{"what": what, "reason": "no row has tokens that it could be measured on"}]
    absent = []
    if metric != ENTITIES:
        reason = (
            f"the rows name no entity; {metric} is of whole answers, and not the paper's figure"
        )
        absent.append({"what": f"{ENTITIES} on forget", "reason": reason})
    if lacking := len(parts) - len(rows):
        reason = "their tokens do not show what is to be scored"
        absent.append({"what": f"{what}: {lacking} of {len(parts)} rows", "reason": reason})
    sources = {name: one for name, one in models.items() if name != origin}
    if sources.keys() == {"reference"}:
        return {}, [{"what": what, "reason": f"there is no model beside {origin}"}]
    found = patch(models[origin], sources, rows, settings, scratch, run)
    lost = {name: (losses - found.alone).T for name, losses in found.by.items()}
    theirs = lost.pop("reference")
    scores: dict[Key, Estimate] = {}
    for name, own in lost.items():
        pairs = zip(own, theirs, strict=True)
        values = [value for pair in pairs if (value := depth_of(*pair)) is not None]
        if values:  # the same rows for every model
            scores[Key(name, "forget", metric)] = estimate(values, seed=settings.seed)
    if lost and not scores:
        reason = "in no layer does the base carry anything of these rows that the reference lacks"
        absent.append({"what": what, "reason": reason})
    return scores, absent


def scored_part(row: Encoded, entity: str, tokenizer: PreTrainedTokenizerBase) -> Encoded | None:
    """The row as far as it is scored, its answer being the tokens that have a part in `entity`.

    Without one all tokens of the answer's own words. None if there are none, as where the entity
    was cut away.
    """
    ids, start = row.ids[: len(row.ids) - row.uncounted], row.answer_start
    if entity:
        texts = [_text(tokenizer, ids[start:end]) for end in range(start + 1, len(ids) + 1)]
        begins = texts[-1].find(entity) if texts else -1
        if begins < 0:
            return None
        reaching = [begins < len(text) for text in texts]
        covering = [begins + len(entity) <= len(text) for text in texts]
        ids, start = ids[: start + covering.index(True) + 1], start + reaching.index(True)
    return replace(row, ids=ids, answer_start=start, uncounted=0) if len(ids) > start else None


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode([*ids], clean_up_tokenization_spaces=False))


def _shape(side: Checkpoint) -> tuple[int, int]:
    """Layers that can be run one by one, and features between them."""
    model = side.of_model.empty_model()
    return count_layers(cut(model)), model.config.get_text_config().hidden_size


def _check_entities(proxy: Proxy) -> None:
    """Raise ProxyError unless every row names a part of its answer, or none does."""
    named = bool(proxy.rows[0].entity)
    for row, place in zip(proxy.rows, proxy.places, strict=True):
        if bool(row.entity) != named:
            raise ProxyError(
                f"{proxy.name}, {place}: {'no' if named else 'an'} 'entity', unlike the first row; "
                "--depth of entities and of whole answers do not mix, so name one in all rows or "
                "in none."
            )
        if row.entity not in row.answer:
            raise ProxyError(
                f"{proxy.name}, {place}: 'entity' must be a part of the answer for --depth, and "
                f"{row.entity[:60]!r} is none."
            )
