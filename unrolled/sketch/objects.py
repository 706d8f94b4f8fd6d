"""`Sketcher`: sketches of attributes, of tuples and of objects that are made of other objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from unrolled import _check
from unrolled.operators import LinearOperator
from unrolled.sketch.blocks import Block, SketchDictionary
from unrolled.sketch.decoders import Decoder, best_decoder
from unrolled.sketch.rotations import Rotation, Transparent, seed_of


@dataclass(frozen=True, eq=False)
class Item:
    """An object: the module that made it, its attributes, and the objects that it was made from.

    Args:
        module: name of the module.
        attributes: (..., m), the same batch dimensions for all objects of a sketch.
        inputs: further items.
        weights: how much each of the inputs counts, positive; equal and summing to 1 where not given.

    Example:
        >>> wheel = Item("wheel", torch.tensor([0.3, 1.0]))
        >>> car = Item("car", torch.tensor([0.5, 0.1, 0.7]), inputs=(wheel, wheel))
    """

    module: str
    attributes: Tensor
    inputs: tuple[Item, ...] = ()
    weights: tuple[float, ...] | None = None


class Sketcher:
    r"""Sketches of what a modular network computed: vectors of `d` numbers, each the sum of many in random rotations.

    | | |
    |---|---|
    | attribute | $a = \tfrac12 R_{M,1} x + \tfrac12 R_{M,2} e_1$ |
    | tuple | $t = \sum_j w_j\, \tfrac12 (I + R_j)\, s_j$ |
    | object | $s = \tfrac12 (I + R_{M,0}) (\tfrac12 a + \tfrac12 t)$, $t$ of the objects that it was made from |

    $M$ is the name of a module, $j$ a position. The second part of an attribute sketch does not depend on $x$: it
    counts the objects of a module. The sketch of a whole is the tuple of its objects. All but the counts is linear in
    the attributes. So to read a sketch is to solve a linear system whose columns are known: by `recover`, exactly,
    where there are no more attributes than `d`.

    Every level of recursion divides the signal of a matched filter by $8 / w_j$: after two levels little is readable
    by it. Prefer flat tuples, `TraceSketch` and `NetworkSketch`, where the structure need not be nested.

    Args:
        d: dimension of the sketches, at least 1.
        seed: of all rotations; sketches of two seeds have nothing to do with each other.
        device, dtype: of the sketches; the CPU and torch's default dtype where not given.

    Raises:
        TypeError: `d` or `seed` is no int, attributes of another dtype.
        ValueError: `d < 1`, more attributes than `d`, weights that are not positive, NaN, batches that differ.

    Example:
        >>> sketcher = Sketcher(d=1024, seed=0)
        >>> scene = [Item("car", torch.tensor([0.5, 0.7])), Item("tree", torch.tensor([3.0]))]
        >>> s = sketcher.sketch(scene)
        >>> car, tree = sketcher.recover(s, scene)
        >>> torch.allclose(car.attributes, torch.tensor([0.5, 0.7]), atol=1e-4)
        True

    Reference:
        B. Ghazi, R. Panigrahy and J. Wang, "Recursive Sketches for Modular Deep Learning", ICML 2019. The constants of
        its theorems are not claimed here.
    """

    def __init__(
        self,
        d: int,
        seed: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.d = _check.integer("d", d)
        self.seed = _check.integer("seed", seed, minimum=0)
        self.device = torch.device("cpu" if device is None else device)
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self._rotations: dict[tuple[str | int, ...], Rotation] = {}
        self.rotation("position", 0)  # refuses a wrong dtype

    def rotation(self, *key: str | int) -> Rotation:
        """The rotation of this name: `("attributes", M)`, `("module", M)`, `("object", M)`, `("position", j)`.

        Args:
            *key: strings and ints; made the first time, then kept.
        """
        if key not in self._rotations:
            seed = seed_of(self.seed, *key)
            self._rotations[key] = Rotation(self.d, seed, device=self.device, dtype=self.dtype)
        return self._rotations[key]

    def attribute_sketch(self, module: str, x: Tensor) -> Tensor:
        r"""$\tfrac12 R_{M,1} x + \tfrac12 R_{M,2} e_1$, (..., d).

        Args:
            module: name of the module that computed x.
            x: attributes, (..., m), m at most d.
        """
        self._attributes(module, x)
        return self.rotation("attributes", module)(pad(x, (0, self.d - x.shape[-1]))) / 2 + self.presence(module)

    def presence(self, module: str) -> Tensor:
        r"""$\tfrac12 R_{M,2} e_1$, (d,): what every attribute sketch of a module holds, whatever the attributes.

        Args:
            module: its name.
        """
        return self.rotation("module", _name(module))(pad(self._one(), (0, self.d - 1))) / 2

    def tuple_sketch(self, sketches: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
        r"""$\sum_j w_j\, \tfrac12 (I + R_j)\, s_j$, (..., d).

        Args:
            sketches: at least one, (..., d) each.
            weights: positive, one for each; equal and summing to 1 where not given.
        """
        total: Tensor | None = None
        for j, (sketch, weight) in enumerate(zip(sketches, _weights(weights, len(sketches)), strict=True)):
            part = weight * Transparent(self.rotation("position", j))(sketch)
            if total is not None and part.shape != total.shape:
                raise ValueError(
                    f"sketches[{j}] has shape {tuple(part.shape)}, those before it {tuple(total.shape)}. All objects "
                    "of a sketch have the same batch dimensions: expand the attributes."
                )
            total = part if total is None else total + part
        assert total is not None
        return total

    def object_sketch(
        self, module: str, x: Tensor, inputs: Sequence[Tensor] = (), weights: Sequence[float] | None = None
    ) -> Tensor:
        r"""$\tfrac12 (I + R_{M,0}) (\tfrac12 a + \tfrac12 t)$, (..., d).

        Args:
            module: name of the module.
            x: its attributes, (..., m).
            inputs: sketches of the objects that it was made from; none for an object that stands alone.
            weights: of these, as for a tuple.
        """
        inside = self.attribute_sketch(module, x) / 2
        if inputs:
            made_from = self.tuple_sketch(inputs, weights) / 2
            if made_from.shape != inside.shape:
                raise ValueError(
                    f"attributes of {module!r} have the batch dimensions {tuple(inside.shape[:-1])}, the objects that "
                    f"it was made from {tuple(made_from.shape[:-1])}. They must be the same: expand the attributes."
                )
            inside = inside + made_from
        return Transparent(self.rotation("object", module))(inside)

    def sketch(self, items: Sequence[Item], weights: Sequence[float] | None = None) -> Tensor:
        """The sketch of a whole, (..., d): the tuple of the sketches of its objects, with all that they were made from.

        Args:
            items: the objects.
            weights: of these, positive; equal and summing to 1 where not given.
        """
        return self.tuple_sketch([self._sketch(item) for item in items], weights)

    def recover(
        self,
        sketch: Tensor,
        like: Sequence[Item],
        weights: Sequence[float] | None = None,
        *,
        decoder: Decoder | None = None,
    ) -> list[Item]:
        """Objects like these with the attributes that are read out of the sketch.

        Args:
            sketch: (..., d), or a prefix of it, (..., kept).
            like: objects of the same structure: modules, sizes, inputs and weights count, attributes don't.
            weights: as for `sketch`.
            decoder: how to read, such as `MatchedFilter()`; least squares where it is determined, else the matched
                filter, if not given.
        """
        dictionary = self.dictionary(like, weights, kept=_kept("sketch", sketch, self.d))
        # With the structure the part that does not depend on attributes is known, too.
        empty = [_map(item, lambda x: x.new_zeros(x.shape[-1:])) for item in like]
        known = self.sketch(empty, weights)[: dictionary.kept]
        found = (decoder or best_decoder(dictionary))(dictionary, _check.finite("sketch", sketch) - known)
        parts = iter(found.split(dictionary.sizes, -1))
        return [_map(item, lambda x: next(parts)) for item in like]

    def dictionary(
        self, items: Sequence[Item], weights: Sequence[float] | None = None, *, kept: int | None = None
    ) -> SketchDictionary:
        """The linear map from all attributes, in the order of a walk from the outside in, to a sketch.

        Args:
            items, weights: as for `sketch`.
            kept: how much of the sketch is there.
        """
        return SketchDictionary(list(self._blocks(items, weights, (), (), 1.0, 1.0)), kept)

    def count(self, sketch: Tensor, module: str, weight: float) -> Tensor:
        """How many objects of the outermost tuple come from a module, (...), by a matched filter.

        Args:
            sketch: (..., d) or a prefix of it.
            module: its name.
            weight: of every object in the tuple.
        """
        whole, gain = self._inward(sketch, module, weight)
        back = self.rotation("module", module).adjoint(whole)
        return back[..., 0] / gain

    def total(self, sketch: Tensor, module: str, size: int, weight: float) -> Tensor:
        """The sum of the attributes of all objects of a module in the outermost tuple, (..., size).

        Divided by `count` it is their mean.

        Args:
            sketch: (..., d) or a prefix of it.
            module: its name.
            size: how many attributes an object of it has.
            weight: of every object in the tuple.
        """
        if _check.integer("size", size) > self.d:
            raise ValueError(f"size must be at most d = {self.d}, got {size}.")
        whole, gain = self._inward(sketch, module, weight)
        return self.rotation("attributes", module).adjoint(whole)[..., :size] / gain

    def _inward(self, sketch: Tensor, module: str, weight: float) -> tuple[Tensor, float]:
        """What is inside of the objects of a module, by the half of the tuple that is not rotated, and how strong."""
        weight = _check.real("weight", weight, above=0.0)
        kept = _kept("sketch", _check.finite("sketch", sketch), self.d)
        whole = pad(sketch, (0, self.d - kept)) * (self.d / kept)
        return Transparent(self.rotation("object", _name(module))).adjoint(whole), weight / 16

    def _sketch(self, item: Item) -> Tensor:
        return self.object_sketch(
            item.module, item.attributes, [self._sketch(part) for part in item.inputs], item.weights
        )

    def _blocks(
        self,
        items: Sequence[Item],
        weights: Sequence[float] | None,
        path: tuple[LinearOperator, ...],
        key: tuple[LinearOperator, ...],
        weight: float,
        gain: float,
    ) -> Iterator[Block]:
        """Down every path. The key takes the rotated half of a tuple, which tells positions apart: a quarter is left of
        the weight after object and tuple, where both halves of the object count."""
        for j, (item, share) in enumerate(zip(items, _weights(weights, len(items)), strict=True)):
            position, inner = self.rotation("position", j), Transparent(self.rotation("object", _name(item.module)))
            down, back = (*path, Transparent(position), inner), (*key, position, inner)
            part, left = weight * share / 2, gain * share / 8
            attributes = self.rotation("attributes", item.module)
            size = _check.tensor("attributes", item.attributes).shape[-1]
            yield Block(size, (*down, attributes), part / 2, (*back, attributes), left / 2)
            if item.inputs:
                yield from self._blocks(item.inputs, item.weights, down, back, part, left)

    def _attributes(self, module: str, x: Tensor) -> None:
        _check.tensor(f"attributes of {_name(module)!r}", x)
        if x.dim() == 0 or x.shape[-1] > self.d:
            raise ValueError(
                f"attributes of {module!r} must have shape (..., m) with m at most d = {self.d}, got {tuple(x.shape)}. "
                "Take a larger d, or sketch fewer numbers."
            )
        _check.finite(f"attributes of {module!r}", x)

    def _one(self) -> Tensor:
        return torch.ones(1, device=self.device, dtype=self.dtype)

    def __repr__(self) -> str:
        return f"Sketcher(d={self.d}, seed={self.seed}, dtype={self.dtype})"


def _map(item: Item, function: Callable[[Tensor], Tensor]) -> Item:
    """The same structure with other attributes, from the outside in."""
    return replace(
        item, attributes=function(item.attributes), inputs=tuple(_map(part, function) for part in item.inputs)
    )


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if count == 0:
        raise ValueError("there is nothing to sketch: a tuple needs at least one object.")
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise ValueError(f"weights must have one number for each of the {count} objects, got {len(weights)}.")
    return [_check.real(f"weights[{j}]", weight, above=0.0) for j, weight in enumerate(weights)]


def _name(module: str) -> str:
    if not isinstance(module, str):
        raise TypeError(f"module must be the name of a module, a string, got {module!r}.")
    return module


def _kept(name: str, sketch: Tensor, d: int) -> int:
    if _check.tensor(name, sketch).dim() == 0 or sketch.shape[-1] > d:
        raise ValueError(
            f"{name} must have shape (..., {d}), or fewer entries where its end was erased, got {tuple(sketch.shape)}."
        )
    return sketch.shape[-1]
