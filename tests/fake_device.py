"""A pretend CUDA device where there is none: its tensors say `cuda:0`, compute on the CPU and refuse what CUDA would.

    with fake_cuda() as fake:
        x = torch.ones(3, device="cuda:0")      # always with the index: a bare "cuda" asks the driver
        x + torch.ones(3)                       # RuntimeError: two devices
        x.numpy()                               # RuntimeError
        with aside():                           # for what uses the device `meta` itself, such as `from_pretrained`
            model = load()
        model.to("cuda:0")
    fake.waits                                  # Counter of (file:line, operator): how often the host would have waited
    fake.calls, fake.peak                       # operators run on the device, views among them; most bytes held

Refused: operators over tensors of both devices, but for copies, index tensors on the CPU, and CPU tensors without
dimensions in pointwise operators; CPU generators for numbers on the device; numpy; more than `memory` bytes
(torch.OutOfMemoryError).  Not seen: races, streams, what kernels cannot do or round otherwise, their own memory and
waits (but for WAITS), and several devices.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as aside  # noqa: F401

DEVICE = torch.device("cuda:0")
AWAY = ("cuda", "meta")  # torch's C++ takes DEVICE for `meta`: a build without CUDA cannot ask about another
aten = torch.ops.aten
COPIES = {aten.copy_, aten._foreach_copy_}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
SCALARS = {aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_, aten.index_fill, aten.index_fill_, aten.where}
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.bincount, aten._linalg_eigh}
current: "Seen | None" = None


class OnDevice(Tensor):
    """A tensor that says it lies on DEVICE; its numbers are in `near`, on the CPU."""

    near: Tensor
    device, is_cuda, is_meta = DEVICE, True, False  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    __repr__ = object.__repr__  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=torch.device("meta"), requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.near = inner
        if current:
            current.hold(inner.untyped_storage(), 1)
        return made

    def __del__(self) -> None:
        if current and hasattr(self, "near"):
            current.hold(self.near.untyped_storage(), -1)

    def tolist(self) -> Any:  # torch gives its own to no subclass
        return self.cpu().tolist()

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_with_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_with_tensors(index), value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):  # for operators without a tensor of the device among their arguments: `torch.zeros`
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def leaves(x: Any) -> list[Any]:
    """What lies in lists, tuples and dicts of arguments: as torch's `tree_leaves`, in a fraction of its time."""
    if isinstance(x, list | tuple | dict):
        return [leaf for part in (x.values() if isinstance(x, dict) else x) for leaf in leaves(part)]
    return [x]


def mapped(change: Callable[[Any], Any], x: Any) -> Any:
    """The same lists, tuples and dicts with each leaf changed."""
    if isinstance(x, dict):
        return {name: mapped(change, part) for name, part in x.items()}
    if isinstance(x, list | tuple):
        parts = [mapped(change, part) for part in x]
        return parts if isinstance(x, list) else tuple(parts)
    return change(x)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operator on the CPU, its result on the device where CUDA's would lie; raises where CUDA would."""
    packet, given = func.overloadpacket, leaves((args, kwargs))
    far = [x for x in given if isinstance(x, OnDevice)]
    near = [x for x in given if isinstance(x, Tensor) and not isinstance(x, OnDevice)]
    to_device = torch.device(kwargs["device"]).type in AWAY if kwargs.get("device") is not None else bool(far)
    schema = enumerate(func._schema.arguments)
    written = [kwargs.get(a.name, *args[i : i + 1]) for i, a in schema if a.alias_info and a.alias_info.is_write]
    assert not any(x.device.type == "meta" for x in near), f"{func} of a tensor that was made past the pretence"
    if far and near and not _may_mix(func, args, near, leaves(written)):
        kinds = [f"{x.device} {tuple(x.shape)}" for x in (*far, *near)]
        raise RuntimeError(f"Expected all tensors to be on the same device, but found two: {func} of {kinds}")
    if far and any(isinstance(x, torch.Generator) and x.device.type == "cpu" for x in given):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu': {func}")
    if packet is aten._to_copy and far and to_device and kwargs.get("dtype", far[0].dtype) == far[0].dtype:
        return far[0]  # it is there already
    if current and (far or to_device):
        current.note(func, args, kwargs, bool(far), bool(near), to_device)
    result = func(*mapped(_inside, args), **mapped(_inside, kwargs))
    if written:  # in place, or with out=
        for x in leaves(written):
            assert not isinstance(x, OnDevice) or x.shape == x.near.shape, f"{func} changed a shape in place"
        return None if not func._schema.returns else written[0] if len(written) == 1 else tuple(written)
    return mapped(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, result) if to_device else result


