"""Which of several processes this one is, and that each of them trains by itself."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

# rank, number of processes, rank on this machine: torchrun and accelerate, an array of SLURM, a step of SLURM
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", ""),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@dataclasses.dataclass(frozen=True)
class Worker:
    """One of the processes that share a recipe's folder.

    Attributes:
        rank, size: this one's number, from 0, and how many were started together. They only say where a process
            begins: whatever is left is taken by whoever is free, started together or not.
        local: its number on this machine, which chooses the GPU.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"a rank is from 0 up to the number of processes; got rank {self.rank} of {self.size}")

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self:
        """From what ``torchrun``, ``accelerate launch`` or SLURM put into the environment; alone without any."""
        for rank, size, local in LAUNCHERS:
            if environment.get(rank, "").isdigit() and environment.get(size, "").isdigit():
                first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0")) if "ARRAY" in rank else 0
                number = int(environment.get(local, "") or "0") if local else 0
                return cls(int(environment[rank]) - first, int(environment[size]), number)
        return cls()

    def order(self, cells: Sequence[Any]) -> list[Any]:
        """All cells, beginning with this worker's share: each begins elsewhere, and bases stay together."""
        start = len(cells) * self.rank // self.size
        return [*cells[start:], *cells[:start]]

    def device(self, wanted: str | None) -> str | None:
        """The device to take: as wanted, or this worker's GPU where there are several."""
        import torch

        if wanted is None and self.size > 1 and torch.cuda.is_available():
            return f"cuda:{self.local % torch.cuda.device_count()}"
        return wanted


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Trainings inside the block belong to this process: they do not wait for others that were launched with it."""
    names = {name for launcher in LAUNCHERS[:1] for name in launcher} | {"MASTER_ADDR", "MASTER_PORT"}
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


__all__ = ["Worker", "alone"]
