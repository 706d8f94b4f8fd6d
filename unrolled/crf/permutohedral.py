"""The permutohedral lattice: Gaussian filtering of many pixels in a space of several features."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from unrolled.crf.filters import Plan, check_features

LIMIT = 2**62  # keys are int64, with room for the steps to neighbours


@dataclass(frozen=True)
class Permutohedral:
    r"""$K \approx S^T B_d \cdots B_1 B_0\, S$: splat onto a lattice, blur along its axes, slice.

    Each pixel is spread over the d + 1 vertices of the lattice's simplex that holds its d features; vertices are
    blurred with $(\tfrac12, 1, \tfrac12)$ along the d + 1 axes; pixels then read the value off their vertices. Only
    vertices that some pixel touches exist, so time and memory are linear in the pixels, whatever the bandwidths.

    Always normalise it: bare, it is about 40 % smaller than the Gaussian, as missing vertices interrupt the blur.
    Normalised, it is within 1 % for spatial kernels and about 5 to 11 % for bilateral ones (relative l2 norm).

    Gradients to the values are those of the lattice, exactly. To the features there are none: the lattice's own would
    be a poor stand-in for the Gaussian's, down to wrong signs for bandwidths, so features that require a gradient are
    refused. Take `Exact`, `ConvWindow` or `SeparableSpatial` for these.

    The lattice is built in float32 (in float64 for float64 features), and filtering runs in it, whatever the dtype
    of the values. How many vertices there are depends on the data: `torch.compile` leaves the filter out of its graph,
    and `torch.export` and `torch.vmap` cannot take it; use `Exact` or `ConvWindow` where they must.

    Raises:
        RuntimeError: in `prepare`, features that require a gradient.
        ValueError: in `prepare`, features of so wide a range that lattice points cannot be numbered in 62 bits.

    Example:
        >>> features = torch.rand(1, 20, 20, 5)
        >>> plan = Permutohedral().prepare(features)
        >>> average = plan(torch.ones(1, 20, 20, 1))
        >>> average.shape
        torch.Size([1, 20, 20, 1])

    Reference:
        A. Adams, J. Baek and M. A. Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", Computer
        Graphics Forum 29(2), 2010.
    """

    differentiable = False

    @torch.compiler.disable
    def prepare(self, features: Tensor, mask: Tensor | None = None) -> Plan:
        check_features(features)
        if features.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "The features require a gradient, which the permutohedral lattice does not give: its own would be far "
                "from the Gaussian's. Take filter=Exact() or ConvWindow(...) for images and bandwidths that learn, "
                "SeparableSpatial() for a spatial bandwidth; or detach the image."
            )
        with torch.no_grad():
            if mask is not None:
                features = _collapsed(features.expand(len(mask), *features.shape[1:]), mask)
            points = features if features.dtype == torch.float64 else features.float()
            return _LatticePlan(_build(points.flatten(1, -2)), None, None)


class Lattice(NamedTuple):
    """Who touches whom, for P = B N pixels, d features and M vertices; row M is an empty vertex, always zero."""

    batch: int
    pixels: Tensor  # (P (d+1),) pixels in the order of their vertices
    weights: Tensor  # (P (d+1),) their barycentric weights
    starts: Tensor  # (M+1,) where each vertex begins in them
    neighbours: Tensor  # (d+1, 3 (M+1)) each vertex, the next and the one before, along every axis
    blur: Tensor  # (3 (M+1),) the weights 1, 1/2, 1/2
    bags: Tensor  # (M+1,) 0, 3, 6, ...
    vertices: Tensor  # (P (d+1),) the vertices of each pixel
    bary: Tensor  # (P (d+1),) their weights
    corners: Tensor  # (P,) 0, d+1, 2 (d+1), ...


class _LatticePlan(Plan):
    def __init__(self, lattice: Lattice, before: Tensor | None, after: Tensor | None) -> None:
        self.lattice = lattice
        self.given = before, after
        gain = 1 / (1 + 0.5 ** (len(lattice.neighbours) - 1))  # of the blur, for a constant
        # Weights a pixel are folded into those of splat and slice, where they cost nothing. Only the adjoint splats
        # with the latter and slices with the former: computed when first asked for.
        self.before, self.after = _Folded(lattice, before, 1.0), _Folded(lattice, after, gain)

    def scaled(self, before: Tensor | None, after: Tensor | None) -> Plan:
        if before is None and after is None:
            return self
        if self.given != (None, None):
            return super().scaled(before, after)
        return _LatticePlan(self.lattice, before, after)

    def __call__(self, values: Tensor) -> Tensor:
        return self._apply(values, False)

    def adjoint(self, values: Tensor) -> Tensor:
        return self._apply(values, True)

    @torch.compiler.disable
    def _apply(self, values: Tensor, transpose: bool) -> Tensor:
        lattice, shape = self.lattice, values.shape
        shared = lattice.batch == 1 and shape[0] > 1
        if shared:  # one lattice for the whole batch: its samples side by side, as channels
            values = values.movedim(0, -2)
        rows = values.reshape(len(lattice.corners), -1).to(lattice.bary.dtype)
        rows = _Filter.apply(rows, self, transpose)
        if shared:
            return rows.reshape(*shape[1:-1], shape[0], shape[-1]).movedim(-2, 0).to(values.dtype)
        return rows.reshape(shape).to(values.dtype)


class _Folded:
    """The weights of a lattice times one for each pixel."""

    def __init__(self, lattice: Lattice, weight: Tensor | None, gain: float) -> None:
        self.lattice, self.gain = lattice, gain
        self.weight = None
        if weight is not None:
            self.weight = weight.expand(lattice.batch, *weight.shape[1:]).flatten().to(lattice.bary) * gain

    @functools.cached_property
    def splat(self) -> Tensor:
        weights = self.lattice.weights
        if self.weight is None:
            return weights if self.gain == 1 else weights * self.gain
        return weights * self.weight.take(self.lattice.pixels.long())

    @functools.cached_property
    def slice(self) -> Tensor:
        bary = self.lattice.bary
        if self.weight is None:
            return bary if self.gain == 1 else bary * self.gain
        return (bary.view(len(self.weight), -1) * self.weight[:, None]).flatten()


class _Filter(torch.autograd.Function):
    """A linear map whose derivative is its transpose: differentiable any number of times."""

    @staticmethod
    def forward(values: Tensor, plan: _LatticePlan, transpose: bool) -> Tensor:
        lattice = plan.lattice
        first, last = (plan.after, plan.before) if transpose else (plan.before, plan.after)
        cells = _gather(lattice.pixels, values, lattice.starts, first.splat)
        for neighbours in reversed(lattice.neighbours) if transpose else lattice.neighbours:
            cells = _gather(neighbours, cells, lattice.bags, lattice.blur)
        return _gather(lattice.vertices, cells, lattice.corners, last.slice)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.plan, ctx.transpose = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Filter.apply(gradient.contiguous(), ctx.plan, not ctx.transpose), None, None


def _gather(ids: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """For every bag of ids the weighted sum of the rows that it names."""
    return embedding_bag(ids, rows, starts, mode="sum", per_sample_weights=weights)


def _collapsed(features: Tensor, mask: Tensor) -> Tensor:
    """The features, with those of padding replaced by those of a real pixel: padding must not make vertices."""
    flat, real = features.flatten(1, -2), mask.flatten(1)
    some = real.byte().argmax(1)
    stand_in = flat[torch.arange(len(flat), device=flat.device), some].unsqueeze(1)
    return torch.where(real.unsqueeze(-1), flat, stand_in).reshape(features.shape)


def _build(points: Tensor) -> Lattice:  # (B, N, d)
    batch, n, d = points.shape
    bary, steps_to, base = _simplices(points.reshape(batch * n, d))
    keys, step = _keys(base, steps_to, batch)
    device = points.device
    # Vertices of different remainder r never meet, so each of the d+1 sets is sorted by itself.
    ordered = torch.empty_like(keys)
    order = torch.empty(keys.shape, dtype=torch.int64, device=device)
    for r in range(d + 1):
        torch.sort(keys[r], out=(ordered[r], order[r]))
    new = torch.ones(keys.shape, dtype=torch.bool, device=device)
    torch.ne(ordered[:, 1:], ordered[:, :-1], out=new[:, 1:])
    starts = new.flatten().nonzero().squeeze(1)
    unique = ordered.flatten()[starts]
    number = new.flatten().cumsum(0, dtype=torch.int32) - 1
    vertices = torch.empty_like(number.view_as(order)).scatter_(1, order, number.view_as(order))
    m = len(unique)
    index = torch.int32
    return Lattice(
        batch=batch,
        pixels=order.flatten().to(index),
        weights=bary.gather(1, order).flatten(),
        # The last bag is that of the empty vertex.
        starts=torch.cat([starts, starts.new_tensor([keys.numel()])]).to(index),
        neighbours=_neighbours(unique, step),
        blur=points.new_tensor([1.0, 0.5, 0.5]).repeat(m + 1),
        bags=torch.arange(0, 3 * (m + 1), 3, dtype=index, device=device),
        vertices=vertices.T.reshape(-1),
        bary=bary.T.reshape(-1),
        corners=torch.arange(0, keys.numel(), d + 1, dtype=index, device=device),
    )


def _simplices(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (P, d)
    """The simplex of each pixel: weights (d+1, P), axes walked from vertex to vertex (d+1, P), first vertex (d+1, P).

    A lattice point x has d + 1 coordinates of sum 0, all equal modulo d + 1. Vertex 0 is the nearest one of remainder
    0; the others follow by steps along the axes in the order of how far the point lies from it in that direction.
    """
    d = points.shape[1]
    features = points.T.contiguous()
    elevated = features.new_empty(d + 1, len(points))
    total = torch.zeros_like(features[0])
    for k in range(d, 0, -1):
        scaled = features[k - 1] * ((2 / 3) ** 0.5 * (d + 1) / ((k + 1) * k) ** 0.5)
        torch.sub(total, scaled, alpha=k, out=elevated[k])
        total += scaled
    elevated[0] = total
    elevated /= d + 1
    base = elevated.round()
    t = elevated.sub_(base)
    excess = base.sum(0).to(torch.int8)
    rank = excess.repeat(d + 1, 1)
    for i in range(d):
        for j in range(i + 1, d + 1):
            less = t[i] < t[j]
            rank[i] += less
            rank[j] += ~less
    low, high = rank < 0, rank > d
    shift = low.to(torch.int8) - high.to(torch.int8)
    rank += (d + 1) * shift
    base += shift
    t -= shift
    place = (d - rank).long()
    ts = torch.empty_like(t).scatter_(0, place, t)
    bary = torch.empty_like(t)
    torch.sub(ts[1:], ts[:-1], out=bary[1:])
    torch.sub(ts[0] + 1, ts[-1], out=bary[0])
    return bary, place, base


def _keys(base: Tensor, place: Tensor, batch: int) -> tuple[Tensor, list[int]]:
    """A number for each vertex of each pixel, (d+1, P), and what a step along each axis adds to it.

    In the basis of the axes 0..d-1, a vertex has the integer coordinates c_a = (x_d - x_a) / (d+1); a step along axis
    d takes 1 off all of them. They become the digits of a number, with room for steps beyond the outermost ones.
    """
    d = len(base) - 1
    digits = base[d] - base[:d]
    low, high = digits.amin(1).double() - 2, digits.amax(1).double() + 3
    reach = max(-float(low.min()), float(high.max()))
    largest = 0.25 / torch.finfo(base.dtype).eps  # beyond it, neighbouring lattice points round to one number
    if reach > largest:
        raise ValueError(
            f"The features are too large for a lattice in {base.dtype}: they reach {reach:.3g} steps from the origin, "
            f"the limit is {largest:.3g}. Subtract their mean, scale them down, use larger bandwidths or float64."
        )
    extents = [int(e) for e in (high - low).tolist()]
    total = batch
    for extent in extents:
        total *= extent
    if total > LIMIT:
        raise ValueError(
            f"The features span too much for the lattice: {' x '.join(map(str, extents))} points"
            f"{f' times {batch} images' if batch > 1 else ''} are more than 2^62. Use larger bandwidths, fewer "
            "features, or scale the features down."
        )
    dtype = torch.int32 if total < 2**31 else torch.int64
    strides: list[int] = []
    stride = 1
    for extent in reversed(extents):
        strides.insert(0, stride)
        stride *= extent
    step = [*strides, -sum(strides)]
    key = torch.zeros(base.shape[1], dtype=dtype, device=base.device)
    for a in range(d):
        key += (digits[a] - low[a]).to(dtype) * strides[a]
    if batch > 1:
        key.view(batch, -1).add_(stride * torch.arange(batch, dtype=dtype, device=base.device)[:, None])
    keys = torch.empty((d + 1, base.shape[1]), dtype=dtype, device=base.device)
    added = torch.tensor(step, dtype=dtype, device=base.device)[:, None].expand_as(keys)
    keys.scatter_(0, place, added)  # the step at each place
    # Vertex r is r steps away from vertex 0; the last step would lead back to it.
    for r in range(d, 0, -1):
        keys[r] = keys[r - 1]
    keys[0] = key
    for r in range(1, d + 1):
        keys[r] += keys[r - 1]
    return keys, step


def _neighbours(unique: Tensor, step: list[int]) -> Tensor:
    """For each axis and vertex: itself, the next one and the one before, (d+1, 3 (M+1)); M where there is none."""
    m, index = len(unique), _Index(unique)
    ids = torch.arange(m, dtype=torch.int32, device=unique.device)
    table = torch.full((len(step), m + 1, 3), m, dtype=torch.int32, device=unique.device)
    for entries, add in zip(table, step, strict=True):  # one axis at a time: what is in use stays in the cache
        following = index.find(unique + add)
        entries[:m, 0] = ids
        entries[:m, 1] = following
        before = torch.full((m + 1,), m, dtype=torch.int32, device=unique.device).scatter_(0, following, ids)
        entries[:m, 2] = before[:m]  # what has no next one was written to the last place
    return table.flatten(1)


class _Index:
    """Where a number is among keys that are all different: a hash table, filled and asked with whole tensors.

    Of the keys that meet in a slot one wins; the others go to an index of their own, which is asked for the numbers
    that find another key in their slot. Most numbers asked for are no keys and find an empty slot.
    """

    def __init__(self, keys: Tensor) -> None:
        m = len(keys)
        self.bits = max(m - 1, 1).bit_length() + 2  # at most a quarter of the slots are taken
        self.keys = torch.cat([keys, keys.new_full((1,), -1)])  # no key is negative
        ids = torch.arange(m, dtype=torch.int32, device=keys.device)
        self.table = torch.full((2**self.bits,), m, dtype=torch.int32, device=keys.device)
        own = self._slots(keys)
        self.table[own] = ids
        lost = (self.table.take(own) != ids).nonzero().squeeze(1)
        self.others = _Index(keys[lost]) if len(lost) else None
        self.place = torch.cat([lost, lost.new_full((1,), m)])  # of the others' keys, and of what is none of them

    def _slots(self, numbers: Tensor) -> Tensor:
        # Fibonacci hashing: the products wrap around, their upper bits are well mixed.
        width, multiplier = (64, -7046029254386353131) if numbers.dtype == torch.int64 else (32, -1640531527)
        return (numbers * multiplier).bitwise_right_shift_(width - self.bits).bitwise_and_(2**self.bits - 1).long()

    def find(self, numbers: Tensor) -> Tensor:
        """The place of each number, int64; the count of keys where it is none of them."""
        m = len(self.keys) - 1
        found = self.table.take(self._slots(numbers)).long()
        other = self.keys.take(found) != numbers
        again = None if self.others is None else (other & (found != m)).nonzero().squeeze(1)
        found.masked_fill_(other, m)
        if self.others is not None and again is not None:
            found[again] = self.place[self.others.find(numbers[again])]
        return found
