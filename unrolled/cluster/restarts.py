"""Many runs of mini-batch k-means at a time, of which the one with the least loss is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from unrolled import _check
from unrolled.cluster._geometry import assignments, euclidean_move, spherical_move
from unrolled.cluster.annealing import AnnealTemperature
from unrolled.cluster.kmeans import KMeansHead, revived
from unrolled.cluster.starts import KMeansPlusPlus, Start

MAX_LLOYD = 300  # iterations that refine the best run, where the tolerance does not end them before
Batch = tuple[Tensor, Tensor]  # samples (b, d), on the sphere of norm 1, and their weights (b,)


class Found(NamedTuple):
    """The best of several runs of k-means."""

    centres: Tensor  # (k, d)
    loss: Tensor  # (), the mean squared distance of the samples to the nearest centre
    losses: Tensor  # (r,), of every run before the best was refined
    num_iters: int  # updates of every run, and iterations that refined the best


class _Measured(NamedTuple):
    """One look at all the data, for each of the runs."""

    losses: Tensor  # (r,)
    sums: Tensor  # (r, k, d)
    sizes: Tensor  # (r, k)


@torch.no_grad()
def fit_centres(
    x: Tensor,  # (n, d)
    num_clusters: int,
    *,
    spherical: bool = True,
    num_restarts: int = 5,
    num_steps: int = 800,
    batch_size: int = 256,
    step_size: float = 0.1,
    anneal: AnnealTemperature | None = None,
    init: Start = KMeansPlusPlus(),
    sample_weight: Tensor | None = None,
    tol: float = 1e-4,
    generator: torch.Generator | None = None,
) -> Found:
    r"""k-means of samples in memory: the best of several runs of `KMeansHead` by its loss, for instance on codes.

    All runs go through the same batches at a time, as one network with r k outputs. Each update is the head's own step
    with assignments whose temperature falls; its length falls to 0. Then the loss over all samples decides, and the
    best run goes on by whole iterations of Lloyd's algorithm. Centres with hardly any samples start again at others, so
    that in the end no cluster is empty, but where there are fewer distinct samples than clusters.

    Args:
        x: the samples.
        num_clusters: k, from 1 to n.
        spherical: whether samples and centres are divided by their norms.
        num_restarts: r, number of runs.
        num_steps: updates of every run, each on one batch.
        batch_size: samples of a batch; no more than n.
        step_size: of the first update; it falls linearly to 0.
        anneal: temperatures of the updates; where not given from 0.1 to 0.005 in the first four fifths, off the sphere
            times the mean squared distance of the samples to their mean.
        init: how the centres start, from a random part of the samples.
        sample_weight: (n,), at least 0; 1 where not given.
        tol: Lloyd's algorithm ends when an iteration lowers the loss by less than this share of it.
        generator: of the random numbers, on the CPU; the same one gives the same centres.

    Returns:
        `Found`: centres (k, d), loss, the losses of all runs (r,), num_iters.

    Raises:
        TypeError, ValueError: as for `KMeansHead`, and numbers out of range.

    Example:
        >>> x = torch.cat([torch.randn(50, 2) + 9 * torch.eye(2)[i] for i in range(2)])
        >>> found = fit_centres(x, 2, generator=torch.Generator().manual_seed(0))
        >>> found.centres.shape, found.losses.shape
        (torch.Size([2, 2]), torch.Size([5]))
    """
    for name, value in (("num_restarts", num_restarts), ("num_steps", num_steps), ("batch_size", batch_size)):
        _check.integer(name, value)
    _check.tensor("x", x)
    with torch.random.fork_rng(devices=[]):  # its own start is not used
        head = KMeansHead(x.shape[-1], num_clusters, spherical=spherical, init=init, device=x.device, dtype=x.dtype)
    x = head._samples(x, head.num_clusters)
    weights = head._weights(sample_weight, x)
    size = min(batch_size, len(x))

    def endless() -> Iterator[Batch]:
        while True:
            for rows in torch.randperm(len(x), generator=generator).to(x.device).split(size):
                yield x[rows], weights[rows]

    def one_pass() -> Iterator[Batch]:
        return zip(x.split(4096), weights.split(4096), strict=True)

    order = torch.randperm(len(x), generator=generator).to(x.device)
    order = order[(weights[order] == 0).sort(stable=True).indices]  # what counts comes first
    start = order[: max(3 * size, 3 * num_clusters)]
    centres = starts(head.init, x[start], weights[start], num_clusters, num_restarts, generator)
    if anneal is None:
        anneal = default_annealing(num_steps, x[start], weights[start], spherical)
    return best_of_restarts(
        centres,
        endless(),
        one_pass,
        spherical=spherical,
        num_steps=num_steps,
        step_size=_check.real("step_size", step_size, above=0.0),
        anneal=anneal,
        tol=_check.real("tol", tol, minimum=0.0),
        generator=generator,
    )


def starts(
    init: Start, x: Tensor, weights: Tensor, num_clusters: int, count: int, generator: torch.Generator | None
) -> Tensor:  # (r, k, d)
    """Where each of `count` runs starts."""
    return torch.stack([init(x, num_clusters, weights=weights, generator=generator) for _ in range(count)])


def default_annealing(
    num_steps: int, x: Tensor, weights: Tensor, spherical: bool, start: float = 0.1, end: float = 0.005
) -> AnnealTemperature | None:
    """Temperatures that fall in four fifths of the updates; off the sphere in units of the data's variance."""
    scale = 1.0
    if not spherical:
        mean = weights @ x / weights.sum()
        scale = float(weights @ (x - mean).square().sum(1) / weights.sum())
    if start * scale == 0:  # hard assignments, or all samples alike
        return None
    return AnnealTemperature(max(1, round(0.8 * num_steps)), start * scale, end * scale)


