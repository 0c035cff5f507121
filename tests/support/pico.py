"""Pico checkpoints: a Llama of two layers, a word tokenizer, and an update like unlearning's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(60)]
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A token per word of WORDS, all else unknown."""
    special = ["<unk>", "<user>", "<assistant>", "<end>", "Question", "Answer", ":"]
    vocabulary = {word: place for place, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<user>", "<assistant>", "<end>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = chat_template
    return fast


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Questions and answers of random words; two seeds share none."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> str:
        return " ".join(
            WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist()
        )

    return [{"question": words(6), "answer": words(4)} for _ in range(count)]


def to_jsonl(rows: Sequence[object]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_bytes(to_jsonl(rows))
    return path


def make_config(**changes: object) -> LlamaConfig:
    settings = {
        "vocab_size": 72,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaConfig(**{**settings, **changes})


def update(model: LlamaForCausalLM, seed: int = 1, size: float = 0.02) -> None:
    """Move all weights but the norms of the last layer, as an unlearning run would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.1.input_layernorm" in name:
                continue  # so that some tensors stay equal on both sides
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((size * noise).to(parameter.dtype))


def make_pair(
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "20KB",
    chat_template: str | None = None,
) -> None:
    """Write folder/base, folder/unlearned and folder/{retain,forget,heldout}.jsonl."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config()).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)  # the default initialization is too small to do anything
    tokenizer = make_tokenizer(chat_template)
    for side in ("base", "unlearned"):
        if side == "unlearned":
            update(model)
        model.save_pretrained(folder / side, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder / side)
    for seed, (name, count) in enumerate({"retain": 40, "forget": 12, "heldout": 20}.items()):
        write_rows(folder / f"{name}.jsonl", make_rows(count, seed))


def proxies(pair: Path) -> list[str]:
    """The options that name the sets of a pair."""
    return [
        word
        for name in ("retain", "forget", "heldout")
        for word in (f"--{name}", str(pair / f"{name}.jsonl"))
    ]
