"""The mathematics of sage.py and moments.py: in float64 wherever exactness is claimed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from sage_hub.method.moments import CHUNK, SecondMoment
from sage_hub.method.sage import (
    MOST_SHARE,
    Profile,
    filter_update,
    gain_shares,
    matching_gain,
    profile,
    removed_part,
    sanitize_weight,
    suppression,
)
from sage_hub.method.spectra import Spectrum, dominant_rank, spectrum

EXACT = 1e-9
FLOAT32 = 1e-5  # what `spectrum` can promise: it stores the basis in float32

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 6)
strengths = st.floats(0.01, 100)
energies = st.floats(0.05, 0.999)


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def activations(tokens: int, size: int, seed: int) -> Tensor:
    """Rows whose features differ in scale and share a mean, as real activations do."""
    x = normal(tokens, size, seed=seed) + 1
    return x * torch.logspace(0, -1, size, dtype=torch.float64)


def moment_of(*parts: Tensor) -> SecondMoment:
    moment = SecondMoment(parts[0].shape[1], dtype=torch.float64)
    for part in parts:
        moment.add(part)
    return moment


def exact_spectrum(x: Tensor, k: int | None = None) -> Spectrum:
    """The first k directions of `x` (n, in), all of them by default, with a float64 basis."""
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    values, basis = values.flip(0).clamp_min(0), vectors.flip(1).T
    return Spectrum(basis[:k], values[:k], float(values.sum()), len(x))


def dominant_part(s: Spectrum, k: int) -> Tensor:
    """C_k as a matrix."""
    return (s.basis[:k].T * s.values[:k]) @ s.basis[:k]


def bias(update: Tensor, x: Tensor) -> float:
    """The mean of ‖D x‖² over the rows, from its definition."""
    return float((x @ update.T).square().sum(1).mean())


def close(actual: Tensor | float, expected: Tensor | float, tolerance: float = EXACT) -> bool:
    actual, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (actual, expected))
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


# The closed form


@given(sizes, sizes, seeds, strengths, energies)
def test_the_filtered_update_minimises_the_objective(
    out: int, size: int, seed: int, strength: float, energy: float
) -> None:
    delta, s = normal(out, size, seed=seed), exact_spectrum(activations(9, size, seed))
    weight = strength / s.mean_eigenvalue
    g = suppression(s, strength, energy)
    C = dominant_part(s, len(g))

    def objective(update: Tensor) -> float:
        anchor = (update - delta).square().sum()
        return float(anchor + weight * torch.trace(update @ C @ update.T))

    best = filter_update(delta, s.basis, g)
    gradient = 2 * (best - delta) + 2 * weight * best @ C
    assert close(gradient, torch.zeros_like(gradient))
    # The objective is at least as curved as its anchor, so it rises by ‖step‖² or more.
    for scale in (1e-2, 1.0, 1e2):
        step = scale * normal(out, size, seed=seed + 1)
        rise = objective(best + step) - objective(best)
        assert rise >= float(step.square().sum()) * (1 - 1e-6) - EXACT


@given(sizes, sizes, seeds, energies)
def test_infinite_strength_is_the_hard_projection(
    out: int, size: int, seed: int, energy: float
) -> None:
    delta, s = normal(out, size, seed=seed), exact_spectrum(activations(9, size, seed))
    k = s.rank_for(energy)
    projection = torch.eye(size, dtype=torch.float64) - s.basis[:k].T @ s.basis[:k]
    hard = filter_update(delta, s.basis, suppression(s, math.inf, energy))
    nearly = filter_update(delta, s.basis, suppression(s, 1e13, energy))
    assert close(hard, delta @ projection)
    assert close(hard, nearly)


def test_a_hard_projection_keeps_what_no_retained_input_sees() -> None:
    x = normal(3, 8, seed=0)
    full = spectrum(moment_of(x), energy=1.0)
    delta = normal(4, 8, seed=1)
    unseen = torch.eye(8, dtype=torch.float64) - torch.linalg.pinv(x) @ x
    kept = filter_update(delta, full.basis, suppression(full, math.inf))
    assert close(kept, delta @ unseen, FLOAT32)


def test_a_hard_projection_protects_the_weak_directions_of_a_wide_site() -> None:
    # Half of the energy in one direction, the rest in a long tail: an MLP's input is like that.
    values = torch.cat([torch.ones(1), torch.full((999,), 1e-3)]).double()
    wide = Spectrum(torch.eye(1000, 14_336), values, float(values.sum()), tokens=100_000)
    assert suppression(wide, math.inf).sum() == 1000


@given(sizes, sizes, seeds)
def test_strength_zero_keeps_the_update(out: int, size: int, seed: int) -> None:
    delta, s = normal(out, size, seed=seed), exact_spectrum(activations(9, size, seed))
    g = suppression(s, 0.0)
    assert torch.equal(filter_update(delta, s.basis, g), delta)
    assert not removed_part(delta, s.basis, g).any()


weights = st.lists(
    st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=12, max_size=12
).map(lambda values: torch.tensor(values, dtype=torch.float32).reshape(3, 4))


@given(weights, weights, seeds)
def test_strength_zero_and_gain_one_give_the_source_to_the_last_bit(
    base: Tensor, unlearned: Tensor, seed: int
) -> None:
    s = exact_spectrum(activations(9, 4, seed))
    ours = sanitize_weight(base, unlearned, s.basis.float(), suppression(s, 0.0))
    assert torch.equal(ours.view(torch.int32), unlearned.view(torch.int32))


@given(sizes, sizes, seeds, strengths, st.floats(0.1, 10))
def test_the_sanitized_weight_is_the_base_plus_the_gained_update(
    out: int, size: int, seed: int, strength: float, gain: float
) -> None:
    base, unlearned = normal(2, out, size, seed=seed)
    s = exact_spectrum(activations(9, size, seed))
    g = suppression(s, strength)
    expected = base + gain * filter_update(unlearned - base, s.basis, g)
    assert close(sanitize_weight(base, unlearned, s.basis, g, gain), expected)


@given(st.integers(1, 12), sizes, seeds, strengths)
def test_the_full_spectrum_equals_ridge_in_its_dual_form(
    tokens: int, size: int, seed: int, strength: float
) -> None:
    # (I + c XᵀX)⁻¹ = I − Xᵀ(XXᵀ + I/c)⁻¹X with c = λ/(n s̄): n×n instead of in×in.
    x, delta = activations(tokens, size, seed), normal(3, size, seed=seed)
    s = exact_spectrum(x)
    ridge = x @ x.T + (tokens * s.mean_eigenvalue / strength) * torch.eye(tokens).double()
    dual = delta - delta @ x.T @ torch.linalg.solve(ridge, x)
    assert close(filter_update(delta, s.basis, suppression(s, strength)), dual)


@given(sizes, seeds, strengths)
def test_the_full_spectrum_equals_regmean_with_an_isotropic_forget_gram(
    size: int, seed: int, strength: float
) -> None:
    x = activations(9, size, seed)
    base, unlearned = normal(2, 3, size, seed=seed)
    s = exact_spectrum(x)
    retain = x.T @ x / len(x)
    forget = (s.mean_eigenvalue / strength) * torch.eye(size).double()
    merged = (unlearned @ forget + base @ retain) @ torch.linalg.inv(retain + forget)
    ours = sanitize_weight(base, unlearned, s.basis, suppression(s, strength))
    assert close(ours, merged)


# The suppression


any_strength = st.floats(0, allow_nan=False)
spectra = st.lists(st.floats(0, 1e6), min_size=1, max_size=6).map(
    lambda values: Spectrum(
        torch.eye(len(values)).double(),
        torch.tensor(sorted(values, reverse=True), dtype=torch.float64),
        math.fsum(values),
        tokens=1,
    )
)


@given(spectra, any_strength, any_strength)
@example(
    Spectrum(torch.eye(2).double(), torch.tensor([1, 1e-8]).double(), 1.0, tokens=1), 1.0, math.inf
)
def test_suppression_is_a_share_that_grows_with_strength_and_eigenvalue(
    s: Spectrum, one: float, other: float
) -> None:
    weak, strong = (suppression(s, strength) for strength in sorted((one, other)))
    for g in (weak, strong):
        assert ((g >= 0) & (g <= 1)).all()
        assert (g.diff() <= 0).all()  # the values of a spectrum fall
    assert (weak <= strong).all()


def test_suppression_follows_its_formula() -> None:
    s = Spectrum(torch.eye(3), torch.tensor([4.0, 1.5, 0.5]).double(), 6.0, tokens=1)
    assert suppression(s, 2.0).tolist() == pytest.approx([8 / 10, 3 / 5, 1 / 3])


def test_without_retained_activity_nothing_is_suppressed() -> None:
    silent = Spectrum(torch.eye(3), torch.zeros(3).double(), 0.0, tokens=5)
    for strength in (0.0, 1.0, math.inf):
        assert not suppression(silent, strength).any()


@given(st.integers(2, 6), seeds, strengths, st.floats(1e-6, 1e6))
def test_the_scale_of_the_activations_does_not_matter(
    size: int, seed: int, strength: float, scale: float
) -> None:
    x = activations(9, size, seed)
    assert close(
        suppression(exact_spectrum(scale * x), strength), suppression(exact_spectrum(x), strength)
    )


def test_a_truncated_spectrum_suppresses_as_the_full_one_does() -> None:
    x = activations(20, 6, seed=0)
    full, truncated = exact_spectrum(x), exact_spectrum(x, k=2)
    assert close(suppression(truncated, 1.0), suppression(full, 1.0)[:2])


def test_the_rank_cap_keeps_the_first_directions() -> None:
    s = exact_spectrum(activations(20, 6, seed=0))
    full = suppression(s, 1.0)
    assert torch.equal(suppression(s, 1.0, rank=2), full[:2])
    assert torch.equal(suppression(s, 1.0, rank=99), full)
    assert len(suppression(s, 1.0, energy=0.05, rank=4)) == 1  # a cap, not a floor


# The profile


@given(sizes, sizes, seeds, strengths, energies)
def test_the_profile_knows_bias_and_distance_of_the_filtered_update(
    out: int, size: int, seed: int, strength: float, energy: float
) -> None:
    x, delta = activations(9, size, seed), normal(out, size, seed=seed)
    s = exact_spectrum(x)
    g = suppression(s, strength, energy)
    filtered = filter_update(delta, s.basis, g)
    p = profile(delta, s.basis)
    assert close(p.bias(s), bias(delta, x))
    assert close(p.bias(s, g), bias(filtered, x))
    assert close(profile(filtered, s.basis).bias(s), bias(filtered, x))
    assert close(p.removed(g), float((filtered - delta).square().sum()))


def test_asking_for_the_bias_does_not_change_the_profile() -> None:
    s = exact_spectrum(activations(9, 4, seed=0))
    p = profile(normal(3, 4, seed=1), s.basis)
    before = p.bias(s)
    p.bias(s, suppression(s, 1.0))
    assert p.bias(s) == before


@given(st.integers(1, 5), seeds, st.floats(0, 0.5), strengths)
def test_the_bias_is_exact_where_the_tail_is_isotropic(
    k: int, seed: int, tail: float, strength: float
) -> None:
    basis = torch.linalg.qr(normal(6, 6, seed=seed)).Q.T
    values = torch.full((6,), tail, dtype=torch.float64)
    values[:k] = torch.linspace(3, 1, k)
    C = (basis.T * values) @ basis
    truncated = Spectrum(basis[:k], values[:k], float(values.sum()), tokens=1)
    assert close(truncated.tail, tail)
    delta, g = normal(3, 6, seed=seed), suppression(truncated, strength)
    D = filter_update(delta, truncated.basis, g)
    assert close(profile(delta, truncated.basis).bias(truncated, g), torch.trace(D @ C @ D.T))


# The gain


@given(seeds, strengths)
def test_the_matching_gain_gives_the_carrier_its_size_back(seed: int, strength: float) -> None:
    retain, forget = exact_spectrum(activations(9, 5, seed)), normal(7, 5, seed=seed + 1)
    delta = normal(3, 5, seed=seed)
    filtered = filter_update(delta, retain.basis, suppression(retain, strength))
    gain = matching_gain(bias(delta, forget), bias(filtered, forget))
    assert close(bias(gain * filtered, forget), bias(delta, forget))


positive = st.floats(1e-6, 1e6)


@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=8), st.integers(0, 2**31))
def test_no_other_gains_agree_as_much_on_forget_inputs_for_less_bias(
    biases: list[tuple[float, float]], seed: int
) -> None:
    forget, retain = (torch.tensor(side).double() for side in zip(*biases, strict=True))
    shares = torch.tensor(gain_shares(*map(list, zip(*biases, strict=True)))).double()
    assume(float(shares.max()) < MOST_SHARE)
    other = torch.rand(len(shares), generator=torch.Generator().manual_seed(seed)).double()
    assume(float(other @ forget) > 0)
    other *= (shares @ forget) / (other @ forget)  # the same agreement
    assert float(shares**2 @ retain) <= float(other**2 @ retain) * (1 + 1e-9)


def test_what_acts_on_nothing_kept_has_a_limit_and_what_does_nothing_a_gain_of_its_own() -> None:
    shares = gain_shares([1.0, 2.0, 3.0, 5.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    assert shares == [0.5, 1.0, 1.5, MOST_SHARE, 0.0, 1.0]
    assert gain_shares([1.0, 1.0], [0.0, 0.0]) == [1.0, 1.0]
    assert gain_shares([], []) == []


def test_there_is_no_gain_for_a_carrier_that_is_gone() -> None:
    with pytest.raises(ValueError, match="forget proxy"):
        matching_gain(1.0, 0.0)


# Second moments and spectra


@given(st.integers(1, 20), sizes, seeds, st.data())
def test_neither_order_nor_batching_of_the_rows_matters(
    tokens: int, size: int, seed: int, data: st.DataObject
) -> None:
    x, delta = activations(tokens, size, seed), normal(3, size, seed=seed)
    order = data.draw(st.permutations(range(tokens)))
    cuts = sorted(data.draw(st.lists(st.integers(0, tokens), max_size=4)))
    whole, shuffled = moment_of(x), moment_of(*torch.tensor_split(x[order], cuts))
    assert close(shuffled.matrix(), whole.matrix())
    assert close(whole.matrix(), x.T @ x / tokens)

    one, other = (spectrum(moment, energy=0.9) for moment in (whole, shuffled))
    assert close(one.values, other.values)
    assert one.tokens == other.tokens == tokens
    filtered = [filter_update(delta, s.basis, suppression(s, 1.0)) for s in (one, other)]
    assert close(filtered[0], filtered[1], FLOAT32)


@given(st.integers(2, 8), seeds, energies)
def test_a_spectrum_is_the_dominant_part_of_the_moment(size: int, seed: int, energy: float) -> None:
    moment = moment_of(activations(20, size, seed))
    s, C = spectrum(moment, energy), moment.matrix()
    basis = s.basis.double()
    assert s.size == size
    assert s.rank == s.rank_for(energy)
    assert close(basis @ basis.T, torch.eye(s.rank).double(), FLOAT32)
    assert close(basis @ C, s.values[:, None] * basis, FLOAT32)
    assert close(s.trace, torch.trace(C))
    largest = torch.linalg.eigvalsh(C).flip(0)[: s.rank]
    assert close(s.values, largest)


def test_rounding_in_float32_adds_no_directions() -> None:
    x = normal(5, 12, seed=0) + 30  # five rows span five directions, the mean's far ahead
    moment = SecondMoment(12)
    moment.add(x)
    assert suppression(spectrum(moment, energy=1.0), math.inf).sum() == 5


def test_a_capped_spectrum_still_knows_the_whole_trace() -> None:
    moment = moment_of(activations(20, 6, seed=0))
    capped, full = spectrum(moment, energy=1.0, rank=2), spectrum(moment, energy=1.0)
    assert (capped.rank, full.rank) == (2, 6)
    assert capped.trace == full.trace
    assert close(capped.tail, full.values[2:].mean())
    assert full.tail == 0


def test_low_precision_activations_are_summed_in_full_precision() -> None:
    x = torch.ones(1000, 1, dtype=torch.bfloat16)  # whose own sum ends at 256
    moment = SecondMoment(1)
    for row in x.split(1):
        moment.add(row)
    assert moment.matrix().item() == 1


@pytest.mark.parametrize("size", [1, 63, 64, 65, 200, 513, 1030])
def test_a_moment_of_any_size_is_whole(size: int) -> None:
    parts = activations(7, size, seed=0), activations(4, size, seed=1)
    x = torch.cat(parts)
    assert close(moment_of(*parts).matrix(), x.T @ x / len(x))


@given(st.lists(st.integers(0, 2 * CHUNK + 1), min_size=1, max_size=4), st.integers(0, 4))
def test_a_moment_is_the_same_in_whatever_parts_its_vectors_come(sizes: list[int], at: int) -> None:
    x = normal(sum(sizes) + 1, 3, seed=0)
    parts = [*torch.split(x[:-1], sizes), x[-1:]]
    moment = SecondMoment(3, dtype=torch.float64)
    for number, part in enumerate(parts):
        moment.add(part)
        if number == at and moment.tokens:
            moment.matrix()  # a look at it changes nothing
    assert moment.tokens == len(x)
    assert close(moment.matrix(), x.T @ x / len(x))


def test_inputs_that_are_all_zero_leave_no_bias() -> None:
    moment = SecondMoment(3)
    moment.add(torch.zeros(5, 3))
    found = spectrum(moment, energy=0.99)
    biases = profile(normal(2, 3, seed=0), found.basis).biases(found, (0.0, 1.0), found.rank)
    assert biases.tolist() == [0, 0]


def test_a_moment_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        SecondMoment(3).matrix()


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=8), st.floats(0, 1e3), energies)
def test_the_dominant_rank_is_the_smallest_that_holds_the_energy(
    values: list[float], outside: float, energy: float
) -> None:
    falling = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    trace = math.fsum(values) + outside
    k = dominant_rank(falling, trace, energy)
    hair = 1e-9 * trace
    assert 1 <= k <= len(values)
    assert k == len(values) or float(falling[:k].sum()) >= energy * trace - hair
    assert k == 1 or float(falling[: k - 1].sum()) <= energy * trace + hair


def test_rounding_does_not_cost_a_direction() -> None:
    tenths = torch.full((10,), 0.1, dtype=torch.float64)  # three of them sum to more than 0.3
    assert [dominant_rank(tenths, 1.0, k / 10) for k in range(1, 10)] == list(range(1, 10))


def test_a_profile_of_no_update_has_no_bias() -> None:
    s = exact_spectrum(activations(9, 4, seed=0))
    assert profile(torch.zeros(3, 4).double(), s.basis).bias(s) == 0
    assert Profile(torch.zeros(4).double(), norm=0.0).removed(suppression(s, math.inf)) == 0
