"""Decoupled neural interfaces for a plain chain of modules: each is updated as soon as its own forward is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unrolled import _check
from unrolled.decoupled._border import estimate, misfit, one_each, trainable
from unrolled.decoupled.synthesisers import Synthesiser

MakeOptimizer = Callable[[Iterable[Tensor]], Optimizer]
Loss = Callable[[Any, Any], Tensor]


class DecoupledModule(nn.Module):
    r"""$\theta \leftarrow \theta - \alpha\,M(f_\theta(h), c)\,\partial f_\theta(h) / \partial\theta$, at once.

    A module f, the synthesiser M of the gradient at its output, and an optimiser for each. `step` runs f and updates
    it, without waiting for what comes after; `learn` teaches M once the gradient of that output is known, whenever
    that is. `DecoupledChain` connects several in one process, `PipelineStage` across processes.

    Args:
        module: f, one activation in, one out. It is kept, not copied.
        synthesiser: M, or `None` for the last module of a chain, which has the loss itself.
        optimizer: called with the parameters of f, returns their optimiser: `lambda ps: torch.optim.Adam(ps, lr=1e-3)`.
            Any whose `step()` needs no closure.
        synthesiser_optimizer: the same for those of M; `optimizer` where not given.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: when called, an estimate of the wrong shape, or a missing target.

    Example:
        >>> first = DecoupledModule(
        ...     torch.nn.Linear(3, 5), LinearSynthesiser(5), lambda ps: torch.optim.SGD(ps, lr=0.1)
        ... )
        >>> h, _ = first.step(torch.randn(8, 3))
        >>> misfit = first.learn(h, torch.ones(8, 5))     # that gradient came later
        >>> misfit
        tensor(5.)
    """

    def __init__(
        self,
        module: nn.Module,
        synthesiser: Synthesiser | None,
        optimizer: MakeOptimizer,
        synthesiser_optimizer: MakeOptimizer | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {module!r}.")
        if synthesiser is not None and not isinstance(synthesiser, Synthesiser):
            raise TypeError(f"synthesiser must be a Synthesiser or None, got {synthesiser!r}.")
        self.module = module
        self.synthesiser = synthesiser
        self.optimizer = made(optimizer, module)
        self.synthesiser_optimizer = (
            None if synthesiser is None else made(synthesiser_optimizer or optimizer, synthesiser)
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.module(h)

    def step(
        self, h: Tensor, target: Tensor | None = None, *, loss: Loss | None = None, update: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Run the module on `h` and update it; returns its output (or the loss) and the gradient at `h`.

        That gradient is of one sample's loss, as `learn` of the module before takes it.

        Args:
            h: the activation; what led to it gets no gradient.
            target: of the synthesiser, where conditioned, or of `loss`.
            loss: for the last module, `loss(output, target)`, a mean over the batch; it takes the synthesiser's place.
            update: whether to update; if not, the gradient is `None`.
        """
        if not update:
            with torch.no_grad():
                out = self.module(h)
                return (out if loss is None else loss(out, target)), None
        h = h.detach().requires_grad_(h.is_floating_point())
        with torch.enable_grad():
            out = self.module(h)
            if loss is not None:
                value = weight = loss(out, target)
                gradient = None
            elif self.synthesiser is None:
                raise ValueError("this module has no synthesiser: pass loss=..., as for the last module of a chain.")
            else:
                value, weight = out, out
                gradient = estimate(self.synthesiser, out, target) / len(out)
        parameters = trainable(self.module)
        wanted = [*parameters, h] if h.requires_grad else parameters
        found = torch.autograd.grad(weight, wanted, gradient, allow_unused=True)
        for parameter, g in zip(parameters, found, strict=False):
            parameter.grad = g
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        if not h.requires_grad:  # integers, as an embedding takes them
            return value.detach(), None
        return value.detach(), torch.zeros_like(h) if found[-1] is None else found[-1] * len(h)

    def learn(self, h: Tensor, gradient: Tensor, target: Tensor | None = None) -> Tensor:
        """Teach the synthesiser what gradient of a sample's loss arrived at the output `h`; returns its squared error.

        Args:
            h: an output that `step` returned, of this batch or an earlier one.
            gradient: of its shape: that of the loss, which is a mean over the batch, times the batch size.
            target: of the same batch, where the synthesiser is conditioned.
        """
        if self.synthesiser is None:
            raise ValueError("this module has no synthesiser to teach: it is the last of its chain.")
        if gradient.shape != h.shape:
            raise ValueError(f"gradient must have the shape of h, {tuple(h.shape)}, got {tuple(gradient.shape)}.")
        with torch.enable_grad():
            error = misfit(self.synthesiser, h, target, gradient, len(h))
        if self.synthesiser_optimizer is not None and error.requires_grad:
            self.synthesiser_optimizer.zero_grad()
            error.backward()
            self.synthesiser_optimizer.step()
        return error.detach()


