"""Pretend CUDA devices where there are none: their tensors say `cuda:0`, compute on the CPU and refuse what CUDA would.

    with fake_cuda() as fake:
        x = torch.ones(3, device="cuda:0")      # always so: a bare "cuda" and a bare 0 ask the driver
        x + torch.ones(3)                       # RuntimeError: two devices
        x.numpy()                               # RuntimeError
        with aside():                           # for what uses the device `meta` itself, such as `from_pretrained`
            model = load()
        model.to("cuda:0")
    fake.waits                                  # Counter of (file:line, operator): how often the host would have waited
    fake.calls                                  # operators run on the device, views among them
    with fake_cuda(devices=2) as fake:          # `cuda:0` and `cuda:1`
        torch.ones(3, device="cuda:0") + torch.ones(3, device="cuda:1")  # RuntimeError, but `to` and `copy_` cross
    fake.devices[1].peak                        # most bytes held by one of them, which has waits and calls of its own

Refused: operators over tensors of two devices, but for copies, index tensors on the CPU, and CPU tensors without
dimensions in pointwise operators; CPU generators for numbers on a device; numpy; more than `memory` bytes on a device
(torch.OutOfMemoryError).  Not seen: races, streams, what kernels cannot do or round otherwise, their own memory and
waits (but for WAITS), and which devices can reach each other's memory.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as aside  # noqa: F401

DEVICE = torch.device("cuda:0")
AWAY = ("cuda", "meta")  # torch's C++ takes `cuda:1` for `meta:1`: a build without CUDA cannot ask about another
aten = torch.ops.aten
COPIES = {aten.copy_, aten._foreach_copy_}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
SCALARS = {aten.fill, aten.fill_, aten.masked_fill, aten.masked_fill_, aten.index_fill, aten.index_fill_, aten.where}
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.bincount, aten._linalg_eigh}
current: "Seen | None" = None


class OnDevice(Tensor):
    """A tensor that says it lies on a device, `cuda:{number}`; its numbers are in `near`, on the CPU."""

    near: Tensor
    number: int
    is_cuda, is_meta = True, False  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    __repr__ = object.__repr__  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor, number: int) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=torch.device("meta", number), requires_grad=inner.requires_grad,
        )  # fmt: skip
        made.near, made.number = inner, number
        if current:
            current.devices[number].hold(inner.untyped_storage(), 1)
        return made

    def __del__(self) -> None:
        if current and hasattr(self, "near") and self.number < len(current.devices):
            current.devices[self.number].hold(self.near.untyped_storage(), -1)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", self.number)

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
    goal = _goal(kwargs.get("device"), far)
    assert not any(x.device.type == "meta" for x in near), f"{func} of a tensor that was made past the pretence"
    if not far and goal is None:
        return func(*args, **kwargs)
    written = [kwargs.get(name, *args[i : i + 1]) for i, name in _writes(func)]
    _check(func, args, far, near, leaves(written))
    if far and any(isinstance(x, torch.Generator) and x.device.type == "cpu" for x in given):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu': {func}")
    there = packet is aten._to_copy and far and far[0].number == goal
    if there and kwargs.get("dtype", far[0].dtype) == far[0].dtype:
        return far[0]
    if current:
        own = current.devices[far[0].number if goal is None else goal]
        own.note(func, args, kwargs, bool(far), bool(near), goal is not None)
    result = func(*mapped(_inside, args), **mapped(_inside, kwargs))
    if written:  # in place, or with out=
        for x in leaves(written):
            assert not isinstance(x, OnDevice) or x.shape == x.near.shape, f"{func} changed a shape in place"
        return None if not func._schema.returns else written[0] if len(written) == 1 else tuple(written)
    return result if goal is None else mapped(lambda x: OnDevice(x, goal) if isinstance(x, Tensor) else x, result)


@cache
def _writes(func: Any) -> list[tuple[int, str]]:
    """The number and the name of each argument that an operator writes into."""
    schema = enumerate(func._schema.arguments)
    return [(i, each.name) for i, each in schema if each.alias_info and each.alias_info.is_write]


def _goal(asked: Any, far: list[OnDevice]) -> int | None:
    """The number of the device on which a result lies; None: the CPU."""
    if asked is None:
        return far[0].number if far else None
    return numbered(asked) if torch.device(asked).type in AWAY else None


def numbered(device: Any) -> int:
    """The number of a device that is given as torch takes it; none is the current one."""
    number = device if isinstance(device, int | None) else torch.device(device).index
    if number is None:
        return current.current if current else 0
    if current and number >= len(current.devices):
        raise RuntimeError(f"CUDA error: invalid device ordinal: {number}")
    return number


def _check(func: Any, args: Any, far: list[OnDevice], near: list[Tensor], written: list[Any]) -> None:
    """Raises RuntimeError for tensors of two devices where CUDA would."""
    crossing = len({x.number for x in far}) > 1 and func.overloadpacket not in COPIES
    if crossing or far and near and not _may_mix(func, args, near, written):
        kinds = [f"{x.device} {tuple(x.shape)}" for x in (*far, *near)]
        raise RuntimeError(f"Expected all tensors to be on the same device, but found two: {func} of {kinds}")


def _with_tensors(index: Any) -> Any:
    """An index with its lists as tensors: torch would make them of no numbers, as for `meta`."""
    items = index if isinstance(index, tuple) else (index,)
    return tuple(_numbers(i) if isinstance(i, list | range) else i for i in items)


def _numbers(index: list[int] | range) -> Tensor:
    """A list of numbers, or of bools, as a tensor; an empty one is of numbers."""
    return torch.tensor(index, device="cpu") if len(index) else torch.zeros(0, dtype=torch.int64)


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


class SeenOn:
    """What one device of so many bytes was asked to do."""

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


class Seen:
    """What every device was asked to do, and all of them together."""

    def __init__(self, memory: int, devices: int):
        self.devices, self.current = [SeenOn(memory) for _ in range(devices)], 0

    @property
    def waits(self) -> Counter[Any]:
        return sum((each.waits for each in self.devices), Counter())

    @property
    def calls(self) -> Counter[Any]:
        return sum((each.calls for each in self.devices), Counter())

    def exchange(self, number: int) -> int:
        """Makes another device the current one, unless below 0; returns the one that was."""
        before = self.current
        self.current = before if number < 0 else numbered(number)
        return before


class Stream:
    """Of a device that is never late: an event in it has always happened."""

    def record_event(self) -> "Stream":
        return self

    def synchronize(self) -> None:
        pass


def _about_cuda(seen: Seen) -> dict[str, Any]:
    """What `torch.cuda` says of the devices."""

    def of(device: Any) -> SeenOn:
        return seen.devices[numbered(device)]

    return {
        "_lazy_init": lambda: None, "empty_cache": lambda: None, "synchronize": lambda device=None: None,
        "device_count": lambda: len(seen.devices), "current_device": lambda: seen.current,
        "set_device": lambda device: seen.exchange(numbered(device)),
        "_exchange_device": seen.exchange, "_maybe_exchange_device": seen.exchange,
        "current_stream": lambda device=None: Stream(),
        "mem_get_info": lambda device=None: (of(device).memory - of(device).held, of(device).memory),
        "max_memory_allocated": lambda device=None: of(device).peak,
        "get_device_name": lambda device=None: f"fake CUDA {numbered(device)}",
    }  # fmt: skip


@contextmanager
def fake_cuda(memory: int = 2**40, devices: int = 1) -> Iterator[Seen]:
    """So many devices in this context, each of so many bytes, and what they are asked to do."""
    global current
    current, run_thread, make = (seen := Seen(memory, devices)), threading.Thread.run, torch.tensor

    def with_mode(thread: threading.Thread) -> None:
        with _Mode():
            run_thread(thread)

    def pin(x: Any) -> Tensor:
        pinned = x.clone()
        pinned.is_pinned_copy = True
        return pinned

    def tensor(data: Any, *, device: Any = None, **rest: Any) -> Tensor:  # torch's own asks the driver
        return make(data, device="cpu", **rest).to(device or torch.empty(0).device)

    pinning, threads = patch.object(Tensor, "pin_memory", pin), patch.object(threading.Thread, "run", with_mode)
    about, making = patch.multiple(torch.cuda, **_about_cuda(seen)), patch.object(torch, "tensor", tensor)
    try:
        with about, making, pinning, threads, _Mode():
            yield seen
    finally:
        current = None


def where() -> str:
    """The innermost line of code that is in no installed package, as file:line."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename == __file__ or "/site-packages/" in frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
