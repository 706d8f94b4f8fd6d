"""Descriptions as JSON and back: numbers, tuples, enums, dtypes, tensors' shapes, and calls of known classes."""

from __future__ import annotations

import enum
import inspect
import math
import types
from typing import Any

import torch
from torch import Tensor, nn

from unrolled._config import Call, Opaque, TensorSpec, parameters
from unrolled.io.names import find, name_of

ARGUMENTS = "arguments:"  # begins the names of tensors in the file that are arguments, not weights
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Writer:
    """Turns descriptions into JSON.

    Attributes:
        names: the classes and functions that were met, by their names.
        kept: values of tensors that belong into the file, by their names there.
    """

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.kept: dict[str, Tensor] = {}

    def name(self, thing: Any) -> str:
        name = name_of(thing)
        if self.names.setdefault(name, thing) is not thing:
            raise TypeError(f"two classes of this network are called {name}. Rename one: files know them by name.")
        return name

    def encode(self, value: Any, where: str) -> Any:
        """What `_config.freeze` returned, as JSON.

        Args:
            value: the description.
            where: the arguments that lead to it.

        Raises:
            TypeError: it holds something that cannot be written.
        """
        if isinstance(value, Opaque):
            raise TypeError(
                f"{where} is {value.text}, which cannot be written to a file. What can: numbers, strings, tensors, "
                "enums, dataclasses, functions of a module; steps, shrinkages, operators. Or save the state_dict."
            )
        if isinstance(value, Call):
            inner = {name: self.encode(part, f"{where}.{name}") for name, part in value.arguments.items()}
            return {"class": self.name(value.kind), "arguments": inner}
        if isinstance(value, TensorSpec):
            node = {"shape": list(value.shape), "dtype": dtype_name(value.dtype), "learned": value.learned}
            if value.values is not None:
                node["values"] = ARGUMENTS + where
                self.kept[ARGUMENTS + where] = value.values
            return {"tensor": node}
        if isinstance(value, enum.Enum):
            return {"enum": self.name(type(value)), "member": value.name}
        if isinstance(value, torch.dtype):
            return {"dtype": dtype_name(value)}
        if isinstance(value, types.FunctionType):
            return {"function": self.name(value)}
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": str(value)}
        if isinstance(value, tuple):
            return {"tuple": [self.encode(part, f"{where}[{k}]") for k, part in enumerate(value)]}
        if isinstance(value, list):
            return [self.encode(part, f"{where}[{k}]") for k, part in enumerate(value)]
        if isinstance(value, dict):
            return {"dict": {name: self.encode(part, f"{where}[{name!r}]") for name, part in value.items()}}
        return value


class Reader:
    """Turns JSON into objects.

    Args:
        names: what the file may name.
        kept: values of tensors that hold integers or bools.
        stand_ins: give constructors random numbers for the tensors whose values come later, since they look at values.
            Otherwise they get tensors on the meta device, which takes neither time nor memory.
    """

    def __init__(self, names: dict[str, Any], kept: dict[str, Tensor], *, stand_ins: bool = False) -> None:
        self.names = names
        self.kept = kept
        self.stand_ins = stand_ins

    def decode(self, node: Any) -> Any:
        """The object that a node describes.

        Raises:
            ValueError: the node is not one that `Writer` writes, or names something unknown.
        """
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        if isinstance(node, list):
            return [self.decode(part) for part in node]
        keys = set(node)
        if keys == {"class", "arguments"}:
            return self._built(node["class"], node["arguments"])
        if keys == {"enum", "member"}:
            members = find(self.names, node["enum"], "enum").__members__
            if node["member"] not in members:
                raise ValueError(f"{node['enum']} has no {node['member']!r}; there are {', '.join(members)}.")
            return members[node["member"]]
        if len(keys) == 1:
            ((key, value),) = node.items()
            if key == "tuple" and isinstance(value, list):
                return tuple(self.decode(part) for part in value)
            if key == "dict" and isinstance(value, dict):
                return {name: self.decode(part) for name, part in value.items()}
            if key == "dtype" and value in DTYPES:
                return DTYPES[value]
            if key == "float" and value in ("inf", "-inf", "nan"):
                return float(value)
            if key == "function":
                return find(self.names, value, "function")
            if key == "tensor" and isinstance(value, dict):
                return self._tensor(value)
        raise ValueError(f"the description has the unknown entry {str(node)[:200]}.")

    def _tensor(self, node: dict[str, Any]) -> Tensor:
        if set(node) - {"values"} != {"shape", "dtype", "learned"}:
            raise ValueError(f"a tensor is described by {str(node)[:200]}: needed are shape, dtype and learned.")
        shape, name = node["shape"], node["dtype"]
        sizes = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
        if not sizes or name not in DTYPES or not isinstance(node["learned"], bool):
            raise ValueError(f"a tensor is described by {str(node)[:200]}: which cannot be.")
        if "values" in node:
            tensor = self.kept.get(node["values"])
            if tensor is None or list(tensor.shape) != shape or tensor.dtype != DTYPES[name]:
                raise ValueError(f"the file lacks the {name} values of shape {shape} called {node['values']!r}.")
        elif self.stand_ins:
            # Positive, of full rank, no two the same: what dictionaries and kernels of every kind may be.
            tensor = torch.rand(shape, dtype=DTYPES[name], generator=torch.Generator().manual_seed(0)) + 0.5
        else:
            tensor = torch.empty(shape, dtype=DTYPES[name], device="meta")
        return nn.Parameter(tensor) if node["learned"] else tensor

    def _built(self, name: str, given: dict[str, Any]) -> Any:
        kind = find(self.names, name, "class")
        takes = parameters(kind)
        unknown = sorted(set(given) - set(takes))
        if unknown:
            raise ValueError(f"{name} does not take the arguments {unknown} that it is given.")
        some = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = {n for n, p in takes.items() if p.default is inspect.Parameter.empty and p.kind not in some}
        if not needed <= set(given):
            raise ValueError(f"{name} is not given its arguments {sorted(needed - set(given))}.")
        values = {name: self.decode(part) for name, part in given.items()}
        signature = inspect.signature(kind)
        ordered = {name: values[name] for name in signature.parameters if name in values}
        bound = inspect.BoundArguments(signature, ordered)
        try:
            return kind(*bound.args, **bound.kwargs)
        except Exception as error:  # a constructor of the user's may raise anything
            raise ValueError(f"{name} cannot be built: {error}") from error
