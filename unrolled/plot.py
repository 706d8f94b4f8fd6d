"""Figures: each function takes arrays and returns a matplotlib `Figure`, to save or to show. Needs `unrolled[plot]`.

Nothing here touches pyplot or its global state, so that figures can be made anywhere, without a display.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

# M. Okabe and K. Ito's colours, told apart by colour-blind readers too; the strongest first, yellow left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_GREY = "#6b6b6b"


def gap_curve(
    curves: Mapping[str, ArrayLike],
    *,
    level: tuple[str, str] | None = None,
    xlabel: str = "iteration or layer",
    ylabel: str = "relative gap to the optimum",
) -> Figure:
    """Gap against iteration on a logarithmic axis, one line a method.

    Args:
        curves: by name, the gap after iterations 1, 2, ...; values must be positive where they are to be seen.
        level: two names; a dotted line runs from the end of the first curve to where the second one draws level.
        xlabel, ylabel: what the axes say.

    Returns:
        The figure.

    Raises:
        ValueError: no curves, a curve that is not one-dimensional or empty, `level` naming a curve that is not there.

    Example:
        >>> figure = gap_curve({"ISTA": [0.5, 0.3, 0.2], "FISTA": [0.5, 0.2, 0.1]})
        >>> figure.savefig("gap.png")   # doctest: +SKIP
    """
    lines = {name: _array(f"curves[{name!r}]", values, 1) for name, values in _named("curves", curves).items()}
    figure, axes = _figure(7.0, 4.4)
    for (name, values), colour in zip(lines.items(), _colours(len(lines)), strict=True):
        marker = "o" if len(values) <= 20 else ""
        x = np.arange(1, len(values) + 1)
        axes.semilogy(x, values, color=colour, marker=marker, markersize=4, linewidth=2, label=name)
    if level is not None:
        _draw_level(axes, lines, *level)
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(0.5, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def dictionary_mosaic(dictionary: ArrayLike, *, patch_shape: tuple[int, int] | None = None) -> Figure:
    """The atoms of a dictionary as small pictures, row by row, each scaled to its own largest entry, 0 in mid-grey.

    Args:
        dictionary: real, (m, n), atoms as columns.
        patch_shape: (height, width) of an atom; a square where not given.

    Returns:
        The figure.

    Raises:
        ValueError: no matrix, an empty or not finite one, or m that is not height times width.

    Example:
        >>> figure = dictionary_mosaic(np.eye(64))
    """
    D = _array("dictionary", dictionary, 2)
    m, n = D.shape
    if patch_shape is None:
        patch_shape = (math.isqrt(m), math.isqrt(m))
    height, width = patch_shape
    if height * width != m:
        raise ValueError(f"an atom has {m} entries, which is not patch_shape {height} x {width}. Pass the right one.")
    scale = np.abs(D).max(0)
    atoms = (D / np.where(scale > 0, scale, 1)).T.reshape(n, height, width)
    columns = math.ceil(math.sqrt(n * height / width))
    rows = math.ceil(n / columns)
    picture = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1), np.nan)
    for k, atom in enumerate(atoms):
        top, left = k // columns * (height + 1) + 1, k % columns * (width + 1) + 1
        picture[top : top + height, left : left + width] = atom
    figure, axes = _figure(6.0, 6.0 * picture.shape[0] / picture.shape[1])
    # Missing values, the lines between the atoms, stay white.
    axes.imshow(picture, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_axis_off()
    return figure


def before_after(pictures: Mapping[str, ArrayLike], *, columns: int = 2) -> Figure:
    """Grey pictures side by side, each under its name.

    Args:
        pictures: by name, arrays (height, width) with values from 0 (black) to 1 (white); beyond them shown as such.
        columns: how many to a row.

    Returns:
        The figure.

    Raises:
        ValueError: no pictures, one that is no matrix, empty or not finite, or `columns < 1`.

    Example:
        >>> figure = before_after({"noisy": np.random.rand(32, 48), "clean": np.full((32, 48), 0.5)})
    """
    arrays = {name: _array(f"pictures[{name!r}]", values, 2) for name, values in _named("pictures", pictures).items()}
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    columns = min(columns, len(arrays))
    rows = math.ceil(len(arrays) / columns)
    height, width = next(iter(arrays.values())).shape
    panel = 8.0 / columns
    figure = Figure(figsize=(8.0, rows * (panel * height / width + 0.35)), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, (name, values) in zip(grid, arrays.items(), strict=False):
        axes.imshow(values, cmap="gray", vmin=0, vmax=1, interpolation="nearest" if width < 200 else "antialiased")
        axes.set_title(name, fontsize=11)
    return figure


def layer_profile(
    panels: Mapping[str, Mapping[str, ArrayLike]], *, classical: Mapping[str, ArrayLike] | None = None
) -> Figure:
    """What each layer learned, a panel a quantity: the classical algorithm dashed, the networks in colour.

    Args:
        panels: by title, then by the network's name: one value a layer, (layers,), or many, (layers, n), of which the
            median is drawn and a band from the 10th to the 90th percentile.
        classical: by title, what the algorithm itself uses: one value, or one a layer.

    Returns:
        The figure.

    Raises:
        ValueError: no panels or an empty one, arrays of other dimensions or not finite, a title in `classical` that
            `panels` does not have.

    Example:
        >>> figure = layer_profile({"step size": {"LISTA": [1.0, 1.4, 2.1]}}, classical={"step size": 1.0})
    """
    _named("panels", panels)
    classical = classical or {}
    if stray := sorted(set(classical) - set(panels)):
        raise ValueError(f"classical has {stray}, which panels has not: {sorted(panels)}.")
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    colours = dict(zip(names, _colours(len(names)), strict=True))
    figure = Figure(figsize=(7.0, 2.6 * len(panels)), layout="constrained")
    column = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (title, series) in zip(column, panels.items(), strict=True):
        _style(axes)
        axes.set_title(title, loc="left", fontsize=11)
        for name, values in _named(f"panels[{title!r}]", series).items():
            _draw_layers(axes, _array(f"panels[{title!r}][{name!r}]", values, 1, 2), name, colours[name])
        if title in classical:
            layers = max(len(np.asarray(values)) for values in series.values())
            reference = np.broadcast_to(np.asarray(classical[title], dtype=float), (layers,))
            axes.plot(np.arange(1, layers + 1), reference, color=_GREY, linestyle="--", label="classical", zorder=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    column[0].legend(frameon=False, fontsize=9)
    column[-1].set_xlabel("layer")
    return figure


def scaling(
    panels: Mapping[str, Mapping[str, tuple[ArrayLike, ArrayLike]]], *, ylabel: str = "seconds", columns: int = 3
) -> Figure:
    """A cost against what it depends on, both axes logarithmic: a panel a quantity, a line a method.

    Args:
        panels: by the title of the horizontal axis, then by the method's name: a pair (x, y) of equally long arrays,
            positive.
        ylabel: what the vertical axis says, which all panels share.
        columns: how many panels to a row.

    Returns:
        The figure.

    Raises:
        ValueError: no panels or an empty one, arrays that are not one-dimensional, finite and positive, or differ in
            length; `columns < 1`.

    Example:
        >>> figure = scaling({"atoms n": {"FISTA": ([500, 1000], [0.1, 0.4]), "ALISTA": ([500, 1000], [0.1, 0.3])}})
    """
    _named("panels", panels)
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    colours = dict(zip(names, _colours(len(names)), strict=True))
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.7 * columns, 3.6 * rows + 0.6), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    lines = {}
    for axes, (title, series) in zip(grid, panels.items(), strict=False):
        _style(axes)
        for name, (x, y) in _named(f"panels[{title!r}]", series).items():
            pair = [_positive(f"panels[{title!r}][{name!r}]", values) for values in (x, y)]
            if len(pair[0]) != len(pair[1]):
                raise ValueError(f"panels[{title!r}][{name!r}] has {len(pair[0])} x and {len(pair[1])} y.")
            (lines[name],) = axes.loglog(*pair, color=colours[name], marker="o", markersize=4, linewidth=2, label=name)
        ticks = sorted({value for line in axes.get_lines() for value in line.get_xdata()})
        axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(title)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[::columns]:
        axes.set_ylabel(ylabel)
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=min(len(lines), 2 * columns), frameon=False)
    return figure


def _draw_layers(axes: Axes, values: np.ndarray, name: str, colour: str) -> None:
    layers = np.arange(1, len(values) + 1)
    if values.ndim == 2:
        low, values, high = np.percentile(values, (10, 50, 90), axis=1)
        axes.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(layers, values, color=colour, marker="o", markersize=4, linewidth=2, label=name)


def _draw_level(axes: Axes, lines: Mapping[str, np.ndarray], ahead: str, behind: str) -> None:
    for name in (ahead, behind):
        if name not in lines:
            raise ValueError(f"level names the curve {name!r}, which is not there: {', '.join(lines)}.")
    start, goal = len(lines[ahead]), lines[ahead][-1]
    reached = np.flatnonzero(lines[behind] <= goal)
    if len(reached) == 0 or reached[0] + 1 <= start:
        return
    end = int(reached[0]) + 1
    axes.plot([start, end], [goal, goal], color=_GREY, linestyle=":", linewidth=1.5, zorder=1)
    axes.plot([end], [goal], color=_GREY, marker="o", markersize=5, zorder=3)
    axes.annotate(
        f"{behind} needs {end}", (end, goal), xytext=(6, 8), textcoords="offset points", color="#333333", fontsize=10
    )


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    return figure, axes


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)


def _colours(count: int) -> list[str]:
    return [COLOURS[k % len(COLOURS)] for k in range(count)]


def _named(name: str, values: Mapping[str, object]) -> Mapping[str, Any]:
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"{name} must map names to arrays, at least one, got {values!r}.")
    return values


def _array(name: str, values: ArrayLike, *dims: int) -> np.ndarray:
    """Return `values` as floats if they have one of the numbers of dimensions and are finite and not empty."""
    array = np.asarray(values, dtype=float)
    if array.ndim not in dims:
        allowed = " or ".join(map(str, dims))
        raise ValueError(f"{name} must have {allowed} dimension(s), got shape {array.shape}.")
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} is empty or has NaN or infinite entries, its shape is {array.shape}.")
    return array


def _positive(name: str, values: ArrayLike) -> np.ndarray:
    array = _array(name, values, 1)
    if (array <= 0).any():
        raise ValueError(
            f"{name} has values that are not positive, the least is {array.min():g}. The axes are logarithmic."
        )
    return array
