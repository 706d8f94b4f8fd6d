"""`BoundaryTreeStep`: one step down a boundary tree, for samples that may stand at different nodes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._modes import modes_kept
from unrolled.neighbours.tree import BoundaryTree
from unrolled.step import Step

FLOOR = 1e-12  # of a class that no candidate of the last group has
TOO_NEAR = 1e-8  # added to squared distances: the derivative of a root at 0 is infinite
BUFFERS = ("points", "labels", "parents", "table", "above")  # the tree
PART = 4096  # examples at a time through the encoder, where no gradient is needed
NO_TREE = "there is no tree yet: call rebuild(points, labels) with examples of at least two classes first."


class Walk(NamedTuple):
    """The state: where each sample stands in the tree."""

    node: Tensor  # (batch,) int64
    log_path: Tensor  # (batch,) log-probability of the transitions that led there
    log_probs: Tensor  # (batch, classes) log p(c|y), with the group of the last transition as the last group
    active: Tensor  # (batch,) bool: False once the walk has ended


class BoundaryTreeStep(Step):
    r"""$v \leftarrow \arg\max_{j \in C(v)} p(v \to j|y)$ with $p(v \to j|y) \propto e^{-d(f(x_j), f(y))/\sigma}$.

    One step down a boundary tree in the features $f$ of an encoder, for a batch of samples that may stand at different
    nodes. A sample's walk ends where it stays, or at a node without children; from then on its state is kept. The
    readout is $\log p(c\,|\,y)$, see `DifferentiableBoundaryTree`, as it is when the walk ends with this step.

    The tree is data, no parameter: buffers that `set_tree` replaces.

    Args:
        encoder: $f$, which maps (n, *shape of a sample) to (n, q).
        num_classes: labels are 0, ..., num_classes - 1; at least 2.
        k: how many children a node may have, at least 2.
        sigma: $\sigma$, positive, in the units of d.
        squared: whether $d$ is the squared Euclidean distance, or the distance itself.
    """

    points: Tensor
    labels: Tensor
    parents: Tensor
    table: Tensor
    above: Tensor

    def __init__(
        self, encoder: nn.Module, num_classes: int, *, k: int = 50, sigma: float = 1.0, squared: bool = True
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder must be a torch.nn.Module, got {encoder!r}. nn.Identity() keeps what comes.")
        self.encoder = encoder
        self.num_classes = _check.integer("num_classes", num_classes, minimum=2)
        self.k = BoundaryTree(k).k
        self.sigma = _check.real("sigma", sigma, above=0.0, hint="It divides the distances.")
        self.squared = bool(squared)
        like = next(encoder.parameters(), torch.empty(0))
        self.register_buffer("points", like.detach().new_empty(0))  # (N, *shape)
        for name in BUFFERS[1:]:
            dtype = torch.bool if name == "above" else torch.long
            self.register_buffer(name, torch.empty(0, dtype=dtype, device=like.device))

    @property
    def num_nodes(self) -> int:
        """N, the examples that the tree keeps; 0 before there is one."""
        return len(self.labels)

    @property
    def leaves(self) -> Tensor:
        """Which nodes have no children, (N,)."""
        return torch.ones_like(self.parents, dtype=torch.bool).index_fill(0, self.parents[1:], False)

    @property
    def depth(self) -> int:
        """The longest walk, in steps."""
        depths: list[int] = []
        for parent in self.parents.tolist():
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return max(depths, default=0)

    @torch.no_grad()
    def build(self, points: Tensor, labels: Tensor) -> int:
        """Grow a tree in the present features and take it; the number of its nodes.

        The encoder is in eval mode meanwhile. Where the tree would have a single node, as all examples are of one
        class, the tree that there was stays.

        Args:
            points: (n, *shape).
            labels: (n,), from 0 to num_classes - 1.
        """
        _check.finite("points", _check.tensor("points", points))
        if points.dim() < 2:
            raise ValueError(f"points must have shape (n, ...), got {tuple(points.shape)}: a row for each example.")
        for parameter in list(self.encoder.parameters())[:1]:
            _check.of_the_network("points", points, parameter)
        with modes_kept(self.encoder):
            self.encoder.eval()
            features = torch.cat([self._encoded(part) for part in points.split(PART)])
        if not bool(features.isfinite().all()):
            raise ValueError("encoder gave features that are NaN or infinite. Lower the learning rate.")
        tree = BoundaryTree(self.k)
        checked = torch.from_numpy(tree._checked_labels(labels, len(points)))
        if int(checked.max()) >= self.num_classes:
            raise ValueError(f"labels must be below num_classes={self.num_classes}, the largest is {checked.max()}.")
        tree.train(features, checked)
        if len(tree) > 1:
            self.set_tree(points[tree.indices.to(points.device)], tree.labels, tree.parents)
        return len(tree)

    def set_tree(self, points: Tensor, labels: Tensor, parents: Tensor) -> None:
        """Take this tree.

        Args:
            points: (N, *shape), its examples, the root first and every node after its parent.
            labels: (N,), their labels.
            parents: (N,), the parent of each node; -1 for the root.
        """
        n = len(points)
        family = parents.tolist()
        if not (n >= 2 and labels.shape == parents.shape == (n,)):
            raise ValueError(
                f"points, labels and parents must be of the same N >= 2 nodes, got {n}, {tuple(labels.shape)} and "
                f"{tuple(parents.shape)}."
            )
        if family[0] != -1 or any(not 0 <= parent < node for node, parent in enumerate(family) if node):
            raise ValueError("parents must be -1 for the first node, and of the others a node before them.")
        children: list[list[int]] = [[] for _ in family]
        for node, parent in enumerate(family[1:], 1):
            children[parent].append(node)
        if max(map(len, children)) > self.k:
            raise ValueError(f"parents has a node with {max(map(len, children))} children, k={self.k} are allowed.")
        groups = [[node, *own] if len(own) < self.k else own for node, own in enumerate(children)]
        table = torch.full((n, max(map(len, groups))), -1)
        above = torch.eye(n, dtype=torch.bool)  # whether the second node is on the path from the root to the first
        for node, (parent, group) in enumerate(zip(family, groups, strict=True)):
            table[node, : len(group)] = torch.tensor(group)
            if node:
                above[node] |= above[parent]
        device = self.points.device
        self.points = points.detach().clone()
        self.labels = labels.detach().to(device, torch.long, copy=True)
        self.parents = parents.detach().to(device, torch.long, copy=True)
        self.table = table.to(device)
        self.above = above.to(device)

    # ---- The walk ----------------------------------------------------------------------------------------------------

    def check(self, x: Tensor) -> None:
        if not self.num_nodes:
            raise ValueError(NO_TREE)
        _check.tensor("x", x)
        shape = self.points.shape[1:]
        if x.dim() < len(shape) or x.shape[x.dim() - len(shape) :] != shape:
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"x must have shape (..., {wanted}) as the examples in the tree, got {tuple(x.shape)}.")
        _check.of_the_network("x", x, self.points)
        _check.finite("x", x)

    def prepare(self, x: Tensor) -> Tensor:  # (..., N)
        """The distances of the features to those of all nodes; one pass of the encoder, so that dropout agrees."""
        shape = self.points.shape[1:]
        batch = x.shape[: x.dim() - len(shape)]
        features = self._encoded(torch.cat([self.points, x.reshape(-1, *shape)]))
        nodes, own = features[: self.num_nodes], features[self.num_nodes :]
        with _check.full_precision(x.device):
            nodes, own = nodes.to(self.points.dtype), own.to(self.points.dtype)
            # Relative to the root: no digits are lost to features that are far from 0.
            nodes, own = nodes - nodes[:1], own - nodes[:1]
            squares = own.square().sum(-1, keepdim=True) + nodes.square().sum(-1) - 2 * own @ nodes.mT
            squares = squares.clamp_min(0)
            distances = squares if self.squared else (squares + TOO_NEAR).sqrt()
        return distances.reshape(*batch, self.num_nodes)

    def init(self, distances: Tensor) -> Walk:
        batch = distances.shape[:-1]
        uniform = -torch.tensor(float(self.num_classes)).log().item()
        return Walk(
            distances.new_zeros(batch, dtype=torch.long),
            distances.new_zeros(batch),
            distances.new_full((*batch, self.num_classes), uniform),
            distances.new_ones(batch, dtype=torch.bool),
        )

    def forward(self, state: Walk, distances: Tensor) -> Walk:
        nodes, log_p = self.transition(state.node, distances)
        best, place = log_p.max(-1)
        chosen = nodes.gather(-1, place.unsqueeze(-1)).squeeze(-1)
        # A leaf has no candidate but itself, so the transition to it is the last one.
        ends = (chosen == state.node) | _rows(self.leaves, chosen)
        p = (state.log_path.unsqueeze(-1) + log_p).exp()
        shares = p.new_zeros(*p.shape[:-1], self.num_classes).scatter_add(-1, self.labels[nodes], p)
        log_probs = (shares + FLOOR).log()
        goes_on = state.active & ~ends
        return Walk(
            torch.where(state.active, chosen, state.node),
            torch.where(goes_on, state.log_path + best, state.log_path),
            torch.where(state.active.unsqueeze(-1), log_probs, state.log_probs),
            goes_on,
        )

    def readout(self, state: Walk) -> Tensor:
        return state.log_probs

    def transition(self, node: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates at these nodes, (..., m), and the logarithms of their probabilities; -inf for padding.

        Args:
            node: (...,), where the samples stand.
            distances: (..., N), what `prepare` gives.
        """
        padded = _rows(self.table, node)
        nodes = padded.clamp_min(0)
        logits = -distances.gather(-1, nodes) / self.sigma
        return nodes, logits.masked_fill(padded < 0, -torch.inf).log_softmax(-1)

    def all_walks(self, distances: Tensor) -> Tensor:  # (..., classes)
        r"""$\log \sum_{v:\, c_v = c} r_v\, p(v \to v)$ with $r_v$ the product of p along the path to v: over all walks.

        Where the walk is not greedy but draws every transition, this is how likely it ends at a node of class c. Over
        the classes it sums to 1, and every node takes part in it, near to the greedy walk or not.

        Args:
            distances: (..., N), what `prepare` gives.
        """
        n = self.num_nodes
        everywhere = torch.arange(n, device=distances.device).expand(*distances.shape[:-1], n)
        padded = self.table.expand(*distances.shape[:-1], *self.table.shape)
        nodes = padded.clamp_min(0)
        logits = -distances.unsqueeze(-2).expand(*nodes.shape[:-1], n).gather(-1, nodes) / self.sigma
        total = logits.masked_fill(padded < 0, -torch.inf).logsumexp(-1)  # of the group at each node, (..., N)
        own = -distances / self.sigma
        into = (own - total.gather(-1, self.parents.clamp_min(0).expand_as(everywhere))) * (self.parents >= 0)
        reach = into @ self.above.mT.to(into.dtype)
        ends = torch.where(self.table[:, 0] == everywhere, reach + own - total, -torch.inf).exp()
        shares = ends.new_zeros(*ends.shape[:-1], self.num_classes)
        return (shares.scatter_add(-1, self.labels.expand_as(everywhere), ends) + FLOOR).log()

    def extra_repr(self) -> str:
        squared = "" if self.squared else ", squared=False"
        return f"classes={self.num_classes}, nodes={self.num_nodes}, k={self.k}, sigma={self.sigma:g}{squared}"

    # ---- Parts -------------------------------------------------------------------------------------------------------

    def _encoded(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        if not isinstance(features, Tensor) or features.dim() != 2 or features.shape[0] != x.shape[0]:
            came = _check.shape_of(features)
            raise ValueError(f"encoder must map {len(x)} samples to features ({len(x)}, q), it gave {came}.")
        return features

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        # A tree has as many nodes as it has: take buffers of that size before they are filled.
        for name in BUFFERS:
            saved = state_dict.get(f"{prefix}{name}")
            if saved is not None and saved.shape != getattr(self, name).shape:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _rows(table: Tensor, node: Tensor) -> Tensor:
    """`table[node]`, which torch.func cannot do for a single node: it would have to look at its number."""
    return table.index_select(0, node.reshape(-1)).reshape((*node.shape, *table.shape[1:]))
