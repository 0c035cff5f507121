"""The dominant directions of second moments, exact, of few vectors, or sketched. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sage_hub.method.moments import Moment, SketchedMoment

NOISE = 8 * torch.finfo(torch.float32).eps  # of the largest eigenvalue: what moments are summed to
# Subspace iteration, where few directions are wanted: so many vectors for each, features for each
# at least, and turns at most; and what may be left of a direction, in parts of the largest value.
WIDTH, WIDER, TURNS, STANDS = 3, 8, 40, 1e-8


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
    elif (few := moment.vectors) is not None:
        values, vectors, trace = _of_few(in_float64(few))
    else:
        values, vectors, trace = _of_many(in_float64(moment.matrix()), rank)
    # What rounding left in a direction that no input took is no energy.
    noise = NOISE * values[0]
    values = torch.where(values > noise, values, 0.0)
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


def _of_few(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues, falling, eigenvectors (in, n) and trace of the second moment of x (n, in).

    By the Gram matrix of the vectors: X Xᵀ = U S Uᵀ gives the directions Xᵀ U S^{-½}.
    """
    squares, turn = torch.linalg.eigh(x @ x.T)
    squares, turn = squares.flip(0), turn.flip(1)
    known = max(1, int((squares > NOISE * squares[0]).sum()))
    squares, turn = squares[:known], turn[:, :known]
    values = (squares / len(x)).cpu()
    if not float(values[0]) > 0:  # all vectors are zero: any direction is as good
        return values[:1], torch.eye(x.shape[1], 1, dtype=x.dtype), 0.0
    return values, x.T @ (turn / squares.sqrt()), float(values.sum())


def _of_many(c: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues, falling, eigenvectors (in, k) and trace of c (in, in): all, or `rank` of them.

    In float64: no slower than float32 on a CPU, and the small eigenvalues are right.
    """
    if rank is not None and WIDER * rank <= len(c) and (found := _dominant(c, rank)) is not None:
        return *found, float(c.diagonal().sum())
    values, vectors = torch.linalg.eigh(c)
    values = values.flip(0).cpu()
    return (
        values,
        vectors.flip(1),
        float(torch.where(values > NOISE * values[0], values, 0.0).sum()),
    )


def _dominant(c: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """The `rank` largest eigenvalues of c (in, in) and their vectors, by subspace iteration.

    A few vectors for each that is wanted, turned by c until those stand still, ‖c v − s v‖ ≈ 0.
    None where that takes too long.
    """
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(len(c), WIDTH * rank, generator=generator).to(c)
    for _ in range(TURNS):
        some = torch.linalg.qr(some).Q
        image = c @ some
        values, turn = torch.linalg.eigh(some.T @ image)
        values, turn = values.flip(0)[:rank], turn.flip(1)[:, :rank]
        vectors = some @ turn
        left = torch.linalg.vector_norm(image @ turn - vectors * values, dim=0)
        if float(left.max()) <= STANDS * float(values[0]):
            return values.cpu(), vectors
        some = image
    return None


def in_float64(tensor: Tensor) -> Tensor:
    """`tensor` to be decomposed: on the CPU, unless it is on a GPU that has numbers so long."""
    return (tensor if tensor.is_cuda else tensor.cpu()).double()


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
