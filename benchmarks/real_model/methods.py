"""SAGE's forms and its peers: from an update Δ and second moments to a repaired update D. Pure.

Shapes: Δ, D (out, in). A spectrum holds the directions u_i of a second moment as rows of its basis
(k, in), with eigenvalues s_i. Most methods are filters: they take a share g_i ∈ [0, 1] of Δ away
along each retained direction, D = Δ − (Δ U) diag(g) Uᵀ, and differ in how g depends on s alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sage_hub.method.sage import filter_update, profile, suppression
from sage_hub.method.spectra import Spectrum


@dataclass(frozen=True)
class Site:
    """What is known where a weight takes its input: second moments, and how deep it lies."""

    retain: Spectrum
    forget: Spectrum
    depth: float  # 0 at the first layer, 1 at the last
    name: str = ""
    # Each entry's Fisher information (out, in), on forget and on retain rows.
    fisher: Callable[[], tuple[Tensor, Tensor]] | None = None


Method = Callable[..., Tensor]  # (Δ, site, its own strength as keywords) -> D


def scaled(delta: Tensor, site: Site) -> Tensor:
    """Δ itself: with a gain below 1 the control αΔ, WiSE-FT (2109.01903)."""
    return delta


def lines(delta: Tensor, site: Site, *, shallow: float) -> Tensor:
    """LiNeS (2410.17146): the scale rises with depth, from `shallow` at the first layer to 1."""
    return delta * (shallow + (1 - shallow) * site.depth)


def dare(delta: Tensor, site: Site, *, drop: float) -> Tensor:
    """DARE (2311.03099): a share `drop` of the entries is zeroed at random, the rest rescaled."""
    seed = int.from_bytes(site.name.encode(), "little") % 2**31
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(delta.shape, generator=generator).to(delta.device) >= drop
    return delta * kept / (1 - drop)


def trimmed(delta: Tensor, site: Site, *, keep: float) -> Tensor:
    """Magnitude pruning, the trim of TIES (2306.01708): the largest share `keep` stays."""
    count = max(1, round(keep * delta.numel()))
    sizes = delta.abs().flatten()
    least = sizes.kthvalue(delta.numel() - count + 1).values
    return torch.where(delta.abs() >= least, delta, 0.0)


def low_rank(delta: Tensor, site: Site, *, rank: int) -> Tensor:
    """The best approximation of Δ of rank `rank`: its truncated singular value decomposition."""
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def sage(delta: Tensor, site: Site, *, strength: float, energy: float) -> Tensor:
    """SAGE as sage-hub has it: g = λs/(s̄ + λs) on the directions that hold `energy`."""
    return _filter(delta, site, suppression(site.retain, strength, energy))


def sage_to_bias(delta: Tensor, site: Site, *, kept: float, energy: float) -> Tensor:
    """SAGE with λ solved for each weight, so that a share `kept` of its retention bias stays."""
    strength = strength_for_bias(delta, site.retain, kept, energy)
    return _filter(delta, site, suppression(site.retain, strength, energy))


def strength_for_bias(delta: Tensor, spectrum: Spectrum, kept: float, energy: float) -> float:
    """The λ after which B(D) = kept · B(Δ); infinity where even the hard projection leaves more."""
    along = profile(delta, spectrum.basis)
    target = kept * along.bias(spectrum)

    def left(strength: float) -> float:
        return along.bias(spectrum, suppression(spectrum, strength, energy))

    if left(math.inf) >= target:
        return math.inf
    low, high = -12.0, 24.0  # of log λ
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if left(math.exp(middle)) > target else (low, middle)
    return math.exp((low + high) / 2)


def hard(delta: Tensor, site: Site, *, energy: float) -> Tensor:
    """GPM's projection (2103.09762): Δ(I − U_k U_kᵀ), k by cumulative energy. SAGE at λ = ∞."""
    return _filter(delta, site, suppression(site.retain, math.inf, energy))


def null_space(delta: Tensor, site: Site, *, threshold: float) -> Tensor:
    """AlphaEdit's (2410.02355): ΔP, P onto the eigenvectors whose eigenvalue is under a threshold.

    `threshold` in mean eigenvalues, so that it means the same at every site.
    """
    g = site.retain.values >= threshold * site.retain.mean_eigenvalue
    return _filter(delta, site, g.to(site.retain.values))


