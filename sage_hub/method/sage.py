"""The mathematics of SAGE: filter, profile, bias, gain. Pure functions on tensors.

SAGE (arXiv 2606.18309) was available to us as an abstract only. The objective here follows it; its
exact form, the normalisation of λ and the gain are ours.

For one linear map y = W x with update Δ = W_unlearned − W_base and the retain second moment C with
dominant part C_k = U_k diag(s) U_kᵀ and mean eigenvalue s̄:

    D* = argmin_D ‖D − Δ‖²_F + (λ/s̄) · tr(D C_k Dᵀ)
       = Δ − (Δ U_k) diag(g) U_kᵀ ,      g_i = λ s_i / (s̄ + λ s_i)

Shapes: Δ, D (out, in); `basis` (k, in), the columns of U_k as rows; g, s, p (k,).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sage_hub.method.spectra import Spectrum

MOST_SHARE = 32.0  # of the median weight's gain


def suppression(
    spectrum: Spectrum, strength: float, energy: float = 1.0, rank: int | None = None
) -> Tensor:
    """The share g_i ∈ [0, 1] of Δ that is removed along each dominant direction, shape (k,).

    `strength` is λ ≥ 0 (0 keeps Δ, infinity is the hard projection); k is the smallest rank that
    holds `energy` of the trace, `rank` at most.
    """
    k = spectrum.rank_for(energy)
    if rank is not None:
        k = min(k, rank)
    values = spectrum.values[:k]
    if math.isinf(strength):
        # A direction that no retained input takes is not protected, however large λ is.
        return (values > 0).to(values.dtype)
    weighted = strength * values
    # Divided through by λ s, which overflows harmlessly where λ is huge.
    return torch.where(weighted > 0, 1 / (1 + spectrum.mean_eigenvalue / weighted), 0.0)


def project(update: Tensor, basis: Tensor) -> Tensor:
    """Δ U, shape (out, k): what `update` (out, in) does along each direction of `basis`."""
    return update @ basis.to(update).T


def removed_part(delta: Tensor, basis: Tensor, g: Tensor, along: Tensor | None = None) -> Tensor:
    """Δ − D = (Δ U_k) diag(g) U_kᵀ, in the dtype of `delta`: 4·out·in·k flops.

    `along` is Δ U, if it is known already.
    """
    k, g = len(g), g.to(delta)
    weakened = (project(delta, basis[:k]) if along is None else along[:, :k]) * g
    return weakened @ basis[:k].to(delta)


def filter_update(delta: Tensor, basis: Tensor, g: Tensor) -> Tensor:
    """The sanitized update D = Δ − (Δ U_k) diag(g) U_kᵀ, before any gain."""
    return delta - removed_part(delta, basis, g)


def sanitize_weight(
    base: Tensor,
    unlearned: Tensor,
    basis: Tensor,
    g: Tensor,
    gain: float = 1.0,
    along: Tensor | None = None,
) -> Tensor:
    """W_b + γD, both weights (out, in) in the precision to compute in.

    `along` is Δ U, if it is known already. Written as W_u + (γ−1)Δ − γ(Δ−D), which for g = 0 and
    γ = 1 is the source to the last bit.
    """
    if gain == 1 and not g.any():
        return unlearned
    delta = unlearned - base
    result = removed_part(delta, basis, g, along)  # reused, because memory is what this waits for
    if gain == 1:
        return torch.sub(unlearned, result, out=result)
    return result.mul_(-gain).add_(delta, alpha=gain - 1).add_(unlearned)


@dataclass(frozen=True)
class Profile:
    """What an update does along each direction of a spectrum: p_i = ‖D u_i‖², and ‖D‖²_F.

    Enough to know the bias and the distance at any λ without touching the weights again.
    """

    along: Tensor  # (k,) float64
    norm: float  # ‖D‖²_F

    def bias(self, spectrum: Spectrum, g: Tensor | None = None) -> float:
        """B = tr(D C Dᵀ), the mean of ‖D x‖² over the tokens: after suppression `g`, if given.

        Exact inside the spectrum's basis; outside it the energy is taken as spread evenly.
        """
        inside = self.along * spectrum.values
        if g is not None:
            inside[: len(g)] *= (1 - g) ** 2
        outside = max(self.norm - float(self.along.sum()), 0.0)
        return float(inside.sum()) + spectrum.tail * outside

    def biases(self, spectrum: Spectrum, strengths: Sequence[float], k: int) -> Tensor:
        """The bias at each of `strengths`, where the first `k` directions are dominant."""
        values = spectrum.values
        weighted = torch.tensor(strengths, dtype=values.dtype)[:, None] * values[:k]
        left = values.repeat(len(strengths), 1)
        mean = spectrum.mean_eigenvalue
        left[:, :k] *= torch.where(weighted > 0, mean / (mean + weighted), 1.0) ** 2
        outside = max(self.norm - float(self.along.sum()), 0.0)
        return left @ self.along + spectrum.tail * outside

    def removed(self, g: Tensor) -> float:
        """‖D − Δ‖²_F after suppression `g`."""
        return float((self.along[: len(g)] * g**2).sum())


def profile(update: Tensor, basis: Tensor, along: Tensor | None = None) -> Profile:
    """The profile of `update` (out, in) along the directions of `basis` (k, in).

    `along` is Δ U, if it is known already.
    """
    if along is None:
        along = project(update, basis)
    return Profile(_squares(along, 0), float(_squares(update, 1).sum()))


def _squares(matrix: Tensor, dim: int) -> Tensor:
    """The sums of squares along `dim`, on the CPU in float64.

    Along one dimension in the type of `matrix`, which is exact to rounding and many times faster
    than to widen every number first.
    """
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=dim)
    return norms.cpu().double().square()


def matching_gain(source: float, filtered: float) -> float:
    """The γ for which the forgetting carrier keeps its size, Σ B_f(γD) = Σ B_f(Δ).

    `source` is Σ B_f(Δ), `filtered` Σ B_f(D), both over all filtered modules and on the forget
    proxy. B is quadratic, so γ = √(source / filtered). Raises ValueError if nothing is left of
    the carrier.
    """
    if filtered <= 0:
        raise ValueError("the filtered update does nothing on the forget proxy")
    return math.sqrt(source / filtered)


def gain_shares(forget: Sequence[float], retain: Sequence[float]) -> list[float]:
    """What part of the model's gain each weight gets: B_f(D)/B_r(D), the median weight's being 1.

    `forget` and `retain` are the biases of each D, without a gain. Of all gains γ_m with the same
    Σ γ_m B_f(D_m), which is how much the turned-up updates agree with the filtered ones on forget
    inputs, those in this proportion have the least retention bias Σ γ_m² B_r(D_m). A weight that
    hardly acts on retained inputs gets MOST_SHARE at most, one that does nothing at all 1.
    """
    worth = [
        (f / r if r > 0 else math.inf) if f > 0 or r > 0 else None
        for f, r in zip(forget, retain, strict=True)
    ]
    acting = sorted(one for one in worth if one is not None)
    typical = acting[len(acting) // 2] if acting else 0.0
    if not 0 < typical < math.inf:
        return [1.0] * len(worth)
    return [1.0 if one is None else min(one / typical, MOST_SHARE) for one in worth]


@dataclass(frozen=True)
class Gains:
    """The gain of each map: γ of the model, times the map's own share of it, 1 if not said."""

    model: float = 1.0
    shares: Mapping[str, float] = field(default_factory=dict)

    def of(self, module: str) -> float:
        """γ of the map `module`."""
        return self.model * self.shares.get(module, 1.0)


def relative(part: float | None, whole: float | None) -> float | None:
    """part / whole; None where either is unknown, or the whole is nothing."""
    return part / whole if part is not None and whole else None
