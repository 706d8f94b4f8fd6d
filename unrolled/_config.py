"""What a network was built from: the arguments of its constructor, kept as plain data for `unrolled.io` to write."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import numbers
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

KEY = "_built_from"  # where a module keeps its `Call`


class Call(NamedTuple):
    """A class and the arguments that an object of it was built with."""

    kind: type
    arguments: dict[str, Any]


class TensorSpec(NamedTuple):
    """A tensor among the arguments. Values come from the state, but those that say which (bools, integers) are kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    learned: bool  # whether it was a Parameter
    values: Tensor | None


class Opaque(NamedTuple):
    """Something that cannot be written down."""

    text: str


class Recorded:
    """Base of classes whose objects know what they were built from.

    Every constructor below is wrapped, and the outermost one of a call keeps its arguments in the object. It keeps
    descriptions, not the objects, and so no memory.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]


def _recording(init: Callable[..., None]) -> Callable[..., None]:
    signature = functools.cache(lambda: inspect.signature(init))

    @functools.wraps(init)  # inspect.signature looks through it
    def recording(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        # The constructors of base classes run inside of this one and are not asked for.
        if type(self).__init__ is recording and not torch.compiler.is_compiling():
            bound = signature().bind(self, *args, **kwargs)
            bound.apply_defaults()  # so that a default that changes some day does not change what was built before
            given = list(bound.arguments.items())[1:]
            arguments = {name: freeze(value) for name, value in given if name != "device"}
            vars(self)[KEY] = Call(type(self), arguments)

    return recording


def parameters(kind: type) -> dict[str, inspect.Parameter]:
    """What the constructor takes, but for the device, which is chosen where the object is built."""
    found = inspect.signature(kind).parameters
    return {name: parameter for name, parameter in found.items() if name != "device"}


def freeze(value: Any) -> Any:
    """A description of the value that holds no module, no values of floating point tensors and nothing that changes."""
    if value is None or isinstance(value, (bool, str, enum.Enum, torch.dtype)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Tensor):
        which = not (value.is_floating_point() or value.is_complex())
        values = value.detach().clone() if which else None
        return TensorSpec(tuple(value.shape), value.dtype, isinstance(value, nn.Parameter), values)
    if isinstance(value, nn.Module):
        return described(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return Call(type(value), {name: freeze(getattr(value, name)) for name in fields})
    if type(value) in (tuple, torch.Size):
        return tuple(freeze(part) for part in value)
    if type(value) is list:
        return [freeze(part) for part in value]
    if type(value) is dict and all(isinstance(name, str) for name in value):
        return {name: freeze(part) for name, part in value.items()}
    if isinstance(value, types.FunctionType):
        # Kept where pickle could keep it, too: this must not make a network that can be pickled one that cannot.
        found = getattr(sys.modules.get(value.__module__), value.__qualname__, None)
        return value if found is value else Opaque(f"the function {value.__qualname__}, which has no name of its own")
    return Opaque(f"{value!r}" if isinstance(value, type) else f"an object of type {type(value).__name__}")


def described(module: nn.Module) -> Call | Opaque:
    """What the module was built from. Arguments that are submodules of the same name are described as they are now."""
    record = vars(module).get(KEY)
    if record is None:
        return _by_attributes(module)
    arguments = dict(record.arguments)
    for name, submodule in module._modules.items():
        if submodule is not None and isinstance(arguments.get(name), (Call, Opaque)):
            arguments[name] = described(submodule)
    return Call(type(module), arguments)


def _by_attributes(module: nn.Module) -> Call | Opaque:
    """For modules of this library without a record, such as operators: they keep arguments as attributes."""
    kind = type(module)
    if not any(base.__module__.partition(".")[0] == __package__ for base in kind.__mro__):
        return Opaque(f"a {kind.__name__}, a module that does not record what it was built from")
    arguments = {}
    for name, parameter in parameters(kind).items():
        value: Any = getattr(module, name, inspect.Parameter.empty)
        if value is not inspect.Parameter.empty:
            several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            arguments[name] = freeze(tuple(value) if several else value)
        elif parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            return Opaque(f"a {kind.__name__}, which does not keep its argument {name}")
    return Call(kind, arguments)
