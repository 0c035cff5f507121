"""Second moments of a stream of activations. Pure: no model, no files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

# A second moment is summed in strips of rows: few enough, and high enough, for products to be fast.
STRIPS, LOWEST_STRIP = 8, 64
CHUNK = 1024  # vectors that are multiplied at a time, however few come at a time


class _Summed:
    """A sum over vectors that come a few at a time, taken CHUNK of them at a time.

    Large products are faster than small ones, and for each new shape of one oneDNN compiles code
    and keeps it, which for batches of hundreds of lengths is slow and takes a gigabyte.
    """

    def __init__(self, total: Tensor) -> None:
        self._total = total
        self._waiting: Tensor | None = None
        self._count = 0  # of vectors that wait
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in `x` of shape (n, in)."""
        self.tokens += len(x)
        if self._waiting is None:
            self._waiting = x.new_empty(CHUNK, x.shape[1])
        while len(x):
            part, x = x[: CHUNK - self._count], x[CHUNK - self._count :]
            self._waiting[self._count : self._count + len(part)] = part
            self._count += len(part)
            if self._count == CHUNK:
                self._sum_up()

    @property
    def total(self) -> Tensor:
        """The sum over all vectors."""
        if self._count:
            self._sum_up()
        return self._total

    def _sum_up(self) -> None:
        assert self._waiting is not None
        self._take(self._waiting[: self._count])
        self._count = 0

    def _take(self, x: Tensor) -> None:
        raise NotImplementedError


class SecondMoment(_Summed):
    """The uncentred second moment `C = (1/n) Σ_t x_t x_tᵀ` of vectors x_t ∈ R^in, as they come.

    Summed in `dtype` whatever the type of the activations, so that their order matters to
    rounding only. C is symmetric, so only strips up to its diagonal are summed. Nothing is, as
    long as the vectors are fewer than their features: they take less room than C, and decomposing
    their Gram matrix less time.
    """

    def __init__(
        self,
        size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(torch.zeros(size, size, dtype=dtype, device=device))
        self._few: list[Tensor] | None = []

    def add(self, x: Tensor) -> None:
        """Take in `x` of shape (n, in)."""
        if self._few is None:
            super().add(x)
            return
        self._few.append(x.detach().clone())
        self.tokens += len(x)
        if self.tokens >= len(self._total):
            self._sum_few()

    @property
    def vectors(self) -> Tensor | None:
        """All of them, (n, in), as long as they are fewer than their features; else None."""
        return None if self._few is None else torch.cat(self._few)

    @property
    def total(self) -> Tensor:
        """n C, of which only the strips up to the diagonal are filled."""
        self._sum_few()
        return super().total

    def _sum_few(self) -> None:
        few, self._few = self._few, None
        for x in few or ():
            self.tokens -= len(x)  # they are counted as they are added
            super().add(x)

    def _take(self, x: Tensor) -> None:
        wide = x.to(self._total.dtype)
        with _products_as_exact_as(x):
            for start, stop in self._strips():
                self._total[start:stop, :stop].addmm_(wide[:, start:stop].T, wide[:, :stop])

    def _strips(self) -> list[tuple[int, int]]:
        """The rows that are summed together, each up to the last column of its strip's diagonal."""
        size = len(self._total)
        height = max(-(-size // STRIPS), LOWEST_STRIP)
        return [(start, min(start + height, size)) for start in range(0, size, height)]

    def matrix(self) -> Tensor:
        """`C`, shape (in, in). Raises ValueError before the first vector."""
        if self.tokens == 0:
            raise ValueError("a second moment of no tokens is undefined")
        lower = self.total.tril()
        return (lower + lower.tril(-1).T) / self.tokens


class SketchedMoment(_Summed):
    """A second moment C of which only C Ω is summed, Ω (in, ℓ) random, and tr C exactly.

    2 in ℓ numbers in place of in², and 4 in ℓ flops per vector in place of 2 in². Its spectrum is
    that of the Nyström approximation Ĉ = (C Ω)(Ωᵀ C Ω)⁺(C Ω)ᵀ ≼ C from one pass (Tropp, Yurtsever,
    Udell and Cevher 2017, arXiv 1706.05736), with the eigenvalues set right.
    """

    def __init__(
        self, size: int, width: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(size, min(width, size), generator=generator)
        # Rounded, so that a product with activations in bfloat16 is exact.
        self.test = torch.linalg.qr(random).Q.bfloat16().float().to(device)
        self.squares = 0.0
        super().__init__(torch.zeros_like(self.test))

    def add(self, x: Tensor) -> None:
        """Take in `x` of shape (n, in)."""
        super().add(x)
        norms = torch.linalg.vector_norm(x, dim=1, dtype=self._total.dtype)
        self.squares += float(norms.cpu().double().square().sum())

    def _take(self, x: Tensor) -> None:
        wide = x.to(self._total.dtype)
        with _products_as_exact_as(x):
            image = wide @ self.test
        self._total.addmm_(wide.T, image)


@contextmanager
def _products_as_exact_as(x: Tensor) -> Iterator[None]:
    """Within it float32 products on the CPU are those of numbers as short as those of `x`.

    Numbers in bfloat16 are multiplied exactly by units made for them, and summed in float32 as
    ever, where oneDNN has a kernel for it; on AVX-512 without AMX it takes that of float32.
    """
    library: Any = torch.backends.mkldnn
    backend = library.matmul
    fast = x.dtype == torch.bfloat16 and x.device.type == "cpu" and _has_bfloat16_units()
    before = backend.fp32_precision
    backend.fp32_precision = "bf16" if fast else before
    try:
        yield
    finally:
        backend.fp32_precision = before


@cache
def _has_bfloat16_units() -> bool:
    known: Any = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)
    return bool(known())


Moment = SecondMoment | SketchedMoment


def sketch_width(size: int, rank: int | None) -> int:
    """ℓ for `size` features: a quarter of them, or four times the rank if that is capped lower.

    On SmolLM2's activations the bias that is left then lies, in parts of the source's, within
    0.012 of what exact moments leave, at most sites within 0.005 (docs/scale.md).
    """
    return max(1, size // 4 if rank is None else min(size // 4, 4 * rank))
