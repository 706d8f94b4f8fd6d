"""Iterations of which autograd keeps the state that they start from, and which run once more in the backward pass.

`torch.utils.checkpoint` does that for any function. Beside iterations of some ten small operations, what it notes about
every tensor costs nearly as much as the second run; this is the same with less of that.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from unrolled._tree import State, leaves, map_state
from unrolled.gradient.protocol import Advance, can_look


def recomputing(advance: Advance, state: State) -> Advance:
    """`advance` for one call of a network that starts from `state`: autograd keeps the states given to it alone."""
    if not torch.is_grad_enabled():
        return advance
    if can_look(state) and all(map(_is_plain, leaves(state))):
        return _Recomputing(advance, state)

    def by_torch(state: State, start: int, stop: int) -> State:  # compilers know it by name
        # `advance` checks the shapes and dtypes of states; those of every saved tensor would cost 3 % of a step.
        return checkpoint(advance, state, start, stop, use_reentrant=False, determinism_check="none")

    return by_torch


def _is_plain(leaf: Tensor) -> bool:
    """Nothing unusual: no tensor of a subclass (shards, fakes), no device whose random numbers come in another way."""
    return type(leaf) in (Tensor, nn.Parameter) and leaf.device.type in ("cpu", "cuda")


class _Recomputing:
    """What all windows of a call have in common."""

    def __init__(self, advance: Advance, state: State) -> None:
        self.advance = advance
        self.structure = map_state(lambda leaf: _HOLE, state)
        self.devices = list(dict.fromkeys(leaf.device for leaf in leaves(state)))
        self.settings = _Settings(self.devices)
        self.random = _random_state(self.devices)

    def __call__(self, state: State, start: int, stop: int) -> State:
        window = _Window(self, state, start, stop)
        before = window.random = self.random
        with saved_tensors_hooks(window.pack, window.unpack):
            state = self.advance(state, start, stop)
        self.random = _random_state(self.devices)
        if all(map(torch.equal, before, self.random)):
            window.random = None  # nobody drew, and nobody will: 5 kB less to keep
        return state


class _Handle:
    """What autograd holds in place of a tensor that it saves. The tensor is here from the second run until it is used.

    Autograd alone holds the handle, so that what it never uses goes with its graph.
    """

    __slots__ = ("__weakref__", "tensor")

    def __init__(self) -> None:
        self.tensor: Tensor | None = None


class _Enough(Exception):
    """Raised within the second run, when all tensors are there."""


class _Window:
    """A call of `advance` and what is needed to repeat it.

    When the backward pass asks a handle for its tensor, the iterations run again: the n-th tensor that they save
    belongs to the n-th handle.
    """

    def __init__(self, common: _Recomputing, state: State, start: int, stop: int) -> None:
        self.common, self.start, self.stop = common, start, stop
        # Kept in the way of autograd: it notices a change in place, and hooks around the network may move it elsewhere.
        self.kept: Any = _Kept.apply(torch.empty(0, requires_grad=True), *leaves(state)).grad_fn
        self.random: list[Tensor] | None = None
        self.handles: list[weakref.ref[_Handle]] = []

    def pack(self, tensor: Tensor) -> _Handle:
        handle = _Handle()
        self.handles.append(weakref.ref(handle))
        return handle

    def unpack(self, handle: _Handle) -> Tensor:
        if handle.tensor is None:
            self._run_again()
        tensor, handle.tensor = handle.tensor, None  # used up: a second backward pass runs the iterations a third time
        assert tensor is not None
        return tensor

    def _run_again(self) -> None:
        handles = iter(self.handles)
        missing = len(self.handles)

        def fill(tensor: Tensor) -> Tensor:
            nonlocal missing
            if tensor.requires_grad:
                tensor = tensor.detach()  # else it would keep the graph of this run alive
            handle = next(handles)()
            if handle is not None:
                handle.tensor = tensor
            missing -= 1
            if missing == 0:
                raise _Enough
            return tensor  # for steps that take derivatives themselves

        kept = iter(self.kept.saved_tensors)
        state = map_state(lambda hole: next(kept), self.common.structure)
        with (
            contextlib.suppress(_Enough),
            self.common.settings.restored(),
            _random_again(self.common.devices, self.random),
            saved_tensors_hooks(fill, lambda tensor: tensor),
            torch.enable_grad(),
        ):
            self.common.advance(state, self.start, self.stop)
        if missing > 0:
            saved = len(self.handles)
            raise RuntimeError(
                f"Iterations {self.start} to {self.stop - 1} saved {saved} tensors for the backward pass, but "
                f"{saved - missing} when they ran again in it. A step must compute the same whenever it is called: "
                "nothing remembered from an earlier call, no switch that changes in between. Make it so, or use "
                "gradient=Backprop()."
            )


class _Kept(torch.autograd.Function):
    """Saves tensors. Its output is of no use but for the node of the graph that has them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty_like(anchor)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return torch.zeros(0)


class _Settings:
    """What decides how operations compute, apart from their arguments: autocast and the default device."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.kinds = dict.fromkeys(["cpu", *(device.type for device in devices)])
        self.values = self._present()

    def _present(self) -> tuple[list[dict[str, Any]], torch.device]:
        autocast = [
            {
                "device_type": kind,
                "enabled": torch.is_autocast_enabled(kind),
                "dtype": torch.get_autocast_dtype(kind),
                "cache_enabled": torch.is_autocast_cache_enabled(),
            }
            for kind in self.kinds
        ]
        return autocast, torch.get_default_device()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        if self._present() == self.values:  # as mostly, and entering costs more than looking
            yield
            return
        autocast, default_device = self.values
        with contextlib.ExitStack() as stack:
            for settings in autocast:
                stack.enter_context(torch.autocast(**settings))
            stack.enter_context(default_device)
            yield


_HOLE = torch.empty(0)  # in the structure of a state, in place of a tensor


def _random_state(devices: Iterable[torch.device]) -> list[Tensor]:
    """Where the generators of random numbers are: of the CPU, and of these devices."""
    others = (torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda")
    return [torch.get_rng_state(), *others]


def _set_random_state(devices: Iterable[torch.device], states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip((device for device in devices if device.type == "cuda"), states[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


@contextlib.contextmanager
def _random_again(devices: Iterable[torch.device], states: list[Tensor] | None) -> Iterator[None]:
    """Draw from these states of the generators, and leave no trace of it."""
    if states is None:
        yield
        return
    present = _random_state(devices)
    _set_random_state(devices, states)
    try:
        yield
    finally:
        _set_random_state(devices, present)
