"""Directions found a short way are those of the full decomposition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sage_hub.method.moments import SecondMoment
from sage_hub.method.sage import suppression
from sage_hub.method.spectra import WIDER, Spectrum, spectrum


def inputs(tokens: int, size: int, decay: float, seed: int = 0) -> Tensor:
    """Vectors whose second moment falls off as i^−decay."""
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    scales = torch.arange(1, size + 1).float() ** (-decay / 2)
    return torch.randn(tokens, size, generator=generator) * scales @ turned


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, and vectors (in, in), in float64."""
    wide = x.double()
    values, vectors = torch.linalg.eigh(wide.T @ wide / len(x))
    return values.flip(0).clamp(min=0), vectors.flip(1)


def removed(found: Spectrum, strength: float, energy: float) -> Tensor:
    """U diag(g) Uᵀ: what the filter takes from an update's inputs, the one thing that matters."""
    g = suppression(found, strength, energy, None)
    basis = found.basis[: len(g)].double()
    return basis.T @ torch.diag(g.double()) @ basis


def taken_in(x: Tensor, step: int) -> SecondMoment:
    moment = SecondMoment(x.shape[1])
    for start in range(0, len(x), step):
        moment.add(x[start : start + step])
    return moment


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 70),
    size=st.integers(1, 60),
    decay=st.floats(0, 3),
    step=st.integers(1, 40),
    energy=st.sampled_from([0.5, 0.9, 0.99, 1.0]),
)
def test_few_vectors_or_many(
    tokens: int, size: int, decay: float, step: int, energy: float
) -> None:
    """However many there are, and however they come: fewer than features are never summed."""
    x = inputs(tokens, size, decay)
    moment = taken_in(x, step)
    assert (moment.vectors is not None) == (tokens < size)
    found = spectrum(moment, energy)
    values, vectors = exact(x)
    total = float(values.sum())
    assert found.trace == pytest.approx(total, rel=1e-5)
    assert torch.allclose(found.values, values[: found.rank], rtol=1e-4, atol=1e-6 * total)
    assert torch.allclose(found.basis @ found.basis.T, torch.eye(found.rank), atol=1e-5)
    assert float(found.values.sum()) >= energy * total * (1 - 1e-5)
    whole = Spectrum(vectors[:, : found.rank].T.float(), values[: found.rank], total, tokens)
    ours, theirs = removed(found, 10.0, energy), removed(whole, 10.0, energy)
    image = x.double() @ (ours - theirs)  # on what was seen; elsewhere directions are anybody's
    assert float(image.norm()) <= 1e-3 * float(x.double().norm())


def test_one_vector_more_than_there_is_room_for() -> None:
    """Kept as they are up to one less than the features, and the same when summed."""
    x = inputs(64, 64, 1.0)
    kept, summed = taken_in(x[:63], 7), taken_in(x, 7)
    assert kept.vectors is not None
    assert torch.equal(kept.vectors, x[:63])
    assert summed.vectors is None
    assert summed.tokens == 64
    assert torch.allclose(summed.matrix(), (x.T @ x) / 64, atol=1e-6)
    assert torch.allclose(kept.matrix(), (x[:63].T @ x[:63]) / 63, atol=1e-6)
    assert kept.vectors is None  # they were asked for as a sum
    assert kept.tokens == 63


@pytest.mark.parametrize("decay", [0.3, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_capped_rank(rank: int, decay: float) -> None:
    x = inputs(600, WIDER * 16, decay)
    found = spectrum(taken_in(x, 100), 1.0, rank)
    values, vectors = exact(x)
    assert found.rank == rank
    assert found.trace == pytest.approx(float(values.sum()), rel=1e-6)
    assert torch.allclose(found.values, values[:rank], rtol=1e-5)
    together = (found.basis.double() @ vectors[:, :rank]).square().sum()
    assert float(together) == pytest.approx(rank, abs=1e-4)  # the same directions


def test_a_rank_beyond_what_there_is() -> None:
    """As many equal directions as one likes, of which any are as good: an end is found."""
    x = torch.eye(128).repeat(2, 1)
    found = spectrum(taken_in(x, 256), 1.0, 4)
    assert torch.allclose(found.values, torch.full((4,), 1 / 128, dtype=torch.float64), rtol=1e-5)
    few = torch.zeros(300, 128)
    few[:, :2] = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    found = spectrum(taken_in(few, 300), 1.0, 8)
    assert (found.values[2:] == 0).all()
    assert float(found.values[:2].sum()) == pytest.approx(found.trace)


def test_vectors_of_zero() -> None:
    for tokens in (3, 20):
        found = spectrum(taken_in(torch.zeros(tokens, 8), 2), 0.9)
        assert found.trace == 0
        assert torch.isfinite(found.basis).all()


@given(st.integers(2, 40), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_what_only_rounding_put_there_is_no_energy(size: int, rank: int) -> None:
    rank = min(rank, size)
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(4 * size, rank, generator=generator) @ torch.randn(
        rank, size, generator=generator
    )
    found = spectrum(taken_in(x, 9), 1.0)
    assert int((found.values > 0).sum()) <= rank
