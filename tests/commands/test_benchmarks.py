"""`--benchmark NAME`: one word for what a benchmark prescribes, on data sets like its own."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from support.loopback_hub import LoopbackHub
from support.pico import WORDS, make_rows, to_jsonl

from sage_hub.cli.config import load_settings
from sage_hub.cli.main import main
from sage_hub.commands.benchmarks import BENCHMARKS, benchmark_settings
from sage_hub.rows.sources import read_proxy

FULL = "open-unlearning/tofu_Llama-3.2-1B-Instruct_full"
SEEDS = count()


def questions(many: int, *told: str) -> list[dict[str, Any]]:
    """Rows with the columns that TOFU's perturbed files have beside question and answer."""
    rows: list[dict[str, Any]] = list(make_rows(many, next(SEEDS)))
    for row in rows:
        row.update({name: f"w1 {row['answer']}" for name in told if name != "perturbed_answer"})
        if "perturbed_answer" in told:
            row["perturbed_answer"] = [f"{word} {row['answer']}" for word in WORDS[5:8]]
    return rows


def add_dataset(hub: LoopbackHub, repo: str, sets: dict[tuple[str, str], Any]) -> None:
    """A data set of configurations and splits: (configuration, split) -> rows."""
    configs: dict[str, list[dict[str, str]]] = {}
    files: dict[str, bytes] = {}
    for (config, split), rows in sets.items():
        path = f"{config}/{split}.jsonl"
        configs.setdefault(config, []).append({"split": split, "path": path})
        files[path] = to_jsonl(rows)
    named = [{"config_name": name, "data_files": found} for name, found in configs.items()]
    card = f"---\n{yaml.safe_dump({'configs': named})}---\n"
    hub.add_repo(repo, {**files, "README.md": card.encode()}, "dataset")


def add_tofu(hub: LoopbackHub) -> None:
    kept, told = questions(470), ("paraphrased_answer", "perturbed_answer")
    perturbed = [{**row, **questions(1, *told)[0], **row} for row in kept[:6]]
    add_dataset(
        hub,
        "locuslab/TOFU",
        {
            ("retain90", "train"): kept,
            ("retain_perturbed", "train"): perturbed,
            ("forget10_perturbed", "train"): questions(6, *told, "paraphrased_question"),
            ("holdout10", "train"): questions(6),
            ("real_authors_perturbed", "train"): questions(4, "perturbed_answer"),
            ("world_facts_perturbed", "train"): questions(4, "perturbed_answer"),
        },
    )


def add_muse(hub: LoopbackHub) -> None:
    passages = [" ".join(WORDS[i : i + 20]) for i in range(30)]
    add_dataset(
        hub,
        "muse-bench/MUSE-News",
        {
            ("raw", "retain1"): [{"text": text} for text in passages[:8]],
            ("verbmem", "forget"): [
                {"prompt": text[:30], "gt": text[30:]} for text in passages[20:26]
            ],
            ("knowmem", "retain_qa"): questions(5),
            ("knowmem", "retain_qa_icl"): questions(2),
        },
    )


def add_wmdp(hub: LoopbackHub) -> None:
    def asked(many: int) -> list[dict[str, Any]]:
        return [
            {"question": row["question"], "choices": WORDS[:4], "answer": 1}
            for row in questions(many)
        ]

    add_dataset(hub, "cais/wmdp", {("wmdp-bio", "test"): asked(6)})
    add_dataset(hub, "cais/mmlu", {("all", "test"): [{**row, "subject": "a"} for row in asked(6)]})


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_is_a_settings_file_that_can_be_printed_and_changed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", FULL, "--benchmark", name, "--show"]) == 0
    text = capsys.readouterr().out
    file = tmp_path / "sage.yaml"
    file.write_text(text)
    beneath = load_settings({}, config=None, unlearned=None, benchmark=text)[0]
    assert load_settings({}, config=file, unlearned=None)[0] == beneath
    assert beneath.forget is not None
    assert beneath.heldout is not None
    changed = {"forget": "mine.jsonl"}
    assert load_settings(changed, config=file, unlearned=None)[0].forget == "mine.jsonl"


def test_the_base_s_name_says_what_else_is_known() -> None:
    for name, retain in (("tofu/forget10", "retain90"), ("tofu/forget01", "retain99")):
        values = yaml.safe_load(benchmark_settings(name, FULL))
        assert values["reference"] == FULL.replace("_full", f"_{retain}")
        assert values["system_prompt"] == "You are a helpful assistant."
    for base in ("org/base", "./tofu_full", "locuslab/tofu_ft_phi-1.5"):
        assert (
            not {"reference", "system_prompt"}
            & yaml.safe_load(benchmark_settings("tofu/forget10", base)).keys()
        )


