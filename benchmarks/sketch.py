"""Compare sketched with exact second moments by what they leave of an update's retain bias.

    python benchmarks/sketch.py BASE UNLEARNED PROXY --layers 0 9 19 29

For the sites of some layers: how many directions are dominant by the exact moment, by the Nyström
approximation as it is, and with its eigenvalues set right (what sage-hub does), and the retain
bias tr(D C Dᵀ) after filtering with each, C the exact moment, as a part of the update's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from sage_hub.architecture import empty_model
from sage_hub.blocks import open_blocks
from sage_hub.checkpoint import open_checkpoint
from sage_hub.encoding import batches, encode, load_tokenizer
from sage_hub.moments import SecondMoment, SketchedMoment, Spectrum, sketch_width, spectrum
from sage_hub.proxies import read_proxy
from sage_hub.sage import filter_update, suppression
from sage_hub.sites import Site, find_sites
from sage_hub.weights import Weights, open_weights


def main() -> None:
    """Print a line per site."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base")
    parser.add_argument("unlearned")
    parser.add_argument("proxy")
    parser.add_argument("--layers", type=int, nargs="+", default=[0])
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--energy", type=float, default=0.9)
    args = parser.parse_args()
    print(
        f"{'site':36}{'in':>6}{'k':>6}{'as is':>7}{'right':>7}{'exact':>9}{'as is':>9}{'right':>9}"
    )
    for site, inputs, update in observed(args.base, args.unlearned, args.proxy, args.layers):
        exact, sketch = (
            SecondMoment(site.size),
            SketchedMoment(site.size, sketch_width(site.size, None), seed=0),
        )
        for some in inputs.split(512):
            exact.add(some)
            sketch.add(some)
        moment = exact.matrix().double()
        source = float(((update @ moment) * update).sum())
        right = spectrum(sketch, 1.0)
        found = []
        for which in (spectrum(exact, 1.0), as_it_is(right, len(sketch.test.T)), right):
            g = suppression(which, args.strength, args.energy)
            left = filter_update(update, which.basis, g)
            found.append((len(g), float(((left @ moment) * left).sum()) / source))
        ranks = f"{found[0][0]:>6}" + "".join(f"{rank:>7}" for rank, _ in found[1:])
        print(f"{site.name:36}{site.size:>6}{ranks}" + "".join(f"{b:>9.2%}" for _, b in found))


def as_it_is(right: Spectrum, width: int) -> Spectrum:
    """The spectrum of the Nyström approximation itself: s²/(s + κ) in place of s."""
    kappa = (right.missed or 0.0) * right.trace / width
    values = right.values**2 / (right.values + kappa).clamp(min=1e-300)
    return replace(right, values=values)


def observed(
    base: str, unlearned: str, proxy: str, layers: list[int]
) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """Sites of `layers`, the inputs (tokens, in) that they see, and the update of their maps."""
    checkpoint = open_checkpoint(base)
    rows = encode(read_proxy(proxy), load_tokenizer(checkpoint), chat_template=True, max_length=512)
    parts, sites = list(batches(rows, 8)), find_sites(empty_model(checkpoint))
    hidden: dict[int, Tensor] = {}
    with ExitStack() as stack:
        ours = stack.enter_context(open_weights(checkpoint))
        theirs = stack.enter_context(open_weights(open_checkpoint(unlearned)))
        model = stack.enter_context(open_blocks(checkpoint, ours, "cpu"))
        for block in model.blocks:
            inside = block.begins in layers and block.ends > block.begins
            own = [site for site in model.sites_of(block, sites) if site.sees == "input"]
            seen: dict[str, list[Tensor]] = {site.name: [] for site in own if inside}
            with model.holding(block, ours), ExitStack() as hooks:
                for name, kept in seen.items():
                    module = model.model.get_submodule(name)
                    hook = module.register_forward_pre_hook(
                        lambda _, given, kept=kept: kept.append(given[0])
                    )
                    hooks.enter_context(hook)
                for number, batch in enumerate(parts):
                    hidden[number] = model.run(block, batch, hidden.get(number))
            for site in own if inside else ():
                pairs = zip(seen[site.name], parts, strict=True)
                yield (
                    site,
                    torch.cat([x[batch.mask.bool()] for x, batch in pairs]),
                    torch.cat([difference(ours, theirs, m) for m in site.modules]),
                )


def difference(ours: Weights, theirs: Weights, module: str) -> Tensor:
    """Δ of one linear layer, in float64."""
    return theirs(f"{module}.weight").double() - ours(f"{module}.weight").double()


if __name__ == "__main__":
    main()
