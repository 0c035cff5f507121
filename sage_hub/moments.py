"""Second moments of a stream of activations, and their spectra. Pure: no model, no files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class SecondMoment:
    """The uncentred second moment `C = (1/n) Σ_t x_t x_tᵀ` of vectors x_t ∈ R^in, as they come.

    Summed in `dtype` whatever the type of the activations, so that their order matters to
    rounding only.
    """

    def __init__(
        self,
        size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.total = torch.zeros(size, size, dtype=dtype, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in `x` of shape (n, in)."""
        x = x.to(self.total.dtype)
        self.total.addmm_(x.T, x)
        self.tokens += x.shape[0]

    def matrix(self) -> Tensor:
        """`C`, shape (in, in). Raises ValueError before the first vector."""
        if self.tokens == 0:
            raise ValueError("a second moment of no tokens is undefined")
        return self.total / self.tokens


class AxisMoment:
    """A second moment that is diagonal, or of which the diagonal is all that matters.

    Of one-hot inputs it holds how often each token occurs; an elementwise map y_i = w_i x_i knows
    no more of its inputs than E[x_i²].
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(size, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in `x` of shape (n, in)."""
        self.total += x.double().square().sum(0)
        self.tokens += x.shape[0]

    def add_one_hot(self, ids: Tensor) -> None:
        """Take in the one-hot vectors of `ids` (n,)."""
        self.total += torch.bincount(ids, minlength=len(self.total))
        self.tokens += len(ids)


@dataclass(frozen=True)
class Spectrum:
    """The dominant part of a second moment.

    `basis` (k, in) holds orthonormal directions as rows, `values` (k,) their eigenvalues in
    falling order, `trace` is tr C over *all* directions, so the energy outside the basis is known
    exactly even though its directions are not. Where C is diagonal the directions are axes, all
    of them, and `basis` (in,) holds their numbers.
    """

    basis: Tensor
    values: Tensor
    trace: float
    tokens: int

    @property
    def size(self) -> int:
        """The number of input features, `in`."""
        return int(self.basis.shape[-1])

    @property
    def rank(self) -> int:
        """The number of directions held, k."""
        return int(self.basis.shape[0])

    @property
    def diagonal(self) -> bool:
        """Whether the directions are axes."""
        return self.basis.ndim == 1

    def inside(self, first: int, count: int, g: Tensor) -> tuple[Spectrum, Tensor]:
        """This diagonal spectrum and its `g` on the inputs [first, first + count) alone."""
        here = (self.basis >= first) & (self.basis < first + count)
        part = Spectrum(self.basis[here] - first, self.values[here], self.trace, self.tokens)
        return part, g[here[: len(g)]]

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


def spectrum(moment: SecondMoment | AxisMoment, energy: float, rank: int | None = None) -> Spectrum:
    """The directions of `moment` that hold `energy` of its trace, `rank` of them at most.

    All axes of a diagonal one, as they take no memory to speak of.
    """
    if isinstance(moment, AxisMoment):
        values, order = (moment.total.cpu() / moment.tokens).sort(descending=True, stable=True)
        return Spectrum(order, values, float(values.sum()), moment.tokens)
    # In float64 on the CPU: no slower than float32 there, and the small eigenvalues are right.
    values, vectors = torch.linalg.eigh(moment.matrix().to("cpu", torch.float64))
    values, vectors = values.flip(0), vectors.flip(1)
    # What rounding left in a direction that no input took is no energy.
    noise = 8 * torch.finfo(moment.total.dtype).eps * values[0]
    values = torch.where(values > noise, values, 0.0)
    trace = float(values.sum())
    k = dominant_rank(values, trace, energy)
    if rank is not None:
        k = min(k, rank)
    return Spectrum(
        basis=vectors[:, :k].T.float().contiguous(),
        values=values[:k].contiguous(),
        trace=trace,
        tokens=moment.tokens,
    )
