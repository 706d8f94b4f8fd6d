"""`TraceSketch` and `NetworkSketch`: what ran is in the sketch, nothing else is, and nothing stays behind."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from unrolled import LISTA, Checkpointed, Tolerance, Trace
from unrolled.sketch import LeastSquares, MatchedFilter, NetworkSketch, SparseCoder, TraceSketch, default_metrics

F64 = torch.float64
SEEDS = range(3)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


y = randn(3, 6, seed=1)


def coder(num_iters=6, **options):
    return LISTA(randn(6, 10), num_iters, alpha=0.4, **options)


def hooks(module):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def filled(seed=0, d=256, layers=16, size=8, batch=(4,), **options):
    """A sketch of random attributes of norm 1, and these."""
    names = [f"a{i}" for i in range(size)]
    sketch = TraceSketch(names, layers, d, seed, **options)
    x = torch.nn.functional.normalize(randn(*batch, layers, size, seed=seed), dim=-1)
    for t in range(layers):
        sketch.update(t, x[..., t, :])
    return sketch, x


def read(sketch, decoder=None):
    layers = [torch.stack(list(sketch.recover(t, decoder=decoder).values()), -1) for t in range(sketch.num_layers)]
    return torch.stack(layers, -2)


# ---- TraceSketch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 40])
def test_the_vector_is_its_equation(size):
    sketch = TraceSketch([f"a{i}" for i in range(size)], 2, 64, seed=3, modules=["M", "N"])
    x, present = randn(2, 5, size), torch.tensor([True, False, True, True, False])
    sketch.update(1, x[1], present)
    sketch.update(0, x[0])
    R = sketch.sketcher.rotation

    def rotated(t, module):
        padded = torch.nn.functional.pad(x[t], (0, 64 - size))
        e = torch.eye(1, 64, dtype=F64)[0]
        return R("position", t)(R("attributes", module)(padded) / 2 + R("module", module)(e) / 2) / 2

    torch.testing.assert_close(sketch.vector, rotated(0, "M") + rotated(1, "N") * present[:, None], rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_trace_of_16_layers_is_read_exactly_from_256_numbers(seed):
    sketch, x = filled(seed)
    assert sketch.vector.shape == (4, 256)
    assert (read(sketch) - x).abs().max() <= 1e-6
    torch.testing.assert_close(sketch.count("layer"), torch.full((4,), 16.0, dtype=F64))
    torch.testing.assert_close(sketch.mean("layer"), x.mean(1))
    assert (read(sketch.truncate(150)) - x).abs().max() <= 1e-6, "144 unknowns"


def test_a_matched_filter_reads_what_least_squares_cannot_and_erasing_half_costs_the_root_of_two():
    ratios = []
    for seed in SEEDS:
        sketch, x = filled(seed, d=4096)
        errors = [
            (read(part, MatchedFilter()) - x).square().mean().sqrt().item() for part in (sketch, sketch.truncate(2048))
        ]
        assert errors[0] < 0.1
        ratios.append(errors[1] / errors[0])
    assert max(ratios) <= 1.6
    small, x = filled(d=128)
    torch.testing.assert_close(read(small), read(small, MatchedFilter()))
    with pytest.raises(ValueError, match="144; there are 128"):
        small.recover(0, decoder=LeastSquares())


def test_modules_are_counted_by_name():
    sketch = TraceSketch(["x"], 5, d=64, modules=["a", "b", "a", "b", "a"], scales={"x": 100.0})
    for t in (0, 1, 4):
        sketch.update(t, {"x": torch.tensor([10.0 * t, 5.0])}, present=torch.tensor([True, t == 1]))
    torch.testing.assert_close(sketch.count("a"), torch.tensor([2.0, 0.0], dtype=F64), atol=1e-10, rtol=0)
    torch.testing.assert_close(sketch.count("b"), torch.tensor([1.0, 1.0], dtype=F64), atol=1e-10, rtol=0)
    torch.testing.assert_close(sketch.mean("a")[:, 0], torch.tensor([20.0, 0.0], dtype=F64), atol=1e-9, rtol=0)
    torch.testing.assert_close(sketch.ran(4), torch.tensor([1.0, 0.0], dtype=F64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_similarity_is_that_of_the_attributes(seed):
    mine, x = filled(seed, d=8192, batch=())
    same, _ = filled(seed, d=8192, batch=())
    other, nothing = (TraceSketch(mine.names, 16, 8192, seed) for _ in range(2))
    z = torch.cat((x[:8], filled(seed + 5, batch=())[1][8:]))  # half of the layers are the same
    for t in range(16):
        other.update(t, z[t])
        nothing.update(t, torch.zeros(8, dtype=F64))
    cosine = (x * z).sum().item() / 16
    assert mine.similarity(same).item() == pytest.approx(1)
    assert mine.similarity(other).item() == pytest.approx((1 + cosine) / 2, abs=0.05), "that the layers ran is common"
    assert mine.similarity(other, baseline=nothing).item() == pytest.approx(cosine, abs=0.05)
    half = mine.truncate(4096)
    assert half.similarity(other.vector, baseline=nothing).item() == pytest.approx(cosine, abs=0.06)
    with pytest.raises(ValueError, match="share no rotations"):
        mine.similarity(TraceSketch(mine.names, 16, 8192, seed=9))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gradient", [None, Checkpointed(2)], ids=str)
def test_watch_sketches_what_a_trace_records(tied, gradient):
    net = coder(tied=tied, **({} if gradient is None else {"gradient": gradient}))
    before = hooks(net)
    with TraceSketch.watch(net, d=128) as sketch, Trace(net, default_metrics(net)) as trace:
        net(randn(2, 6))
        net(y).sum().backward()  # the latest call counts, and what Checkpointed computes again is no layer
    assert hooks(net) == before
    assert not sketch.vector.requires_grad
    for t in range(6):
        found = sketch.recover(t)
        for name in ("norm", "peak", "support"):
            torch.testing.assert_close(found[name], torch.from_numpy(trace[name][t]).to(F64), rtol=0, atol=1e-9)
    xs = [torch.zeros(3, 10, dtype=F64), *net.iterates(y)]
    changes = torch.stack([sketch.recover(t)["change"] for t in range(6)])
    torch.testing.assert_close(changes, torch.stack([(b - a).norm(dim=-1) for a, b in itertools.pairwise(xs)]).detach())
    torch.testing.assert_close(sketch.count("LISTAStep"), torch.full((3,), 6.0, dtype=F64))


def test_watch_counts_the_layers_that_a_sample_ran():
    net = coder(30, stop=Tolerance(0.02))
    scale = torch.tensor([[1.0], [3.0], [0.2]], dtype=F64)
    with TraceSketch.watch(net, {"sum": lambda x: x.sum(-1)}, d=128) as sketch, Trace(net) as trace:
        net(y * scale)
    used = trace.num_iters
    assert len(set(used.tolist())) > 1
    torch.testing.assert_close(sketch.count("LISTAStep"), used.double(), rtol=0, atol=1e-9)
    last = torch.stack([sketch.recover(int(k) - 1)["sum"][i] for i, k in enumerate(used)])
    torch.testing.assert_close(last, net(y * scale).sum(-1).detach(), rtol=0, atol=1e-9)


def test_watch_has_room_for_longer_calls_where_asked():
    net = coder(4, tied=True)
    with TraceSketch.watch(net, num_layers=9, d=64) as sketch:
        net(y, num_iters=9)
    assert sketch.count("LISTAStep")[0].item() == pytest.approx(9)
    with TraceSketch.watch(net, d=64), pytest.raises(ValueError, match="num_layers=9"):
        net(y, num_iters=9)
    assert hooks(net) == 0


def test_a_vector_is_all_that_is_needed():
    sketch, x = filled()
    stored = pickle.loads(pickle.dumps(sketch.vector))
    reader = TraceSketch(sketch.names, 16, 256, 0)
    reader.vector = stored
    torch.testing.assert_close(read(reader), x, rtol=0, atol=1e-10)
    twin = copy.deepcopy(sketch)
    torch.testing.assert_close(twin.recover(3), sketch.recover(3))
    cut = sketch.truncate(200)
    assert (cut.kept, sketch.kept, cut.vector.shape) == (200, 256, (4, 200))


# ---- NetworkSketch ---------------------------------------------------------------------------------------------------


class Looped(nn.Module):
    """A cell that runs several times, and a head."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(5, 5, dtype=F64)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(5, 2, dtype=F64))
        self.again = False

    def forward(self, x, loops=3):
        self.kept = []
        for _ in range(loops):
            x = checkpoint(self.cell, x, use_reentrant=False) if self.again else self.cell(x)
            self.kept.append(x.detach())
        return self.head(x)


