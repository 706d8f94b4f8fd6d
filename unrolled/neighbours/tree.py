"""`BoundaryTree`: the examples that a greedy walk needs to label all others, grown one example at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unrolled import _check

Array = np.ndarray[Any, Any]
# Squares may overflow: then distances are equal, by any formula.
HUGE_POINTS: dict[str, Any] = {"over": "ignore", "invalid": "ignore"}
FEW = 4  # queries that walk one by one: a batch of so few costs more to set up


class BoundaryTree:
    r"""$v \leftarrow \arg\min_{w \in C(v)} \|x_w - y\|$ from the root on until $w = v$: a walk over examples.

    $C(v)$ are the children of node $v$, and $v$ itself while it has fewer than k. Training is online: an example walks
    the tree; where the node at which it ends has another label, the example becomes a child of that node,
    otherwise it is dropped. So the tree keeps examples near the borders between classes. It depends on the order of the
    examples.

    Distances are Euclidean and computed in float64, whatever the dtype of the points. Of several nearest candidates the
    node itself wins, then its oldest child. Many queries at a time give exactly what one at a time gives: all that
    reach a node are compared with its candidates by one matrix product, and where rounding might decide, once more by
    the formula of a single walk.

    Args:
        k: how many children a node may have, at least 2. A node that has k passes every query on to a child.
        threshold: `None` for classes, which differ where they are not equal. A number of at least 0 for labels that are
            real numbers, which differ where they are further apart than that.

    Attributes:
        points: (N, d), the examples kept, in the order in which they came; the first one is the root.
        labels: (N,), their labels.
        parents: (N,), the parent of each node; -1 for the root.
        indices: (N,), which of the examples seen each one was, counted from 0.
        depths: (N,), how many steps each node is from the root.
        num_seen: how many examples the tree was trained on.

    Raises:
        TypeError, ValueError: k < 2, a negative threshold, points that are no finite (n, d), labels that do not fit
            them, a query of an empty tree.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> tree = BoundaryTree().train(points, torch.tensor([0, 0, 1, 1]))
        >>> len(tree), tree.predict(torch.tensor([[-1.0], [0.9], [1.1], [9.0]]))
        (2, tensor([0, 0, 1, 1]))
        >>> tree.path(torch.tensor([9.0]))
        [0, 1]

    Reference:
        C. Mathy, N. Derbinsky, J. Bento, J. Rosenthal and J. Yedidia, "The Boundary Forest Algorithm for Online
        Supervised and Unsupervised Learning", AAAI 2015.
    """

    def __init__(self, k: int = 50, *, threshold: float | None = None) -> None:
        self.k = _check.integer("k", k)
        if self.k < 2:
            raise ValueError(
                f"k must be at least 2, got {k}: with one child a node the tree is a chain. The default is 50."
            )
        self.threshold = None if threshold is None else _check.real("threshold", threshold, minimum=0.0)
        self._points: Array = np.empty((0, 0))  # with room to grow
        self._labels: Array = np.empty(0, dtype=np.int64 if threshold is None else np.float64)
        self._candidates: list[Array] = []  # of each node: itself while it is open, then its children
        self._parents: list[int] = []
        self._indices: list[int] = []
        self.num_seen = 0

    # ---- What it holds -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many examples it keeps."""
        return len(self._parents)

    @property
    def points(self) -> Tensor:
        return torch.from_numpy(self._points[: len(self)].copy())

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(self._labels[: len(self)].copy())

    @property
    def parents(self) -> Tensor:
        return torch.tensor(self._parents, dtype=torch.long)

    @property
    def indices(self) -> Tensor:
        return torch.tensor(self._indices, dtype=torch.long)

    @property
    def depths(self) -> Tensor:
        depths: list[int] = []
        for parent in self._parents:  # older than its children
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return torch.tensor(depths, dtype=torch.long)

    def candidates(self) -> Tensor:
        """What a query at each node chooses from, (N, m), padded with -1: the node while it is open, its children."""
        width = max(map(len, self._candidates), default=0)
        table = np.full((len(self), width), -1, dtype=np.int64)
        for row, nodes in zip(table, self._candidates, strict=True):
            row[: len(nodes)] = nodes
        return torch.from_numpy(table)

    # ---- What it does ------------------------------------------------------------------------------------------------

    def train(self, points: Tensor, labels: Tensor) -> BoundaryTree:
        """Show examples to the tree, one after the other; it keeps those that it labels wrongly.

        Args:
            points: (n, d), of any floating point dtype.
            labels: (n,), integers of at least 0; real numbers where there is a `threshold`.

        Returns:
            The tree itself.
        """
        x = self._checked("points", points)
        y = self._checked_labels(labels, len(x))
        if not len(self):
            self._points = np.empty((0, x.shape[1]))
        with np.errstate(**HUGE_POINTS):
            for point, label in zip(x, y, strict=True):
                node = self._walk(point)[-1] if len(self) else -1
                if node < 0 or self._differ(self._labels[node], label):
                    self._add(point, label, node)
                self.num_seen += 1
        return self

    def query(self, points: Tensor) -> Tensor:
        """The node at which the walk of each point ends, (n,).

        Args:
            points: (n, d), of any floating point dtype.
        """
        self._not_empty()
        x = self._checked("points", points)
        with np.errstate(**HUGE_POINTS):
            nodes = np.array([self._walk(point)[-1] for point in x]) if len(x) <= FEW else self._walk_together(x)
        return torch.from_numpy(nodes).to(points.device)

    def predict(self, points: Tensor) -> Tensor:
        """The label of the node at which the walk of each point ends, (n,).

        Args:
            points: (n, d), of any floating point dtype.
        """
        return torch.from_numpy(self._labels[self.query(points).cpu().numpy()]).to(points.device)

    def path(self, point: Tensor) -> list[int]:
        """The nodes that one point walks over, from the root to where it ends: what explains its label.

        Args:
            point: (d,).
        """
        self._not_empty()
        if isinstance(point, Tensor) and point.dim() != 1:
            raise ValueError(f"point must be one point, (d,), got shape {tuple(point.shape)}.")
        x = self._checked("point", point.unsqueeze(0) if isinstance(point, Tensor) else point)
        with np.errstate(**HUGE_POINTS):
            return self._walk(x[0])

    def __repr__(self) -> str:
        threshold = "" if self.threshold is None else f", threshold={self.threshold:g}"
        return f"BoundaryTree(k={self.k}{threshold}, nodes={len(self)})"

    # ---- Walks -------------------------------------------------------------------------------------------------------

    def _walk(self, point: Array) -> list[int]:
        """The definition: one point, one step after the other."""
        path = [0]
        while True:
            nodes = self._candidates[path[-1]]
            nearest = int(nodes[_squares(self._points[nodes], point).argmin()])
            if nearest == path[-1]:
                return path
            path.append(nearest)

    def _walk_together(self, x: Array) -> Array:
        """Where every point ends. Down the tree with all that come by a node, which is visited once."""
        ends = np.zeros(len(x), dtype=np.int64)
        squares = _squares(self._points[: len(self)], 0.0)
        # Twice what rounding can change in a distance by either formula: only a larger lead is certain.
        size = np.sqrt(np.einsum("ij,ij->i", x, x)) + math.sqrt(squares.max())
        lead = 4 * (x.shape[1] + 4) * np.finfo(float).eps * size**2
        waiting = [(0, np.arange(len(x)))] if len(self) > 1 else []
        while waiting:
            node, rows = waiting.pop()
            nodes = self._candidates[node]
            there = x if len(rows) == len(x) else x[rows]
            # |x|^2 is the same for all candidates.
            distances = there @ (-2 * self._points[nodes]).T
            distances += squares[nodes]
            best = distances.argmin(1)
            each = np.arange(len(rows))
            first = distances[each, best]
            distances[each, best] = math.inf
            unsure = ~(distances.min(1) - first > lead[rows])
            if unsure.any():
                best[unsure] = self._nearest(nodes, there[unsure])
            ends[rows] = nodes[best]
            for place, child in enumerate(nodes.tolist()):
                if child != node and len(self._candidates[child]) > 1:
                    followers = rows[best == place]
                    if len(followers):
                        waiting.append((child, followers))
        return ends

    def _nearest(self, nodes: Array, x: Array) -> Array:
        """The place of the nearest of these nodes to each point, by the formula of a single walk."""
        places = np.empty(len(x), dtype=np.int64)
        size = max(1, 2**20 // (x.shape[1] * len(nodes)))  # points at a time, of bounded memory
        for begin in range(0, len(x), size):
            part = slice(begin, begin + size)
            places[part] = _squares(self._points[nodes], x[part, None]).argmin(1)
        return places

    def _add(self, point: Array, label: Any, parent: int) -> None:
        new = len(self)
        if new == len(self._points):
            room = max(16, 2 * new)
            self._points = np.concatenate([self._points, np.empty((room - new, self._points.shape[1]))])
            self._labels = np.concatenate([self._labels, np.empty(room - new, dtype=self._labels.dtype)])
        self._points[new] = point
        self._labels[new] = label
        self._parents.append(parent)
        self._indices.append(self.num_seen)
        self._candidates.append(np.array([new]))
        if parent >= 0:
            nodes = np.append(self._candidates[parent], new)
            self._candidates[parent] = nodes[1:] if len(nodes) == self.k + 1 else nodes  # full: no way to stay

    def _differ(self, label: Any, other: Any) -> bool:
        return bool(label != other if self.threshold is None else abs(label - other) > self.threshold)

    # ---- Checks ------------------------------------------------------------------------------------------------------

    def _not_empty(self) -> None:
        if not len(self):
            raise ValueError("the tree is empty: no example was shown to it. Call train(points, labels) first.")

    def _checked(self, name: str, points: Any) -> Array:
        _check.finite(name, _check.tensor(name, points).detach().cpu())
        if points.dim() != 2:
            raise ValueError(
                f"{name} must have shape (n, d), got {tuple(points.shape)}. Flatten images: {name}.flatten(1)."
            )
        if len(self) and points.shape[1] != self._points.shape[1]:
            raise ValueError(
                f"{name} must have {self._points.shape[1]} columns as those in the tree, got {points.shape[1]}."
            )
        return points.detach().cpu().double().contiguous().numpy()

    def _checked_labels(self, labels: Any, count: int) -> Array:
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}: torch.as_tensor(labels).")
        if labels.shape != (count,):
            raise ValueError(f"labels must have shape ({count},), one for each point, got {tuple(labels.shape)}.")
        labels = labels.detach().cpu()
        if self.threshold is not None:
            if labels.is_complex() or labels.dtype == torch.bool:
                raise TypeError(f"labels must be real numbers for a tree with a threshold, got {labels.dtype}.")
            return _check.finite("labels", labels.double()).numpy()
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(
                f"labels must be integers, got {labels.dtype}. Convert classes with labels.long(); for real numbers "
                "build the tree with a threshold, from which on two of them differ."
            )
        if int(labels.min()) < 0:
            raise ValueError(f"labels must be at least 0, the least is {int(labels.min())}.")
        return labels.long().numpy()


def _squares(nodes: Array, points: Array | float) -> Array:
    """Squared distances over the last dimension. Each is summed by itself, so the same for one point and for many."""
    difference = nodes - points
    difference *= difference
    total: Array = difference.sum(-1)
    return total
