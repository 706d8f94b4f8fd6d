"""`Trace`: what happened in every iteration, recorded by hooks from outside the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unrolled._tree import State, detach, map_state
from unrolled.stopping import Running
from unrolled.unroll import Unroll

Metric = Callable[[Any], Any]


class Trace:
    r"""Record every iteration of the latest call of a network: states, and any function of the readouts.

    Nothing of it is in the loop: hooks on the steps are put on when the `with` block begins and taken off when it ends,
    so a network that is not traced pays nothing. Gradients are neither needed nor kept. Only calls of the network
    itself are recorded, not `net.run` or `net.iterates`.

    Args:
        net: the network, an `Unroll`. Not a compiled one: hooks do not run there.
        metrics: names and functions of the readout after an iteration; each returns a number or a Tensor, the same
            shape every time.
        states: whether to keep the states themselves, in `trace.states`.

    Attributes:
        states: the state after each iteration (detached), if `states=True`.
        num_iters: with a stopping rule, a LongTensor (batch,) of iterations that each sample used; without one,
            the number of iterations run.

    Example:
        >>> with Trace(net, {"sparsity": lambda x: (x != 0).float().mean()}) as trace:   # doctest: +SKIP
        ...     net(y)
        >>> trace["sparsity"]                                                             # doctest: +SKIP
        array([0.55, 0.41, 0.33, 0.3 ], dtype=float32)
    """

    def __init__(self, net: Unroll, metrics: Mapping[str, Metric] | None = None, *, states: bool = False) -> None:
        if not isinstance(net, Unroll):
            raise TypeError(
                f"net must be an Unroll, got {type(net).__name__}. Of a compiled network trace the original; of a "
                "larger model trace the Unroll inside it."
            )
        if net._compiled_call_impl is not None:
            raise TypeError("net is compiled in place by net.compile(), where hooks do not run. Trace it uncompiled.")
        self.net = net
        self.metrics = dict(metrics or {})
        for name, metric in self.metrics.items():
            if not callable(metric):
                raise TypeError(f"metrics[{name!r}] must be a function of the readout, got {metric!r}.")
        self.keeps_states = states
        self._recording = False
        self._handles: list[Any] = []
        self._clear()

    def __enter__(self) -> Trace:
        rule = self.net.stop
        if rule is None:
            # One hook per distinct step: a tied network has one.
            watched: list[nn.Module] = list(self.net.steps)
        else:
            watched = [rule]
        self._handles = [
            self.net.register_forward_pre_hook(self._begin),
            self.net.register_forward_hook(self._end, always_call=True),
            *(module.register_forward_hook(self._record) for module in watched),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __getitem__(self, name: str) -> np.ndarray:
        """The values of one metric, (iterations, *shape)."""
        if name not in self._values:
            raise KeyError(
                f"{name!r} is not recorded here; there is {', '.join(map(repr, self._values)) or 'no metric'}."
            )
        if not self._values[name]:
            raise RuntimeError(f"{name!r} has no values yet: call the network inside the with block first.")
        return torch.stack(self._values[name]).cpu().numpy()

    def __len__(self) -> int:
        """How many iterations the latest call ran."""
        return self._count

    @property
    def num_iters(self) -> int | Tensor:
        return self._count if self._used is None else self._used

    def to_dict(self) -> dict[str, Any]:
        """Everything recorded but the states, as plain lists and numbers, ready for JSON."""
        used = self.num_iters
        values = {name: [value.tolist() for value in kept] for name, kept in self._values.items()}
        return {"num_iters": used.tolist() if isinstance(used, Tensor) else used, **values}

    def _clear(self) -> None:
        self.states: list[State] = []
        self._values: dict[str, list[Tensor]] = {name: [] for name in self.metrics}
        self._count = 0
        self._used: Tensor | None = None

    def _begin(self, net: nn.Module, inputs: Any) -> None:
        self._clear()
        self._recording = True

    def _end(self, net: nn.Module, inputs: Any, output: Any) -> None:
        # The steps run again when Checkpointed recomputes them in the backward pass: that is no new iteration.
        self._recording = False

    def _record(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._recording:
            return
        with torch.no_grad():
            if isinstance(output, Running):
                before = inputs[1].active.long()
                self._used = before if self._used is None else self._used + before
                output = output.state
            self._count += 1
            state = detach(output)
            if self.keeps_states:
                # A step may work in place: what is kept must not change under it.
                self.states.append(map_state(torch.clone, state))
            readout = self.net[0].readout(state) if self.metrics else None
            for name, metric in self.metrics.items():
                # A clone, for a metric may return the state itself; numpy has no bfloat16.
                value = torch.as_tensor(metric(readout)).clone()
                self._values[name].append(value.float() if value.dtype == torch.bfloat16 else value)
