"""The statistics that `SparseRecovery` promises, its determinism, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from unrolled.problems import SparseRecovery

SMALL = {"m": 20, "n": 40, "dtype": torch.float64}


def test_codes_are_bernoulli_gaussian() -> None:
    x = SparseRecovery(5, 100, sparsity=0.2, dtype=torch.float64).validation(2000).x
    kept = x[x != 0]
    # 200,000 draws: the standard errors are 0.0009 for the share, 0.005 for the mean, 0.004 for the deviation.
    assert abs(len(kept) / x.numel() - 0.2) < 4 * 0.0009
    assert abs(kept.mean()) < 4 * 0.005
    assert abs(kept.std() - 1) < 4 * 0.004


def test_every_entry_is_nonzero_at_sparsity_one() -> None:
    assert (SparseRecovery(**SMALL, sparsity=1).validation(100).x != 0).all()


@pytest.mark.parametrize("snr", [None, math.inf])
def test_without_noise_the_signals_are_the_dictionary_times_the_codes(snr: float | None) -> None:
    problem = SparseRecovery(**SMALL, snr=snr)
    y, x = problem.test(50)
    torch.testing.assert_close(y, torch.einsum("mn,bn->bm", problem.dictionary, x))


@pytest.mark.parametrize("snr", [40.0, 0.0, -10.0])
def test_noise_is_relative_to_the_deviation_of_each_signal(snr: float) -> None:
    problem = SparseRecovery(400, 40, snr=snr, dtype=torch.float64)
    y, x = problem.validation(200)
    clean = x @ problem.dictionary.T
    some = (x != 0).any(-1)
    noise = (y - clean)[some] / (clean - clean.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt()[some]
    measured = -20 * noise.square().mean(-1).sqrt().log10()  # one figure a signal, +- 0.31 dB with 400 entries
    assert (measured - snr).abs().max() < 5 * 0.31
    assert abs(measured.mean() - snr) < 0.1


def test_a_signal_of_zeros_gets_no_noise() -> None:
    y, x = SparseRecovery(**SMALL, sparsity=0.01, snr=10.0).validation(200)
    empty = (x == 0).all(-1)
    assert 0 < empty.sum() < len(x)
    assert (y[empty] == 0).all()
    assert (y[~empty] != 0).all()


def test_atoms_have_unit_norm() -> None:
    for condition_number in (None, 30.0):
        D = SparseRecovery(**SMALL, condition_number=condition_number).dictionary
        torch.testing.assert_close(D.square().sum(0), torch.ones(40, dtype=torch.float64))


def test_condition_number_spaces_the_singular_values_geometrically() -> None:
    torch.manual_seed(0)
    s = torch.linalg.svdvals(SparseRecovery(250, 500, condition_number=50.0, dtype=torch.float64).dictionary)
    assert s[0] / s[-1] == pytest.approx(50, rel=0.1)  # not exactly: the columns were made unit afterwards
    steps = s.log().diff()
    assert steps[10:-10].mean() == pytest.approx(-math.log(50) / 249, rel=0.05)


def test_a_given_dictionary_is_used_as_it_is() -> None:
    D = torch.randn(20, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = SparseRecovery(20, 40, dictionary=D)
    assert torch.equal(problem.dictionary, D)
    y, x = problem.validation(3)
    assert y.dtype == x.dtype == torch.float64
    assert SparseRecovery(dictionary=D, dtype=torch.float32).validation(3).y.dtype == torch.float32


def test_the_same_seed_gives_the_same_everything() -> None:
    one, other = (SparseRecovery(**SMALL, seed=3, snr=20.0) for _ in range(2))
    assert torch.equal(one.dictionary, other.dictionary)
    next(other.batches(7))  # what one stream gives depends on no other
    for draw in (lambda p: p.validation(9), lambda p: p.test(9), lambda p: next(p.batches(9))):
        assert all(map(torch.equal, draw(one), draw(other)))
    torch.rand(3)
    before = torch.get_rng_state()
    one.test(3)
    assert torch.equal(torch.get_rng_state(), before)  # PyTorch's own generator is left alone


def test_streams_and_seeds_differ() -> None:
    problem = SparseRecovery(**SMALL)
    batches = problem.batches(9)
    drawn = [
        problem.validation(9),
        problem.test(9),
        next(batches),
        next(batches),
        SparseRecovery(**SMALL, seed=1).test(9),
    ]
    for one, other in itertools.combinations(drawn, 2):
        assert not torch.equal(one.x, other.x)
    assert not torch.equal(problem.dictionary, SparseRecovery(**SMALL, seed=1).dictionary)


def test_batches_go_on_where_an_earlier_run_stopped() -> None:
    problem = SparseRecovery(**SMALL, snr=20.0)
    whole = list(itertools.islice(problem.batches(4), 6))
    later = list(itertools.islice(problem.batches(4, start=4), 2))
    for expected, found in zip(whole[4:], later, strict=True):
        assert all(map(torch.equal, expected, found))


def test_repr_says_what_it_is() -> None:
    assert repr(SparseRecovery(4, 8, snr=20)) == "SparseRecovery(m=4, n=8, sparsity=0.1, snr=20, seed=0)"


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"sparsity": 0}, ValueError, "sparsity must be greater than 0"),
        ({"sparsity": 1.5}, ValueError, "sparsity must be at most 1"),
        ({"sparsity": "0.1"}, TypeError, "sparsity must be a real number"),
        ({"snr": math.nan}, ValueError, "snr must be finite"),
        ({"snr": -math.inf}, ValueError, "snr must be finite"),
        ({"snr": "inf"}, TypeError, "snr must be a real number"),
        ({"condition_number": 0.5}, ValueError, "condition_number must be at least 1"),
        ({"condition_number": math.inf}, ValueError, "condition_number must be finite"),
        ({"m": 0}, ValueError, "m must be at least 1"),
        ({"n": 2.0}, TypeError, "n must be an int"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"dictionary": torch.eye(3), "m": 4}, ValueError, r"m is 4, but the dictionary has shape \(3, 3\)"),
        ({"dictionary": torch.eye(3), "n": 4}, ValueError, "n is 4, but the dictionary"),
        ({"dictionary": torch.eye(3), "condition_number": 3.0}, ValueError, "condition_number and dictionary"),
        ({"dictionary": torch.zeros(3, 3)}, ValueError, "dictionary has 3 zero atoms"),
        ({"dictionary": torch.ones(3)}, ValueError, "dictionary must be a matrix"),
        ({"dictionary": [[1.0]]}, TypeError, "dictionary must be a torch.Tensor"),
    ],
)
def test_bad_arguments_are_refused(options: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        SparseRecovery(**options)


def test_bad_sizes_are_refused_at_the_call() -> None:
    problem = SparseRecovery(**SMALL)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        problem.batches(0)
    with pytest.raises(ValueError, match="start must be at least 0"):
        problem.batches(4, start=-1)
    with pytest.raises(TypeError, match="count must be an int"):
        problem.test(1e3)  # type: ignore[arg-type]