class DecoupledChain(nn.Module):
    r"""$h_i = f_i(h_{i-1})$, each $f_i$ updated by $\hat\delta_i = M_i(h_i, c)$ as soon as $h_i$ is there.

    In one call of `update` every module runs, is updated by the synthetic gradient at its output, and backpropagates
    the same through itself: the result, $\hat\delta_i\,\partial h_i/\partial h_{i-1}$, is what the synthesiser before
    it learns (a bootstrapped target). Only the last module has the true gradient. Nothing is kept for a backward pass
    through the whole chain.

    `probability` < 1 makes every module skip its update at random, each by itself; a module that skips sends nothing to
    the synthesiser before it. With an `input_model` not even the forward pass waits: module i runs on a prediction of
    its input from the input of the whole chain, $I_i(x)$, which learns from what module i - 1 really returns. In eval
    mode, and in every plain call, the chain is the ordinary composition.

    Args:
        modules: two or more, in order. They are kept, not copied.
        synthesiser: copied for every border, or a sequence with one for each; conditioned (cDNI) where it asks for it.
        optimizer: called with the parameters of a module, returns their optimiser; once for every module.
        synthesiser_optimizer: the same for synthesisers and input models; `optimizer` where not given.
        probability: of a module's update in one call of `update`, in (0, 1].
        input_model: one module from the chain's input to each border, as a sequence; `None` for true inputs.

    Attributes:
        optimizers: all of them, for schedulers and to save.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: fewer than two modules, a wrong number of synthesisers or input models, `probability` out of its
            range; when called, an estimate of the wrong shape or a missing target.

    Example:
        >>> layers = [torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU()), torch.nn.Linear(16, 3)]
        >>> chain = DecoupledChain(layers, LinearSynthesiser(16, condition=3), lambda ps: torch.optim.Adam(ps, lr=1e-2))
        >>> x, labels = torch.randn(32, 4), torch.randint(3, (32,))
        >>> losses = [chain.update(x, labels, torch.nn.functional.cross_entropy).item() for _ in range(100)]
        >>> losses[-1] < 0.7 * losses[0]
        True

    Reference:
        M. Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients", ICML 2017.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        synthesiser: Synthesiser | Sequence[Synthesiser],
        optimizer: MakeOptimizer,
        *,
        synthesiser_optimizer: MakeOptimizer | None = None,
        probability: float = 1.0,
        input_model: Sequence[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(modules, Sequence | nn.Sequential | nn.ModuleList):
            raise TypeError(f"modules must be a sequence of modules, got {type(modules).__name__}.")
        if len(modules) < 2:
            raise ValueError(f"modules has {len(modules)} modules; a chain with a border has at least two.")
        borders = len(modules) - 1
        makers = optimizer, synthesiser_optimizer
        parts = zip(modules, [*one_each(synthesiser, borders), None], strict=True)
        self.stages = nn.ModuleList(DecoupledModule(module, model, *makers) for module, model in parts)
        self.probability = _check.real("probability", probability, above=0.0)
        if self.probability > 1:
            raise ValueError(f"probability must be at most 1, got {probability}.")
        self.input_models = nn.ModuleList(_input_models(input_model, borders))
        self._input_optimizers = [made(synthesiser_optimizer or optimizer, model) for model in self.input_models]

    @property
    def optimizers(self) -> list[Optimizer]:
        pairs = [(stage.optimizer, stage.synthesiser_optimizer) for stage in self._stages]
        every = [*(one for pair in pairs for one in pair), *self._input_optimizers]
        return [one for one in every if one is not None]

    @property
    def _stages(self) -> list[DecoupledModule]:
        return cast(list[DecoupledModule], list(self.stages))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self._stages:
            x = stage(x)
        return x

    def update(self, x: Tensor, target: Tensor, loss: Loss) -> Tensor:
        """Run the chain on a batch, every module updated on the way; returns the loss of the last one, detached.

        Args:
            x: the batch.
            target: what `loss` and conditioned synthesisers see: labels, or the values of a regression.
            loss: `loss(output, target)`, a scalar, the mean over the batch.
        """
        previous: tuple[DecoupledModule, Tensor] | None = None
        h = x
        for i, stage in enumerate(self._stages):
            if i > 0 and self.input_models:
                h = self._predict(i - 1, x, h)
            last = stage.synthesiser is None
            chosen = self.probability == 1 or bool(torch.rand(()) < self.probability)
            out, gradient = stage.step(h, target, loss=loss if last else None, update=chosen)
            if previous is not None and gradient is not None:
                previous[0].learn(previous[1], gradient, target)
            previous, h = (stage, out), out
        return h

    def _predict(self, border: int, x: Tensor, real: Tensor) -> Tensor:
        """What the module behind the border runs on: a prediction, which then learns from what it should have been."""
        model, optimizer = self.input_models[border], self._input_optimizers[border]
        with torch.enable_grad():
            guess = model(x.detach())
            if guess.shape != real.shape:
                raise ValueError(
                    f"input_model[{border}] must return the shape of the activation there, {tuple(real.shape)}; got "
                    f"{tuple(guess.shape)}."
                )
            error = (guess - real).square().sum() / len(real)
        if optimizer is not None:
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
        return guess.detach()

    def extra_repr(self) -> str:
        return f"probability={self.probability:g}"


def made(make: Any, module: nn.Module) -> Optimizer | None:
    """The optimiser of what learns in a module; None where nothing does."""
    if isinstance(make, Optimizer) or not callable(make):
        raise TypeError(
            "optimizer must be a function from parameters to an optimiser, such as lambda ps: torch.optim.Adam(ps, "
            f"lr=1e-3), as every module has its own; got {make!r}."
        )
    parameters = trainable(module)
    optimizer = make(parameters) if parameters else None
    if not (optimizer is None or isinstance(optimizer, Optimizer)):
        raise TypeError(f"optimizer must return a torch.optim.Optimizer, got {optimizer!r}.")
    return optimizer


def _input_models(models: Any, borders: int) -> list[nn.Module]:
    if models is None:
        return []
    if not isinstance(models, Sequence | nn.ModuleList) or not all(isinstance(one, nn.Module) for one in models):
        raise TypeError(f"input_model must be a sequence of modules, one for each border, got {models!r}.")
    if len(models) != borders:
        raise ValueError(f"input_model has {len(models)} modules for {borders} borders. Give one for each.")
    return list(models)
