"""`fit`: the training loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unrolled import _check
from unrolled._modes import modes_kept
from unrolled.training import processes
from unrolled.training.history import History
from unrolled.training.run import Loss, Run

Callback = Callable[[int, float, nn.Module], Any]


def default_optimizer(net: nn.Module, lr: float = 1e-3) -> Optimizer:
    """Adam with the rate `lr` for matrices and 10 `lr` for numbers and vectors, such as logarithms of thresholds.

    Matrices have many entries that are each small; a step that suits a threshold would ruin them. This is what `fit`
    takes where no optimizer is given.

    Args:
        net: the network; what is frozen is left out.
        lr: the rate of matrices, positive.

    Raises:
        TypeError, ValueError: `lr` is not positive, or nothing of the network requires a gradient.

    Example:
        >>> optimizer = default_optimizer(net, lr=2e-3)                                        # doctest: +SKIP
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)             # doctest: +SKIP
        >>> fit(net, batches, loss, num_steps=300, optimizer=optimizer, scheduler=scheduler)   # doctest: +SKIP
    """
    _check.real("lr", lr, above=0.0)
    trainable = [p for p in net.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("net has nothing to train: no parameter requires a gradient. See unrolled.unfreeze.")
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "lr": lr},
        {"params": [p for p in trainable if p.dim() < 2], "lr": 10 * lr},
    ]
    return torch.optim.Adam([group for group in groups if group["params"]])


def fit(
    net: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    num_steps: int,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    seed: int | None = None,
) -> History:
    r"""$\theta \leftarrow \mathrm{optimizer}(\theta, \nabla_\theta\,\mathrm{loss}(\mathrm{net}_\theta, b_k))$, K times.

    The plain PyTorch loop: by hand, the same steps give the same weights bit for bit. The network is in train mode
    meanwhile and returns to the modes that it came in. A loss or gradient that is not finite ends the training before
    it reaches the weights.

    Under `torchrun`, once `torch.distributed` is initialised, gradients are averaged by `DistributedDataParallel`: give
    every process its own share of the data (a `DistributedSampler` is told of each epoch). Losses are then means over
    the processes, each process calls its callbacks, and the first one alone shows progress and writes checkpoints.
    Layers that may go unused, in untied networks with a stopping rule or a truncating gradient, are allowed for; for
    other settings wrap the network yourself.

    Args:
        net: the network.
        batches: an iterable of whatever `loss` takes. A list or DataLoader starts anew whenever it ends; an iterator,
            such as a generator, must last for `num_steps`.
        loss: `loss(net, batch)`, a scalar Tensor; see `unrolled.losses`.
        num_steps: how many updates K, at least 1; with a checkpoint, those done before included.
        optimizer: any whose `step()` needs no closure; by default `default_optimizer(net)`, which is Adam at a
            learning rate of 1e-3 for matrices and 1e-2 for vectors and numbers.
        scheduler: its `step()` is called after every update.
        callbacks: each is called as `callback(step, loss, net)` after every update, with the number of updates done
            and the loss before the last; if one returns True, the training ends.
        progress: whether to show a progress bar.
        checkpoint: a file that is replaced, never half written, every `checkpoint_every` updates and at the end. If it
            exists, training goes on from it and, on the CPU, ends with exactly the weights of a run that was never
            interrupted. Call `fit` with the same arguments, and with `batches` as they were at the very start: those
            used up are drawn once more. State of network, loss, optimizer and scheduler and torch's random numbers come
            from the file; random numbers of NumPy and `random` do not. Under `torchrun` all processes must see it.
            Another number of processes may go on from it: deal out the same batches, in other shares. Random numbers
            drawn inside the network, as by dropout, then differ. `torch.load(checkpoint)["net"]` is the network's
            `state_dict`.
        checkpoint_every: updates between two checkpoints, at least 1.
        seed: call `torch.manual_seed` for this run (plus the process's rank under `torchrun`), and put the generators
            back as they were afterwards; `None` draws from them as they are.

    Returns:
        The `History`, with the loss of every step.

    Raises:
        TypeError: an argument is of the wrong kind, or the loss is no Tensor.
        ValueError: nothing is trainable, the batches end too soon, the loss is no scalar or does not depend on what is
            trained, or the checkpoint is of another network, loss or optimizer.
        FloatingPointError: the loss or a gradient is NaN or infinite; the weights are those before that step.

    Example:
        >>> net = torch.nn.Linear(3, 1)
        >>> batches = [(torch.randn(8, 3), torch.ones(8, 1))]
        >>> def loss(net, batch):
        ...     return (net(batch[0]) - batch[1]).square().mean()
        >>> len(fit(net, batches, loss, num_steps=5, seed=0))
        5
    """
    check_arguments(net, batches, loss, callbacks)
    _check.integer("num_steps", num_steps)
    _check.integer("checkpoint_every", checkpoint_every)
    path = None if checkpoint is None else _writable(checkpoint)
    optimizer = default_optimizer(net) if optimizer is None else _checked_optimizer(optimizer, net)
    _check_scheduler(scheduler, optimizer, resumable=path is not None)

    run = Run(net, batches, loss, optimizer, scheduler)
    with run.random.seeded(seed), modes_kept(net), progress_bar(num_steps, progress) as bar:
        if path is not None and path.exists():
            run.resume(path, num_steps)
            bar.update(len(run.history))
        stop = False
        while len(run.history) < num_steps and not stop:
            net.train()  # again, as callbacks may evaluate
            value = run.advance()
            step = len(run.history)
            answers = [callback(step, value, net) for callback in callbacks]
            stop = processes.anyone(any(map(_is_true, answers)), next(net.parameters()).device)
            if path is not None and (stop or step == num_steps or step % checkpoint_every == 0):
                run.save(path)
            bar.set_postfix(loss=f"{value:.4g}", refresh=False)
            bar.update()
    return run.history


def check_arguments(net: Any, batches: Any, loss: Any, callbacks: Any) -> None:
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, got {net!r}.")
    if not any(p.requires_grad for p in net.parameters()):
        raise ValueError("net has nothing to train: no parameter requires a gradient. See unrolled.unfreeze.")
    if isinstance(batches, Tensor):
        raise TypeError(
            f"batches is one Tensor of shape {tuple(batches.shape)}, which would be gone through row by row. Pass "
            "[batches] to use all of it in every step, batches.split(64), or a DataLoader."
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be iterable, such as a list or a DataLoader, got {type(batches).__name__}.")
    if isinstance(loss, type) or not callable(loss):
        raise TypeError(f"loss must be a function loss(net, batch) or an object called like one, got {loss!r}.")
    if not isinstance(callbacks, Sequence) or not all(callable(callback) for callback in callbacks):
        raise TypeError(f"callbacks must be a list of functions callback(step, loss, net), got {callbacks!r}.")


def _checked_optimizer(optimizer: Any, net: nn.Module) -> Optimizer:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "optimizer must be an object such as torch.optim.Adam(net.parameters(), lr=1e-3), not a class or name; got "
            f"{optimizer!r}."
        )
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if not any(p.requires_grad and p in held for p in net.parameters()):
        raise ValueError(
            "optimizer has nothing to train: it holds no parameter of this network that requires a gradient. Was it "
            "made for a copy of the network, or are all that it holds frozen?"
        )
    return optimizer


def _check_scheduler(scheduler: Any, optimizer: Optimizer, *, resumable: bool) -> None:
    if scheduler is None:
        return
    if isinstance(scheduler, type) or not callable(getattr(scheduler, "step", None)):
        raise TypeError(f"scheduler must be an object with a method step(), got {scheduler!r}.")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError("scheduler steers another optimizer. Pass that one, too: optimizer=scheduler.optimizer.")
    if resumable and not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
        raise TypeError(f"scheduler {type(scheduler).__name__} needs state_dict and load_state_dict for a checkpoint.")


def _writable(checkpoint: str | os.PathLike[str]) -> Path:
    path = Path(checkpoint)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"checkpoint must be a file in a folder that exists, got {str(path)!r}.")
    return path


def _is_true(answer: Any) -> bool:
    # Not any truthy value: a callback may return, say, how many bytes it wrote.
    return isinstance(answer, bool | np.bool_ | Tensor) and bool(answer)


def progress_bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=not progress or processes.rank() > 0)
