"""What a model makes of rows: how probable it finds each token of an answer, what it answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from sage_hub.checkpoint.files import read_json
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.evaluation.suites import Answering
from sage_hub.model.blocks import BlockModel
from sage_hub.model.spill import Spill
from sage_hub.model.weights import Weights
from sage_hub.rows.benchmark import decoded
from sage_hub.rows.encoding import (
    Batch,
    Encoded,
    attended,
    batches,
    end_tokens,
    load_tokenizer,
)
from sage_hub.runtime.machine import GB
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings

TAIL = 16  # tokens in which the end of an answer is looked for
ROWS_PER_BATCH = 4  # one token of a row at a time takes little, so more rows fit
LOGITS = 1 << 24  # at a time: 64 MB in float32
# What generation_config.json may say of greedy decoding.
TUNED = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "suppress_tokens")


@dataclass(frozen=True)
class Scored:
    """An answer as a model sees it, token by token, each given all that stands before it."""

    logprobs: np.ndarray  # (tokens,) float32, in nats
    # (tokens that may be memorized,) bool: whether it is the one that greedy decoding takes
    hits: np.ndarray
    # (tokens,) float32: log-probability above the vocabulary's mean, in standard deviations, both
    # under the model's own distribution; where it was asked for.
    standard: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        return len(self.logprobs)

    @property
    def loss(self) -> float:
        """ℓ, the mean negative log-likelihood per answer token, in nats; NaN of no tokens."""
        return -float(self.logprobs.mean(dtype=np.float64)) if self.tokens else math.nan

    def without(self, uncounted: int) -> Scored:
        """The same, the last `uncounted` tokens being none that may be memorized."""
        return replace(self, hits=self.hits[: max(0, self.tokens - uncounted)])


Choice = Callable[[Tensor], Tensor]  # logits (rows, vocabulary), for the next token of each row
Known = Mapping[Encoded, Scored]  # rows that a model was shown already, as it sees them


@torch.inference_mode()
def score(
    model: BlockModel,
    weights: Weights,
    rows: Sequence[Encoded],
    settings: Settings,
    scratch: Path,
    *,
    run: Run = Run(),  # noqa: B008 - frozen
    what: str = "Evaluating",
) -> list[Scored]:
    """Score the answer of each of `rows`; of one that was cut away by truncation no tokens.

    Between two blocks of the model a quarter of `settings.memory` is for hidden states, and the
    others wait in the folder `scratch`; with several ranks each does a part of the rows. Only
    answer tokens go through the LM head, and rows that differ in nothing but an answer of one
    token, as the letters of a multiple-choice question do, are run once.
    """
    (found,) = score_each(model, [weights], rows, settings, scratch, run=run, what=what)
    return found


@torch.inference_mode()
def score_each(
    model: BlockModel,
    variants: Sequence[Weights],
    rows: Sequence[Encoded],
    settings: Settings,
    scratch: Path,
    *,
    run: Run = Run(),  # noqa: B008 - frozen
    what: str = "Evaluating",
) -> list[list[Scored]]:
    """The same for several variants of a model's weights, the first those it was opened with.

    Block by block, so that what they have in common is read and computed once.
    """
    ranks, kept = run.ranks, settings.memory * GB / 4
    attacked = settings.unseen is not None  # membership is asked for, which takes more
    alike: dict[object, list[int]] = {}
    for place, row in enumerate(rows):
        alone = (row.ids[:-1], row.unattended) if row.answer_tokens == 1 else place
        alike.setdefault(alone, []).append(place)
    groups = list(alike.values())
    found: list[dict[int, Scored]] = [{} for _ in variants]
    own = ranks.mine(list(batches([rows[group[0]] for group in groups], settings.batch_size)))
    steps, total = len(model.blocks), len(groups) * len(variants)
    with run.progress.counter(what, total, "row") as bar, Spill(scratch, kept) as hidden:
        for block, (which, weights) in product(model.blocks, enumerate(variants)):
            with model.holding(block, weights, head=True, variant=which > 0):
                for number, batch in enumerate(own, which * len(own)):
                    states = model.run(block, batch, hidden.get(number))
                    if block.finishes:
                        # What each place of the batch stands for: all of its answers' tokens.
                        wanted = [
                            [rows[place].ids[rows[place].answer_start :] for place in groups[line]]
                            for line in batch.rows
                        ]
                        made = score_states(model, batch, states, wanted, attacked=attacked)
                        for line, scored in zip(batch.rows, made, strict=True):
                            found[which] |= dict(zip(groups[line], scored, strict=True))
                    else:
                        hidden.put(number, states)
                    bar.update(ranks.count * len(batch.rows) / steps)
    everything: list[dict[int, Scored]] = [{} for _ in variants]
    for part in ranks.all(found):
        for own_scores, more in zip(everything, part, strict=True):
            own_scores |= more
    return [
        [scores[place].without(row.uncounted) for place, row in enumerate(rows)]
        for scores in everything
    ]


def score_states(
    model: BlockModel,
    batch: Batch,
    states: Tensor,
    wanted: Sequence[Sequence[Sequence[int]]],
    *,
    attacked: bool,
) -> Iterator[list[Scored]]:
    """Of each row its answers, from the final hidden `states` (rows, tokens, features).

    `wanted` holds the tokens of the answers of each row, which are of one length. If `attacked`,
    with each token's place among the vocabulary.
    """
    before = batch.answer[:, 1:]  # the state at a token predicts the next one
    chosen = states[:, :-1][before.to(states.device)]
    counts = [len(answers[0]) for answers in wanted]
    most = max(map(len, wanted))
    # (positions, answers): where a row has fewer answers than another, its first one again.
    targets = torch.tensor(
        [
            [answers[number if number < len(answers) else 0][step] for number in range(most)]
            for answers in wanted
            for step in range(len(answers[0]))
        ],
        dtype=torch.long,
    ).reshape(-1, most)
    logprobs, hits = np.empty(targets.shape, np.float32), np.empty(targets.shape, bool)
    standard = np.empty(targets.shape, np.float32) if attacked else None
    step = max(1, LOGITS // model.model.get_input_embeddings().weight.shape[0])
    for start in range(0, len(targets), step):
        part = slice(start, start + step)
        own = targets[part].to(states.device)
        logits = model.logits(chosen[part]).float()
        every = logits.log_softmax(-1)
        logprobs[part] = every.gather(1, own).cpu().numpy()
        hits[part] = (logits.argmax(-1, keepdim=True) == own).cpu().numpy()
        if standard is not None:
            standard[part] = _standard(every, own).cpu().numpy()
    stop = 0
    for answers, count in zip(wanted, counts, strict=True):
        part = slice(stop, stop := stop + count)
        for_each = [standard[part, n] if standard is not None else None for n in range(most)]
        yield [Scored(logprobs[part, n], hits[part, n], for_each[n]) for n in range(len(answers))]


def _standard(logprobs: Tensor, tokens: Tensor) -> Tensor:
    """How far the log-probabilities of `tokens` (positions, some) lie above their mean.

    In standard deviations; mean and deviation are under each of the distributions `logprobs`
    (positions, vocabulary) itself.
    """
    weights = logprobs.exp()
    mean = (weights * logprobs).nansum(-1, keepdim=True)  # 0 · −∞ is nothing
    spread = (weights * logprobs.square()).nansum(-1, keepdim=True) - mean.square()
    return (logprobs.gather(1, tokens) - mean) / spread.clamp(min=1e-6).sqrt()


@torch.inference_mode()
def answer(
    model: BlockModel,
    tokens_of: Checkpoint,
    rows: Sequence[Encoded],
    kind: Answering,
    batch_size: int,
    *,
    run: Run = Run(),  # noqa: B008 - frozen
    what: str = "Answering",
    drawing: Callable[[Sequence[int]], Choice] | None = None,
) -> list[str]:
    """The continuation of the prompt of each of `rows`, as `kind` says.

    Greedy, or as `drawing` says for those at some places. `model` must be whole, and in memory.
    """
    tokenizer, ends, ranks = load_tokenizer(tokens_of), end_tokens(tokens_of), run.ranks
    tuned = _tuned(tokens_of) if kind.tuned else {}
    order = sorted(range(len(rows)), key=lambda place: (-len(rows[place].asked), place))
    size = ROWS_PER_BATCH * batch_size
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    found: dict[int, str] = {}
    with run.progress.counter(what, len(rows), "row") as bar:
        for places in ranks.mine(groups):
            prompts = [rows[place].asked for place in places]
            unattended = [rows[place].unattended for place in places]
            choose = drawing(places) if drawing else None
            lines = generate(
                model, tokenizer, prompts, kind, ends, choose, tuned=tuned, unattended=unattended
            )
            for place, line in zip(places, lines, strict=True):
                found[place] = _said(tokenizer, line, kind)
            bar.update(ranks.count * len(places))
    everything = {place: text for part in ranks.all(found) for place, text in part.items()}
    return [everything[place] for place in range(len(rows))]


def _said(tokenizer: PreTrainedTokenizerBase, line: Sequence[int], kind: Answering) -> str:
    if kind.tuned:
        text = decoded(tokenizer, line)
    else:
        text = str(tokenizer.decode([*line], skip_special_tokens=True))
    for stop in kind.stops:
        text = text.partition(stop)[0]
    return text.strip()


def _tuned(checkpoint: Checkpoint) -> dict[str, Any]:
    """What generation_config.json says of how tokens are chosen, but for sampling."""
    name = "generation_config.json"
    stated = read_json(checkpoint.files, name) if name in checkpoint.files.sizes else {}
    return {key: stated[key] for key in TUNED if key in stated}


@torch.inference_mode()
def generate(
    model: BlockModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    kind: Answering,
    ends: Sequence[int],
    choose: Choice | None = None,
    *,
    tuned: Mapping[str, Any] = {},
    unattended: Sequence[int | None] = (),
) -> list[list[int]]:
    """The tokens that `model`, whole and in memory, goes on with behind each of `prompts`.

    Up to one of `ends`, which is left away; one of the stops may be among them, with a few more.
    Greedily, or sampled from the logits (rows, vocabulary) that `choose` makes of them. `tuned` are
    fields of a GenerationConfig, `unattended` of each prompt a token that no other looks at.
    """
    width = max(map(len, prompts))
    # Padded on the left, so that every row goes on from its own last token.
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for line, prompt in enumerate(prompts):
        ids[line, width - len(prompt) :] = torch.tensor(prompt)
        hidden = unattended[line] if unattended else None
        mask[line, width - len(prompt) :] = attended(prompt, hidden)
    context = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    room = context - width if isinstance(context, int) else kind.max_new_tokens
    config = GenerationConfig(
        **tuned,
        **({"do_sample": True, "top_k": 0} if choose else {"do_sample": False}),
        max_new_tokens=max(1, min(kind.max_new_tokens, room)),
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
    )

    def stopped(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """Which rows have come to one of the stops, all of which are shorter than the tail."""
        tails = tokenizer.batch_decode(ids[:, max(width, ids.shape[1] - TAIL) :])
        there = [any(stop in tail for stop in kind.stops) for tail in tails]
        return torch.tensor(there, device=ids.device)

    made = model.model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        stopping_criteria=[stopped] if kind.stops else [],
        logits_processor=[lambda _, logits: choose(logits)] if choose else [],
    )
    lines: list[list[int]] = made[:, width:].tolist()
    return [
        line[: next((place for place, token in enumerate(line) if token in ends), len(line))]
        for line in lines
    ]
