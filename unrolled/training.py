"""Training loops: `fit`, layer by layer with `fit_stagewise`, and `freeze`.

Nothing here is needed: a network is a Module, and a loop of your own trains it as well.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unrolled import _check
from unrolled.unroll import Unroll

Loss = Callable[[nn.Module, Any], Tensor]
Callback = Callable[[int, float, nn.Module], "bool | None"]


@dataclass
class Stage:
    """One stage of `fit_stagewise`: which layers were in the network, what was trained, and how it went."""

    layers: int
    rate: float
    steps: int
    first_loss: float
    last_loss: float
    validation: float | None = None


@dataclass
class History:
    """What a training run did: the loss before every step, and the CPU seconds that it took."""

    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0
    stages: list[Stage] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        if not self.loss:
            return "History(no steps)"
        steps = f"{len(self)} steps" + (f" in {len(self.stages)} stages" if self.stages else "")
        return f"History({steps}, {self.seconds:.1f} CPU s, loss {self.loss[0]:.4g} -> {self.loss[-1]:.4g})"


def default_optimizer(net: nn.Module, lr: float = 1e-2) -> torch.optim.Adam:
    """Adam with rate `lr` for scalars and vectors (steps, thresholds) and a tenth of it for matrices and kernels.

    The entries of a dictionary are small against 1 and there are many of them, a logarithm of a step or threshold is
    of the order of 1: one rate can't suit both.
    """
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("net has no parameter that requires a gradient: nothing to train. See unrolled.unfreeze.")
    few = [parameter for parameter in trainable if parameter.dim() < 2]
    many = [parameter for parameter in trainable if parameter.dim() >= 2]
    groups = [{"params": few, "lr": lr}, {"params": many, "lr": lr / 10}]
    return torch.optim.Adam([group for group in groups if group["params"]])


def fit(
    net: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    num_steps: int,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
    seed: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
) -> History:
    r"""$\theta \leftarrow \theta - \mathrm{optimizer}(\nabla_\theta\,\mathrm{loss}(\mathrm{net}, b))$ for every batch.

    Under `torchrun` (an initialised process group) the gradients are averaged over the processes, each of which brings
    its own batches; the first one shows the bar and writes the checkpoint.

    Args:
        net: any Module.
        batches: an iterable of batches: a list, a DataLoader, a generator. One that can be iterated again is, as often
            as needed.
        loss: `loss(net, batch)` returns a scalar; see `unrolled.losses`.
        num_steps: steps in all, at least 1. A resumed run counts those before the checkpoint.
        optimizer: `default_optimizer(net)` where not given.
        scheduler: stepped once after every step; where neither it nor an optimizer is given, the default optimizer's
            rates fall to 0 along a cosine.
        callbacks: called as `callback(step, loss, net)` after every step; one that returns True ends the training.
        progress: show a bar with the loss.
        seed: of torch's global generator, set before the first step. Results repeat if `batches` does.
        checkpoint: a file. Where it exists, training goes on from it, on a CPU to the very same weights as without the
            interruption; it is written every `checkpoint_every` steps and at the end.

    Raises:
        ValueError: nothing to train; the loss is no scalar or not finite (before it could spoil the parameters);
            the batches run out; the checkpoint is of another network.

    Example:
        >>> history = fit(net, batches, Lasso(dictionary, alpha=0.1), num_steps=300, progress=True)   # doctest: +SKIP
    """
    _check.integer("num_steps", num_steps)
    _check.integer("checkpoint_every", checkpoint_every)
    if optimizer is None:
        optimizer = default_optimizer(net)
        scheduler = scheduler or torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    if seed is not None:
        torch.manual_seed(seed)
    history = History()
    saver = None if checkpoint is None else _Checkpoint(Path(checkpoint), net, optimizer, scheduler, history)
    feed = _Feed(batches)
    if saver is not None and saver.path.exists():
        saver.load(feed)
    bar = _bar(num_steps, len(history)) if progress and _rank() == 0 else None
    was_training = net.training
    net.train()
    parallel = _parallel(net)
    seconds = history.seconds
    begin = time.process_time()
    try:
        while len(history) < num_steps:
            value = loss(parallel, next(feed))
            history.loss.append(_number(value, len(history)))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            step = len(history)
            history.seconds = seconds + time.process_time() - begin
            if bar is not None:
                bar.set_postfix_str(f"loss {history.loss[-1]:.4g}", refresh=False)
                bar.update()
            answers = [callback(step, history.loss[-1], net) for callback in callbacks]
            ended = any(answers) or step == num_steps
            if saver is not None and (ended or step % checkpoint_every == 0) and _rank() == 0:
                saver.save(feed)
            if ended:
                break
    finally:
        net.train(was_training)
        if bar is not None:
            bar.close()
    return history


def fit_stagewise(
    net: Unroll,
    batches: Iterable[Any],
    loss: Loss,
    *,
    num_steps: int,
    lr: float = 5e-4,
    joint_rates: Sequence[float] = (0.2, 0.02),
    layer_decay: float = 0.3,
    validation: Callable[[nn.Module], float] | None = None,
    validate_every: int = 10,
    patience: int | None = None,
    progress: bool = False,
    seed: int | None = None,
) -> History:
    r"""For $t = 1 \dots K$: train layer $t$ alone at `lr`, then layers $1 \dots t$ at `lr` times `joint_rates`.

    In the joint stages a layer's rate falls by `layer_decay` for every layer that was added after it. The loss is that
    of `net[:t]`: the first t layers as a network of their own. Adam starts anew in every stage.

    Args:
        net: an untied or partly tied network. What its layers share by name counts to the first.
        batches, loss, progress, seed: as for `fit`.
        num_steps: the most steps of a stage.
        lr: rate of a new layer.
        joint_rates: factors of `lr`, one for every joint stage.
        layer_decay: in (0, 1].
        validation: `validation(net[:t])` returns a number, lower is better. A stage ends with its best weights.
        validate_every: steps between two validations.
        patience: a stage ends once that many steps have not brought a better validation value.

    Raises:
        ValueError: `net` is tied; `patience` without `validation`; an argument out of its range.
    """
    if net.tied is True:
        raise ValueError("net is tied: it has one layer, to be trained at once by fit. Build it with tied=False.")
    if patience is not None and validation is None:
        raise ValueError("patience needs a validation function to tell what is better.")
    _check.real("lr", lr, above=0.0)
    if _check.real("layer_decay", layer_decay, above=0.0) > 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}.")
    if seed is not None:
        torch.manual_seed(seed)
    groups = _layers(net)
    everything = History()
    endless = iter(_Feed(batches))
    bar = _bar(len(net) * (1 + len(joint_rates)), 0, unit="stage") if progress and _rank() == 0 else None
    for t in range(1, len(net) + 1):
        part = net[:t]
        for rate in (1.0, *joint_rates):
            alone = rate == 1.0
            chosen = {t - 1: lr} if alone else {k: lr * rate * layer_decay ** (t - 1 - k) for k in range(t)}
            rates = [{"params": groups[k], "lr": value} for k, value in chosen.items() if groups[k]]
            if not rates:
                continue
            keeper = _Keeper(validation, part, validate_every, patience)
            stage = fit(part, endless, loss, num_steps=num_steps, optimizer=torch.optim.Adam(rates), callbacks=[keeper])
            keeper.restore()
            everything.loss += stage.loss
            everything.seconds += stage.seconds
            everything.stages.append(Stage(t, rate, len(stage), stage.loss[0], stage.loss[-1], keeper.best))
            if bar is not None:
                bar.set_postfix_str(f"layers {t}, loss {stage.loss[-1]:.4g}", refresh=False)
                bar.update()
    if bar is not None:
        bar.close()
    return everything


def freeze(net: nn.Module, pattern: str) -> list[str]:
    """Stop training the parameters whose names match, such as `"steps.*.dictionary"`; returns their names.

    Args:
        net: any Module.
        pattern: a name with wildcards `*`, `?`, `[...]`, as in a shell.

    Raises:
        ValueError: where no parameter matches.
    """
    return _require_grad(net, pattern, False)


def unfreeze(net: nn.Module, pattern: str) -> list[str]:
    """Train the matching parameters again, the inverse of `freeze`."""
    return _require_grad(net, pattern, True)


def _require_grad(net: nn.Module, pattern: str, value: bool) -> list[str]:
    # A tied parameter has several names: it is found under any of them.
    named = dict(net.named_parameters(remove_duplicate=False))
    found = fnmatch.filter(named, pattern)
    if not found:
        raise ValueError(f"pattern {pattern!r} matches no parameter. There are: {', '.join(named)}.")
    for name in found:
        named[name].requires_grad_(value)
    return found


class _Feed:
    """Batches without end. Remembers where it is, so that a resumed run sees the same ones."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self.taken = 0
        self._begin()

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> Any:
        batch = next(self.epoch, _END)
        if batch is _END:
            if self.epoch is self.batches or self.position == 0:
                raise ValueError(
                    f"batches ended after {self.taken} steps and cannot be iterated again. Pass a list or a DataLoader "
                    "that is not empty, an endless generator, or ask for fewer num_steps."
                )
            self._begin()
            return next(self)
        self.position += 1
        self.taken += 1
        return batch

    def replay(self, position: int, epoch_rng: Tensor) -> None:
        torch.set_rng_state(epoch_rng)
        self._begin()
        for _ in range(position):
            next(self)

    def _begin(self) -> None:
        self.epoch_rng = torch.get_rng_state()  # a shuffling DataLoader draws its order when an epoch begins
        self.epoch, self.position = iter(self.batches), 0


