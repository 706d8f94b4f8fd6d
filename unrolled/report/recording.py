"""What happened in every layer of one call of a network, and what would happen without a layer, or with it twice."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unrolled._modes import modes_kept
from unrolled._tree import State, leaves, map_state
from unrolled.gradient import Backprop
from unrolled.gradient.protocol import moving
from unrolled.report import jacobian
from unrolled.step import Step
from unrolled.unroll import Unroll


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a network at work, as columns of a report see it.

    Attributes:
        index: its number, from 0.
        step: its step, with its parameters.
        state, output: the state that comes in, the state that goes out.
        context: what the step prepared.
        run: the call that it belongs to.
    """

    index: int
    step: Step
    state: State
    context: Any
    output: State
    run: Run

    @property
    def x(self) -> Any:
        """The readout of what comes in."""
        return self.run.readout(self.state)

    @property
    def new_x(self) -> Any:
        """The readout of what goes out."""
        return self.run.readout(self.output)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What the network was called with."""
        return self.run.inputs

    @property
    def probe(self) -> Layer:
        """The same layer for the first few samples only, for what is dear to measure."""
        few = self.run.probe
        return self if few is self.run else few.layers[self.index]

    def apply(self, state: State) -> State:
        """What the layer makes of another state."""
        return self.step(state, self.context)

    def norm(self, value: Any) -> Tensor:
        """The l2 norm of every sample of a state or readout, in float64."""
        return self.run.norm(value)

    def distance(self, value: Any, other: Any) -> Tensor:
        """The l2 norm of the difference of two states or readouts, for every sample, in float64."""
        return self.run.norm(map_state(torch.sub, value, other))

    def lipschitz(self, power_iters: int | None = None) -> Tensor | None:
        """The spectral norm of the layer's Jacobian at the state that comes in, for every sample, from below.

        Args:
            power_iters: power iterations; as many as the report was told where not given. `None` is returned for 0.
        """
        count = self.run.power_iters if power_iters is None else power_iters
        if count == 0:
            return None
        return jacobian.state_norm(self.apply, self.state, self.run.batch_dims, count)

    def norm_of(self, function: Callable[[Tensor], Tensor], at: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """The spectral norm of the Jacobian of any function of one tensor, for every sample, from below.

        Args:
            function: from a batch to a batch, sample by sample.
            at: where its Jacobian is taken.
            mask: of the shape of `at`; the Jacobian is taken between the entries that are True only.
        """
        if self.run.power_iters == 0:
            return None
        return jacobian.norm([at], lambda x: [function(x[0])], self.run.batch_dims, self.run.power_iters, mask)


class Run:
    """One call of a network, layer by layer: without gradients, in eval mode, with all layers and no stopping rule.

    Nothing of the network is changed. Made within `quiet(net)`.

    Args:
        net: the network.
        inputs: the arguments of the call.
        truth: what it should return, or `None`.
        power_iters: for the Jacobians of its layers.
        num_probes: how many samples these are taken of.

    Attributes:
        layers: the `Layer`s.
        batch_dims, batch: how many leading dimensions count samples, and their sizes.
        solution: where the objective is least, if the theory knows it.
        objectives: of the start and after every layer, (batch) each; empty where there is none.
    """

    def __init__(
        self, net: Unroll, inputs: tuple[Any, ...], truth: Any = None, *, power_iters: int, num_probes: int
    ) -> None:
        self.net = net
        self.inputs = inputs
        self.truth = truth
        self.power_iters = power_iters
        self.readout: Callable[[State], Any] = net[0].readout
        self.layers = [Layer(k, *visit, self) for k, visit in enumerate(_visits(net, inputs))]
        first = next(leaves(self.layers[0].x))
        self.batch_dims = max(0, first.dim() - net[0].event_dim)
        self.batch = tuple(first.shape[: self.batch_dims])
        self.num_probes = num_probes
        self.solution: Any = None
        self.objectives: list[Tensor] = []
        self._probe: Run | None = None
        self._memory: dict[str, Any] = {}

    @property
    def output(self) -> Any:
        """What the network returns."""
        return self.layers[-1].new_x

    @property
    def probe(self) -> Run:
        """The same for the first samples only."""
        if self._probe is None:
            size = self.batch[0] if self.batch else 0
            if size <= self.num_probes:
                self._probe = self
            else:
                few = tuple(_first(value, size, self.num_probes) for value in self.inputs)
                truth = map_state(lambda leaf: leaf[: self.num_probes], self.truth) if self.truth is not None else None
                self._probe = Run(self.net, few, truth, power_iters=self.power_iters, num_probes=self.num_probes)
        return self._probe

    def memo(self, name: str, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, computed the first time: for what several columns need.

        Args:
            name: of the value.
            compute: a function without arguments.
        """
        if name not in self._memory:
            self._memory[name] = compute()
        return self._memory[name]

    def norm(self, value: Any) -> Tensor:
        """The l2 norm of every sample of a state or readout, in float64."""
        squares = [leaf.to(_wide(leaf)).abs().square() for leaf in moving(value)]
        sums = [s.flatten(self.batch_dims).sum(-1) if s.dim() > self.batch_dims else s for s in squares]
        return torch.stack(sums).sum(0).sqrt()

    def without(self, k: int) -> Any:
        """What the network returns without layer k; where all layers are one step, with one iteration less."""
        if self.net.tied is True:
            return self.layers[-1].x
        return self._onwards(self.layers[k].state, k + 1)

    def repeated(self, k: int) -> Any:
        """What the network returns where layer k runs twice; where all layers are one step, the last one does."""
        layer = self.layers[-1 if self.net.tied is True else k]
        return self._onwards(layer.apply(layer.output), layer.index + 1)

    def _onwards(self, state: State, start: int) -> Any:
        for layer in self.layers[start:]:
            state = layer.apply(state)
        return self.readout(state)


@contextlib.contextmanager
def quiet(net: Unroll) -> Iterator[None]:
    """Eval mode without gradients; modes and random numbers are afterwards what they were."""
    devices = {tensor.device.index or 0 for tensor in net.parameters() if tensor.is_cuda}
    with modes_kept(net), torch.random.fork_rng(devices=sorted(devices)), torch.no_grad():
        net.eval()
        yield


def plain(net: Unroll) -> Unroll:
    """The same layers as a network that runs all of them, one after the other, whatever was asked of the original."""
    part = net[:]
    part.stop = None
    part.gradient = Backprop()
    part._compiled_call_impl = None  # hooks do not run in a compiled call
    part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict()  # those of the original are not ours
    return part


def _visits(net: Unroll, inputs: tuple[Any, ...]) -> list[tuple[Step, State, Any, State]]:
    """(step, state, context, new state) of every layer, by hooks: the network's own forward may do more than loop."""
    found: list[tuple[Step, State, Any, State]] = []

    def note(step: Any, arguments: tuple[Any, ...], output: State) -> None:
        state, context = arguments
        found.append((step, state, context, output))

    handles = [step.register_forward_hook(note) for step in net.steps]
    try:
        plain(net)(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _first(value: Any, size: int, count: int) -> Any:
    return value[:count] if isinstance(value, Tensor) and value.dim() > 0 and len(value) == size else value


def _wide(leaf: Tensor) -> torch.dtype:
    return torch.complex128 if leaf.is_complex() else torch.float64
