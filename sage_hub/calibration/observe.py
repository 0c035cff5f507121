"""Watch what the sites of one block take in and make of it while rows run through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sage_hub.checkpoint.architecture import EXPERT_KINDS, is_experts
from sage_hub.errors import ArchitectureError, NonFiniteError
from sage_hub.method.moments import Moment
from sage_hub.model.blocks import BlockModel
from sage_hub.model.sites import Site, run_expert
from sage_hub.rows.encoding import Batch, Encoded


@dataclass
class Sight:
    """What was seen of one site: its inputs, and how large its maps make them."""

    moment: Moment
    outputs: dict[str, float]  # map -> Σ ‖W x‖² over the inputs

    def note(self, name: str, squares: Tensor) -> None:
        """Take in ‖W x‖² of some inputs, made by the map `name`."""
        self.outputs[name] += float(squares.cpu().double().sum())


@contextmanager
def watching(
    model: BlockModel,
    sites: Sequence[Site],
    sights: Mapping[str, Sight],
    view: View,
    *,
    routed: bool = True,
) -> Iterator[None]:
    """Within it `sights` take in what `sites` are given and make, of the batch that `view` shows.

    Experts are shown the tokens that are routed to them, or with `routed` false those of their
    whole block.
    """
    with ExitStack() as hooks:
        for site in sites:
            if site.expert:
                continue
            module = model.model.get_submodule(site.name)
            hook = _input_hook(site, sights[site.name], view)
            hooks.enter_context(module.register_forward_pre_hook(hook))
            for name in site.modules:
                hook = _output_hook(name, sights[site.name], view)
                hooks.enter_context(model.model.get_submodule(name).register_forward_hook(hook))
        experts = {site.name: sights[site.name] for site in sites if site.expert}
        for name, module in model.model.named_modules() if experts else ():
            if is_experts(module) and any(site.startswith(f"{name}.") for site in experts):
                hook = _experts_hook(name, experts, view, routed=routed)
                hooks.enter_context(module.register_forward_pre_hook(hook))
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


def _squares(made: Tensor) -> Tensor:
    """‖y‖² of each output in `made` (n, out), shape (n,)."""
    norms: Tensor = torch.linalg.vector_norm(made, dim=1, dtype=torch.float32)
    return norms.square()


def _input_hook(site: Site, sight: Sight, view: View) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sight.moment.add(view.tokens(site.name, args[0]))

    return hook


def _output_hook(name: str, sight: Sight, view: View) -> Any:
    def hook(module: Any, args: tuple[Tensor, ...], made: Any) -> None:
        if not isinstance(module, (nn.Linear, Conv1D)):  # a router, which makes more of it
            made = nn.functional.linear(args[0], module.weight)
        elif module.bias is not None:
            made = made - module.bias
        sight.note(name, _squares(made.reshape(-1, made.shape[-1]))[view.mask])

    return hook


def _experts_hook(name: str, experts: Mapping[str, Sight], view: View, *, routed: bool) -> Any:
    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        x, chosen = view.tokens(name, args[0]), view.tokens(name, args[1])
        for expert in range(module.num_experts):
            seen = x[(chosen == expert).any(dim=1)] if routed else x
            wanted = [k for k in EXPERT_KINDS if f"{name}.{k}.{expert}" in experts]
            if wanted and len(seen):
                run = run_expert(module, expert, seen)
                for kind in wanted:
                    site = f"{name}.{kind}.{expert}"
                    inputs, made = run[kind]
                    experts[site].moment.add(view.finite(site, inputs))
                    experts[site].note(site, _squares(made))

    return hook
