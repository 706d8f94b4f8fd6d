"""Boundary trees: the definition against the batch, forests, the differentiable tree, its training, bad input."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle

import pytest
import systems_neighbours
import test_contract
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits, make_moons
from systems_neighbours import Encoder
from torch import Tensor, nn

from unrolled.neighbours import BoundaryForest, BoundaryTree, DifferentiableBoundaryTree
from unrolled.recipes.neighbours import train_boundary_tree


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- The definition --------------------------------------------------------------------------------------------------


class Plain:
    """The algorithm written down a second time: recursive, one query, exact arithmetic on integers."""

    def __init__(self, k: int) -> None:
        self.k, self.points, self.labels, self.children = k, [], [], []

    def query(self, y: list[int], v: int = 0) -> int:
        open_to = [v] if len(self.children[v]) < self.k else []
        candidates = open_to + self.children[v]
        w = min(candidates, key=lambda j: sum((a - b) ** 2 for a, b in zip(self.points[j], y)))
        return v if w == v else self.query(y, w)

    def train(self, y: list[int], c: int) -> None:
        v = self.query(y) if self.points else None
        if v is None or self.labels[v] != c:
            if v is not None:
                self.children[v].append(len(self.points))
            self.points.append(y)
            self.labels.append(c)
            self.children.append([])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), k=st.integers(2, 4), d=st.integers(1, 3), n=st.integers(1, 30), classes=st.integers(1, 3))
def test_the_definition(data, k, d, n, classes):
    """Small integers: many ties, and every distance is exact, so the nodes must be the same whatever the formula."""
    number = st.integers(-3, 3)
    rows = data.draw(st.lists(st.lists(number, min_size=d, max_size=d), min_size=n, max_size=n))
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    asked = data.draw(st.lists(st.lists(number, min_size=d, max_size=d), min_size=6, max_size=20))
    plain = Plain(k)
    for row, label in zip(rows, labels):
        plain.train(row, label)
    tree = BoundaryTree(k).train(torch.tensor(rows).double(), torch.tensor(labels))
    assert tree.points.tolist() == plain.points and tree.labels.tolist() == plain.labels
    parents = [-1] * len(plain.points)
    for parent, children in enumerate(plain.children):
        for child in children:
            parents[child] = parent
    assert tree.parents.tolist() == parents and tree.num_seen == n
    expected = [plain.query(row) for row in asked]
    assert tree.query(torch.tensor(asked).double()).tolist() == expected
    for row, end in zip(asked, expected):
        path = tree.path(torch.tensor(row).double())
        assert path[0] == 0 and path[-1] == end
        assert all(parents[child] == parent for parent, child in itertools.pairwise(path))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), k=st.integers(2, 6), d=st.integers(1, 40), offset=st.sampled_from([0.0, 1e3, 1e7]))
def test_a_batch_is_one_query_at_a_time(seed, k, d, offset):
    """Bit for bit, also far from 0, where the matrix product has no digits left and near ties are many."""
    points = randn(300, d, seed=seed) + offset
    tree = BoundaryTree(k).train(points[:150], torch.arange(150) % 3)
    asked = torch.cat([points, points[:50], (points[:50] + points[1:51]) / 2])
    assert tree.query(asked).tolist() == [tree.path(one)[-1] for one in asked]


def test_equal_points_and_huge_ones():
    tree = BoundaryTree(2).train(torch.ones(9, 2), torch.arange(9))
    same = torch.ones(20, 2)
    assert tree.query(same).tolist() == [tree.path(one)[-1] for one in same]
    huge = 1e200 * randn(40, 3)
    tree = BoundaryTree().train(huge, torch.arange(40) % 2)
    assert tree.query(huge).tolist() == [tree.path(one)[-1] for one in huge]


def test_what_it_holds():
    points, labels = randn(400, 3), torch.arange(400) % 4
    tree = BoundaryTree(3).train(points, labels)
    assert torch.equal(tree.points, points[tree.indices]) and torch.equal(tree.labels, labels[tree.indices])
    table = tree.candidates()
    assert table.shape[1] == 3
    for node, row in enumerate(table.tolist()):
        children = (tree.parents == node).nonzero().flatten().tolist()
        group = children if len(children) == 3 else [node, *children]
        assert row == group + [-1] * (table.shape[1] - len(group))
    for node in range(1, len(tree)):
        assert tree.depths[node] == tree.depths[tree.parents[node]] + 1
    in_parts = BoundaryTree(3)
    for rows in torch.arange(400).split(37):
        in_parts.train(points[rows], labels[rows])
    assert torch.equal(in_parts.indices, tree.indices)
    assert "nodes=" in repr(tree) and "k=3" in repr(tree)
    other = pickle.loads(pickle.dumps(tree))
    other.train(points + 1, labels)  # what was loaded grows by itself
    assert len(other) > len(tree) == len(in_parts)
    tree.points.zero_()  # a copy
    assert tree.points.abs().sum() > 0


def test_real_labels():
    x = torch.linspace(0, 1, 500, dtype=torch.float64)[:, None]
    tree = BoundaryTree(threshold=0.1).train(x, x[:, 0] ** 2)
    assert len(tree) < 20 and tree.labels.dtype == torch.float64
    assert (tree.predict(x) - x[:, 0] ** 2).abs().median() < 0.1
    forest = BoundaryForest(10, threshold=0.1).train(x, x[:, 0] ** 2, generator=torch.Generator().manual_seed(0))
    errors = [(one.predict(x) - x[:, 0] ** 2).square().mean() for one in (forest, *forest.trees)]
    assert errors[0] < min(errors[1:])


def test_forest():
    X, y = load_digits(return_X_y=True)
    x, labels = torch.from_numpy(X), torch.from_numpy(y)
    forest = BoundaryForest(5).train(x[:600], labels[:600])
    assert [int(tree.indices[0]) for tree in forest.trees] == [0, 1, 2, 3, 4]
    for tree in forest.trees:
        assert torch.equal(x[tree.indices], tree.points)
    forest.train(x[600:1200], labels[600:1200])
    assert all(torch.equal(x[tree.indices], tree.points) for tree in forest.trees)
    test, truth = x[1200:], labels[1200:]
    nodes = forest.query(test)
    assert nodes.shape == (len(test), 5) and torch.equal(nodes[:, 2], forest.trees[2].query(test))
    shares = forest.shares(test, 12)
    votes = torch.zeros(len(test), 12, dtype=torch.float64)
    for i, row in enumerate(nodes):
        for tree, node in zip(forest.trees, row):
            votes[i, tree.labels[node]] += 1 / (tree.points[node] - test[i]).norm()
    torch.testing.assert_close(shares, votes / votes.sum(1, keepdim=True), rtol=0, atol=1e-12)
    single = [(tree.predict(test) == truth).double().mean() for tree in forest.trees]
    assert (forest.predict(test) == truth).double().mean() > max(single)
    # At distance 0 only the answers at distance 0 count.
    kept = forest.trees[0].points[:1]
    labels_there, weights = forest.weights(kept)
    at_zero = torch.stack([(tree.points[tree.query(kept)] == kept).all(1) for tree in forest.trees], 1)
    assert torch.equal(weights > 0, at_zero) and weights.sum() == pytest.approx(1)
    assert labels_there.shape == (1, 5)
    equal = BoundaryForest(5, weighted=False).train(x[:600], labels[:600])
    assert set((5 * equal.shares(test, 10)).round(decimals=9).unique().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}


def test_bad_input_to_trees():
    x, y = randn(5, 2), torch.arange(5) % 2
    for make, error, message in (
        (lambda: BoundaryTree(1), ValueError, "k must be at least 2, got 1"),
        (lambda: BoundaryTree(2.5), TypeError, "k must be an int"),
        (lambda: BoundaryTree(threshold=-1.0), ValueError, "threshold must be at least 0"),
        (lambda: BoundaryForest(0), ValueError, "num_trees must be at least 1"),
    ):
        with pytest.raises(error, match=message):
            make()
    tree = BoundaryTree().train(x, y)
    for call, error, message in (
        (lambda: BoundaryTree().query(x), ValueError, "the tree is empty"),
        (lambda: BoundaryTree().path(x[0]), ValueError, "the tree is empty"),
        (lambda: BoundaryForest(2).predict(x), ValueError, "the tree is empty"),
        (lambda: tree.query(randn(5, 3)), ValueError, "points must have 2 columns as those in the tree, got 3"),
        (lambda: tree.query(x[0]), ValueError, r"points must have shape \(n, d\)"),
        (lambda: tree.path(x), ValueError, "point must be one point"),
        (lambda: tree.query(x * torch.nan), ValueError, "points has 10 NaN"),
        (lambda: tree.query(x.tolist()), TypeError, "points must be a torch.Tensor"),
        (lambda: tree.query(x.long()), TypeError, "points must be floating point"),
        (lambda: tree.train(x, y[:3]), ValueError, r"labels must have shape \(5,\)"),
        (lambda: tree.train(x, y.double()), TypeError, "labels must be integers"),
        (lambda: tree.train(x, y - 1), ValueError, "labels must be at least 0"),
        (lambda: tree.train(x, y.tolist()), TypeError, "labels must be a torch.Tensor"),
        (lambda: BoundaryTree(threshold=0.0).train(x, y / 0), ValueError, "labels has 5 NaN"),
        (lambda: BoundaryForest(2).train(x, y).shares(x, 1), ValueError, "num_classes must be at least 2"),
        (lambda: BoundaryForest(2, threshold=0.0).train(x, y).shares(x, 2), ValueError, "take no shares"),
    ):
        with pytest.raises(error, match=message):
            call()
    one_class = BoundaryTree().train(x, torch.zeros(5, dtype=torch.long))
    assert len(one_class) == 1 and one_class.predict(x).tolist() == [0] * 5


# ---- The differentiable tree: the contract suite ---------------------------------------------------------------------

LINES = {
    name: line
    for name, line in vars(test_contract).items()
    if name.startswith("test_") and name not in systems_neighbours.NOT_HELD
}


def cases() -> list[object]:
    found = []
    for name, line in LINES.items():
        marks = [mark for mark in getattr(line, "pytestmark", []) if mark.args[0] != "system"]
        options = [{marks[0].args[0]: value} for value in marks[0].args[1]] if marks else [{}]
        found += [pytest.param(line, option, id=f"{name}-{i}") for i, option in enumerate(options)]
    return found


@pytest.mark.parametrize(("line", "option"), cases())
def test_contract_of_the_walk(line, option, tmp_path):
    wanted = inspect.signature(line).parameters
    more = {"tmp_path": tmp_path} if "tmp_path" in wanted else {}
    line(system=systems_neighbours.NEIGHBOUR_SYSTEMS[0], **option, **more)


def test_the_lines_that_are_not_held_are_lines_of_the_suite():
    assert set(systems_neighbours.NOT_HELD) <= set(vars(test_contract)) and len(LINES) > 15


@pytest.mark.parametrize("tied", [None, True])
def test_every_parameter_learns(tied):
    test_contract.test_every_parameter_learns(systems_neighbours.NEIGHBOUR_SYSTEMS[0], tied)


# ---- The differentiable tree -----------------------------------------------------------------------------------------


def small(**options) -> tuple[DifferentiableBoundaryTree, Tensor, Tensor]:
    """A network in float64 with a tree of four classes, and what it was grown from."""
    points, labels = 1.5 * randn(40, 4), torch.arange(40) % 3
    net = DifferentiableBoundaryTree(Encoder(), 3, **{"k": 3} | options)
    net.rebuild(points, labels)
    return net, points, labels


@pytest.mark.parametrize("squared", [True, False])
def test_the_walk_is_that_of_the_tree_in_feature_space(squared):
    net, points, labels = small(squared=squared)
    with torch.no_grad():
        features = net.encoder(points)
    tree = BoundaryTree(3).train(features, labels)
    assert torch.equal(net.points, points[tree.indices]) and torch.equal(net.labels, tree.labels)
    assert net.num_iters == int(tree.depths.max()) >= 3
    others = randn(100, 4, seed=5)
    with torch.no_grad():
        assert torch.equal(net.query(others), tree.query(net.encoder(others)))
    # The probability of the walk, and all classes together.
    log_probs = net(others)
    assert (log_probs.exp().sum(1) <= 1 + 1e-9).all()
    for i, told in enumerate(net.explain(others)):
        assert told.nodes == tree.path(features.new_tensor(net.encoder(others[i : i + 1])[0].tolist()))
        assert told.labels == net.labels[told.nodes].tolist() and told.probabilities[0] == 1.0
        assert 0 < told.stay <= 1 and sum(told.classes) == pytest.approx(1)
        before = told.probabilities[:-1] if told.stay == 1 and len(told.nodes) > 1 else told.probabilities
        path = torch.tensor(before).log().sum().item()
        assert log_probs[i].exp().sum().log().item() == pytest.approx(path, abs=1e-6)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("greedy", [True, False])
def test_gradcheck_of_log_p(squared, greedy):
    net, *_ = small(squared=squared)
    x = randn(3, 4, seed=6).requires_grad_()
    examples = net.points.clone().requires_grad_()

    def call(x, weight, examples):
        values = {"steps.0.encoder.weight": weight, "steps.0.points": examples}
        if greedy:
            return torch.func.functional_call(net, values, (x,))
        step = net[0]
        values = {name.removeprefix("steps.0."): value for name, value in values.items()}
        swapped = copy.deepcopy(step)
        return torch.func.functional_call(_All(swapped), {f"step.{k}": v for k, v in values.items()}, (x,))

    # The examples in the tree are differentiated as well: the gradient flows through both.
    weight = net.encoder.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(call, (x, weight, examples), fast_mode=True)


class _All(nn.Module):
    def __init__(self, step) -> None:
        super().__init__()
        self.step = step

    def forward(self, x):
        return self.step.all_walks(self.step.prepare(x))


def test_all_walks_against_a_recursion():
    net, *_ = small()
    x = randn(20, 4, seed=7)
    step = net[0]
    distances = step.prepare(x).detach()
    children = [(net.parents == node).nonzero().flatten().tolist() for node in range(net.num_nodes)]

    def collect(node, row, mass, found):
        group = children[node] if len(children[node]) == 3 else [node, *children[node]]
        for j, p in zip(group, torch.softmax(-row[group], 0).tolist()):
            if j == node:
                found[net.labels[node]] += mass * p
            else:
                collect(j, row, mass * p, found)
        return found

    expected = torch.stack([collect(0, row, 1.0, torch.zeros(3, dtype=torch.float64)) for row in distances])
    torch.testing.assert_close(step.all_walks(distances).exp(), expected, rtol=0, atol=1e-10)
    assert expected.sum(1) == pytest.approx(torch.ones(20))
    # Where distances are large, all walks are the greedy one.
    sharp = 1e4 * distances
    state = step.init(sharp)
    for _ in range(len(net)):
        state = step(state, sharp)
    torch.testing.assert_close(step.all_walks(sharp).argmax(1), net.labels[state.node])


def test_no_gradient_is_not_finite_at_the_examples_themselves():
    net, points, labels = small(squared=False)
    net.loss(points, labels).backward()
    assert net.encoder.weight.grad.isfinite().all()
    net.loss(points, labels, greedy=False).backward()
    assert net.encoder.weight.grad.isfinite().all()


def test_queries_and_examples_go_through_the_encoder_together():
    """Once a call, so that batch statistics are shared; trees are grown in eval mode."""
    seen = []

    class Watch(nn.Linear):
        def forward(self, x):
            seen.append((len(x), self.training))
            return super().forward(x)

    net = DifferentiableBoundaryTree(Watch(2, 2), 2)
    points = torch.randn(30, 2)
    nodes = net.rebuild(points, torch.arange(30) % 2)
    net(torch.randn(7, 2))
    assert seen == [(30, False), (nodes + 7, True)] and net.training


def test_samples_of_any_shape_and_saved_trees():
    encoder = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 3))
    net = DifferentiableBoundaryTree(encoder, 2).eval()
    images = torch.randn(50, 1, 8, 8)
    net.rebuild(images, torch.arange(50) % 2)
    assert net.points.shape[1:] == (1, 8, 8)
    assert net(images[:6].reshape(2, 3, 1, 8, 8)).shape == (2, 3, 2)
    torch.testing.assert_close(net(images[0]), net(images[:1])[0])
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other = DifferentiableBoundaryTree(copy.deepcopy(encoder), 2).eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.num_iters == net.num_iters and torch.equal(other(images), net(images))
    assert torch.equal(copy.deepcopy(net)(images), net(images)) and f"nodes={net.num_nodes}" in repr(net)
    moved = DifferentiableBoundaryTree(copy.deepcopy(encoder), 2).eval()
    moved.set_tree(net.points, net.labels, net.parents)
    assert torch.equal(moved(images), net(images))


def test_training_makes_the_tree_small():
    X, y = make_moons(400, noise=0.1, random_state=0)
    x, labels = torch.tensor(X, dtype=torch.float32), torch.tensor(y)
    torch.manual_seed(0)
    net = DifferentiableBoundaryTree(nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2)), 2)
    untrained = net.rebuild(x[:150], labels[:150])
    before = float((net.predict(x) != labels).double().mean())
    told = []
    history = train_boundary_tree(
        net,
        x,
        labels,
        num_rebuilds=25,
        tree_samples=150,
        steps_per_tree=8,
        lr=1e-2,
        callbacks=[lambda step, loss, net: told.append(net.num_nodes)],
    )
    assert len(history) == len(told) == 200
    assert net.num_nodes < untrained / 2
    assert float((net.predict(x) != labels).double().mean()) < min(0.02, before)
    again = DifferentiableBoundaryTree(copy.deepcopy(net.encoder), 2)
    torch.manual_seed(1)  # only the seed of the recipe counts
    states = []
    for one in (again, copy.deepcopy(again)):
        torch.randn(3)
        train_boundary_tree(one, x, labels, num_rebuilds=2, tree_samples=100, seed=3, augment=_noise, greedy=True)
        states.append(one.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_last_tree_is_the_best_for_what_is_held_out():
    """Two nets that differ in the number of last trees only: the more there are, the fewer errors of the best."""
    X, y = make_moons(500, noise=0.2, random_state=0)
    x, labels = torch.tensor(X, dtype=torch.float32), torch.tensor(y)
    errors = []
    for count in (1, 12):
        torch.manual_seed(0)
        net = DifferentiableBoundaryTree(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), 2)
        held_out = (x[400:], labels[400:])
        options = {"num_rebuilds": 3, "tree_samples": 60, "final_trees": count, "held_out": held_out}
        train_boundary_tree(net, x[:400], labels[:400], **options)
        errors.append(int((net.predict(held_out[0]) != held_out[1]).sum()))
    assert errors[1] < errors[0]
    with pytest.raises(ValueError, match="held_out has 100 points and 3 labels"):
        train_boundary_tree(net, x, labels, tree_samples=60, held_out=(x[400:], labels[:3]))


def _noise(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + 0.01 * torch.randn(x.shape, generator=generator)


def test_bad_input_to_the_differentiable_tree():
    x, y = torch.randn(20, 2), torch.arange(20) % 2
    net = DifferentiableBoundaryTree(nn.Linear(2, 2), 2)
    for make, error, message in (
        (lambda: DifferentiableBoundaryTree(torch.relu, 2), TypeError, "encoder must be a torch.nn.Module"),
        (lambda: DifferentiableBoundaryTree(nn.Identity(), 1), ValueError, "num_classes must be at least 2"),
        (lambda: DifferentiableBoundaryTree(nn.Identity(), 2, k=1), ValueError, "k must be at least 2"),
        (lambda: DifferentiableBoundaryTree(nn.Identity(), 2, sigma=0.0), ValueError, "sigma must be greater than 0"),
        (lambda: net(x), ValueError, "there is no tree yet"),
        (lambda: net.predict(x), ValueError, "there is no tree yet"),
        (lambda: net.rebuild(x, y * 0), ValueError, "labels are all 0: a tree of one class"),
        (lambda: net.rebuild(x, y + 1), ValueError, "labels must be below num_classes=2, the largest is 2"),
        (lambda: net.rebuild(x, y[:5]), ValueError, r"labels must have shape \(20,\)"),
        (lambda: net.rebuild(x.double(), y), TypeError, "points is torch.float64 but the network is torch.float32"),
        (lambda: net.rebuild(x * torch.nan, y), ValueError, "points has 40 NaN"),
        (lambda: net.rebuild(x[:, 0], y), ValueError, r"points must have shape \(n, ...\)"),
        (
            lambda: DifferentiableBoundaryTree(nn.Flatten(0), 2).rebuild(x, y),
            ValueError,
            r"encoder must map 20 samples to features \(20, q\)",
        ),
    ):
        with pytest.raises(error, match=message):
            make()
    nodes = net.rebuild(x, y)
    assert net.rebuild(x, 0 * y) == 1 and net.num_nodes == nodes, "the tree that there was is kept"
    for call, error, message in (
        (lambda: net.loss(x, y[:3]), ValueError, r"labels must have shape \(20,\)"),
        (lambda: net.explain(x[0]), ValueError, "x must be a batch"),
        (lambda: net.set_tree(x, y, y), ValueError, "parents must be -1 for the first node"),
        (lambda: net.set_tree(x[:1], y[:1], y[:1] - 1), ValueError, "same N >= 2 nodes"),
        (lambda: train_boundary_tree(nn.Linear(2, 2), x, y), TypeError, "net must be a DifferentiableBoundaryTree"),
        (lambda: train_boundary_tree(net, x, y), ValueError, "tree_samples must be less than the 20 examples"),
        (lambda: train_boundary_tree(net, x, 0 * y, tree_samples=5), ValueError, "labels are all 0"),
        (lambda: train_boundary_tree(net, x, y[:3], tree_samples=5), ValueError, r"labels must be a Tensor of shape"),
    ):
        with pytest.raises(error, match=message):
            call()
    many = torch.tensor([-1, *[0] * 19])
    with pytest.raises(ValueError, match="a node with 19 children, k=3 are allowed"):
        DifferentiableBoundaryTree(nn.Identity(), 2, k=3).set_tree(x, y, many)


# ---- Pictures --------------------------------------------------------------------------------------------------------


def test_the_tree_is_drawn_as_it_is():
    trees = pytest.importorskip("unrolled.plot.trees", reason="matplotlib is not installed")
    parents, pictures = [-1, 0, 0, 1, 1, 3], torch.rand(6, 4, 3)
    ax = trees.tree_of_examples(parents, pictures=pictures, labels=torch.arange(6) % 3, path=[0, 1, 3])
    assert [text.get_text() for text in ax.texts] == ["0", "1", "2", "0", "1", "2"]
    assert len(ax.images) == len(ax.patches) == 6 and len(ax.lines) == 5
    for image, picture in zip(ax.images, pictures):
        torch.testing.assert_close(torch.tensor(image.get_array()), picture.double())
    places = [(sum(image.get_extent()[:2]) / 2, sum(image.get_extent()[2:]) / 2) for image in ax.images]
    assert len(set(places)) == 6, "no two on top of each other"
    levels = [y for _, y in places]
    assert all(levels[node] < levels[parent] for node, parent in enumerate(parents) if parent >= 0)
    thick = [line.get_linewidth() > 2 for line in ax.lines]
    assert thick == [True, False, True, False, False]
    assert trees.tree_of_examples(parents, ax=ax) is ax
    for arguments, message in (
        (([0, 0],), "parents must be -1 for the first node"),
        (([-1, 2, 0],), "parents must be -1 for the first node"),
        ((parents, {"pictures": pictures[:3]}), "pictures has 3 entries for 6"),
        ((parents, {"labels": [1]}), "labels has 1 entries for 6"),
        ((parents, {"path": [0, 3]}), "path goes from node 0 to 3, which is not its child"),
    ):
        with pytest.raises(ValueError, match=message):
            trees.tree_of_examples(arguments[0], **(arguments[1] if len(arguments) > 1 else {}))
    with pytest.raises(TypeError, match="ax must be a matplotlib Axes"):
        trees.tree_of_examples(parents, ax="here")


def test_the_walk_is_drawn_in_order():
    trees = pytest.importorskip("unrolled.plot.trees", reason="matplotlib is not installed")
    sample, pictures = torch.rand(4, 4), torch.rand(3, 4, 4)
    ax = trees.walk_over_examples(sample, pictures, titles=["a", "b", "c"], question="?")
    shown = [torch.tensor(image.get_array()) for image in ax.images]
    torch.testing.assert_close(torch.stack(shown), torch.cat([sample[None], pictures]).double())
    assert [text.get_text() for text in ax.texts if text.get_text()] == ["?", "a", "b", "c"]
    with pytest.raises(ValueError, match=r"pictures must be of shape \(4, 4\)"):
        trees.walk_over_examples(sample, torch.rand(3, 5, 5))
    with pytest.raises(ValueError, match="titles has 1 entries for 3"):
        trees.walk_over_examples(sample, pictures, titles=["a"])


def test_the_classes_of_a_plane_are_drawn():
    trees = pytest.importorskip("unrolled.plot.trees", reason="matplotlib is not installed")
    points = randn(60, 2)
    labels = (points[:, 0] > 0).long()
    tree = BoundaryTree().train(points, labels)

    def predict(places):
        return tree.predict(torch.from_numpy(places)).numpy()

    ax = trees.decision_boundary(predict, points, labels, nodes=tree.points, parents=tree.parents, resolution=25)
    (image,) = ax.images
    left, right, bottom, top = image.get_extent()
    across, up = torch.linspace(left, right, 25), torch.linspace(bottom, top, 25)
    places = torch.stack(torch.meshgrid(across, up, indexing="xy"), -1).reshape(-1, 2).double()
    assert (torch.tensor(image.get_array()).flatten() == tree.predict(places)).double().mean() > 0.99
    assert len(ax.lines) == len(tree) - 1
    with pytest.raises(ValueError, match="must be in a plane"):
        trees.decision_boundary(predict, randn(5, 3), torch.zeros(5))
    with pytest.raises(ValueError, match="labels has 4 entries for 60"):
        trees.decision_boundary(predict, points, torch.zeros(4))
    with pytest.raises(ValueError, match="resolution must be at least 2"):
        trees.decision_boundary(predict, points, labels, resolution=1)