def per_parameter(delta: Tensor, site: Site, *, weight: float) -> Tensor:
    """PerTA (2601.22030): each entry of Δ by f/(f + w·r), f and r its diagonal Fisher information.

    Their abstract says what the shares weigh and by what; this form of it is from a public
    implementation of others (commonly w = 1), as the paper itself was not to be had.
    """
    assert site.fisher is not None
    forget, retain = (one.to(delta) for one in site.fisher())
    # Where neither set has a gradient, nothing is known, and nothing is changed.
    return delta * torch.nan_to_num(forget / (forget + weight * retain))


def sap(delta: Tensor, site: Site, *, alpha: float) -> Tensor:
    """SAP's complement (2403.08618): Δ(I − UΛUᵀ), Λ = αŝ/((α−1)ŝ + 1), ŝ = s/tr C."""
    share = site.retain.values / site.retain.trace
    return _filter(delta, site, alpha * share / ((alpha - 1) * share + 1))


def ridge(delta: Tensor, site: Site, *, strength: float) -> Tensor:
    """RAIN's ridge (2602.22538): Δ(I + λĈ_r)⁻¹, in its dual form Δ − ΔAᵀ(AAᵀ + s̄n/λ I)⁻¹A.

    A (n, in) holds the retained inputs as rows. SAGE without a cut, ρ = 1.
    """
    return _filter(delta, site, suppression(site.retain, strength))


def regmean(delta: Tensor, site: Site, *, weight: float) -> Tensor:
    """RegMean (2212.09849): ΔĈ_f(Ĉ_f + wĈ_r)⁻¹; w = 1 is its own form."""
    forget, retain = (normalized_moment(s).to(delta) for s in (site.forget, site.retain))
    return _solve_right(delta @ forget, forget + weight * retain)


def forget_anchored(delta: Tensor, site: Site, *, strength: float, anchor: float) -> Tensor:
    """SAGE held to Δ on forget inputs: Δ(I + μĈ_f)(I + μĈ_f + λĈ_r)⁻¹."""
    forget, retain = (normalized_moment(s).to(delta) for s in (site.forget, site.retain))
    held = torch.eye(len(forget), dtype=forget.dtype, device=forget.device) + anchor * forget
    return _solve_right(delta @ held, held + strength * retain)


def moment(spectrum: Spectrum) -> Tensor:
    """C (in, in); what lies outside of the basis is left out."""
    return (spectrum.basis.T * spectrum.values.to(spectrum.basis)) @ spectrum.basis


def normalized_moment(spectrum: Spectrum) -> Tensor:
    """Ĉ (in, in): C with mean eigenvalue 1."""
    return moment(spectrum) / spectrum.mean_eigenvalue


def bias(update: Tensor, spectrum: Spectrum) -> float:
    """B(D) = tr(D C Dᵀ), the mean of ‖Dx‖² over the tokens behind `spectrum`."""
    return profile(update, spectrum.basis).bias(spectrum)


METHODS: Mapping[str, Method] = {
    "scaled": scaled,
    "lines": lines,
    "dare": dare,
    "trimmed": trimmed,
    "low_rank": low_rank,
    "sage": sage,
    "sage_to_bias": sage_to_bias,
    "forget_anchored": forget_anchored,
    "hard": hard,
    "null_space": null_space,
    "per_parameter": per_parameter,
    "sap": sap,
    "ridge": ridge,
    "regmean": regmean,
}


def _filter(delta: Tensor, site: Site, g: Tensor) -> Tensor:
    return filter_update(delta, site.retain.basis.to(delta), g)


def _solve_right(left: Tensor, matrix: Tensor) -> Tensor:
    """left · matrix⁻¹, `matrix` symmetric and positive, up to what rounding makes singular."""
    shift = 10 * torch.finfo(matrix.dtype).eps * float(matrix.diagonal().sum())
    lower = torch.linalg.cholesky(matrix + shift * torch.eye(len(matrix)).to(matrix))
    return torch.cholesky_solve(left.T, lower).T
