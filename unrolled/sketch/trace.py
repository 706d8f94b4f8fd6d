"""`TraceSketch`: what happened in every layer of an unrolled network, in one vector of fixed size for each sample."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import leaves
from unrolled.sketch.decoders import Decoder
from unrolled.sketch.flat import FlatSketch, Slot
from unrolled.trace import Trace
from unrolled.unroll import Unroll

Metric = Callable[[Any], Any]


class TraceSketch(FlatSketch):
    r"""$s = \frac1T \sum_{t} R_t \bigl(\tfrac12 R_{M_t,1} x_t + \tfrac12 R_{M_t,2} e_1\bigr)$, $x_t$ of layer $t$.

    The trace of an iteration as one flat tuple: the attributes $x_t$ of every layer (objective, residual norm, support
    size, step, threshold, ...) in `d` numbers a sample. Where there is room for all, $T (m + 1) \le d$, everything is
    read back exactly by least squares; with less room by a matched filter, with an error that falls with $d^{-1/2}$.
    `watch` fills it while a network runs; `update` fills it by hand.

    Args:
        names: of the attributes of a layer.
        num_layers: how many layers T there is room for.
        d: dimension of the sketch.
        seed: of the rotations.
        scales: name -> typical size of an attribute, positive, 1 where not given. Attributes are divided by it, so
            that for a matched filter the large ones do not drown the small.
        modules: the name of each layer's module, for `count` and `mean`; "layer" for all where not given.
        device, dtype: of the sketch; the CPU and float64 where not given.

    Shape:
        - attributes: (..., m), m the number of names
        - vector: (..., kept)

    Raises:
        TypeError: numbers or names of a wrong type.
        ValueError: `d < 1`, more names than `d`, a scale that is not positive or of an unknown name, as many modules
            as there are no layers, NaN, a layer that does not exist or is there already.

    Example:
        >>> sketch = TraceSketch(["objective", "support"], num_layers=3, d=64)
        >>> for t, x in enumerate([[4.0, 9.0], [2.0, 6.0], [1.0, 5.0]]):
        ...     sketch.update(t, torch.tensor(x, dtype=torch.float64))
        >>> round(sketch.recover(1)["support"].item(), 6), round(sketch.count("layer").item(), 6)
        (6.0, 3.0)

    Reference:
        B. Ghazi, R. Panigrahy and J. Wang, "Recursive Sketches for Modular Deep Learning", ICML 2019, whose tuple this
        is, of one level.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_layers: int,
        d: int = 1024,
        seed: int = 0,
        *,
        scales: Mapping[str, float] | None = None,
        modules: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
            raise TypeError(f"names must be a sequence of strings such as ['objective', 'support'], got {names!r}.")
        if len(set(names)) < len(names):
            raise ValueError(f"names must differ, got {list(names)}.")
        self.names = list(names)
        self.num_layers = _check.integer("num_layers", num_layers)
        super().__init__(d, seed, 1 / self.num_layers, device=device, dtype=dtype)
        if len(self.names) > d:
            raise ValueError(f"d must be at least {len(self.names)}, the number of names, got {d}.")
        unknown = [name for name in scales or {} if name not in self.names]
        if unknown:
            raise ValueError(f"scales names {unknown[0]!r}, which is no attribute; there is {', '.join(self.names)}.")
        given = {name: _check.real(f"scales[{name!r}]", value, above=0.0) for name, value in (scales or {}).items()}
        self._scales = torch.tensor([given.get(name, 1.0) for name in self.names], dtype=dtype, device=device)
        modules = ["layer"] * self.num_layers if modules is None else list(modules)
        if len(modules) != self.num_layers:
            raise ValueError(f"modules must name the module of each of the {num_layers} layers, got {len(modules)}.")
        self._slots = [Slot(module, t, len(self.names)) for t, module in enumerate(modules)]

    @property
    def slots(self) -> list[Slot]:
        return self._slots

    def update(self, layer: int, attributes: Tensor | Mapping[str, Any], present: Tensor | None = None) -> None:
        """Add the attributes of a layer.

        Args:
            layer: its number, from 0.
            attributes: (..., m) in the order of `names`, or name -> (...), numbers or tensors.
            present: (...) bool, in which samples the layer ran; in all of them where not given.
        """
        slot = self._slot(layer)
        if isinstance(attributes, Mapping):
            if set(attributes) != set(self.names):
                raise ValueError(f"attributes must have the names {self.names}, got {sorted(attributes)}.")
            dtype, device = self.sketcher.dtype, self.sketcher.device
            parts = [torch.as_tensor(attributes[name]).detach().to(device, dtype) for name in self.names]
            attributes = torch.stack(torch.broadcast_tensors(*parts), -1)
        if not isinstance(attributes, Tensor) or attributes.dim() == 0 or attributes.shape[-1] != len(self.names):
            shape = tuple(attributes.shape) if isinstance(attributes, Tensor) else type(attributes).__name__
            raise ValueError(f"attributes must have shape (..., {len(self.names)}), one for each name, got {shape}.")
        _check.signals("attributes", attributes, self._scales, len(self.names), of="the sketch")
        if present is not None and (present.dtype != torch.bool or present.shape != attributes.shape[:-1]):
            raise ValueError(
                f"present must be bool of shape {tuple(attributes.shape[:-1])}, got {present.dtype} of shape "
                f"{tuple(present.shape)}."
            )
        self._add(slot, attributes.detach() / self._scales, present)

    def recover(self, layer: int, *, decoder: Decoder | None = None) -> dict[str, Tensor]:
        """The attributes of a layer, name -> (...).

        Args:
            layer: its number, from 0.
            decoder: how to read, such as `MatchedFilter()`; least squares where it is determined, else the matched
                filter, if not given.
        """
        x = self._read(decoder)[self._slot(layer)][0] * self._scales
        return dict(zip(self.names, x.unbind(-1), strict=True))

    def ran(self, layer: int, *, decoder: Decoder | None = None) -> Tensor:
        """Whether a layer ran, (...): 1 or 0, and noise where the sketch is read by a matched filter.

        Args:
            layer: its number, from 0.
            decoder: as for `recover`.
        """
        return self._read(decoder)[self._slot(layer)][1]

    def mean(self, module: str, *, decoder: Decoder | None = None) -> Tensor:
        """The mean of the attributes over the layers of a module, (..., m) in the order of `names`.

        Args:
            module: its name.
            decoder: as for `recover`.
        """
        return super().mean(module, decoder=decoder) * self._scales

    @classmethod
    @contextlib.contextmanager
    def watch(
        cls, net: Unroll, metrics: Mapping[str, Metric] | None = None, *, num_layers: int | None = None, **options: Any
    ) -> Iterator[TraceSketch]:
        r"""`with TraceSketch.watch(net) as sketch: net(y)`: sketch the latest call of a network.

        By `Trace`, with its hooks and its rules. With a stopping rule, layers that a sample no longer ran are not in
        its sketch. The module of a layer is the name of its step's class.

        Args:
            net: the network.
            metrics: names and functions of the readout after a layer, each returning a number or one for each sample;
                `default_metrics(net)` and `change`, $\|x_t - x_{t-1}\|$, where not given.
            num_layers: room for more calls of a tied network; its own number where not given.
            **options: `d`, `seed`, `scales`, `modules`, `device` and `dtype` of the sketch.

        Example:
            >>> net = LISTA(torch.nn.functional.normalize(torch.randn(8, 16), dim=0), 5, alpha=0.1)
            >>> with TraceSketch.watch(net, d=256) as sketch:
            ...     x = net(torch.randn(3, 8))
            >>> support = sketch.recover(4)["support"]
            >>> torch.allclose(support, (x != 0).sum(-1).double())
            True
        """
        if not isinstance(net, Unroll):
            raise TypeError(f"net must be an Unroll, got {type(net).__name__}. Of any other network: NetworkSketch.")
        change = _Change(net[0].event_dim)
        metrics = {**default_metrics(net), "change": change} if metrics is None else metrics
        count = len(net) if num_layers is None else num_layers
        options.setdefault("modules", [type(net[min(t, len(net) - 1)]).__name__ for t in range(count)])
        sketch = cls(list(metrics), count, **options)
        with Trace(net, metrics) as trace:

            def begin(net: nn.Module, inputs: Any) -> None:
                sketch._clear()
                change.clear()

            def end(net: nn.Module, inputs: Any, output: Any) -> None:
                sketch._fill(trace)

            handles = [net.register_forward_pre_hook(begin), net.register_forward_hook(end)]
            try:
                yield sketch
            finally:
                for handle in handles:
                    handle.remove()

    def _fill(self, trace: Trace) -> None:
        if len(trace) > self.num_layers:
            raise ValueError(
                f"the network ran {len(trace)} iterations, the sketch has room for {self.num_layers}. Watch it with "
                f"num_layers={len(trace)}."
            )
        values = {name: torch.from_numpy(trace[name]) for name in self.names}  # (layers, ...) each
        used = trace.num_iters
        shapes = [value.shape[1:] for value in values.values() if value.dim() > 1]
        batch = used.shape if isinstance(used, Tensor) else shapes[0] if shapes else torch.Size()
        for name, value in values.items():
            if value.shape[1:] not in (torch.Size(), batch):
                raise ValueError(
                    f"metrics[{name!r}] returns shape {tuple(value.shape[1:])}, the samples are {tuple(batch)}. A "
                    "metric returns one number, or one for each sample."
                )
        for t in range(len(trace)):
            present = (used > t).cpu() if isinstance(used, Tensor) else None
            row = {name: value[t].expand(batch) for name, value in values.items()}
            self.update(t, row, None if present is None else present.to(self.sketcher.device))

    def _slot(self, layer: int) -> Slot:
        if _check.integer("layer", layer, minimum=0) >= self.num_layers:
            raise ValueError(f"layer must be less than {self.num_layers}, the number of layers, got {layer}.")
        return self._slots[layer]

    def __repr__(self) -> str:
        return f"TraceSketch({self.names}, num_layers={self.num_layers}, d={self.d}, kept={self.kept})"


