"""Inputs that people really have, singly and in pairs: the plan finds what the run would."""

from __future__ import annotations

import itertools
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from support.mishaps import MISHAPS
from support.pico import proxies
from support.soak import seeds

from sage_hub.cli.main import main


def run(pair: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """The status of `sanitize`, and what it says where it refuses."""
    sides = [str(pair / "base"), str(pair / "unlearned"), "--output", str(pair / "out"), "--quiet"]
    capsys.readouterr()
    status = main(["sanitize", *sides, *proxies(pair), "--gain", "2", *options])
    return status, capsys.readouterr().err


@pytest.mark.parametrize("name", MISHAPS)
def test_an_input_that_people_have(
    name: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = MISHAPS[name]
    change(pair)
    before = sorted(pair.rglob("*"))
    status, err = run(pair, capsys, "--dry-run")
    assert status == expected, err
    assert sorted(pair.rglob("*")) == before
    assert err.count("\n") == (1 if expected else 0), err
    assert run(pair, capsys, "--generate-rows", "0")[0] == expected
    assert (pair / "out").exists() == (expected == 0)


@pytest.mark.parametrize("seed", seeds(12, 400))
def test_two_at_once(seed: int, pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the plan takes the run takes, and nothing is an internal error.

    A second mishap that finds its file gone stops there: what it leaves is an input too.
    """
    both = list(itertools.permutations(MISHAPS, 2))
    first, second = random.Random(seed).choice(both)
    MISHAPS[first][0](pair)
    with suppress(OSError, ValueError, KeyError, RuntimeError):
        MISHAPS[second][0](pair)
    planned, err = run(pair, capsys, "--dry-run")
    assert planned != 1, (first, second, err)
    done, err = run(pair, capsys, "--generate-rows", "0")
    assert done == planned, (first, second, err)
    shutil.rmtree(pair)
