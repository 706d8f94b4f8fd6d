"""Learned halting: the number of iterations is a random variable, all of whose outcomes can be enumerated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State, leaves
from unrolled.step import Step
from unrolled.stopping.count import Count, probability_of_going_on
from unrolled.stopping.heads import Settling
from unrolled.stopping.rule import Running, Stopping, batch_of

Head = Callable[[Step, State, State], Tensor]


class Halting(Stopping):
    r"""Go on with probability $p_t$, $q(n) = p_1 \cdots p_{n-1} (1 - p_n)$: a learned number of iterations.

    After iteration t a head looks at the state of each sample and gives the logit of $p_t$, the probability that the
    sample goes on. In a call, `net(y)`, a sample stops at the first $p_t < 1/2$, by itself: what it gets does not
    depend on its batch mates, and `unrolled.Trace` tells how many iterations it used. The call itself gives no gradient
    to the head, as a decision has none. To train, take `ExpectedLoss`, which runs all iterations and weighs the loss
    after n of them by $q(n)$; nothing is sampled. Of K iterations the last always stops: $q(K) = p_1 \cdots p_{K-1}$.

    Args:
        head: a module called as `head(step, before, after)` with the states around an iteration; it returns one logit
            a sample, (batch,) or (batch, 1). `Reading(module)` makes one of a network that looks at the readout;
            `None` is `Settling()`, which starts as a tolerance of 1 %.
        prior: $\pi$, between 0 and 1, of the geometric prior of going on, to which `ExpectedLoss` pulls: an iteration
            costs $\log 1/\pi$.
        at_start: whether a sample may also stop before the first iteration, with the first state as its answer. The
            head is then asked about that, too, with `before` and `after` both the first state.

    Raises:
        TypeError: `head` is no module.
        ValueError: `prior` is not between 0 and 1; in a call, the head does not return one logit a sample.

    Example:
        >>> dictionary = torch.nn.functional.normalize(torch.randn(20, 40), dim=0)
        >>> net = LISTA(dictionary, 16, alpha=0.1, stop=Halting())
        >>> y, x = torch.randn(64, 20), torch.randn(64, 40)
        >>> loss = ExpectedLoss(lambda found, batch: (found - batch[1]).square().sum(-1), weight=0.1)
        >>> history = fit(net, [(y, x)], loss, num_steps=3)
        >>> net(y).shape
        torch.Size([64, 40])

    Reference:
        A. Banino, J. Balaguer and C. Blundell, "PonderNet: Learning to Ponder", 2021; the enumeration is that of the
        count of objects in `unrolled.scene.AIR`.
    """

    def __init__(self, head: nn.Module | None = None, *, prior: float = 0.5, at_start: bool = False) -> None:
        super().__init__()
        if head is not None and not isinstance(head, nn.Module):
            raise TypeError(
                f"head must be a torch.nn.Module called as head(step, before, after), got {head!r}. A network that "
                "looks at the readout is Reading(network)."
            )
        self.head = Settling() if head is None else head
        self.prior = probability_of_going_on(prior)
        self.at_start = bool(at_start)

    def logits(self, step: Step, before: State, after: State) -> Tensor:
        """The head's logits of going on, (batch,)."""
        logits = self.head(step, before, after)
        batch, _ = batch_of(step, after)
        if isinstance(logits, Tensor) and logits.shape == (*batch, 1):
            logits = logits.squeeze(-1)
        if not isinstance(logits, Tensor) or logits.shape != batch:
            came = _check.shape_of(logits)
            raise ValueError(
                f"head must return one logit a sample, {tuple(batch)} or {(*batch, 1)}, got {came}. How many trailing "
                f"dimensions of the readout make up a sample is {type(step).__name__}.event_dim={step.event_dim}."
            )
        return logits

    def begin(self, step: Step, state: State) -> Running:
        running = super().begin(step, state)
        return Running(state, ~self.settled(step, state, state)) if self.at_start else running

    def settled(self, step: Step, before: State, after: State) -> Tensor:
        return self.logits(step, before, after) < 0  # NaN is not: what has diverged has not settled

    def extra_repr(self) -> str:
        return f"prior={self.prior:g}" + (", at_start=True" if self.at_start else "")


