"""Records to rows, by the form that their columns show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sage_hub.errors import ProxyError
from sage_hub.rows.proxies import Row

COLUMNS = "question/answer, question/choices/answer, prompt/completion, messages or text"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def parse_rows(records: Iterable[Mapping[str, Any]], name: str) -> tuple[Row, ...]:
    """Rows of the one form that their columns show. Raises ProxyError with the row's number."""
    rows = tuple(
        _parse_row(record, f"{name}, row {number}") for number, record in enumerate(records, 1)
    )
    if not rows:
        raise ProxyError(f"{name} has no rows.")
    return rows


def _parse_row(record: Mapping[str, Any], where: str) -> Row:
    def text(column: str) -> str:
        value = record[column]
        if not isinstance(value, str) or not value.strip():
            raise ProxyError(f"{where}: {column!r} is empty or not text.")
        return value

    if "question" in record and "choices" in record and "answer" in record:
        return _parse_choices(record, text("question"), where)
    if "question" in record and "answer" in record:
        return _parse_question(record, text)
    for completion in ("completion", "gt"):  # the second is MUSE's word
        if "prompt" in record and completion in record:
            return Row(text("prompt"), text(completion))
    if "messages" in record:
        return _parse_messages(record["messages"], where)
    if "text" in record:
        return Row("", text("text"))
    found = ", ".join(sorted(record)) or "none"
    raise ProxyError(f"{where}: expected the columns {COLUMNS}, found {found}.")


def _parse_question(record: Mapping[str, Any], text: Callable[[str], str]) -> Row:
    """A question with its answer, and with what TOFU's perturbed files tell of both."""

    def row(question: str, answer: str) -> Row:
        return Row(f"Question: {question}\nAnswer:", f" {answer}", (("user", question),))

    question, answer = text("question"), text("answer")
    wrong = record.get("perturbed_answer") or ()
    return replace(
        row(question, answer),
        paraphrased=(
            row(question, text("paraphrased_answer")) if record.get("paraphrased_answer") else None
        ),
        perturbed=tuple(row(question, x) for x in wrong if isinstance(x, str) and x.strip()),
        asked_otherwise=(
            row(text("paraphrased_question"), answer)
            if record.get("paraphrased_question")
            else None
        ),
    )


def _parse_choices(record: Mapping[str, Any], question: str, where: str) -> Row:
    """A multiple-choice question, in the form that MMLU and WMDP are asked in."""
    choices, answer = record["choices"], record["answer"]
    texts = isinstance(choices, Sequence) and all(isinstance(c, str) for c in choices)
    if not texts or isinstance(choices, str):
        raise ProxyError(f"{where}: 'choices' must be a list of texts.")
    if not 2 <= len(choices) <= len(LETTERS):
        raise ProxyError(f"{where}: 'choices' must be 2 to {len(LETTERS)} texts.")
    letters = LETTERS[: len(choices)]
    if isinstance(answer, str) and answer in choices:
        right = list(choices).index(answer)
    elif isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in letters:
        right = letters.index(answer.strip())
    elif isinstance(answer, int) and 0 <= answer < len(choices):
        right = int(answer)
    else:
        raise ProxyError(
            f"{where}: 'answer' must be one of the choices: its number from 0, its letter or its "
            "text."
        )
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    prompt = "\n".join([question.strip(), *lines, "Answer:"])
    if subject := record.get("subject"):
        about = str(subject).replace("_", " ")
        start = "The following are multiple choice questions (with answers) about"
        prompt = f"{start} {about}.\n\n{prompt}"
    rows = tuple(Row(prompt, f" {letter}") for letter in letters)
    return replace(rows[right], choices=rows)


def _parse_messages(messages: Any, where: str) -> Row:
    turns = []
    for message in messages if isinstance(messages, Sequence) else ():
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) and message[key].strip()
            for key in ("role", "content")
        ):
            raise ProxyError(f"{where}: each message needs a 'role' and a 'content' in text.")
        turns.append((message["role"], message["content"]))
    if not turns or turns[-1][0] != "assistant":
        raise ProxyError(f"{where}: 'messages' must end with a message of the assistant.")
    *before, (_, answer) = turns
    prompt = "".join(f"{role}: {content}\n" for role, content in before) + "assistant:"
    return Row(prompt, f" {answer}", tuple(before))
