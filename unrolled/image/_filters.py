"""Filtering of images and its exact adjoint, fast in both directions on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import grad
from torch.nn.functional import conv2d, conv_transpose2d, fold

from unrolled import _check


def filtered(u: Tensor, kernels: Tensor) -> Tensor:
    """k_i * u for all filters of odd side, with zeros around the image.

    Shape:
        - u: (B, C, H, W)
        - kernels: (N, C, m, m)
        - output: (B, N, H, W)
    """
    if _transformed(u, kernels):
        return conv2d(u, kernels, padding=kernels.shape[-1] // 2)
    return _Filtered.apply(u, kernels)


def adjoint(v: Tensor, kernels: Tensor) -> Tensor:
    """sum_i kbar_i * v_i, the adjoint of `filtered`: <filtered(u, kernels), v> = <u, adjoint(v, kernels)>.

    Shape:
        - v: (B, N, H, W)
        - kernels: (N, C, m, m)
        - output: (B, C, H, W)
    """
    if _transformed(v, kernels):
        return conv_transpose2d(v, kernels, padding=kernels.shape[-1] // 2)
    return _Adjoint.apply(v, kernels)


def _transformed(images: Tensor, kernels: Tensor) -> bool:
    """Whether a compiler or torch.func is at work, which take the plain operations."""
    return _check.is_traced(images) or _check.is_traced(kernels)


def _forward(u: Tensor, kernels: Tensor) -> Tensor:
    return conv2d(u, kernels, padding=kernels.shape[-1] // 2)


def _back(v: Tensor, kernels: Tensor) -> Tensor:
    m = kernels.shape[-1]
    if not v.is_cpu:
        return conv_transpose2d(v, kernels, padding=m // 2)
    # All products in one matrix product, then a sum over shifts: 3 to 5 times faster on the CPU than conv_transpose2d.
    columns = torch.bmm(kernels.flatten(1).mT.expand(v.shape[0], -1, -1), v.flatten(2))
    return fold(columns, v.shape[-2:], m, padding=m // 2)


def _between(u: Tensor, v: Tensor, kernels: Tensor) -> Tensor:
    """The gradient of <filtered(u, kernels), v> with respect to the kernels."""
    return grad.conv2d_weight(u, kernels.shape, v, padding=kernels.shape[-1] // 2)


# <filtered(u, k), v> is linear in each of u, v and k. So the gradients of either operation are the other two, and
# backward passes are made of what can be differentiated again.


class _Filtered(torch.autograd.Function):
    @staticmethod
    def forward(u: Tensor, kernels: Tensor) -> Tensor:
        return _forward(u, kernels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        u, kernels = ctx.saved_tensors
        gradient = gradient.contiguous()
        return (
            _Adjoint.apply(gradient, kernels) if ctx.needs_input_grad[0] else None,
            _between(u, gradient, kernels) if ctx.needs_input_grad[1] else None,
        )


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(v: Tensor, kernels: Tensor) -> Tensor:
        return _back(v, kernels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        v, kernels = ctx.saved_tensors
        gradient = gradient.contiguous()
        return (
            _Filtered.apply(gradient, kernels) if ctx.needs_input_grad[0] else None,
            _between(gradient, v, kernels) if ctx.needs_input_grad[1] else None,
        )
