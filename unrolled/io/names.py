"""Names for classes and functions: those of this library are known, those of the caller must be passed."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

PACKAGE = "unrolled"
APART = {"training", "recipes", "report", "demo", "estimators", "plot"}  # rooms that no network is built from
FUNCTIONS = {"functional", "sparse"}  # rooms whose public functions of tensors may be arguments, such as a gate


def name_of(thing: Any) -> str:
    """`unrolled.sparse.LISTA` for what is the library's, the bare name for what is the user's."""
    origin = thing.__module__.split(".")
    return f"{PACKAGE}.{origin[1]}.{thing.__name__}" if origin[0] == PACKAGE and len(origin) > 1 else thing.__name__


def known(classes: Sequence[Any] = ()) -> dict[str, Any]:
    """Everything that a file may name.

    Args:
        classes: the caller's own.
    """
    found = {name_of(thing): thing for thing in _ours()}
    for thing in classes:
        if not isinstance(thing, (type, types.FunctionType)):
            raise TypeError(f"classes must hold classes (and functions), got {thing!r}. Pass the class, no object.")
        if found.setdefault(name_of(thing), thing) is not thing:
            raise ValueError(f"classes has two that are called {name_of(thing)}. Rename one: files know them by name.")
    return found


def _ours() -> Iterator[Any]:
    for module in [module for name, module in sys.modules.items() if name.startswith(f"{PACKAGE}.")]:
        room = module.__name__.split(".")[1]
        for thing in vars(module).values() if room not in APART else ():
            if getattr(thing, "__module__", None) == module.__name__ and _allowed(thing, room):
                yield thing


def _allowed(thing: Any, room: str) -> bool:
    if isinstance(thing, types.FunctionType):
        return room in FUNCTIONS and not thing.__name__.startswith("_")
    if not isinstance(thing, type) or inspect.isabstract(thing):
        return False
    if issubclass(thing, (nn.Module, enum.Enum)):
        return True
    # Frozen ones only: gradient strategies, kernels, gates, whose constructors do nothing but check.
    return dataclasses.is_dataclass(thing) and thing.__dataclass_params__.frozen  # type: ignore[attr-defined]


def find(names: dict[str, Any], name: Any, kind: str) -> Any:
    """What is called so.

    Args:
        names: those `known`.
        name: as the file has it.
        kind: "class", "enum" or "function", what it has to be.
    """
    fits = {
        "class": lambda thing: isinstance(thing, type) and not issubclass(thing, enum.Enum),
        "enum": lambda thing: isinstance(thing, type) and issubclass(thing, enum.Enum),
        "function": lambda thing: isinstance(thing, types.FunctionType),
    }[kind]
    thing = names.get(name) if isinstance(name, str) else None
    if thing is None:
        ours = isinstance(name, str) and name.startswith(f"{PACKAGE}.")
        advice = (
            "This version of unrolled has none, or does not let files name it."
            if ours
            else f"It is not part of unrolled. If you trust the file, import yours and pass it: classes=[{name}]."
        )
        raise ValueError(f"the file names the {kind} {name!r}, which is unknown. {advice}")
    if not fits(thing):
        raise ValueError(f"the file names {name!r} as a {kind}, which it is not.")
    return thing
