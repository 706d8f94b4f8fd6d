"""The rows of the contract suite for TNRD, see `systems.py`.

Rows hold what every line asks for: the stages of `TNRD` under a plain `Unroll`, which repeats the classical shrinkage.
`TNRD` itself begins with one such stage and others that change nothing. It cannot start the same tied and untied;
`test_tnrd.py` runs every other line over `NAMED`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from systems import System, _randn
from torch import Tensor

from unrolled import Unroll
from unrolled.image.tnrd import TNRD, TNRDStep
from unrolled.operators import LinearOperator
from unrolled.solvers.denoising import dct_shrinkage

SIZE = (6, 7)
SIGMA = 15.0
FROM_IMAGE = "the first stage starts from the image, which the data term then agrees with"


def pictures(channels: int) -> Callable[[int], tuple[Tensor]]:
    """Noisy images in 0..1 and beyond."""

    def inputs(batch: int) -> tuple[Tensor]:
        y, x = torch.meshgrid(torch.linspace(0, 1, SIZE[0]), torch.linspace(0, 1, SIZE[1]), indexing="ij")
        return ((0.3 + 0.6 * x * y).double() + SIGMA / 255 * _randn(batch, channels, *SIZE, seed=1),)

    return inputs


def influence(filter_size: int, sigma: float = SIGMA) -> Callable[[Tensor], Tensor]:
    """The untrained influence function, in NumPy: through the curve's values at the centres, by a table."""
    centres = np.linspace(-310, 310, 63)

    def gaussians(x: np.ndarray) -> np.ndarray:
        return np.exp(-((x[:, None] - centres) ** 2) / 200)

    curve = centres * np.exp(-((centres / (2.7 * sigma)) ** 4) / 2) / filter_size**2
    weights = np.linalg.solve(gaussians(centres), curve)
    places = -370 + 0.2 * np.arange(3701)
    table = gaussians(places) @ weights
    table[[0, 1, -2, -1]] = 0
    return lambda x: torch.from_numpy(np.interp(x.detach().numpy(), places, table))


class Halving(LinearOperator):
    """Sums of two pixels, one above the other, of norm 1."""

    def __init__(self) -> None:
        super().__init__((1, *SIZE), (1, SIZE[0] // 2, SIZE[1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.check("x", x, self.in_shape).unflatten(-2, (-1, 2)).sum(-2) / 2**0.5

    def adjoint(self, y: Tensor) -> Tensor:
        return self.check("y", y, self.out_shape).repeat_interleave(2, -2) / 2**0.5


def _repeated(filter_size: int, joint: bool) -> Callable[..., Tensor]:
    def solve(num_iters: int, image: Tensor) -> Tensor:
        return dct_shrinkage(
            image, SIGMA, filter_size=filter_size, joint=joint, num_iters=num_iters, influence=influence(filter_size)
        )

    return solve


def _from_above(num_iters: int, image: Tensor) -> Tensor:
    start = Halving().adjoint(image)
    return dct_shrinkage(start, SIGMA, filter_size=3, num_iters=num_iters, influence=influence(3))


def _observed(batch: int) -> tuple[Tensor]:
    return (Halving()(pictures(1)(batch)[0]),)


BAD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "no channels": ((_randn(*SIZE),), ValueError, r"image must have shape \(\.\.\., C, height, width\)"),
    "integers": ((torch.ones(3, 1, *SIZE, dtype=torch.uint8),), TypeError, r"values in \[0, 1\], got torch.uint8"),
    "dtype": ((_randn(3, 1, *SIZE).float(),), TypeError, "image is torch.float32"),
    "no tensor": (([[1.0]],), TypeError, "image must be a torch.Tensor, got list"),
    "nan": ((torch.full((3, 1, *SIZE), torch.nan).double(),), ValueError, "image has 126 NaN"),
    "empty": ((_randn(3, 1, *SIZE)[:0],), ValueError, "image is empty"),
    "device": ((torch.empty(3, 1, *SIZE, device="meta", dtype=torch.float64),), ValueError, "image is on meta"),
    "range": ((255 * torch.rand(3, 1, *SIZE).double(),), ValueError, r"far outside \[0, 1\]"),
    "start": ((pictures(1)(3)[0], pictures(1)(2)[0]), ValueError, r"start must have shape \(3, 1, 6, 7\)"),
}
COLOURS: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "grey": ((_randn(3, 1, *SIZE),), ValueError, r"image must have shape \(\.\.\., 3, height, width\)"),
}
OBSERVATIONS: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "size": ((_randn(3, 1, *SIZE),), ValueError, r"image must have shape \(\.\.\., 1, 3, 7\)"),
}


def _row(
    name: str,
    reference: Callable[..., Tensor],
    inputs: Callable[[int], tuple[Tensor, ...]],
    bad: dict[str, tuple[tuple[Any, ...], type[Exception], str]],
    dead: dict[str, str],
    **fixed: Any,
) -> System:
    def make(num_iters: int = 5, **options: Any) -> Unroll:
        step = TNRDStep(sigma=SIGMA, filter_size=3, **fixed, dtype=torch.float64)
        return Unroll(step, num_iters, **{"tied": False, **options})

    return System(name, make, inputs, reference, bad, dead)


FIRST = {"steps.0.raw_reaction": FROM_IMAGE}
IMAGE_SYSTEMS = [
    _row("TNRD stages", _repeated(3, False), pictures(2), BAD, FIRST),
    _row("TNRD stages, joint colour", _repeated(3, True), pictures(3), COLOURS, FIRST, channels=3),
    _row("TNRD stages, operator", _from_above, _observed, OBSERVATIONS, {}, operator=Halving()),
]


def _named(num_iters: int = 5, **options: Any) -> TNRD:
    return TNRD(num_iters, sigma=SIGMA, filter_size=3, **options, dtype=torch.float64)


def _once(num_iters: int, image: Tensor) -> Tensor:
    return _repeated(3, False)(1, image)


NAMED = System("TNRD", _named, pictures(1), _once, BAD, FIRST)
