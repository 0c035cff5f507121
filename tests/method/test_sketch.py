"""A sketched second moment does what the exact one does, and says how far it may be off."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sage_hub.method.moments import SecondMoment, SketchedMoment, sketch_width
from sage_hub.method.sage import filter_update, suppression
from sage_hub.method.spectra import spectrum

SIZE = 256

# Eigenvalues that fall like those of real activations, faster, and hardly at all.
SPECTRA = {
    "slow": lambda n: 1 / n**0.7,
    "usual": lambda n: 1 / n**1.2,
    "fast": lambda n: 0.8**n,
    "flat": lambda n: n**0,
    "one direction": lambda n: (n == 1).double() + 1e-9,
}


def draw(kind: str, seed: int = 0, tokens: int = 4_000) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
    values = SPECTRA[kind](torch.arange(1, SIZE + 1).double()).float()
    return torch.randn(tokens, SIZE, generator=generator) * values.sqrt() @ axes


def both(x: Tensor, width: int, steps: int = 500) -> tuple[SecondMoment, SketchedMoment]:
    exact, sketch = SecondMoment(SIZE), SketchedMoment(SIZE, width, seed=1)
    for part in x.split(steps):
        exact.add(part)
        sketch.add(part)
    return exact, sketch


@pytest.mark.parametrize("strength", [1.0, 10.0])
@pytest.mark.parametrize("kind", SPECTRA)
def test_the_bias_that_is_left_is_near_what_exact_moments_leave(kind: str, strength: float) -> None:
    # In parts of the source's bias. Directions that are hardly stronger than the next ones are
    # what a sketch takes for each other.
    near = 0.025 if kind in ("slow", "flat") else 0.01
    exact, sketch = both(draw(kind), SIZE // 4)
    moment = exact.matrix().double()
    update = torch.randn(64, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def left(found: SecondMoment | SketchedMoment, rank: int) -> float:
        s = spectrum(found, 0.99, rank)
        d = filter_update(update, s.basis, suppression(s, strength, 0.9))
        return float(((d @ moment) * d).sum() / ((update @ moment) * update).sum())

    for rank in (4, 16):  # at the same rank, as a quarter of the features is what there is
        assert left(sketch, rank) == pytest.approx(left(exact, rank), abs=near)


@pytest.mark.parametrize("kind", [kind for kind in SPECTRA if kind != "flat"])
def test_trace_and_leading_eigenvalues(kind: str) -> None:
    exact, sketch = both(draw(kind), SIZE // 2)
    e, s = spectrum(exact, 1.0), spectrum(sketch, 1.0)
    assert s.trace == pytest.approx(e.trace, rel=1e-5)
    assert s.tokens == e.tokens
    lead = min(8, s.rank)  # directions without energy are not found
    assert torch.allclose(s.values[:lead], e.values[:lead], rtol=0.08, atol=1e-6 * e.trace)
    assert torch.allclose(s.basis @ s.basis.T, torch.eye(s.rank), atol=1e-3)


@given(st.sampled_from(list(SPECTRA)), st.integers(0, 9), st.sampled_from([16, 64, 200]))
def test_what_it_misses_bounds_its_error_in_every_direction(
    kind: str, seed: int, width: int
) -> None:
    exact, sketch = both(draw(kind, seed, tokens=600), width)
    found = spectrum(sketch, 1.0)
    moment = exact.matrix().double()
    # The energy that a direction has beyond its eigenvalue is never more than what was missed.
    seen = ((found.basis.double() @ moment) * found.basis).sum(1)
    assert found.missed is not None
    assert 0 <= found.missed <= 1
    assert float((seen - found.values).abs().max()) <= (found.missed + 1e-4) * found.trace
    if width >= SIZE:
        assert found.missed < 1e-3


@given(st.integers(1, 999))
def test_batches_and_their_order_matter_to_rounding_only(steps: int) -> None:
    x = draw("usual", tokens=1_000)
    once, parts = both(x, 64, 1_000)[1], both(x.flip(0), 64, steps)[1]
    assert torch.allclose(once.total, parts.total, rtol=1e-3, atol=1e-3 * float(once.total.max()))
    assert once.squares == pytest.approx(parts.squares, rel=1e-6)


def test_no_energy_at_all() -> None:
    _, sketch = both(torch.zeros(10, SIZE), 32)
    found = spectrum(sketch, 0.9)
    assert (found.trace, found.missed) == (0, 0)
    assert float(found.values.abs().max()) < 1e-12


def test_the_width() -> None:
    assert [sketch_width(1000, rank) for rank in (None, 10, 300)] == [250, 40, 250]
    assert sketch_width(2, None) == 1
