"""Where the activations of a run lie: device memory, host RAM, or a pool that mixes them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from streamprobe.activations.store import CHUNK_TOKENS, LEAST_TOKENS, MIXING_TOKENS, Sizes
from streamprobe.errors import InputError
from streamprobe.system.hardware import free_bytes


class Plan(NamedTuple):
    """Where the tokens of the train and validation splits lie."""

    rows: int  # tokens that the train pool holds
    keep_train: bool  # the whole train split fits: the model runs over it once
    keep_validation: bool
    home: torch.device  # where the kept tokens or the pool lie


class Reserve(NamedTuple):
    """Bytes that a run fills for a while, beside the activations that it keeps and what its solvers hold."""

    device: int = 0  # in a pass: a batch in the model, and a chunk of tokens on its way through the solvers
    host: int = 0  # after a pass: scores of all probes, or a checkpoint that is being written

    def on(self, home: torch.device, device: torch.device) -> int:
        """Those of them that lie on `home`, in a run on `device`."""
        return max(self.device * (home == device), self.host * (home.type == "cpu"))


NO_RESERVE = Reserve()


def estimate_reserve(
    sizes: Sizes, batch: tuple[int, int], intermediate: int, n_evaluated: int, n_probes: int
) -> Reserve:
    """What must stay free, estimated for blocks like Llama's with fused attention.

    `batch`: tokens of the largest forward pass, with padding, and those of its longest chain; `intermediate`: width
    of the model's MLPs; `n_evaluated`: tokens of the largest split that is evaluated; `n_probes`: of all solvers.
    """
    tokens, longest = batch
    item = sizes.dtype.itemsize
    forward = item * tokens * (12 * sizes.hidden + 4 * intermediate + sizes.layers * sizes.hidden + longest)
    handed_on = 3 * item * tokens * sizes.layers * sizes.hidden  # rows, paired rows, and the batch
    trained_on = 4 * 4 * CHUNK_TOKENS * sizes.layers * (sizes.hidden + 1)  # float32, in four steps of the arithmetic
    return Reserve(forward + handed_on + trained_on, 3 * 4 * n_evaluated * n_probes)


def memory_room(memory_gb: float | None, device: torch.device, reserve: int = 0) -> int:
    """Bytes that a run may fill on `device`: nine tenths of what is free less `reserve`, at most `memory_gb` 10^9."""
    room = max(0, int(0.9 * free_bytes(device)) - reserve)
    return room if memory_gb is None else int(min(memory_gb * 1e9, room))


def plan_memory(
    memory_gb: float | None,
    token_bytes: int,
    n_train: int,
    n_validation: int,
    batch_size: int,
    device: torch.device,
    taken: int = 0,
    reserve: Reserve = NO_RESERVE,
    before: tuple[int, bool, bool] | None = None,
) -> Plan:
    """Device memory first, then host RAM, if both splits fit there; else a mixing pool, in device memory if it can be.

    `memory_gb` as in `memory_room`; `taken` bytes of the device's are spoken for, and those of `reserve` stay free.
    `before`: what a run that is resumed kept, which decides the order of its tokens and so is kept again.  Raises
    InputError if there is no room for that, or not even for a pool of LEAST_TOKENS, or of one mini-batch of
    `batch_size` if that is more.
    """
    homes = dict.fromkeys((device, torch.device("cpu")))
    rooms = {home: memory_room(memory_gb, home, reserve.on(home, device)) for home in homes}
    rooms[device] = max(0, rooms[device] - taken)
    if before:
        return _as_before(before, (before[0] + n_validation * before[2]) * token_bytes, rooms)
    for home, space in rooms.items():
        if (n_train + n_validation) * token_bytes <= space:
            return Plan(n_train, True, True, home)
    least = max(LEAST_TOKENS, batch_size)
    for home, space in rooms.items():
        for keep_validation in (n_validation * token_bytes <= space / 2, False):
            rows = space // token_bytes - n_validation * keep_validation
            if rows >= least:
                return Plan(min(rows, max(MIXING_TOKENS, batch_size), n_train), False, keep_validation, home)
    raise InputError(
        f"{max(rooms.values()) / 1e6:,.2f} MB for activations"
        + (f" beside {taken / 1e6:,.2f} MB for Newton's matrices" if taken else ""),
        f"at least {least * token_bytes / 1e6:,.2f} MB, to mix {least:,} tokens in",
        "raise --memory_gb, free memory, or probe fewer layers",
    )


def _as_before(before: tuple[int, bool, bool], needed: int, rooms: Mapping[torch.device, int]) -> Plan:
    """The plan of the run that is resumed, in whichever memory has room for it."""
    home = next((home for home, space in rooms.items() if needed <= space), None)
    if home is None:
        raise InputError(
            f"{max(rooms.values()) / 1e6:,.2f} MB for activations",
            f"{needed / 1e6:,.2f} MB for {before[0]:,} training tokens, as when the run began",
            "raise --memory_gb, free memory, or start a new run",
        )
    return Plan(*before, home)
