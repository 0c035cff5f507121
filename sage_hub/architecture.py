"""Which linear map each tensor belongs to and which maps share an input, asked of transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from sage_hub.checkpoint import Checkpoint
from sage_hub.errors import ArchitectureError


@dataclass(frozen=True)
class Linear:
    """A linear map y = W x (+ b): its weight is stored (in, out) if `transposed`, as GPT-2's."""

    features: int  # in
    transposed: bool


@dataclass(frozen=True)
class Site:
    """A place whose input is observed once, and the linear modules that it feeds."""

    name: str  # the first of its modules
    modules: tuple[str, ...]
    size: int  # input features


@dataclass(frozen=True)
class Architecture:
    """The parameters of a model class, and how checkpoint names map to them."""

    model_type: str
    linears: dict[str, Linear]  # module name -> map; the LM head is not among them
    embedding: str  # parameter name of the token embedding
    head: str  # parameter name of the LM head's weight, "" if there is none
    tied: frozenset[str]  # parameters that a checkpoint may leave out, equal to others
    parameters: dict[str, tuple[int, ...]]  # parameter or buffer name -> shape
    _renamings: tuple[WeightRenaming, ...]
    _converters: tuple[WeightConverter, ...]
    _prefix: str
    _ignored: tuple[str, ...]

    def parameter(self, tensor: str) -> str | None:
        """The parameter that checkpoint tensor `tensor` becomes, one to one.

        None if the model has no such parameter, or if transformers merges or splits the tensor
        when it loads it.
        """
        if tensor in self.parameters:
            return tensor
        name, merged = rename_source_key(
            tensor, [*self._renamings], [*self._converters], self._prefix, self.parameters
        )
        return name if merged is None and name in self.parameters else None

    def linear_of(self, tensor: str) -> tuple[str, Linear] | None:
        """The module whose weight `tensor` is, and its map; None if it is no linear weight."""
        parameter = self.parameter(tensor)
        if parameter is None or not parameter.endswith(".weight"):
            return None
        module = parameter.removesuffix(".weight")
        linear = self.linears.get(module)
        return None if linear is None else (module, linear)

    def may_be_absent(self, tensor: str) -> bool:
        """Whether a whole checkpoint can lack `tensor`: a tied weight or a left-over buffer."""
        parameter = self.parameter(tensor)
        if parameter in self.tied or any(re.search(p, tensor) for p in self._ignored):
            return True
        return parameter is None and tensor.endswith(("rotary_emb.inv_freq", ".masked_bias"))


def linear_modules(model: PreTrainedModel) -> dict[str, Linear]:
    """All linear maps of `model` but the LM head, by module name."""
    head = model.get_output_embeddings()
    return {
        name: Linear(
            module.nx if isinstance(module, Conv1D) else module.in_features,
            transposed=isinstance(module, Conv1D),
        )
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def read_architecture(checkpoint: Checkpoint) -> Architecture:
    """The architecture of `checkpoint` from its config alone; no weight is read or allocated.

    Raises ArchitectureError for one that transformers does not know without remote code.
    """
    checkpoint.config  # noqa: B018 - its own errors are clearer than transformers'
    folder = checkpoint.files.path("config.json").parent
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        # Whatever a config makes transformers raise, the user's next step is the same.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ArchitectureError(
            f"transformers cannot build a causal language model from the config of "
            f"{checkpoint.name} (remote code is not run): {reason}"
        ) from None
    transforms = get_model_conversion_mapping(model)
    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tied: Any = getattr(model, "_tied_weights_keys", None) or {}
    return Architecture(
        model_type=config.model_type,
        linears=linear_modules(model),
        embedding=f"{names[id(model.get_input_embeddings())]}.weight",
        head=f"{names[id(head)]}.weight" if head is not None else "",
        tied=frozenset(tied if config.get_text_config().tie_word_embeddings else ()),
        parameters={name: tuple(value.shape) for name, value in model.state_dict().items()},
        _renamings=tuple(t for t in transforms if isinstance(t, WeightRenaming)),
        _converters=tuple(t for t in transforms if isinstance(t, WeightConverter)),
        _prefix=model.base_model_prefix,
        _ignored=tuple(model._keys_to_ignore_on_load_unexpected or ()),
    )


def load_model(checkpoint: Checkpoint, device: str) -> PreTrainedModel:
    """The model of `checkpoint`, in its stored dtype, on `device`, ready for inference."""
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint.model_folder(),
                dtype="auto",
                use_safetensors=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ArchitectureError(f"transformers cannot load {checkpoint.name}: {reason}") from None
    return model.to(device).eval()


@torch.inference_mode()
def find_sites(model: PreTrainedModel) -> list[Site]:
    """The sites of `model`, seen in one short forward pass.

    Modules that are given the very same tensor share a site: q, k and v; gate and up. A module
    that the pass does not reach has no site.
    """
    linears = linear_modules(model)
    seen: dict[int, list[str]] = {}
    alive: list[Tensor] = []  # so that no id is used twice

    def note(name: str) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            alive.append(args[0])
            modules = seen.setdefault(id(args[0]), [])
            if name not in modules:
                modules.append(name)

        hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(hook))

    with ExitStack() as hooks:
        for name in linears:
            note(name)
        ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
        model.base_model(input_ids=ids, use_cache=False)
    return [
        Site(modules[0], tuple(modules), linears[modules[0]].features) for modules in seen.values()
    ]


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
