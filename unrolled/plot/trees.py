"""Trees of examples: the tree itself, the walk that explains a prediction, the classes it gives in a plane."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from unrolled.plot._style import COLOURS, GREY, MARKERS, array, axes_of

LEVEL = 1.75  # between the centres of pictures that lie below each other, in widths of one
SHADES = ("#f2f2f2", "#bdbdbd", "#dcdcdc", "#a0a0a0", "#e8e8e8", "#cdcdcd", "#8c8c8c", "#b0b0b0", "#f9f9f9", "#969696")


def tree_of_examples(
    parents: Sequence[int] | ArrayLike,
    *,
    pictures: ArrayLike | None = None,
    labels: Iterable[Any] | None = None,
    path: Sequence[int] = (),
    ax: Axes | None = None,
) -> Axes:
    """A tree from its root at the top, each node with its picture and label; a path stands out by thick lines.

    Args:
        parents: of each node, (N,); -1 for the root, which is the first one, and every node comes after its parent.
        pictures: (N, height, width), on one grey scale, small is white; boxes with the node's number where not given.
        labels: (N,), written below the pictures.
        path: nodes to mark, from the root on, such as those of `Explanation.nodes`.
        ax: where to draw; a figure of its own where not given.

    Returns:
        The axes.

    Raises:
        TypeError: `ax` is no Axes.
        ValueError: parents that are no tree, pictures or labels of another number, a path that the tree has not.

    Example:
        >>> ax = tree_of_examples([-1, 0, 0, 1], labels=["cat", "dog", "fox", "cat"], path=[0, 1])
    """
    family = [int(parent) for parent in array("parents", parents, 1)]
    n = len(family)
    if family[0] != -1 or any(not 0 <= parent < node for node, parent in enumerate(family) if node):
        raise ValueError("parents must be -1 for the first node, and of the others a node before them.")
    shown = None if pictures is None else _all_of("pictures", array("pictures", pictures, 3), n)
    texts = None if labels is None else [str(_plain(label)) for label in _all_of("labels", list(labels), n)]
    marked = [int(node) for node in path]
    for before, node in itertools.pairwise(marked):
        if not 0 <= node < n or family[node] != before:
            raise ValueError(f"path goes from node {before} to {node}, which is not its child.")

    x, y = _places(family)
    ax = axes_of(ax, float(max(4.0, 0.62 * (x.max() + 1.5))), float(0.62 * (1.5 - y.min())), picture=True)
    low, high = (0.0, 1.0) if shown is None else (float(shown.min()), float(shown.max()))
    for node, parent in enumerate(family):
        on = node in marked
        colour, width = ("black", 2.6) if on else (GREY, 0.9)
        if parent >= 0:
            ends = [x[parent], x[node]], [y[parent] - 0.45, y[node] + 0.45]
            ax.plot(*ends, zorder=1, color=colour, linewidth=width)
        if shown is None:
            ax.text(x[node], y[node], str(node), ha="center", va="center", fontsize=9)
        else:
            extent = (x[node] - 0.45, x[node] + 0.45, y[node] - 0.45, y[node] + 0.45)
            ax.imshow(shown[node], cmap="gray_r", vmin=low, vmax=high, extent=extent, interpolation="nearest", zorder=2)
        corner = (x[node] - 0.45, y[node] - 0.45)
        ax.add_patch(Rectangle(corner, 0.9, 0.9, facecolor="none", edgecolor=colour, linewidth=width, zorder=3))
        if texts is not None:
            text = ax.text(x[node], y[node] - 0.5, texts[node], ha="center", va="top", fontsize=9, zorder=4)
            text.set_fontweight("bold" if on else "normal")
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    ax.set(xlim=(-0.7, x.max() + 0.7), ylim=(y.min() - 0.95, 0.6), aspect="equal")
    ax.set_axis_off()
    return ax


def walk_over_examples(
    sample: ArrayLike,
    pictures: ArrayLike,
    *,
    titles: Sequence[str] | None = None,
    question: str = "sample",
    ax: Axes | None = None,
) -> Axes:
    """A sample and, after a gap, the examples that its walk passes by, in order, with arrows between them.

    Args:
        sample: (height, width).
        pictures: (steps, height, width), on the same grey scale as the sample, small is white.
        titles: what is written above each picture, such as its class and the probability of the step to it.
        question: what is written above the sample.
        ax: where to draw; a figure of its own where not given.

    Returns:
        The axes.

    Raises:
        TypeError: `ax` is no Axes.
        ValueError: arrays of other dimensions or shapes, empty or not finite, or another number of titles.

    Example:
        >>> ax = walk_over_examples(np.random.rand(8, 8), np.random.rand(3, 8, 8), titles=["7", "9", "4"])
    """
    asked, steps = array("sample", sample, 2), array("pictures", pictures, 3)
    if steps.shape[1:] != asked.shape:
        raise ValueError(f"pictures must be of shape {asked.shape} as the sample, got {steps.shape[1:]}.")
    names = [""] * len(steps) if titles is None else _all_of("titles", list(titles), len(steps))
    low, high = min(asked.min(), steps.min()), max(asked.max(), steps.max())
    places = [0.0, *(1.8 + 1.35 * np.arange(len(steps)))]
    ax = axes_of(ax, 1.1 * (places[-1] + 1), 1.9, picture=True)
    half = 0.5 * asked.shape[0] / asked.shape[1]
    for place, picture, name in zip(places, [asked, *steps], [question, *names], strict=True):
        extent = (place - 0.5, place + 0.5, -half, half)
        ax.imshow(picture, cmap="gray_r", vmin=low, vmax=high, extent=extent, interpolation="nearest")
        ax.add_patch(Rectangle((place - 0.5, -half), 1, 2 * half, facecolor="none", edgecolor=GREY, linewidth=0.9))
        ax.text(place, half + 0.08, name, ha="center", va="bottom", fontsize=9)
    for before, after in itertools.pairwise(places[1:]):
        arrow = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.4}
        ax.annotate("", xy=(after - 0.52, 0.0), xytext=(before + 0.52, 0.0), arrowprops=arrow)
    ax.set(xlim=(-0.7, places[-1] + 0.7), ylim=(-half - 0.1, half + 0.6), aspect="equal")
    ax.set_axis_off()
    return ax


def decision_boundary(
    predict: Callable[[np.ndarray], ArrayLike],
    points: ArrayLike,
    labels: ArrayLike,
    *,
    nodes: ArrayLike | None = None,
    parents: Sequence[int] | ArrayLike | None = None,
    resolution: int = 200,
    ax: Axes | None = None,
) -> Axes:
    """The class of every place of a plane as a shade of grey, with samples on it and the tree that decides.

    Args:
        predict: gives the classes, integers from 0, of points (n, 2).
        points: (n, 2), samples to show.
        labels: (n,), their classes, integers from 0.
        nodes: (N, 2), the examples in the tree, shown larger.
        parents: (N,), of each node; -1 for the root. They are joined by lines.
        resolution: how many places along each side are asked for.
        ax: where to draw; a figure of its own where not given.

    Returns:
        The axes.

    Raises:
        TypeError: `ax` is no Axes.
        ValueError: points that are not in a plane, labels or parents of another number, empty or not finite arrays.

    Example:
        >>> points = np.random.randn(50, 2)
        >>> ax = decision_boundary(lambda x: (x[:, 0] > 0).astype(int), points, points[:, 0] > 0, resolution=20)
    """
    samples = array("points", points, 2)
    classes = _all_of("labels", array("labels", labels, 1), len(samples)).astype(int)
    tree = None if nodes is None else array("nodes", nodes, 2)
    if samples.shape[1] != 2 or (tree is not None and tree.shape[1] != 2):
        raise ValueError(f"points and nodes must be in a plane, (n, 2), points have shape {samples.shape}.")
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2, got {resolution}.")
    everything = samples if tree is None else np.concatenate([samples, tree])
    margin = 0.08 * (everything.max(0) - everything.min(0) + 1e-9)
    (left, bottom), (right, top) = everything.min(0) - margin, everything.max(0) + margin
    across, up = np.meshgrid(np.linspace(left, right, resolution), np.linspace(bottom, top, resolution))
    found = array("predict(points)", predict(np.stack([across.ravel(), up.ravel()], 1)), 1)
    found = found.reshape(resolution, resolution)
    count = int(max(found.max(), classes.max())) + 1
    shades = ListedColormap([SHADES[c % len(SHADES)] for c in range(count)])

    ax = axes_of(ax, 5.2, 4.4, picture=True)
    extent = (left, right, bottom, top)
    ax.imshow(found, origin="lower", extent=extent, cmap=shades, vmin=0, vmax=max(1, count - 1), aspect="auto")
    for c in range(count - 1):
        if (found <= c).any() and (found > c).any():
            ax.contour(across, up, found > c, levels=[0.5], colors="black", linewidths=1.0)
    for c in range(count):
        x, y = samples[classes == c].T
        colour, marker = COLOURS[c % len(COLOURS)], MARKERS[c % len(MARKERS)]
        ax.scatter(x, y, s=9, linewidths=0, alpha=0.8, color=colour, marker=marker, label=f"class {c}", zorder=2)
    if tree is not None:
        family = [] if parents is None else _all_of("parents", array("parents", parents, 1), len(tree))
        for node, parent in enumerate(map(int, family)):
            if parent >= 0:
                ax.plot(*tree[[parent, node]].T, color="black", linewidth=1.1, zorder=3)
        x, y = tree.T
        ax.scatter(x, y, s=46, facecolors="white", edgecolors="black", linewidths=1.4, zorder=4, label="in the tree")
    ax.set(xlim=(left, right), ylim=(bottom, top))
    ax.legend(loc="best", fontsize=8, framealpha=0.9)
    return ax


def _places(parents: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Leaves side by side, every other node above the middle of its children; levels from 0 downwards."""
    n = len(parents)
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], 1):
        children[parent].append(node)
    x, y = np.zeros(n), np.zeros(n)
    for node, parent in enumerate(parents[1:], 1):
        y[node] = y[parent] - LEVEL
    waiting, order = [0], []
    while waiting:
        node = waiting.pop()
        order.append(node)
        waiting += children[node][::-1]
    leaves = [node for node in order if not children[node]]
    x[leaves] = np.arange(len(leaves))
    for node in reversed(order):
        if children[node]:
            x[node] = (x[children[node][0]] + x[children[node][-1]]) / 2
    return x, y


def _all_of(name: str, values: Any, count: int) -> Any:
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count}.")
    return values


def _plain(label: Any) -> Any:
    return label.item() if hasattr(label, "item") else label
