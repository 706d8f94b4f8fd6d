"""`Samples`: the data of a deep clustering in batches, and what the encoder gets to see in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from unrolled import _check
from unrolled.training import processes

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Rows(Protocol):
    """Samples by their numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Tensor: ...


class Samples:
    """Rows of `data` on the model's device, checked; for `seen`, others that are of the same clusters."""

    def __init__(
        self, data: Tensor | Rows, neighbours: Tensor | None, augment: Augment | None, like: Tensor, at_once: int
    ) -> None:
        for name in ("__len__", "__getitem__"):
            if not hasattr(data, name):
                raise TypeError(f"data must be a Tensor or have len() and data[index], got {type(data).__name__}.")
        if len(data) == 0:
            raise ValueError("data is empty: there is no sample to cluster.")
        self.data, self.augment = data, augment
        self.neighbours = None if neighbours is None else checked_neighbours(neighbours, len(data))
        self.device, self.dtype = like.device, like.dtype
        self.at_once = at_once  # rows, where all are looked at

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Tensor) -> Tensor:
        x = _check.tensor("data", self.data[index]).to(self.device)
        if x.dtype != self.dtype:
            raise TypeError(f"data is {x.dtype} but the model is {self.dtype}. Convert it: data.to({self.dtype}).")
        return x

    def share(self) -> tuple[Tensor, ...]:
        """The numbers of this process's part of all samples, some at once."""
        return torch.arange(len(self)).tensor_split(processes.num_processes())[processes.rank()].split(self.at_once)

    def seen(self, index: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        """What the encoder gets to see of the samples x of these numbers: x itself, or others like them."""
        if self.neighbours is not None:
            near = self.neighbours[index]
            drawn = torch.randint(near.shape[1], (len(near), 1), generator=generator)
            x = self[near.gather(1, drawn).flatten()]
        if self.augment is None:
            return x
        seen = self.augment(x, generator)
        if not isinstance(seen, Tensor) or seen.shape != x.shape:
            came = _check.shape_of(seen)
            raise ValueError(f"augment must return samples of shape {tuple(x.shape)}, as it got them; it gave {came}.")
        return seen

    def variance(self) -> float:
        """The mean squared distance of the samples to their mean; every sample is looked at for NaN on the way."""
        shift = self[torch.zeros(1, dtype=torch.long)].double().cpu().flatten()  # against cancellation
        total, squares = torch.zeros_like(shift), torch.zeros(1, dtype=torch.float64)
        for index in self.share():
            x = self[index]
            if not bool(x.isfinite().all()):
                _check.finite("data", x.cpu())
            x = x.double().cpu().flatten(1) - shift
            total += x.sum(0)
            squares += x.square().sum()
        n = len(self)
        variance = float(sum_over_processes(squares, self.device) / n)
        variance -= float((sum_over_processes(total, self.device) / n).square().sum())
        return variance if variance > 0 else 1.0


def checked_neighbours(neighbours: Tensor, count: int) -> Tensor:
    """Numbers of rows, (n, m) with m at least 1, on the CPU."""
    if not isinstance(neighbours, Tensor):
        raise TypeError(f"neighbours must be a Tensor of row numbers, got {type(neighbours).__name__}.")
    shape = tuple(neighbours.shape)
    if len(shape) != 2 or shape[0] != count or shape[1] == 0:
        raise ValueError(
            f"neighbours must have a row of at least one number for each of the {count} samples, got shape {shape}."
        )
    if neighbours.dtype != torch.long:
        raise TypeError(f"neighbours must be numbers of rows, torch.int64, got {neighbours.dtype}.")
    neighbours = neighbours.cpu()
    if int(neighbours.min()) < 0 or int(neighbours.max()) >= count:
        raise ValueError(
            f"neighbours must be numbers of rows from 0 to {count - 1}, got {int(neighbours.min())} to "
            f"{int(neighbours.max())}."
        )
    return neighbours


def sum_over_processes(value: Tensor, device: torch.device) -> Tensor:
    """The sum of the processes' values, on the CPU; they talk to each other by tensors on `device`."""
    if processes.num_processes() == 1:
        return value
    value = value.to(device)
    dist.all_reduce(value)
    return value.cpu()