def default_metrics(net: Unroll) -> dict[str, Metric]:
    r"""Attributes that every network has: `norm` $\|x\|$, `peak` $\|x\|_\infty$, `support` $\|x\|_0$ of a readout.

    Of a readout with several tensors the first counts. Objective, residual norm or thresholds need what only you know:
    give metrics of your own, with these or without.

    Args:
        net: the network.
    """
    dims = net[0].event_dim

    def flat(readout: Any) -> Tensor:
        x = next(leaves(readout))
        return x.reshape(*x.shape[: x.dim() - dims], -1)

    return {
        "norm": lambda readout: flat(readout).abs().square().sum(-1).sqrt(),
        "peak": lambda readout: flat(readout).abs().amax(-1),
        "support": lambda readout: (flat(readout) != 0).sum(-1),
    }


class _Change:
    """The distance of a readout from the one before, for each sample; of the first one from zero."""

    def __init__(self, event_dim: int) -> None:
        self.event_dim = event_dim
        self.clear()

    def clear(self) -> None:
        self._latest: Tensor | None = None

    def __call__(self, readout: Any) -> Tensor:
        x = next(leaves(readout))
        previous, self._latest = self._latest, x.clone()
        moved = x if previous is None else x - previous
        return moved.reshape(*x.shape[: x.dim() - self.event_dim], -1).abs().square().sum(-1).sqrt()
