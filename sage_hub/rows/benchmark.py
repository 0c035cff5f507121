"""Rows as open-unlearning shows them, so that `suite: tofu` and `muse` give its own figures.

By its code at commit d3d7cf9, peculiarities included: the plain prompt ends in a space, so that the
first word of an answer may count as prompt; the token that ends a text stands behind each answer;
and where the tokenizer pads with that token, no attention is paid to it anywhere in a row.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import ProxyError
from sage_hub.rows.encoding import Encoded, Encoder, encoder_of, row_limit
from sage_hub.rows.prompts import Message, messages_of
from sage_hub.rows.proxies import Row
from sage_hub.settings import Settings

SUITES = ("tofu", "muse")  # whose figures are meant to be those of the benchmark
USER, ASSISTANT = ("Question: ", "\n"), ("Answer: ", "\n\n")  # what stands around each turn


@dataclass(frozen=True)
class BenchmarkEncoder(Encoder):
    """How rows become tokens in open-unlearning: its QADataset, and its CompletionDataset."""

    context: int = sys.maxsize  # tokens that the model can look back on

    def row(self, row: Row, where: str) -> Encoded:
        """The tokens of `row`; one of choices, or with tools, has no form of the benchmark's own.

        A text that goes on may have `max_length` tokens behind its prompt, others in all.
        Raises ProxyError for a row that the model would not see all of.
        """
        if row.chat or row.choices:
            return super().row(row, where)
        ids, prompt = self._turns(row, where) if row.turns else self._completion(row)
        start = max(len(prompt), 1)
        behind = 0 if row.turns else len(prompt)
        limit = min(behind + self.max_length, self.context)
        if len(ids) <= start:
            raise ProxyError(f"{where}: the tokenizer makes no token of its answer.")
        return Encoded(
            tuple(ids[:limit]),
            start,
            truncated=len(ids) > limit,
            prompt=tuple(prompt[:limit]),
            uncounted=1,
            unattended=padding(self.tokenizer),
        )

    def compared(self, row: Row, tokens: Encoded) -> str:
        """What a model's own answer is compared with: the answer as its `tokens` have it."""
        told = tokens.ids if row.turns else tokens.counted
        asked = decoded(self.tokenizer, tokens.asked)
        return decoded(self.tokenizer, told).replace(asked, "").strip()

    def _turns(self, row: Row, where: str) -> tuple[list[int], list[int]]:
        """A conversation, with an end token behind it, and what comes before its last turn."""
        *before, answer = (self.chat.messages if self.chat else messages_of)(row)[0]
        answer = {**answer, "content": row.answer.removeprefix(" ")}
        if self.chat is not None:
            text, prompt = self.chat.written([*before, answer], where)
        else:
            prompt = "".join(map(_plain, before)) + ASSISTANT[0]
            text = prompt + str(answer["content"])
        ids, end = self._ids(text), self.tokenizer.eos_token_id
        if isinstance(end, int) and ids[-1:] != [end]:
            ids.append(end)
        return ids, self._ids(prompt)

    def _completion(self, row: Row) -> tuple[list[int], list[int]]:
        """A text that goes on with a space between its parts, and the first part."""
        if not row.prompt:
            return self._ids(row.answer), []
        return self._ids(f"{row.prompt} {row.answer}"), self._ids(row.prompt)

    def _ids(self, text: str) -> list[int]:
        """The tokens of a text, with special ones around it where no template writes them."""
        special = self.chat is None
        return [*self.tokenizer(text, add_special_tokens=special)["input_ids"]]


def evaluation_encoder(checkpoint: Checkpoint, settings: Settings) -> Encoder:
    """How rows that are evaluated become tokens of `checkpoint`: as the suite prescribes."""
    own = encoder_of(checkpoint, settings)
    if settings.suite not in SUITES:
        return own
    context = row_limit(checkpoint, sys.maxsize)
    return BenchmarkEncoder(own.tokenizer, own.chat, own.max_length, context)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, without special ones, and without the spaces before "n't" and its like.

    Tokenizers of today leave such spaces in, whatever they are asked.
    """
    text = str(tokenizer.decode([*ids], skip_special_tokens=True))
    return str(tokenizer.clean_up_tokenization(text))


def padding(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that rows are padded with, which is the one that ends a text if there is none."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    found = end if pad is None else pad
    return found if isinstance(found, int) else None


def _plain(message: Message) -> str:
    before, behind = USER if message["role"] == "user" else ASSISTANT
    return f"{before}{message['content']}{behind}"
