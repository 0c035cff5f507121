"""Watch the inputs of the sites of one block while batches of rows run through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sage_hub.checkpoint.architecture import EXPERT_KINDS, is_experts
from sage_hub.errors import ArchitectureError, NonFiniteError
from sage_hub.method.moments import Moment
from sage_hub.model.blocks import BlockModel
from sage_hub.model.sites import Site, expert_inputs
from sage_hub.rows.encoding import Batch, Encoded


@contextmanager
def watching(
    model: BlockModel,
    sites: Sequence[Site],
    moments: Mapping[str, Moment],
    view: View,
    *,
    routed: bool = True,
) -> Iterator[None]:
    """Within it `moments` take in what `sites` are given, of the batch that `view` shows.

    Experts are shown the tokens that are routed to them, or with `routed` false those of their
    whole block.
    """
    with ExitStack() as hooks:

        def before(name: str, hook: Any) -> None:
            module = model.model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(hook))

        for site in sites:
            if not site.expert:
                before(site.name, _input_hook(site, moments[site.name], view))
        experts = {site.name: moments[site.name] for site in sites if site.expert}
        for name, module in model.model.named_modules() if experts else ():
            if is_experts(module) and any(site.startswith(f"{name}.") for site in experts):
                before(name, _experts_hook(name, experts, view, routed=routed))
        yield


class View:
    """The batch that is run: which of a site's inputs are tokens, and of which row."""

    def __init__(self, rows: Sequence[Encoded], which: str) -> None:
        self._rows, self._which = rows, which

    def show(self, batch: Batch, device: str) -> None:
        """From here on inputs are those of `batch`."""
        self._batch = batch
        self.ids = batch.ids.reshape(-1).to(device)
        self.mask = batch.mask.bool().reshape(-1).to(device)

    def tokens(self, name: str, inputs: Tensor) -> Tensor:
        """The inputs (tokens, in) of a module that sees every token, padding left out."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        if len(flat) != len(self.mask):
            raise ArchitectureError(
                f"{name} does not see every token once (it has {len(flat)} inputs for "
                f"{len(self.mask)} tokens); this architecture is not supported yet."
            )
        kept = flat[self.mask]
        if kept.is_floating_point() and not _all_finite(kept):
            raise self._broken(name, flat)
        return kept

    def finite(self, name: str, inputs: Tensor) -> Tensor:
        """Inputs of an expert, as they are; what it makes of them no other module need see."""
        if not _all_finite(inputs):
            raise self._overflow(name, "some row")
        return inputs

    def _broken(self, name: str, flat: Tensor) -> NonFiniteError:
        bad = ~torch.isfinite(flat).all(dim=1) & self.mask
        line = int(bad.nonzero()[0]) // self._batch.ids.shape[1]
        return self._overflow(name, f"row {self._rows[self._batch.rows[line]].number}")

    def _overflow(self, name: str, where: str) -> NonFiniteError:
        return NonFiniteError(
            f"The inputs of {name} hold NaN or Inf on {where} of the {self._which}; the base model "
            "overflows. Check its weights, or store it in bfloat16 or float32 instead of float16."
        )


def _all_finite(x: Tensor) -> bool:
    """Whether `x` holds neither NaN nor Inf, found out in one pass."""
    return bool(torch.isfinite(x.abs().max()))


def _input_hook(site: Site, moment: Moment, view: View) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        moment.add(view.tokens(site.name, args[0]))

    return hook


def _experts_hook(name: str, experts: Mapping[str, Moment], view: View, *, routed: bool) -> Any:
    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        x, chosen = view.tokens(name, args[0]), view.tokens(name, args[1])
        for expert in range(module.num_experts):
            seen = x[(chosen == expert).any(dim=1)] if routed else x
            wanted = [k for k in EXPERT_KINDS if f"{name}.{k}.{expert}" in experts]
            if wanted and len(seen):
                inputs = expert_inputs(module, expert, seen)
                for kind in wanted:
                    site = f"{name}.{kind}.{expert}"
                    experts[site].add(view.finite(site, inputs[kind]))

    return hook