def _with_tensors(index: Any) -> Any:
    """An index with its lists as tensors: torch would make them of no numbers, as for `meta`."""
    items = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(i, device="cpu") if isinstance(i, list | range) else i for i in items)


def _inside(x: Any) -> Any:
    away = isinstance(x, torch.device) and x.type in AWAY
    return x.near if isinstance(x, OnDevice) else torch.device("cpu") if away else x


def _may_mix(func: Any, args: Any, near: list[Tensor], written: list[Any]) -> bool:
    """Whether CUDA takes these tensors of the CPU beside its own."""
    packet = func.overloadpacket
    if packet in INDEXED:
        values = [x for x in args[2:] if isinstance(x, Tensor)]
        return isinstance(args[0], OnDevice) and all(isinstance(x, OnDevice) or not x.dim() for x in values)
    scalars = torch.Tag.pointwise in func.tags and all(isinstance(x, OnDevice) for x in written) or packet in SCALARS
    return packet in COPIES or scalars and not any(x.dim() for x in near)


class Seen:
    """What a device of so many bytes was asked to do."""

    def __init__(self, memory: int):
        self.memory, self.held, self.peak = memory, 0, 0
        self.holders, self.waits, self.calls = (Counter[Any]() for _ in range(3))  # holders: tensors on each storage

    def hold(self, storage: Any, more: int) -> None:
        """Counts a tensor that came into being on a storage (1), or went (-1), and with the last the storage."""
        before = self.holders[storage._cdata]
        self.holders[storage._cdata] = max(0, before + more)  # one that is let go may be of an earlier device
        self.held += storage.nbytes() * ((before == 0 and more > 0) - (before == 1 and more < 0))
        self.peak = max(self.peak, self.held)
        if more > 0 and self.held > self.memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory. {self.held:,} bytes asked of {self.memory:,}")

    def note(self, func: Any, args: Any, kwargs: Any, far: bool, near: bool, to_device: bool) -> None:
        """Counts an operator, and whether the host waits for the device."""
        packet = func.overloadpacket
        self.calls[str(func)] += 1
        waits = packet in WAITS and far
        if packet is aten._to_copy and to_device != far or packet in COPIES and near:
            crossing = [x for x in leaves(args[packet in COPIES]) if x.dim()]
            pinned = all(hasattr(x, "is_pinned_copy") for x in crossing)
            pinned |= packet is aten._to_copy and far  # torch pins what it makes on the host in such a copy
            waits = bool(crossing) and not (pinned and kwargs.get("non_blocking"))
        elif packet in INDEXED and far:
            indices = [x for x in args[1] if isinstance(x, Tensor)]
            waits = any(not isinstance(x, OnDevice) or x.dtype in (torch.bool, torch.uint8) for x in indices)
        self.waits += Counter([(where(), str(func))] * waits)


class Stream:
    """Of a device that is never late: an event in it has always happened."""

    def record_event(self) -> "Stream":
        return self

    def synchronize(self) -> None:
        pass


@contextmanager
def fake_cuda(memory: int = 2**40) -> Iterator[Seen]:
    """The device in this context, and what it is asked to do."""
    global current
    current, run_thread, make = (seen := Seen(memory)), threading.Thread.run, torch.tensor

    def with_mode(thread: threading.Thread) -> None:
        with _Mode():
            run_thread(thread)

    def pin(x: Any) -> Tensor:
        pinned = x.clone()
        pinned.is_pinned_copy = True
        return pinned

    def tensor(data: Any, *, device: Any = None, **rest: Any) -> Tensor:  # torch's own asks the driver
        return make(data, device="cpu", **rest).to(device or torch.empty(0).device)

    about: dict[str, Any] = {
        "_lazy_init": lambda: None, "empty_cache": lambda: None, "synchronize": lambda device=None: None,
        "mem_get_info": lambda device=None: (seen.memory - seen.held, seen.memory),
        "current_stream": lambda device=None: Stream(),
        "max_memory_allocated": lambda device=None: seen.peak, "get_device_name": lambda device=None: "fake CUDA",
    }  # fmt: skip
    pinning, threads = patch.object(Tensor, "pin_memory", pin), patch.object(threading.Thread, "run", with_mode)
    try:
        with patch.multiple(torch.cuda, **about), patch.object(torch, "tensor", tensor), pinning, threads, _Mode():
            yield seen
    finally:
        current = None


def where() -> str:
    """The innermost line of code that is in no installed package, as file:line."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename == __file__ or "/site-packages/" in frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
