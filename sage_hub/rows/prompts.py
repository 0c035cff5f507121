"""The text that a model is shown of a row, with its words in it, and where its answer begins."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from typing import Any

from transformers import PreTrainedTokenizerBase

from sage_hub.errors import ProxyError, first_line
from sage_hub.rows.messages import SAID_OTHERWISE
from sage_hub.rows.proxies import Row
from sage_hub.runtime.limits import text_of

MARK = "sagehubmark"  # a word that no template writes of its own
OTHERWISE = "change the row or the template, or use --no-chat-template"
Message = dict[str, Any]
# What templates take a content for: a text, or a list of parts.
FORMS: tuple[Callable[[str], Any], ...] = (
    lambda text: text,
    lambda text: [{"type": "text", "text": text}],
)

# transformers gives templates the clock and lets nobody take it away, so one that asks for the
# time is preceded by a macro of that name. It knows the codes of strftime that `_codes` has.
CLOCK = "strftime_now"
STOPPED = (
    "{% macro strftime_now(format) %}{% set said = namespace(text=format) %}"
    "{% for code, value in date_codes.items() %}"
    "{% set said.text = said.text | replace(code, value) %}"
    "{% endfor %}{{ said.text }}{% endmacro %}\n"
)


@dataclass(frozen=True)
class Shown:
    """A row as text: what comes before the answer, and all of it."""

    before: str
    text: str
    special: bool = True  # whether the tokenizer puts its special tokens around it


class Unfit(Exception):  # noqa: N818 - becomes a ProxyError that names the row
    """What is wrong with a template, or with what it makes of a row."""


def plain(row: Row, where: str) -> Shown:
    """The row without a template."""
    if row.chat:
        raise ProxyError(
            f"{where}: it has tools, tool calls or reasoning, which only a chat template can "
            "write; remove them, or use a model that has one."
        )
    before = "".join(map(_said, row.shots)) + row.prompt
    return Shown(before, before + row.answer)


def _said(turn: tuple[str, str]) -> str:
    """A turn of an example, without a template."""
    role, content = turn
    return f"Question: {content}\n" if role == "user" else f"Answer: {content}\n\n"


@dataclass(frozen=True)
class Chat:
    """The chat template of a tokenizer, on a day."""

    tokenizer: PreTrainedTokenizerBase
    day: date
    name: str | None = None  # of the template, where there are several
    system: str | None = None  # what the system says where a row has it say nothing
    _whole: dict[tuple[Any, ...], bool] = field(default_factory=dict)  # see `_asks`

    def messages(self, row: Row) -> tuple[list[Message], list[Any] | None]:
        """The row as messages, the answer the last one, and the tools that may be called."""
        messages, tools = messages_of(row)
        if self.system is not None and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": self.system})
        return messages, tools

    @property
    def names(self) -> list[str]:
        """What the tokenizer calls its templates."""
        named = self.tokenizer.chat_template
        return sorted(named) if isinstance(named, Mapping) else ["default"]

    def show(self, row: Row, where: str) -> Shown:
        """The row as the template writes it, which takes contents as text or as parts.

        Raises ProxyError if it cannot, or if a word of the row is lost on the way.
        """
        if (self.name or "default") not in self.names:
            raise ProxyError(
                f"{where}: the tokenizer has no chat template called {self.name or 'default'}, but "
                f"{', '.join(self.names)}; give one of these with --chat-template, or use "
                "--no-chat-template."
            )
        wrong: list[str] = []
        for form in FORMS:
            try:
                return self._show(row, form)
            except Unfit as error:
                wrong.append(str(error))
        raise ProxyError(f"{where}: the chat template {wrong[0]}; {OTHERWISE}.")

    @property
    def turn(self) -> tuple[str, str]:
        """What the template writes before the first thing that a user says, and behind it.

        Raises ProxyError if it begins no conversation with that.
        """
        wrong = []
        for form in FORMS:
            try:
                opening = [{"role": "user", "content": MARK}]
                if self.system is not None:
                    opening.insert(0, {"role": "system", "content": self.system})
                text = self._render(_formed(opening, form), None)
            except Unfit as error:
                wrong.append(str(error))
                continue
            before, found, behind = text.partition(MARK)
            if found and MARK not in behind:
                return before, behind
            wrong.append("does not write what a user says, or not once")
        raise ProxyError(f"The chat template {wrong[0]}; {OTHERWISE}.")

    def written(self, messages: Sequence[Message], where: str) -> tuple[str, str]:
        """The template's text of `messages`, and of all but the last, that which is asked for.

        Raises ProxyError if it cannot write them.
        """
        wrong: list[str] = []
        for form in FORMS:
            try:
                text = self._render(_formed(messages, form), None)
                before = _formed(messages[:-1], form)
                return text, self._render(before, None, add_generation_prompt=True)
            except Unfit as error:
                wrong.append(str(error))
        raise ProxyError(f"{where}: the chat template {wrong[0]}; {OTHERWISE}.")

    def _show(self, row: Row, form: Callable[[str], Any]) -> Shown:
        messages, tools = self.messages(row)
        answer = messages[-1]["content"]

        def write(said: Sequence[Message], **how: Any) -> str:
            return self._render(_formed(said, form), tools, **how)

        text = write(messages)
        before = self._before(text, answer, write, messages)
        shown = _fold(before)
        if not all(_fold(message.get("content", "")) in shown for message in messages[:-1]):
            raise Unfit("does not write all that comes before its answer, or not as it is")
        if not self._asks(messages, tools, form):
            raise Unfit("does not write all that comes before its answer")
        for place, key in _beside(messages):
            if _fold(text) == self._tried(_formed(_without(messages, place, key), form), tools):
                raise Unfit(f"does not write the {key} of a message")
        if tools and _fold(text) == self._tried(_formed(messages, form), None):
            raise Unfit("does not write its tools")
        return Shown(before, text, special=False)

    def _before(
        self, text: str, answer: str, write: Callable[..., str], messages: Sequence[Message]
    ) -> str:
        """The part of `text` that comes before the answer: up to where a mark in its place is."""
        start = write(messages[:-1], add_generation_prompt=True)
        marked = write([*messages[:-1], {**messages[-1], "content": MARK}])
        before, *behind = marked.split(MARK)
        # What asks for an answer may end in a space less, which is then part of the answer. And a
        # template may look into an answer, and treat a mark in another way.
        near = before.startswith(start) and not before[len(start) :].strip()
        for found in (start, before) if near else (before, start):
            if len(behind) == 1 and _follows(answer, text, found):
                return found
        raise Unfit("does not write its answer as it is")

    def _asks(self, messages: Sequence[Message], tools: Any, form: Callable[[str], Any]) -> bool:
        """Whether the contents of messages like these come before the answer.

        They are marks, so that a word of the template is not taken for one of a row.
        """
        roles = tuple(message["role"] for message in messages)
        like = (form, *roles) if not tools and not [*_beside(messages)] else (form, str(messages))
        if like not in self._whole:
            marks = [f"{MARK}{'x' * place}y" for place in range(len(messages))]
            marked = [
                {**message, "content": mark} if "content" in message else message
                for message, mark in zip(messages, marks, strict=True)
            ]
            before = self._render(_formed(marked, form), tools).partition(marks[-1])[0]
            asked = [m["content"] for m in marked[:-1] if "content" in m]
            self._whole[like] = all(mark in before for mark in asked)
        return self._whole[like]

    def _tried(self, messages: Sequence[Message], tools: Any) -> str | None:
        """The words of what is written; None where that fails."""
        try:
            return _fold(self._render(messages, tools))
        except Unfit:
            return None

    def _render(self, messages: Sequence[Message], tools: Any, **how: Any) -> str:
        try:
            named = self.name if isinstance(self.tokenizer.chat_template, Mapping) else None
            template = self.tokenizer.get_chat_template(named, tools=tools)
            if CLOCK in template:
                template = STOPPED + template
                how |= {"date_codes": _codes(self.day)}
            how |= {"tools": tools, "chat_template": template, "tokenize": False}
            return text_of(lambda: str(self.tokenizer.apply_chat_template([*messages], **how)))
        except Exception as error:  # a template is a program, which may fail in any way
            raise Unfit(f"refuses it ({first_line(error)})") from None


def messages_of(row: Row) -> tuple[list[Message], list[Any] | None]:
    """The row as messages, the answer the last one, and the tools that may be called."""
    if row.chat:
        chat = json.loads(row.chat)
        *before, last = chat["messages"]
        return [*before, {**last, "content": row.answer.strip()}], chat["tools"] or None
    before = [{"role": role, "content": content} for role, content in (*row.shots, *row.turns)]
    return [*before, {"role": "assistant", "content": row.answer.strip()}], None


def _formed(messages: Sequence[Message], form: Callable[[str], Any]) -> list[Message]:
    return [
        {key: form(value) if key == "content" else value for key, value in message.items()}
        for message in messages
    ]


def _beside(messages: Sequence[Message]) -> list[tuple[int, str]]:
    """What messages have beside their contents: the place of each, and the key."""
    return [
        (place, key)
        for place, message in enumerate(messages)
        for key in message
        if key in SAID_OTHERWISE
    ]


def _without(messages: Sequence[Message], place: int, key: str) -> list[Message]:
    kept = {name: value for name, value in messages[place].items() if name != key}
    return [*messages[:place], kept, *messages[place + 1 :]]


def _follows(answer: str, text: str, before: str) -> bool:
    """Whether `text` goes on with the answer after `before`."""
    return text.startswith(before) and _fold(text[len(before) :]).startswith(_fold(answer))


def _fold(text: str) -> str:
    """The words of a text: white space counts where it parts two of them."""
    return re.sub(r" ?([^\w\s]) ?", r"\1", " ".join(text.split()))


def _codes(day: date) -> dict[str, str]:
    """The codes of strftime with their values at the beginning of `day`."""
    moment = datetime.combine(day, time())
    codes = {f"%{letter}": moment.strftime(f"%{letter}") for letter in "aAbBcdfHIjmMpSUwWxXyYZz"}
    unpadded = {f"%-{letter}": codes[f"%{letter}"].lstrip("0") or "0" for letter in "dHIjmMSy"}
    other = {"%e": f"{day.day:2}", "%F": day.isoformat(), "%T": codes["%X"], "%%": "%"}
    return {**unpadded, **codes, **other}