@torch.no_grad()
def best_of_restarts(
    centres: Tensor,
    batches: Iterator[Batch],
    one_pass: Callable[[], Iterable[Batch]],
    *,
    spherical: bool,
    num_steps: int,
    step_size: float,
    anneal: AnnealTemperature | None,
    tol: float,
    generator: torch.Generator | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Found:
    """The runs that begin at `centres` (r, k, d), on data that need not be in memory.

    Args:
        centres: where the runs start.
        batches: samples in random order, endless.
        one_pass: all samples once, batch by batch.
        spherical, num_steps, step_size, anneal, tol, generator: as for `fit_centres`.
        progress: wraps the range of updates, for a progress bar.
    """
    runs, clusters, _ = centres.shape
    centres = centres.clone()
    share = least_share(clusters)
    counts, seen = centres.new_zeros(runs, clusters), 0
    for step in progress(range(num_steps)):
        x, weights = next(batches)
        temperature = 0.0 if anneal is None else anneal.temperature(step)
        sums, sizes, _ = totals(centres, x, weights, temperature)
        rate = step_size * (1 - step / num_steps)
        centres = spherical_move(centres, sums, rate) if spherical else euclidean_move(centres, sums, sizes, rate)
        counts, seen = counts + sizes, seen + len(x)
        if seen >= window(share):
            # A centre that starts again late would not find its place: those are left to the end.
            if step < 0.9 * num_steps:
                dead = counts < share * counts.sum(1, keepdim=True)
                for run in dead.any(1).nonzero().flatten().tolist():
                    centres[run], _ = revived(centres[run], dead[run], x, weights, generator)
            counts, seen = torch.zeros_like(counts), 0

    losses = _measured(centres, one_pass()).losses
    best = int(losses.argmin())
    centre, loss, iterations = _refined(centres[best : best + 1], one_pass, spherical, tol, generator)
    return Found(centre[0], loss, losses, num_steps + iterations)


def _refined(
    centres: Tensor,
    one_pass: Callable[[], Iterable[Batch]],
    spherical: bool,
    tol: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, int]:
    """Lloyd's algorithm from centres (1, k, d), until it hardly gains and no cluster is empty; centres, loss, count."""
    now, count, rounds, settled = _measured(centres, one_pass()), 0, 0, False
    while True:
        if not settled and count < MAX_LLOYD:
            sizes = now.sizes.unsqueeze(-1)
            if spherical:
                sizes = torch.linalg.vector_norm(now.sums, dim=-1, keepdim=True)
            moved = torch.where(sizes > 0, now.sums / torch.where(sizes > 0, sizes, 1.0), centres)
            then, count = _measured(moved, one_pass()), count + 1
            settled = not bool(now.losses - then.losses > tol * now.losses)
            if bool(then.losses < now.losses):  # but for rounding, always
                centres, now = moved, then
        elif bool((dead := now.sizes[0] == 0).any()) and rounds < 10 * len(dead):
            # At least one centre goes where none was, which lowers the loss, though it might empty another cluster.
            places, went = revived(centres[0], dead, *_farthest(centres, one_pass(), 4 * len(dead)), generator)
            if not bool(went.any()):
                return centres, now.losses[0], count
            centres, rounds, settled = places.unsqueeze(0), rounds + 1, False
            now = _measured(centres, one_pass())
        else:
            return centres, now.losses[0], count


def least_share(num_clusters: int) -> float:
    """Of the samples: a centre with fewer starts again elsewhere while there is time."""
    return min(0.001, 0.5 / num_clusters)


def window(share: float) -> float:
    """Samples after which the shares are looked at: so many that a centre with the least share has had some."""
    return max(10_000.0, 5 / share)


def totals(
    centres: Tensor, x: Tensor, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:  # (r, k, d), (r, k), (b, r, k)
    """Of a batch: for every centre the sum of its samples, and their weight; and the logits up to -|x|^2."""
    runs, clusters, d = centres.shape
    flat = centres.reshape(-1, d)
    logits = torch.addmm(-flat.square().sum(1), x, flat.mT, alpha=2).view(-1, runs, clusters)
    parts = assignments(logits, temperature) * weights[:, None, None]
    return (parts.reshape(len(x), -1).mT @ x).view_as(centres), parts.sum(0), logits


def _measured(centres: Tensor, batches: Iterable[Batch]) -> _Measured:
    losses = torch.zeros(len(centres), dtype=torch.float64)
    sums, sizes = torch.zeros_like(centres), centres.new_zeros(centres.shape[:2])
    total = 0.0
    for x, weights in batches:
        more, counts, logits = totals(centres, x, weights, 0.0)
        sums += more
        sizes += counts
        distances = (torch.linalg.vecdot(x, x).unsqueeze(1) - logits.amax(2)).relu()
        losses += (weights @ distances).cpu()
        total += float(weights.sum())
    return _Measured(losses / total, sums, sizes)


def _farthest(centres: Tensor, batches: Iterable[Batch], count: int) -> Batch:
    """The samples farthest from the centres (1, k, d), of positive weight."""
    kept: list[Tensor] = []
    for x, weights in batches:
        distances = torch.cdist(x, centres[0], compute_mode="donot_use_mm_for_euclid_dist").amin(1)
        distances = torch.where(weights > 0, distances, -1.0)
        rows = torch.cat([*kept, torch.cat([distances[:, None], weights[:, None], x], 1)])
        kept = [rows[rows[:, 0].topk(min(count, len(rows))).indices]]
    return kept[0][:, 2:], kept[0][:, 1]
