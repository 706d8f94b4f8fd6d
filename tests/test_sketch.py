"""Rotations are orthonormal and the same everywhere; sketches of objects are linear and can be read, counted, cut."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unrolled.sketch import (
    Block,
    Item,
    LeastSquares,
    MatchedFilter,
    Rotation,
    SketchDictionary,
    Sketcher,
    SparseCoder,
    Transparent,
    best_decoder,
    dct,
    idct,
    seed_of,
    similarity,
)
from unrolled.solvers import ista

F64 = torch.float64
SEEDS = range(3)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(randn(*shape, seed=seed), dim=-1)


# ---- Rotations -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(0, 1000))
def test_dct_is_that_of_scipy(d, seed):
    x = randn(2, 3, d, seed=seed)
    for ours, theirs in ((dct, scipy.fft.dct), (idct, scipy.fft.idct)):
        np.testing.assert_allclose(ours(x).numpy(), theirs(x.numpy(), norm="ortho"), atol=1e-13)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(0, 2**63 - 1))
def test_a_rotation_is_orthonormal(d, seed):
    rotation, eye = Rotation(d, seed, dtype=F64), torch.eye(d, dtype=F64)
    rows = rotation(eye)  # row i is R e_i
    torch.testing.assert_close(rows @ rows.T, eye, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotation.adjoint(eye), rows.T, rtol=0, atol=1e-13)
    assert rotation.norm() == 1


def test_rotations_of_two_seeds_are_nearly_orthogonal():
    d = 4096
    first, second = (Rotation(d, seed, dtype=F64) for seed in (0, 1))
    v = unit(200, d)
    # Inner products of unit vectors in random directions have the standard deviation d^-1/2.
    assert (first(v) * second(v)).sum(-1).std() * d**0.5 == pytest.approx(1, abs=0.2)
    e = torch.eye(1, d, dtype=F64)
    assert first(e).abs().max() <= (2 / d) ** 0.5 + 1e-12, "a spike is spread over all entries"


@pytest.mark.parametrize("operator", [Rotation(9, 4, dtype=F64), Transparent(Rotation(9, 4, dtype=F64))])
def test_rotations_are_differentiable_and_have_their_adjoints(operator):
    u, v = randn(2, 9, seed=1).requires_grad_(), randn(2, 9, seed=2).requires_grad_()
    torch.testing.assert_close((operator(v) * u).sum(), (v * operator.adjoint(u)).sum())
    assert torch.autograd.gradcheck(operator, v) and torch.autograd.gradcheck(operator.adjoint, u)


def test_a_name_means_the_same_rotation_in_another_process():
    code = (
        "import torch; from unrolled.sketch import Sketcher; torch.rand(7);"
        "r = Sketcher(50, seed=3, dtype=torch.float64).rotation('attributes', 'conv');"
        "print(*r(torch.arange(50.0, dtype=torch.float64)).tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    there = torch.tensor([float(number) for number in run.stdout.split()], dtype=F64)
    here = Sketcher(50, seed=3, dtype=F64).rotation("attributes", "conv")(torch.arange(50.0, dtype=F64))
    torch.testing.assert_close(there, here, rtol=0, atol=0)


def test_seeds_of_names_differ():
    keys = [("a",), ("b",), ("a", 1), ("a", "1"), ("a1",), ("a", 1, "x")]
    assert len({seed_of(seed, *key) for seed in (0, 1) for key in keys}) == 12
    assert seed_of(0, "encoder") == seed_of(0, "encoder") < 2**63


def test_rotations_leave_the_random_numbers_alone_and_move():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    rotation = Rotation(16, 5)
    torch.testing.assert_close(torch.rand(3), expected)
    wide = rotation.double()
    assert wide(randn(16)).dtype == F64 and not wide.state_dict(), "what a seed gives is not saved"
    assert Rotation(16, 5, device="meta")(torch.empty(2, 16, device="meta")).shape == (2, 16)


# ---- Objects ---------------------------------------------------------------------------------------------------------


def tree(depth, seed, name="root", batch=()):
    parts = [tree(depth - 1, seed, f"{name}.{j}", batch) for j in range(3)] if depth > 1 else []
    return Item(name, unit(*batch, 4, seed=seed_of(seed, name)), tuple(parts), (0.5, 0.3, 0.2) if parts else None)


def walk(items):
    for item in items:
        yield item
        yield from walk(item.inputs)


def worst(found, true):
    return max((a.attributes - b.attributes).abs().max().item() for a, b in zip(walk(found), walk(true)))


def test_sketches_are_their_equations():
    sketcher = Sketcher(12, seed=1, dtype=F64)
    R, x, y, eye = sketcher.rotation, randn(2, 3), randn(2, 5, seed=1), torch.eye(12, dtype=F64)

    def matrix(*key):
        return R(*key)(eye).T

    def attribute(module, x):
        return x @ matrix("attributes", module)[:, : x.shape[-1]].T / 2 + matrix("module", module)[:, 0] / 2

    first = sketcher.object_sketch("M", x)
    expected = attribute("M", x) / 2 @ (eye + matrix("object", "M")).T / 2
    torch.testing.assert_close(first, expected)
    pair = sketcher.tuple_sketch([first, first], [0.2, 0.7])
    halves = [first @ (eye + matrix("position", j)).T / 2 for j in range(2)]
    torch.testing.assert_close(pair, 0.2 * halves[0] + 0.7 * halves[1])
    whole = sketcher.object_sketch("N", y, [first, first], [0.2, 0.7])
    torch.testing.assert_close(whole, (attribute("N", y) + pair) / 2 @ (eye + matrix("object", "N")).T / 2)


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_the_dictionary_is_the_linear_part_of_the_sketch(batch):
    items = [tree(2, 0, batch=batch), Item("lone", randn(*batch, 2, seed=9))]
    sketcher = Sketcher(64, dtype=F64)
    dictionary = sketcher.dictionary(items, [0.9, 0.4])
    x = torch.cat([item.attributes for item in walk(items)], -1)
    known = sketcher.sketch([tree_of_zeros(item) for item in items], [0.9, 0.4])
    s = sketcher.sketch(items, [0.9, 0.4])
    torch.testing.assert_close(dictionary(x) + known, s, rtol=0, atol=1e-13)
    torch.testing.assert_close(x @ dictionary.columns().T + known, s, rtol=0, atol=1e-13)
    torch.testing.assert_close((dictionary(x) * s).sum(), (x * dictionary.adjoint(s)).sum())


def tree_of_zeros(item):
    parts = tuple(tree_of_zeros(part) for part in item.inputs)
    return Item(item.module, torch.zeros_like(item.attributes), parts, item.weights)


@pytest.mark.parametrize("seed", SEEDS)
def test_least_squares_reads_every_depth_exactly(seed):
    items = [tree(3, seed, batch=(2,))]
    sketcher = Sketcher(128, seed, dtype=F64)  # 13 objects, 52 attributes
    s = sketcher.sketch(items)
    assert worst(sketcher.recover(s, items), items) < 1e-10
    assert worst(sketcher.recover(s[..., :64], items), items) < 1e-8, "half of it erased"
    assert worst(sketcher.recover(s[..., :40], items, decoder=MatchedFilter()), items) > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_the_matched_filter_has_no_bias_and_an_error_of_d_to_the_minus_half(seed):
    error = {}
    for d in (512, 8192):
        sketcher = Sketcher(d, seed, dtype=F64)
        items = [Item(f"m{j % 5}", unit(8, seed=100 * seed + j)) for j in range(10)]
        found = sketcher.recover(sketcher.sketch(items), items, decoder=MatchedFilter())
        rest = torch.cat([a.attributes - b.attributes for a, b in zip(found, items)])
        error[d] = rest.square().mean().sqrt().item()
        assert rest.mean().abs() < 4 * error[d] / len(rest) ** 0.5
    assert np.log(error[8192] / error[512]) / np.log(16) == pytest.approx(-0.5, abs=0.15)  # 80 attributes each


@pytest.mark.parametrize("seed", SEEDS)
def test_counts_and_means_of_a_module(seed):
    sketcher = Sketcher(16384, seed, dtype=F64)
    names = ["ABCD"[int(j)] for j in torch.randint(4, (20,), generator=torch.Generator().manual_seed(seed))]
    items = [Item(name, unit(8, seed=100 * seed + j)) for j, name in enumerate(names)]
    s = sketcher.sketch(items)
    for module in "ABCD":
        assert sketcher.count(s, module, weight=1 / 20).item() == pytest.approx(names.count(module), abs=0.5)
        total = torch.stack([item.attributes for item in items if item.module == module]).sum(0)
        # Noise of |s| 16 / (w sqrt(2 d)) a number, about 0.1, over 8 numbers.
        assert (sketcher.total(s, module, 8, weight=1 / 20) - total).norm() < 0.8


@pytest.mark.parametrize("seed", SEEDS)
def test_similarity_is_the_share_of_common_objects(seed):
    sketcher = Sketcher(16384, seed, dtype=F64)

    def whole(names):
        return sketcher.sketch([Item(name, unit(8, seed=seed_of(seed, name))) for name in names])

    mine = whole([f"m{j}" for j in range(10)])
    for shared in (0, 2, 5, 10):
        other = whole([f"{'m' if j < shared else 'o'}{j}" for j in range(10)])
        assert similarity(mine, other).item() == pytest.approx(shared / 10, abs=0.04)
        assert similarity(mine, other[:8192]).item() == pytest.approx(shared / 10, abs=0.05), "a half erased"
    moved = whole(["m1", "m0", *(f"m{j}" for j in range(2, 10))])
    assert similarity(mine, moved).item() == pytest.approx(0.9, abs=0.04), "at another position an object counts half"


def test_half_erased_costs_the_square_root_of_two():
    ratios = []
    for seed in SEEDS:
        sketcher = Sketcher(2048, seed, dtype=F64)
        items = [Item(f"m{j}", unit(8, seed=100 * seed + j)) for j in range(16)]
        s = sketcher.sketch(items)
        errors = []
        for kept in (2048, 1024):
            found = sketcher.recover(s[:kept], items, decoder=MatchedFilter())
            rest = torch.cat([a.attributes - b.attributes for a, b in zip(found, items)])
            errors.append(rest.square().mean().sqrt().item())
        ratios.append(errors[1] / errors[0])
    assert max(ratios) <= 1.6 and np.mean(ratios) == pytest.approx(2**0.5, abs=0.15)


# ---- Decoders --------------------------------------------------------------------------------------------------------


def flat(sizes, d, kept=None):
    return SketchDictionary(
        [Block(size, (Rotation(d, t, dtype=F64),), 1 / len(sizes)) for t, size in enumerate(sizes)], kept
    )


def test_the_sparse_coder_reads_more_unknowns_than_there_are_numbers():
    dictionary = flat([128] * 4, 128, kept=120)  # 512 unknowns
    x = torch.zeros(3, 512, dtype=F64)
    for i in range(3):
        x[i, torch.randperm(512, generator=torch.Generator().manual_seed(i))[:8]] = 1 + randn(8, seed=i).abs()
    x[2] = 0
    s = dictionary(x)
    torch.testing.assert_close(SparseCoder()(dictionary, s), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(SparseCoder()(dictionary, s[:1]), x[:1], rtol=0, atol=1e-10)
    biased = SparseCoder(refit=False)(dictionary, s)
    assert 1e-3 < (biased - x).abs().max() < 0.2
    assert (MatchedFilter()(dictionary, s) - x).abs().max() > 0.5
    with pytest.raises(ValueError, match="512; there are 120"):
        LeastSquares()(dictionary, s)


def test_the_solvers_take_the_dictionary_as_it_is():
    dictionary = flat([5, 7, 6], 24, kept=16)
    s = dictionary(randn(2, 18))
    torch.testing.assert_close(dictionary.norm(), torch.linalg.matrix_norm(dictionary.columns(), 2), rtol=1e-3, atol=0)
    options = {"num_iters": 20, "step_size": 4.0}
    torch.testing.assert_close(ista(dictionary, s, 0.01, **options), ista(dictionary.columns(), s, 0.01, **options))


def test_the_decoder_chosen_is_exact_where_that_is_possible():
    assert best_decoder(flat([3, 4], 16, kept=7)) == LeastSquares()
    assert best_decoder(flat([3, 4], 16, kept=6)) == MatchedFilter()


def test_least_squares_in_float32_is_solved_in_float64():
    dictionary = SketchDictionary([Block(8, (Rotation(72, t),), 1 / 8) for t in range(8)])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    found = LeastSquares()(dictionary, dictionary(x))
    assert found.dtype == torch.float32 and (found - x).abs().max() < 1e-4  # 64 unknowns of 72 numbers


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Rotation(0, 1), ValueError, "d must be at least 1"),
        (lambda: Rotation(4.0, 1), TypeError, "d must be an int"),
        (lambda: Rotation(4, -1), ValueError, "seed must be at least 0"),
        (lambda: Rotation(4, 0, dtype=torch.float16), TypeError, "float32 or torch.float64"),
        (lambda: Rotation(4, 0)(torch.ones(3)), ValueError, "v must have shape"),
        (lambda: Rotation(4, 0)(torch.ones(4, dtype=F64)), TypeError, "v is torch.float64"),
        (lambda: dct(torch.tensor(1.0)), ValueError, "got a number"),
        (lambda: dct(torch.arange(3)), TypeError, "floating point"),
        (lambda: Sketcher(0), ValueError, "d must be at least 1, got 0"),
        (lambda: Sketcher(4, dtype=torch.int64), TypeError, "dtype"),
        (lambda: Sketcher(4).attribute_sketch("a", torch.ones(5)), ValueError, "at most d = 4"),
        (lambda: Sketcher(4).attribute_sketch(3, torch.ones(4)), TypeError, "name of a module"),
        (
            lambda: Sketcher(4).attribute_sketch("a", torch.tensor([1.0, torch.nan])),
            ValueError,
            "attributes of 'a' has 1",
        ),
        (lambda: Sketcher(4).tuple_sketch([]), ValueError, "at least one object"),
        (lambda: Sketcher(4).tuple_sketch([torch.ones(4)], [0.0]), ValueError, r"weights\[0\] must be greater than 0"),
        (lambda: Sketcher(4).tuple_sketch([torch.ones(4)] * 2, [1.0]), ValueError, "each of the 2 objects, got 1"),
        (lambda: Sketcher(4).tuple_sketch([torch.ones(4), torch.ones(2, 4)]), ValueError, "same batch dimensions"),
        (
            lambda: Sketcher(4).object_sketch("a", torch.ones(3), [torch.ones(2, 4)]),
            ValueError,
            "expand the attributes",
        ),
        (lambda: Sketcher(4).recover(torch.ones(5), [Item("a", torch.ones(2))]), ValueError, r"shape \(..., 4\)"),
        (lambda: Sketcher(4).recover(torch.full((4,), torch.nan), [Item("a", torch.ones(2))]), ValueError, "NaN"),
        (lambda: Sketcher(4).count(torch.ones(4), "a", weight=-1.0), ValueError, "weight must be greater than 0"),
        (lambda: Sketcher(4).total(torch.ones(4), "a", 5, weight=1.0), ValueError, "at most d = 4"),
        (lambda: similarity(torch.zeros(4), torch.ones(4)), ValueError, "no direction"),
        (lambda: similarity(torch.ones(4), torch.ones(4), torch.ones(4)), ValueError, "no direction"),
        (lambda: SketchDictionary([]), ValueError, "nothing in the sketch"),
        (lambda: flat([2, 9], 8), ValueError, "size of a block must be at most d = 8, got 9"),
        (lambda: flat([2], 8, kept=9), ValueError, "kept must be at most 8"),
        (lambda: flat([2], 8, kept=0), ValueError, "kept must be at least 1"),
        (lambda: SparseCoder(alpha=1.0), ValueError, "less than 1"),
        (lambda: SparseCoder(alpha=0.0), ValueError, "greater than 0"),
        (lambda: LeastSquares()(flat([2], 8), torch.ones(7, dtype=F64)), ValueError, "sketch must have shape"),
        (lambda: LeastSquares()(flat([2], 8), torch.ones(8)), TypeError, "sketch is torch.float32"),
        (
            lambda: LeastSquares()(SketchDictionary([Block(2, (Rotation(8, 0),), 1.0)] * 2), torch.ones(8)),
            ValueError,
            "depend on each other",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
