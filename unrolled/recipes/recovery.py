"""`train`: a recipe for each sparse coding network to learn to recover codes."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled.losses import Lasso
from unrolled.metrics import sample_nmse_db
from unrolled.recipes.search import Problem, Schedule, greedy, names, signals
from unrolled.sparse.alista import ALISTA, TiLISTA
from unrolled.sparse.coupled import LISTACP
from unrolled.sparse.glista import GLISTA
from unrolled.sparse.hyperlista import HyperLISTA, HyperLISTAStep
from unrolled.sparse.ista import LISTA
from unrolled.sparse.lamp import LAMP
from unrolled.sparse.lfista import LFISTA
from unrolled.sparse.naalista import NAALISTA
from unrolled.sparse.steplista import StepLISTA
from unrolled.training import History, Stage, fit, fit_stagewise
from unrolled.unroll import Unroll

Loss = Callable[[Any, Any], Tensor]


def train(
    net: Unroll,
    problem: Problem,
    *,
    effort: float = 1.0,
    batch_size: int = 64,
    stagewise: bool = False,
    progress: bool = False,
) -> History:
    r"""$\min_\theta \log \sum_i \|\hat x_i - x_i\|^2$: train a network to recover the codes of a problem.

    | network | start | then |
    |---|---|---|
    | `ALISTA`, `LAMP` | `greedy` | Adam |
    | `TiLISTA` | `greedy` | Adam on step sizes and thresholds, then on all |
    | `LISTACP`, `GLISTA`, `LISTA`, `LFISTA` | `greedy`, and Adam on its step sizes and thresholds | Adam on all |
    | `NAALISTA` | as it comes | Adam, with as much weight on the layers in between as on the last |
    | `HyperLISTA` | as it comes | random search on 1000 signals, no gradients |
    | `StepLISTA` | as it comes | Adam on the Lasso: it learns to solve that, and does not look at the codes |

    The loss is the logarithm of the error, whose gradient does not fade with the error, plus a tenth of the mean of the
    same over the layers in between. Rates fall along a cosine. A stage leaves behind those weights, of ten times that
    it looked and of its start, that have the least loss on 1000 validation signals.

    Args:
        net: a network of `unrolled.sparse`. Where `greedy` starts it, without momentum and with `tied=False`; what its
            parameters were before does not matter then.
        problem: where signals and codes come from, such as an `unrolled.problems.SparseRecovery`.
        effort: multiplies the number of steps, or of points of a search; with 0.1 it is a first look.
        batch_size: signals in a step.
        stagewise: train layer after layer, by `fit_stagewise`, in place of the last stage. It takes ten times as long.
        progress: show a progress bar.

    Returns:
        The `History`; what was done one after another is in its `stages`.

    Raises:
        TypeError: a network that there is no recipe for.
        ValueError: the problem's codes do not fit the network; its layers are tied; `effort` is not positive;
            `stagewise` for a network that is tied or searched.

    Example:
        >>> problem = SparseRecovery(50, 100, sparsity=0.05, snr=40.0)
        >>> net = LISTACP(problem.dictionary, 8, support_selection=SupportSelection())
        >>> history = train(net, problem, effort=0.1)
        >>> y, x = problem.test()
        >>> nmse_db(net(y), x) < -20
        True
    """
    _check.real("effort", effort, above=0.0)
    _check.integer("batch_size", batch_size)
    if _train.dispatch(type(net)) is _train.dispatch(object):
        raise TypeError(f"net is a {type(net).__name__}, recipes are for {names(_train)}. See unrolled.fit.")
    begin = time.process_time()
    signals(net, problem, 1)
    run = _Run(problem, effort, batch_size, stagewise, progress)
    _train(net, run)
    run.history.seconds = time.process_time() - begin
    return run.history


@functools.singledispatch
def _train(net: Unroll, run: _Run) -> None:
    """The recipe of a kind of network."""
    raise NotImplementedError


@_train.register(ALISTA)
def _(net: ALISTA, run: _Run) -> None:
    greedy(net, run.problem, num_signals=400)
    run.last(net, 400, thresholds=3e-2)


@_train.register(TiLISTA)
def _(net: TiLISTA, run: _Run) -> None:
    greedy(net, run.problem, num_signals=400)
    run.adam(net, "numbers", 400, thresholds=3e-2, matrices=0.0)
    run.last(net, 200, matrices=3e-5)  # one matrix gets the gradients of all layers


@_train.register(LAMP)
def _(net: LAMP, run: _Run) -> None:
    greedy(net, run.problem, num_signals=400)
    # Gradients do not see the count of nonzeros in Onsager's term: close to the optimum of the search they mislead.
    run.last(net, 400, thresholds=1e-3, matrices=1e-5)


@_train.register(LISTACP)
@_train.register(GLISTA)
@_train.register(LISTA)
@_train.register(LFISTA)
def _(net: Unroll, run: _Run) -> None:
    schedule = Schedule(net, run.problem)
    schedule.search(run.problem, num_signals=400)
    run.adam(schedule, "numbers", 400, thresholds=3e-2)
    schedule.copy_to(net)
    run.last(net, 200)


@_train.register(NAALISTA)
def _(net: NAALISTA, run: _Run) -> None:
    run.loss = _LayerErrors(between=1.0)
    run.last(net, 800, matrices=2e-3)


@_train.register(StepLISTA)
def _(net: StepLISTA, run: _Run) -> None:
    step: Any = net[0]
    lasso = Lasso(run.problem.dictionary, getattr(step, "step", step).alpha)  # with momentum, it is around the step
    run.loss = lambda net, batch: lasso(net, batch[0])
    run.last(net, 300)


@_train.register(HyperLISTA)
@torch.no_grad()
def _(net: HyperLISTA, run: _Run) -> None:
    if run.stagewise:
        raise ValueError("stagewise is for networks that learn by gradients, HyperLISTA is searched. Leave it out.")
    y, x = signals(net, run.problem, 1000)
    source = torch.Generator().manual_seed(0)
    num_points = run.steps(60)
    best = _read(net)
    scores = [_score(net, y, x)]
    for point in range(num_points):
        # The logarithms move by about 0.5 at first, by a twentieth of that at the end.
        trial = best + 0.5 * 0.05 ** (point / num_points) * torch.randn(3, generator=source, dtype=best.dtype)
        _write(net, trial)
        score = _score(net, y, x)
        if score < min(scores):
            best = trial
        scores.append(score)
    _write(net, best)
    run.note(net, "search", scores)


def _score(net: HyperLISTA, y: Tensor, x: Tensor) -> float:
    """The mean of the samples' own dB: in the aggregate, one code that is not recovered outweighs all the others.

    Below -100 dB a code is as good as exact: to make it more so shall not pay for losing another.
    """
    found = net(y)
    return sample_nmse_db(found, x).clamp(min=-100).mean().item() if bool(found.isfinite().all()) else math.inf


def _read(net: HyperLISTA) -> Tensor:
    step = cast(HyperLISTAStep, net[0])
    return torch.stack((step.log_c1, step.log_c2, step.c3.log())).detach().double().cpu()


def _write(net: HyperLISTA, logarithms: Tensor) -> None:
    for step in cast("Iterator[HyperLISTAStep]", net):
        step.log_c1.fill_(logarithms[0])
        step.log_c2.fill_(logarithms[1])
        step.c3.fill_(logarithms[2].exp())


# ---- Stages ----------------------------------------------------------------------------------------------------------


class _Run:
    """What the stages of a recipe have in common, and the history of those that were done."""

    def __init__(self, problem: Problem, effort: float, batch_size: int, stagewise: bool, progress: bool) -> None:
        self.problem, self.effort, self.stagewise, self.progress = problem, effort, stagewise, progress
        self.batches = problem.batches(batch_size)
        self.held_out = problem.validation(1000)
        self.loss: Loss = _LayerErrors()
        self.history = History()

    def steps(self, number: int) -> int:
        return max(1, round(self.effort * number))

    def adam(self, net: Unroll, name: str, num_steps: int, *, thresholds: float = 1e-2, matrices: float = 3e-4) -> None:
        """A stage end to end, at these rates for thresholds and matrices, and at 1e-2 for other vectors and scalars."""
        num_steps = self.steps(num_steps)
        optimizer = torch.optim.Adam(_groups(net.named_parameters(), thresholds, matrices), betas=(0.9, 0.99))
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.51 + 0.49 * math.cos(math.pi * min(step / num_steps, 1))
        )
        best = _Best(net, self.error, every=max(1, num_steps // 10))
        with _frozen(net, optimizer):
            done = fit(
                net,
                self.batches,
                self.loss,
                num_steps=num_steps,
                optimizer=optimizer,
                scheduler=cosine,
                callbacks=[best],
                progress=self.progress,
            )
        net.load_state_dict(best.weights)
        self.note(net, name, done.loss)

    def last(self, net: Unroll, num_steps: int, *, thresholds: float = 1e-2, matrices: float = 3e-4) -> None:
        """The last stage: end to end, or layer after layer where that was asked for."""
        if not self.stagewise:
            return self.adam(net, "all", num_steps, thresholds=thresholds, matrices=matrices)

        def adam(layers: list[dict[str, Any]]) -> torch.optim.Optimizer:
            """The rate of a kind of parameters times that of its layer."""
            name = {parameter: name for name, parameter in net.named_parameters()}
            groups = []
            for layer in layers:
                for group in _groups(((name[p], p) for p in layer["params"]), thresholds, matrices):
                    groups.append({**group, "lr": group["lr"] * layer["lr"]})
            return torch.optim.Adam(groups)

        done = fit_stagewise(
            net,
            self.batches,
            self.loss,
            num_steps=self.steps(num_steps),
            lr=1.0,
            optimizer=adam,
            validation=self.error,
            progress=self.progress,
        )
        self.history.loss += done.loss
        self.history.stages += done.stages

    @torch.no_grad()
    def error(self, net: nn.Module) -> float:
        """What decides which weights are best: the loss on the validation signals."""
        return self.loss(net, self.held_out).item()

    def note(self, net: Unroll, name: str, losses: list[float]) -> None:
        self.history.loss += losses
        self.history.stages.append(Stage(len(net), name, len(losses), losses[0], losses[-1]))


class _LayerErrors(nn.Module):
    """log e_K + c mean_k log e_k with e_k = sum_i |x_ik - x_i|^2, over all layers in between but the first quarter."""

    def __init__(self, between: float = 0.1) -> None:
        super().__init__()
        self.between = between

    def forward(self, net: Unroll, batch: tuple[Tensor, Tensor]) -> Tensor:
        y, x = batch
        *inner, last = [(found - x).abs().square().sum() for found in net.iterates(y)]
        tiny = torch.finfo(last.dtype).tiny  # where all codes are exact
        errors = torch.stack([last, *inner[len(inner) // 4 :]]).clamp(min=tiny).log()
        return errors[0] + self.between * errors[1:].mean() if len(errors) > 1 else errors[0]


class _Best:
    """A callback that keeps the weights of the lowest validation error, those from before the training included."""

    def __init__(self, net: nn.Module, error: Callable[[nn.Module], float], every: int) -> None:
        self.error, self.every = error, every
        self.lowest = math.inf
        self(0, 0.0, net)

    def __call__(self, step: int, loss: float, net: nn.Module) -> None:
        if step % self.every == 0:
            found = self.error(net)
            if step == 0 or found < self.lowest:
                self.lowest, self.weights = found, copy.deepcopy(net.state_dict())


def _groups(named: Iterable[tuple[str, nn.Parameter]], thresholds: float, matrices: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer; a rate of 0 leaves the parameters out."""
    rates: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named:
        is_threshold = name.endswith(("log_theta", "log_lambda"))
        rate = matrices if parameter.dim() > 1 else thresholds if is_threshold else 1e-2
        rates.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in rates.items() if rate > 0]


@contextlib.contextmanager
def _frozen(net: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """No gradients for what the optimizer does not hold: they would cost as much as those of the rest."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    others = [parameter for parameter in net.parameters() if parameter.requires_grad and parameter not in held]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
