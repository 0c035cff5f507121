"""Which metrics a set is evaluated by, and what of its rows a model has to be shown for that."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from sage_hub.checkpoint.index import Checkpoint
from sage_hub.rows.benchmark import SUITES as BENCHMARKS
from sage_hub.rows.benchmark import BenchmarkEncoder, evaluation_encoder
from sage_hub.rows.encoding import Encoded, take_rows
from sage_hub.rows.proxies import Proxy, Row
from sage_hub.settings import Settings

T = TypeVar("T")
U = TypeVar("U")

ALWAYS = ("extraction_strength", "exact_memorization")
# The metrics of each suite, by the kind of row.
SUITES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "tofu": {
        "question": ("probability", "rougeL_recall", "truth_ratio", "repetition", "loss"),
        "prompt": ("probability", "rougeL_recall", "repetition", "loss"),
        "choice": ("accuracy", "probability", "loss"),
        "text": ("probability", "loss"),
    },
    "muse": {
        "question": ("knowmem", "probability", "loss"),
        "prompt": ("verbmem", "probability", "repetition", "loss"),
        "choice": ("accuracy", "probability", "loss"),
        "text": ("probability", "loss"),
    },
    "choice": {kind: ("accuracy",) for kind in ("question", "prompt", "choice", "text")},
    "text": {kind: ("perplexity", "loss") for kind in ("question", "prompt", "choice", "text")},
}
# What a set of rows of one kind is evaluated by if nobody says.
BY_KIND = {"question": "tofu", "prompt": "tofu", "choice": "choice", "text": "text"}


@dataclass(frozen=True)
class Answering:
    """How an answer is generated: up to so many tokens or one of the `stops`."""

    max_new_tokens: int
    stops: tuple[str, ...] = ()
    tuned: bool = False  # as open-unlearning does: by generation_config.json, but not sampled


SAMPLES, SAMPLED_ROWS = 8, 40  # answers to a forget question, and questions at most
# The metrics of generated answers; lengths are those of TOFU's and MUSE's own code.
ANSWERS = {
    "rougeL_recall": Answering(200, ("\nQuestion:",)),
    "knowmem": Answering(32, ("\n\n", "\nQuestion", "Question:")),
    "verbmem": Answering(128),
}


@dataclass(frozen=True)
class Told(Generic[T]):
    """A row and the same row told otherwise, where the data has that: as text, tokens or scores."""

    answer: T
    paraphrased: T | None = None
    perturbed: tuple[T, ...] = ()
    asked_otherwise: T | None = None
    choices: tuple[T, ...] = ()

    def __iter__(self) -> Iterator[T]:
        """All tellings, in an order of their own."""
        for one in (self.answer, self.paraphrased, self.asked_otherwise):
            if one is not None:
                yield one
        yield from self.perturbed
        yield from self.choices

    def map(self, function: Callable[[T], U]) -> Told[U]:
        """The same with `function` of each, called in the order of iteration."""
        singles = [
            None if one is None else function(one)
            for one in (self.answer, self.paraphrased, self.asked_otherwise)
        ]
        answer, paraphrased, asked_otherwise = singles
        assert answer is not None
        return Told(
            answer,
            paraphrased,
            tuple(map(function, self.perturbed)),
            asked_otherwise,
            tuple(map(function, self.choices)),
        )


@dataclass(frozen=True)
class EvaluationSet:
    """The rows of a set that are evaluated, as tokens, and by which metrics."""

    name: str
    kind: str  # of its rows: question, prompt, choice or text
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    told: tuple[Told[Encoded], ...]
    answered: tuple[int, ...]  # the places of the rows whose answer is generated
    answering: Answering | None = None  # how
    counted: tuple[str, ...] = ()  # of each row, the text of the tokens that are scored
    sampled: tuple[int, ...] = ()  # the places of the rows that are answered several times

    @property
    def forgotten(self) -> bool:
        """Whether it is the forget set, on which directions are the other way round."""
        return self.name == "forget"


def kind_of(row: Row) -> str:
    """Which of the four forms a row has."""
    if row.choices:
        return "choice"
    if not row.prompt:
        return "text"
    return "question" if row.turns else "prompt"


def metrics_of(rows: Sequence[Row], suite: str) -> tuple[str, ...]:
    """The names of the metrics that `rows` are evaluated by; `suite` "auto" goes by their kind."""
    kind = kind_of(rows[0])
    return (*SUITES[BY_KIND[kind] if suite == "auto" else suite][kind], *ALWAYS)


def prepare(name: str, proxy: Proxy, tokens_of: Checkpoint, settings: Settings) -> EvaluationSet:
    """The rows of `proxy` that the settings allow, with all their tellings, as tokens.

    A row whose answer is cut away by truncation is left out. At most `settings.generate_rows` of
    them, a choice fixed by the seed, have their answer generated.
    """
    encoder, named = evaluation_encoder(tokens_of, settings), proxy.places
    encoded, places = take_rows(proxy, encoder, settings)
    metrics = metrics_of(proxy.rows, settings.suite)
    rows: list[Row] = []
    told: list[Told[Encoded]] = []
    for place, answer in zip(places, encoded, strict=True):
        row, where = proxy.rows[place], f"{proxy.name}, {named[place]}"

        def tokens(other: Row, where: str = where) -> Encoded:
            return encoder.row(other, where)

        if not answer.answer_tokens:
            continue
        asked = row.asked_otherwise if settings.robustness and name == "forget" else None
        # A long passage is compared as far as it is generated, but for MUSE's own figure.
        if "verbmem" in metrics and settings.suite not in BENCHMARKS:
            start = answer.answer_start
            kept = answer.ids[start : start + ANSWERS["verbmem"].max_new_tokens]
            row = replace(row, answer=str(encoder.tokenizer.decode(kept, skip_special_tokens=True)))
        elif isinstance(encoder, BenchmarkEncoder) and ANSWERS.keys() & set(metrics):
            row = replace(row, answer=encoder.compared(row, answer))
        others = Told(
            answer,
            tokens(row.paraphrased) if row.paraphrased else None,
            tuple(map(tokens, row.perturbed)),
            tokens(asked) if asked else None,
            tuple(map(tokens, row.choices)),
        )
        cut = any(one.truncated for one in others)
        if cut and row.perturbed and row.paraphrased is None:
            continue  # its probability would be of another kind than that of the others
        rows.append(row)
        # Answers of which one is cut are not to be compared.
        told.append(Told(answer) if cut else others)
    some = list(range(len(rows)))
    random.Random(settings.seed).shuffle(some)
    answering = _answering(metrics, settings.suite)
    answered = tuple(sorted(some[: settings.generate_rows]) if answering else ())
    counted = tuple(
        str(encoder.tokenizer.decode(one.answer.counted, skip_special_tokens=True)) for one in told
    )
    kind = kind_of(proxy.rows[0])
    wanted = SAMPLED_ROWS if settings.robustness and name == "forget" and answering else 0
    sampled = tuple(sorted(some[: min(wanted, settings.generate_rows)]))
    return EvaluationSet(
        name, kind, metrics, tuple(rows), tuple(told), answered, answering, counted, sampled
    )


def _answering(metrics: Sequence[str], suite: str) -> Answering | None:
    """How the answers that `metrics` take are generated, if any are."""
    found = next((ANSWERS[metric] for metric in metrics if metric in ANSWERS), None)
    if found is None or suite not in BENCHMARKS:
        return found
    # TOFU's stop with the text alone.
    return replace(found, stops=() if suite == "tofu" else found.stops, tuned=True)
