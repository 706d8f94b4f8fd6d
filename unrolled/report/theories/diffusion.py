"""What theory says of explicit steps of diffusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from unrolled import _check
from unrolled.report.columns import Column, Kind
from unrolled.report.measures import largest_lipschitz
from unrolled.report.recording import Layer, Run
from unrolled.report.theory import Theory

PERONA = "P. Perona and J. Malik, IEEE Transactions on Pattern Analysis and Machine Intelligence 12(7), 1990"
WEICKERT = "J. Weickert, Anisotropic Diffusion in Image Processing, Teubner 1998"


class DiffusionTheory(Theory):
    r"""$u^+ = u + d\,\Delta u$: an explicit step of diffusion, which is stable for small enough $d$ only.

    | column | measured | predicted |
    |---|---|---|
    | diffusivity | $d$ in least squares, $\langle u^+ - u, \Delta u\rangle / \|\Delta u\|^2$ | $\le$ `limit` |
    | overshoot | how far $u^+$ leaves the range of $u$, relative to it | $\le 0$, the maximum principle |
    | roughness | $\|\nabla u^+\|^2 / \|\nabla u\|^2$ | $\le 1$ |
    | mean | the change of the mean grey level, relative to the range | 0 |
    | lipschitz | largest norm of the layer's Jacobian seen | $\le 1$ |

    Where $d$ exceeds the limit, a pixel gets a negative weight in its own average, and checkerboards grow. Learned
    diffusion reacts as well as diffuses: it may sharpen, and then leaves these laws on purpose.

    Args:
        nine_point: whether $\Delta$ is the nine-point Laplacian (1, 4, 1; 4, -20, 4; 1, 4, 1)/6 of
            `unrolled.image.invariants`, in place of the five-point one.
        limit: the largest stable $d$; 3/10 for nine points and 1/4 for five where not given.

    Raises:
        ValueError: a network whose readout are no images (..., C, H, W); `limit` is not positive.

    Reference:
        P. Perona and J. Malik, "Scale-Space and Edge Detection Using Anisotropic Diffusion", IEEE Transactions on
        Pattern Analysis and Machine Intelligence 12(7), 1990, equation (7), for five points.
    """

    def __init__(self, *, nine_point: bool = True, limit: float | None = None) -> None:
        self.nine_point = bool(nine_point)
        self.limit = (0.3 if nine_point else 0.25) if limit is None else _check.real("limit", limit, above=0.0)

    def check(self, run: Run) -> None:
        if not isinstance(run.output, Tensor) or run.output.dim() < 2 or run.layers[0].step.event_dim < 2:
            raise ValueError("DiffusionTheory is about images (..., C, H, W), which this network does not return.")

    def columns(self, run: Run) -> Sequence[Column]:
        points = "nine" if self.nine_point else "five"
        columns = [
            Column(
                "diffusivity",
                self._diffusivity,
                self.limit,
                Kind.AT_MOST,
                1e-3,
                f"d ≤ {self.limit:g} for the {points}-point Laplacian",
                WEICKERT if self.nine_point else f"{PERONA}, equation (7)",
                "unstable",
            ),
            Column(
                "overshoot",
                _overshoot,
                0.0,
                Kind.AT_MOST,
                1e-4,
                "min u ≤ u+ ≤ max u",
                PERONA,
                "maximum principle broken",
            ),
            Column(
                "roughness", _roughness, 1.0, Kind.AT_MOST, 1e-3, "|grad u+|² ≤ |grad u|²", WEICKERT, "roughness rises"
            ),
            Column("mean", _mean, 0.0, Kind.EQUALITY, 1e-4, "mean u+ = mean u", WEICKERT),
        ]
        if run.power_iters:
            columns.append(
                Column(
                    "lipschitz",
                    largest_lipschitz,
                    1.0,
                    Kind.AT_MOST,
                    1e-3,
                    "|T u - T v| ≤ |u - v|",
                    f"{WEICKERT}; the largest value seen",
                    "expansive",
                )
            )
        return columns

    def conditions(self, values: Mapping[str, float]) -> list[str]:
        d = values.get("diffusivity", 0.0)
        if d > self.limit:
            return [f"its diffusivity {d:.3g} exceeds {self.limit:g}"]
        return ["it is not diffusion alone"]

    def _diffusivity(self, layer: Layer) -> float:
        u, new = layer.x.double(), layer.new_x.double()
        smooth = _laplacian(u, self.nine_point)
        size = float(smooth.square().sum())
        return float((smooth * (new - u)).sum()) / size if size else 0.0

    def __str__(self) -> str:
        return "diffusion"


def _laplacian(u: Tensor, nine_point: bool) -> Tensor:
    """No gradient crosses the border."""
    kernel = [[1.0, 4, 1], [4, -20, 4], [1, 4, 1]] if nine_point else [[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]
    weight = u.new_tensor(kernel).reshape(1, 1, 3, 3) / (6 if nine_point else 1)
    flat = u.reshape(-1, 1, *u.shape[-2:])
    return torch.nn.functional.conv2d(pad(flat, (1, 1, 1, 1), mode="replicate"), weight).reshape(u.shape)


def _extent(layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Images with the pixels in one dimension, and the range of the first."""
    dims = layer.run.batch_dims
    u, new = layer.x.double().flatten(dims), layer.new_x.double().flatten(dims)
    span = u.amax(-1) - u.amin(-1)
    return u, new, torch.where(span > 0, span, 1)


def _overshoot(layer: Layer) -> Tensor:
    u, new, span = _extent(layer)
    above, below = (new.amax(-1) - u.amax(-1)).clamp(min=0), (u.amin(-1) - new.amin(-1)).clamp(min=0)
    return torch.maximum(above, below) / span


def _mean(layer: Layer) -> Tensor:
    u, new, span = _extent(layer)
    return (new.mean(-1) - u.mean(-1)).abs() / span


def _roughness(layer: Layer) -> Tensor:
    def energy(u: Tensor) -> Tensor:
        dims = layer.run.batch_dims
        parts = [torch.diff(u.double(), dim=dim).square().flatten(dims).sum(-1) for dim in (-1, -2)]
        return parts[0] + parts[1]

    before = energy(layer.x)
    return torch.where(before > 0, energy(layer.new_x) / before, torch.nan)
