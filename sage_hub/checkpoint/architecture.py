"""Which linear map each tensor of a checkpoint belongs to, asked of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from torch import Tensor, nn
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

from sage_hub.checkpoint.tensorfile import row_count
from sage_hub.errors import ArchitectureError, first_line
from sage_hub.runtime.limits import limited

# Conversions at load that stack the experts, and join the parts of each.
ROWS_STAY_WHOLE = ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
# What torch.compile, DataParallel, FSDP and activation checkpointing put into names.
WRAPPERS = re.compile(
    r"^((module|_orig_mod)\.)+|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
LONGEST_BUILD = 60.0  # seconds on a CPU for the modules of a model, which take a few at most
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
    dtype: torch.dtype  # that the model is stored in, but for single parameters
    linears: dict[str, tuple[Linear, ...]]  # parameter -> its maps, in the order of its rows
    embedding: str  # parameter name of the token embedding
    head: str  # parameter name of the LM head's weight, "" if there is none
    tied: dict[str, str]  # parameter that a checkpoint may leave out -> the one it equals
    parameters: dict[str, tuple[int, ...]]  # parameter or buffer name -> shape
    outside: tuple[str, ...]  # prefixes of what is not part of the language model, as its eyes
    settings: dict[str, Any]  # those of the language model, with the defaults of its class
    _renamings: tuple[WeightRenaming, ...]
    _converters: tuple[WeightConverter, ...]
    _prefix: str
    _ignored: tuple[str, ...]

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
                f"{list(whole)}; the config is not that of these weights. Use the one "
                "that was saved with them."
            )
        return Place(name, 0, row_count(shape))

    def parameter(self, tensor: str) -> str | None:
        """The parameter that checkpoint tensor `tensor` belongs to; None if the model has none."""
        name, _ = self._rename(tensor)
        return name if name in self.parameters else None

    def converted(self, tensor: str) -> str:
        """The name of `tensor` after transformers' conversions, without what it forgives beside."""
        if tensor in self.parameters:
            return tensor
        return str(rename_source_key(tensor, [*self._renamings], [*self._converters])[0])

    def twins(self, parameter: str) -> tuple[str, ...]:
        """`parameter`, and all that are tied to it.

        Those that a checkpoint holds under their own names are what it says; the others equal the
        first of their twins that it holds, whichever that is.
        """
        source = self.tied.get(parameter, parameter)
        others = [name for name, origin in self.tied.items() if origin == source]
        return tuple(dict.fromkeys((parameter, source, *others)))

    def stored_transposed(self, tensor: str) -> bool:
        """Whether the parameter of checkpoint tensor `tensor` is stored (in, out)."""
        name, _ = self._rename(tensor)
        return name == self.embedding or any(m.transposed for m in self.linears.get(name, ()))

    def _rename(self, tensor: str) -> tuple[str, str | None]:
        """The parameter of checkpoint tensor `tensor`, and the converter's pattern, if one fits."""
        if tensor in self.parameters:
            return tensor, None
        tensor = unwrapped(tensor)
        name, pattern = rename_source_key(
            tensor, [*self._renamings], [*self._converters], self._prefix, self.parameters
        )
        return str(name), pattern

    def shape_of(self, tensor: str) -> tuple[int, ...]:
        """The shape that checkpoint tensor `tensor` has if it is as it should be; () if unknown."""
        name, pattern = self._rename(tensor)
        whole = self.parameters.get(name, ())
        if pattern is None or len(whole) != 3:
            return whole
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        return whole[1] // len(converter.source_patterns), whole[2]

    def _place_of_expert(
        self, tensor: str, shape: tuple[int, ...], name: str, pattern: str
    ) -> Place | None:
        """Of a tensor that holds one expert's part of a fused (expert, out, in) parameter."""
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        steps = [(type(op), getattr(op, "dim", None)) for op in converter.operations]
        head, star, tail = pattern.partition("*")
        key = apply_renamings(unwrapped(tensor), [*self._renamings])
        number = re.search(rf"{re.escape(head)}(\d+){re.escape(tail)}", key)
        whole = self.parameters[name]
        if steps not in ROWS_STAY_WHOLE or not star or number is None:
            return None
        expert, parts = int(number[1]), len(converter.source_patterns)
        if len(whole) != 3 or expert >= whole[0] or (whole[1] // parts, whole[2]) != shape:
            raise ArchitectureError(
                f"Tensor {tensor!r} has the shape {list(shape)}, which does not fit into the "
                f"{list(whole)} that config.json gives all experts together; use the config "
                "that was saved with the weights."
            )
        start = expert * whole[1] + converter.source_patterns.index(pattern) * shape[0]
        return Place(name, start, start + shape[0])

    def may_be_absent(self, tensor: str) -> bool:
        """Whether a whole checkpoint can lack `tensor`: a tied weight or a left-over buffer."""
        tensor = unwrapped(tensor)
        if tensor in self.tied or any(re.search(p, tensor) for p in self._ignored):
            return True
        return tensor not in self.parameters and tensor.endswith(
            ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")
        )


def unwrapped(tensor: str) -> str:
    """The name of `tensor` without what wrappers have put into it."""
    return WRAPPERS.sub("", tensor)


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


def build_empty(
    folder: Path, name: str, first: torch.dtype, wanted: torch.dtype | None = None
) -> PreTrainedModel:
    """The model that the config in `folder` describes, its weights on "meta".

    They have the types that transformers loads them in, into a model of the type `wanted` if that
    is said; `first` is that of the first weight, for a config that names none. Raises
    ArchitectureError for a model, called `name`, that transformers does not know without remote
    code.
    """
    try:
        # As many layers as the config says: a count that nobody has weights for may not end.
        with quiet_transformers(), torch.device("meta"), limited(LONGEST_BUILD):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            dtype = wanted or config.dtype or first
            model = _auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        # Whatever a config makes transformers raise, the user's next step is the same.
        raise ArchitectureError(
            f"transformers cannot build a causal language model from the config of "
            f"{name} (remote code is not run); pass a model that it has a class of: "
            f"{first_line(error)}"
        ) from None
    for pattern, kept in model._get_dtype_plan(dtype).items():  # some stay in float32
        for parameter, tensor in (*model.named_parameters(), *model.named_buffers()):
            if re.search(pattern.replace("*", ".*"), parameter):
                tensor.data = tensor.data.to(kept)
    return model.eval()


def architecture_of(model: PreTrainedModel) -> Architecture:
    """The architecture of `model`, whose weights may be on "meta"."""
    transforms = get_model_conversion_mapping(model)
    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    language = names.get(id(model.get_decoder()), "")
    return Architecture(
        model_type=model.config.model_type,
        dtype=model.dtype,
        linears=linear_maps(model),
        embedding=f"{names[id(model.get_input_embeddings())]}.weight",
        head=f"{names[id(head)]}.weight" if head is not None else "",
        tied=dict(model.all_tied_weights_keys),
        parameters={name: tuple(value.shape) for name, value in model.state_dict().items()},
        outside=tuple(
            f"{name}."
            for name, module in model.named_modules()
            if name and module is not head and not _related(name, language)
        ),
        settings=model.config.get_text_config().to_dict(),
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
