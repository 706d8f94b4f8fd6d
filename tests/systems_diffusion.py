"""The rows of the contract suite for learned partial differential equations, see `systems.py`."""

from __future__ import annotations

from typing import Any

import torch
from systems import System, _randn
from torch import Tensor

from unrolled import Unroll
from unrolled.image.diffusion import LearnedPDE
from unrolled.solvers.diffusion import heat

SIZE = (2, 6, 7)
NOT_READ = "the image that comes out of the last layer does not look at the last indicator"


def _images(batch: int) -> tuple[Tensor]:
    return (0.5 + 0.2 * _randn(batch, *SIZE, seed=5),)


def _heat(num_iters: int, image: Tensor) -> Tensor:
    return heat(image, num_iters=num_iters, diffusivity=0.05)


BAD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "no channels": ((_randn(6, 7),), ValueError, r"image must have shape \(\.\.\., C, height, width\)"),
    "dtype": ((_images(3)[0].float(),), TypeError, "image is torch.float32"),
    "integers": ((torch.ones(3, *SIZE, dtype=torch.uint8),), TypeError, "image / 255"),
    "no tensor": (([[1.0]],), TypeError, "image must be a torch.Tensor"),
    "nan": ((torch.full((3, *SIZE), torch.nan).double(),), ValueError, "image has 252 NaN"),
    "empty": ((_images(3)[0][:0],), ValueError, "image is empty"),
    "device": ((_images(3)[0].to("meta"),), ValueError, "image is on meta"),
    "range": ((255 * _images(3)[0],), ValueError, r"far outside \[0, 1\]"),
}


def _row(name: str, **fixed: Any) -> System:
    def make(num_iters: int = 5, **options: Any) -> Unroll:
        fixed_and_more = {"diffusivity": 0.05, **fixed, **options}
        return LearnedPDE(num_iters, **fixed_and_more, dtype=torch.float64)

    return System(name, make, _images, _heat, BAD, {"steps.4.raw_b": NOT_READ})


DIFFUSION_SYSTEMS = [
    _row("learned PDE"),
    _row("learned PDE tied", tied=True),
    _row("learned PDE one equation of u", tied=("raw_a",), indicator_diffusivity=0.2, contrast=25.0),
]
