"""The distribution of a number that is counted up one by one, each time with a probability to go on."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from unrolled import _check


class Count:
    r"""$q(n) = p_1 \cdots p_n (1 - p_{n+1})$ for $n = 0 \dots T - 1$ and $q(T) = p_1 \cdots p_T$.

    The number of times that a loop goes on, if it goes on with probability $p_t$ for the t-th time, and T times at
    most. All is computed from logarithms, so that probabilities of $10^{-40}$ are neither 0 nor NaN.

    Args:
        logits: $\log p_t / (1 - p_t)$, (..., T); T may be 0.
        first: what the smallest outcome, $n = 0$, is called: 1 where the first iteration always runs. Outcomes are
            `first .. first + T`.

    Raises:
        TypeError: `logits` is no floating point tensor, `first` no int.
        ValueError: `logits` has no dimension.

    Example:
        >>> count = Count(torch.tensor([2.0, 0.0]).logit(eps=0.25))  # goes on with 3/4, and then with 1/4
        >>> count.probs
        tensor([0.2500, 0.5625, 0.1875])
        >>> count.decision
        tensor(1)
    """

    def __init__(self, logits: Tensor, *, first: int = 0) -> None:
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            came = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"logits must be a floating point tensor (..., T), got {came}.")
        if logits.dim() == 0:
            raise ValueError("logits must have shape (..., T), got (). One logit is logits[None].")
        self.logits = logits
        self.first = _check.integer("first", first, minimum=0)

    @property
    def log_reached(self) -> Tensor:
        r"""$\log q(n \ge t) = \log p_1 + \dots + \log p_t$ for $t = 1 \dots T$, (..., T)."""
        return logsigmoid(self.logits).cumsum(-1)

    @property
    def log_probs(self) -> Tensor:
        r"""$\log q(n)$, (..., T + 1)."""
        reached = torch.nn.functional.pad(self.log_reached, (1, 0))  # n >= 0 for sure
        stops = torch.nn.functional.pad(logsigmoid(-self.logits), (0, 1))  # who got to T stops there for sure
        return reached + stops

    @property
    def probs(self) -> Tensor:
        """$q(n)$, (..., T + 1)."""
        return self.log_probs.exp()

    @property
    def mean(self) -> Tensor:
        r"""$\mathrm{E}\,n$, with `first` added, (...)."""
        return self.first + self.log_reached.exp().sum(-1)

    @property
    def decision(self) -> Tensor:
        """The outcome of stopping at the first $p_t < 1/2$, with `first` added, (...) of integers."""
        goes_on = ~(self.logits < 0)  # NaN goes on: what has diverged has not settled
        return self.first + goes_on.long().cumprod(-1).sum(-1)

    def expected(self, values: Tensor) -> Tensor:
        r"""$\sum_n q(n) v_n$ of values (..., T + 1), one for each outcome."""
        self._one_each("values", values)
        return (self.probs * values).sum(-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw outcomes, (...) of integers with `first` added; `generator` in place of torch's own."""
        probs = self.probs.detach()
        drawn = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=generator)
        return self.first + drawn.reshape(probs.shape[:-1])

    def log_prob(self, outcome: Tensor) -> Tensor:
        """$\\log q$ of given outcomes (...), which count from `first`."""
        return self.log_probs.gather(-1, (outcome - self.first)[..., None]).squeeze(-1)

    def kl(self, prior: float | Count) -> Tensor:
        r"""$\mathrm{KL}(q \| \pi) = \sum_t q(n \ge t-1)\,\mathrm{KL}(\mathrm{Bern}(p_t) \| \mathrm{Bern}(\pi_t))$.

        Args:
            prior: another `Count`, or the one probability $\pi$ to go on, which is the geometric prior
                $\pi^n (1 - \pi)$ with what is beyond T at T.
        """
        own = self.logits
        if isinstance(prior, Count):
            other = prior.logits
        else:
            probability = probability_of_going_on(prior)
            other = own.new_tensor(math.log(probability) - math.log1p(-probability))
        goes = own.sigmoid() * (logsigmoid(own) - logsigmoid(other))
        stops = (-own).sigmoid() * (logsigmoid(-own) - logsigmoid(-other))
        # The t-th decision is made only where all before it were to go on.
        made = torch.nn.functional.pad(self.log_reached, (1, 0))[..., : own.shape[-1]].exp()
        return (made * (goes + stops)).sum(-1)

    def _one_each(self, name: str, values: Tensor) -> None:
        outcomes = self.logits.shape[-1] + 1
        if values.dim() == 0 or values.shape[-1] != outcomes:
            raise ValueError(
                f"{name} must have shape (..., {outcomes}), one for each outcome {self.first} .. "
                f"{self.first + outcomes - 1}, got {tuple(values.shape)}."
            )

    def __repr__(self) -> str:
        T = self.logits.shape[-1]
        return f"Count({self.first} .. {self.first + T}, batch={tuple(self.logits.shape[:-1])})"


def probability_of_going_on(prior: float) -> float:
    """Return `prior` if it is a number strictly between 0 and 1."""
    prior = _check.real("prior", prior, above=0.0, hint="It is the probability to go on, between 0 and 1.")
    if prior >= 1:
        raise ValueError(f"prior must be less than 1, got {prior}. It is the probability to go on, between 0 and 1.")
    return prior
