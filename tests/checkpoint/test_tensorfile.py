"""One safetensors file: what we write everyone reads, and what is broken is refused by name."""

from __future__ import annotations

import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from support.loopback_hub import LoopbackHub
from torch import Tensor

from sage_hub.checkpoint.hubfiles import HubFiles
from sage_hub.checkpoint.tensorfile import (
    DTYPES,
    Header,
    TensorReader,
    check_header,
    dtype_name,
    file_sha256,
    layout,
    raw_bytes,
    read_header,
)
from sage_hub.checkpoint.tensorwriter import TensorWriter
from sage_hub.errors import CorruptCheckpointError, SageHubError

A = torch.arange(6, dtype=torch.float32).reshape(2, 3)
B = torch.tensor([True, False, True])


def infos_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return layout((n, dtype_name(t.dtype), tuple(t.shape)) for n, t in tensors.items())


def write_file(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> str:
    """Write `tensors` with our writer and return the SHA-256 that it took."""
    return write_as_declared(path, tensors, list(tensors.items()), metadata)


def write_as_declared(
    path: Path,
    declared: dict[str, Tensor],
    written: list[tuple[str, Tensor]],
    metadata: dict[str, str] | None = None,
    error: BaseException | None = None,
) -> str:
    """Declare some tensors in the header, write others, and raise `error` if there is one."""
    with TensorWriter(path, infos_of(declared), metadata or {"format": "pt"}) as writer:
        for name, tensor in written:
            writer.write(name, tensor)
        if error is not None:
            raise error
    return writer.sha256


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with any header at all: `bytes` as they are, everything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def field(
    start: int, stop: int, dtype: str = "U8", shape: list[int] | None = None
) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [stop - start] if shape is None else shape,
        "data_offsets": [start, stop],
    }


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A tensor of any type and shape (0-d and empty too) with any bits, NaNs of all kinds too."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    data = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if not data:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool:
        data = bytearray(byte & 1 for byte in data)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)
dictionaries = st.dictionaries(names, tensors(), max_size=5)


def identical(one: Tensor, other: Tensor) -> bool:
    return (
        one.dtype == other.dtype and one.shape == other.shape and raw_bytes(one) == raw_bytes(other)
    )


# Writing


