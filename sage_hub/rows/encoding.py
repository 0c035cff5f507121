"""Rows to tokens: where the answer begins, which rows fit in, and padded batches."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sage_hub.checkpoint.architecture import quiet_transformers
from sage_hub.checkpoint.files import read_json
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import ArchitectureError, ProxyError, first_line
from sage_hub.rows.prompts import CLOCK, Chat, Shown, plain
from sage_hub.rows.proxies import Proxy, Row, about_set
from sage_hub.settings import Settings

SHOWN = 100  # characters of the first row's prompt, and of its answer


@dataclass(frozen=True)
class Encoded:
    """A row as tokens; the loss is over `ids[answer_start:]`."""

    ids: tuple[int, ...]
    answer_start: int
    truncated: bool = False
    number: int = 0  # of the row in its proxy, from 1
    prompt: tuple[int, ...] | None = None  # what is answered, if it is not all before the answer
    uncounted: int = 0  # of the last tokens: so many are no part of what may be memorized
    unattended: int | None = None  # a token that no other looks at

    @property
    def asked(self) -> tuple[int, ...]:
        """What an answer is generated behind."""
        return self.ids[: self.answer_start] if self.prompt is None else self.prompt

    @property
    def counted(self) -> list[int]:
        """The tokens that the answer is scored by."""
        return list(self.ids[self.answer_start :])

    @property
    def answer_tokens(self) -> int:
        return max(0, len(self.ids) - self.answer_start)


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right: (rows, longest) each. `answer` marks the tokens with a loss."""

    ids: Tensor
    mask: Tensor
    answer: Tensor
    rows: tuple[int, ...]  # their places in the sequence that was batched

    def row(self, line: int) -> Batch:
        """One of its rows alone, without padding."""
        own = slice(line, line + 1), slice(int(self.mask[line].sum()))
        return Batch(self.ids[own], self.mask[own], self.answer[own], (self.rows[line],))


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer. Raises ArchitectureError if it has none that loads."""
    folder = checkpoint.tokenizer_folder()
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = first_line(error)
        raise ArchitectureError(
            f"The tokenizer of {checkpoint.name} cannot be loaded (remote code is not run); name "
            f"another with --tokenizer: {reason}"
        ) from None


def end_tokens(checkpoint: Checkpoint) -> list[int]:
    """The tokens that end a text: what generation_config.json says, config.json, the tokenizer."""
    found: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        stated = read_json(checkpoint.files, name) if name in checkpoint.files.sizes else {}
        ends = stated.get("eos_token_id")
        found += ends if isinstance(ends, list) else [ends]
    found.append(load_tokenizer(checkpoint).eos_token_id)
    return list(dict.fromkeys(end for end in found if isinstance(end, int)))


def row_limit(checkpoint: Checkpoint, max_length: int) -> int:
    """The longest row in tokens: `max_length`, or the model's context if that is shorter.

    A tokenizer without a model has none.
    """
    config = checkpoint.config if checkpoint.config_file in checkpoint.files.sizes else {}
    context = config.get("max_position_embeddings") or config.get("n_positions")
    return min(max_length, context) if isinstance(context, int) else max_length


@dataclass(frozen=True)
class Encoder:
    """How rows become tokens: by which tokenizer, with or without its chat template."""

    tokenizer: PreTrainedTokenizerBase
    chat: Chat | None  # what writes rows of turns
    max_length: int

    def row(self, row: Row, where: str) -> Encoded:
        """The tokens of `row`, cut at `max_length`.

        Raises ProxyError for a row that the model would not see all of; `where` says which one it
        is.
        """
        shown = self.chat.show(row, where) if self.chat and row.turns else plain(row, where)
        ids, start = self._tokens(shown)
        if len(ids) <= start:
            what = "its answer" if shown.before else "it"
            raise ProxyError(f"{where}: the tokenizer makes no token of {what}.")
        # The first token has nothing before it to be predicted from.
        limit = self.max_length
        return Encoded(tuple(ids[:limit]), max(start, 1), truncated=len(ids) > limit)

    def _tokens(self, shown: Shown) -> tuple[list[int], int]:
        """The tokens of a text, and the place of the answer's first one.

        It begins where the tokens of what comes before it and of the full text part, so a token
        that joins the end of the prompt with the answer counts as answer. Where a tokenizer says
        which letters a token is of, those that are of the template alone do not count.
        """
        spans = not shown.special and self.tokenizer.is_fast
        how = {"add_special_tokens": shown.special}
        found = self.tokenizer(shown.text, return_offsets_mapping=spans, **how)
        ids = found["input_ids"]
        head = self.tokenizer(shown.before, **how)["input_ids"] if shown.before else []
        parted = (n for n, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b)
        start = next(parted, min(len(head), len(ids)))
        if spans:
            ends = enumerate(stop for _, stop in found["offset_mapping"])
            start = max(start, next((n for n, stop in ends if stop > len(shown.before)), start))
        return ids, start

    def rows(self, proxy: Proxy) -> list[Encoded]:
        """All rows of `proxy`, in order."""
        return [
            replace(self.row(row, f"{proxy.name}, {place}"), number=number)
            for number, (row, place) in enumerate(zip(proxy.rows, proxy.places, strict=True), 1)
        ]


def encoder_of(checkpoint: Checkpoint, settings: Settings) -> Encoder:
    """How rows become tokens of `checkpoint`."""
    tokenizer = load_tokenizer(checkpoint)
    limit = row_limit(checkpoint, settings.max_length)
    day = date.fromisoformat(settings.date) if settings.date else date.today()
    chat = _chat_of(tokenizer, settings.chat_template, day, settings.template)
    if settings.system_prompt is not None:
        if chat is None:
            raise ProxyError(
                f"--system-prompt is for a chat template, and the tokenizer of {checkpoint.name} "
                "has none; leave it out."
            )
        chat = replace(chat, system=settings.system_prompt)
    return Encoder(tokenizer, chat, limit)


def encode(
    proxy: Proxy, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool, max_length: int
) -> list[Encoded]:
    """All rows of `proxy` as tokens, in order, where there is no checkpoint yet."""
    chat = _chat_of(tokenizer, chat_template, date.today())
    return Encoder(tokenizer, chat, max_length).rows(proxy)


def _chat_of(
    tokenizer: PreTrainedTokenizerBase, wanted: bool, day: date, name: str | None = None
) -> Chat | None:
    """The chat template, if there is one and it is wanted.

    Raises ProxyError if there is none of this `name`.
    """
    there = getattr(tokenizer, "chat_template", None) is not None
    chat = Chat(tokenizer, day, name) if wanted and there else None
    if name is not None and (chat is None or name not in chat.names):
        named = ", ".join(chat.names) if chat else "none"
        raise ProxyError(
            f"--chat-template {name}: there is no such chat template, but {named}; give one of "
            "these, or use --no-chat-template."
        )
    return chat


def describe_prompts(checkpoint: Checkpoint, settings: Settings) -> dict[str, Any]:
    """For the record: what the text and the tokens of every row depend on beside the row."""
    encoder, files = encoder_of(checkpoint, settings), checkpoint.read_from
    template = json.dumps(encoder.tokenizer.chat_template) if encoder.chat else None
    return {
        "tokenizer": {"name": files.name, "commit": files.commit},
        "tokenizer_fingerprint": checkpoint.tokenizer_fingerprint(),
        "chat_template": template and hashlib.sha256(template.encode()).hexdigest(),
        "date": settings.date,
    }


def dated(checkpoint: Checkpoint, settings: Settings) -> Settings:
    """The settings with the date of today, if the chat template writes one and none is given.

    So one run has one date, whatever the hour, and its record says which.
    """
    if settings.date or not settings.chat_template:
        return settings
    files = map(checkpoint.read_from.path, checkpoint.tokenizer_files)
    asked = any(CLOCK.encode() in file.read_bytes() for file in files)
    return replace(settings, date=date.today().isoformat()) if asked else settings


def check_rows(
    proxies: Mapping[str, Proxy], tokens_of: Checkpoint, settings: Settings, *models: Checkpoint
) -> dict[str, str]:
    """See that each row of each set can be shown to `tokens_of` and to the other `models`.

    All tellings of a row are tried. Raises ProxyError, naming the row, if words of it are lost or
    one of its tokens is none of a model's. Returns the first row of each set as it is seen.
    """
    if not proxies:
        return {}
    encoder, known = encoder_of(tokens_of, settings), _embedded(tokens_of, *models)
    shown = {}
    for which, proxy in proxies.items():
        with about_set(which):
            _check_set(proxy, encoder, known)
            shown[which] = _in_short(encoder.row(proxy.rows[0], proxy.name), encoder.tokenizer)
    return shown


def _check_set(proxy: Proxy, encoder: Encoder, known: Mapping[str, int]) -> None:
    for row, place in zip(proxy.rows, proxy.places, strict=True):
        where = f"{proxy.name}, {place}"
        for telling in row.tellings:
            ids = encoder.row(telling, where).ids
            for name, size in known.items():
                if max(ids) >= size:
                    token = encoder.tokenizer.convert_ids_to_tokens(max(ids))
                    raise ProxyError(
                        f"{where}: its token {token!r} has the number {max(ids)}, and the "
                        f"embedding of {name} has {size} rows; the tokenizer is not that of the "
                        "model, or its embedding was not resized. Name the right --tokenizer."
                    )


def _embedded(*models: Checkpoint) -> dict[str, int]:
    """How many tokens the embedding of each model has."""
    found = {}
    for model in models:
        architecture = model.architecture
        found[model.name] = architecture.parameters[architecture.embedding][0]
    return found


def spoken(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """A row as a model sees it, special tokens too: what comes before, and the answer."""
    parts = row.ids[: row.answer_start], row.ids[row.answer_start :]
    before, answer = (str(tokenizer.decode(list(part))) for part in parts)
    return before, answer


def _in_short(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    """The same on one line, with ⇒ between the two."""
    lines = (" ".join(part.split()) for part in spoken(row, tokenizer))
    return " ⇒ ".join(
        text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
        for text in lines
    )


def take_tokens(rows: Sequence[Encoded], max_tokens: int, seed: int) -> list[int]:
    """The places of the rows that fit into `max_tokens`, a random choice fixed by `seed`.

    All of them where they fit, and always one at least.
    """
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    total = 0
    for place in order:
        total += len(rows[place].ids)
        if chosen and total > max_tokens:
            break
        chosen.append(place)
    return sorted(chosen)


def take_rows(
    proxy: Proxy, encoder: Encoder, settings: Settings
) -> tuple[list[Encoded], list[int]]:
    """The rows of `proxy` that the settings allow, as `encoder` makes tokens, and their places."""
    rows = encoder.rows(proxy)
    places = take_tokens(rows, settings.max_tokens, settings.seed)
    return [rows[place] for place in places], places


def attended(ids: Sequence[int], unattended: int | None) -> Tensor:
    """1 for each of `ids` (tokens) that others may look at, 0 for each that is `unattended`."""
    shown = torch.tensor(ids)
    return torch.ones_like(shown) if unattended is None else (shown != unattended).long()


def batches(rows: Sequence[Encoded], batch_size: int) -> Iterator[Batch]:
    """Batches of rows of like length, longest first, so that memory runs out at once or never."""
    order = sorted(range(len(rows)), key=lambda place: (-len(rows[place].ids), place))
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        width = len(rows[places[0]].ids)
        # A masked token is never looked at, so any id pads.
        ids = torch.zeros(len(places), width, dtype=torch.long)
        mask = torch.zeros(len(places), width, dtype=torch.long)
        answer = torch.zeros(len(places), width, dtype=torch.bool)
        for line, place in enumerate(places):
            row = rows[place]
            ids[line, : len(row.ids)] = torch.tensor(row.ids)
            mask[line, : len(row.ids)] = attended(row.ids, row.unattended)
            answer[line, row.answer_start : len(row.ids)] = True
        yield Batch(ids, mask, answer, tuple(places))
