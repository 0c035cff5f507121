"""Compare sketched with exact second moments by what they leave of an update's retain bias.

    python benchmarks/sketch.py BASE UNLEARNED PROXY --layers 0 9 19 29

For the sites of some layers: how many directions are dominant by the exact moment, by the Nyström
approximation as it is, with its eigenvalues set right (what sage-hub does), and by Frequent
Directions of the same memory, and the retain bias tr(D C Dᵀ) after filtering with each, C the
exact moment, as a part of the update's. Then the seconds that exact moments, the sketch and
Frequent Directions took in all, spectra included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from sage_hub.checkpoint.index import open_checkpoint
from sage_hub.method.moments import SecondMoment, SketchedMoment, sketch_width
from sage_hub.method.sage import filter_update, suppression
from sage_hub.method.spectra import Spectrum, spectrum
from sage_hub.model.blocks import open_blocks
from sage_hub.model.sites import Site, find_sites
from sage_hub.model.weights import Weights, open_weights
from sage_hub.rows.encoding import batches, encode, load_tokenizer
from sage_hub.rows.sources import read_proxy


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
    names = "exact", "as is", "right", "FD"
    print(f"{'site':36}{'in':>6}" + "".join(f"{n:>7}" for n in names + names))
    seconds = [0.0, 0.0, 0.0]
    for site, inputs, update in observed(args.base, args.unlearned, args.proxy, args.layers):
        width = sketch_width(site.size, None)
        exact = SecondMoment(site.size)
        streams = exact, SketchedMoment(site.size, width, seed=0), FrequentDirections(width)
        spectra = []
        for place, stream in enumerate(streams):
            began = time.perf_counter()
            for some in inputs.split(512):
                stream.add(some)
            ours = isinstance(stream, FrequentDirections)
            spectra.append(stream.spectrum() if ours else spectrum(stream, 1.0))
            seconds[place] += time.perf_counter() - began
        moment = exact.matrix().double()
        source = float(((update @ moment) * update).sum())
        found = []
        for which in (spectra[0], as_it_is(spectra[1], width), *spectra[1:]):
            g = suppression(which, args.strength, args.energy)
            left = filter_update(update, which.basis, g)
            found.append((len(g), float(((left @ moment) * left).sum()) / source))
        cells = [f"{rank:>7}" for rank, _ in found] + [f"{bias:>7.2%}" for _, bias in found]
        print(f"{site.name:36}{site.size:>6}" + "".join(cells), flush=True)
    print("seconds: exact {:.1f}, sketch {:.1f}, Frequent Directions {:.1f}".format(*seconds))


class FrequentDirections:
    """Frequent Directions (Ghashami, Liberty, Phillips and Woodruff 2016, arXiv 1501.01711).

    Keeps 2ℓ rows B; when they are full all squared singular values are lowered by the ℓ-th, which
    frees ℓ rows. 2 in ℓ numbers, as the sketch of the product takes.
    """

    def __init__(self, width: int) -> None:
        self.width, self.tokens, self.squares, self.lowered = width, 0, 0.0, 0.0
        self.rows: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in `x` of shape (n, in)."""
        wide = x.float()
        self.squares += float(wide.double().square().sum())
        self.tokens += len(wide)
        for some in wide.split(self.width):
            self.rows = some if self.rows is None else torch.cat([self.rows, some])
            if len(self.rows) > self.width:
                values, vectors = self._decomposed()
                lowest = values[self.width - 1]
                self.lowered += float(lowest)
                kept = (values[: self.width] - lowest).clamp(min=0).sqrt()
                self.rows = (kept[:, None] * vectors[: self.width]).float()

    def spectrum(self) -> Spectrum:
        """The directions of B, with what was taken off of each given back."""
        values, vectors = self._decomposed()
        values, vectors = values[: self.width], vectors[: self.width].float()
        values = (values + self.lowered) / self.tokens
        return Spectrum(vectors, values, self.squares / self.tokens, self.tokens)

    def _decomposed(self) -> tuple[Tensor, Tensor]:
        """Squared singular values of B, falling, and its right singular vectors as rows."""
        assert self.rows is not None
        wide = self.rows.double()
        values, turn = torch.linalg.eigh(wide @ wide.T)
        values, turn = values.flip(0).clamp(min=0), turn.flip(1)
        return values, (turn.T @ wide) / values.sqrt().clamp(min=1e-12)[:, None]


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
    parts, sites = list(batches(rows, 8)), find_sites(checkpoint.empty_model())
    hidden: dict[int, Tensor] = {}
    with ExitStack() as stack:
        ours = stack.enter_context(open_weights(checkpoint))
        theirs = stack.enter_context(open_weights(open_checkpoint(unlearned)))
        model = stack.enter_context(open_blocks(checkpoint, ours, "cpu"))
        for block in model.blocks:
            inside = block.begins in layers and block.ends > block.begins
            own = [site for site in model.sites_of(block, sites) if not site.expert]
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
