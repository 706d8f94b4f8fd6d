"""Learning what the modules are from sketches alone: dictionary learning with the library's own sparse coding."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from unrolled import _check
from unrolled.functional import top_k_threshold
from unrolled.solvers import fista

Coder = Callable[[Tensor, Tensor], Tensor]

ALIKE = 0.9  # two atoms of a larger cosine chase the same one
RARE = 0.2  # an atom used less often than this share of the mean is dead


class LearnedDictionary(NamedTuple):
    """What `learn_dictionary` found: `atoms` (d, n) of norm 1, `codes` (N, n), and the relative `errors` on the way."""

    atoms: Tensor
    codes: Tensor
    errors: list[float]


@torch.no_grad()
def learn_dictionary(
    samples: Tensor,
    num_atoms: int,
    sparsity: int,
    *,
    num_iters: int = 50,
    seed: int = 0,
    coder: Coder | None = None,
) -> LearnedDictionary:
    r"""$\min_{D, X} \|Y - D X\|_F^2$ with atoms of norm 1 and at most `sparsity` nonzeros a sample, by turns.

    Sketches in which few modules took part are sparse combinations of what each module adds. So the modules can be
    found from sketches alone, without their seeds: up to order and sign. Each turn

    1. codes: `coder`, of which the `sparsity` largest entries are kept and solved for again by least squares;
    2. atoms: $D = Y X^T (X X^T)^{-1}$, scaled to norm 1;
    3. restarts, in the first four fifths of the turns: an atom that is hardly used, or like another one, begins again
       at what is left of a sample, drawn by how badly it is explained.

    Args:
        samples: $Y$, one a row.
        num_atoms: n.
        sparsity: the most nonzeros a code may have, from 1 to n and at most d.
        num_iters: turns.
        seed: of the start and of the restarts.
        coder: `(dictionary, samples) -> codes`, such as an untrained network of this library,
            `lambda D, y: MSparseEncoder(D, 30, sparsity=3)(y)`; `solvers.fista` where not given.

    Shape:
        - samples: (N, d), N at least n
        - atoms: (d, n); codes: (N, n)

    Raises:
        TypeError: `samples` is no floating point tensor, or a number is no int.
        ValueError: a wrong shape, fewer samples than atoms, NaN, zero samples only, `sparsity` out of its range.

    Example:
        >>> true = torch.nn.functional.normalize(torch.randn(10, 12), dim=0)
        >>> codes = torch.randn(500, 12) * (torch.rand(500, 12).argsort(1) < 2)
        >>> found = learn_dictionary(codes @ true.T, num_atoms=12, sparsity=2)
        >>> int((matched_atoms(found.atoms, true) > 0.95).sum())
        12

    Reference:
        Step 2 is the method of optimal directions: K. Engan, S. O. Aase and J. H. Husøy, "Method of optimal directions
        for frame design", ICASSP 1999.
    """
    _check.finite("samples", _check.tensor("samples", samples))
    n, k = _check.integer("num_atoms", num_atoms), _check.integer("sparsity", sparsity)
    _check.integer("num_iters", num_iters)
    if samples.dim() != 2 or len(samples) < n:
        raise ValueError(
            f"samples must have shape (N, d) with N at least num_atoms = {n}, got {tuple(samples.shape)}. One sketch a "
            "row."
        )
    if k > min(n, samples.shape[1]):
        raise ValueError(f"sparsity must be at most {min(n, samples.shape[1])}, num_atoms and d, got {k}.")
    power = samples.square().sum(1)
    if int((power > 0).sum()) < n:
        raise ValueError(f"samples has fewer than {n} rows that are not zero: there is nothing to learn atoms from.")
    generator = torch.Generator().manual_seed(seed)
    coder = _lasso if coder is None else coder
    atoms = normalize(samples[_draw(power, n, generator)].T, dim=0)
    errors: list[float] = []
    for turn in range(num_iters):
        codes = _refit(atoms, samples, top_k_threshold(coder(atoms, samples), k), k)
        rest = samples - linear(codes, atoms)
        errors.append((rest.square().sum() / power.sum()).sqrt().item())
        if turn == num_iters - 1:
            break
        gram = codes.T @ codes
        # An atom that nothing uses must not make the system singular; it begins again below, or next time.
        gram.diagonal().add_(1e-6 * gram.diagonal().mean())
        atoms = normalize(torch.linalg.solve(gram, codes.T @ samples).T, dim=0)
        if turn < 4 * num_iters // 5:
            dead = _dead(atoms, codes)
            left = (samples - linear(codes, atoms)) if len(dead) else rest
            if len(dead) and int((left.square().sum(1) > 0).sum()) >= len(dead):
                atoms[:, dead] = normalize(left[_draw(left.square().sum(1), len(dead), generator)].T, dim=0)
    return LearnedDictionary(atoms, codes, errors)


def matched_atoms(found: Tensor, true: Tensor) -> Tensor:
    r"""$|\langle \hat d_{\sigma(j)}, d_j \rangle|$: how well each true atom was found.

    $\sigma$ assigns one found atom to each true one, no two the same, so that the sum is largest.

    Args:
        found: (d, n) of any norm but 0, atoms as columns.
        true: (d, m), m at most n.

    Returns:
        The cosine of each true atom with the one assigned to it, (m).

    Raises:
        TypeError, ValueError: no matrices, zero atoms, sizes that do not fit.

    Example:
        >>> matched_atoms(torch.tensor([[0.0, -1.0], [2.0, 0.0]]), torch.eye(2))
        tensor([1., 1.])
    """
    from scipy.optimize import linear_sum_assignment

    _check.dictionary("found", found)
    _check.dictionary("true", true)
    if len(found) != len(true) or true.shape[1] > found.shape[1]:
        raise ValueError(
            f"found and true must have shapes (d, n) and (d, m) with m at most n, got {tuple(found.shape)} and "
            f"{tuple(true.shape)}."
        )
    cosines = (normalize(true, dim=0).T @ normalize(found, dim=0)).abs()
    rows, columns = linear_sum_assignment(cosines.detach().cpu().numpy(), maximize=True)
    return cosines[rows, columns]


def _lasso(dictionary: Tensor, samples: Tensor) -> Tensor:
    """FISTA with an l1 weight that is small beside the samples."""
    return fista(dictionary, samples, 0.1 * samples.norm(dim=1).mean(), num_iters=50)


def _refit(atoms: Tensor, samples: Tensor, codes: Tensor, sparsity: int) -> Tensor:
    """Least squares on the supports, all samples at once: (N, k, k) systems."""
    support = codes.abs().topk(sparsity).indices
    chosen = atoms.T[support]  # (N, k, d)
    gram = chosen @ chosen.mT
    gram.diagonal(dim1=1, dim2=2).add_(1e-6)  # two equal atoms in one support
    values = torch.linalg.solve(gram, chosen @ samples.unsqueeze(-1)).squeeze(-1)
    return torch.zeros_like(codes).scatter(1, support, values)


def _dead(atoms: Tensor, codes: Tensor) -> Tensor:
    """Which atoms are hardly used, or nearly equal to an earlier one."""
    used = (codes != 0).sum(0).to(atoms.dtype)
    cosines = (atoms.T @ atoms).abs().triu(1)
    return ((cosines > ALIKE).any(0) | (used < RARE * used.mean())).nonzero().flatten()


def _draw(power: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows, the strong ones more often."""
    return torch.multinomial(power.cpu().double(), count, generator=generator).to(power.device)
