"""States: a Tensor, or a NamedTuple of Tensors (or of further such states)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from unrolled import _check

State = Any  # Tensor | NamedTuple of States: Python's types cannot say "some NamedTuple"


def is_namedtuple(state: State) -> bool:
    return isinstance(state, tuple) and hasattr(state, "_fields")


def map_state(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """Apply `function` to every tensor of `state` (with the matching tensors of `others`), keeping its structure."""
    if is_namedtuple(state):
        return type(state)(*(map_state(function, *parts) for parts in zip(state, *others, strict=True)))
    return function(state, *others)


def leaves(state: State) -> Iterator[Tensor]:
    """The tensors of a state, in order."""
    if is_namedtuple(state):
        for part in state:
            yield from leaves(part)
    else:
        yield state


def detach(state: State) -> State:
    return map_state(Tensor.detach, state)


def describe(state: State) -> str:
    """A state in one line, for error messages: `FISTAState(x=float32 (64, 256), t=float32 ())`."""
    if is_namedtuple(state):
        parts = ", ".join(f"{name}={describe(part)}" for name, part in zip(state._fields, state, strict=True))
        return f"{type(state).__name__}({parts})"
    if isinstance(state, Tensor):
        device = "" if state.device.type == "cpu" else f" on {state.device}"
        return f"{str(state.dtype).removeprefix('torch.')} {tuple(state.shape)}{device}"
    return f"{type(state).__name__}"


def same_structure(state: State, other: State) -> bool:
    """Whether two states agree in type, and their tensors in shape, dtype and device."""
    if isinstance(state, Tensor):
        return (
            isinstance(other, Tensor)
            and state.shape == other.shape
            and (state.dtype == other.dtype or _check.autocast(state.device))
            and state.device == other.device
        )
    if is_namedtuple(state):
        return type(state) is type(other) and all(map(same_structure, state, other))
    return False
