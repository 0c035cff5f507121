"""The gain: the search finds what is asked for, the closed form is held back, runs say which."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.adapters import make_adapter, sanitize
from support.architectures import make_model, make_sides, move
from support.pico import proxies
from support.reference import shares_reference

from sage_hub.calibration.statistics import open_statistics
from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.checkpoint.pair import Pair, open_unlearned
from sage_hub.cli.main import main
from sage_hub.commands.stats import collect_statistics
from sage_hub.errors import ProxyError
from sage_hub.evaluation.variants import Variant
from sage_hub.method.sage import Gains
from sage_hub.model.weights import open_weights
from sage_hub.repair.carrier import carried
from sage_hub.repair.gain import Trial, Way, _by_evaluation, closed_form, shares_of
from sage_hub.repair.matching import make_plan
from sage_hub.repair.search import CLOSE
from sage_hub.repair.update import STRENGTHS, Filter, Measurement, Update
from sage_hub.runtime.run import Run
from sage_hub.settings import Settings


def test_forget_rows_without_an_answer_stop_the_search(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--output", "out", "-q"]
    words += ["--retain", str(pair / "retain.jsonl"), "--forget", str(pair / "forget.jsonl")]
    assert main([*words, "--max-length", "5"]) == ProxyError.status
    said = capsys.readouterr().err
    assert "makes no number of any answer of the forget set (forget.jsonl)" in said


def test_a_search_without_retain_rows_has_them_written(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They hold the gain back, whatever was calibrated on."""
    sides = [str(pair / "base"), str(pair / "unlearned")]
    retain = ["--retain", str(pair / "retain.jsonl")]
    forget = ["--forget", str(pair / "forget.jsonl")]
    assert main(["stats", sides[0], *retain, *forget, "--output", "s.safetensors", "-q"]) == 0
    words = ["sanitize", *sides, *forget, "--stats", "s.safetensors", "--output", "out", "-q"]
    assert main([word for word in words if word != "-q"]) == 0
    err = capsys.readouterr().err
    assert "retain      written by the base before calibration" in err
    assert "γ = " in err
    assert main([*words, "--gain", "match", "--dry-run"]) == 0


def measurement(retain: float, retain_filtered: float, forget: float, kept: float) -> Measurement:
    zeros = (0.0,) * len(STRENGTHS)
    return Measurement("m", 3, retain, retain_filtered, 1.0, zeros, forget, kept)


def test_the_closed_form_keeps_the_carrier() -> None:
    found = closed_form([measurement(1.0, 0.01, 4.0, 1.0), measurement(1.0, 0.01, 5.0, 1.25)])
    assert found is not None
    assert found.gains.model == pytest.approx(2)
    assert found.search == {"matching": pytest.approx(2), "held_back": False}


def test_and_never_the_bias_of_the_source() -> None:
    found = closed_form([measurement(1.0, 0.25, 16.0, 1.0)])
    assert found is not None
    assert found.gains.model == 2  # not 4, with which the bias would be four times the source's
    assert found.search == {"matching": 4, "held_back": True}
    assert closed_form([measurement(1.0, 0.25, 1.0, 0.0)]) is None


def test_shares_are_those_of_the_whole_model_in_float64(pair: Path, tmp_path: Path) -> None:
    sets = {name: str(pair / f"{name}.jsonl") for name in ("retain", "forget")}
    settings = Settings(**sets, strength=3.0, energy=0.8)
    collect_statistics(str(pair / "base"), tmp_path / "statistics", settings=settings)
    base, unlearned = (open_checkpoint(str(pair / side)) for side in ("base", "unlearned"))
    with open_statistics(tmp_path / "statistics") as opened:
        plan = make_plan(Pair(base, unlearned)).observed(opened.site_of)
        found = shares_of(Update(plan, opened, Filter(3.0, 0.8, None)).measure(Run()))
    rows = [
        [json.loads(line) for line in Path(file).read_text().splitlines()] for file in sets.values()
    ]
    expected = shares_reference(pair / "base", pair / "unlearned", *rows, strength=3.0, energy=0.8)
    # What lies outside of the stored directions counts as their mean.
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("better", ["shares", "even"])
def test_the_way_that_keeps_more_is_taken(better: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, list[Any]]] = []

    def seen(forget: float, retain: float) -> Variant:
        figures = {("forget", "probability"): forget, ("retain", "probability"): retain}
        return Variant(figures, {})

    def looks(
        _: Trial, __: Any, variants: dict[str, Any], sets: Any, every: int = 1
    ) -> list[Variant]:
        asked.append((every, [*variants.values()]))
        found = []
        for gains in variants.values():
            if gains is None:
                found.append(seen(0.1, 0.5))
                continue
            way = "shares" if gains.shares else "even"
            found.append(seen(0.8 / gains.model, 0.9 if way == better else 0.8))
        return found

    monkeypatch.setattr(Trial, "looks", looks)
    monkeypatch.setattr("sage_hub.repair.gain.carried", lambda *_: lambda gains: gains)
    monkeypatch.setattr("sage_hub.repair.gain.room_for_a_block", lambda *_: 0.0)
    update: Any = SimpleNamespace(plan=SimpleNamespace(base=None, unlearned=None))
    proxies: Any = dict.fromkeys(("forget", "retain"))
    trial = Trial(proxies, Settings(forget="f"), None, Path())
    chosen = _by_evaluation(update, [Way({"module": 2.0}), Way({}, 5.0)], trial)
    assert chosen.gains.shares == ({"module": 2.0} if better == "shares" else {})
    assert 8 <= chosen.gains.model <= 8 * CLOSE
    assert chosen.search is not None
    assert {entry["shares"] for entry in chosen.search["first_looks"]} == {True, False}
    # A first look at both ways and the source; then one way alone, on all rows.
    (first, looked), *others = asked
    assert (first, len(looked)) == (4, 1 + 2 * 3)
    assert all(every == 1 for every, _ in others)
    assert len(others) <= 2


