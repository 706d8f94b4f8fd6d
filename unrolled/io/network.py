"""Networks from their descriptions, and what a network has become that its description does not tell."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._config import KEY, Call, Opaque, TensorSpec, described, freeze
from unrolled.io.nodes import Reader, Writer
from unrolled.step import Step
from unrolled.unroll import Unroll, _tied

STANDARD = {*vars(nn.Module()), KEY}  # attributes of every module: its parameters, its hooks, whether it trains


class Slot(NamedTuple):
    """A place that holds a parameter or a buffer."""

    module: nn.Module
    key: str
    persistent: bool

    @property
    def tensor(self) -> Tensor:
        return cast(Tensor, getattr(self.module, self.key))

    @property
    def learned(self) -> bool:
        return self.key in self.module._parameters


def slots(net: nn.Module) -> dict[str, Slot]:
    """All places of tensors, shared ones under each of their names."""
    found = {}
    for path, module in net.named_modules(remove_duplicate=False):
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                persistent = key not in module._non_persistent_buffers_set
                found[f"{path}.{key}" if path else key] = Slot(module, key, persistent)
    return found


# ---- Building --------------------------------------------------------------------------------------------------------


def build(node: Any, layers: dict[str, Any], same: dict[str, str], reader: Reader) -> nn.Module:
    """The network that is described, without its values.

    Args:
        node: the constructor's call.
        layers: empty, or of an Unroll: its number of iterations, what is tied, and a description of each distinct step.
        same: paths of modules, and the path of the module that each of them is.
        reader: turns descriptions into objects.

    Raises:
        ValueError: the description is wrong.
    """
    net = reader.decode(node)
    if not isinstance(net, nn.Module):
        raise ValueError(f"the file describes {type(net).__name__}, which is no network.")
    if layers:
        _set_layers(net, layers, reader)
    modules = dict(net.named_modules(remove_duplicate=False))
    for path, origin in same.items():
        if type(modules[path]) is not type(modules[origin]):
            raise ValueError(f"{path} cannot be the same module as {origin}, which is of another class.")
        parent, _, name = path.rpartition(".")
        modules[parent]._modules[name] = modules[origin]
    return net


def _set_layers(net: nn.Module, layers: dict[str, Any], reader: Reader) -> None:
    if not isinstance(net, Unroll) or set(layers) != {"num_iters", "tied", "steps"}:
        raise ValueError("the file describes layers in a way that is unknown.")
    steps = reader.decode(layers["steps"])
    if not isinstance(steps, list) or not steps or not all(isinstance(step, Step) for step in steps):
        raise ValueError("the file describes layers that are no steps.")
    net.num_iters = _check.integer("num_iters", layers["num_iters"])
    net.tied = _tied(reader.decode(layers["tied"]), steps[0])
    if len(steps) != (1 if net.tied is True else net.num_iters):
        raise ValueError(f"the file describes {len(steps)} distinct layers of a network of {net.num_iters}.")
    net.steps = nn.ModuleList(steps)
    net._tie()


class Description(NamedTuple):
    """What builds a network, and a network that it built."""

    node: Any
    layers: dict[str, Any]
    same: dict[str, str]
    stand_ins: bool  # see `Reader`
    built: nn.Module


def description(net: nn.Module, writer: Writer) -> Description:
    """How to build a network of the same structure as this one.

    Where layers were dropped, repeated or replaced, the constructor alone does not make them: then each of them is
    described by itself.

    Raises:
        TypeError: some argument cannot be written.
        ValueError: the network cannot be built again.
    """
    record = described(net)
    if not isinstance(net, Unroll) or not isinstance(record, Call):
        attempts: list[tuple[Any, dict[str, Any]]] = [(record, {})]
    else:
        now = {name: freeze(getattr(net, name)) for name in ("gradient", "stop", "num_iters", "tied")}
        set_anyway = {name: now[name] for name in ("gradient", "stop")}
        layers = {"num_iters": len(net), "tied": now["tied"], "steps": [described(step) for step in net.steps]}
        attempts = [(_with(record, now), {}), (_with(record, set_anyway), layers)]
    same = {path: origin for path, origin in _origins(net).items() if path != origin}
    problems = []
    for call, parts in attempts:
        node = writer.encode(call, type(net).__name__)
        layers = {name: writer.encode(part, name) for name, part in parts.items()}
        for stand_ins in (False, True):
            try:
                built = build(node, layers, same, Reader(writer.names, writer.kept, stand_ins=stand_ins))
            except (ValueError, KeyError) as error:
                problems.append(f"{error}")
                continue
            problem = difference(net, built)
            if problem is None:
                return Description(node, layers, same, stand_ins, built)
            problems.append(problem)
    raise ValueError(
        f"this {type(net).__name__} cannot be built again from the arguments of its constructor: {problems[1]} "
        "Save the weights alone, by safetensors.torch.save_model."
    )


def _with(record: Call, now: dict[str, Any]) -> Call:
    return Call(record.kind, {name: now.get(name, value) for name, value in record.arguments.items()})


# ---- Comparing -------------------------------------------------------------------------------------------------------


def difference(net: nn.Module, built: nn.Module) -> str | None:
    """The first thing in which their structures differ, as a sentence; None where values can make them the same."""
    mine, its = (dict(module.named_modules(remove_duplicate=False)) for module in (net, built))
    if set(mine) != set(its):
        return f"it differs in its modules {sorted(set(mine) ^ set(its))[:3]}."
    for path in mine:
        if type(mine[path]) is not type(its[path]):
            return f"{path} is a {type(mine[path]).__name__}, and would be a {type(its[path]).__name__}."
    if _origins(net) != _origins(built):
        return "modules that differ would be the same."
    ours, theirs = slots(net), slots(built)
    if set(ours) != set(theirs):
        return f"it differs in its tensors {sorted(set(ours) ^ set(theirs))[:3]}."
    for name, slot in ours.items():
        other = theirs[name]
        if (slot.learned, slot.persistent) != (other.learned, other.persistent):
            return f"{name} would be a parameter in one of the two, and a buffer in the other."
        if slot.tensor.shape != other.tensor.shape:
            return f"{name} has shape {tuple(slot.tensor.shape)}, and would have {tuple(other.tensor.shape)}."
    unknown = set(net.state_dict()) - set(ours)
    if unknown:
        return f"its state has {sorted(unknown)[:3]}, which are no parameters or buffers."
    try:
        changed(net, built)
    except ValueError as error:
        return f"{error}"
    return None


def changed(net: nn.Module, built: nn.Module) -> dict[str, dict[str, Any]]:
    """By modules: the plain attributes that were set to something else after the network was built.

    Raises:
        ValueError: one of them is new, or cannot be written.
    """
    found: dict[str, dict[str, Any]] = {}
    others = dict(built.named_modules(remove_duplicate=False))
    for path, mine in net.named_modules():
        ours, theirs = plain(mine), plain(others[path])
        for name in sorted({*ours, *theirs}):
            if name.startswith("_") and not (name in ours and name in theirs):
                continue  # what is private and comes and goes is a cache
            title = f"the attribute {name} of {path or type(net).__name__}"
            if name not in theirs or name not in ours:
                raise ValueError(f"{title} was set or deleted after it was built; the constructor knows nothing of it.")
            value, other = ours[name], theirs[name]
            one, two = freeze(value), freeze(other)
            if _holds_tensors(one) or _holds_tensors(two):
                if not _same_tensors(value, other):
                    raise ValueError(f"{title} holds a tensor that is neither a parameter nor a buffer. Register it.")
            elif one != two:
                if isinstance(one, (Opaque, Call)) or isinstance(two, (Opaque, Call)) or not alike(one, two):
                    raise ValueError(f"{title} was changed after it was built, to {value!r}.")
                found.setdefault(path, {})[name] = one
    return found


def plain(module: nn.Module) -> dict[str, Any]:
    """The attributes that are no tensors and no modules, those that could be and are None among them."""
    unset = (*module._modules.items(), *module._parameters.items(), *module._buffers.items())
    own = {name: value for name, value in vars(module).items() if name not in STANDARD}
    return {**{name: None for name, value in unset if value is None}, **own}


def _origins(net: nn.Module) -> dict[str, str]:
    """For every path of a module, the first path (by the alphabet) of the same module."""
    first: dict[int, str] = {}
    paths = sorted(net.named_modules(remove_duplicate=False), key=lambda found: found[0])
    return {path: first.setdefault(id(module), path) for path, module in paths}


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)) and not isinstance(value, (TensorSpec, Opaque)):
        return any(map(_holds_tensors, value.values() if isinstance(value, dict) else value))
    return isinstance(value, TensorSpec)


def _same_tensors(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor):
        return isinstance(other, Tensor) and other.device.type != "meta" and torch.equal(value.cpu(), other)
    if isinstance(value, (list, tuple)):
        return type(value) is type(other) and len(value) == len(other) and all(map(_same_tensors, value, other))
    return bool(freeze(value) == freeze(other))


def alike(value: Any, other: Any) -> bool:
    """Whether one may stand for the other: of one type, two numbers, or one of them None."""
    numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in (value, other))
    return type(value) is type(other) or numbers or value is None or other is None