@dataclass(frozen=True)
class Outcomes:
    """What a network with `Halting` may return for an input, and how likely.

    Attributes:
        states: the state after each possible number of iterations.
        readouts: what is read out of each, the possible answers.
        count: the distribution of the number of iterations, one outcome a readout, see `Count`.
    """

    states: list[State]
    readouts: list[Any]
    count: Count

    def expected(self, each: Callable[[Any], Tensor]) -> Tensor:
        r"""$\sum_n q(n)\,\mathrm{each}(x_n)$, (batch,), where `each(readout)` gives one number a sample, (batch,)."""
        values = [each(readout) for readout in self.readouts]
        batch = self.count.logits.shape[:-1]
        for value in values:
            if not isinstance(value, Tensor) or value.shape != batch:
                came = _check.shape_of(value)
                raise ValueError(
                    f"each must return one number a sample, {tuple(batch)}, got {came}. Take sums or means over a "
                    "sample's own dimensions only, such as .mean(-1)."
                )
        return self.count.expected(torch.stack(values, -1))


def outcomes(net: Any, input: Any, *context: Any, state: State | None = None, num_iters: int | None = None) -> Outcomes:
    """Run all iterations of a network with `Halting`, and keep every possible end, differentiable.

    Args:
        net: an `Unroll` with `stop=Halting(...)`.
        input, context, state, num_iters: as in a call of the network.

    Returns:
        The states and readouts after each possible number of iterations, and the distribution of that number.

    Raises:
        TypeError: the network has no `Halting`.

    Example:
        >>> net = LISTA(torch.eye(3), 4, alpha=0.1, stop=Halting())
        >>> ends = outcomes(net, torch.randn(2, 3))
        >>> len(ends.readouts), ends.count.probs.shape
        (4, torch.Size([2, 4]))
    """
    rule = getattr(net, "stop", None)
    if not isinstance(rule, Halting):
        raise TypeError(f"net must be an Unroll with stop=Halting(...), got {type(net).__name__} with stop={rule!r}.")
    free = net[:]  # shares everything with the network, but for the rule that it loses here
    free.stop = None
    advance, start, num_iters = free.start(input, *context, state=state, num_iters=num_iters)
    step = free[0]
    states = [start]
    for k in range(num_iters):
        states.append(advance(states[-1], k, k + 1))
    first = 0 if rule.at_start else 1
    logits = [rule.logits(step, states[max(k - 1, 0)], states[k]) for k in range(first, num_iters)]
    if logits:
        count = Count(torch.stack(logits, -1), first=first)
    else:  # one iteration, and no decision
        batch, _ = batch_of(step, start)
        count = Count(next(leaves(step.readout(start))).real.new_empty(*batch, 0), first=first)
    return Outcomes(states[first:], [step.readout(end) for end in states[first:]], count)


class ExpectedLoss(nn.Module):
    r"""$\frac1B \sum_i \sum_n q_i(n)\,\ell_i(n) + \lambda\,\mathrm{KL}(q_i \| \mathrm{prior})$, exact, for `fit`.

    $\ell_i(n)$ is the loss of sample i after n iterations. A prior that goes on with probability $\pi$ makes every
    iteration cost $\lambda \log 1/\pi$, in the units of the loss, less $\lambda$ times the entropy of q: that keeps
    decisions open while they are being learned.

    Args:
        each: `each(readout, batch)`, the losses of the samples, (batch,), after some number of iterations.
        weight: $\lambda$, at least 0, in the units of the loss.
        num_inputs: how many parts of a batch the network is called with, from the first on; a batch that is no tuple
            or list is the only input itself.

    Raises:
        TypeError: `each` is no function; when called, the network has no `Halting`.
        ValueError: `weight` is negative; when called, `each` does not return one number a sample.

    Example:
        >>> loss = ExpectedLoss(lambda x, batch: (x - batch[1]).square().sum(-1), weight=0.01)   # batches (y, x)
        >>> fit(net, batches, loss, num_steps=1000)                                              # doctest: +SKIP
    """

    def __init__(self, each: Callable[[Any, Any], Tensor], *, weight: float, num_inputs: int = 1) -> None:
        super().__init__()
        if isinstance(each, type) or not callable(each):
            raise TypeError(f"each must be a function each(readout, batch) of losses (batch,), got {each!r}.")
        self.each = each
        self.weight = _check.real("weight", weight, minimum=0.0)
        self.num_inputs = _check.integer("num_inputs", num_inputs)

    def forward(self, net: nn.Module, batch: Any) -> Tensor:
        inputs = batch[: self.num_inputs] if isinstance(batch, tuple | list) else (batch,)
        ends = outcomes(net, *inputs)
        rule: Any = net.stop
        return (ends.expected(lambda found: self.each(found, batch)) + self.weight * ends.count.kl(rule.prior)).mean()

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}, num_inputs={self.num_inputs}"
