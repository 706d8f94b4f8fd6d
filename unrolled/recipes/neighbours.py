"""`train_boundary_tree`: a recipe for an encoder to learn features in which a boundary tree is small and right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._modes import modes_kept
from unrolled.neighbours import DifferentiableBoundaryTree
from unrolled.training import History, fit

Callback = Callable[[int, float, nn.Module], Any]
DRAWS = 20  # of examples for a tree that all turned out to be of one class


def train_boundary_tree(
    net: DifferentiableBoundaryTree,
    points: Tensor,  # (n, *shape of a sample)
    labels: Tensor,  # (n,)
    *,
    num_rebuilds: int = 300,
    tree_samples: int = 500,
    steps_per_tree: int = 10,
    batch_size: int = 64,
    lr: float = 1e-3,
    final_trees: int = 20,
    held_out: tuple[Tensor, Tensor] | None = None,
    greedy: bool = False,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
    seed: int = 0,
) -> History:
    r"""$\min_f -\log p(c\,|\,y)$: grow a tree from some examples, take steps on the others, and again.

    For each tree `tree_samples` examples are drawn, those that it keeps are its nodes, and the batches come from the
    rest. So what is learned holds for any tree that may be grown, not for one. Adam, whose rate falls to zero along a
    cosine. The first trees are large and bad, as the features are still random.

    In the end `final_trees` are grown from draws of their own, and the one with the fewest errors on examples that are
    held out stays in the network. Trees differ: where there are enough examples, hold some out. Without, the examples
    judge that the tree was not grown from, which the encoder has learned.

    Args:
        net: the network; trained in place, and left with the last tree.
        points: (n, *shape of a sample), all training examples.
        labels: (n,), integers from 0 to num_classes - 1, of at least two classes.
        num_rebuilds: how many trees to train with.
        tree_samples: examples that each tree is grown from, fewer than n.
        steps_per_tree: updates between two trees.
        batch_size: samples in a batch.
        lr: the rate in the beginning.
        final_trees: how many trees to choose the last one from.
        held_out: points and labels that judge these trees, and that nothing is learned from; not the test set.
        greedy: whether the loss is that of the greedy walk, as published, or that of all walks, which gave better trees
            in our experiments; see `DifferentiableBoundaryTree.loss`.
        augment: changes the samples of a batch, called with them and a `torch.Generator`; the examples that trees are
            grown from stay as they are.
        callbacks: as in `fit`.
        progress: whether to show a progress bar.
        seed: of all that is drawn.

    Returns:
        The `History`; its steps are `num_rebuilds * steps_per_tree`.

    Raises:
        TypeError, ValueError: points and labels that do not fit, a single class, `tree_samples` that leave nothing to
            train on.

    Example:
        >>> points = torch.randn(200, 2)
        >>> labels = (points[:, 0] > 0).long()
        >>> net = DifferentiableBoundaryTree(torch.nn.Linear(2, 2), 2)
        >>> history = train_boundary_tree(net, points, labels, num_rebuilds=3, tree_samples=50)
        >>> len(history), net.num_nodes < 50
        (30, True)

    Reference:
        D. Zoran, B. Lakshminarayanan and C. Blundell, "Learning Deep Nearest Neighbor Representations Using
        Differentiable Boundary Trees", 2017, arXiv:1702.08833. Which examples, how many steps and the choice of the
        last tree are ours.
    """
    if not isinstance(net, DifferentiableBoundaryTree):
        raise TypeError(f"net must be a DifferentiableBoundaryTree, got {type(net).__name__}.")
    sizes = {"num_rebuilds": num_rebuilds, "steps_per_tree": steps_per_tree, "batch_size": batch_size}
    for name, value in (sizes | {"final_trees": final_trees}).items():
        _check.integer(name, value)
    _check.real("lr", lr, above=0.0)
    n = len(_check.tensor("points", points))
    if not isinstance(labels, Tensor) or labels.shape != (n,):
        raise ValueError(
            f"labels must be a Tensor of shape ({n},), one label for each point, got {_check.shape_of(labels)}."
        )
    if _check.integer("tree_samples", tree_samples, minimum=2) >= n:
        raise ValueError(
            f"tree_samples must be less than the {n} examples, as training goes on with the rest, got {tree_samples}."
        )
    if int(labels.min()) == int(labels.max()):
        raise ValueError(f"labels are all {int(labels[0])}: a tree needs examples of at least two classes.")

    if held_out is not None and len(held_out[0]) != len(held_out[1]):
        raise ValueError(f"held_out has {len(held_out[0])} points and {len(held_out[1])} labels. Pass as many of both.")
    generator = torch.Generator().manual_seed(_check.integer("seed", seed, minimum=0))
    num_steps = num_rebuilds * steps_per_tree

    def draw() -> Tensor:
        """Grow a tree; the examples that it was not grown from, in any order."""
        for _ in range(DRAWS):
            order = torch.randperm(n, generator=generator).to(points.device)
            chosen = order[:tree_samples]
            if net.rebuild(points[chosen], labels[chosen]) > 1:
                return order[tree_samples:]
        raise ValueError(
            f"{DRAWS} draws of tree_samples={tree_samples} examples were of one class each. Draw more at a time."
        )

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(num_rebuilds):
            rest = draw()
            for step in range(steps_per_tree):
                begin = step * batch_size % max(1, len(rest) - batch_size + 1)
                rows = rest[begin : begin + batch_size]
                x = points[rows] if augment is None else augment(points[rows], generator)
                yield x, labels[rows]

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cast(DifferentiableBoundaryTree, net).loss(*batch, greedy=greedy)

    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    history = fit(
        net,
        batches(),
        loss,
        num_steps=num_steps,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps),
        callbacks=callbacks,
        progress=progress,
        seed=seed,
    )
    with modes_kept(net):
        net.eval()
        _choose(net, points, labels, draw, final_trees, held_out)
    return history


@torch.no_grad()
def _choose(
    net: DifferentiableBoundaryTree,
    points: Tensor,
    labels: Tensor,
    draw: Callable[[], Tensor],
    count: int,
    held_out: tuple[Tensor, Tensor] | None,
) -> None:
    """Leave the best of `count` trees in the network."""
    best = None
    for _ in range(count):
        rest = draw()
        x, y = (points[rest], labels[rest]) if held_out is None else held_out
        # By errors first: a shallow tree that leaves all to one large group has a small loss and many errors.
        wrong, loss = 0, 0.0
        for some, classes in zip(x.split(4096), y.split(4096), strict=True):
            log_probs = net(some)
            wrong += int((log_probs.argmax(1) != classes).sum())
            loss += float(nn.functional.nll_loss(log_probs, classes, reduction="sum"))
        if best is None or (wrong, loss) < best[0]:
            best = (wrong, loss), net.points, net.labels, net.parents
    assert best is not None
    net.set_tree(*best[1:])
