"""Records to rows, by the form that their columns show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from sage_hub.errors import ProxyError
from sage_hub.rows.cells import texts_of
from sage_hub.rows.messages import parse_conversation, parse_messages
from sage_hub.rows.proxies import Row

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Record = Mapping[str, Any]
Placed = tuple[int | None, Record]  # the line it begins in, if its file has lines; and the record


def parse_rows(records: Iterable[Record], name: str) -> tuple[Row, ...]:
    """Rows of the one form that their columns show. Raises ProxyError with the row's number."""
    return parse_placed(((None, record) for record in records), name)


def parse_placed(records: Iterable[Placed], name: str) -> tuple[Row, ...]:
    """The same of records that know their line; the rows keep their place."""
    rows: list[Row] = []
    first = ""
    for number, (line, record) in enumerate(records, 1):
        place = f"row {number}" if line in (None, number) else f"row {number} (line {line})"
        form, row = _parse_row(record, f"{name}, {place}")
        first = first or form
        if form != first:
            raise ProxyError(
                f"{name}, {place}: a row with {form}, but {rows[0].place} is one with {first}; "
                "their metrics do not mix, so make it two sets."
            )
        rows.append(replace(row, place=place, form=form))
    if not rows:
        raise ProxyError(f"{name} has no rows.")
    return tuple(rows)


def with_shots(rows: Iterable[Row], shots: Iterable[Row], name: str) -> tuple[Row, ...]:
    """The questions `rows` with others and their answers before each of them.

    Raises ProxyError if one of either is no question.
    """
    said: list[tuple[str, str]] = []
    for number, row in enumerate(shots, 1):
        _check_question(row, f"{name}, example {number}")
        said += [*row.turns, ("assistant", row.answer.removeprefix(" "))]

    def shown(row: Row) -> Row:
        return replace(row, shots=tuple(said))

    found = []
    for number, row in enumerate(rows, 1):
        _check_question(row, f"{name}, row {number}")
        found.append(
            replace(
                shown(row),
                paraphrased=row.paraphrased and shown(row.paraphrased),
                perturbed=tuple(map(shown, row.perturbed)),
                asked_otherwise=row.asked_otherwise and shown(row.asked_otherwise),
            )
        )
    return tuple(found)


def _check_question(row: Row, where: str) -> None:
    if not row.turns or row.chat:
        raise ProxyError(f"{where}: examples are for questions with answers, and it is none.")


def _parse_row(record: Record, where: str) -> tuple[str, Row]:
    """Its form in words, and the row."""
    # A null is no column, and neither is the empty cell that CSV has for it.
    present = {key: value for key, value in record.items() if value not in (None, "", [], {})}
    for columns in (present, record):  # the second to say which one is empty
        for form, (needed, parse) in FORMS.items():
            if needed <= columns.keys():
                row = replace(parse(present, where), entity=str(present.get("entity", "")))
                alone = bool(row.perturbed) and row.paraphrased is None
                # Probability is then relative to the wrong answers.
                return f"{form} and perturbed_answer alone" if alone else form, row
    found = ", ".join(sorted(map(str, record))) or "none"
    raise ProxyError(f"{where}: expected the columns {', '.join(FORMS)}; found {found}.")


def text_of(record: Record, column: str, where: str) -> str:
    """The text in a column."""
    value = record.get(column)
    if not isinstance(value, str) or not value.strip():
        raise ProxyError(f"{where}: {column!r} is empty or not text.")
    return value


def _ask(question: str, answer: str) -> Row:
    return Row(f"Question: {question}\nAnswer:", f" {answer}", (("user", question),))


def _parse_question(record: Record, where: str) -> Row:
    """A question with its answer, and with what TOFU's perturbed files tell of both."""

    def text(column: str) -> str:
        return text_of(record, column, where)

    question, answer = text("question"), text("answer")
    wrong = texts_of(record.get("perturbed_answer", ()), f"{where}: 'perturbed_answer'")
    return replace(
        _ask(question, answer),
        paraphrased=(
            _ask(question, text("paraphrased_answer")) if "paraphrased_answer" in record else None
        ),
        perturbed=tuple(_ask(question, one) for one in wrong),
        asked_otherwise=(
            _ask(text("paraphrased_question"), answer) if "paraphrased_question" in record else None
        ),
    )


def _parse_choices(record: Record, where: str) -> Row:
    """A multiple-choice question, in the form that MMLU and WMDP are asked in."""
    question, answer = text_of(record, "question", where), record.get("answer")
    choices = texts_of(record.get("choices", ()), f"{where}: 'choices'")
    if not 2 <= len(choices) <= len(LETTERS):
        raise ProxyError(f"{where}: 'choices' must be a list of 2 to {len(LETTERS)} texts.")
    letters = LETTERS[: len(choices)]
    if isinstance(answer, str) and answer not in choices and answer.strip().isdecimal():
        answer = int(answer)  # CSV knows text alone
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


def _parse_prompt(record: Record, where: str) -> Row:
    """A text that goes on; as messages, where both parts are lists of them."""
    completion = "completion" if "completion" in record else "gt"  # MUSE's word
    before, after = record.get("prompt"), record.get(completion)
    if isinstance(before, list) and isinstance(after, list):
        return parse_messages({**record, "messages": before + after}, where)
    return Row(text_of(record, "prompt", where), text_of(record, completion, where))


def _parse_text(record: Record, where: str) -> Row:
    return Row("", text_of(record, "text", where))


def _asked(question: str, answer: str, more: str = "") -> Callable[[Record, str], Row]:
    """A question and its answer under other names; the column `more` goes on with the question."""

    def parse(record: Record, where: str) -> Row:
        asked = (question, more) if more in record else (question,)
        said = "\n\n".join(text_of(record, column, where) for column in asked)
        row = _ask(said, text_of(record, answer, where))
        if "system" not in record:
            return row
        system = text_of(record, "system", where)
        return replace(
            row, prompt=f"{system}\n\n{row.prompt}", turns=(("system", system), *row.turns)
        )

    return parse


# The columns of each form; of two that a record has, the first is meant.
FORMS: Mapping[str, tuple[set[str], Callable[[Record, str], Row]]] = {
    "question/choices/answer": ({"question", "choices", "answer"}, _parse_choices),
    "question/answer": ({"question", "answer"}, _parse_question),
    "prompt/completion": ({"prompt", "completion"}, _parse_prompt),
    "prompt/gt": ({"prompt", "gt"}, _parse_prompt),
    "messages": ({"messages"}, parse_messages),
    "text": ({"text"}, _parse_text),
    "conversations": ({"conversations"}, parse_conversation),
    "instruction/output": ({"instruction", "output"}, _asked("instruction", "output", "input")),
    "prompt/response": ({"prompt", "response"}, _asked("prompt", "response")),
}
