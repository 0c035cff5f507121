"""Files of every kind that we read, damaged by chance: read, or refused in one line, and no more.

Each starts as what the kind's writer writes. It then has a wrong value in its JSON, or wrong bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.adapters import make_adapter
from support.hostile import damaged
from support.pico import CHAT, proxies
from support.soak import SECRET, Tally, within

from sage_hub.calibration.journal import Journal
from sage_hub.calibration.statistics import check_belongs, is_whole, open_statistics
from sage_hub.checkpoint import architecture
from sage_hub.checkpoint.adapter import open_adapter
from sage_hub.checkpoint.files import open_files
from sage_hub.checkpoint.index import open_checkpoint, read_index
from sage_hub.cli.config import line_of, load_settings
from sage_hub.cli.main import main
from sage_hub.commands.card import rewrite
from sage_hub.commands.review import review
from sage_hub.commands.rows import _kept
from sage_hub.errors import ArchitectureError, SageHubError, StatisticsError, UsageError
from sage_hub.evaluation.answers import read_answers
from sage_hub.evaluation.imported import read_results
from sage_hub.method.spectra import Spectrum
from sage_hub.publish.folder import Work
from sage_hub.publish.sending import finished
from sage_hub.publish.verify import is_of_release, verify
from sage_hub.record import card
from sage_hub.record.card import find_template, statistics_card, write_card
from sage_hub.record.gates import facts_of, parse
from sage_hub.record.manifest import MANIFEST, REPORT, as_written, read_record
from sage_hub.record.metadata import read_card
from sage_hub.record.sums import SUMS
from sage_hub.repair.readable import fault
from sage_hub.repair.write import ShardRecord
from sage_hub.rows.sources import read_proxy
from sage_hub.runtime import limits
from sage_hub.runtime.progress import SILENT

SECONDS = 30  # for one file of some kilobytes, on a busy machine
ACCEPTED = "read, or recognized as damaged and made anew"


@dataclass(frozen=True)
class Place:
    """Where the files lie that are damaged, whole: a pair, its release, an adapter, statistics."""

    folder: Path

    @property
    def release(self) -> Path:
        return self.folder / "release"

    def of(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


@pytest.fixture(scope="module")
def place(_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(_pair, folder / "pair")
    pair = folder / "pair"
    words = [str(pair / "base"), str(pair / "unlearned"), *proxies(pair), "--quiet"]
    release = ["--output", str(folder / "release"), "--gate", "bias.kept <= 1"]
    assert main(["sanitize", *words, *release, "--generate-rows", "2"]) == 0
    stats = str(folder / "statistics.safetensors")
    assert (
        main(["stats", str(pair / "base"), *proxies(pair)[:2], "--quiet", "--output", stats]) == 0
    )
    make_adapter(folder / "lora", "rsLoRA")
    (folder / "sage.yaml").write_text(YAML)
    (folder / "results_1.json").write_text(json.dumps(LM_EVAL))
    (folder / "TOFU_EVAL.json").write_text(json.dumps(OPEN_UNLEARNING))
    (folder / "rows.csv").write_text('question,answer\nw1 w2,w3\n"w4, w5",w6\n')
    (folder / "rows.json").write_text(json.dumps([{"messages": MESSAGES}, {"messages": MESSAGES}]))
    (folder / "choices.jsonl").write_text(
        '{"question": "w1", "choices": ["w2", "w3"], "answer": 1}\n' * 2
        + '{"question": "w4 w5", "choices": ["w6", "w7"], "answer": "A"}\n'
    )
    (folder / "chat.jinja").write_text(CHAT)
    (folder / "gate.txt").write_text("forget.probability <= (unlearned + 0.01) * 2 - base")
    (folder / "card").mkdir()
    shutil.copyfile(find_template(None), folder / "card.md.jinja")
    (folder / "cards").mkdir()
    (folder / "cards" / "README.md").write_text(
        "---\nlicense: mit\nlanguage:\n- en\n---\n\n# A model\n"
    )
    with Journal(folder / "journal", "key") as journal:
        for number in range(3):
            found = Spectrum(torch.ones(2, 5), torch.ones(2).double(), 2.5, 7, None)
            journal.add(f"retain/site.{number}", found, {"map": 1.0})
            journal.finish_block({"retain": []})
    note = {"shard": "a", "sha256": "0" * 64, "tensors": [TENSOR], "bytes": 5}
    (folder / "note.json").write_text(json.dumps(note))
    (folder / "rows.partial.json").write_text(json.dumps({"retain": [ROW], "guard": [ROW]}))
    return Place(folder)


YAML = """# what a user writes
retain: retain.jsonl
heldout: hf://datasets/org/facts@main/test.jsonl?split=test
bystanders:
  real_authors: authors.jsonl
