"""Hostile checkpoints in a folder: each is read, or refused in one line, and nothing else happens.

Nothing else: no other exception, no hang, no file opened that lies outside the folder, no more
memory than the files have bytes.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from sage_hub.checkpoint import tensorfile
from sage_hub.checkpoint.files import open_files
from sage_hub.checkpoint.index import read_index
from sage_hub.checkpoint.layouts import INDEX, SINGLE
from sage_hub.cli.main import main
from sage_hub.errors import SageHubError

SECONDS = 10  # for one folder of a few kilobytes
SPARE_BYTES = 8 << 20  # for the block that is hashed and for Python itself

# The content of a folder: bytes are a file, text is the target of a link, a dict is a folder.
Tree = dict[str, Any]


def index(weight_map: object) -> bytes:
    return json.dumps({"weight_map": weight_map}).encode()


def weight_file(header: bytes, data: int) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(data)


ONE, TWO, PIPE, CONFIG = "1.safetensors", "2.safetensors", "pipe.safetensors", "config.json"
WHOLE = save({"a": torch.ones(2, 3), "b": torch.tensor([True]), "empty": torch.empty(0, 2)})
SHARDED: Tree = {ONE: save({"a": torch.ones(2)}), TWO: save({"b": torch.ones(3)})}
SHARDED |= {INDEX: index({"a": ONE, "b": TWO}), CONFIG: b'{"model_type": "llama"}'}
# What links and `..` could lead to: a folder beside the model.
SECRET: Tree = dict.fromkeys((SINGLE, ONE, TWO), save({"secret": torch.ones(5)}))
SECRET |= {INDEX: index({"secret": ONE}), CONFIG: b'{"secret": 1}', "tokenizer.json": b"secret"}


# What must hold

_opened: list[str] | None = None  # while it is a list, every file that is opened is noted in it


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and not isinstance(arguments[0], int):
        _opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(_note)  # it cannot be removed, hence the switch


@contextmanager
def watched(size: int) -> Iterator[list[str]]:
    """All files opened in the block; it fails after SECONDS, or with more memory than `size`."""
    global _opened
    safe_open = tensorfile.safe_open

    def audited(path: Any, *arguments: Any, **options: Any) -> Any:
        sys.audit("open", path, "r", 0)  # Rust opens files without telling Python
        return safe_open(path, *arguments, **options)

    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"no end after {SECONDS} s"))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    tracemalloc.start()
    _opened = opened = []
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tensorfile, "safe_open", audited)
            yield opened
        assert tracemalloc.get_traced_memory()[1] < size + SPARE_BYTES
    finally:
        _opened = None
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def read_all(folder: Path) -> set[str]:
    """Open the checkpoint and read all that is ever read of it; the names of its tensors."""
    checkpoint = read_index(open_files(str(folder)))
    for shard in checkpoint.shards:
        with checkpoint.open_shard(shard) as reader:
            for name, info in reader.header.tensors.items():
                tensor = reader.read(name)
                assert (tuple(tensor.shape), tensor.nbytes) == (info.shape, info.nbytes)
    assert isinstance(checkpoint.config, dict)
    checkpoint.fingerprint()
    checkpoint.tokenizer_fingerprint()
    return set(checkpoint.shard_of)


def explore(arena: Path, folder: Path, blobs: Path | None = None) -> set[str] | None:
    """`read_all`, or None if refused; of `arena` only `folder` and `blobs` may be opened."""
    names, refusal = None, ""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with watched(size) as opened:
        try:
            names = read_all(folder)
        except SageHubError as error:
            refusal = str(error)
    assert refusal.isprintable(), repr(refusal)  # one line, and no escapes for the terminal
    assert "Traceback" not in refusal
    allowed = [place.resolve() for place in (folder, blobs) if place is not None]
    for path in {Path(os.path.realpath(path)) for path in opened}:
        inside = any(path.is_relative_to(place) for place in allowed)
        assert inside or not path.is_relative_to(arena.resolve()), path
    return names


def plant(tree: Tree, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in tree.items():
        if isinstance(content, dict):
            plant(content, folder / name)
        elif isinstance(content, str):
            (folder / name).symlink_to(content)
        else:
            (folder / name).write_bytes(content)
    return folder


def explore_tree(tree: Tree) -> None:
    """`explore` a folder with that content and a pipe, beside one with secrets."""
    with tempfile.TemporaryDirectory() as arena:
        plant(SECRET, Path(arena, "secret"))
        folder = plant(tree, Path(arena, "model"))
        os.mkfifo(folder / PIPE)  # whoever opens it waits for ever
        explore(Path(arena), folder)


# What is drawn

texts = st.text(st.characters(), max_size=5)  # also controls and halves of surrogate pairs
sizes = st.sampled_from([0, 1, 2, 3] * 3 + [2**40, 2**63 - 1, 2**63, 2**64 - 1])
keys = st.sampled_from(["weight_map", "quantization_config", "quant_method", "a"]) | texts
values = st.recursive(
    st.none() | st.booleans() | sizes | st.integers() | st.just(10**400) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
documents = st.one_of(
    (values | st.dictionaries(keys, values)).map(json.dumps).map(str.encode),
    st.binary(max_size=20),
    st.sampled_from([50, 999, 99_999]).map(lambda depth: b'{"a":' * depth + b"1" + b"}" * depth),
    st.sampled_from([400, 5000]).map(lambda digits: b'{"a":%s}' % (b"9" * digits)),
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole` with bytes cut off, replaced, put in or added."""
    place, some = draw(st.integers(0, len(whole))), draw(st.binary(min_size=1, max_size=8))
    before, behind = whole[:place], whole[place:]
    ways = [before, before + some + behind[len(some) :], before + some + behind, whole + some]
    return draw(st.sampled_from(ways))