_END = object()


class _Checkpoint:
    """All that a run needs to go on as if it had not been interrupted."""

    def __init__(
        self,
        path: Path,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        history: History,
    ) -> None:
        self.path, self.net, self.optimizer, self.scheduler, self.history = path, net, optimizer, scheduler, history

    def save(self, feed: _Feed) -> None:
        state = {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "loss": self.history.loss,
            "seconds": self.history.seconds,
            "position": feed.position,
            "epoch_rng": feed.epoch_rng,
            "rng": torch.get_rng_state(),
        }
        partial = self.path.with_name(self.path.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)  # an interruption leaves the old file or the new one, never half of one

    def load(self, feed: _Feed) -> None:
        state = torch.load(self.path, weights_only=True, map_location="cpu")
        try:
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"checkpoint {str(self.path)!r} is not of this network and optimizer. Remove it or name another file. "
                f"({error})"
            ) from error
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.history.loss[:] = state["loss"]
        self.history.seconds = state["seconds"]
        feed.replay(state["position"], state["epoch_rng"])
        torch.set_rng_state(state["rng"])


class _Keeper:
    """A callback that validates now and then, keeps the best weights, and ends a stage that gets no better."""

    def __init__(
        self, validation: Callable[[nn.Module], float] | None, net: nn.Module, every: int, patience: int | None
    ) -> None:
        self.validation, self.net, self.every, self.patience = validation, net, every, patience
        self.best: float | None = None
        self.since, self.weights = 0, None  # type: int, dict[str, Tensor] | None
        self.look(0)

    def __call__(self, step: int, loss: float, net: nn.Module) -> bool:
        return step % self.every == 0 and self.look(step)

    def look(self, step: int) -> bool:
        if self.validation is None:
            return False
        with torch.no_grad():
            value = float(self.validation(self.net))
        if self.best is None or value < self.best:
            self.best, self.since = value, step
            self.weights = copy.deepcopy(self.net.state_dict())
        return self.patience is not None and step - self.since >= self.patience

    def restore(self) -> None:
        if self.weights is not None:
            self.net.load_state_dict(self.weights)


