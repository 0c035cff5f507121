"""A calibration that was stopped goes on behind its finished blocks, to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.architectures import make_model
from support.pico import make_rows, make_tokenizer, write_rows

import sage_hub
from sage_hub.calibration import calibrate
from sage_hub.calibration.journal import Journal, journal_of
from sage_hub.errors import TargetError
from sage_hub.method.spectra import Spectrum, spectrum


def some_spectrum(seed: int) -> Spectrum:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(2 + seed, 5, generator=generator)
    values = torch.rand(2 + seed, generator=generator, dtype=torch.float64)
    return Spectrum(basis, values, float(values.sum()) + 0.1, 7 + seed, 0.25 if seed else None)


def some_outputs(seed: int) -> dict[str, float]:
    return {f"map.{number}": float(seed + number) for number in range(2)}


def fill(journal: Journal, blocks: range) -> None:
    for block in blocks:
        for which in ("retain", "forget"):
            journal.add(f"{which}/site.{block}", some_spectrum(block), some_outputs(block))
        journal.finish_block({"retain": [f"é{block}"]})


def check(journal: Journal, blocks: int) -> None:
    assert journal.notes == [{"retain": [f"é{block}"]} for block in range(blocks)]
    names = [f"{which}/site.{block}" for block in range(blocks) for which in ("retain", "forget")]
    assert list(journal) == names
    for name in names:
        expected = some_spectrum(int(name[-1]))
        assert torch.equal(journal.read(name, "basis"), expected.basis)
        assert torch.equal(journal.read(name, "values"), expected.values)
        scalars = {"trace": expected.trace, "tokens": expected.tokens, "missed": expected.missed}
        assert journal.scalars(name) == scalars | {"outputs": some_outputs(int(name[-1]))}


@given(st.sampled_from(["spectra", "blocks.jsonl"]), st.floats(0, 1))
def test_what_was_cut_off_is_made_again(
    tmp_path_factory: pytest.TempPathFactory, file: str, share: float
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    with Journal(folder, "key") as journal:
        fill(journal, range(3))
        journal.add("retain/site.3", some_spectrum(3), {})  # of a block that is never finished
    with (folder / file).open("r+b") as cut:
        cut.truncate(round(share * (folder / file).stat().st_size))
    with Journal(folder, "key") as journal:
        left = len(journal.notes)
        check(journal, left)
        fill(journal, range(left, 3))
        check(journal, 3)
    with Journal(folder, "key") as journal:
        check(journal, 3)
        journal.keep(2)
        check(journal, 2)
        journal.remove()
    assert not folder.exists()


def test_a_journal_of_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", "one") as journal:
        fill(journal, range(2))
    with Journal(tmp_path / "journal", "other") as journal:
        check(journal, 0)
    assert not (tmp_path / "journal").exists()


def test_two_runs_into_one_file_are_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", "key"):
        second = Journal(tmp_path / "journal", "key")
        with pytest.raises(TargetError, match="Another run calibrates into"), second:
            pass
        assert (tmp_path / "journal").is_dir()


@pytest.mark.parametrize("spectra", [1, 30, 34, 60])
def test_a_calibration_goes_on_behind_its_finished_blocks(
    spectra: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a mixture, some of whose experts see too little, for two proxies at once."""
    make_model("Mixtral").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    write_rows(tmp_path / "forget.jsonl", make_rows(4, seed=1))
    retain = [str(write_rows(tmp_path / f"{n}.jsonl", make_rows(9, seed=n))) for n in (2, 3)]
    settings = sage_hub.Settings(forget=str(tmp_path / "forget.jsonl"))
    made = 0

    def collect(output: Path, stop: int | None = None) -> int:
        """How many spectra were computed; stopped like by Ctrl-C before number `stop`."""
        nonlocal made
        made = 0

        def counted(*args: Any) -> Spectrum:
            nonlocal made
            if made == stop:
                raise KeyboardInterrupt
            made += 1
            return spectrum(*args)

        monkeypatch.setattr(calibrate, "spectrum", counted)
        base = str(tmp_path / "base")
        sage_hub.collect_statistics(base, output, retain=retain, settings=settings)
        return made

    whole, output = collect(tmp_path / "whole"), tmp_path / "stopped"
    assert whole > 60
    with pytest.raises(KeyboardInterrupt):
        collect(output, stop=spectra)
    finished = journal_of(output / "2.safetensors").is_dir()
    assert finished == (spectra > 33)  # 11 sites of the first layer on three sets
    assert (collect(output) < whole) == finished
    for name in ("2.safetensors", "3.safetensors"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in output.iterdir()) == ["2.safetensors", "3.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        {"end": 1.5},
        {"end": 10**400},
        {"entries": {"retain/site.1": {}}},
        {"entries": []},
        {"note": [1]},
        *(
            {
                "entries": {
                    "a": {"trace": 1, "tokens": 1, "missed": None, "outputs": {}, "parts": own}
                }
            }
            for own in (
                {},
                *(
                    {"basis": [dtype, shape, start], "values": ["F32", [1], 0]}
                    for dtype, shape, start in (
                        ("F32", [2**62, 2**62], 0),
                        ("F32", [-1], 0),
                        ("F33", [1], 0),
                        ("F32", [1], -4),
                        ("F32", [1], 0.5),
                        ("F32", [10**6], 0),
                    )
                ),
            )
        ),
    ],
    ids=lambda change: str(change)[:60],
)
def test_a_block_that_was_tampered_with_is_made_again(
    change: dict[str, Any], tmp_path: Path
) -> None:
    with Journal(tmp_path / "journal", "key") as journal:
        fill(journal, range(2))
    index = tmp_path / "journal" / "blocks.jsonl"
    head, first, second = index.read_text().splitlines()
    index.write_text("\n".join([head, first, json.dumps({**json.loads(second), **change}), ""]))
    with Journal(tmp_path / "journal", "key") as journal:
        check(journal, 1)
