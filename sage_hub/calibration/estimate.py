"""What a run will take, from shapes alone: memory, disk, flops, and the time they cost here."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from sage_hub.calibration.budget import (
    Budget,
    calibrated_sets,
    plan_memory,
    statistics_bytes,
)
from sage_hub.checkpoint.architecture import linear_maps
from sage_hub.method.moments import STRIPS, SecondMoment, SketchedMoment, sketch_width
from sage_hub.method.spectra import in_float64
from sage_hub.model.blocks import BlockModel, cut
from sage_hub.model.sites import Site, find_sites
from sage_hub.settings import SEARCH_TOKENS, Settings

# The ways to have second moments.
MODES: Mapping[str, Mapping[str, Any]] = {
    "auto": {"moments": "auto"},
    "exact": {"moments": "exact"},
    "sketch": {"moments": "sketch"},
    "rank 64": {"moments": "sketch", "rank": 64},
}
# Flops of the decompositions, about: of a symmetric matrix n³ times the first (eigenvectors
# included), of a sketch (in, ℓ) in ℓ² times the second (a QR, a triangular solve, two products and
# an ℓ × ℓ eigenproblem).
_EIGEN, _SKETCH = 9, 12
_EXACT = 1 + 1 / STRIPS  # flops of an exact second moment, times in² and tokens: half of it
# What share of the features is the filter's rank is known after calibration only. On SmolLM2 it is
# between a fiftieth and a third at ρ = 0.9, and above that up to three quarters.
_USUAL_RANK, _SHARP_RANK = 1 / 8, 1 / 2
# A layer of SmolLM2 takes as much longer than its products alone: attention, norms, small pieces.
_BESIDES = 1.6
# What a search for the gain takes: evaluations of all rows, about, and passes over the weights.
SEARCHED, SEARCH_PASSES = 7, 3
DEEP = 4  # models whose states are put into the base: all but it, the reference among them
ROBUST, _TRAINED = 3, 3  # models whose robustness is measured; passes forward that a step takes
_PRODUCTS = 4  # of each weight with the directions: see docs/performance.md


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second: flops of each kind, and bytes hashed."""

    forward: float  # products in the model's own type
    generation: float  # the same of a few tokens at a time
    moments: float  # of exact second moments
    sketches: float
    float64: float  # of the decompositions
    hashing: float


@dataclass(frozen=True)
class Robustness:
    """What `--robustness` takes of each model, in tokens at most."""

    shown: int = 0  # besides those of the model as it is
    trained: int = 0
    sampled: int = 0


@dataclass(frozen=True)
class Mode:
    """One way to calibrate: what it takes, in bytes, flops and seconds."""

    name: str
    budget: Budget
    statistics: float  # bytes on disk, at most
    forward: float  # flops of the model itself, in its own type
    moments: float  # flops in float32
    decompositions: float  # flops in float64
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a run takes; times are those of this machine, of its weakest second."""

    parameters: int
    sites: int
    widest: int  # features of the largest site
    tokens: int  # of each set that calibration looks at
    sets: int
    modes: tuple[Mode, ...]
    chosen: str  # the mode that the settings say, but for a rank of theirs
    pass_flops: float  # over the weights
    pass_bytes: float  # read and written
    pass_seconds: float
    searched_tokens: int  # of both sets together, for each gain that is tried
    search_seconds: float  # for the gain
    evaluation_seconds: float  # of four models on as many tokens
    robustness: Robustness
    robustness_seconds: float  # of three of them
    patched_passes: int  # of the base on each row, from the patched layer on, for `--depth`
    depth_seconds: float
    written_tokens: int  # at most, by the base where rows are not given
    writing_seconds: float  # and for both models to read them

    def describe(self) -> dict[str, Any]:
        """For `--json`: bytes, flops and seconds."""
        modes = [{**asdict(mode), "budget": mode.budget.describe()} for mode in self.modes]
        return {**asdict(self), "modes": modes}


def estimate(
    model: PreTrainedModel,
    settings: Settings,
    *,
    tokens: int,
    longest: int,
    rates: Rates,
    written: int = 0,
    robustness: Robustness = Robustness(),
    deep: int = 0,
) -> Estimate:
    """Estimate a run on `model`, whose weights are on "meta", with proxies of `tokens` tokens.

    The model writes `written` tokens of rows that are not given; `robustness` is none unless asked,
    and neither are the `deep` tokens of rows whose hidden states are put from model to model.
    """
    sites, blocks = find_sites(model), cut(model)
    per_token, size = _flops_per_token(model, blocks), weight_bytes(model)
    products = _flops_of_pass(model, settings)

    def mode(name: str, changes: Mapping[str, Any]) -> Mode:
        own = replace(settings, **changes)
        calibrated = calibrated_sets(own) * tokens
        budget = plan_memory(blocks, sites, own, tokens=calibrated, longest=longest)
        return _mode(name, model, sites, budget, own, calibrated, rates, per_token)

    def run(tokens: int) -> float:
        return _BESIDES * tokens * per_token / rates.forward

    searched = 2 * min(tokens, SEARCH_TOKENS)
    layers = model.config.get_text_config().num_hidden_layers
    patched = DEEP * layers if deep else 0
    in_float32 = rates.forward / rates.moments
    return Estimate(
        parameters=sum(p.numel() for p in model.parameters()),
        sites=len(sites),
        widest=max((site.size for site in sites), default=0),
        tokens=tokens,
        sets=calibrated_sets(settings),
        modes=tuple(mode(name, changes) for name, changes in MODES.items()),
        chosen=settings.moments,
        pass_flops=products,
        pass_bytes=3 * size,
        # Hashing is half of what is done to every byte (docs/performance.md).
        pass_seconds=products / rates.moments + 2 * 3 * size / rates.hashing,
        searched_tokens=searched,
        # Half of the products of the pass make a weight, the others measure it.
        search_seconds=SEARCHED * run(searched)
        + SEARCH_PASSES * (2 * size / rates.hashing + products / 2 / rates.moments),
        evaluation_seconds=4 * (run(tokens) + size / rates.hashing),
        robustness=robustness,
        robustness_seconds=ROBUST
        * (
            run(robustness.shown)
            + _TRAINED * run(robustness.trained) * in_float32
            + _BESIDES * robustness.sampled * per_token / rates.generation
        ),
        patched_passes=patched,
        # Half of the layers lie behind a patch, on average; and each model has its own states.
        depth_seconds=run(deep) * (patched / 2 + DEEP + 1),
        written_tokens=written,
        writing_seconds=bool(written) * (3 * size / rates.hashing)
        + _BESIDES * written * per_token / rates.generation
        + 2 * run(written),
    )


def _mode(
    name: str,
    model: PreTrainedModel,
    sites: Sequence[Site],
    budget: Budget,
    settings: Settings,
    tokens: int,
    rates: Rates,
    per_token: float,
) -> Mode:
    """What calibration takes on `tokens` tokens of all sets, with the moments of `budget`."""
    sets, forward = calibrated_sets(settings), tokens * per_token
    moments, decompositions = 0.0, 0.0
    seconds = _BESIDES * forward / rates.forward
    for site in sites:
        seen = tokens * (_routed_share(model) if site.expert else 1)
        summed, once = _flops_of_site(site, budget.sketched, settings.rank)
        decomposed = sets * once
        moments, decompositions = moments + seen * summed, decompositions + decomposed
        rate = rates.sketches if site.name in budget.sketched else rates.moments
        seconds += seen * summed / rate + decomposed / rates.float64
    seconds += 2 * weight_bytes(model) / rates.hashing  # hashed, then read
    kept = sets * statistics_bytes(sites, budget.sketched, settings.rank)
    return Mode(name, budget, kept, forward, moments, decompositions, seconds)


def _flops_of_pass(model: PreTrainedModel, settings: Settings) -> float:
    """The products of the pass over the weights, with as many directions as are usual."""
    state, products = model.state_dict(keep_vars=True), 0.0
    share = _USUAL_RANK if settings.sharpness[1] <= 0.9 else _SHARP_RANK
    for parameter, maps in linear_maps(model).items():
        rank = min(int(share * maps[0].features), settings.rank or maps[0].features)
        products += _PRODUCTS * 2.0 * state[parameter].numel() * rank
    return products


def weight_bytes(model: PreTrainedModel) -> float:
    """The size of a checkpoint of `model`; what is tied is stored once."""
    own = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    return float(sum(own.values()))


def cache_bytes(model: PreTrainedModel, tokens: int) -> float:
    """The keys and values of so many tokens, of all rows that are generated together.

    As if every layer saw all of them, which those with a window or a state do not.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    width *= getattr(config, "num_key_value_heads", None) or heads
    return float(2 * config.num_hidden_layers * width * tokens * model.dtype.itemsize)


