"""Numbers against iterations, layers and sizes, as lines."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from unrolled.plot._style import GREY, array, axes_of, colours, markers, named, positive, style


def gap_curve(
    curves: Mapping[str, ArrayLike],
    *,
    level: tuple[str, str] | None = None,
    xlabel: str = "iteration or layer",
    ylabel: str = "relative gap to the optimum",
    ax: Axes | None = None,
) -> Axes:
    """Gap, objective or error against iteration on a logarithmic axis, one line a method.

    Args:
        curves: by name, the gap after iterations 1, 2, ...; values must be positive where they are to be seen.
        level: two names; a dotted line runs from the end of the first curve to where the second one draws level.
        xlabel, ylabel: what the axes say.
        ax: where to draw; a figure of its own where not given.

    Returns:
        The axes.

    Raises:
        TypeError: `ax` is no Axes.
        ValueError: no curves, a curve that is not one-dimensional or empty, `level` naming a curve that is not there.

    Example:
        >>> ax = gap_curve({"ISTA": [0.5, 0.3, 0.2], "FISTA": [0.5, 0.2, 0.1]})
        >>> ax.figure.savefig("gap.png")   # doctest: +SKIP
    """
    lines = {name: array(f"curves[{name!r}]", values, 1) for name, values in named("curves", curves).items()}
    ax = axes_of(ax, 7.0, 4.4)
    looks = zip(colours(len(lines)), markers(len(lines)), strict=True)
    for (name, values), (colour, marker) in zip(lines.items(), looks, strict=True):
        x = np.arange(1, len(values) + 1)
        every = max(1, len(values) // 20)
        ax.semilogy(x, values, color=colour, marker=marker, markevery=every, markersize=4, linewidth=2, label=name)
    if level is not None:
        _draw_level(ax, lines, *level)
    ax.set(xlabel=xlabel, ylabel=ylabel, xlim=(0.5, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False)
    return ax


def layer_values(
    series: Mapping[str, ArrayLike],
    *,
    classical: ArrayLike | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """What each layer learned, such as its step size or thresholds: a line a network, the classical value dashed.

    Args:
        series: by the network's name, one value a layer, (layers,), or many, (layers, n), of which the median is drawn
            and a band from the 10th to the 90th percentile.
        classical: what the algorithm itself uses: one value, or one a layer.
        title: what the values are.
        ax: where to draw; a figure of its own where not given.

    Returns:
        The axes.

    Raises:
        TypeError: `ax` is no Axes.
        ValueError: no series, arrays of other dimensions or not finite.

    Example:
        >>> ax = layer_values({"LISTA": [1.0, 1.4, 2.1]}, classical=1.0, title="step size")
    """
    names = list(named("series", series))
    ax = axes_of(ax, 7.0, 2.8)
    _draw_profile(ax, "series", series, dict(zip(names, colours(len(names)), strict=True)), classical)
    ax.set_title(title, loc="left", fontsize=11)
    ax.set_xlabel("layer")
    ax.legend(frameon=False, fontsize=9)
    return ax


def layer_profile(
    panels: Mapping[str, Mapping[str, ArrayLike]], *, classical: Mapping[str, ArrayLike] | None = None
) -> Figure:
    """Several quantities by layer, a panel each, see `layer_values`.

    Args:
        panels: by title, then by the network's name: one value a layer, (layers,), or many, (layers, n).
        classical: by title, what the algorithm itself uses: one value, or one a layer.

    Returns:
        The figure.

    Raises:
        ValueError: no panels or an empty one, arrays of other dimensions or not finite, a title in `classical` that
            `panels` does not have.

    Example:
        >>> figure = layer_profile({"step size": {"LISTA": [1.0, 1.4, 2.1]}}, classical={"step size": 1.0})
    """
    named("panels", panels)
    classical = classical or {}
    if stray := sorted(set(classical) - set(panels)):
        raise ValueError(f"classical has {stray}, which panels has not: {sorted(panels)}.")
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    looks = dict(zip(names, colours(len(names)), strict=True))
    figure = Figure(figsize=(7.0, 2.6 * len(panels)), layout="constrained")
    column = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (title, series) in zip(column, panels.items(), strict=True):
        style(axes)
        axes.set_title(title, loc="left", fontsize=11)
        _draw_profile(axes, f"panels[{title!r}]", series, looks, classical.get(title))
    column[0].legend(frameon=False, fontsize=9)
    column[-1].set_xlabel("layer")
    return figure


def influence_functions(
    x: ArrayLike, curves: Mapping[str, ArrayLike], *, xlabel: str = "response of the filter", ax: Axes | None = None
) -> Axes:
    """Learned functions of one number, such as shrinkage curves or the influence functions of TNRD.

    Args:
        x: where they were evaluated, (n,).
        curves: by name, their values there, (n,).
        xlabel: what the horizontal axis says.
        ax: where to draw; a figure of its own where not given.

    Returns:
        The axes.

    Raises:
        TypeError: `ax` is no Axes.
        ValueError: no curves, arrays that are not one-dimensional, finite and of the length of x.

    Example:
        >>> ax = influence_functions([-1.0, 0.0, 1.0], {"phi": [-0.5, 0.0, 0.5]})
    """
    places = array("x", x, 1)
    ax = axes_of(ax, 5.0, 4.0)
    lines = {name: array(f"curves[{name!r}]", values, 1) for name, values in named("curves", curves).items()}
    for (name, values), colour in zip(lines.items(), colours(len(lines)), strict=True):
        if len(values) != len(places):
            raise ValueError(f"curves[{name!r}] has {len(values)} values for {len(places)} places in x.")
        ax.plot(places, values, color=colour, linewidth=2, label=name)
    ax.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    ax.set_xlabel(xlabel)
    ax.legend(frameon=False, fontsize=9)
    return ax


def cost_curve(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    xlabel: str = "size",
    ylabel: str = "seconds",
    ax: Axes | None = None,
) -> Axes:
    """A cost against what it depends on, both axes logarithmic, a line a method.

    Args:
        series: by the method's name, a pair (x, y) of equally long arrays, positive.
        xlabel, ylabel: what the axes say.
        ax: where to draw; a figure of its own where not given.

    Returns:
        The axes.

    Raises:
        TypeError: `ax` is no Axes.
        ValueError: no series, arrays that are not one-dimensional, finite and positive, or differ in length.

    Example:
        >>> ax = cost_curve({"FISTA": ([500, 1000], [0.1, 0.4])}, xlabel="atoms n")
    """
    names = list(named("series", series))
    ax = axes_of(ax, 4.5, 3.6)
    _draw_costs(ax, "series", series, dict(zip(names, colours(len(names)), strict=True)))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False, fontsize=9)
    return ax


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
    named("panels", panels)
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    looks = dict(zip(names, colours(len(names)), strict=True))
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.7 * columns, 3.6 * rows + 0.6), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    lines: dict[str, Line2D] = {}
    for axes, (title, series) in zip(grid, panels.items(), strict=False):
        style(axes)
        lines.update(_draw_costs(axes, f"panels[{title!r}]", series, looks))
        axes.set_xlabel(title)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[::columns]:
        axes.set_ylabel(ylabel)
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=min(len(lines), 2 * columns), frameon=False)
    return figure


def _draw_profile(
    axes: Axes, where: str, series: Mapping[str, ArrayLike], looks: Mapping[str, str], classical: ArrayLike | None
) -> None:
    longest = 0
    for name, values in named(where, series).items():
        found = array(f"{where}[{name!r}]", values, 1, 2)
        longest = max(longest, len(found))
        _draw_layers(axes, found, name, looks[name])
    if classical is not None:
        reference = np.broadcast_to(np.asarray(classical, dtype=float), (longest,))
        axes.plot(np.arange(1, longest + 1), reference, color=GREY, linestyle="--", label="classical", zorder=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_costs(
    axes: Axes, where: str, series: Mapping[str, tuple[ArrayLike, ArrayLike]], looks: Mapping[str, str]
) -> dict[str, Line2D]:
    lines: dict[str, Line2D] = {}
    for name, (x, y) in named(where, series).items():
        places, costs = (positive(f"{where}[{name!r}]", values) for values in (x, y))
        if len(places) != len(costs):
            raise ValueError(f"{where}[{name!r}] has {len(places)} x and {len(costs)} y.")
        (lines[name],) = axes.loglog(
            places, costs, color=looks[name], marker="o", markersize=4, linewidth=2, label=name
        )
    ticks = sorted({float(value) for line in axes.get_lines() for value in np.asarray(line.get_xdata())})
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.set_xticks([], minor=True)
    return lines


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
    axes.plot([start, end], [goal, goal], color=GREY, linestyle=":", linewidth=1.5, zorder=1)
    axes.plot([end], [goal], color=GREY, marker="o", markersize=5, zorder=3)
    axes.annotate(
        f"{behind} needs {end}", (end, goal), xytext=(6, 8), textcoords="offset points", color="#333333", fontsize=10
    )