@pytest.mark.parametrize("again", [False, True])
def test_every_call_of_every_module_is_read_back(again):
    torch.manual_seed(0)
    net, x = Looped(), randn(4, 5)
    net.again = again
    with NetworkSketch(net, d=64, dtype=F64) as sketch:
        net(randn(7, 5), loops=1)  # the latest call counts
        output = net(x)
        output.sum().backward()
    assert hooks(net) == 0
    assert sketch.modules == ["cell", "head.0", "head.1"] and sketch.vector.shape == (4, 64)
    assert sketch.calls("cell") == 3 and not sketch.vector.requires_grad
    for k in range(3):
        torch.testing.assert_close(sketch.recover("cell", k), net.kept[k], rtol=0, atol=1e-12)
    torch.testing.assert_close(sketch.recover("head.1"), output.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(sketch.count("cell"), torch.full((4,), 3.0, dtype=F64))
    torch.testing.assert_close(sketch.mean("cell"), torch.stack(net.kept).mean(0))
    large = sketch.truncate(32)
    torch.testing.assert_close(large.recover("head.1"), output.detach(), rtol=0, atol=1e-10)


def test_the_sketch_changes_nothing_and_is_the_same_for_every_batch():
    torch.manual_seed(0)
    net, x = Looped(), randn(4, 5)
    expected = net(x)
    with NetworkSketch(net, d=64, dtype=F64) as sketch:
        torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
        whole = sketch.vector
        net(x[1:2])
        torch.testing.assert_close(sketch.vector, whole[1:2], rtol=0, atol=1e-14)


def test_sparse_outputs_are_read_from_fewer_numbers():
    net = nn.Sequential(coder(10), nn.Identity())
    dictionary = randn(40, 200)
    encoder = nn.Sequential(LISTA(dictionary / dictionary.norm(dim=0), 20, alpha=5.0))
    signals = 3 * randn(4, 40, seed=3)
    with NetworkSketch(encoder, ["0"], d=200, dtype=F64) as sketch:
        codes = encoder(signals).detach()
    assert 0 < (codes != 0).sum(1).max() < 25
    part = sketch.truncate(120)
    torch.testing.assert_close(part.recover("0", decoder=SparseCoder(1e-4, 2000)), codes, rtol=0, atol=1e-8)
    assert (part.recover("0") - codes).abs().max() > 0.1, "the matched filter, as 201 unknowns are too many"
    assert NetworkSketch(net, ["1"], d=8).modules == ["1"]


def test_attributes_make_small_ones_of_large_outputs():
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.LSTM(8, 2, batch_first=True))

    def attributes(name, output):
        return output.mean((-2, -1)) if name == "0" else output[0].flatten(1)

    with NetworkSketch(net, ["0"], d=16, attributes=attributes) as sketch:
        picture = torch.rand(2, 1, 10, 10)
        output = net[0](picture)  # not a call of the network
        assert sketch.vector is None
        sketched = nn.Sequential(net[0])
    with NetworkSketch(sketched, d=16, attributes=attributes) as sketch:
        sketched(picture)
    torch.testing.assert_close(sketch.recover("0"), output.mean((-2, -1)).detach(), rtol=0, atol=1e-5)


