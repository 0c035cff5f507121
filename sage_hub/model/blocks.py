"""Run rows through a model of which one block of layers is in memory at a time.

The hidden states of all rows wait between two layers, so every weight is read once for all rows.
What happens before the first layer and behind the last one is the model's own code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sage_hub.checkpoint.index import Checkpoint
from sage_hub.errors import ArchitectureError
from sage_hub.model.filling import copied, filled, make_buffers, replaced
from sage_hub.model.known import known
from sage_hub.model.sites import Site, shapes_alone
from sage_hub.model.weights import Weights
from sage_hub.rows.encoding import Batch


@dataclass(frozen=True)
class Block:
    """The layers [begins, ends) of a decoder, or what is before them, behind them, or all."""

    begins: int
    ends: int
    starts: bool = False  # takes token ids, not hidden states
    finishes: bool = False  # gives the final hidden states
    parameters: tuple[str, ...] = ()  # what has to be in memory to run it


@dataclass(frozen=True)
class BlockModel:
    """A model on "meta", but for the block that is run and for what all blocks share."""

    model: PreTrainedModel
    device: str
    blocks: tuple[Block, ...]
    shared: tuple[str, ...]  # parameters and buffers of the decoder that are in no block
    _layers: tuple[str, ...]  # module names, in order
    _returns: tuple[int, ...] = ()  # of each layer: the length of its tuple, 0 for a tensor
    _behind: frozenset[str] = frozenset()  # modules that run behind the layers

    def sites_of(self, block: Block, sites: Sequence[Site]) -> list[Site]:
        """Those of `sites` whose input `block` computes."""
        return [site for site in sites if self._home(site) is block]

    @contextmanager
    def holding(
        self, block: Block, weights: Weights, *, head: bool = False, variant: bool = False
    ) -> Iterator[None]:
        """Within it the weights of `block` are in memory, for the last with those of the head.

        Of a `variant`, other weights than the model was opened with, what all blocks share too.
        """
        names = list(block.parameters)
        if head and block.finishes:
            names += _state_of(self.model, self.model.get_output_embeddings())
        own = self.shared if variant else ()
        with (
            replaced(self.model, own, lambda name, now: weights(name).to(now)),
            filled(self.model, names, weights, self.device),
        ):
            yield

    @contextmanager
    def whole(self, weights: Weights) -> Iterator[BlockModel]:
        """Within it all weights are in memory: the same model as one block, fit to generate.

        Whatever is done to its weights ends with it.
        """
        names = tuple(name for block in self.blocks for name in block.parameters)
        names += tuple(_state_of(self.model, self.model.get_output_embeddings()))
        block = Block(0, 0, starts=True, finishes=True, parameters=names)
        with copied(self.model, self.shared), filled(self.model, names, weights, self.device):
            yield replace(self, blocks=(block,), _layers=())

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """What the model makes of final hidden states: (n, features) -> (n, vocabulary).

        By its own code behind the decoder, so with all that it does to logits. The last block
        must be held with its head.
        """
        output = _Output(states.unsqueeze(0))
        ids = torch.zeros(1, len(states), dtype=torch.long, device=self.device)
        with ExitStack() as changes:
            _replace_forward(self.model.get_decoder(), lambda *_, **__: output, changes)
            return cast(Tensor, self.model(input_ids=ids, use_cache=False).logits[0])

    @torch.inference_mode()
    def run(self, block: Block, batch: Batch, hidden: Tensor | None) -> Tensor:
        """The hidden states (rows, tokens, features) behind `block` from the `hidden` before it.

        The first block takes none; those behind the last one are final, and fit for `logits`.
        """
        options: dict[str, Any] = {
            "attention_mask": batch.mask.to(self.device),
            "use_cache": False,
        }
        if block.starts:
            options["input_ids"] = batch.ids.to(self.device)
        else:
            # Only their shape matters, as what becomes of them is replaced by `hidden`.
            width = self.model.get_input_embeddings().weight.shape[1]
            shape, dtype = (*batch.ids.shape, width), self.model.dtype
            options["inputs_embeds"] = torch.zeros(shape, dtype=dtype, device=self.device)
        try:
            with self._alone(block, None if hidden is None else hidden.to(self.device)):
                found: Tensor = self.model.get_decoder()(**options)[0]
        except _Reached as reached:
            return reached.hidden
        return found

    @contextmanager
    def _alone(self, block: Block, hidden: Tensor | None) -> Iterator[None]:
        """Within it the layers before `block` hand on `hidden`, and its end is a _Reached."""
        layers = [self.model.get_submodule(name) for name in self._layers]

        def handing_on(returns: int) -> Any:
            return lambda *_, **__: (hidden, *[None] * (returns - 1)) if returns else hidden

        def taking_hidden(forward: Any) -> Any:
            return lambda _, *args, **options: forward(hidden, *args, **options)

        def reached(arrived: Tensor, *_: Any, **__: Any) -> None:
            raise _Reached(arrived)

        with ExitStack() as changes:
            for layer, returns in zip(layers[: block.begins], self._returns, strict=False):
                _replace_forward(layer, handing_on(returns), changes)
            if block.begins == 0 and not block.starts:
                _replace_forward(layers[0], taking_hidden(layers[0].forward), changes)
            if block.ends == 0 and not block.finishes:
                _replace_forward(layers[0], reached, changes)
            elif not block.finishes:
                changes.enter_context(
                    layers[block.ends - 1].register_forward_hook(
                        lambda _, __, output: reached(_first(output))
                    )
                )
            yield

    def _home(self, site: Site) -> Block:
        for number, name in enumerate(self._layers):
            if site.name.startswith(f"{name}."):
                return next(b for b in self.blocks if b.begins <= number < b.ends)
        return self.blocks[-1 if site.name in self._behind else 0]


class _Output:
    """What a decoder returns, with final hidden states and nothing else that one could ask for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, place: Any) -> Any:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


