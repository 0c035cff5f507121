"""Rows to tokens: the chat template, where the answer begins, and padded batches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sage_hub.checkpoint.architecture import quiet_transformers
from sage_hub.checkpoint.files import read_json
from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import ArchitectureError, ProxyError, first_line
from sage_hub.rows.proxies import Proxy, Row
from sage_hub.settings import Settings


@dataclass(frozen=True)
class Encoded:
    """A row as tokens; the loss is over `ids[answer_start:]`."""

    ids: tuple[int, ...]
    answer_start: int
    truncated: bool = False
    number: int = 0  # of the row in its proxy, from 1

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
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                checkpoint.tokenizer_folder(), trust_remote_code=False
            )
    except Exception as error:
        reason = first_line(error)
        raise ArchitectureError(
            f"The tokenizer of {checkpoint.name} cannot be loaded (remote code is not run): "
            f"{reason}"
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
    """The longest row in tokens: `max_length`, or the model's context if that is shorter."""
    config = checkpoint.config
    context = config.get("max_position_embeddings") or config.get("n_positions")
    return min(max_length, context) if isinstance(context, int) else max_length


def encode_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, chat: bool, max_length: int
) -> Encoded:
    """The tokens of `row`, cut at `max_length`.

    With `chat` and a row of turns the tokenizer's chat template writes the text, else the row's
    plain form does. The answer begins where the tokens of prompt and full text part, so a token
    that joins the end of the prompt with the answer counts as answer.
    """
    if chat and row.turns:
        before = [{"role": role, "content": content} for role, content in row.turns]
        after = [*before, {"role": "assistant", "content": row.answer.strip()}]
        prompt = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(after, tokenize=False)
        # The template has written the special tokens already.
        ids, head = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (full, prompt)
        )
    else:
        ids = tokenizer(row.prompt + row.answer)["input_ids"]
        head = tokenizer(row.prompt)["input_ids"] if row.prompt else []
    start = next(
        (i for i, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b),
        min(len(head), len(ids)),
    )
    # The first token has nothing before it to be predicted from.
    return Encoded(tuple(ids[:max_length]), max(start, 1), truncated=len(ids) > max_length)


def templated(tokenizer: PreTrainedTokenizerBase, wanted: bool) -> bool:
    """Whether rows of turns are written by the tokenizer's chat template."""
    return wanted and getattr(tokenizer, "chat_template", None) is not None


def encode(
    proxy: Proxy, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool, max_length: int
) -> list[Encoded]:
    """All rows of `proxy` as tokens, in order. Raises ProxyError for a row without tokens."""
    chat = templated(tokenizer, chat_template)
    encoded = []
    for number, row in enumerate(proxy.rows, 1):
        try:
            found = encode_row(row, tokenizer, chat=chat, max_length=max_length)
        except TemplateError as error:
            raise ProxyError(
                f"{proxy.name}, row {number}: the chat template refuses it ({error}); "
                "change the row, or use --no-chat-template."
            ) from None
        if not found.ids:
            raise ProxyError(f"{proxy.name}, row {number}: the tokenizer makes no token of it.")
        encoded.append(replace(found, number=number))
    return encoded


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
    proxy: Proxy, checkpoint: Checkpoint, settings: Settings
) -> tuple[list[Encoded], list[int]]:
    """The rows of `proxy` that the settings allow, as tokens of `checkpoint`, and their places."""
    rows = encode(
        proxy,
        load_tokenizer(checkpoint),
        chat_template=settings.chat_template,
        max_length=row_limit(checkpoint, settings.max_length),
    )
    places = take_tokens(rows, settings.max_tokens, settings.seed)
    return [rows[place] for place in places], places


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
            mask[line, : len(row.ids)] = 1
            answer[line, row.answer_start : len(row.ids)] = True
        yield Batch(ids, mask, answer, tuple(places))
