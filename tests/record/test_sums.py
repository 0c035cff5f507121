"""SHA256SUMS signs off every file of a release, for `sha256sum -c` and for `verify`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.loopback_hub import LoopbackHub
from support.pico import proxies

from sage_hub.cli.main import main
from sage_hub.record.sums import SUMS, read_sums, write_sums


def sha256sum(folder: Path) -> int:
    """What sha256sum itself says, strict about every line."""
    words = ["sha256sum", "--strict", "--quiet", "-c", SUMS]
    return subprocess.run(words, cwd=folder, capture_output=True, check=False).returncode


def all_files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {SUMS}


def signed(folder: Path) -> dict[str, str]:
    return read_sums((folder / SUMS).read_text(encoding="utf-8"))


@pytest.fixture
def release(pair: Path) -> Path:
    words = ["sanitize", str(pair / "base"), str(pair / "unlearned"), "--output", "release", "-q"]
    assert main([*words, *proxies(pair)]) == 0
    return Path("release")


@pytest.mark.usefixtures("unhurried")
def test_every_file_of_a_folder_is_signed_off_and_a_new_card_anew(release: Path) -> None:
    assert {"README.md", "sage/report.json", "sage/bias.png"} <= all_files(release)
    assert signed(release).keys() == all_files(release)
    assert sha256sum(release) == 0
    before = signed(release)
    assert main(["card", str(release), "--card-template", "short", "-q"]) == 0
    assert {n for n, s in signed(release).items() if before[n] != s} == {"README.md"}
    assert sha256sum(release) == 0
    assert main(["verify", str(release)]) == 0


@pytest.mark.parametrize("low_disk", [[], ["--low-disk"]], ids=["kept", "low disk"])
def test_what_is_on_the_hub_is_signed_off_as_it_is_there(
    low_disk: list[str], on_hub: LoopbackHub, pair: Path
) -> None:
    """With sets of the Hub, and a shard that the Hub copies."""
    rows = {name: (pair / f"{name}.jsonl").read_bytes() for name in ("retain", "heldout")}
    files = {f"{name}.jsonl": content for name, content in rows.items()}
    on_hub.add_repo("locuslab/TOFU", files, "dataset")
    shard = sorted((pair / "base").glob("*.safetensors"))[0]
    on_hub.add_commit("org/unlearned", {shard.name: shard.read_bytes()})
    words = ["push", "org/base", "org/unlearned", "--gain", "1", "-q", *low_disk]
    words += ["--retain", "hf://datasets/locuslab/TOFU/retain.jsonl"]
    words += ["--heldout", "hf://datasets/locuslab/TOFU/heldout.jsonl"]
    assert main(words) == 0
    fetched = Path("fetched")
    for name, content in on_hub.files("org/unlearned-sage").items():
        (fetched / name).parent.mkdir(parents=True, exist_ok=True)
        (fetched / name).write_bytes(content)
    assert shard.name in signed(fetched)
    assert signed(fetched).keys() == all_files(fetched) - {".gitattributes"}
    assert sha256sum(fetched) == 0
    assert main(["verify", "org/unlearned-sage"]) == 0


def test_what_the_manifest_does_not_cover_is_verified_too(
    release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def differences() -> list[str]:
        capsys.readouterr()
        status = main(["verify", str(release), "--json"])
        found: list[str] = json.loads(capsys.readouterr().out)["differences"]
        assert status == (27 if found else 0)
        return found

    for name in ("README.md", "sage/report.json"):
        whole = (release / name).read_bytes()
        (release / name).write_bytes(whole + b" ")
        (one,) = differences()
        assert one.startswith(f"{name} has the SHA-256 ")
        assert one.endswith(" in SHA256SUMS")
        (release / name).unlink()
        assert differences() == [f"{name} is missing"]
        (release / name).write_bytes(whole)
    sums = (release / SUMS).read_text()
    (release / SUMS).write_text("".join(x for x in sums.splitlines(True) if "README" not in x))
    assert differences() == ["README.md is not in SHA256SUMS"]
    for garbage in ("", "no sum\n", "\x00", sums[:-10]):
        (release / SUMS).write_text(garbage)
        assert differences() != []
    (release / SUMS).write_bytes(b"\xff\xfe")
    assert differences() == ["SHA256SUMS is not what sha256sum reads"]


def test_a_release_made_before_there_were_sums_is_verified_and_that_is_said(
    release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (release / SUMS).unlink()
    assert main(["verify", str(release)]) == 0
    out = capsys.readouterr().out
    assert "not covered: README.md, " in out
    assert " (SHA256SUMS, which signs off card and report, is missing)" in out
    assert main(["verify", str(release), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["signed"] is False


def test_the_sums_of_a_source_stay_behind(release: Path, pair: Path) -> None:
    words = ["sanitize", str(pair / "base"), str(release), "--output", "again", *proxies(pair)]
    assert main([*words, "-q", "--carry", SUMS]) == 2
    assert main([*words, "-q"]) == 0
    assert sha256sum(Path("again")) == 0


NAMES = st.text(st.characters(exclude_characters="/\x00", exclude_categories=["Cs"]), min_size=1)


@given(names=st.sets(NAMES.filter(lambda n: n not in (".", "..") and len(n) < 60), max_size=4))
def test_sums_are_read_as_they_were_written(
    names: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("sums")
    (folder / "README.md").write_text("card")
    files = {name: f"{number:064x}" for number, name in enumerate(names - {SUMS, "README.md"})}
    write_sums(folder, {"files": files})
    found = signed(folder)
    assert found.pop("README.md")
    assert found == files


def test_odd_names_are_written_as_sha256sum_writes_them(tmp_path: Path) -> None:
    names = ["a b", "back\\slash", "two\nlines", "re\rturn", " *lead", "ünï"]
    for name in names:
        (tmp_path / name).write_text(name)
    words = ["sha256sum", "--", *sorted(names)]
    ours = subprocess.run(words, cwd=tmp_path, capture_output=True, check=True).stdout.decode()
    write_sums(tmp_path, {"files": read_sums(ours)})
    assert (tmp_path / SUMS).read_bytes().decode() == ours
