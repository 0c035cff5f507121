"""Run a script of this folder on a tiny untrained model in place of SmolLM2, to see that it runs.

    python benchmarks/real_model/small.py benchmarks/real_model/run.py --tofu DIR --cache DIR

It takes a minute on a CPU, and needs no package of SmolLM2's. What comes of it is no result.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sage_hub.rows.sources import read_proxy


def load_tiny() -> tuple[Any, Any]:
    """A Llama of three layers, which RMU needs; its words are those of the built-in texts."""
    splitter = pre_tokenizers.Whitespace()
    texts = (splitter.pre_tokenize_str(row.answer) for row in read_proxy(None).rows)
    words = dict.fromkeys(word for text in texts for word, _ in text)
    ids = {word: number for number, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    return LlamaForCausalLM(config), fast


if __name__ == "__main__":
    build.load_smollm2 = load_tiny
    build.LEARN["rate"] = 1e-2  # or it learns nothing in a minute
    build.RATES |= {method: 100 * rate for method, rate in build.RATES.items()}
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
