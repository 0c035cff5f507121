"""Which linear maps share an input, found out in one forward pass of shapes, without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from sage_hub.checkpoint.architecture import is_experts, linear_maps, quiet_transformers
from sage_hub.errors import ArchitectureError, first_line
from sage_hub.model.known import known

_TOKENS = 13  # so many, or any other number


@dataclass(frozen=True)
class Site:
    """A place whose input is observed once, and the linear maps that it feeds."""

    name: str  # the first of its maps
    modules: tuple[str, ...]  # the names of its maps
    size: int  # input features
    expert: bool = False  # it sees the tokens that are routed to it, not all


@contextmanager
def shapes_alone(model: PreTrainedModel) -> Iterator[Tensor]:
    """Within it `model`, whose weights are on "meta", can be run on the token ids that are given.

    Nothing is computed but shapes. Raises ArchitectureError for a model with which that fails.
    """
    experts = [module for module in model.modules() if is_experts(module)]
    try:
        for module in experts:  # which tokens go to which is not known
            module.forward = lambda hidden, *_, **__: torch.empty_like(hidden)
        with quiet_transformers(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            yield torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArchitectureError(
            f"A {model.config.model_type} model cannot be run on shapes alone, so that its sites "
            f"are not known: {first_line(error)}"
        ) from None
    finally:
        for module in experts:
            del module.forward


def find_sites(model: PreTrainedModel) -> list[Site]:
    """The sites of `model`, whose weights may be on "meta".

    Modules that are given the very same tensor share a site: q, k and v; gate and up. A module
    that the pass does not reach has no site.
    """

    def read(found: Any) -> list[Site]:
        return [Site(name, tuple(modules), size, expert) for name, modules, size, expert in found]

    return known(model, "sites", lambda: [astuple(site) for site in _find_sites(model)], read)


def _find_sites(model: PreTrainedModel) -> list[Site]:
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args:
                inputs.setdefault(name, args[0])

        return hook

    maps = {m.name: m for own in linear_maps(model).values() for m in own}
    with ExitStack() as hooks, shapes_alone(model) as ids:
        for name, m in maps.items():
            if m.expert is None:
                module = model.get_submodule(name)
                hooks.enter_context(module.register_forward_pre_hook(note(name)))
        model(input_ids=ids, use_cache=False)

    fed: dict[int, list[str]] = {}
    for name, x in inputs.items():
        fed.setdefault(id(x), []).append(name)
    sites = [Site(own[0], tuple(own), maps[own[0]].features) for own in fed.values()]
    experts = (m for m in maps.values() if m.expert is not None)
    return sites + [Site(m.name, (m.name,), m.features, expert=True) for m in experts]


def run_expert(module: Any, expert: int, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What the maps of one expert take and make when it sees `x` (n, in): kind -> x and W x."""

    def run(kind: str, given: Tensor) -> Tensor:
        weight = getattr(module, kind)[expert]
        return nn.functional.linear(given, weight.T if module.is_transposed else weight)

    first = "gate_up_proj" if module.has_gate else "up_proj"
    made = run(first, x)
    y = made + getattr(module, f"{first}_bias")[expert] if module.has_bias else made
    inner = module._apply_gate(y) if module.has_gate else module.act_fn(y)
    return {first: (x, made), "down_proj": (inner, run("down_proj", inner))}