def probe(dtype: torch.dtype, device: str) -> Rates:
    """Measure this machine for about half a second, on what the work is made of."""
    tokens, few, size = 512, 8, 768
    x = torch.randn(tokens, size, device=device).to(dtype)
    weight = torch.randn(4 * size, size, device=device).to(dtype)
    exact, sketch = SecondMoment(size, device), SketchedMoment(size, size // 4, 0, device)
    square = in_float64(x.float().T @ x.float())
    block = bytes(8 << 20)

    def finish() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    def per_second(work: float, do: Callable[[], object]) -> float:
        do()  # warms up
        finish()
        # The fastest round is the machine's; the mean would be of what else runs on it just now.
        fastest, now = math.inf, time.perf_counter()
        end = now + 0.1
        while now < end:
            before = now
            do()
            finish()
            now = time.perf_counter()
            fastest = min(fastest, now - before)
        return work / fastest

    return Rates(
        forward=per_second(8 * tokens * size**2, lambda: x @ weight.T),
        generation=per_second(8 * few * size**2, lambda: x[:few] @ weight.T),
        moments=per_second(_EXACT * tokens * size**2, lambda: exact.add(x)),
        sketches=per_second(tokens * size**2, lambda: sketch.add(x)),
        float64=per_second(_EIGEN * size**3, lambda: torch.linalg.eigh(square)),
        hashing=per_second(len(block), lambda: hashlib.sha256(block).digest()),
    )


def _flops_of_site(site: Site, sketched: Collection[str], rank: int | None) -> tuple[float, float]:
    """Flops per token, and of the decomposition."""
    if site.name not in sketched:
        return _EXACT * site.size**2, float(_EIGEN * site.size**3)
    width = sketch_width(site.size, rank)
    return 4.0 * site.size * width, float(_SKETCH * site.size * width**2)


def _flops_per_token(model: PreTrainedModel, blocks: BlockModel) -> float:
    """2 per weight of the layers that a token meets; attention itself is small on short rows."""
    state = model.state_dict(keep_vars=True)
    total = 0.0
    for block in blocks.blocks:
        if not (block.starts and not block.finishes):  # a lookup, not a product
            for name in block.parameters:
                share = _routed_share(model) if state[name].ndim == 3 else 1
                total += 2.0 * state[name].numel() * share
    return total


def _routed_share(model: PreTrainedModel) -> float:
    """The part of the experts that a token is sent to."""
    config: Any = model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    names: Sequence[str] = ("num_experts", "num_local_experts", "n_routed_experts")
    there = next((n for name in names if (n := getattr(config, name, None))), 1)
    return min(1.0, chosen / there)