def _layers(net: Unroll) -> list[list[nn.Parameter]]:
    """The trainable parameters of every layer; one that several layers share counts to the first of them."""
    seen: set[nn.Parameter] = set()
    layers = []
    for step in net:
        own = [p for p in step.parameters() if p.requires_grad and p not in seen]
        seen.update(own)
        layers.append(own)
    return layers


def _number(value: Any, step: int) -> float:
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a scalar Tensor, got {what}. Take its mean, e.g. .mean().")
    number = value.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(number)
        number /= dist.get_world_size()
    result = float(number)
    if not math.isfinite(result):
        raise ValueError(
            f"loss is {result} in step {step + 1}. The parameters are those of the step before. Lower the learning "
            "rate, clip the gradients, or look for bad values in the batch."
        )
    return result


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _parallel(net: nn.Module) -> nn.Module:
    """The net itself, or under torchrun the net whose gradients are averaged over the processes."""
    if not (dist.is_available() and dist.is_initialized()) or isinstance(net, nn.parallel.DistributedDataParallel):
        return net
    # Truncated gradients leave the early layers of an untied network without any: those must not be waited for.
    return nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)


def _bar(total: int, done: int, unit: str = "step") -> Any:
    from tqdm import tqdm  # here, so that `import unrolled` stays light

    return tqdm(total=total, initial=done, unit=unit)