gain: 1.5
strength: inf
energy: 0.9
max_tokens: 5000
robustness: true
gates:
- retain_recovered >= 0.5
"""
MESSAGES = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
ROW = {"question": "w1", "answer": "w2"}
TENSOR = {"name": "t", "shard": "a", "action": "filtered", "rank": 2, "profile": [0.1, 0.2]}
LM_EVAL = {
    "results": {"mmlu": {"alias": "mmlu", "acc,none": 0.5, "acc_stderr,none": 0.01}},
    "higher_is_better": {"mmlu": {"acc": True}},
    "n-samples": {"mmlu": {"original": 10, "effective": 10}},
    "config": {"model_sha": "abc"},
    "model_name": "org/model",
}
OPEN_UNLEARNING = {
    "forget_Q_A_Prob": {"agg_value": 0.1, "value_by_index": {"0": {"prob": 0.1}}},
    "model_utility": 0.5,
}


# What reads each kind: `name` of the place is damaged, and is whole again behind it.


def read_weights(place: Place, path: Path) -> None:
    checkpoint = read_index(open_files(str(path.parent)))
    for shard in checkpoint.shards:
        with checkpoint.open_shard(shard) as reader:
            for name in reader.header.tensors:
                reader.read(name)
    assert isinstance(checkpoint.config, dict)
    checkpoint.tokenizer_fingerprint()


def read_model(place: Place, path: Path) -> None:
    checkpoint = open_checkpoint(str(path.parent))
    assert checkpoint.architecture


def open_lora(place: Place, path: Path) -> None:
    base = open_checkpoint(str(place.folder / "lora" / "base"))
    adapter = open_adapter(open_files(str(path.parent)), base)
    assert adapter.changes
    adapter.does_something()


def read_yaml(place: Place, path: Path) -> None:
    settings, _ = load_settings({}, config=path, unlearned=None)
    settings.describe()
    line_of("gain", config=path, unlearned=None)


def read_rows(place: Place, path: Path) -> None:
    proxy = read_proxy(str(path))
    assert proxy.rows
    assert proxy.fingerprint
    assert [one.hash for row in proxy.rows for one in row.tellings]


def read_statistics(place: Place, path: Path) -> None:
    is_whole(path)
    with open_statistics(path) as found:
        about = {"weights": found.origin.weights, "tokenizer": found.origin.tokenizer}
        check_belongs(found, name="base", **about, energy=0.9, rank=None)
        assert isinstance(sum(found.outputs.values()), float)
        assert isinstance(found.sketched, dict)
        for site in found.sites:
            seen = found.spectrum("retain", site)
            assert seen.basis.shape == (len(seen.values), site.size)
        json.dumps([found.origin.published_data, found.origin.settings])
        statistics_card(found.origin)


def read_journal(place: Place, path: Path) -> None:
    folder = path.parent
    kept = {file: file.read_bytes() for file in folder.iterdir() if file != path}
    try:
        with Journal(folder, "key") as journal:
            for name in journal:
                assert journal.scalars(name)["trace"] is not None
                assert journal.read(name, "basis").dim() <= 8
                journal.read(name, "values")
            assert all(isinstance(note.get("retain", []), list) for note in journal.notes)
    finally:
        folder.mkdir(exist_ok=True)
        for file, content in kept.items():
            file.write_bytes(content)


def read_note(place: Place, path: Path) -> None:
    folder = place.folder / ".out.partial" / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / "a.json")
    note = Work(place.folder / "out", "1").note("a")
    assert note is None or ShardRecord.from_json(note)
    Work(place.folder / "out", "1").recall("a")


def read_kept_rows(place: Place, path: Path) -> None:
    found = _kept(path)
    if found is not None:
        assert isinstance(found["retain"], list)


def check_release(place: Place, path: Path) -> None:
    """What was changed is found, in the record too; nothing in it can harm who reads it."""
    found = verify(str(place.release))
    assert found.differences
    is_of_release("x", read_record(place.release / MANIFEST))
    finished(Work(place.release, "1"), lambda manifest: True, SILENT)


def check_sums(place: Place, path: Path) -> None:
    verify(str(place.release))


def make_page(place: Place, path: Path) -> None:
    review(str(place.release), output=place.folder / "page.html")


def rewrite_card(place: Place, path: Path) -> None:
    """The folder is as it was, or its card is written."""
    before = {p: p.read_bytes() for p in place.release.rglob("*") if p.is_file()}
    try:
        rewrite(place.release)
    except SageHubError:
        assert {p: p.read_bytes() for p in place.release.rglob("*") if p.is_file()} == before
        raise
    finally:
        for file, content in before.items():
            if file.read_bytes() != content:
                file.write_bytes(content)


def check_gates(place: Place, path: Path) -> None:
    manifest, report = (read_record(place.release / name) for name in (MANIFEST, REPORT))
    with as_written("release"):
        facts = facts_of(manifest, report)
    for text in ("retain_recovered >= 0.5", "forget.probability <= unlearned / gain"):
        parse(text).check(facts).sentence()


def read_gate(place: Place, path: Path) -> None:
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        raise UsageError("the shell's matter") from None
    gate = parse(text)
    assert gate.check({name: 1.0 for name in gate.names}).sentence()


def read_their_answers(place: Place, path: Path) -> None:
    read_answers(path)
    make_page(place, path)


def read_imported(place: Place, path: Path) -> None:
    for result in read_results("sanitized", str(path)):
        assert isinstance(result.value, float)


def use_template(place: Place, path: Path) -> None:
    manifest, report = (read_record(place.release / name) for name in (MANIFEST, REPORT))
    write_card(place.folder / "card", manifest, report, str(path))


def read_front_matter(place: Place, path: Path) -> None:
    class Side:
        files = open_files(str(path.parent))

    found, why = read_card(Side)  # type: ignore[arg-type]
    assert isinstance(found, dict)
    assert why is None or isinstance(why, str)


def read_carried(place: Place, path: Path) -> None:
    why = fault(path.name, path.read_bytes())
    assert why is None or isinstance(why, str)


@dataclass(frozen=True)
class Kind:
    name: str  # of the file that is damaged
    read: Callable[[Place, Path], None]
    many: int  # files in the soak


SHARD = "model-00001-of-00003.safetensors"
KINDS: Mapping[str, Kind] = {
    "safetensors headers": Kind(f"pair/base/{SHARD}", read_weights, 20_000),
    "indexes": Kind("pair/base/model.safetensors.index.json", read_weights, 14_000),
    "configs": Kind("pair/base/config.json", read_model, 800),
    "adapters' configs": Kind("lora/unlearned/adapter_config.json", open_lora, 600),
    "adapters' weights": Kind("lora/unlearned/adapter_model.safetensors", open_lora, 600),
    "sage.yaml": Kind("sage.yaml", read_yaml, 14_000),
    "rows in JSONL": Kind("pair/retain.jsonl", read_rows, 10_000),
    "rows with choices": Kind("choices.jsonl", read_rows, 10_000),
    "chats in JSON": Kind("rows.json", read_rows, 8_000),
    "rows in CSV": Kind("rows.csv", read_rows, 1_000),
    "statistics": Kind("statistics.safetensors", read_statistics, 5_000),
    "journals": Kind("journal/blocks.jsonl", read_journal, 2_000),
    "journals' numbers": Kind("journal/spectra", read_journal, 400),
    "notes of finished shards": Kind("note.json", read_note, 2_000),
    "rows that the base wrote": Kind("rows.partial.json", read_kept_rows, 2_000),
    "manifests, verified": Kind(f"release/{MANIFEST}", check_release, 500),
    "reports, verified": Kind(f"release/{REPORT}", check_release, 300),
    "SHA256SUMS": Kind(f"release/{SUMS}", check_sums, 400),
    "manifests, reviewed": Kind(f"release/{MANIFEST}", make_page, 400),
    "reports, reviewed": Kind(f"release/{REPORT}", make_page, 400),
    "manifests, gated": Kind(f"release/{MANIFEST}", check_gates, 1_500),
    "reports, gated": Kind(f"release/{REPORT}", check_gates, 1_500),
    "manifests for a card": Kind(f"release/{MANIFEST}", rewrite_card, 60),
    "reports for a card": Kind(f"release/{REPORT}", rewrite_card, 60),
    "answers": Kind("release.answers.jsonl", read_their_answers, 500),
    "results of lm-eval": Kind("results_1.json", read_imported, 5_000),
    "results of open-unlearning": Kind("TOFU_EVAL.json", read_imported, 5_000),
    "gates": Kind("gate.txt", read_gate, 6_000),
    "card templates": Kind("card.md.jinja", use_template, 300),
    "chat templates": Kind("chat.jinja", read_carried, 1_000),
    "cards of sources": Kind("cards/README.md", read_front_matter, 4_000),
    "tokenizer.json": Kind("pair/base/tokenizer.json", read_carried, 500),
}
FEW, CHUNK = 25, 500


def chunks() -> Iterator[Any]:
    """Each kind with the seeds of a test: few always, and all others in the soak."""
    for name, kind in KINDS.items():
        yield pytest.param(name, range(FEW), id=f"{name}-few")
        for first in range(FEW, FEW + kind.many, CHUNK):
            some = range(first, min(first + CHUNK, FEW + kind.many))
            yield pytest.param(name, some, id=f"{name}-from {first}", marks=pytest.mark.soak)


def test_the_soak_tries_a_hundred_thousand() -> None:
    assert sum(kind.many for kind in KINDS.values()) >= 100_000


@pytest.mark.parametrize("name, seeds", chunks())
def test_a_damaged_file(
    name: str, seeds: range, place: Place, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 1.0)
    monkeypatch.setattr(architecture, "LONGEST_BUILD", 2.0)
    kind = KINDS[name]
    if kind.read is use_template:  # the pictures are drawn by the kinds "for a card"
        monkeypatch.setattr(card, "draw", lambda *_: {"bias": "sage/bias.png"})
    path = place.folder / kind.name
    whole = path.read_bytes()
    try:
        for seed in tally.each(seeds):
            content = damaged(whole, Random(f"{name} {seed}"))
            if content == whole:
                continue
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            tally.count("Hostile files", name, try_one(kind, place, path))
    finally:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(whole)


def try_one(kind: Kind, place: Place, path: Path) -> str:
    """How it ended: whatever is raised but a refusal in one line fails the test."""
    try:
        with within(SECONDS):
            kind.read(place, path)
    except SageHubError as error:
        said = str(error)
        assert said
        assert said.isprintable(), said
        assert not SECRET.search(said)
        assert "Internal error" not in said
        return "refused in one line"
    return ACCEPTED


def altered(path: Path, key: str, how: Callable[[Any], Any]) -> None:
    """Change an entry of the metadata of a statistics file, which is JSON."""
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    metadata[key] = json.dumps(how(json.loads(metadata[key])))
    save_file(load_file(path), path, metadata=metadata)


STATISTICS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "no numbers": ("scalars", lambda s: {"retain": {k: {} for k in s["retain"]}}),
    "a text for a number": (
        "scalars",
        lambda s: {"retain": {k: {**own, "trace": "1"} for k, own in s["retain"].items()}},
    ),
    "a site that is none": (
        "scalars",
        lambda s: {"retain": {"x": next(iter(s["retain"].values()))}},
    ),
    "a set without rows": ("scalars", lambda s: {**s, "forget": s["retain"]}),
    "no set": ("scalars", lambda s: []),
    "sites of another size": ("sites", lambda sites: [{**site, "size": 7} for site in sites]),
    "a model that is no text": ("origin", lambda o: {**o, "model": 5}),
    "a rank in words": ("origin", lambda o: {**o, "settings": {"energy": 0.9, "rank": "5"}}),
    "an endless number": (
        "scalars",
        lambda s: {"retain": {k: {**own, "trace": 10**400} for k, own in s["retain"].items()}},
    ),
    "no rank": ("origin", lambda o: {**o, "settings": {"energy": 0.9}}),
    "no rows": ("origin", lambda o: {**o, "data": {}}),
    "rows without hashes": ("origin", lambda o: {**o, "data": {"retain": {"name": "a"}}}),
}


@pytest.mark.parametrize("what", STATISTICS)
def test_statistics_that_do_not_fit_together_are_refused(
    what: str, place: Place, tmp_path: Path
) -> None:
    path = tmp_path / "statistics.safetensors"
    path.write_bytes(place.of("statistics.safetensors"))
    altered(path, *STATISTICS[what])
    with pytest.raises(StatisticsError, match="damaged; make it anew"):
        read_statistics(place, path)
    assert not is_whole(path)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"retain": 1, "guard": []}', "", "5"])
def test_rows_that_the_base_has_not_written_are_written_anew(content: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(content)
    assert _kept(tmp_path / "rows.json") is None


def test_a_config_of_endless_layers_is_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(architecture, "LONGEST_BUILD", 0.5)
    side = shutil.copytree(place.folder / "pair" / "base", tmp_path / "base")
    config = json.loads((side / "config.json").read_text())
    (side / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2**63}))
    with within(SECONDS), pytest.raises(ArchitectureError, match="runs for more than"):
        assert open_checkpoint(str(side)).architecture
