"""`SyntheticGradients`: a long unrolled network, trained window by window with estimated gradients at the borders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State, describe, leaves, map_state
from unrolled.decoupled._border import Deliver, Gradients, Ledger, estimate, one_each, trainable
from unrolled.decoupled.synthesisers import Synthesiser
from unrolled.gradient import Advance, Backprop
from unrolled.unroll import Unroll


class SyntheticGradients(nn.Module):
    r"""$\partial L / \partial x_b \approx M_b(x_b, c)$: an `Unroll` backpropagated in windows of `every` layers.

    At every border between two windows a synthesiser M estimates the gradient that the loss will send there. So each
    window is backpropagated as soon as it has run, and forgotten: memory is that of one window, however many there
    are, and no window waits for those behind it. Only the last window gets the true gradient of the loss. What arrives
    at a window's beginning, $\hat\delta_{b'}\,\partial x_{b'} / \partial x_b$, is what the synthesiser there learns.

    It is used like the network itself, with the target as one more argument:

        net = SyntheticGradients(LISTA(D, 32, alpha=0.1), every=8, synthesiser=LinearSynthesiser(n, n, difference=True))
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for y, x in batches:
            loss = (net(y, target=x) - x).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    `loss.backward()` hands over all gradients at once, also those of windows that are long forgotten and those of the
    synthesisers: `zero_grad` before it, gradient clipping, several optimisers and `fit` work as always. In eval mode
    and under `torch.no_grad` the network runs as it is, `target` is not needed, and gradients, where asked for, are
    exact.

    With `ZeroSynthesiser`, and with any synthesiser before it has learned, gradients are those of
    `Truncated(last=every)`, bit for bit. If `every` does not divide the number of layers, the first window is shorter.
    In a NamedTuple state, the floating point tensors with a batch meet the synthesiser as one, concatenated along the
    first dimension of an event (the features of vectors, the channels of images); no gradient crosses a border through
    the others.

    Args:
        net: the network, with `gradient=Backprop()` and without a stopping rule. It is kept, not copied.
        every: iterations in a window, from 1 to `len(net)`; at `len(net)` there is no border, and this is `Backprop`.
        synthesiser: copied for every border, each copy learns for itself; or a sequence with one for each border.
        scale: what turns the gradient of the loss into that of one sample, the unit in which synthesisers estimate.
            `None` takes the number of samples in the batch: right for a loss that is a mean over samples of a sum over
            features. For a mean over features too, such as `torch.nn.functional.mse_loss`, give the number of entries
            of the whole batch.

    Raises:
        TypeError: `net` is no `Unroll`, `synthesiser` no `Synthesiser` or sequence of them.
        ValueError: `every` is longer than the network, the number of synthesisers is not that of borders, the network
            has another gradient strategy or a stopping rule; when called, a conditioned synthesiser without a
            `target`, or an estimate of the wrong shape.

    Example:
        >>> D = torch.nn.functional.normalize(torch.randn(10, 20), dim=0)
        >>> net = SyntheticGradients(LISTA(D, 32, alpha=0.1), every=8, synthesiser=LinearSynthesiser(20, 20))
        >>> y, x = torch.randn(4, 10), torch.randn(4, 20)
        >>> (net(y, target=x) - x).square().sum(1).mean().backward()
        >>> len(net.synthesisers), net.net.steps[31].weight.grad.shape
        (3, torch.Size([20, 10]))

    Reference:
        M. Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients", ICML 2017.
    """

    def __init__(
        self,
        net: Unroll,
        every: int,
        synthesiser: Synthesiser | Sequence[Synthesiser],
        *,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(net, Unroll):
            raise TypeError(
                f"net must be an Unroll, got {type(net).__name__}. For a chain of modules see DecoupledChain."
            )
        if net.gradient != Backprop():
            raise ValueError(
                f"net has gradient={net.gradient}, but here windows decide how gradients flow. Build it with "
                "gradient=Backprop()."
            )
        if net.stop is not None:
            raise ValueError(
                f"net has stop={net.stop}; windows need a fixed number of iterations. Build it with stop=None."
            )
        if _check.integer("every", every) > len(net):
            raise ValueError(f"every is {every}, but the network has {len(net)} iterations. Give at most {len(net)}.")
        self.net = net
        self.every = every
        self.scale = None if scale is None else _check.real("scale", scale, above=0.0)
        self.synthesisers = nn.ModuleList(one_each(synthesiser, len(self.borders)))

    @property
    def borders(self) -> list[int]:
        """Before which iterations the borders are: `[8, 16, 24]` for 32 iterations in windows of 8."""
        return list(range(len(self.net) % self.every or self.every, len(self.net), self.every))

    def forward(self, input: Any, *context: Any, target: Tensor | None = None) -> Any:
        """Run the network; in train mode, backpropagate every window but the last on the way.

        Args:
            input: what the network takes.
            *context: the rest of what it takes.
            target: what conditioned synthesisers see; neither the network nor other synthesisers use it.
        """
        if not (self.training and torch.is_grad_enabled()):
            return self.net(input, *context)
        given = [x for x in (input, *context) if isinstance(x, Tensor) and x.requires_grad]
        sources = [*given, *(p for p in self.net.parameters() if p.requires_grad)]
        if not self.borders or not sources:
            return self.net(input, *context)
        for synthesiser in self._models:
            if synthesiser.condition and target is None:
                raise ValueError(
                    f"target is missing: {type(synthesiser).__name__} is conditioned on {synthesiser.condition} "
                    "numbers. Call net(..., target=target), or build the synthesiser with condition=0."
                )
        return self._windows((input, *context), given, sources, target)

    def _windows(
        self, inputs: tuple[Any, ...], given: list[Tensor], sources: list[Tensor], target: Tensor | None
    ) -> Any:
        # The early windows see inputs without a past: their gradient ends there, and goes on from there only once.
        twins = [x.detach().requires_grad_() if any(x is y for y in given) else x for x in inputs]
        advance, state, num_iters = self.net.start(*twins)
        kept = Ledger([x for x in twins if isinstance(x, Tensor) and x.requires_grad] + sources[len(given) :])
        learned = Ledger(trainable(self.synthesisers))
        begin, before = 0, None
        for border, synthesiser in zip(self.borders, self._models, strict=True):
            state, h, arrived = self._window(advance, state, begin, border, synthesiser, target, kept)
            if before is not None:
                learned.add_lesson(*before, arrived, self._samples(h))
            begin, before = border, (synthesiser, h, target)

        entry = _meeting(state)

        def answer(gradients: Gradients) -> Gradients:
            # This lives in the graph, so it must hold none of the tensors that the graph leads to.
            assert before is not None
            arrived = self._joined([_or_zero(g, x) for g, x in zip(gradients, entry, strict=True)])
            total = learned.copy()
            total.add_lesson(*before, arrived * self._scale(before[1]), self._samples(before[1]))
            return [*kept.sums, *total.sums]

        if given:
            advance = self.net.start(*inputs)[0]
        delivered = iter(Deliver.apply(answer, len(entry), *entry, *sources, *learned.tensors))
        start = map_state(lambda leaf: next(delivered) if _meets(leaf) else leaf, state)
        return self.net[0].readout(advance(start, begin, num_iters))

    def _window(
        self,
        advance: Advance,
        state: State,
        begin: int,
        end: int,
        synthesiser: Synthesiser,
        target: Tensor | None,
        kept: Ledger,
    ) -> tuple[State, Tensor, Tensor]:
        """Run a window and backpropagate it; returns the next one's start, and at both its ends what learning needs.

        In a function of its own, so that nothing holds the window's graph once it returns.
        """
        entry = _meeting(state) if begin else []
        state = advance(state, begin, end)
        leaving = _meeting(state)
        h = self._joined([leaf.detach() for leaf in leaving])
        guess = self._parted(estimate(synthesiser, h, target) / self._scale(h), leaving)
        pairs = [(leaf, gradient) for leaf, gradient in zip(leaving, guess, strict=True) if leaf.requires_grad]
        ends = [*kept.tensors, *entry]
        found: Gradients = [None] * len(ends)
        if pairs:
            outputs, weights = zip(*pairs, strict=True)
            # What `prepare` computed is shared by all windows, so it must outlive this one.
            found = torch.autograd.grad(outputs, ends, weights, allow_unused=True, retain_graph=True)
        kept.add(kept.tensors, found[: len(kept.tensors)])
        here = [_or_zero(g, x) for g, x in zip(found[len(kept.tensors) :], entry, strict=True)]
        arrived = self._joined(here) * self._scale(h) if here else h
        return map_state(_start_anew, state), h, arrived

    @property
    def _models(self) -> list[Synthesiser]:
        return cast(list[Synthesiser], list(self.synthesisers))

    def _samples(self, h: Tensor) -> int:
        return h.shape[: h.dim() - self.net[0].event_dim].numel()

    def _scale(self, h: Tensor) -> float:
        return self._samples(h) if self.scale is None else self.scale

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """The tensors of a state as one, along the first dimension of an event."""
        if len(parts) == 1:
            return parts[0]
        axis = -self.net[0].event_dim
        try:
            return torch.cat(parts, axis)
        except RuntimeError as error:
            raise ValueError(
                f"the tensors of this state, {', '.join(str(tuple(part.shape)) for part in parts)}, cannot be put "
                f"together along dimension {axis} for a synthesiser. Use Checkpointed, or a step with another state."
            ) from error

    def _parted(self, h: Tensor, like: list[Tensor]) -> tuple[Tensor, ...]:
        """The inverse of `_joined`."""
        if len(like) == 1:
            return (h,)
        axis = -self.net[0].event_dim
        return h.split([part.shape[axis] for part in like], axis)

    def extra_repr(self) -> str:
        return f"every={self.every}, scale={self.scale}"


def _meets(leaf: Tensor) -> bool:
    """Whether gradients cross a border through this tensor of a state."""
    if leaf.is_complex():
        raise TypeError("the state is complex, synthesisers are for real ones. Use Checkpointed for this network.")
    return leaf.is_floating_point() and leaf.dim() > 0


def _meeting(state: State) -> list[Tensor]:
    found = [leaf for leaf in leaves(state) if _meets(leaf)]
    if not found:
        raise TypeError(
            f"no gradient can cross a border of this network: its state is {describe(state)}, without a floating point "
            "tensor that has a batch."
        )
    return found


def _start_anew(leaf: Tensor) -> Tensor:
    return leaf.detach().requires_grad_() if _meets(leaf) else leaf.detach()


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
