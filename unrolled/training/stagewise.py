"""`fit_stagewise`: an untied network trained layer after layer."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from unrolled import _check
from unrolled._modes import modes_kept
from unrolled.training import processes
from unrolled.training.data import Random
from unrolled.training.history import History, Stage
from unrolled.training.loop import Callback, check_arguments, fit, progress_bar
from unrolled.training.run import Loss
from unrolled.unroll import Unroll

Validation = Callable[[Unroll], float]


def fit_stagewise(
    net: Unroll,
    batches: Iterable[Any],
    loss: Loss,
    *,
    num_steps: int,
    lr: float = 5e-4,
    joint_rates: Sequence[float] = (0.2, 0.02),
    layer_decay: float = 0.3,
    optimizer: Callable[[list[dict[str, Any]]], Optimizer] = torch.optim.Adam,
    validation: Validation | None = None,
    validate_every: int = 10,
    patience: int | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
    seed: int | None = None,
) -> History:
    r"""For $t = 1 \dots K$: train layer $t$ alone on `net[:t]`, then layers $1 \dots t$ together.

    In the first stage of $t$ the new layer learns at the rate `lr` and nothing else moves. In each of the joint stages,
    one for every $\rho$ of `joint_rates`, layer $j$ learns at the rate `lr` $\rho\,\gamma^{t - j}$ with $\gamma$ =
    `layer_decay`: the older, the slower. Every stage is a `fit` with an optimizer of its own; batches that can be gone
    through again start anew in each.

    A parameter that several layers share belongs to the first of them, as does one outside all layers: it learns in the
    first layer's stages and, at that layer's rate, in the joint ones.

    Args:
        net: a network of layers that have parameters of their own: `tied=False`, or tied by names.
        batches: as in `fit`.
        loss: `loss(net[:t], batch)`, a scalar Tensor.
        num_steps: updates in a stage, at most. There are K (1 + `len(joint_rates)`) stages.
        lr: learning rate of a new layer, positive.
        joint_rates: what `lr` is multiplied by in the joint stages, each positive; `()` leaves these stages out.
        layer_decay: $\gamma$, positive.
        optimizer: called with a list of parameter groups, each with its `lr`; returns the optimizer of a stage.
        validation: `validation(net[:t])`, a number, the lower the better. It is called in eval mode without gradients
            before a stage, every `validate_every` steps of it and at its end. The stage then leaves the best weights
            behind that it saw, those before it included. Under `torchrun` the mean over the processes counts.
        validate_every: steps between two validations, at least 1.
        patience: end a stage after this many steps without a better validation; `None` never does.
        callbacks: as in `fit`, with the steps of the stage and `net[:t]`; returning True ends the stage.
        progress: whether to show a progress bar over the stages.
        seed: as in `fit`, once for all stages.

    Returns:
        The `History` of all steps, with the stages in `stages`.

    Raises:
        TypeError: `net` is no `Unroll`, or another argument is of the wrong kind.
        ValueError: `net` has `tied=True` or nothing to train, a rate is not positive, `patience` comes without
            `validation`, or `validation` returned NaN.

    Example:
        >>> fit_stagewise(net, batches, CodeError(), num_steps=2000)   # doctest: +SKIP

    Reference:
        X. Chen, J. Liu, Z. Wang and W. Yin, "Theoretical Linear Convergence of Unfolded ISTA and Its Practical Weights
        and Thresholds", NeurIPS 2018; the rates are those of the code published with it.
    """
    layers = _layers(net)
    check_arguments(net, batches, loss, callbacks)
    _check.integer("num_steps", num_steps)
    _check.integer("validate_every", validate_every)
    _check.real("lr", lr, above=0.0)
    _check.real("layer_decay", layer_decay, above=0.0)
    for i, rate in enumerate(joint_rates):
        _check.real(f"joint_rates[{i}]", rate, above=0.0)
    if patience is not None:
        _check.integer("patience", patience)
        if validation is None:
            raise ValueError("patience needs a validation: a function of the network that returns a number.")

    history = History()
    plan = _plan(len(net), lr, joint_rates, layer_decay)
    with Random(net, batches).seeded(seed), progress_bar(len(plan), progress) as bar:
        for t, name, rates in plan:
            groups = [{"params": layers[j], "lr": rate} for j, rate in rates.items() if layers[j]]
            bar.update()
            if not groups:
                continue  # the layer has nothing of its own to train
            part = net[:t]
            best = None if validation is None else _Best(part, validation, validate_every, patience, num_steps)
            watching: list[Callback] = [*callbacks] if best is None else [*callbacks, best]
            with _gradients_only_for(groups, part):
                done = fit(part, batches, loss, num_steps=num_steps, optimizer=optimizer(groups), callbacks=watching)
            if best is not None:
                part.load_state_dict(best.weights)
            history.loss += done.loss
            history.seconds += done.seconds
            history.stages.append(Stage(t, name, len(done), done.loss[0], done.loss[-1]))
            bar.set_postfix(layers=t, loss=f"{done.loss[-1]:.4g}", refresh=False)
    return history


def _plan(
    num_layers: int, lr: float, joint_rates: Sequence[float], layer_decay: float
) -> list[tuple[int, str, dict[int, float]]]:
    """The stages: how many layers there are, a name, and the rate of each layer that learns."""
    plan: list[tuple[int, str, dict[int, float]]] = []
    for t in range(1, num_layers + 1):
        plan.append((t, "new layer", {t - 1: lr}))
        for rate in joint_rates:
            plan.append((t, f"joint x {rate:g}", {j: lr * rate * layer_decay ** (t - 1 - j) for j in range(t)}))
    return plan


def _layers(net: Any) -> list[list[nn.Parameter]]:
    """The trainable parameters of each layer that no earlier layer has; those outside all layers join the first."""
    if not isinstance(net, Unroll):
        raise TypeError(
            f"net must be an Unroll, got {type(net).__name__}. Pass the network itself, neither compiled nor wrapped."
        )
    if net.tied is True:
        raise ValueError(
            "net has tied=True: all its layers are one, so there is none to train before the next. Build it with "
            "tied=False, or use fit."
        )
    layers: list[list[nn.Parameter]] = []
    seen: set[nn.Parameter] = set()
    for step in net.steps:
        layers.append([p for p in step.parameters() if p not in seen])
        seen.update(layers[-1])
    layers[0] += [p for p in net.parameters() if p not in seen]
    return [[p for p in layer if p.requires_grad] for layer in layers]


@contextlib.contextmanager
def _gradients_only_for(groups: list[dict[str, Any]], net: nn.Module) -> Iterator[None]:
    """No gradients for the other parameters: a new layer's stage then costs one layer's backward pass, not t."""
    chosen = {p for group in groups for p in group["params"]}
    others = [p for p in net.parameters() if p.requires_grad and p not in chosen]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


class _Best:
    """A callback that keeps the weights with the lowest validation, and ends a stage that finds no better ones."""

    def __init__(self, net: Unroll, validation: Validation, every: int, patience: int | None, num_steps: int) -> None:
        self.validation, self.every, self.patience, self.num_steps = validation, every, patience, num_steps
        self.value = math.inf
        with modes_kept(net):
            self._look(0, net)

    def __call__(self, step: int, loss: float, net: nn.Module) -> bool:
        if step % self.every == 0 or step == self.num_steps:
            self._look(step, net)
        return self.patience is not None and step - self.step >= self.patience

    @torch.no_grad()
    def _look(self, step: int, net: Any) -> None:
        net.eval()
        found = processes.mean(float(self.validation(net)), next(net.parameters()).device)
        if math.isnan(found):
            raise ValueError(f"validation returned nan for {len(net)} layers at step {step}. It must return a number.")
        if step == 0 or found < self.value:
            self.value, self.step, self.weights = found, step, copy.deepcopy(net.state_dict())
