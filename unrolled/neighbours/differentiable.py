"""`DifferentiableBoundaryTree`: an encoder whose features make boundary trees small, trained through their walks."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from unrolled._tree import State
from unrolled.gradient import Backprop, Gradient
from unrolled.neighbours.walk import BoundaryTreeStep, Walk
from unrolled.unroll import Unroll


class Explanation(NamedTuple):
    """Why one sample is of its class: the examples that its walk passes by.

    Attributes:
        nodes: from the root to where the walk ends.
        labels: of the nodes.
        probabilities: of each node, among the candidates that it was chosen from; 1 for the root.
        stay: the probability of staying at the last node; 1 at a leaf, where there is no other choice.
        classes: p(c|y), normalised to sum to 1 over the classes.
    """

    nodes: list[int]
    labels: list[int]
    probabilities: list[float]
    stay: float
    classes: list[float]


class DifferentiableBoundaryTree(Unroll):
    r"""$\log p(c|y) = \sum_{(i,j)} \log p(i \to j|y) + \log \sum_{j:\, c_j = c} p(v \to j|y)$: a tree to learn by.

    $p(i \to j\,|\,y)$ is a softmax over the candidates at node i, its children and, while it has fewer than k of them,
    itself, with logits $-d(f(x_j), f(y)) / \sigma$. The first sum runs over the transitions of the greedy walk but the
    last one, from $v$; the second is over the candidates at $v$ whose class is c. Over the classes p sums to the
    probability of the walk up to $v$, not to 1. To all of them $10^{-12}$ is added: a class that none of the last
    candidates has gets a finite loss, and no gradient.

    The examples in the tree pass through the encoder $f$ as the sample does, so the gradient reaches $f$ through both.
    The tree itself has none: `rebuild` grows it in the present features, as `BoundaryTree`. Training alternates: grow
    a tree from some examples, take steps on others, see `unrolled.recipes.train_boundary_tree`. The features of a
    trained encoder need few examples, often two or three a class; a prediction is a walk by a handful of them, see
    `explain`.

    As many iterations are run as the tree is deep; a sample whose walk has ended keeps its state.

    Args:
        encoder: $f$, any module that maps (n, *shape of a sample) to features (n, q).
        num_classes: labels are 0, ..., num_classes - 1; at least 2.
        k: how many children a node may have, at least 2.
        sigma: $\sigma$, positive: what one more in d makes a candidate less likely by a factor of e.
        squared: whether $d$ is the squared Euclidean distance, or the distance itself. The squared one learned smaller
            and better trees in our experiments.
        gradient: how gradients flow through the walk, see `unrolled.gradient`.

    Shape:
        - x: (..., *shape of a sample), the dtype and device of the encoder
        - output: (..., num_classes), $\log p(c\,|\,y)$

    Raises:
        TypeError, ValueError: options out of their range, a call before `rebuild`, samples of another shape, dtype or
            device, NaN or infinity.

    Example:
        >>> points, labels = torch.randn(100, 2), torch.arange(100) % 2
        >>> points = points + 3 * labels[:, None]
        >>> net = DifferentiableBoundaryTree(torch.nn.Linear(2, 2), 2)
        >>> nodes = net.rebuild(points, labels)
        >>> net(points).shape, net.predict(points).shape
        (torch.Size([100, 2]), torch.Size([100]))

    Reference:
        D. Zoran, B. Lakshminarayanan and C. Blundell, "Learning Deep Nearest Neighbor Representations Using
        Differentiable Boundary Trees", 2017, arXiv:1702.08833.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int,
        *,
        k: int = 50,
        sigma: float = 1.0,
        squared: bool = True,
        gradient: Gradient = Backprop(),
    ) -> None:
        step = BoundaryTreeStep(encoder, num_classes, k=k, sigma=sigma, squared=squared)
        super().__init__(step, 1, gradient=gradient)
        self.register_load_state_dict_post_hook(_fit_depth)

    def forward(  # type: ignore[override]  # each system says what it takes
        self, x: Tensor, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        return super().forward(x, state=state, num_iters=num_iters)

    # ---- The tree ----------------------------------------------------------------------------------------------------

    @property
    def _tree(self) -> BoundaryTreeStep:
        return cast(BoundaryTreeStep, self.steps[0])

    @property
    def encoder(self) -> nn.Module:
        """f."""
        return self._tree.encoder

    @property
    def num_nodes(self) -> int:
        """How many examples the tree keeps; 0 before there is one."""
        return self._tree.num_nodes

    @property
    def points(self) -> Tensor:
        """The examples in the tree, (N, *shape of a sample), the root first."""
        return self._tree.points

    @property
    def labels(self) -> Tensor:
        """Their labels, (N,)."""
        return self._tree.labels

    @property
    def parents(self) -> Tensor:
        """The parent of each, (N,); -1 for the root."""
        return self._tree.parents

    def rebuild(self, points: Tensor, labels: Tensor) -> int:
        """Grow a new tree from these examples, in this order, in the features as they are now.

        Args:
            points: (n, *shape of a sample).
            labels: (n,), integers from 0 to num_classes - 1, of at least two classes.

        Returns:
            The number of its nodes. 1 says that all examples are of one class: the tree that there was is kept.
        """
        nodes = self._tree.build(points, labels)
        if nodes > 1:
            self.num_iters = self._tree.depth
        elif not self.num_nodes:
            raise ValueError(
                f"labels are all {int(labels[0])}: a tree of one class has a single node and nothing to learn from. "
                "Pass examples of at least two classes."
            )
        return nodes

    def set_tree(self, points: Tensor, labels: Tensor, parents: Tensor) -> None:
        """Take a tree that was grown elsewhere.

        Args:
            points: (N, *shape of a sample), its examples, the root first and every node after its parent.
            labels: (N,), their labels.
            parents: (N,), the parent of each node; -1 for the root.
        """
        self._tree.set_tree(points, labels, parents)
        self.num_iters = self._tree.depth

    # ---- What it is for ----------------------------------------------------------------------------------------------

    def loss(self, x: Tensor, labels: Tensor, *, greedy: bool = True) -> Tensor:
        r"""$-\log p(c\,|\,y)$ of the true classes, averaged.

        Args:
            x: (n, *shape of a sample).
            labels: (n,), integers from 0 to num_classes - 1.
            greedy: whether $p$ is that of the greedy walk, as published, or that of all walks, see
                `BoundaryTreeStep.all_walks`. A sample whose greedy walk ends among other classes has no gradient; among
                all walks there is one that ends well.
        """
        if greedy:
            log_probs = self(x)
        else:
            self._tree.check(x)
            log_probs = self._tree.all_walks(self._tree.prepare(x))
        if labels.shape != log_probs.shape[:-1]:
            raise ValueError(f"labels must have shape {tuple(log_probs.shape[:-1])}, got {tuple(labels.shape)}.")
        return nn.functional.nll_loss(log_probs.flatten(0, -2), labels.flatten())

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The class with the largest p(c|y), (...,).

        Args:
            x: (..., *shape of a sample).
        """
        return cast(Tensor, self(x)).argmax(-1)

    @torch.no_grad()
    def query(self, x: Tensor) -> Tensor:
        """The node at which the walk of each sample ends, (...,): `labels[query(x)]` is the tree's hard answer.

        Args:
            x: (..., *shape of a sample).
        """
        return cast(Walk, self.run(x)).node

    @torch.no_grad()
    def explain(self, x: Tensor) -> list[Explanation]:
        """The walk of each sample: the examples that it passes by, and with what probability.

        Args:
            x: (n, *shape of a sample).
        """
        advance, state, num_iters = self.start(x)
        distances = self._tree.prepare(x)
        if state.node.dim() != 1:
            raise ValueError(f"x must be a batch (n, ...) of samples, got shape {tuple(x.shape)}: x.unsqueeze(0).")
        found = [Explanation([0], [int(self.labels[0])], [1.0], 1.0, []) for _ in range(len(x))]
        for k in range(num_iters):
            nodes, log_p = self._tree.transition(state.node, distances)
            chosen = log_p.max(-1)
            active, state = state.active, advance(state, k, k + 1)
            for i in active.nonzero().flatten().tolist():
                node, p = int(nodes[i, chosen.indices[i]]), float(chosen.values[i].exp())
                if node == found[i].nodes[-1]:
                    found[i] = found[i]._replace(stay=p)
                else:
                    found[i].nodes.append(node)
                    found[i].labels.append(int(self.labels[node]))
                    found[i].probabilities.append(p)
        classes = state.log_probs.softmax(-1).tolist()
        return [one._replace(classes=shares) for one, shares in zip(found, classes, strict=True)]


def _fit_depth(module: nn.Module, incompatible_keys: Any) -> None:
    """After a state was loaded: its tree has a depth of its own."""
    assert isinstance(module, DifferentiableBoundaryTree)
    if module.num_nodes:
        module.num_iters = module._tree.depth
