"""`Run`: a training between two steps, which can be written to a file and taken up again."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unrolled.training import processes
from unrolled.training.data import Data, Random
from unrolled.training.history import History

Loss = Callable[[nn.Module, Any], Tensor]

ADVICE = (
    "The weights are as they were before this step. Lower the learning rate, look for NaN or huge values in the batch, "
    "or for a division, root or logarithm of zero in the loss; torch.autograd.set_detect_anomaly(True) names the place."
)


class Objective(nn.Module):
    """`loss(net, batch)` as one module: DistributedDataParallel wraps all of it, so the loss may call any method."""

    def __init__(self, net: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.net = net
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        loss = self.loss(self.net, batch)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must return a scalar torch.Tensor, got {type(loss).__name__}.")
        if loss.dim() != 0 or not loss.is_floating_point():
            raise ValueError(
                f"loss must return a real scalar, got {loss.dtype} of shape {tuple(loss.shape)}. Reduce it, e.g. by "
                ".mean()."
            )
        if not loss.requires_grad:
            raise ValueError(
                "loss has no gradient: it does not depend on any parameter that requires one. See whether the loss "
                "detaches the output, whether what it uses is frozen, and whether fit runs under torch.no_grad."
            )
        return loss


class Run:
    """What changes from step to step: weights, optimizer, the place in the data, random numbers, history."""

    def __init__(
        self, net: nn.Module, batches: Iterable[Any], loss: Loss, optimizer: Optimizer, scheduler: Any
    ) -> None:
        self.net = processes.unwrap(net)
        self.loss = loss
        self.objective = processes.share(Objective(net, loss))
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.random = Random(net, batches)
        self.data = Data(batches, self.random)
        self.batches = iter(self.data)
        self.history = History()
        self.clock = time.process_time()

    def advance(self) -> float:
        """One update; returns the loss before it."""
        step = len(self.history) + 1
        batch = next(self.batches)
        self.optimizer.zero_grad()
        loss = self.objective(batch)
        value = processes.mean(float(loss.detach()), loss.device)
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {step}. {ADVICE}")
        loss.backward()
        self._check_gradients(step, value, loss.device)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.history.loss.append(value)
        now = time.process_time()
        self.history.seconds += now - self.clock
        self.clock = now
        return value

    def _check_gradients(self, step: int, loss: float, device: torch.device) -> None:
        learning = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        # One NaN or infinity makes the sum one too, in a single look at the device; a sum may overflow, so look closer.
        if math.isfinite(sum(p.grad.sum().abs().to(device) for p in learning)):
            return
        names = {parameter: name for name, parameter in self.net.named_parameters()}
        for parameter in learning:
            if not bool(parameter.grad.isfinite().all()):
                raise FloatingPointError(
                    f"the gradient of {names.get(parameter, 'a parameter outside net')} is not finite at step {step}, "
                    f"where the loss is {loss:.4g}. {ADVICE}"
                )

    def save(self, path: Path) -> None:
        """Replace the file by one with everything that `resume` needs; all processes take part, the first writes."""
        places = processes.gather(
            {
                "epoch_start": self.data.epoch_start,
                "epoch_random": self.data.epoch_random,
                "random": self.random.state(),
            }
        )
        if processes.rank() == 0:
            temporary = path.with_name(f"{path.name}.tmp")
            torch.save({**self._state(), "places": places}, temporary)
            os.replace(temporary, path)
        processes.wait()  # nobody looks for the file before it is there

    def _state(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "loss": self.loss.state_dict() if isinstance(self.loss, nn.Module) else {},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {} if self.scheduler is None else self.scheduler.state_dict(),
            "kinds": {"optimizer": type(self.optimizer).__name__, "scheduler": type(self.scheduler).__name__},
            "history": self.history.loss,
            "seconds": self.history.seconds,
        }

    def resume(self, path: Path, num_steps: int) -> None:
        """Go on from the file."""
        saved = _read(path)
        _check_fits(path, saved, self._state(), num_steps)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.net.load_state_dict(saved["net"])
        if isinstance(self.loss, nn.Module):
            self.loss.load_state_dict(saved["loss"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        self.history.loss, self.history.seconds = saved["history"], saved["seconds"]
        places, rank = saved["places"], processes.rank()
        place = places[rank % len(places)]
        self.data.replay_from = (place["epoch_start"], place["epoch_random"])
        while self.data.taken < len(self.history):
            next(self.batches)
        self.random.restore(place["random"])
        if rank >= len(places) and self.random.seed is not None:
            torch.manual_seed(self.random.seed + rank)  # two processes shall not draw the same numbers


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes that are no checkpoint make torch.load do
        raise ValueError(f"checkpoint {path} exists but cannot be read: {error}") from error
    if not isinstance(saved, dict) or "places" not in saved:
        raise ValueError(f"checkpoint {path} exists but was not written by fit. Choose another file.")
    return saved


def _check_fits(path: Path, saved: dict[str, Any], own: dict[str, Any], num_steps: int) -> None:
    """Before anything is changed: does the checkpoint belong to this run?"""
    advice = "Give this run a file of its own, or delete that one."
    for part in ("net", "loss"):
        there, here = layout(saved[part]), layout(own[part])
        if there != here:
            differing = [name for name in here | there if here.get(name) != there.get(name)]
            told = [f"{name} is {there.get(name)} there, {here.get(name)} here" for name in differing[:4]]
            raise ValueError(f"checkpoint {path} belongs to another {part}: {'; '.join(told)}. {advice}")
    for kind, name in own["kinds"].items():
        if saved["kinds"][kind] != name:
            raise ValueError(f"checkpoint {path} was written with {kind} {saved['kinds'][kind]}, not {name}. {advice}")
    if len(saved["history"]) > num_steps:
        raise ValueError(f"checkpoint {path} is {len(saved['history'])} steps on, num_steps is {num_steps}. {advice}")


def layout(state: dict[str, Any]) -> dict[str, str]:
    """Name -> dtype and shape."""
    return {
        name: f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        for name, value in state.items()
    }