class _Reached(Exception):  # noqa: N818 - no error
    """The end of a block: nothing behind it has to run."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@contextmanager
def open_blocks(
    checkpoint: Checkpoint, weights: Weights, device: str, dtype: torch.dtype | None = None
) -> Iterator[BlockModel]:
    """The model of `checkpoint`, cut into layers, to be run on `device` in `dtype` or as stored.

    A decoder whose layers do not simply hand on their hidden states is one block.
    """
    found = replace(cut(checkpoint.of_model.empty_model(dtype)), device=device)
    make_buffers(found.model, device)
    with filled(found.model, found.shared, weights, device):
        yield found


def cut(model: PreTrainedModel) -> BlockModel:
    """The blocks of `model`, whose weights are on "meta"."""
    decoder: Any = model.get_decoder()
    place = next(name for name, module in model.named_modules() if module is decoder)
    parameters = _state_of(model, decoder)
    whole = Block(0, 0, starts=True, finishes=True, parameters=tuple(parameters))
    in_one = BlockModel(model, "meta", (whole,), (), ())
    lists = [
        f"{place}.{name}".removeprefix(".")
        for name, module in decoder.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == decoder.config.num_hidden_layers
    ]
    if len(lists) != 1:
        return in_one
    count = decoder.config.num_hidden_layers
    layers = tuple(f"{lists[0]}.{number}" for number in range(count))
    own = [tuple(_state_of(model, model.get_submodule(name))) for name in layers]
    embedding = tuple(_state_of(model, model.get_input_embeddings()))
    blocks = (
        Block(0, 0, starts=True, parameters=embedding),
        *(Block(i, i + 1, parameters=names) for i, names in enumerate(own)),
        Block(count, count, finishes=True),
    )
    in_blocks = {name for block in blocks for name in block.parameters}
    shared = tuple(name for name in parameters if name not in in_blocks)
    found = BlockModel(model, "meta", blocks, shared, layers)

    def read(shown: Any) -> BlockModel:
        if shown is None:
            return in_one
        return replace(found, _returns=tuple(shown["returns"]), _behind=frozenset(shown["behind"]))

    return known(model, "blocks", lambda: _shown(found), read)


def _shown(found: BlockModel) -> dict[str, Any] | None:
    """How the layers hand on, and what runs behind them; None for a model of one block."""
    proved = _proved(found)
    if proved is None:
        return None
    return {"returns": list(proved._returns), "behind": sorted(proved._behind)}


def _proved(found: BlockModel) -> BlockModel | None:
    """`found`, with what a run on shapes shows of it; None if its layers can't be run one by one.

    Each must take what the one before gives, and need nothing else of it.
    """
    model, decoder = found.model, found.model.get_decoder()
    taken: list[Tensor] = []
    given: list[Any] = []
    behind: set[str] = set()
    layers = [model.get_submodule(name) for name in found._layers]
    beside = {
        name: module
        for name, module in model.named_modules()
        if name and not name.startswith(tuple(f"{layer}." for layer in found._layers))
    }

    def note(name: str) -> Any:
        return lambda *_: behind.add(name) if len(given) == len(layers) else None

    try:
        with ExitStack() as hooks, shapes_alone(model) as ids:
            for layer in layers:
                hooks.enter_context(
                    layer.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
                )
                hooks.enter_context(
                    layer.register_forward_hook(lambda _, __, output: given.append(output))
                )
            for name, module in beside.items():
                hooks.enter_context(module.register_forward_pre_hook(note(name)))
            decoder(input_ids=ids, use_cache=False)
        handed_on = zip(given, taken[1:], strict=False)
        if len(taken) != len(layers) or any(_first(out) is not x for out, x in handed_on):
            return None
        returns = tuple(len(out) if isinstance(out, tuple) else 0 for out in given)
        found = replace(found, _returns=returns, _behind=frozenset(behind))
        with shapes_alone(model) as ids:
            batch = Batch(ids, torch.ones_like(ids), torch.ones_like(ids), (0,))
            hidden = None
            for block in found.blocks:
                hidden = found.run(block, batch, hidden)
    except (ArchitectureError, IndexError):
        return None
    return found


def _first(output: Any) -> Any:
    """The hidden states in what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


def _replace_forward(module: Any, forward: Any, changes: ExitStack) -> None:
    module.forward = forward
    changes.callback(delattr, module, "forward")


def _state_of(model: PreTrainedModel, module: nn.Module | None) -> list[str]:
    """The names of the parameters and buffers of `module`, as checkpoints have them."""
    if module is None:
        return []
    place = next(name for name, m in model.named_modules() if m is module)
    return [f"{place}.{name}".removeprefix(".") for name in module.state_dict(keep_vars=True)]
