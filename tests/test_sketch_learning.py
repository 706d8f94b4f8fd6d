"""`learn_dictionary`: modules found from sketches alone, by any sparse coder."""

import pytest
import torch

from unrolled import MSparseEncoder
from unrolled.functional import top_k_threshold
from unrolled.sketch import Sketcher, learn_dictionary, matched_atoms

SEEDS = range(3)


def sketches(count, num_modules, d, active, seed):
    """Sketches in which a few modules took part with one attribute each, and what a module's attribute adds."""
    sketcher, generator = Sketcher(d, seed), torch.Generator().manual_seed(seed)
    spike = torch.eye(1, d)[0]
    atoms = torch.stack([sketcher.rotation("attributes", f"module {j}")(spike) for j in range(num_modules)], 1)
    where = top_k_threshold(torch.rand(count, num_modules, generator=generator), active) != 0
    x = torch.randn(count, num_modules, generator=generator) * where
    return x @ atoms.T, atoms, x


@pytest.mark.parametrize("seed", SEEDS)
def test_modules_are_found_from_sketches_alone(seed):
    samples, atoms, _ = sketches(1500, 40, 32, 3, seed)
    found = learn_dictionary(samples, 40, 3, seed=seed, num_iters=40)
    assert (matched_atoms(found.atoms, atoms) > 0.95).sum() >= 36  # scikit-learn's online learning: about 12
    torch.testing.assert_close(found.atoms.norm(dim=0), torch.ones(40))
    assert ((found.codes != 0).sum(1) <= 3).all() and found.codes.shape == (1500, 40)
    assert len(found.errors) == 40 and found.errors[-1] < 0.15 < found.errors[0]


def test_any_sparse_coder_serves():
    samples, atoms, _ = sketches(600, 12, 16, 2, seed=0)
    seen = []

    def coder(dictionary, y):
        seen.append(dictionary)
        return MSparseEncoder(dictionary, 30, sparsity=2)(y)

    found = learn_dictionary(samples, 12, 2, num_iters=30, coder=coder)
    assert len(seen) == 30 and (matched_atoms(found.atoms, atoms) > 0.95).all()


def test_the_same_seed_learns_the_same():
    samples, _, _ = sketches(200, 12, 16, 2, seed=0)
    first, second, other = (learn_dictionary(samples, 12, 2, num_iters=5, seed=seed) for seed in (1, 1, 2))
    torch.testing.assert_close(first.atoms, second.atoms, rtol=0, atol=0)
    assert (first.atoms - other.atoms).abs().max() > 0.1


def test_atoms_are_assigned_one_to_one():
    true = torch.eye(3)
    found = torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, -5.0]])
    torch.testing.assert_close(matched_atoms(found, true), torch.tensor([1.0, 0.1 / 0.82**0.5, 1.0]))
    order = torch.randperm(3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(matched_atoms(-true[:, order], true), torch.ones(3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: learn_dictionary(torch.ones(3), 2, 1), ValueError, r"shape \(N, d\)"),
        (lambda: learn_dictionary(torch.ones(3, 4), 5, 1), ValueError, "N at least num_atoms = 5"),
        (lambda: learn_dictionary(torch.ones(9, 4), 5, 5), ValueError, "sparsity must be at most 4"),
        (lambda: learn_dictionary(torch.ones(9, 4), 5, 0), ValueError, "sparsity must be at least 1"),
        (lambda: learn_dictionary(torch.zeros(9, 4), 5, 1), ValueError, "nothing to learn"),
        (lambda: learn_dictionary(torch.full((9, 4), torch.inf), 5, 1), ValueError, "NaN or infinite"),
        (lambda: learn_dictionary(torch.ones(9, 4).int(), 5, 1), TypeError, "floating point"),
        (lambda: learn_dictionary(torch.ones(9, 4), 2, 1, num_iters=0), ValueError, "num_iters must be at least 1"),
        (lambda: matched_atoms(torch.eye(3)[:, :2], torch.eye(3)), ValueError, "m at most n"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