class Stretch(nn.Module):
    def forward(self, x):
        return x


class Part(nn.Module):
    """Sends half of the batch through one module."""

    def __init__(self):
        super().__init__()
        self.all, self.some = nn.Identity(), nn.Identity()

    def forward(self, x):
        self.some(self.all(x)[:2])
        return x


def watched(metrics):
    net = coder()
    with TraceSketch.watch(net, metrics):
        net(y)


def call(net, x, **options):
    with NetworkSketch(net, **options):
        try:
            return net(x)
        finally:
            net.eval()


def changing():
    net = nn.Sequential(Stretch())
    with NetworkSketch(net, d=16):
        net(torch.ones(2, 3))
        net(torch.ones(2, 4))


linear = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
named = ["a", "b"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TraceSketch(named, 3, d=0), ValueError, "d must be at least 1, got 0"),
        (lambda: TraceSketch(named, 3, d=1), ValueError, "d must be at least 2, the number of names"),
        (lambda: TraceSketch(named, 0), ValueError, "num_layers must be at least 1"),
        (lambda: TraceSketch("ab", 3), TypeError, "sequence of strings"),
        (lambda: TraceSketch(["a", "a"], 3), ValueError, "names must differ"),
        (lambda: TraceSketch(named, 3, scales={"a": 0.0}), ValueError, r"scales\['a'\] must be greater than 0"),
        (lambda: TraceSketch(named, 3, scales={"c": 1.0}), ValueError, "'c', which is no attribute"),
        (lambda: TraceSketch(named, 3, modules=["x"]), ValueError, "each of the 3 layers, got 1"),
        (lambda: TraceSketch(named, 3).recover(0), RuntimeError, "nothing is in the sketch"),
        (lambda: TraceSketch(named, 3).update(3, randn(2)), ValueError, "layer must be less than 3"),
        (lambda: TraceSketch(named, 3).update(0, randn(3)), ValueError, r"shape \(..., 2\)"),
        (lambda: TraceSketch(named, 3).update(0, {"a": 1.0}), ValueError, "must have the names"),
        (lambda: TraceSketch(named, 3).update(0, randn(2) * torch.nan), ValueError, "NaN"),
        (lambda: TraceSketch(named, 3).update(0, randn(2).float()), TypeError, "float32"),
        (lambda: TraceSketch(named, 3).update(0, randn(4, 2), torch.ones(4)), ValueError, "present must be bool"),
        (lambda: filled()[0].update(3, randn(4, 8)), ValueError, "is in the sketch already"),
        (lambda: filled()[0].count("other"), ValueError, "module 'other' is not in this sketch; it has: 'layer'"),
        (lambda: filled()[0].truncate(257), ValueError, "d_kept must be at most 256"),
        (lambda: filled()[0].truncate(0), ValueError, "d_kept must be at least 1"),
        (lambda: setattr(filled()[0], "vector", randn(4, 257)), ValueError, "vector must be a sketch"),
        (lambda: TraceSketch.watch(linear).__enter__(), TypeError, "Unroll"),
        (
            lambda: watched({"a": lambda x: x[:, 0], "b": lambda x: x}),
            ValueError,
            r"metrics\['b'\] returns shape \(3, 10",
        ),
        (lambda: NetworkSketch("net"), TypeError, "torch.nn.Module, got str"),
        (lambda: NetworkSketch(nn.Linear(2, 2)), ValueError, "has no submodules"),
        (lambda: NetworkSketch(linear, ["2"]), ValueError, "modules names '2', which net does not have"),
        (lambda: NetworkSketch(Looped(), ["haed.1"]), ValueError, "Did you mean 'head.1'"),
        (lambda: NetworkSketch(linear, "0"), TypeError, "sequence of names"),
        (lambda: NetworkSketch(linear, ["0", "0"]), ValueError, "must differ"),
        (lambda: NetworkSketch(linear, d=0), ValueError, "d must be at least 1"),
        (lambda: NetworkSketch(linear, attributes=3), TypeError, "attributes must be a function"),
        (lambda: call(linear, torch.ones(2, 3), d=3), ValueError, "'0' has 4 numbers a sample, the sketch d = 3"),
        (lambda: call(linear, torch.full((2, 3), torch.nan), d=8), ValueError, "attributes of '0' has 8 NaN"),
        (lambda: call(Part(), torch.ones(4, 3), d=8), ValueError, "sketch one sample at a time"),
        (lambda: call(nn.Sequential(nn.LSTM(3, 2)), torch.ones(4, 2, 3), d=8), TypeError, "got tuple. Give a function"),
        (changing, ValueError, "has 4 numbers a sample, before it had 3. A module has one size"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_hooks_come_off_after_an_error():
    with pytest.raises(ValueError, match="d = 3"):
        call(linear, torch.ones(2, 3), d=3)
    assert hooks(linear) == 0