@pytest.mark.parametrize(
    "name, add, figures",
    [
        ("tofu/forget10", add_tofu, {"forget.truth_ratio", "all.model_utility"}),
        ("muse/news", add_muse, {"forget.verbmem", "heldout.knowmem"}),
        ("wmdp/bio", add_wmdp, {"forget.accuracy", "heldout.accuracy"}),
    ],
)
def test_the_whole_command(name: str, add: Any, figures: set[str], on_hub: LoopbackHub) -> None:
    add(on_hub)
    words = ["push", "org/base", "org/unlearned", "--benchmark", name, "--max-length", "64"]
    assert main([*words, "--gain", "1", "-q"]) == 0
    report = json.loads(on_hub.files("org/unlearned-sage")["sage/report.json"])
    found = {f"{one['set']}.{one['metric']}" for one in report["results"]}
    assert figures <= found


def test_what_the_command_or_sage_yaml_says_wins(
    hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_tofu(hub)
    Path("sage.yaml").write_text(f"retain: {pair / 'retain.jsonl'}\n")
    words = ["plan", str(pair / "base"), str(pair / "unlearned"), "--benchmark", "tofu/forget10"]
    assert main([*words, "--heldout", str(pair / "heldout.jsonl"), "--json"]) == 0
    said = capsys.readouterr().out
    assert "retain.jsonl" in said
    assert "config=retain" not in said
    assert "config=forget10_perturbed" in said


@pytest.mark.parametrize("command", ["plan", "data"])
def test_where_there_is_no_network(
    command: str, pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence for all sets of the benchmark, after a few tries of the first."""
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    sides = [str(pair / "base"), str(pair / "unlearned")] if command == "plan" else []
    assert main([command, *sides, "--benchmark", "tofu/forget10", "--json"]) in (0, 25)
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem["status"] == 25
    assert (
        f"dataset locuslab/TOFU cannot be reached: no connection to {nowhere}"
        in (problem["message"])
    )
    assert "give a file of this machine instead" in problem["message"]
    assert "--retain" in problem["message"]


def test_where_the_hub_must_not_be_asked(
    pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sides = [str(pair / "base"), str(pair / "unlearned")]
    assert main(["sanitize", *sides, "--benchmark", "tofu/forget10", "--output", "out"]) == 25
    said = capsys.readouterr().err
    assert "HF_HUB_OFFLINE forbids to ask it; unset that, or give a file" in said
    assert "more problems" not in said


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in {
        ("plan", "org/base", "--benchmark", "tofu/forget11"): "tofu/forget01, tofu/forget05",
        ("plan", "org/base", "--show"): "--benchmark",
    }.items():
        assert main([*words]) == 2
        assert sentence in capsys.readouterr().err


def test_a_part_of_a_split(hub: LoopbackHub) -> None:
    rows = questions(6)
    add_dataset(hub, "org/facts", {("some", "train"): rows})
    address = "hf://datasets/org/facts?config=some&split=train"
    whole = read_proxy(address).rows
    for part, expected in {"[4:]": whole[4:], "[:2]": whole[:2], "[1:3]": whole[1:3]}.items():
        assert read_proxy(address + part).rows == expected
    assert read_proxy(f"{address}[4:]").places[0] == "row 5"
    with pytest.raises(Exception, match="has 6 rows, and none in that part"):
        read_proxy(f"{address}[6:]")


def test_examples_before_each_question(hub: LoopbackHub) -> None:
    rows, shots = questions(3, "perturbed_answer"), questions(2)
    sets = {("some", "train"): rows, ("some", "shots"): shots, ("texts", "train"): [{"text": "a"}]}
    add_dataset(hub, "org/facts", sets)
    plain = read_proxy("hf://datasets/org/facts?config=some")
    shown = read_proxy("hf://datasets/org/facts?config=some&shots=shots")
    said = [word for one in shots for word in (one["question"], one["answer"])]
    for row, other in zip(plain.rows, shown.rows, strict=True):
        for telling in other.tellings:
            assert [content for _, content in telling.shots] == said
        assert row.hash == other.hash  # an example is no part of what a row is
    assert plain.fingerprint != shown.fingerprint  # but of what a model is shown
    with pytest.raises(Exception, match="examples are for questions"):
        read_proxy("hf://datasets/org/facts?config=texts&shots=train")