@st.composite
def weight_files(draw: st.DrawFn) -> bytes:
    """A file that is right but for up to two places in its header, and for the header's length."""
    fields: list[tuple[str, dict[str, Any]]] = []
    end = 0
    for name in draw(st.lists(st.sampled_from("abc") | texts, max_size=3)):  # one may come twice
        dtype, width = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("BOOL", 1), ("C64", 8)]))
        shape = draw(st.lists(sizes, max_size=3))
        start, end = end, end + math.prod(shape) * width
        fields.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}))
    for _ in range(draw(st.integers(0, 2)) if fields else 0):
        field = draw(st.sampled_from(fields))[1]
        key = draw(st.sampled_from([*field, "more"]))
        part = field.get(key)
        if isinstance(part, list) and part and draw(st.booleans()):
            part[draw(st.integers(0, len(part) - 1))] = draw(values)
        else:
            field[key] = draw(values)
    members = [f"{json.dumps(name)}:{json.dumps(field)}" for name, field in fields]
    if draw(st.booleans()):
        members.append(f'"__metadata__":{json.dumps(draw(values))}')
    whole = weight_file(f"{{{','.join(members)}}}".encode(), min(end, 200))
    lengths = st.sampled_from([0, 1, len(whole), 2**31, 2**63, 2**64 - 1])
    relabelled = lengths.map(lambda length: length.to_bytes(8, "little") + whole[8:])
    return draw(st.just(whole) | st.just(whole) | relabelled | damaged(whole))


NAMES = (SINGLE, ONE, TWO, INDEX, CONFIG, "tokenizer.json")
places = st.sampled_from([*NAMES, PIPE, "sub", ".", "..", "nothing"])
links = places | places.map("sub/{}".format) | places.map("../secret/{}".format)
elsewhere = links | links.map("/{}".format) | links.map(lambda link: link.replace("/", "\\"))
shards = st.sampled_from([ONE, TWO]) | elsewhere | values
indices = st.dictionaries(st.sampled_from("ab") | texts, shards, max_size=3).map(index)
files = st.sampled_from([b"", WHOLE, *SHARDED.values()]) | damaged(WHOLE)
entries = st.one_of(files, links, st.just({}))
trees = st.fixed_dictionaries(
    {
        ONE: st.sampled_from([SHARDED[ONE], WHOLE]) | entries,
        TWO: st.sampled_from([SHARDED[TWO], WHOLE]) | entries,
        INDEX: st.just(SHARDED[INDEX]) | indices | entries,
    },
    optional={
        SINGLE: entries,
        CONFIG: st.just(SHARDED[CONFIG]) | entries,
        "tokenizer.json": entries,
        "sub": links | st.dictionaries(st.sampled_from(NAMES), links | files, max_size=3),
    },
)


# The tests

