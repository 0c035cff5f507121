"""Statistics that are made once: kept in a cache, published to the Hub, taken from there."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.architectures import make_model
from support.loopback_hub import LoopbackHub
from support.pico import make_tokenizer, write_rows

import sage_hub
from sage_hub.calibration import calibrate
from sage_hub.calibration.statistics import open_statistics
from sage_hub.cli.main import main
from sage_hub.runtime.run import Run


def words(pair: Path, output: Path, *options: str) -> list[str]:
    retain = ["--retain", str(pair / "retain.jsonl"), "--quiet"]
    sides = [str(pair / "base"), str(pair / "unlearned")]
    return ["sanitize", *sides, "--output", str(output), *retain, *options]


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that calibration has made."""
    made: list[str] = []
    real = calibrate._calibrate

    def watched(*args: Any) -> None:
        made.extend(path.name for path in args[1])
        real(*args)

    monkeypatch.setattr(calibrate, "_calibrate", watched)
    return made


def test_a_second_release_of_the_same_base_takes_the_first_ones_statistics(
    pair: Path, tmp_path: Path, calibrated: list[str]
) -> None:
    cache = ["--stats-cache", str(tmp_path / "cache")]
    assert main(words(pair, tmp_path / "plain")) == 0
    assert main(words(pair, tmp_path / "one", *cache)) == 0
    assert len(calibrated) == 2
    assert main(words(pair, tmp_path / "two", *cache, "--strength", "10")) == 0
    assert main(words(pair, tmp_path / "stronger", *cache, "--strength", "9")) == 0
    assert len(calibrated) == 2
    assert shards(tmp_path / "plain") == shards(tmp_path / "one") == shards(tmp_path / "two")
    assert shards(tmp_path / "one") != shards(tmp_path / "stronger")
    (kept,) = (tmp_path / "cache").iterdir()

    # What they depend on makes others; a damaged file is made again.
    assert main(words(pair, tmp_path / "other", *cache, "--max-tokens", "100")) == 0
    assert len(list((tmp_path / "cache").iterdir())) == 2
    kept.write_bytes(kept.read_bytes()[:-1])
    assert main(words(pair, tmp_path / "three", *cache)) == 0
    assert len(calibrated) == 4
    assert shards(tmp_path / "three") == shards(tmp_path / "one")


