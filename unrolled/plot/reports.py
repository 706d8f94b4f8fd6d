"""Figures of layer reports: a panel for each quantity, what is measured beside what is predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unrolled.plot._style import COLOURS, GREY, axes_of
from unrolled.report import LayerReport
from unrolled.report.columns import Kind

BLUE, ORANGE = COLOURS[:2]  # told apart by marker and dash as well


def layer_report(report: LayerReport, quantities: Sequence[str] | None = None, *, columns: int = 3) -> Figure:
    """All quantities of a report, or some, each in a panel over the layers; see `layer_quantity`.

    Args:
        report: what is drawn.
        quantities: names of its columns; those that have a value where not given.
        columns: how many panels to a row, at least 1.

    Returns:
        The figure.

    Raises:
        KeyError: the report has no such column.
        ValueError: there is nothing to draw, or `columns < 1`.

    Example:
        >>> figure = layer_report(report, ["decrease", "removal"])   # doctest: +SKIP
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    names = quantities or [name for name in report.columns if np.isfinite(report.value(name)).any()]
    if not names:
        raise ValueError("the report has no quantity that could be drawn.")
    columns = min(columns, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.4 * rows + 0.5), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(grid, names, strict=False):
        layer_quantity(report, name, ax=axes)
    for axes in grid[max(0, len(names) - columns) : len(names)]:
        axes.set_xlabel("layer")
        axes.tick_params(labelbottom=True)
    handles = {text: handle for axes in grid for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=max(1, len(handles)), frameon=False)
    return figure


def layer_quantity(report: LayerReport, quantity: str, *, ax: Axes | None = None) -> Axes:
    """One quantity over the layers: measured by dots, predicted by a dashed line, crosses where a prediction fails.

    Args:
        report: what is drawn.
        quantity: the name of a column.
        ax: where to draw; a figure of its own where not given.

    Returns:
        The axes.

    Raises:
        KeyError: the report has no such column.

    Example:
        >>> ax = layer_quantity(report, "decrease")   # doctest: +SKIP
    """
    measured, predicted = report.value(quantity), report.predicted(quantity)
    ax = axes_of(ax, 4.5, 3.0)
    layers = np.arange(len(measured))
    ax.plot(layers, measured, color=BLUE, marker="o", markersize=4, linewidth=1.5, label="measured")
    kind = report.columns[quantity].kind
    if kind is not Kind.MEASURED and np.isfinite(predicted).any():
        ax.plot(layers, predicted, color=GREY, linestyle="--", linewidth=1.5, label="predicted", zorder=1)
    fails = np.array([report.row(quantity, k).holds is False for k in range(len(measured))])
    if fails.any():
        crosses: dict[str, Any] = {"color": ORANGE, "marker": "x", "markersize": 8, "linestyle": ""}
        ax.plot(layers[fails], measured[fails], label="prediction fails", **crosses)
    values = np.concatenate([measured, predicted])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 20 * values.min():
        ax.set_yscale("log")
    ax.set_title(f"{quantity} ({kind.value})" if kind.value else quantity, loc="left", fontsize=10)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax
