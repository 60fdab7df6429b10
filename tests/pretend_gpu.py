"""Run train.py on a pretended GPU: tensors that say they lie on another device, compute on the CPU, and refuse to meet those that do not.

    python tests/pretend_gpu.py --stage sae --dtype bfloat16 …          # any options of train.py; --device is given here

What it finds is the commonest bug of code that was only ever run on a CPU: a tensor made on the wrong device. An operation on tensors of
both devices raises, with the exceptions that CUDA makes: 0-dimensional CPU tensors, copies, and CPU indices of a GPU tensor. What it cannot
find: kernels that CUDA lacks, memory, speed; autocast, which is left out here, and --rlhf-recompute, whose backward pass leaves Python's modes.
"""

import contextlib
import functools
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).parent.parent))

_setup_privateuseone_for_python_backend("pretend")
DEVICE, HELD_ON = torch.device("pretend", 0), torch.device("cpu")
COPIES = ("aten::copy_", "aten::_to_copy")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class OnDevice(torch.Tensor):
    """A tensor on the pretended device; `held` is the same on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    is_cuda = property(lambda self: True)            # so that the code takes the ways it takes on a GPU

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "OnDevice":
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
                                                   dtype=held.dtype, device=DEVICE)

    def __init__(self, held: torch.Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return call(func, args, kwargs or {})

    def __reduce_ex__(self, protocol: int) -> Any:   # saved as what torch.load(map_location="cpu") would give
        return self.held.detach().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"


class PretendGPU(TorchDispatchMode):
    """Within it `device="pretend:0"` makes such tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return call(func, args, kwargs or {})


def held(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


def each(function: Any, x: Any) -> Any:
    """-> x, in which `function` has been at every leaf of nested lists, tuples and dicts; PyTorch's tree_map is five times slower."""
    if isinstance(x, (list, tuple)):
        return type(x)([each(function, part) for part in x])
    return {key: each(function, part) for key, part in x.items()} if isinstance(x, dict) else function(x)


def perform(func: Any, args: tuple, kwargs: dict) -> Any:
    """One operation on the tensors held; memory.py has another in its place."""
    return func(*args, **kwargs)


def call(func: Any, args: tuple, kwargs: dict) -> Any:
    """-> what one operation gives, on the device of its inputs, or the one that it names."""
    name, tensors = func._schema.name, []
    each(lambda x: tensors.append(x) if isinstance(x, torch.Tensor) else None, [args, kwargs])
    there, here = [x for x in tensors if isinstance(x, OnDevice)], [x for x in tensors if not isinstance(x, OnDevice)]
    if there and name not in COPIES:
        refuse_mixture(name, args, here)
    if name == "aten::_local_scalar_dense":          # .item()
        return perform(func, (held(args[0]),), {})
    on_device = isinstance(args[0], OnDevice) if name in COPIES else bool(there)
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = kwargs | {"device": HELD_ON if on_device else kwargs["device"]}
    out = perform(func, each(held, args), each(held, kwargs))
    if not on_device:
        return args[0] if name == "aten::copy_" else out
    wrapped = each(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there and returns_an_input(func) else wrapped


@functools.cache
def returns_an_input(func: Any) -> bool:
    """-> whether it gives an input back, or a view of one."""
    return any(result.alias_info for result in func._schema.returns)


def refuse_mixture(name: str, args: tuple, here: list[torch.Tensor]) -> None:
    """CUDA's rule: one device, but for CPU scalars that are only read, and CPU indices."""
    if name in INDEXING and isinstance(args[0], OnDevice):
        here = [x for x in args[2:3] if isinstance(x, torch.Tensor) and not isinstance(x, OnDevice)]
    if any(x.dim() for x in here) or name.endswith("_") and isinstance(args[0], torch.Tensor) and not isinstance(args[0], OnDevice):
        raise RuntimeError(f"{name}: expected all tensors on one device, found {DEVICE} and cpu")


def through_the_cpu(function: Any) -> Any:
    """torch.tensor and Tensor.tolist go past every Python mode; a GPU's tensor passes through the CPU there anyway."""
    def wrapped(x: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        out = function(x.cpu() if isinstance(x, OnDevice) else x, *args, **kwargs)
        return out if device is None else out.to(device)
    return wrapped


def no_autocast(autocast: Any) -> Any:
    return lambda kind, *args, **kwargs: contextlib.nullcontext() if kind == DEVICE.type else autocast(kind, *args, **kwargs)


def patch() -> None:
    """Change what goes past `PretendGPU` in PyTorch, in this process."""
    torch.tensor, torch.Tensor.tolist, torch.autocast = through_the_cpu(torch.tensor), through_the_cpu(torch.Tensor.tolist), no_autocast(torch.autocast)
    # Where a tensor is indexed by a list, PyTorch makes it on the device by these two, below every Python mode.
    OnDevice.kernels = library = torch.library.Library("aten", "IMPL")          # kept, else they are taken back
    library.impl("empty_strided", lambda size, stride, dtype=None, **_: OnDevice(torch.empty_strided(size, stride, dtype=dtype)), "PrivateUse1")
    library.impl("copy_", lambda self, other, non_blocking=False: (self.held.copy_(held(other)), self)[1], "PrivateUse1")


def main(argv: list[str]) -> int:
    """-> train.py's exit code."""
    import train
    patch()
    with PretendGPU():
        return train.main([*argv, "--device", str(DEVICE)])


def leave(code: int) -> None:
    """End the process at once: at an ordinary exit PyTorch now and then aborts, for autograd's thread of the pretended device still runs."""
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