BROKEN_LINE = weight_file(b'{"a":{"dtype":"\\n","shape":[1],"data_offsets":[0,1]}}', 1)
WIDE_NOTHING = weight_file(b'{"a":{"dtype":"U8","shape":[0,%d],"data_offsets":[0,0]}}' % 2**63, 0)
TERABYTE = weight_file(
    b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (2**40, 2**40), 9
)
QUANTIZED = b'{"quantization_config": {"quant_method": "\\n"}}'


@given(weight_files() | documents.map(lambda header: weight_file(header, 0)) | damaged(WHOLE))
@example(BROKEN_LINE)
@example(WIDE_NOTHING)
def test_any_weight_file(content: bytes) -> None:
    explore_tree({SINGLE: content, CONFIG: SHARDED[CONFIG]})


@given(documents | indices | damaged(SHARDED[INDEX]))
def test_any_index(content: bytes) -> None:
    explore_tree(SHARDED | {INDEX: content})


@given(documents | damaged(SHARDED[CONFIG]))
@example(QUANTIZED)
def test_any_config(content: bytes) -> None:
    explore_tree(SHARDED | {CONFIG: content})


@given(trees)
@example({"\n.bin": b""})
def test_any_folder(tree: Tree) -> None:
    explore_tree(tree)


@pytest.mark.parametrize("name", [ONE, INDEX, CONFIG, "tokenizer.json"])
@pytest.mark.parametrize("target", ["../secret/{}", "sub/{}", "{arena}/secret/{}"])
def test_a_link_out_of_the_folder_is_not_followed(target: str, name: str, tmp_path: Path) -> None:
    plant(SECRET, tmp_path / "secret")
    links = {name: target.format(name, arena=tmp_path), "sub": "../secret"}
    explore(tmp_path, plant(SHARDED | links, tmp_path / "model"))


def test_links_within_the_folder_and_to_it_are_followed(tmp_path: Path) -> None:
    links = {ONE: f"store/{ONE}", TWO: "alias", "alias": f"store/{TWO}"}
    plant(SHARDED | links | {"store": SHARDED}, tmp_path / "model")
    (tmp_path / "latest").symlink_to("model")
    assert explore(tmp_path, tmp_path / "latest") == {"a", "b"}


@pytest.mark.parametrize("target, names", [("blobs", {"a", "b"}), ("secret", None)])
def test_a_snapshot_of_the_hub_cache_is_read_with_its_blobs(
    target: str, names: set[str] | None, tmp_path: Path
) -> None:
    repo = tmp_path / "models--org--name"
    plant(SHARDED, repo / target)
    links = {name: f"../../{target}/{name}" for name in SHARDED}
    assert explore(tmp_path, plant(links, repo / "snapshots" / "1"), repo / "blobs") == names


@pytest.mark.parametrize(
    "tree",
    [
        *({SINGLE: content} for content in (BROKEN_LINE, WIDE_NOTHING, TERABYTE, b"", {}, SINGLE)),
        *({name: f"../secret/{name}"} for name in (SINGLE, ONE, INDEX, CONFIG)),
        *({INDEX: index({"a": shard})} for shard in (f"../secret/{ONE}", f"..\\{ONE}", 1, PIPE)),
        *({CONFIG: content} for content in (QUANTIZED, b'{"a":' * 99_999, b"\xff")),
        {ONE: WHOLE, TWO: WHOLE},
    ],
    ids=lambda tree: ascii(tree)[:60],
)
def test_the_command_refuses_in_one_line(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(SECRET, tmp_path / "secret")
    model = plant(SHARDED | tree, tmp_path / "model")
    assert main(["sanitize", str(model), str(model), "--output", str(tmp_path / "out"), "-q"]) != 0
    error = capsys.readouterr().err
    assert error.startswith("sage-hub: error: ")
    assert error.endswith("\n")
    assert error[:-1].isprintable(), error
    assert "Internal error" not in error
    assert "secret" not in error.replace(f"../secret/{ONE}", "")
    assert not (tmp_path / "out").exists()


def test_a_release_holds_no_file_from_outside_its_sources(pair: Path) -> None:
    (pair / "secret.txt").write_text("secret")
    (pair / "unlearned" / "notes.txt").symlink_to("../secret.txt")
    sources = [str(pair / "base"), str(pair / "unlearned"), "--retain", str(pair / "retain.jsonl")]
    main(["sanitize", *sources, "--output", str(pair / "out"), "--quiet"])
    assert not (pair / "out" / "notes.txt").exists()
