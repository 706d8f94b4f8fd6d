"""Checks at the door. Each error names the argument, says what came, what is allowed and what to do."""

from __future__ import annotations

import cmath
import contextlib
import math
import numbers
from typing import Any

import torch
from torch import Tensor

FAR = 10.0  # times the range: no image in [0, data_range] plus noise goes there
_stands_for_many = torch._C._functorch.is_functorch_wrapped_tensor  # looked up once: this is asked in every call


def integer(name: str, value: Any, *, minimum: int = 1) -> int:
    """Return `value` if it is an int of at least `minimum`; bools and floats are refused."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int of at least {minimum}, got {value!r} of type {type(value).__name__}.")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")
    return int(value)


def shape_of(value: Any) -> str:
    """What came, for a message: the shape of a tensor, the type of anything else."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def real(name: str, value: Any, *, minimum: float = -math.inf, above: float = -math.inf, hint: str = "") -> float:
    """Return `value` as a float if it is a finite real number, at least `minimum` and strictly above `above`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {value!r} of type {type(value).__name__}.{_advice(hint)}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}.{_advice(hint)}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum:g}, got {value}.{_advice(hint)}")
    if value <= above:
        raise ValueError(f"{name} must be greater than {above:g}, got {value}.{_advice(hint)}")
    return float(value)


def tensor(name: str, value: Any, *, allow_complex: bool = False) -> Tensor:
    """Return `value` if it is a non-empty floating point (or, where allowed, complex) tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(value).__name__}. Convert it: torch.as_tensor({name})."
        )
    if not (value.is_floating_point() or (allow_complex and value.is_complex())):
        allowed = "floating point or complex" if allow_complex else "floating point"
        raise TypeError(f"{name} must be {allowed}, got {value.dtype}. Convert it first, e.g. {name}.float().")
    if value.numel() == 0:
        raise ValueError(f"{name} is empty, its shape is {tuple(value.shape)}. Every dimension must be at least 1.")
    return value


def finite(name: str, value: Tensor) -> Tensor:
    """Return `value` if it has neither NaN nor infinity.

    Looks only where looking is free of side effects: not on an accelerator (it would wait for the device), not on the
    meta device, and not while the call is being compiled, exported or vmapped (there are no values to look at).
    """
    # One NaN or infinity makes the sum one too, and a sum takes a tenth of the time; it may overflow, so look closer.
    if can_look_at(value) and not cmath.isfinite(value.sum().item()) and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(
            f"{name} has {bad} NaN or infinite of {value.numel()} entries. Remove or replace them first, "
            f"e.g. torch.nan_to_num({name})."
        )
    return value


def can_look_at(value: Tensor) -> bool:
    """Whether Python may branch on the values of this tensor at no cost but the look."""
    return value.is_cpu and not is_traced(value)


def autocast(device: torch.device) -> bool:
    """Whether operations on this device choose their dtype themselves at present."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast switched off where it is on: for what does not bear a rounding to 8 bits."""
    return torch.autocast(device.type, enabled=False) if autocast(device) else contextlib.nullcontext()


def is_traced(value: Tensor) -> bool:
    """Whether the call is being compiled or exported, or the tensor stands for many under `torch.vmap` and its kin."""
    return torch.compiler.is_compiling() or _stands_for_many(value)


def dictionary(name: str, value: Any, *, allow_complex: bool = False) -> Tensor:
    """Return `value` if it is a finite (m, n) matrix without zero atoms (columns)."""
    tensor(name, value, allow_complex=allow_complex)
    if value.dim() != 2:
        raise ValueError(
            f"{name} must be a matrix (m, n) with atoms as columns, got shape {tuple(value.shape)}. "
            "scikit-learn's components_ hold atoms as rows: pass their transpose."
        )
    finite(name, value)
    if value.device.type != "meta" and not is_traced(value):
        zero = (value == 0).all(0)
        if bool(zero.any()):
            first = zero.nonzero().flatten().tolist()
            raise ValueError(
                f"{name} has {len(first)} zero atoms (columns {first[:5]}{'...' if len(first) > 5 else ''}): no code "
                "could ever use them. Drop those columns or replace them, e.g. by data samples."
            )
    return value


def converted(
    name: str, value: Tensor, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """`value` without its graph, moved and cast as asked for, where that loses nothing but digits."""
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"dtype must be a floating point or complex dtype, got {dtype}.")
    if dtype is not None and value.is_complex() and not dtype.is_complex:
        raise TypeError(f"dtype must be complex for a complex {name}, got {dtype}: its imaginary part would be lost.")
    return value.detach().to(device=device, dtype=dtype)


def signals(name: str, value: Any, like: Tensor, size: int, *, of: str) -> Tensor:
    """Return `value` if it is a batch (..., size) of finite signals with the dtype and device of `like`."""
    tensor(name, value, allow_complex=like.is_complex())
    if value.dim() == 0 or value.shape[-1] != size:
        raise ValueError(f"{name} must have shape (..., {size}) to fit {of}, got {tuple(value.shape)}.")
    if value.dtype != like.dtype:
        raise TypeError(f"{name} is {value.dtype} but {of} is {like.dtype}. Convert one, e.g. {name}.to({like.dtype}).")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but {of} is on {like.device}. Move one with .to(...).")
    return finite(name, value)


def images(name: str, value: Any, like: Tensor, data_range: float, *, channels: int = 1, shaped: bool = True) -> Tensor:
    """Return `value` if it is a batch of finite images (..., C, height, width) near [0, data_range].

    Args:
        name: of the argument.
        value: what came.
        like: a parameter, whose dtype and device it must have (under autocast, any dtype).
        data_range: what is white.
        channels: how many there must be; with 1, any number.
        shaped: whether the dimensions are asked for as well.
    """
    if isinstance(value, Tensor) and not value.is_floating_point():
        raise TypeError(
            f"{name} must be floating point with values in [0, {data_range:g}], got {value.dtype}. Convert it "
            f"yourself, as its range is not guessed: an image in 0..255 is {name} / {255 / data_range:g}."
        )
    tensor(name, value)
    if shaped and (value.dim() < 3 or channels not in (1, value.shape[-3])):
        count = "C" if channels == 1 else channels
        raise ValueError(
            f"{name} must have shape (..., {count}, height, width), got {tuple(value.shape)}. A picture without a "
            f"dimension for channels is {name}.unsqueeze(-3)."
        )
    of_the_network(name, value, like)
    finite(name, value)
    if can_look_at(value) and value.detach().abs().amax() > FAR * data_range:
        raise ValueError(
            f"{name} reaches {value.detach().abs().amax():.4g}, which is far outside [0, {data_range:g}]. Build the "
            "network with the image's data_range, or rescale the image."
        )
    return value


def of_the_network(name: str, value: Tensor, like: Tensor) -> None:
    """Refuse a tensor of another dtype (but under autocast) or device than a parameter of the network."""
    if value.dtype != like.dtype and not autocast(like.device):
        raise TypeError(f"{name} is {value.dtype} but the network is {like.dtype}. Convert one with .to(...).")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but the network is on {like.device}. Move one with .to(...).")


def _advice(hint: str) -> str:
    return f" {hint}" if hint else ""
