"""What calibration keeps in memory, and what gives way where that is more than the budget."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import OutOfMemoryError
from sage_hub.method.moments import CHUNK, sketch_width
from sage_hub.model.blocks import BlockModel, cut
from sage_hub.model.compute import type_of
from sage_hub.model.sites import Site, find_sites
from sage_hub.rows.encoding import row_limit
from sage_hub.runtime.machine import GB
from sage_hub.runtime.progress import in_bytes
from sage_hub.settings import Settings

RUNTIME = 0.6 * GB  # Python, torch and transformers, before they do anything


@dataclass(frozen=True)
class Budget:
    """How calibration spends its memory, in bytes."""

    weights: float  # of the largest block, of what all blocks share, and of one tensor on its way
    activations: float  # of one batch; an estimate
    hidden: float  # hidden states that stay in memory between two blocks
    spilled: float  # those that wait on disk
    moments: float  # of the sites of one block, while one of them is decomposed
    sketched: frozenset[str]  # the sites whose second moment is sketched
    limit: float

    @property
    def total(self) -> float:
        """The peak of the process."""
        return RUNTIME + self.weights + self.activations + self.hidden + self.moments

    def describe(self) -> dict[str, int]:
        """The budget in bytes for `--json`, and the number of sites that are sketched."""
        parts = ("weights", "activations", "hidden", "spilled", "moments", "total", "limit")
        return {name: int(getattr(self, name)) for name in parts} | {"sketched": len(self.sketched)}

    @property
    def excess(self) -> float:
        """What it is more than the limit, all the same."""
        return max(0.0, self.total - self.limit)

    def check(self) -> None:
        """Raise OutOfMemoryError if there is an excess."""
        if self.excess:
            raise OutOfMemoryError(
                f"Calibration takes {in_bytes(self.total)} at least (libraries "
                f"{in_bytes(RUNTIME)}, weights of a block {in_bytes(self.weights)}, a batch "
                f"{in_bytes(self.activations)}, second moments {in_bytes(self.moments)}), and "
                f"--memory allows {in_bytes(self.limit)}; raise it, use --moments sketch, or "
                "lower --batch-size or --rank."
            )


def plan_memory(
    model: BlockModel,
    sites: Sequence[Site],
    settings: Settings,
    *,
    tokens: int,
    longest: int,
) -> Budget:
    """How to calibrate on `tokens` tokens, in rows of `longest` at most, with `settings.memory`.

    Hidden states give way first, to the disk; then, with moments "auto", the second moments of
    the largest sites, to sketches.
    """
    state = model.model.state_dict(keep_vars=True)
    weights = float(
        sum(state[name].nbytes for name in model.shared)
        + max(sum(state[name].nbytes for name in block.parameters) for block in model.blocks)
        + max(tensor.nbytes for tensor in state.values())
    )
    itemsize = model.model.dtype.itemsize
    width = int(model.model.get_input_embeddings().weight.shape[1])
    widest = max((site.size for site in sites), default=width)
    # What a layer makes of a batch is a few times its input; the inputs of sites become float32.
    activations = float(settings.batch_size * longest * (6 * itemsize * width + 8 * widest))
    hidden = float(tokens * width * itemsize)
    if any(site.expert for site in sites):
        hidden *= 2  # kept from before the block too, for a second pass
    free = settings.memory * GB - RUNTIME - weights - activations

    def moments_of(some: Sequence[Site]) -> float:
        return _moments(some, sketched, settings.rank, itemsize)

    sketched: set[str] = set()
    own = [model.sites_of(block, sites) for block in model.blocks]
    if settings.moments == "sketch":
        sketched = {site.name for some in own for site in some}
    if settings.moments == "auto":
        for some in own:
            for site in sorted(some, key=lambda site: -site.size):
                if moments_of(some) <= free:
                    break
                sketched.add(site.name)
    moments = max(map(moments_of, own), default=0.0)
    kept = min(hidden, max(free - moments, 0.0))
    limit = settings.memory * GB
    return Budget(weights, activations, kept, hidden - kept, moments, frozenset(sketched), limit)


def calibrated_sets(settings: Settings) -> int:
    """How many sets calibration looks at: the forget set too, where the gain is measured on it."""
    return 1 if settings.forget is None or settings.gain_rule == "number" else 2


def expect_calibration(base: Checkpoint, settings: Settings) -> tuple[Budget, Budget, int]:
    """What it takes to calibrate `base`: at most, if the proxies are as long as the settings
    allow, at least, if they are a single token, and the bytes of its statistics at most."""
    model = base.empty_model(type_of(settings.compute_dtype))
    sites, blocks = find_sites(model), cut(model)
    sets = calibrated_sets(settings)
    most, least = (
        plan_memory(blocks, sites, settings, tokens=tokens, longest=longest)
        for tokens, longest in (
            (sets * settings.max_tokens, row_limit(base, settings.max_length)),
            (1, 1),
        )
    )
    return most, least, int(sets * statistics_bytes(sites, most.sketched, settings.rank))


def statistics_bytes(sites: Sequence[Site], sketched: Collection[str], rank: int | None) -> float:
    """The size of the statistics of one set, at most: it depends on how fast spectra fall."""
    total = 0.0
    for site in sites:
        held = sketch_width(site.size, rank) if site.name in sketched else site.size
        total += 4 * site.size * min(held, rank or held)
    return total


def _moments(sites: Sequence[Site], sketched: set[str], rank: int | None, itemsize: int) -> float:
    """The second moments of `sites` at once, and the decomposition of the costliest of them.

    In float32, with the vectors that wait to be summed up; decomposed in float64, with the
    eigenvectors and LAPACK's workspace.
    """
    sums, largest = 0.0, 0.0
    for site in sites:
        sums += itemsize * CHUNK * site.size
        if site.name in sketched:
            numbers = site.size * sketch_width(site.size, rank)
            sums, largest = sums + 8 * numbers, max(largest, 48.0 * numbers)
        else:
            sums, largest = sums + 4 * site.size**2, max(largest, 36.0 * site.size**2)
    return sums + largest
