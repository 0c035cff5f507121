"""Blocks of rows: what is in memory at a time, whatever the size of a tensor."""

from __future__ import annotations

import pytest

from sage_hub.checkpoint.architecture import Linear
from sage_hub.checkpoint.tensorfile import TensorInfo
from sage_hub.repair import stream
from sage_hub.repair.plan import Operation, Piece


def operation(rows: int, columns: int, linear: Linear | None = None) -> Operation:
    info = TensorInfo("BF16", (rows, columns), 0, 2 * rows * columns)
    half = rows // 2
    pieces = (
        (Piece(0, rows, "w", 0, linear),)
        if linear
        else (Piece(0, half, "w.0", 0, None), Piece(half, rows, "w.1", 0, None))
    )
    return Operation("w", "model.safetensors", info, pieces)


@pytest.mark.parametrize("rows, columns", [(256_000, 8_192), (7, 3), (5, 10_000_000)])
def test_a_block_is_small_and_no_row_is_lost(rows: int, columns: int) -> None:
    steps = list(stream._steps(operation(rows, columns)))
    reached = 0
    for piece, start, stop in steps:
        assert start == reached
        assert piece.start <= start < stop <= piece.stop
        assert stop - start == 1 or (stop - start) * columns <= stream.BLOCK
        reached = stop
    assert reached == rows


def test_a_map_stored_in_out_is_read_whole() -> None:
    conv = Linear("c_attn", 0, 4_000, 4_000, transposed=True)
    assert len(list(stream._steps(operation(4_000, 1_000, conv)))) == 1
