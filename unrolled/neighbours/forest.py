"""`BoundaryForest`: several boundary trees with different first examples, which vote."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unrolled import _check
from unrolled.neighbours.tree import BoundaryTree


class BoundaryForest:
    r"""$\hat c(y) = \arg\max_c \sum_t [c(v_t) = c] / \|x_{v_t} - y\|$: several boundary trees.

    $v_t$ is the node at which the query $y$ ends in tree t. A tree depends on the order of its examples, its root most
    of all; several average that out. With a `threshold` labels are real numbers and the answer is their mean with these
    weights. The trees, their labels and their walks are those of `BoundaryTree`.

    The first batch that the forest is trained on reaches tree t with its example t in front, or in an order of its own
    where there is a `generator`. All later examples reach all trees as they come.

    Args:
        num_trees: how many, at least 1.
        k: how many children a node may have, at least 2.
        threshold: as in `BoundaryTree`: `None` for classes, a number for labels that are real.
        weighted: whether nearer answers count more, by one over their distance; otherwise all count alike. Where a
            distance is 0, only the answers at distance 0 count.

    Attributes:
        trees: the list of `BoundaryTree`.

    Raises:
        TypeError, ValueError: as `BoundaryTree` does.

    Example:
        >>> points, labels = torch.randn(200, 2), torch.arange(200) % 2
        >>> forest = BoundaryForest(5).train(points + 3 * labels[:, None], labels)
        >>> forest.predict(torch.tensor([[0.0, 0.0], [3.0, 3.0]]))
        tensor([0, 1])

    Reference:
        C. Mathy, N. Derbinsky, J. Bento, J. Rosenthal and J. Yedidia, "The Boundary Forest Algorithm for Online
        Supervised and Unsupervised Learning", AAAI 2015. The weights are inverse distances, as in the implementations
        that we know of.
    """

    def __init__(
        self, num_trees: int = 10, *, k: int = 50, threshold: float | None = None, weighted: bool = True
    ) -> None:
        num_trees = _check.integer("num_trees", num_trees)
        self.weighted = bool(weighted)
        self.trees = [BoundaryTree(k, threshold=threshold) for _ in range(num_trees)]

    def __len__(self) -> int:
        """How many trees."""
        return len(self.trees)

    def train(self, points: Tensor, labels: Tensor, *, generator: torch.Generator | None = None) -> BoundaryForest:
        """Show examples to all trees.

        Args:
            points: (n, d), of any floating point dtype.
            labels: (n,), integers of at least 0; real numbers where there is a `threshold`.
            generator: draws an order of the examples for every tree. Without one they keep the order in which they are,
                but for those in front of the first batch.

        Returns:
            The forest itself.
        """
        first = self.trees[0]
        n = len(first._checked("points", points))
        first._checked_labels(labels, n)
        for t, tree in enumerate(self.trees):
            order = torch.arange(n)
            if generator is not None:
                order = torch.randperm(n, generator=generator)
            elif not len(tree):
                order = torch.cat([order[t % n : t % n + 1], order[: t % n], order[t % n + 1 :]])
            seen = tree.num_seen
            nodes = len(tree)
            tree.train(points.detach().cpu()[order], labels.detach().cpu()[order])
            # The tree counts in the order that it was given; its nodes are examples of the caller.
            tree._indices[nodes:] = [seen + int(order[i - seen]) for i in tree._indices[nodes:]]
        return self

    def query(self, points: Tensor) -> Tensor:
        """The node of each tree at which the walk of each point ends, (n, trees).

        Args:
            points: (n, d), of any floating point dtype.
        """
        return torch.stack([tree.query(points) for tree in self.trees], 1)

    def weights(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The labels that the trees give, (n, trees), and how much each one counts, which sums to 1 over the trees.

        Args:
            points: (n, d), of any floating point dtype.
        """
        nodes = self.query(points).cpu().numpy()
        labels = np.stack([tree._labels[end] for tree, end in zip(self.trees, nodes.T, strict=True)], 1)
        weights = np.ones(labels.shape)
        if self.weighted:
            x = self.trees[0]._checked("points", points)
            ends = zip(self.trees, nodes.T, strict=True)
            squares = np.stack([np.square(tree._points[end] - x).sum(1) for tree, end in ends], 1)
            # Relative to the nearest, so that nothing overflows; at distance 0 the others have no weight.
            least = squares.min(1, keepdims=True)
            near = np.sqrt(least / np.where(squares > 0, squares, 1.0))
            weights = np.where(least > 0, near, squares == 0)
        weights = weights / weights.sum(1, keepdims=True)
        return torch.from_numpy(labels).to(points.device), torch.from_numpy(weights).to(points.device)

    def shares(self, points: Tensor, num_classes: int) -> Tensor:
        """The share of the votes that each class has, (n, num_classes), float64.

        Args:
            points: (n, d), of any floating point dtype.
            num_classes: at least as many as there are labels.
        """
        if self.trees[0].threshold is not None:
            raise ValueError("a forest with a threshold has real labels, which take no shares. See predict.")
        most = max(int(tree.labels.max()) + 1 for tree in self.trees) if len(self.trees[0]) else 1
        if _check.integer("num_classes", num_classes) < most:
            raise ValueError(f"num_classes must be at least {most}, as the largest label is {most - 1}.")
        labels, weights = self.weights(points)
        return weights.new_zeros(len(weights), num_classes).scatter_add(1, labels, weights)

    def predict(self, points: Tensor) -> Tensor:
        """The class with the most votes, or the weighted mean of real labels, (n,).

        Args:
            points: (n, d), of any floating point dtype.
        """
        if self.trees[0].threshold is None:
            self.trees[0]._not_empty()
            return self.shares(points, max(int(tree.labels.max()) for tree in self.trees) + 1).argmax(1)
        labels, weights = self.weights(points)
        return (labels * weights).sum(1)

    def __repr__(self) -> str:
        nodes = sum(map(len, self.trees))
        return f"BoundaryForest({len(self)}, k={self.trees[0].k}, weighted={self.weighted}, nodes={nodes})"
