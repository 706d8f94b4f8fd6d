"""What all figures share: colours, axes, and checks of what is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor

# M. Okabe and K. Ito's colours, told apart by colour-blind readers too; the strongest first, yellow left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
# Beside the colour, so that lines can be told apart in grey too.
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#6b6b6b"


def axes_of(ax: Axes | None, width: float, height: float, *, picture: bool = False) -> Axes:
    """The axes to draw into: those given, or those of a new figure, which is `ax.figure`."""
    if ax is None:
        ax = Figure(figsize=(width, height), layout="constrained").add_subplot()
    elif not isinstance(ax, Axes):
        raise TypeError(f"ax must be a matplotlib Axes, such as one of plt.subplots(), got {type(ax).__name__}.")
    if not picture:
        style(ax)
    return ax


def style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)


def colours(count: int) -> list[str]:
    return [COLOURS[k % len(COLOURS)] for k in range(count)]


def markers(count: int) -> list[str]:
    return [MARKERS[k % len(MARKERS)] for k in range(count)]


def named(name: str, values: Mapping[str, object]) -> Mapping[str, Any]:
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"{name} must map names to arrays, at least one, got {values!r}.")
    return values


def array(name: str, values: ArrayLike, *dims: int) -> np.ndarray:
    """Return `values` as floats if they have one of the numbers of dimensions and are finite and not empty."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    found = np.asarray(values, dtype=float)
    if found.ndim not in dims:
        allowed = " or ".join(map(str, dims))
        raise ValueError(f"{name} must have {allowed} dimension(s), got shape {found.shape}.")
    if found.size == 0 or not np.isfinite(found).all():
        raise ValueError(f"{name} is empty or has NaN or infinite entries, its shape is {found.shape}.")
    return found


def positive(name: str, values: ArrayLike) -> np.ndarray:
    found = array(name, values, 1)
    if (found <= 0).any():
        raise ValueError(
            f"{name} has values that are not positive, the least is {found.min():g}. The axes are logarithmic."
        )
    return found
