"""`NetworkSketch`: the outputs of the submodules of any network in one vector of fixed size for each sample."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled.sketch.decoders import Decoder
from unrolled.sketch.flat import FlatSketch, Slot

Attributes = Callable[[str, Any], Tensor]


class NetworkSketch(FlatSketch):
    r"""$s = \frac1N \sum_{M, k} R_k \bigl(\tfrac12 R_{M,1} x_{M,k} + \tfrac12 R_{M,2} e_1\bigr)$, call k of M.

    Every call of a submodule M is an object, its output the attributes. Hooks are put on when the `with` block begins
    and taken off when it ends; the sketch is that of the latest call of the network. Rotations depend on the names of
    the modules and the seed only: sketches that were made in another process, or by another network with modules of
    these names, can be compared.

    Args:
        net: any network. Not a compiled one: hooks do not run there.
        modules: the names of the submodules to sketch, as in `net.named_modules()`; all N that have no submodules of
            their own where not given.
        d: dimension of the sketch, at least the size of the largest output.
        seed: of the rotations.
        attributes: `(name, output) -> (batch, m)`, what of an output is sketched, such as means over a picture; all
            of it, flattened, where not given.
        device, dtype: of the sketch; the CPU and float32 where not given. Outputs are moved and cast.

    Raises:
        TypeError: `net` is no module, an output is no tensor and `attributes` makes none of it.
        ValueError: unknown names of modules, outputs larger than `d`, NaN, a module whose output changes its size, or
            a batch of another size than that of the others.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> with NetworkSketch(net, d=256) as sketch:
        ...     output = net(torch.randn(5, 4))
        >>> sketch.vector.shape, torch.allclose(sketch.recover("2"), output, atol=1e-4)
        (torch.Size([5, 256]), True)

    Reference:
        B. Ghazi, R. Panigrahy and J. Wang, "Recursive Sketches for Modular Deep Learning", ICML 2019. Theirs nests the
        objects; this one is a tuple of one level, which can be read without the factor that every level costs.
    """

    def __init__(
        self,
        net: nn.Module,
        modules: Sequence[str] | None = None,
        *,
        d: int = 4096,
        seed: int = 0,
        attributes: Attributes | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}.")
        if net._compiled_call_impl is not None or hasattr(net, "_orig_mod"):
            raise TypeError("net is compiled, where hooks do not run. Sketch the original.")
        if attributes is not None and not callable(attributes):
            raise TypeError(f"attributes must be a function of a name and an output, got {attributes!r}.")
        self.net = net
        self.modules = _modules(net, modules)
        super().__init__(d, seed, 1 / len(self.modules), device=device, dtype=dtype)
        self._attributes_of = _flattened if attributes is None else attributes
        self._sizes: dict[str, int] = {}
        self._slots: list[Slot] = []
        self._recording = False
        self._handles: list[Any] = []

    @property
    def slots(self) -> list[Slot]:
        return self._slots

    def __enter__(self) -> NetworkSketch:
        self._handles = [
            self.net.register_forward_pre_hook(self._begin),
            self.net.register_forward_hook(self._end, always_call=True),
            *(self.net.get_submodule(name).register_forward_hook(self._hook(name)) for name in self.modules),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def recover(self, module: str, call: int = 0, *, decoder: Decoder | None = None) -> Tensor:
        """The attributes that a call of a module had, (batch, m).

        Args:
            module: its name.
            call: the number of the call, from 0, for a module that is called more than once.
            decoder: how to read, such as `MatchedFilter()` or `SparseCoder()`; least squares where it is determined,
                else the matched filter, if not given.
        """
        found = self._of_module(module, decoder)
        if _check.integer("call", call, minimum=0) >= len(found):
            raise ValueError(f"call must be less than {len(found)}, the calls of {module!r}, got {call}.")
        return found[call][0]

    def calls(self, module: str) -> int:
        """How often a module was called, as the sketch was recorded; `count` reads it out of the vector.

        Args:
            module: its name.
        """
        return sum(slot.module == module for slot in self._slots)

    def _begin(self, net: nn.Module, inputs: Any) -> None:
        self._clear()
        self._slots = []
        self._recording = True

    def _end(self, net: nn.Module, inputs: Any, output: Any) -> None:
        # What runs again in a backward pass, where activations are computed anew, is no further call.
        self._recording = False

    def _hook(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._recording:
                with torch.no_grad():
                    self._record(name, output)

        return record

    def _record(self, name: str, output: Any) -> None:
        x = self._attributes_of(name, output)
        if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
            kind = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"attributes of {name!r} must be a floating point tensor (batch, m), got {kind}. Give a function, "
                "attributes=lambda name, output: ..., that makes one of this output, or leave the module out."
            )
        size = x.shape[-1]
        if self._sizes.setdefault(name, size) != size:
            raise ValueError(
                f"the output of {name!r} has {size} numbers a sample, before it had {self._sizes[name]}. A module has "
                "one size: give attributes=, a function whose result has a fixed size (a mean over what varies), pad "
                "the inputs, or leave the module out."
            )
        if size > self.d:
            raise ValueError(
                f"the output of {name!r} has {size} numbers a sample, the sketch d = {self.d}. Take a larger d, or "
                "give attributes=, a function that makes fewer of it, such as a mean over the pixels."
            )
        slot = Slot(name, self.calls(name), size)
        self._add(slot, x.to(device=self.sketcher.device, dtype=self.sketcher.dtype))
        self._slots = [*self._slots, slot]

    def __repr__(self) -> str:
        return f"NetworkSketch({type(self.net).__name__}, modules={self.modules}, d={self.d}, kept={self.kept})"


def _modules(net: nn.Module, names: Sequence[str] | None) -> list[str]:
    known = [name for name, _ in net.named_modules() if name]
    if names is None:
        found = [name for name in known if not any(net.get_submodule(name).children())]
        if not found:
            raise ValueError(f"net, {type(net).__name__}, has no submodules. Wrap it in a torch.nn.Sequential.")
        return found
    if isinstance(names, str) or not names:
        raise TypeError(f"modules must be a sequence of names, at least one, got {names!r}.")
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known)
            advice = f"Did you mean {', '.join(map(repr, close))}?" if close else f"There is {', '.join(known)}."
            raise ValueError(f"modules names {name!r}, which net does not have. {advice}")
    if len(set(names)) < len(names):
        raise ValueError(f"modules must differ, got {list(names)}.")
    return list(names)


def _flattened(name: str, output: Any) -> Any:
    return output.flatten(1) if isinstance(output, Tensor) and output.dim() > 1 else output
