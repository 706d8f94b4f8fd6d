"""The order of the batches, and how to find one's place in it again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from unrolled import _check
from unrolled.training.processes import rank

RandomState = dict[str, Any]


class Random:
    """The generators that a run draws from: torch's own, on the CPU and the network's GPUs, and a DataLoader's."""

    def __init__(self, net: nn.Module, batches: Iterable[Any]) -> None:
        self.devices = sorted({p.device.index for p in net.parameters() if p.device.type == "cuda"})
        generator = getattr(batches, "generator", None)
        self.generator = generator if isinstance(generator, torch.Generator) else None
        self.seed: int | None = None

    def state(self) -> RandomState:
        return {
            "cpu": torch.get_rng_state(),
            "cuda": [torch.cuda.get_rng_state(device) for device in self.devices],
            "batches": None if self.generator is None else self.generator.get_state(),
        }

    def restore(self, state: RandomState) -> None:
        torch.set_rng_state(state["cpu"])
        for device, cuda in zip(self.devices, state["cuda"], strict=False):
            torch.cuda.set_rng_state(cuda, device)
        if self.generator is not None and state["batches"] is not None:
            self.generator.set_state(state["batches"])

    @contextlib.contextmanager
    def seeded(self, seed: int | None) -> Iterator[None]:
        """Seed torch's own generators, each process differently, and put them back in the end."""
        if seed is None:
            yield
            return
        self.seed = _check.integer("seed", seed, minimum=0)
        before = self.state()
        torch.manual_seed(self.seed + rank())
        try:
            yield
        finally:
            self.restore({**before, "batches": None})


class Data:
    """The batches, epoch after epoch, with the place and the random state in which the current epoch began.

    A shuffle is drawn when an epoch begins. So whoever wants to come back to a place goes through as many batches, puts
    the random state back at the beginning of the last epoch (`replay_from`), and the present one when arrived.
    """

    def __init__(self, batches: Iterable[Any], random: Random) -> None:
        self.batches = batches
        self.random = random
        self.taken = 0
        self.epoch_start = 0
        self.epoch_random: RandomState = {}
        self.replay_from: tuple[int, RandomState] | None = None

    def __iter__(self) -> Iterator[Any]:
        set_epoch = getattr(getattr(self.batches, "sampler", None), "set_epoch", None)
        epoch = 0
        while True:
            if self.replay_from is not None and self.replay_from[0] == self.taken:
                self.random.restore(self.replay_from[1])
            self.epoch_start, self.epoch_random = self.taken, self.random.state()
            if set_epoch is not None:  # a DistributedSampler shuffles by the epoch's number
                set_epoch(epoch)
            for batch in self.batches:
                self.taken += 1
                yield batch
            if self.taken == 0:
                raise ValueError(
                    "batches gave nothing: it is empty, or an iterator that was used up before. A DataLoader with "
                    "drop_last=True needs at least one full batch."
                )
            if self.taken == self.epoch_start:
                raise ValueError(
                    f"batches ran out after {self.taken} steps: an iterator can be gone through only once. Pass a list "
                    f"or a DataLoader, which start anew, an endless generator, or num_steps={self.taken}."
                )
            epoch += 1
