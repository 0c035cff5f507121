"""What shapes have shown is found out once for a class and a config, and lost without harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.architectures import ARCHITECTURES, make_model

from sage_hub.model.blocks import cut
from sage_hub.model.sites import find_sites


@pytest.fixture(autouse=True)
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sage_hub.runtime.shelf.shelf", lambda kind: tmp_path / kind)
    return tmp_path / "shapes"


def about(model: Any) -> Any:
    blocks = cut(model)
    return find_sites(model), blocks.blocks, blocks.shared, blocks._returns, blocks._behind


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Mixtral", "Llava"])
def test_the_second_time_nothing_is_run(
    name: str, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name in ARCHITECTURES
    first = about(make_model(name))
    assert len([*shelf.iterdir()]) == 2

    def run(*_: Any) -> Any:
        raise AssertionError("was found out again")

    for place in ("blocks", "sites"):
        monkeypatch.setattr(f"sage_hub.model.{place}.shapes_alone", run)
    assert about(make_model(name)) == first
    other = make_model(name)
    other.config.get_text_config().vocab_size += 1  # another config
    with pytest.raises(AssertionError, match="again"):
        find_sites(other)


@pytest.mark.parametrize(
    "content", ["", "[1", "[]", '{"other": 1}', '{"found": "x"}', '{"found": 3}', "\x00"]
)
def test_what_cannot_be_read_is_found_out_again(content: str, shelf: Path) -> None:
    first = about(make_model("Llama"))
    for file in shelf.iterdir():
        file.write_text(content)
    assert about(make_model("Llama")) == first
    assert all('{"found"' in file.read_text() for file in shelf.iterdir())


def test_a_disk_that_cannot_be_written(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = about(make_model("Llama"))
    (shelf.parent / "file").write_text("no folder")
    nowhere = shelf.parent / "file" / "shapes"
    monkeypatch.setattr("sage_hub.runtime.shelf.shelf", lambda kind: nowhere)
    assert about(make_model("Llama")) == first
