"""Which linear map each tensor belongs to and which maps share an input, asked of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from sage_hub.checkpoint import Checkpoint
from sage_hub.errors import ArchitectureError, first_line
from sage_hub.tensorfile import row_count

# Conversions at load that stack the experts, and join the parts of each.
ROWS_STAY_WHOLE = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
EXPERT_KINDS = ("gate_up_proj", "up_proj", "down_proj")  # fused (expert, out, in) parameters


@dataclass(frozen=True)
class Linear:
    """A linear map y = W x (+ b): rows [start, stop) of a parameter, seen as a matrix.

    An ordinary layer is the whole of its weight. The experts of a fused (expert, out, in)
    parameter stand in one column, a map each. Stored (in, out) if `transposed`, as GPT-2's.
    """

    name: str  # of the module; of the parameter and the expert's number where it is fused
    start: int
    stop: int
    features: int  # in
    transposed: bool = False
    expert: int | None = None
    kind: str = "linear"
    diagonal: bool = False  # C is: one-hot inputs, or an elementwise map


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


@dataclass(frozen=True)
class Place:
    """The rows [start, stop) of `parameter` that a tensor of a checkpoint holds."""

    parameter: str
    start: int
    stop: int


@dataclass(frozen=True)
class Architecture:
    """The parameters of a model class, and how checkpoint names map to them."""

    model_type: str
    linears: dict[str, tuple[Linear, ...]]  # parameter -> its maps, in the order of its rows
    others: dict[str, tuple[Linear, ...]]  # the same of embedding, LM head, norms and biases
    embedding: str  # parameter name of the token embedding
    head: str  # parameter name of the LM head's weight, "" if there is none
    tied: dict[str, str]  # parameter that a checkpoint may leave out -> the one it equals
    parameters: dict[str, tuple[int, ...]]  # parameter or buffer name -> shape
    outside: tuple[str, ...]  # prefixes of what is not part of the language model, as its eyes
    _renamings: tuple[WeightRenaming, ...]
    _converters: tuple[WeightConverter, ...]
    _prefix: str
    _ignored: tuple[str, ...]

    def with_others(self) -> Architecture:
        """The architecture with embedding, LM head, norms and biases among its linear maps."""
        return replace(self, linears={**self.linears, **self.others}, others={})

    def place(self, tensor: str, shape: tuple[int, ...]) -> Place | None:
        """Where checkpoint tensor `tensor` of `shape` lies in the model.

        None if the model has no such parameter, or if transformers changes the tensor at load in
        a way that is not a matter of rows. Raises ArchitectureError if it does not fit in.
        """
        name, pattern = self._rename(tensor)
        whole = self.parameters.get(name)
        if whole is None:
            return None
        if pattern is not None:
            return self._place_of_expert(tensor, shape, name, pattern)
        if whole != shape:
            raise ArchitectureError(
                f"Tensor {tensor!r} has the shape {list(shape)}, but config.json makes it "
                f"{list(whole)}; the config is not that of these weights."
            )
        return Place(name, 0, row_count(shape))

    def whole(self, tensor: str) -> Place:
        """All rows of the parameter that checkpoint tensor `tensor` belongs to."""
        name, _ = self._rename(tensor)
        return Place(name, 0, row_count(self.parameters[name]))

    def stored_transposed(self, tensor: str) -> bool:
        """Whether the parameter of checkpoint tensor `tensor` is stored (in, out)."""
        name, _ = self._rename(tensor)
        return name == self.embedding or any(m.transposed for m in self.linears.get(name, ()))

    def _rename(self, tensor: str) -> tuple[str, str | None]:
        """The parameter of checkpoint tensor `tensor`, and the converter's pattern, if one fits."""
        if tensor in self.parameters:
            return tensor, None
        name, pattern = rename_source_key(
            tensor, [*self._renamings], [*self._converters], self._prefix, self.parameters
        )
        return str(name), pattern

    def _place_of_expert(
        self, tensor: str, shape: tuple[int, ...], name: str, pattern: str
    ) -> Place | None:
        """Of a tensor that holds one expert's part of a fused (expert, out, in) parameter."""
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        steps = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
        head, star, tail = pattern.partition("*")
        key = apply_renamings(tensor, [*self._renamings])
        number = re.search(rf"{re.escape(head)}(\d+){re.escape(tail)}", key)
        whole = self.parameters[name]
        if steps not in ROWS_STAY_WHOLE or not star or number is None:
            return None
        expert, parts = int(number[1]), len(converter.source_patterns)
        if len(whole) != 3 or expert >= whole[0] or (whole[1] // parts, whole[2]) != shape:
            raise ArchitectureError(
                f"Tensor {tensor!r} has the shape {list(shape)}, which does not fit into the "
                f"{list(whole)} that config.json gives all experts together."
            )
        start = expert * whole[1] + converter.source_patterns.index(pattern) * shape[0]
        return Place(name, start, start + shape[0])

    def may_be_absent(self, tensor: str) -> bool:
        """Whether a whole checkpoint can lack `tensor`: a tied weight or a left-over buffer."""
        if tensor in self.tied or any(re.search(p, tensor) for p in self._ignored):
            return True
        return tensor not in self.parameters and tensor.endswith(
            ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")
        )


def linear_maps(model: PreTrainedModel) -> dict[str, tuple[Linear, ...]]:
    """All linear maps of `model` but the LM head, by the parameter that holds them.

    Linear and Conv1D layers, fused experts, and the routers before them.
    """
    head = model.get_output_embeddings()
    found: dict[str, tuple[Linear, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            transposed = isinstance(module, Conv1D)
            features = module.weight.shape[0 if transposed else 1]
            rows = module.weight.shape[0]
            found[f"{name}.weight"] = (Linear(name, 0, rows, features, transposed),)
        if is_experts(module):
            for kind in EXPERT_KINDS:
                parameter = getattr(module, kind, None)
                if parameter is not None and parameter.ndim == 3:
                    found[f"{name}.{kind}"] = _expert_maps(f"{name}.{kind}", module, parameter)
            # Its router is its neighbour: one row of features per expert, in a class of its own.
            block, _, _ = name.rpartition(".")
            for near, neighbour in model.get_submodule(block).named_children():
                weight = getattr(neighbour, "weight", None)
                if not isinstance(neighbour, nn.Linear) and isinstance(weight, nn.Parameter):
                    experts, features = (*weight.shape, 0)[:2]
                    if weight.ndim == 2 and experts == module.num_experts:
                        router = f"{block}.{near}"
                        found[f"{router}.weight"] = (Linear(router, 0, experts, features),)
    return found


def other_maps(model: PreTrainedModel) -> dict[str, tuple[Linear, ...]]:
    """The maps beside the linear layers, which have the same closed form.

    The token embedding is a map of one-hot inputs, a norm's weight an elementwise one, a bias a
    map of the input 1. A head that is tied to the embedding is treated as the head.
    """
    names = {id(module): name for name, module in model.named_modules()}
    tokens, head = model.get_input_embeddings(), model.get_output_embeddings()
    entry, linears = names[id(tokens)], linear_maps(model)
    size = tokens.weight.shape[0]
    found: dict[str, tuple[Linear, ...]] = {}
    if head is None:
        tied = False
    else:
        end = names[id(head)]
        tied = model.all_tied_weights_keys.get(f"{end}.weight") == f"{entry}.weight"
        kind = "LM head, tied to the embedding" if tied else "LM head"
        whole = (Linear(end, 0, head.weight.shape[0], head.weight.shape[1], kind=kind),)
        found[f"{end}.weight"] = whole
        if tied:
            found[f"{entry}.weight"] = whole
    if not tied:
        found[f"{entry}.weight"] = (
            Linear(entry, 0, size, size, transposed=True, kind="token embedding", diagonal=True),
        )
    for name, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        norm = is_elementwise(module)
        if norm:
            d = len(module.weight)
            found[f"{name}.weight"] = (
                Linear(name, 0, d, d, transposed=True, kind="norm", diagonal=True),
            )
        mapped = norm or f"{name}.weight" in linears or module is head
        if mapped and isinstance(bias, nn.Parameter) and bias.ndim == 1 and weight is not None:
            found[f"{name}.bias"] = (
                Linear(f"{name}.bias", 0, len(bias), 1, kind="bias", diagonal=True),
            )
    return found


def is_elementwise(module: nn.Module) -> bool:
    """Whether `module` may be a norm: a leaf with a vector for its weight."""
    weight = getattr(module, "weight", None)
    leaf = next(module.children(), None) is None
    return leaf and isinstance(weight, nn.Parameter) and weight.ndim == 1


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


def _expert_maps(parameter: str, module: nn.Module, weight: Tensor) -> tuple[Linear, ...]:
    experts, rows, columns = weight.shape
    transposed = bool(module.is_transposed)
    return tuple(
        Linear(
            f"{parameter}.{e}",
            e * rows,
            (e + 1) * rows,
            rows if transposed else columns,
            transposed,
            expert=e,
        )
        for e in range(experts)
    )


def is_experts(module: nn.Module) -> bool:
    """Whether `module` holds fused experts behind transformers' common interface for them."""
    return all(hasattr(module, name) for name in ("num_experts", "is_transposed", "_apply_gate"))


def expert_inputs(module: Any, expert: int, x: Tensor) -> dict[str, Tensor]:
    """What the parameters of one expert are given when it sees `x` (n, in): kind -> (n, in)."""
    first = "gate_up_proj" if module.has_gate else "up_proj"
    weight, bias = getattr(module, first)[expert], None
    if module.has_bias:
        bias = getattr(module, f"{first}_bias")[expert]
    y = nn.functional.linear(x, weight.T if module.is_transposed else weight, bias)
    return {first: x, "down_proj": module._apply_gate(y) if module.has_gate else module.act_fn(y)}


def read_architecture(checkpoint: Checkpoint) -> Architecture:
    """The architecture of `checkpoint` from its config alone; no weight is read or allocated.

    Raises ArchitectureError for one that transformers does not know without remote code.
    """
    checkpoint.config  # noqa: B018 - its own errors are clearer than transformers'
    folder = checkpoint.files.path("config.json").parent
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = _auto_class(config).from_config(config, trust_remote_code=False)
    except Exception as error:
        # Whatever a config makes transformers raise, the user's next step is the same.
        raise ArchitectureError(
            f"transformers cannot build a causal language model from the config of "
            f"{checkpoint.name} (remote code is not run): {first_line(error)}"
        ) from None
    transforms = get_model_conversion_mapping(model)
    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    decoder = model.get_decoder()
    language = names.get(id(decoder), "")
    return Architecture(
        model_type=config.model_type,
        linears=linear_maps(model),
        others=other_maps(model),
        embedding=f"{names[id(model.get_input_embeddings())]}.weight",
        head=f"{names[id(head)]}.weight" if head is not None else "",
        tied=dict(model.all_tied_weights_keys),
        parameters={name: tuple(value.shape) for name, value in model.state_dict().items()},
        outside=tuple(
            f"{name}."
            for name, module in model.named_modules()
            if name and module is not head and not _related(name, language)
        ),
        _renamings=tuple(t for t in transforms if isinstance(t, WeightRenaming)),
        _converters=tuple(t for t in transforms if isinstance(t, WeightConverter)),
        _prefix=model.base_model_prefix,
        _ignored=tuple(model._keys_to_ignore_on_load_unexpected or ()),
    )


def _related(one: str, other: str) -> bool:
    """Whether one module lies in the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _auto_class(config: PretrainedConfig) -> Any:
    """The class of a language model, alone or with eyes."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM  # whose error says what is wrong


def load_model(checkpoint: Checkpoint, device: str) -> PreTrainedModel:
    """The model of `checkpoint`, in its stored dtype, on `device`, ready for inference."""
    try:
        with quiet_transformers():
            folder = checkpoint.model_folder()
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = _auto_class(config).from_pretrained(
                folder,
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ArchitectureError(
            f"transformers cannot load {checkpoint.name}: {first_line(error)}"
        ) from None
    return model.to(device).eval()


@torch.inference_mode()
def find_sites(model: PreTrainedModel) -> list[Site]:
    """The sites of `model`, seen in one short forward pass.

    Modules that are given the very same tensor share a site: q, k and v; gate and up. A module
    that the pass does not reach has no site.
    """
    maps = linear_maps(model)
    modules = {m.name: m for own in maps.values() for m in own if m.expert is None}
    seen: dict[int, list[str]] = {}
    alive: list[Tensor] = []  # so that no id is used twice

    def note(name: str) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            alive.append(args[0])
            fed = seen.setdefault(id(args[0]), [])
            if name not in fed:
                fed.append(name)

        hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(hook))

    with ExitStack() as hooks:
        for name in modules:
            note(name)
        ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
        model.get_decoder()(input_ids=ids, use_cache=False)
    shared = [Site(fed[0], tuple(fed), modules[fed[0]].features) for fed in seen.values()]
    experts = [
        Site(m.name, (m.name,), m.features, "routed")
        for own in maps.values()
        for m in own
        if m.expert is not None
    ]
    return shared + experts + _other_sites(model)


def _other_sites(model: PreTrainedModel) -> list[Site]:
    """The sites of embedding, LM head, norms and biases that one short pass confirms."""
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            if args:
                inputs.setdefault(name, args[0])

        hooks.enter_context(model.get_submodule(name).register_forward_hook(hook))

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        inputs[""] = output[0]

    maps = {m.name: m for own in other_maps(model).values() for m in own}
    # A length that is no number of heads, which some norms have before the tokens.
    ids = torch.zeros(1, 13, dtype=torch.long, device=model.device)
    with ExitStack() as hooks:
        for name, own in maps.items():
            if own.kind != "bias":
                note(name)
        hooks.enter_context(model.get_decoder().register_forward_hook(watch))
        model(input_ids=ids, use_cache=False)
    sites = []
    for name, own in maps.items():
        x = inputs.get(name)
        if x is None:
            continue
        if own.kind == "token embedding":
            sites.append(Site(name, (name,), own.features, "tokens"))
        elif own.kind == "norm":
            module = model.get_submodule(name)
            if x.shape[-1] == own.features and _acts_elementwise(module, x):
                if x.shape[:2] == ids.shape:
                    sites.append(Site(name, (name,), own.features, "normalized"))
                elif x.ndim == 4 and x.shape[::2] == ids.shape:
                    sites.append(Site(name, (name,), own.features, "by head"))
        elif torch.equal(x, inputs[""]):
            sites.append(Site(name, (name,), own.features, "hidden"))
    biases = tuple(name for name, own in maps.items() if own.kind == "bias")
    return [*sites, Site("biases", biases, 1, "one")] if biases else sites


def _acts_elementwise(module: nn.Module, x: Tensor) -> bool:
    """Whether y = w ⊙ x̂ (+ b) or (1 + w) ⊙ x̂ (+ b), as a norm should."""
    weight: Any = module.weight
    hat = normalized(module, x)
    moved = {"weight": weight + 1}
    difference = functional_call(module, moved, (x,)) - module(x)
    return torch.allclose(difference.to(hat), hat, rtol=0.05, atol=0.05)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the library's own warnings and bars off stderr, where our one sentence belongs."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        # transformers switches huggingface_hub's bars along with its own.
        (enable_progress_bars if hub_bars else disable_progress_bars)()
