"""Second moments of a stream of activations, and their spectra. Pure: no model, no files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    rounding only. C is symmetric, so only strips up to its diagonal are summed.
    """

    def __init__(
        self,
        size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(torch.zeros(size, size, dtype=dtype, device=device))

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


@dataclass(frozen=True)
class Spectrum:
    """The dominant part of a second moment.

    `basis` (k, in) holds orthonormal directions as rows, `values` (k,) their eigenvalues in
    falling order, `trace` is tr C over *all* directions, so the energy outside the basis is known
    exactly even though its directions are not.
    """

    basis: Tensor
    values: Tensor
    trace: float
    tokens: int
    missed: float | None = None  # by a sketch: the share of the trace that it did not see

    @property
    def size(self) -> int:
        """The number of input features, `in`."""
        return int(self.basis.shape[-1])

    @property
    def rank(self) -> int:
        """The number of directions held, k."""
        return int(self.basis.shape[0])

    @property
    def mean_eigenvalue(self) -> float:
        """`s̄ = tr C / in`, the scale that makes λ comparable between sites."""
        return self.trace / self.size

    @property
    def tail(self) -> float:
        """The mean eigenvalue outside the basis: the rest of the trace over the other directions.

        Where a bias needs the tail, it is taken as isotropic with this eigenvalue.
        """
        outside = self.size - self.rank
        if outside == 0:
            return 0.0
        return max(self.trace - float(self.values.sum()), 0.0) / outside

    def rank_for(self, energy: float) -> int:
        """The smallest k whose first k values hold `energy` of the trace (all of them at most)."""
        return dominant_rank(self.values, self.trace, energy)


def dominant_rank(values: Tensor, trace: float, energy: float) -> int:
    """The smallest k with `Σ_{i≤k} s_i ≥ energy · trace`, at least 1, at most len(values).

    `values` (m,) in falling order; `energy` in (0, 1].
    """
    if energy >= 1:
        return len(values)
    held = torch.cumsum(values.double(), 0)
    # A hair below the target counts as reached, or rounding would cost a direction.
    k = int(torch.searchsorted(held, energy * trace * (1 - 1e-12))) + 1
    return min(max(k, 1), len(values))


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


def spectrum(moment: Moment, energy: float, rank: int | None = None) -> Spectrum:
    """The directions of `moment` that hold `energy` of its trace, `rank` of them at most.

    Raises ValueError before the first vector.
    """
    if moment.tokens == 0:
        raise ValueError("a second moment of no tokens is undefined")
    missed: float | None = None
    if isinstance(moment, SketchedMoment):
        values, vectors, missed = _nystrom(moment)
        trace = moment.squares / moment.tokens
    else:
        # In float64: no slower than float32 on a CPU, and the small eigenvalues are right.
        values, vectors = torch.linalg.eigh(in_float64(moment.matrix()))
        values, vectors = values.flip(0).cpu(), vectors.flip(1)
    # What rounding left in a direction that no input took is no energy.
    noise = 8 * torch.finfo(moment.total.dtype).eps * values[0]
    values = torch.where(values > noise, values, 0.0)
    if isinstance(moment, SecondMoment):
        trace = float(values.sum())
    k = dominant_rank(values, trace, energy)
    if rank is not None:
        k = min(k, rank)
    return Spectrum(
        basis=vectors[:, :k].T.float().contiguous().cpu(),
        values=values[:k].contiguous(),
        trace=trace,
        tokens=moment.tokens,
        missed=missed,
    )


def in_float64(tensor: Tensor) -> Tensor:
    """`tensor` to be decomposed: on the CPU, unless it is on a GPU that has numbers so long."""
    return (tensor if tensor.is_cuda else tensor.cpu()).double()


def sketch_width(size: int, rank: int | None) -> int:
    """ℓ for `size` features: a quarter of them, or four times the rank if that is capped lower.

    On SmolLM2's activations the bias that is left then lies, in parts of the source's, within
    0.012 of what exact moments leave, at most sites within 0.005 (docs/scale.md).
    """
    return max(1, size // 4 if rank is None else min(size // 4, 4 * rank))


def _nystrom(moment: SketchedMoment) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues (k,), falling, eigenvectors (in, k), and the share of tr C that Ĉ lacks; k ≤ ℓ.

    Ĉ has too little in every direction: in expectation s²/(s + κ) of an eigenvalue s, where ℓ κ is
    what it lacks in all, which is known (from Dereziński, Liang, Liao and Mahoney 2020, arXiv
    2006.10653). Solved for s.
    """
    test = in_float64(moment.test)
    image = in_float64(moment.total) / moment.tokens
    trace = moment.squares / moment.tokens
    # Shifted, so that the core is safely positive; the shift is taken off in the end.
    shift = torch.finfo(moment.total.dtype).eps * trace or 1.0
    image += shift * test
    core = test.T @ image
    lower = torch.linalg.cholesky((core + core.T) / 2)
    half = torch.linalg.solve_triangular(lower, image.T, upper=False)
    # Its singular values and vectors, by its Gram matrix, which is several times faster.
    squares, turn = torch.linalg.eigh(half @ half.T)
    squares, turn = squares.flip(0), turn.flip(1)
    known = max(1, int((squares > 8 * torch.finfo(moment.total.dtype).eps * squares[0]).sum()))
    squares, turn = squares[:known], turn[:, :known]
    vectors = half.T @ (turn / squares.sqrt())
    found = (squares - shift).clamp(min=0)
    lacking = max(trace - float(found.sum()), 0.0)
    width = moment.test.shape[1]
    values = (found + (found**2 + 4 * lacking / width * found).sqrt()) / 2
    return values.cpu(), vectors, lacking / trace if trace else 0.0
