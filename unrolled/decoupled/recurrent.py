"""Truncated backpropagation through time, with a synthetic gradient at the border of every window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unrolled.decoupled._border import Deliver, Gradients, Ledger, Send, estimate, trainable
from unrolled.decoupled.synthesisers import Synthesiser

RecurrentState = Any  # Tensor | tuple[Tensor, ...]


class Border(NamedTuple):
    """Where one window ends and the next begins."""

    state: RecurrentState  # without a past
    condition: Tensor | None  # what the synthesiser saw here; it learns by the same


class SyntheticBPTT(nn.Module):
    r"""$\sum_{\tau \ge t} \frac{\partial L_\tau}{\partial\theta} \approx \sum_{\tau = t}^{t + T} \frac{\partial
    L_\tau}{\partial\theta} + M(h_{t+T}) \frac{\partial h_{t+T}}{\partial\theta}$: what a window cannot see, estimated.

    A recurrent network is trained on windows of a long sequence. Truncated backpropagation through time takes the
    gradient of the later windows' losses for zero; here a synthesiser estimates it from the state at the border. What
    arrives at the beginning of a window is what the synthesiser learns for the border before it.

    Each window is called with the `Border` that the last one returned, and has a `loss.backward()` of its own:

        net = SyntheticBPTT(torch.nn.LSTM(8, 64, batch_first=True), MLPSynthesiser(2 * 64))
        border = None
        for k, (x, target) in enumerate(windows):
            out, border = net(x, border, last=k == len(windows) - 1)
            loss = criterion(head(out), target)
            optimizer.zero_grad()
            loss.backward()             # gradients of the network and of the synthesiser
            optimizer.step()

    A border holds a state without a past, and the condition that the synthesiser saw. With `ZeroSynthesiser`, and with
    any synthesiser before it has learned, this is truncated backpropagation through time, bit for bit.

    Args:
        net: `net(input, state) -> (output, state)` like `torch.nn.LSTM`, `GRU` and `RNN`, with states of shape
            (layers, batch, features); or a cell like `torch.nn.LSTMCell`, which is run along dimension 1 of the input.
        synthesiser: M, of as many features as all tensors of a state have together, layer by layer: 2 layers hidden
            for an LSTM, layers hidden for a GRU.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: when called, a synthesiser whose features are not those of the state, or a conditioned one without
            a condition.

    Example:
        >>> net = SyntheticBPTT(torch.nn.GRU(3, 5, batch_first=True), LinearSynthesiser(5))
        >>> out, border = net(torch.randn(2, 4, 3))
        >>> out, border = net(torch.randn(2, 4, 3), border, last=True)
        >>> out.square().mean().backward()
        >>> out.shape, border.state.requires_grad
        (torch.Size([2, 4, 5]), False)

    Reference:
        M. Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients", ICML 2017, section 2.1.
    """

    def __init__(self, net: nn.Module, synthesiser: Synthesiser) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module such as torch.nn.LSTM, got {net!r}.")
        if not isinstance(synthesiser, Synthesiser):
            raise TypeError(f"synthesiser must be a Synthesiser such as MLPSynthesiser(128), got {synthesiser!r}.")
        self.net = net
        self.synthesiser = synthesiser

    def forward(
        self,
        input: Any,
        start: Border | RecurrentState | None = None,
        *,
        condition: Tensor | None = None,
        last: bool = False,
    ) -> tuple[Any, Border]:
        """Run one window; returns its output and the border at its end.

        Args:
            input: what the network takes; for a cell (batch, time, features).
            start: the border that the window before returned. A sequence begins with `None`, or with a state of your
                own, which gets gradients like every other tensor.
            condition: what a conditioned synthesiser sees at the end of this window, such as what is still to come.
            last: whether the sequence ends here: nothing comes after, so the gradient at the end is zero, exactly.
        """
        learning = self.training and torch.is_grad_enabled()
        state = start.state if isinstance(start, Border) else start
        if state is not None:
            _parts(state)
        if isinstance(start, Border) and learning:
            state = self._entered(*start)
        out, after = self._run(input, state)
        ends = _parts(after)
        if learning and not last:
            if not isinstance(out, Tensor):
                raise TypeError(
                    f"net must return a Tensor and a state, got {type(out).__name__}. Put a module around it."
                )
            h = _joined(ends)
            gradient = estimate(self.synthesiser, h, condition) / len(h)
            out = Send.apply(_parted(gradient, ends), out, *ends)
        return out, Border(_like(after, [end.detach() for end in ends]), condition)

    def _entered(self, state: RecurrentState, condition: Tensor | None) -> RecurrentState:
        """The state, such that the gradient that comes back to it teaches the synthesiser."""
        starts = [part.detach() for part in _parts(state)]
        learned = trainable(self.synthesiser)
        if not learned:
            return _like(state, starts)
        h = _joined(starts)

        def answer(gradients: Gradients) -> Gradients:
            arrived = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, starts, strict=True)]
            lesson = Ledger(learned)
            lesson.add_lesson(self.synthesiser, h, condition, _joined(arrived) * len(h), len(h))
            return lesson.sums

        return _like(state, Deliver.apply(answer, len(starts), *starts, *learned))

    def _run(self, input: Any, state: RecurrentState | None) -> tuple[Any, RecurrentState]:
        if not isinstance(self.net, nn.RNNCellBase):
            return self.net(input, state)
        outputs = []
        for x in input.unbind(1):
            state = self.net(x, state)
            outputs.append(_parts(state)[0])
        return torch.stack(outputs, 1), state


def _parts(state: RecurrentState) -> list[Tensor]:
    parts = [state] if isinstance(state, Tensor) else list(state) if isinstance(state, tuple) else []
    if not parts or not all(isinstance(part, Tensor) and part.dim() in (2, 3) for part in parts):
        raise TypeError(
            "a state must be a Tensor or a tuple of Tensors, (layers, batch, features) or (batch, features), got "
            f"{type(state).__name__}."
        )
    return parts


def _like(state: RecurrentState, parts: Sequence[Tensor]) -> RecurrentState:
    return parts[0] if isinstance(state, Tensor) else tuple(parts)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """(batch, all features): layers side by side, tensor after tensor."""
    rows = [part if part.dim() == 2 else part.transpose(0, 1).flatten(1) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def _parted(h: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `_joined`."""
    widths = [part.shape[-1] * (1 if part.dim() == 2 else part.shape[0]) for part in like]
    rows = h.split(widths, 1)
    return [
        row if part.dim() == 2 else row.unflatten(1, (part.shape[0], part.shape[2])).transpose(0, 1)
        for row, part in zip(rows, like, strict=True)
    ]
