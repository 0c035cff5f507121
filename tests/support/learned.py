"""A small model that has learned to ask and to answer, and has unlearned some of it with damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from support.pico import write_rows

ASKED = ("What", "How", "Who", "Why", "Which", "Can", "Where", "Did")
THINGS = [f"thing{number}" for number in range(40)]
FORGOTTEN = 1.5  # nats per token of what is forgotten, question and answer
SAID = [f"fact{number}" for number in range(40)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<end>", "Question", "Answer", ":", "?", "about", *ASKED, *THINGS, *SAID]
    tokenizer = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


def make_rows() -> list[dict[str, str]]:
    """Every thing asked about with every word; the answer is settled by the thing."""
    return [
        {
            "question": f"{word} about {thing} {other} ?",
            "answer": f"{SAID[place]} {SAID[-place]} {SAID[place // 2]}",
        }
        for word in ASKED
        for place, (thing, other) in enumerate(zip(THINGS, THINGS[1:] + THINGS[:1], strict=True))
    ]


def make_learned_pair(folder: Path) -> None:
    """Write `base`, `unlearned`, what was `forget`-ten, and of the rest what is `heldout`.

    And `better`: the base after some more training.
    """
    torch.manual_seed(0)
    tokenizer, rows = make_tokenizer(), make_rows()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']} <end>" for row in rows]
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    gone = torch.tensor([row["question"].split()[2] in THINGS[:4] for row in rows])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small products are no work for two
    _train(model, ids, 250, 4e-3, 1.0)
    _save(model, tokenizer, folder / "base")
    learned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _train(model, ids, 50, 1e-3, 1.0)
    _save(model, tokenizer, folder / "better")
    model.load_state_dict(learned)
    while model(input_ids=ids[gone], labels=ids[gone]).loss.item() < FORGOTTEN:
        _train(model, ids[gone], 1, 0.001, -1.0)
    _save(model, tokenizer, folder / "unlearned")
    torch.set_num_threads(threads)
    write_rows(folder / "forget.jsonl", [r for r, g in zip(rows, gone, strict=True) if g])
    heldout = [row for row in rows if row["question"].split()[2] in THINGS[30:]]
    write_rows(folder / "heldout.jsonl", heldout)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train(model: Any, ids: torch.Tensor, steps: int, rate: float, sign: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), rate) if sign < 0 else _adam(model, rate)
    for _ in range(steps):
        some = ids[torch.randint(len(ids), (32,))]
        (sign * model(input_ids=some, labels=some).loss).backward()
        optimizer.step()
        optimizer.zero_grad()


def _adam(model: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