@given(content=dictionaries)
def test_what_is_written_is_read_back_by_us_and_by_safetensors(
    content: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    write_file(path, content)
    theirs = load_file(path)
    assert theirs.keys() == content.keys()
    with TensorReader(path) as reader:
        assert list(reader.header.tensors.values()) == list(infos_of(content).values())
        for name, tensor in content.items():
            assert identical(reader.read(name), tensor)
            assert identical(theirs[name], tensor)


@given(content=dictionaries)
def test_what_safetensors_writes_is_read_back(
    content: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("theirs") / "model.safetensors"
    save_file(content, path, metadata={"format": "pt"})
    with TensorReader(path) as reader:
        assert reader.header.metadata == {"format": "pt"}
        assert reader.header.tensors.keys() == content.keys()
        assert all(identical(reader.read(name), tensor) for name, tensor in content.items())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_type_survives(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = {
        "matrix": torch.tensor([[0, 1, 2], [1, 0, 3]]).to(dtype),
        "scalar": torch.tensor(1, dtype=dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
    }
    write_file(path, content)
    theirs = load_file(path)
    assert all(identical(theirs[name], tensor) for name, tensor in content.items())


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_file(path, {"transposed": A.T, "column": A[:, 1], "expanded": A[:1].expand(3, 3)})
    theirs = load_file(path)
    assert torch.equal(theirs["transposed"], A.T)
    assert torch.equal(theirs["column"], A[:, 1])
    assert torch.equal(theirs["expanded"], A[:1].expand(3, 3))


def test_a_tensor_outlives_its_file_and_is_writable(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_file(path, {"a": A})
    with TensorReader(path) as reader:
        tensor = reader.read("a")
    path.unlink()
    assert torch.equal(tensor.add_(1), A + 1)
    assert A[0, 0] == 0


def test_metadata_and_data_alignment(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for note in ("", "x", "é", "long" * 9):
        write_file(path, {"a": A}, {"format": "pt", "note": note})
        header = read_header(path)
        assert header.metadata == {"format": "pt", "note": note}
        assert header.data_start % 8 == 0
        assert path.stat().st_size == header.data_start + A.nbytes


def test_the_same_tensors_give_the_same_bytes_and_their_sha256(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    digests = {write_file(path, {"b": B, "a": A}) for path in (one, two)}
    assert one.read_bytes() == two.read_bytes()
    assert digests == {hashlib.sha256(one.read_bytes()).hexdigest()}
    assert digests == {file_sha256(one)}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_file_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(error):
        write_as_declared(path, {"a": A, "b": B}, [("a", A)], error=error())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_file_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_file(path, {"a": A})
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_as_declared(path, {"a": B}, [("a", B)], error=KeyboardInterrupt())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_has_no_name_before_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with TensorWriter(path, infos_of({"a": A}), {}) as writer:
        writer.write("a", A)
        assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "written",
    [
        [("b", B), ("a", A)],  # another order
        [("c", A)],  # another name
        [("a", A.T)],  # another shape
        [("a", A.flatten())],
        [("a", A.half())],  # another type
        [("a", A.to(torch.complex64))],  # a type that the format does not have
        [("a", A)],  # too few
        [("a", A), ("b", B), ("b", B)],  # too many
    ],
)
def test_only_the_declared_tensors_in_their_order_make_a_file(
    written: list[tuple[str, Tensor]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - each case has words of its own
        write_as_declared(tmp_path / "model.safetensors", {"a": A, "b": B}, written)
    assert list(tmp_path.iterdir()) == []


# Reading what is broken

WHOLE = save({"a": A, "b": B, "empty": torch.empty(0, 2)}, metadata={"format": "pt"})
HEADER_END = 8 + int.from_bytes(WHOLE[:8], "little")


def tiles(header: Header, size: int) -> bool:
    """Whether the tensors cover all bytes of the file behind the header, each byte once."""
    end = header.data_start
    for info in header.tensors.values():
        if header.data_start + info.start != end:
            return False
        end = header.data_start + info.stop
    return end == size


@given(cut=st.integers(0, len(WHOLE) - 1))
def test_a_truncated_file_is_refused(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.safetensors"
    path.write_bytes(WHOLE[:cut])
    with pytest.raises(CorruptCheckpointError, match=path.name):
        read_header(path)


@given(tail=st.binary(min_size=1, max_size=9))
def test_a_file_with_bytes_behind_its_tensors_is_refused(
    tail: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "longer.safetensors"
    path.write_bytes(WHOLE + tail)
    with pytest.raises(CorruptCheckpointError, match=path.name):
        read_header(path)


@given(flips=st.lists(st.integers(0, HEADER_END * 8 - 1), min_size=1, max_size=3, unique=True))
def test_a_damaged_header_is_refused_or_still_tiles_the_file(
    flips: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(WHOLE)
    for bit in flips:
        damaged[bit // 8] ^= 1 << bit % 8
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(damaged)
    try:
        header = read_header(path)
    except CorruptCheckpointError:
        return
    assert tiles(header, len(damaged))


@pytest.mark.parametrize(
    "header, size",
    [
        ({"a": field(0, 8), "b": field(4, 12)}, 12),  # overlap
        ({"a": field(0, 8), "b": field(0, 8)}, 8),  # the same bytes twice
        ({"a": field(0, 4), "b": field(8, 12)}, 12),  # a hole
        ({"a": field(4, 8)}, 8),  # a hole at the start
        ({"a": field(0, 8)}, 4),  # beyond the end of the file
        ({"a": field(8, 0)}, 8),  # backwards
        ({"a": field(-8, 0, shape=[8])}, 8),
        ({"a": field(0, 8, shape=[-8])}, 8),
        ({"a": field(0, 8, shape=[-2, -4])}, 8),
        ({"a": field(0, 8, shape=[4])}, 8),
        ({"a": field(0, 8, dtype="F32", shape=[8])}, 8),
        ({"a": field(0, 0, dtype="F32", shape=[2**62, 4])}, 0),  # 0 bytes modulo 2^64
        ({"a": field(0, 2**63)}, 8),
        ({"a": field(0, 10**30)}, 8),
        ({"a": field(0, 8, dtype="X9")}, 8),
        ({"a": {"dtype": "U8", "shape": [8]}}, 8),
        ({"a": {"dtype": "U8", "shape": [8.0], "data_offsets": [0, 8]}}, 8),
        ({"a": {"dtype": "U8", "shape": 8, "data_offsets": [0, 8]}}, 8),
        ({"a": ["U8", [8], [0, 8]]}, 8),  # a sequence where the format has an object
        ({"a": None}, 0),
        ({"__metadata__": {"format": 1}}, 0),
        ([], 0),
        (1, 0),
        (None, 0),
    ],
)
def test_an_impossible_header_is_refused(header: object, size: int, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors"):
        TensorReader(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x02",
        (2).to_bytes(8, "little"),
        (2**63).to_bytes(8, "little") + b"{}",
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        (3).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{]",
        (1).to_bytes(8, "little") + b"\xff",
        b"PK\x03\x04 this is a zip of pickles",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
)
def test_what_is_not_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors"):
        read_header(path)


def test_a_name_given_twice_for_different_bytes_is_refused(tmp_path: Path) -> None:
    first, second = json.dumps(field(0, 8)), json.dumps(field(8, 16))
    path = write_raw(tmp_path / "f", f'{{"a":{first},"a":{second}}}'.encode(), bytes(16))
    with pytest.raises(CorruptCheckpointError):
        read_header(path)


def test_empty_metadata_is_no_reason_to_crash(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "f", {"__metadata__": None, "a": field(0, 8)}, bytes(8))
    load_file(path)  # safetensors takes it
    assert read_header(path).metadata == {}


def test_a_header_nested_without_end_is_refused(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "f", b'{"a":' + b"[" * 100_000)
    with pytest.raises(CorruptCheckpointError):
        read_header(path)


def test_a_folder_or_nothing_in_place_of_the_file_is_explained(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(SageHubError, match=path.name):
            read_header(path)


def test_a_type_without_arithmetic_is_read_from_the_header_and_refused_as_a_tensor(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"scaled": torch.zeros(4, dtype=torch.float8_e8m0fnu), "z": A}, path)
    with TensorReader(path) as reader:
        assert reader.header.tensors["scaled"].shape == (4,)
        with pytest.raises(CorruptCheckpointError, match="F8_E8M0"):
            reader.read("scaled")
        assert torch.equal(reader.read("z"), A)


def test_a_file_cut_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_file(path, {"a": A, "b": B})
    with TensorReader(path) as reader:
        with path.open("r+b") as file:
            file.truncate(reader.header.data_start + A.nbytes + 1)
        assert torch.equal(reader.read("a"), A)
        with pytest.raises(CorruptCheckpointError, match="'b'"):
            reader.read("b")


# Headers that come from the Hub, without the strict parser

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
near_fields = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F8_E4M3"]) | json_values,
        "shape": st.lists(st.integers(-1, 4) | json_values, max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 32) | json_values, max_size=3) | json_values,
    }
)


@given(st.dictionaries(st.text(max_size=3), near_fields | json_values, max_size=3))
@example({"a": {"dtype": "F32", "shape": [math.inf], "data_offsets": [0, 0]}})
@example({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, math.inf]}})
def test_any_fields_are_a_header_that_tiles_or_refused(fields: dict[str, Any]) -> None:
    try:
        header = check_header(fields, {}, 0, "a shard")
    except CorruptCheckpointError:
        return
    assert header.tensors.keys() == fields.keys()
    assert tiles(header, sum(info.nbytes for info in header.tensors.values()))


def hub_header(hub: LoopbackHub, header: object) -> Header:
    """The header of a file with 8 bytes of data, read by range from the Hub."""
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(8)
    hub.add_repo("org/model", {"model.safetensors": content})
    return HubFiles("org/model", None).header("model.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": None},
        {"a": {**field(0, 8), "shape": None}},
        {"a": {**field(0, 8), "shape": [math.inf]}},
        {"a": {**field(0, 8), "data_offsets": None}},
        {"a": {**field(0, 8), "data_offsets": [0]}},
        {"a": field(4, 8)},
    ],
)
def test_an_impossible_header_on_the_hub_is_refused(header: object, hub: LoopbackHub) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors in org/model"):
        hub_header(hub, header)


def test_empty_metadata_on_the_hub_is_no_reason_to_crash(hub: LoopbackHub) -> None:
    header = hub_header(hub, {"__metadata__": None, "a": field(0, 8)})
    assert header.metadata == {}
    assert header.tensors.keys() == {"a"}


def test_the_bytes_of_an_empty_tensor_can_be_read_into() -> None:
    """As a journal reads what it has, which of a damaged one may be nothing."""
    assert io.BytesIO(b"more").readinto(raw_bytes(torch.empty(0, 3))) == 0
