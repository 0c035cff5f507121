"""Run commands of sage-hub on a device that is not there, called `far`.

    python -m support.pretend_device long '["stats", "./base", …]' '["plan", "./base"]'

Its tensors lie and are computed on the CPU, but say that they are elsewhere, and what a GPU would
refuse is refused: an operation on tensors of two devices and, if told `short` as on MPS, numbers
in float64. A process of its own, as torch never forgets a device. Nothing can be trained there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "far"
LONG = sys.argv[1] == "long"
aten: Any = torch.ops.aten
# These may take a source, or an index, from the CPU.
CROSSING = {aten._to_copy, aten.copy_, aten.index, aten.index_put_}


class Far(Tensor):
    """A tensor on the device, whose numbers are `held` on the CPU."""

    held: Tensor
    is_cuda = LONG

    @staticmethod
    def __new__(cls, held: Tensor) -> Far:
        if held.dtype == torch.float64 and not LONG:
            raise TypeError("this device has no float64")
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=NAME
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Far({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    """Within it tensors can be made on the device, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """What `func` gives, on the device if its arguments are there."""
    leaves = tree_leaves((args, kwargs))
    tensors = [one for one in leaves if isinstance(one, Tensor)]
    far = [one for one in tensors if isinstance(one, Far)]
    wanted = [one.type for one in leaves if isinstance(one, torch.device)]
    kind = func.overloadpacket
    if (
        far
        and kind not in CROSSING
        and any(one.ndim for one in tensors if not isinstance(one, Far))
    ):
        raise RuntimeError(f"Expected all tensors to be on the same device, in {func}")
    goes = bool(far)
    if wanted:
        goes = wanted == [NAME]
    elif kind in CROSSING:
        goes = isinstance(args[0], Far)
        if kind is aten.index and far and not goes:
            raise RuntimeError("indices should be on the CPU, as what they are of")
    here = torch.device("cpu")

    def inner(one: Any) -> Any:
        if isinstance(one, torch.device) and one.type == NAME:
            return here
        return one.held if isinstance(one, Far) else one

    own: Any = tree_map(inner, (args, kwargs))
    if kind is aten.histc:  # of integers a GPU can make one, a CPU cannot
        return Far(func(own[0][0].float(), *own[0][1:], **own[1]).to(own[0][0].dtype))
    same = {id(one.held): one for one in far}  # what works in place gives its argument

    def outer(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        return same[id(one)] if id(one) in same else Far(one) if goes else one

    return tree_map(outer, func(*own[0], **own[1]))


@contextmanager
def no_gradients(mode: bool = True) -> Iterator[None]:
    """In place of inference mode, in which views of tensors like these are not possible."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not mode):
        yield


def appear() -> None:
    """From now on the device is there. To be called before what decorates with inference mode."""
    _setup_privateuseone_for_python_backend(NAME)
    torch.set_num_threads(1)
    torch.inference_mode = no_gradients


@contextmanager
def pretending() -> Iterator[None]:
    """Within it tensors can be made on the device."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor() makes its tensors there, then sends
    with Pretend():
        yield


if __name__ == "__main__":
    appear()
    from sage_hub.cli.main import main
    from support.quick import hurry

    hurry(setattr)
    with pretending():
        sys.exit(max(main([*json.loads(one), "--device", NAME]) for one in sys.argv[2:]))
