"""The rows of the contract suite for deconvolution, see `systems.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from systems import System, _randn
from torch import Tensor

from unrolled import Unroll
from unrolled.image.blind import KernelEstimation
from unrolled.image.deconvolution import NonBlindDeconvolution
from unrolled.solvers import deconvolve, kernel_at_scale

SIZE, SIDE = (12, 13), 5


def _inputs(channels: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    # With this seed some entry of the kernel is on the ramp between 0 and what stays in every layer, so that every
    # parameter has a gradient. Edges of half the range let thresholds made for photographs leave some gradients.
    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        kernel = _randn(batch, 1, SIDE, SIDE, seed=2).exp()
        return 0.5 + 0.25 * _randn(batch, channels, *SIZE, seed=2), kernel / kernel.sum((-2, -1), keepdim=True)

    return inputs


def _bad(channels: int) -> dict[str, tuple[tuple[Any, ...], type[Exception], str]]:
    y, kernel = _inputs(channels)(3)
    return {
        "integers": (
            (torch.ones(3, channels, *SIZE, dtype=torch.uint8), kernel),
            TypeError,
            "y must be floating point",
        ),
        "no tensor": (([[1.0]], kernel), TypeError, "y must be a torch.Tensor"),
        "nan": ((y / 0, kernel), ValueError, "y has .* NaN or infinite"),
        "two dimensions": ((y[0, 0], kernel), ValueError, r"y must have shape \(\.\.\., C, height, width\)"),
        "empty": ((y[:0], kernel[:0]), ValueError, "y is empty"),
        "dtype": ((y.float(), kernel.float()), TypeError, "y is torch.float32"),
        "two dtypes": ((y, kernel.float()), TypeError, "kernel is torch.float32"),
        "device": ((y.to("meta"), kernel), ValueError, "kernel is on cpu but y is on meta"),
        "even kernel": ((y, torch.full((3, 1, 4, 4), 1 / 16).double()), ValueError, "kernel must have an odd side"),
        "large kernel": ((y, torch.full((3, 1, 13, 13), 1 / 169).double()), ValueError, "kernel .* is larger than y"),
        "two kernels": ((y, kernel.expand(3, 2, SIDE, SIDE)), ValueError, "one for all channels"),
        "batch": ((y, kernel[:1]), ValueError, "kernel must have the batch dimensions of y"),
        "sum": ((y, 2 * kernel), ValueError, "kernel must sum to 1"),
        "nan kernel": ((y, kernel / 0), ValueError, "kernel has .* NaN or infinite"),
    }


def _row(
    name: str,
    network: Callable[..., Unroll],
    reference: Callable[..., Tensor],
    channels: int = 1,
    dead: dict[str, str] | None = None,
    **fixed: Any,
) -> System:
    def make(num_iters: int = 5, **options: Any) -> Unroll:
        return network(num_iters, dtype=torch.float64, **{**fixed, **options})

    return System(name, make, _inputs(channels), reference, _bad(channels), dead or {})


def _deconvolved(**options: Any) -> Callable[..., Tensor]:
    return lambda num_iters, y, kernel: deconvolve(y, kernel, num_iters=num_iters, **options)


def _estimated(num_iters: int, y: Tensor, kernel: Tensor) -> Tensor:
    return kernel_at_scale(y, kernel, num_iters=num_iters)


FRESH = {"steps.0.raw_keep": "the first iteration has no multipliers to keep"}
DECONVOLUTION_SYSTEMS = [
    _row("deconvolution", NonBlindDeconvolution, _deconvolved(beta=8.0), beta=8.0),
    _row(
        "deconvolution tied, colour, sigma",
        NonBlindDeconvolution,
        _deconvolved(beta=8.0, sigma=5.0),
        2,
        beta=8.0,
        sigma=5.0,
        tied=True,
    ),
    _row("kernel estimation", KernelEstimation, _estimated, dead=FRESH),
    _row("kernel estimation tied, colour", KernelEstimation, _estimated, 2, FRESH, tied=True),
]
