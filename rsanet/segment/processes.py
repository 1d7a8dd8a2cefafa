"""The processes that `torchrun` starts to share a piece of work; one alone where it did not."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")

PATIENCE = timedelta(days=30)  # the first process to finish waits for the last


@dataclass(frozen=True)
class Processes:
    """This process among all of them.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def decided_first(self, decide: Callable[[], T]) -> T:
        """What the first process decides, in every process.

        Raises:
            SystemExit: in the others, where the first raises; it has the words.
        """
        box: list[T | None] = [None]
        try:
            if self.rank == 0:
                box = [decide()]
        finally:
            if self.size > 1:
                distributed.broadcast_object_list(box, src=0)
        if box[0] is None:
            raise SystemExit(1)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every process is here."""
        self.gather(None)


@contextmanager
def shared_work() -> Iterator[Processes]:
    """Connects this process with those that `torchrun` started beside it, for the time of a piece of work."""
    if not distributed.is_torchelastic_launched():
        yield Processes()
        return
    mine = not distributed.is_initialized()
    if mine:
        distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        if mine:
            distributed.destroy_process_group()


def own_device(name: str) -> str:
    """``auto`` among several processes is a GPU for each, as long as there are enough; other names stay."""
    count = torch.cuda.device_count()
    if name != "auto" or not distributed.is_torchelastic_launched() or not count:
        return name
    return f"cuda:{int(os.environ['LOCAL_RANK']) % count}"


def is_first() -> bool:
    """Whether this process speaks for all: the first of `torchrun`'s, or the only one."""
    return not distributed.is_torchelastic_launched() or os.environ["RANK"] == "0"
