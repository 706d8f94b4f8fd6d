"""Atoms, kernels, centres, codes and images, as pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from unrolled.plot._style import COLOURS, array, axes_of, named


def dictionary_mosaic(
    dictionary: ArrayLike, *, patch_shape: tuple[int, int] | None = None, ax: Axes | None = None
) -> Axes:
    """The atoms of a dictionary as small pictures, row by row, each scaled to its own largest entry, 0 in mid-grey.

    Args:
        dictionary: real, (m, n), atoms as columns.
        patch_shape: (height, width) of an atom; a square where not given.
        ax: where to draw; a figure of its own where not given.

    Returns:
        The axes.

    Raises:
        TypeError: `ax` is no Axes.
        ValueError: no matrix, an empty or not finite one, or m that is not height times width.

    Example:
        >>> ax = dictionary_mosaic(np.eye(64))
    """
    return _mosaic(_patches("an atom", array("dictionary", dictionary, 2).T, patch_shape), "gray", (-1, 1), ax)


def kernel_mosaic(kernels: ArrayLike, *, signed: bool = True, ax: Axes | None = None) -> Axes:
    """Small kernels side by side, such as the filters of TNRD or the blurs of a deconvolution.

    Args:
        kernels: (n, height, width), each scaled to its own largest entry.
        signed: whether 0 is mid-grey, as for filters; otherwise black, as for blurs.
        ax: where to draw; a figure of its own where not given.

    Returns:
        The axes.

    Raises:
        TypeError: `ax` is no Axes.
        ValueError: an array of other dimensions, empty or not finite.

    Example:
        >>> ax = kernel_mosaic(np.random.randn(24, 5, 5))
    """
    return _mosaic(_scaled(array("kernels", kernels, 3)), "gray", (-1 if signed else 0, 1), ax)


def centre_mosaic(
    centres: ArrayLike,
    *,
    patch_shape: tuple[int, int] | None = None,
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The centres of clusters of images, or what a decoder makes of them, row by row on one grey scale.

    Args:
        centres: (k, d), a row each, as scikit-learn's `cluster_centers_`.
        patch_shape: (height, width) of an image; a square where not given.
        limits: what is black and what is white; the least and the largest entry where not given.
        ax: where to draw; a figure of its own where not given.

    Returns:
        The axes.

    Raises:
        TypeError: `ax` is no Axes.
        ValueError: no matrix, an empty or not finite one, or d that is not height times width.

    Example:
        >>> ax = centre_mosaic(np.random.rand(10, 64))
    """
    rows = array("centres", centres, 2)
    low, high = (float(rows.min()), float(rows.max())) if limits is None else limits
    return _mosaic(_patches("a centre", rows, patch_shape, scale=False), "gray", (low, high), ax)


