"""What `sage-hub plan` says of models of 1 to 395 billion parameters: the tables of docs/scale.md.

    python benchmarks/scale.py

From configs alone; no weights are made. The times are this machine's, which should be idle.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sage_hub.runtime.progress import in_bytes, in_time

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}
# name -> config, GB of --memory
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "1B": (
        LLAMA
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "tie_word_embeddings": True},
        16,
    ),
    "8B": (
        LLAMA
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32},
        16,
    ),
    "70B": (
        LLAMA
        | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
        | {"num_attention_heads": 64},
        32,
    ),
    "395B mixture": (
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "vocab_size": 151936,
            "max_position_embeddings": 131072,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 2560,
            "num_hidden_layers": 96,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "dtype": "bfloat16",
        },
        32,
    ),
}


def main() -> None:
    """Ask for each plan and print both tables."""
    plans = {name: _plan(config, memory) for name, (config, memory) in SHAPES.items()}
    print("| | second moments | statistics, at most | memory | flops | time here |")
    print("|---|---|---|---|---|---|")
    for name, plan in plans.items():
        label = f"**{name}**, `--memory {SHAPES[name][1]}`"
        for mode in plan["modes"]:
            budget = mode["budget"]
            over = ": too much" if budget["total"] > budget["limit"] else ""
            flops = mode["forward"] + mode["moments"] + mode["decompositions"]
            cells = [
                label,
                mode["name"],
                in_bytes(mode["statistics"]),
                in_bytes(budget["total"]) + over,
            ]
            print(f"| {' | '.join(cells)} | {flops:.1e} | {in_time(mode['seconds'])} |")
            label = ""
    print("\n| | parameters | pass | search, with a forget set | evaluation | the base writes |")
    print("|---|---|---|---|---|---|")
    for name, plan in plans.items():
        parts = ("pass", "search", "evaluation", "writing")
        seconds = [plan[f"{part}_seconds"] for part in parts]
        times = " | ".join(in_time(one) if one else "–" for one in seconds)
        print(f"| **{name}** | {plan['parameters'] / 1e9:.1f}B | {times} |")


def _plan(config: dict[str, Any], memory: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        command = ["plan", folder, "--memory", str(memory), "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "sage_hub", *command],
            stdout=subprocess.PIPE,
            check=True,
        )
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


if __name__ == "__main__":
    main()
