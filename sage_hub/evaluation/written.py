"""The rows that a base model writes itself where none are given: its questions, its answers.

A model's own text shows what it knows better than a general corpus does (for quantization see
arXiv 2410.17170); that an instruction-tuned one asks questions if it is given no more than the
opening of a user's turn is Magpie's observation (arXiv 2406.08464).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import ProxyError
from sage_hub.evaluation.scoring import answer, generate
from sage_hub.evaluation.suites import Answering
from sage_hub.model.blocks import BlockModel
from sage_hub.rows.encoding import Encoder, encoder_of, end_tokens
from sage_hub.rows.forms import parse_rows
from sage_hub.rows.proxies import Row
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings

NAME = "rows that the base wrote"
TOP_P, TOP_K = 0.95, 256  # of each token of a question; answers are greedy
QUESTION_TOKENS, ANSWER = 48, Answering(96, ("\nQuestion:",))
LONGEST = QUESTION_TOKENS + ANSWER.max_new_tokens + 16  # tokens of a row, with its opening
AT_ONCE = 32  # questions that are sampled together: few enough for every word to have its turn
ROUNDS = 4  # that many times as many are sampled as are wanted, at most
IN_VAIN = 3  # rounds without a question, and there will be none
FEWEST_WORDS = 4  # of a question
NEW = 0.5  # of the words of a row: the share that begin three words not seen before in it
# Without a chat template: no hint at a topic, but one at what kind of thing is asked.
WORDS = ("What", "How", "Who", "Why", "Which", "Can", "Where", "Did")


def write_rows(
    model: BlockModel, tokens_of: Checkpoint, count: int, settings: Settings, run: Run
) -> list[dict[str, str]]:
    """`count` questions with answers that `model`, whole and in memory, writes; fewer at worst.

    The same for the same weights and seed on the same machine. Raises ProxyError for a chat
    template that opens no turn of a user.
    """
    encoder = encoder_of(tokens_of, settings)
    asked: dict[str, str] = {}  # without case -> as it was written
    ends, rounds = end_tokens(tokens_of), ROUNDS * -(-count // AT_ONCE)
    with run.progress.counter("Writing questions", count, "row") as bar, torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        for number, opening in enumerate(_openings(encoder, rounds), 1):
            for question in _sampled(model, encoder, opening, ends):
                asked.setdefault(" ".join(question.casefold().split()), question)
            bar.update(min(len(asked), count) - bar.n)
            if len(asked) >= count or (number >= IN_VAIN and not asked):
                break
    questions = list(asked.values())
    random.Random(settings.seed).shuffle(questions)  # as some openings are shorter than others
    questions = questions[:count]
    questions = [one for one in questions if _shown(encoder, one, ".")]
    prompts = [encoder.row(_row(one, "."), NAME) for one in questions]
    size = settings.batch_size
    said = answer(model, tokens_of, prompts, ANSWER, size, run=run, what="Answering them")
    return [
        {"question": question, "answer": text}
        for question, text in zip(questions, said, strict=True)
        if text and not repeats(text) and _shown(encoder, question, text)
    ]


def check_opening(tokens_of: Checkpoint, settings: Settings) -> None:
    """Raise ProxyError for a chat template behind which no question can be sampled."""
    next(_openings(encoder_of(tokens_of, settings), 1))


def far_more_lost(lost: Sequence[float], times: float) -> list[bool]:
    """Which rows have lost far more than most, by the nats per token that each has lost.

    Those more than `times` the median deviation above the median.
    """
    middle = median(lost)
    spread = median(abs(one - middle) for one in lost)
    return [one > middle + times * spread for one in lost]


def repeats(text: str) -> bool:
    """Whether a text goes round in circles: its triples of words are mostly the same ones."""
    words = text.casefold().split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(triples) > 0 and len(set(triples)) < NEW * len(triples)


@dataclass(frozen=True)
class _Opening:
    """What a question is sampled behind, and how one ends."""

    ids: tuple[int, ...]
    stops: tuple[str, ...]
    begun: str = ""  # the word of a plain question that is there already


def _openings(encoder: Encoder, rounds: int) -> Iterator[_Opening]:
    """For each round one: that of a user's turn in the chat template, or of a plain question."""
    tokenizer, chat = encoder.tokenizer, encoder.chat
    if chat is not None:
        before, behind = chat.turn
        ids = tuple(tokenizer(before, add_special_tokens=False)["input_ids"])
        if not ids:
            raise ProxyError(
                "The chat template writes nothing before what a user says, so the base cannot be "
                "asked for questions; give --retain and --forget, or use --no-chat-template."
            )
        stops = (behind.strip(),) if behind.strip() else ()
        yield from [_Opening(ids, stops)] * rounds
        return
    plain = [
        _Opening(tuple(tokenizer(f"Question: {word}")["input_ids"]), ("?", "\n"), word)
        for word in WORDS
    ]
    for number in range(rounds):
        yield plain[number % len(plain)]


def _sampled(
    model: BlockModel, encoder: Encoder, opening: _Opening, ends: Sequence[int]
) -> Iterator[str]:
    """The whole questions among AT_ONCE that are sampled."""
    tokenizer = encoder.tokenizer
    kind = Answering(QUESTION_TOKENS, opening.stops)
    marks = [str(one) for one in tokenizer.added_tokens_decoder.values() if one.special]
    for line in generate(model, tokenizer, [opening.ids] * AT_ONCE, kind, ends, _nucleus):
        whole = len(line) < QUESTION_TOKENS  # it has come to an end
        if opening.begun:
            # Decoded together, as a tokenizer may leave away a space at the beginning.
            _, begun, rest = str(tokenizer.decode([*opening.ids, *line])).partition(opening.begun)
            text, found, _ = rest.partition("?")
            whole, text = bool(found) and "\n" not in text, f"{begun}{text}{found}"
        else:
            text = str(tokenizer.decode(line))
            for stop in opening.stops:
                text, found, _ = text.partition(stop)
                whole = whole or bool(found)
        text = text.strip()
        alone = not any(mark in text for mark in marks)  # no turn of anybody else begins in it
        if whole and alone and len(text.split()) >= FEWEST_WORDS and not repeats(text):
            yield text


def _nucleus(logits: Tensor) -> Tensor:
    """The likeliest tokens alone, which hold TOP_P in all; logits (rows, vocabulary).

    What a broken model makes is sampled as well; calibration says where it breaks.
    """
    logits = logits.nan_to_num(0.0)
    top, at = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1)
    held = logits.softmax(-1).gather(1, at)
    beyond = held.cumsum(-1) - held > TOP_P
    nothing = torch.full_like(logits, -torch.inf)
    return nothing.scatter(1, at, top.masked_fill(beyond, -torch.inf))


def _shown(encoder: Encoder, question: str, said: str) -> bool:
    """Whether the model can be shown the row, and all of it: a sampled one may be anything."""
    try:
        row = encoder.row(_row(question, said), NAME)
    except ProxyError:
        return False
    return row.answer_tokens > 0


def _row(question: str, said: str) -> Row:
    (row,) = parse_rows([{"question": question, "answer": said}], NAME)
    return row