def check_blend(base: Path, unlearned: Path, release: Path, rows: Path, room: float = 1e9) -> None:
    """Weights with a gain of 3 on their way into a model are those of the `release` with it."""
    settings = Settings(retain=str(rows))
    statistics = release.with_name("statistics.safetensors")
    collect_statistics(str(base), statistics, settings=settings)
    first = open_checkpoint(str(base))
    second, made = (open_unlearned(str(folder), first) for folder in (unlearned, release))
    with open_statistics(statistics) as opened:
        plan = make_plan(Pair(first, second)).observed(opened.site_of)
        how = Filter(*settings.sharpness, None)
        # Twice of half the gain for every map is the gain.
        twice = {map_.name: 2.0 for op in plan.operations for map_ in op.linears}
        blends = carried(Update(plan, opened, how), room)
        with (
            open_weights(second, first, blends(Gains(1.5, twice))) as ours,
            open_weights(made) as written,
            open_weights(second) as source,
        ):
            names = first.empty_model().state_dict()
            changed = [name for name in names if not torch.equal(written(name), source(name))]
            assert changed
            for name in names:
                torch.testing.assert_close(ours(name), written(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("room", [0.0, 1e9])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Qwen3Moe"])
def test_on_the_way_into_a_model_weights_are_as_written(
    name: str, room: float, tmp_path: Path
) -> None:
    base, unlearned = make_model(name), make_model(name)
    move(unlearned)
    words = [*make_sides(tmp_path, base, unlearned), "--gain", "3"]
    assert main(words) == 0
    sides = (tmp_path / side for side in ("base", "unlearned", "out"))
    check_blend(*sides, tmp_path / "retain.jsonl", room)


def test_and_those_of_an_adapter(tmp_path: Path) -> None:
    make_adapter(tmp_path, "Llama")
    release = sanitize(tmp_path, "--gain", "3")
    check_blend(tmp_path / "base", tmp_path / "unlearned", release, tmp_path / "retain.jsonl")


def run(pair: Path, out: Path, *more: str) -> dict[str, Any]:
    both = [str(pair / "base"), str(pair / "unlearned"), "--output", str(out), "--quiet"]
    words = ["sanitize", *both, *proxies(pair), "--generate-rows", "0", *more]
    assert main(words) == 0
    manifest: dict[str, Any] = json.loads((out / "sage" / "manifest.json").read_text())
    report = json.loads((out / "sage" / "report.json").read_text())
    figures = {(r["model"], r["set"], r["metric"]): r["value"] for r in report["results"]}
    return manifest | {"figures": figures}


def test_a_run_reaches_the_level_and_records_how(pair: Path, tmp_path: Path) -> None:
    plain = run(pair, tmp_path / "plain", "--gain", "1")
    own, source = (plain["figures"][m, "forget", "probability"] for m in ("sanitized", "unlearned"))
    target = (own + source) / 2
    if own < source:  # a random update may forget more when it is filtered
        target = own * 0.99
    found = run(pair, tmp_path / "out", "--target", str(target))
    search_record = found["gain_search"]
    assert search_record["of"] == "--target"
    tried = {entry["gain"]: entry["forget"] for entry in search_record["tried"]}
    assert found["gain"] in tried
    # What was evaluated on the way is what was written.
    written = found["figures"]["sanitized", "forget", "probability"]
    assert written == pytest.approx(tried[found["gain"]], rel=2e-2)
    if search_record["outcome"] == "reached":
        assert written <= target * 1.02
    assert not list(tmp_path.glob(".*partial"))

    # A number is the gain of every weight, as it is given.
    again = run(pair, tmp_path / "again", "--gain", repr(found["gain"]))
    assert (again["gain_search"], again["gain_shares"]) == (None, {})


@pytest.mark.parametrize(
    "words, says",
    [
        (["--target", "0.1"], "give --forget"),
        (["--target", "0.1", "--gain", "3"], "A target is what gain 'auto'"),
        (["--gain", "auto", "--target", "nan"], "target must be a number"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: list[str], says: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [str(pair / "base"), str(pair / "unlearned"), "--output", str(pair.parent / "x")]
    retain = ["--retain", str(pair / "retain.jsonl")]
    assert main(["sanitize", *both, *retain, *words]) == 2
    assert says in capsys.readouterr().err
