"""`save` and `load`: a network with its description in one safetensors file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unrolled.io.names import known
from unrolled.io.network import alike, build, changed, description, plain, slots
from unrolled.io.nodes import ARGUMENTS, DTYPES, Reader, Writer, dtype_name

FORMAT = 1
HEADER = "unrolled"  # the entry of the file's metadata that holds the description
FIELDS = {
    "format": int,  # of this description
    "default_dtype": str,  # in which the network is built, before it gets its values
    "network": dict,  # the class and its arguments
    "layers": dict,  # empty; or of an Unroll that is not as its constructor would make it, its steps
    "same": dict,  # paths of modules that are also at another path
    "stand_ins": bool,  # whether the constructors look at the values of tensors, and get some
    "attributes": dict,  # by modules: plain values that were changed since
    "evaluating": list,  # modules in evaluation mode
    "tensors": dict,  # dtype and shape of what is in the file
    "shared": dict,  # tensors that are in the file under another name
    "computed": dict,  # dtypes of buffers that are not in the file, since building the network computes them
    "fixed": list,  # parameters that do not learn
}


def save(net: nn.Module, path: str | os.PathLike[str]) -> None:
    r"""Write a network to a safetensors file: its parameters and buffers, and what it takes to build it again.

    Works for every `Unroll`, and for single steps, shrinkages, operators and stopping rules. The description holds the
    class and the constructor's arguments, of a dictionary the shape only. It is tried out at once: what could not be
    loaded is not written, and the error says why. Parts and corrected networks (`net[:4]`, `LayerReport.apply`) can be
    saved as well. Shared tensors are written once. Hooks, gradients and optimisers do not belong to a network.

    Args:
        net: the network. Of a compiled one pass `net._orig_mod`, of one in `DistributedDataParallel` `net.module`.
        path: of the file; one that is there is replaced, in one go.

    Raises:
        ImportError: the package safetensors is not there, `pip install 'unrolled[io]'`.
        TypeError: `net` is no module of this library, or was built from something that cannot be written, such as a
            lambda.
        ValueError: the constructor would not make this network, since it was rebuilt by hand, or it needs the values of
            its tensors.

    Example:
        >>> import tempfile
        >>> net = LISTA(torch.eye(3), 4, alpha=0.1, tied=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(net, f"{folder}/lista.safetensors")
        ...     twin = load(f"{folder}/lista.safetensors")
        >>> torch.equal(twin(torch.ones(1, 3)), net(torch.ones(1, 3)))
        True
    """
    safetensors = _safetensors()
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a network, such as LISTA(...), got {type(net).__name__}.")
    writer, default = Writer(), torch.get_default_dtype()
    with _reproducibly(default):
        found = description(net, writer)
    attributes = {
        module: {name: writer.encode(value, f"{module}.{name}") for name, value in values.items()}
        for module, values in changed(net, found.built).items()
    }
    tensors, shared, computed, fixed = dict(writer.kept), {}, {}, []
    first: dict[int, str] = {}
    theirs = slots(found.built)
    for name, slot in slots(net).items():
        tensor = slot.tensor
        if tensor.device.type == "meta":
            raise ValueError(f"{name} is on the meta device: there are no values to save. Load or reset them first.")
        if first.setdefault(id(tensor), name) != name:
            shared[name] = first[id(tensor)]
        elif not slot.persistent and _same(theirs[name].tensor, tensor):
            computed[name] = dtype_name(tensor.dtype)
        else:
            tensors[name] = tensor.detach()
            if slot.learned and not tensor.requires_grad:
                fixed.append(name)
    content = {
        "format": FORMAT,
        "default_dtype": dtype_name(default),
        "network": found.node,
        "layers": found.layers,
        "same": found.same,
        "stand_ins": found.stand_ins,
        "attributes": attributes,
        "evaluating": [path for path, module in net.named_modules() if not module.training],
        "tensors": {name: _signature(tensor) for name, tensor in tensors.items()},
        "shared": shared,
        "computed": computed,
        "fixed": fixed,
    }
    # Safetensors wants tensors that are contiguous and no views of each other, and knows few complex dtypes.
    real = {name: torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for name, t in tensors.items()}
    own = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in real.items()}
    unfinished = Path(f"{os.fspath(path)}.part")
    try:
        safetensors.torch.save_file(own, str(unfinished), {HEADER: json.dumps(content)})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str], device: torch.device | str | None = None, *, classes: Sequence[Any] = ()
) -> nn.Module:
    """The network that `save` wrote.

    Nothing in the file is executed. It may name classes of this library and those in `classes`, whose constructors get
    the arguments that it gives. Every entry of the description is checked, and the weights must fit exactly.

    Args:
        path: of the file.
        device: where to put the network, the CPU where not given.
        classes: those of your own that the file may name, such as `[MyStep]`; functions as well.

    Raises:
        ImportError: the package safetensors is not there, `pip install 'unrolled[io]'`.
        TypeError: `classes` holds something else.
        ValueError: the file is no safetensors file (a pickle, for one), has no description or that of a newer version,
            names an unknown class, has unknown or lacks needed entries, or weights of other shapes or dtypes.
    """
    names = known(classes)
    metadata, tensors = _read(Path(path))
    try:
        content = _content(metadata)
        tensors = _checked(tensors, content["tensors"])
        with _reproducibly(DTYPES[content["default_dtype"]]):
            reader = Reader(names, tensors, stand_ins=content["stand_ins"])
            net = build(content["network"], content["layers"], content["same"], reader)
        _set_attributes(net, content["attributes"], reader)
        _fill(net, tensors, content)
        modules = dict(net.named_modules())
        for name in content["evaluating"]:
            modules[name].training = False
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return net.to(device)


# ---- Reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    safetensors = _safetensors()
    with path.open("rb") as file:
        start = file.read(9)
    # The first eight bytes of a safetensors file are a length, and may be any; then comes JSON.
    if start[8:] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise ValueError(
            f"{path} is a pickle, as torch.save writes it, which can run any code when it is read. If you trust it, "
            "read it by torch.load, and save the network by unrolled.io.save."
        )
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            # Copies: the tensors that come are windows into the file, which somebody may overwrite.
            return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in list(file.keys())}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def _content(metadata: dict[str, str]) -> dict[str, Any]:
    """The description, with the entries that it must have."""
    if HEADER not in metadata:
        raise ValueError(
            "this file has tensors, but no description of a network. Build the network, and read them by "
            "safetensors.torch.load_model."
        )
    content = json.loads(metadata[HEADER])
    if not isinstance(content, dict) or type(content.get("format")) is not int:
        raise ValueError("the description has no format number.")
    if content["format"] > FORMAT:
        raise ValueError(
            f"the file has format {content['format']}, this version of unrolled reads up to {FORMAT}. Upgrade unrolled."
        )
    if set(content) != set(FIELDS):
        unknown, missing = sorted(set(content) - set(FIELDS)), sorted(set(FIELDS) - set(content))
        raise ValueError(f"the description has the unknown entries {unknown} and lacks {missing}.")
    for name, kind in FIELDS.items():
        if type(content[name]) is not kind:
            raise ValueError(f"{name} must be a {kind.__name__}, it is {str(content[name])[:100]}.")
    return content


def _checked(tensors: dict[str, Tensor], described: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors, if they are those that the description says."""
    if set(tensors) != set(described):
        odd = sorted(set(tensors) ^ set(described))
        raise ValueError(f"the description and the tensors do not agree on {odd[:3]}: one of the two is not there.")
    found = {}
    for name, tensor in tensors.items():
        dtype = DTYPES.get(described[name]["dtype"])
        if dtype is not None and dtype.is_complex and tensor.shape[-1:] == (2,):
            tensor = torch.view_as_complex(tensor)
        if _signature(tensor) != described[name]:
            raise ValueError(f"the tensor {name} is {_signature(tensor)}, the description says {described[name]}.")
        found[name] = tensor
    return found


def _set_attributes(net: nn.Module, attributes: dict[str, Any], reader: Reader) -> None:
    modules = dict(net.named_modules())
    for path, values in attributes.items():
        for name, node in values.items():
            if path not in modules or name not in plain(modules[path]):
                raise ValueError(f"the description sets {name} of {path!r}, which the network does not have.")
            value, present = reader.decode(node), plain(modules[path])[name]
            if not alike(value, present):
                raise ValueError(f"the description sets {name} of {path!r} to {value!r}, in place of {present!r}.")
            setattr(modules[path], name, value)


def _fill(net: nn.Module, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Put all tensors in their places, shared ones as one."""
    places, shared, computed = slots(net), content["shared"], content["computed"]
    stored = {name: tensor for name, tensor in tensors.items() if not name.startswith(ARGUMENTS)}
    if {*stored, *shared, *computed} != set(places) or len(stored) + len(shared) + len(computed) != len(places):
        odd = sorted({*stored, *shared, *computed} ^ set(places))
        raise ValueError(f"the network and the file do not agree on the tensors {odd[:3]}.")
    if not set(shared.values()) <= {*stored, *computed} or not set(content["fixed"]) <= set(stored):
        raise ValueError("the description shares or fixes tensors that the file does not have.")
    new: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        place = places[name]
        if tensor.shape != place.tensor.shape or _kind(tensor.dtype) != _kind(place.tensor.dtype):
            raise ValueError(f"{name} must be like {_signature(place.tensor)}, the file has {_signature(tensor)}.")
        new[name] = nn.Parameter(tensor, name not in content["fixed"]) if place.learned else tensor
    for name, dtype in computed.items():
        if places[name].persistent or _kind(DTYPES[dtype]) != _kind(places[name].tensor.dtype):
            raise ValueError(f"{name} is not computed, or is of another kind than {dtype}.")
        new[name] = places[name].tensor.to(DTYPES[dtype])
    for name, origin in shared.items():
        if places[name].learned != places[origin].learned or places[name].tensor.shape != new[origin].shape:
            raise ValueError(f"{name} cannot be shared with {origin}, which is of another kind.")
        new[name] = new[origin]
    for name, tensor in new.items():
        if tensor.device.type == "meta":
            raise ValueError(f"the file lacks the values of {name}.")
        setattr(places[name].module, places[name].key, tensor)


# ---- Shared by both --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reproducibly(default: torch.dtype) -> Iterator[None]:
    """Networks built herein are the same wherever they are built, and leave the random numbers as they were."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.set_default_dtype(default)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _signature(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}


def _kind(dtype: torch.dtype) -> str:
    """Floating point and complex tensors may come in other precisions than the constructor's."""
    return "complex" if dtype.is_complex else "real" if dtype.is_floating_point else dtype_name(dtype)


def _same(built: Tensor, tensor: Tensor) -> bool:
    return built.device.type != "meta" and torch.equal(built.to(tensor.dtype), tensor.detach().cpu())


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("unrolled.io needs the package safetensors: pip install 'unrolled[io]'.") from error
    return safetensors