def test_statistics_on_the_hub(
    hub: LoopbackHub, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    retain = ["--retain", str(pair / "retain.jsonl"), "--quiet"]
    assert main(["stats", str(pair / "base"), *retain, "--to", "org/base-stats"]) == 0
    capsys.readouterr()
    assert set(hub.files("org/base-stats")) >= {"statistics.safetensors", "README.md"}
    card = hub.files("org/base-stats")["README.md"].decode()
    assert "retain.jsonl, 40 rows" in card
    assert str(pair) not in card
    sides = [str(pair / "base"), str(pair / "unlearned"), "--quiet"]
    before = len(hub.requests)
    assert main(["push", *sides, "--stats", "org/base-stats", "--dry-run", "--to", "org/x"]) == 0
    assert not any(request.storage for request in hub.requests[before:])
    taken = tmp_path / "taken"
    assert main(["sanitize", *sides, "--stats", "org/base-stats", "--output", str(taken)]) == 0
    assert main(words(pair, tmp_path / "made")) == 0
    assert shards(taken) == shards(tmp_path / "made")
    manifest = json.loads((taken / "sage" / "manifest.json").read_text())
    commit = hub.commits("org/base-stats")[-1].sha
    assert manifest["statistics"]["file"] == f"org/base-stats@{commit}"
    # Made again, from another proxy, into the same repo: a commit more.
    forget = ["--retain", str(pair / "forget.jsonl"), "--quiet"]
    assert main(["stats", str(pair / "base"), *forget, "--to", "org/base-stats"]) == 0
    again = ["sanitize", *sides, "--stats", f"org/base-stats@{commit}", "--output"]
    assert main([*again, str(tmp_path / "pinned")]) == 0
    assert shards(tmp_path / "pinned") == shards(taken)


def test_a_repo_that_is_no_place_for_statistics(
    hub: LoopbackHub, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add_repo("org/model", pair / "base")
    retain = ["--retain", str(pair / "retain.jsonl"), "--quiet"]
    assert main(["stats", str(pair / "base"), *retain, "--to", "org/model"]) == 23
    assert "was not made by sage-hub for this" in capsys.readouterr().err
    sides = [str(pair / "base"), str(pair / "unlearned"), "--quiet", "--to", "org/x"]
    assert main(["push", *sides, "--stats", "org/model"]) == 10
    assert "has no statistics.safetensors" in capsys.readouterr().err
    for wrong in ("./nowhere.safetensors", "./nowhere", "../nowhere", "nowhere", str(pair)):
        assert main(["push", *sides, "--stats", wrong]) == 10
        err = capsys.readouterr().err
        assert ("is a folder" if wrong == str(pair) else "does not exist") in err


@pytest.fixture
def proxies(pair: Path) -> list[str]:
    """Two retain proxies, of rows of other lengths, and none of the forget set's."""
    write_rows(pair / "long.jsonl", [{"text": "w1 w2 w3 " * 20}, {"text": "w4 w5"}])
    return [str(pair / "retain.jsonl"), str(pair / "long.jsonl")]


@pytest.mark.parametrize("kind", ["Llama", "Mixtral"])
def test_several_proxies_in_one_pass_make_the_files_that_each_makes_alone(
    kind: str, pair: Path, proxies: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pair / "base"
    if kind == "Mixtral":  # whose experts see some tokens only, or too few
        base = tmp_path / "mixtral"
        make_model(kind).save_pretrained(base)
        make_tokenizer().save_pretrained(base)
    read: Counter[str] = Counter()
    run: list[str] = []

    @contextmanager
    def counting(checkpoint: Any) -> Iterator[Any]:
        with real(checkpoint) as weights:
            yield lambda name: (read.update([name]), weights(name))[1]

    def watched(look: Any, *others: Any) -> Any:
        run.append(look.part.about["name"])
        return observe(look, *others)

    real, observe = calibrate.open_weights, calibrate._Look.at
    monkeypatch.setattr(calibrate, "open_weights", counting)
    monkeypatch.setattr(calibrate._Look, "at", watched)
    forget = str(pair / "forget.jsonl")
    words = ["stats", str(base), "--forget", forget, "--quiet", "--output"]
    both = [f"--retain={proxy}" for proxy in proxies]
    assert main([*words, str(tmp_path / "both"), *both]) == 0
    assert set(read.values()) == {1}
    blocks = len(run) // 3
    assert Counter(run) == dict.fromkeys(["retain.jsonl", "long.jsonl", "forget.jsonl"], blocks)
    for proxy, option in zip(proxies, both, strict=True):
        alone, name = tmp_path / "alone.safetensors", Path(proxy).with_suffix(".safetensors").name
        assert main([*words, str(alone), option]) == 0
        assert (tmp_path / "both" / name).read_bytes() == alone.read_bytes()
    assert len(list((tmp_path / "both").iterdir())) == 2


def test_what_memory_has_room_for_is_each_proxys_own_matter(
    pair: Path, proxies: list[str], tmp_path: Path
) -> None:
    # The long rows leave room for sketches alone, the short ones do not.
    words = ["stats", str(pair / "base"), "--forget", str(pair / "forget.jsonl"), "--quiet"]
    # What fits depends on the type that the model is run in, which not all CPUs choose alike.
    words += ["--compute-dtype", "bfloat16", "--memory", "0.60093", "--output"]
    assert main([*words, str(tmp_path), *(f"--retain={proxy}" for proxy in proxies)]) == 0
    sketched = []
    for proxy in proxies:
        alone, file = tmp_path / "alone", tmp_path / f"{Path(proxy).stem}.safetensors"
        assert main([*words, str(alone), "--retain", proxy]) == 0
        assert file.read_bytes() == alone.read_bytes()
        with open_statistics(file) as found:
            sketched.append(set(found.sketched))
    assert not sketched[0]
    assert any(name.startswith("forget/") for name in sketched[1])


def test_several_proxies_and_the_cache(
    pair: Path, proxies: list[str], tmp_path: Path, calibrated: list[str]
) -> None:
    cache, both = tmp_path / "cache", tmp_path / "both"
    settings = sage_hub.Settings(retain=proxies[0])
    base = str(pair / "base")
    sage_hub.collect_statistics(base, tmp_path / "a", settings=settings, run=Run(stats_cache=cache))
    made = sage_hub.collect_statistics(base, both, retain=proxies, run=Run(stats_cache=cache))
    assert len(calibrated) == 2  # the first one's was there
    assert [Path(one["file"]).name for one in made["statistics"]] == [
        "retain.safetensors",
        "long.safetensors",
    ]
    assert [one["data"]["retain"]["name"] for one in made["statistics"]] == [
        "retain.jsonl",
        "long.jsonl",
    ]
    assert (both / "retain.safetensors").read_bytes() == (tmp_path / "a").read_bytes()
    again = ["--stats-cache", str(cache), "--retain", proxies[1]]
    assert main(["stats", base, *again, "--output", str(tmp_path / "b"), "--quiet"]) == 0
    assert len(calibrated) == 2
    assert (both / "long.safetensors").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(list(cache.iterdir())) == 2


def test_several_proxies_that_cannot_be_told_apart_or_put_anywhere(
    hub: LoopbackHub, pair: Path, proxies: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["stats", str(pair / "base"), "--quiet", *(f"--retain={proxy}" for proxy in proxies)]
    assert main([*words, "--retain", proxies[0], "--output", str(pair / "x")]) == 2
    assert "would be written to" in capsys.readouterr().err
    assert main([*words, "--output", proxies[0]]) == 2
    assert "is a file; several --retain need a folder" in capsys.readouterr().err
    assert main([*words, "--to", "org/base-stats"]) == 2
    assert "statistics of one retain proxy; use --output" in capsys.readouterr().err
    assert main([*words, "--forget", proxies[1], "--output", str(pair / "x")]) == 19
    assert "is also row 1 of the retain set (long.jsonl)" in capsys.readouterr().err
    assert not (pair / "x").exists()