def filmstrip(pictures: ArrayLike, *, titles: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Pictures in a row on one grey scale from 0 to 1, such as the marginal of a class after each iteration of a CRF.

    Args:
        pictures: (n, height, width), values from 0 (black) to 1 (white).
        titles: what each one is; the numbers 1, 2, ... where not given.
        ax: where to draw; a figure of its own where not given.

    Returns:
        The axes.

    Raises:
        TypeError: `ax` is no Axes.
        ValueError: an array of other dimensions, empty or not finite, or another number of titles.

    Example:
        >>> ax = filmstrip(np.random.rand(5, 20, 30))
    """
    found = array("pictures", pictures, 3)
    n, height, width = found.shape
    titles = [str(k + 1) for k in range(n)] if titles is None else list(titles)
    if len(titles) != n:
        raise ValueError(f"titles has {len(titles)} entries for {n} pictures.")
    gap = max(1, width // 20)
    strip = np.full((height, n * (width + gap) - gap), np.nan)
    for k, picture in enumerate(found):
        strip[:, k * (width + gap) : k * (width + gap) + width] = picture
    ax = axes_of(ax, min(12.0, 2.2 * n), min(12.0, 2.2 * n) * height / strip.shape[1] + 0.4, picture=True)
    ax.imshow(strip, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set_yticks([])
    ax.set_xticks([k * (width + gap) + (width - 1) / 2 for k in range(n)], titles)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def support_evolution(codes: ArrayLike, *, truth: ArrayLike | None = None, ax: Axes | None = None) -> Axes:
    """Which entries of a code are not zero after each layer: rows are layers, columns atoms, dark is large.

    Args:
        codes: the code of one signal after each layer, (layers, n), or of several, (layers, batch, n), of which the
            share that is not zero is drawn.
        truth: which atoms belong there, (n,), nonzero for those that do: they are marked below the last layer.
        ax: where to draw; a figure of its own where not given.

    Returns:
        The axes.

    Raises:
        TypeError: `ax` is no Axes.
        ValueError: arrays of other dimensions, empty or not finite, or a truth of another length.

    Example:
        >>> ax = support_evolution(np.random.randn(16, 50), truth=np.arange(50) < 5)
    """
    found = array("codes", codes, 2, 3)
    if found.ndim == 3:
        shown, label = (found != 0).mean(1), "share of signals that use the atom"
    else:
        # Relative to the largest entry of the layer: early codes are small.
        largest = np.abs(found).max(1, keepdims=True)
        shown, label = np.abs(found) / np.where(largest > 0, largest, 1), "size, relative to the layer's largest"
    layers, n = shown.shape
    ax = axes_of(ax, 8.0, 3.4, picture=True)
    picture = ax.imshow(shown, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ax.set_yticks(range(layers), [str(k + 1) for k in range(layers)])
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(10, layers)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value + 1:g}")
    if truth is not None:
        belongs = array("truth", truth, 1)
        if len(belongs) != n:
            raise ValueError(f"truth has {len(belongs)} entries for {n} atoms.")
        places = np.flatnonzero(belongs)
        ax.plot(places, np.full(len(places), layers - 0.25), "^", color=COLOURS[1], markersize=4, label="true support")
        ax.set_ylim(layers, -0.5)
        ax.legend(loc="upper right", fontsize=8)
    ax.set(xlabel="atom", ylabel="layer")
    ax.figure.colorbar(picture, ax=ax, label=label)
    return ax


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
    arrays = {name: array(f"pictures[{name!r}]", values, 2) for name, values in named("pictures", pictures).items()}
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


def _patches(
    what: str, rows: np.ndarray, patch_shape: tuple[int, int] | None, *, scale: bool = True
) -> np.ndarray:  # (n, height, width)
    m = rows.shape[1]
    height, width = (math.isqrt(m), math.isqrt(m)) if patch_shape is None else patch_shape
    if height * width != m:
        raise ValueError(f"{what} has {m} entries, which is not patch_shape {height} x {width}. Pass the right one.")
    patches = rows.reshape(-1, height, width)
    return _scaled(patches) if scale else patches


def _scaled(patches: np.ndarray) -> np.ndarray:
    """Each divided by its largest entry."""
    largest = np.abs(patches).max((1, 2), keepdims=True)
    return patches / np.where(largest > 0, largest, 1)


def _mosaic(patches: np.ndarray, colours: str, limits: tuple[float, float], ax: Axes | None) -> Axes:
    n, height, width = patches.shape
    columns = math.ceil(math.sqrt(n * height / width))
    rows = math.ceil(n / columns)
    picture = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1), np.nan)
    for k, patch in enumerate(patches):
        top, left = k // columns * (height + 1) + 1, k % columns * (width + 1) + 1
        picture[top : top + height, left : left + width] = patch
    ax = axes_of(ax, 6.0, 6.0 * picture.shape[0] / picture.shape[1], picture=True)
    # Missing values, the lines between the patches, stay white.
    ax.imshow(picture, cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    ax.set_axis_off()
    return ax
