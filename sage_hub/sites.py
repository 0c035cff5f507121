"""Which linear maps share an input, found out in one forward pass of shapes, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import PreTrainedModel

from sage_hub.architecture import is_experts, linear_maps, other_maps, quiet_transformers
from sage_hub.errors import ArchitectureError, first_line

# A length that is no number of heads, which some norms have before the tokens.
_TOKENS = 13


@dataclass(frozen=True)
class Site:
    """A place whose input is observed once, and the linear maps that it feeds."""

    name: str  # the first of its maps
    modules: tuple[str, ...]  # the names of its maps
    size: int  # input features
    sees: Literal["input", "routed", "tokens", "hidden", "normalized", "by head", "one"] = "input"

    @property
    def expert(self) -> bool:
        """Whether it sees the tokens that are routed to it, not all."""
        return self.sees == "routed"

    @property
    def diagonal(self) -> bool:
        """Whether the diagonal of the second moment is all that is observed."""
        return self.sees in ("tokens", "normalized", "by head", "one")


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
    inputs: dict[str, Tensor] = {}
    hidden: list[Tensor] = []

    def note(name: str) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args:
                inputs.setdefault(name, args[0])

        hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(hook))

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        hidden.append(output[0])

    linears = {m.name: m for own in linear_maps(model).values() for m in own}
    others = {m.name: m for own in other_maps(model).values() for m in own}
    with ExitStack() as hooks, shapes_alone(model) as ids:
        for name, m in {**linears, **others}.items():
            if m.expert is None and m.kind != "bias":
                note(name)
        hooks.enter_context(model.get_decoder().register_forward_hook(watch))
        model(input_ids=ids, use_cache=False)

    fed: dict[int, list[str]] = {}
    for name, x in inputs.items():
        if name in linears:
            fed.setdefault(id(x), []).append(name)
    sites = [Site(own[0], tuple(own), linears[own[0]].features) for own in fed.values()]
    sites += [
        Site(m.name, (m.name,), m.features, "routed")
        for m in linears.values()
        if m.expert is not None
    ]
    for name, m in others.items():
        if name not in inputs:
            continue
        x = inputs[name]
        if m.kind == "token embedding":
            sites.append(Site(name, (name,), m.features, "tokens"))
        elif m.kind == "norm":
            if x.shape[-1] == m.features and _acts_elementwise(model.get_submodule(name), x.shape):
                if x.shape[:2] == (1, _TOKENS):
                    sites.append(Site(name, (name,), m.features, "normalized"))
                elif x.ndim == 4 and x.shape[::2] == (1, _TOKENS):
                    sites.append(Site(name, (name,), m.features, "by head"))
        elif x.shape == hidden[0].shape and _share_memory(x, hidden[0]):
            sites.append(Site(name, (name,), m.features, "hidden"))
    biases = tuple(name for name, m in others.items() if m.kind == "bias")
    return [*sites, Site("biases", biases, 1, "one")] if biases else sites


def normalized(module: nn.Module, x: Tensor) -> Tensor:
    """The x̂ of a norm y = w ⊙ x̂ (+ b) at the input `x`, in float32 at least.

    Taken as the difference that a weight makes, so that it holds for w and for 1 + w alike.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    ones = {name: torch.ones_like(p, dtype=x.dtype) for name, p in module.named_parameters()}
    zeros = {name: torch.zeros_like(p) for name, p in ones.items()}
    high: Tensor = functional_call(module, {**zeros, "weight": ones["weight"]}, (x,))
    low: Tensor = functional_call(module, zeros, (x,))
    return high - low


def expert_inputs(module: Any, expert: int, x: Tensor) -> dict[str, Tensor]:
    """What the parameters of one expert are given when it sees `x` (n, in): kind -> (n, in)."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    weight, bias = getattr(module, first)[expert], None
    if module.has_bias:
        bias = getattr(module, f"{first}_bias")[expert]
    y = nn.functional.linear(x, weight.T if module.is_transposed else weight, bias)
    return {first: x, "down_proj": module._apply_gate(y) if module.has_gate else module.act_fn(y)}


def _acts_elementwise(module: nn.Module, shape: torch.Size) -> bool:
    """Whether y = w ⊙ x̂ (+ b) or (1 + w) ⊙ x̂ (+ b), as a norm should; tried on random inputs."""
    generator = torch.Generator().manual_seed(0)
    twin = deepcopy(module).to_empty(device="cpu").float()
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data.zero_()
    x = torch.randn(shape, generator=generator)
    with torch.no_grad():
        hat = normalized(twin, x)
        moved = {"weight": torch.randn(shape[-1], generator=generator)}
        difference = functional_call(twin, moved, (x,)) - twin(x)
    close: bool = torch.allclose(difference, moved["weight"] * hat, rtol=1e-3, atol=1e-3)
    return close


def _share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether one is the other, or a view of it."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
