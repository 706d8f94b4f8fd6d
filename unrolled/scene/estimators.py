"""How the loss of a scene is estimated over the number of objects: all of them, or one drawn number."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled.stopping import Count


class Estimator(nn.Module, abc.ABC):
    r"""A surrogate whose gradient is that of $\sum_n q(n)\,\ell(n) + \mathrm{KL}(q \| \mathrm{prior})$.

    In the first `warmup` calls in train mode every number of objects counts the same, q is left alone, and there is no
    divergence. An object that has not learned to explain anything makes the picture worse; q would learn to do without
    objects before they are of any use, and then no gradient reaches them.

    Args:
        warmup: how many calls, at least 0. They are counted in a buffer, so that training can be resumed.
    """

    calls: Tensor

    def __init__(self, warmup: int = 0) -> None:
        super().__init__()
        self.warmup = _check.integer("warmup", warmup, minimum=0)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, losses: Tensor, count: Count, prior: float, scene: Tensor) -> Tensor:
        """One number a scene.

        Args:
            losses: (batch, T + 1), with each number of objects.
            count: the distribution q of that number.
            prior: probability that there is one more object.
            scene: (batch, C, H, W).

        Returns:
            (batch,).
        """
        warm = torch.zeros_like(self.calls, dtype=torch.bool)
        if self.training and self.warmup > 0:
            warm = self.calls < self.warmup
            self.calls += 1
        even = Count(_even(losses))
        surrogate = self.surrogate(losses, Count(torch.where(warm, even.logits, count.logits)), scene)
        return surrogate + torch.where(warm, 0.0, 1.0) * count.kl(prior)

    @abc.abstractmethod
    def surrogate(self, losses: Tensor, count: Count, scene: Tensor) -> Tensor:
        r"""What has the gradient of $\sum_n q(n)\,\ell(n)$, exactly or on average, (batch,)."""


def _even(losses: Tensor) -> Tensor:
    """Logits (..., T) with which all T + 1 numbers are equally probable: p_t = (T + 1 - t) / (T + 2 - t)."""
    T = losses.shape[-1] - 1
    left = torch.arange(T, 0, -1, device=losses.device, dtype=losses.dtype)
    return left.log().expand(*losses.shape[:-1], T)


class Enumerated(Estimator):
    r"""$\sum_n q(n)\,\ell(n)$, exactly. No noise from the count, and nothing else to learn.

    Args:
        warmup: in how many first calls every number of objects counts the same, see `Estimator`.

    Example:
        >>> losses, count = torch.tensor([[3.0, 1.0]]), Count(torch.zeros(1, 1))
        >>> Enumerated()(losses, count, 0.5, torch.zeros(1, 1, 8, 8))
        tensor([2.])
    """

    def surrogate(self, losses: Tensor, count: Count, scene: Tensor) -> Tensor:
        return count.expected(losses)

    def extra_repr(self) -> str:
        return f"warmup={self.warmup}"


class Sampled(Estimator):
    r"""$\ell(n) + (\ell(n) - b(x))\,\nabla \log q(n)$ for one drawn $n \sim q$, with a baseline $b(x)$ that learns.

    The score function estimator with the learned baseline of neural variational inference and learning (NVIL), as AIR
    was published. The baseline is fitted to the losses by its squared error, whose gradient reaches nothing else. Its
    target is the loss in units of a running mean and spread, as large losses would need large weights.

    The value that it returns serves for its gradient only: it contains the baseline's own loss. Draws from torch's
    random numbers.

    Args:
        baseline: a module that takes scenes (batch, C, H, W) and returns (batch,) or (batch, 1).
        warmup: in how many first calls every number of objects counts the same, see `Estimator`.
        momentum: of the running mean and spread, from 0 to below 1.

    Raises:
        TypeError: `baseline` is no module.
        ValueError: `momentum` is out of its range, or the baseline does not return one number a scene.

    Example:
        >>> baseline = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))
        >>> losses, count = torch.tensor([[3.0, 1.0]]), Count(torch.zeros(1, 1))
        >>> Sampled(baseline)(losses, count, 0.5, torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1])

    Reference:
        A. Mnih and K. Gregor, "Neural Variational Inference and Learning in Belief Networks", ICML 2014.
    """

    mean: Tensor
    spread: Tensor
    seen: Tensor

    def __init__(self, baseline: nn.Module, *, warmup: int = 0, momentum: float = 0.9) -> None:
        super().__init__(warmup)
        if not isinstance(baseline, nn.Module):
            raise TypeError(f"baseline must be a torch.nn.Module of scenes, got {baseline!r}.")
        self.baseline = baseline
        self.momentum = _check.real("momentum", momentum, minimum=0.0)
        if self.momentum >= 1:
            raise ValueError(f"momentum must be less than 1, got {momentum}.")
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    def surrogate(self, losses: Tensor, count: Count, scene: Tensor) -> Tensor:
        drawn = count.sample()
        loss = losses.gather(-1, (drawn - count.first)[..., None]).squeeze(-1)
        guess = self.baseline(scene)
        guess = guess.squeeze(-1) if guess.shape == (*loss.shape, 1) else guess
        if guess.shape != loss.shape:
            raise ValueError(f"baseline must return one number a scene, {tuple(loss.shape)}, got {tuple(guess.shape)}.")
        if self.training:
            self._update(loss.detach())
        standard = (loss.detach() - self.mean) / self.spread
        surprise = (standard - guess).detach()
        return loss + surprise * self.spread * count.log_prob(drawn) + (standard - guess).square()

    @torch.no_grad()
    def _update(self, loss: Tensor) -> None:
        spread = loss.std(correction=0).clamp_min(1e-6)
        rate = torch.where(self.seen, 1 - self.momentum, 1.0)  # the first batch sets them
        self.mean.lerp_(loss.mean().to(self.mean), rate.to(self.mean))
        self.spread.lerp_(spread.to(self.spread), rate.to(self.spread))
        self.seen.fill_(True)

    def extra_repr(self) -> str:
        return f"warmup={self.warmup}, momentum={self.momentum:g}"
