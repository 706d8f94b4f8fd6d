"""`FlatSketch`: one flat tuple of what modules computed, read by module and position."""

from __future__ import annotations

import abc
import copy
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from unrolled import _check
from unrolled.sketch.blocks import Block, SketchDictionary
from unrolled.sketch.comparing import similarity
from unrolled.sketch.decoders import Decoder, best_decoder
from unrolled.sketch.objects import Sketcher
from unrolled.sketch.rotations import Rotation

Self = TypeVar("Self", bound="FlatSketch")

FEW = 32  # attributes of an object, up to which their rows of the dictionary are kept: faster than to rotate each time


class Slot(NamedTuple):
    """The place of one object: which module it came from, its number, and how many attributes it has."""

    module: str
    position: int
    size: int


class FlatSketch(abc.ABC):
    r"""$s = w \sum_j R_j a_j$ with the attribute sketches $a_j = \tfrac12 R_{M_j,1} x_j + \tfrac12 R_{M_j,2} e_1$.

    What `TraceSketch` and `NetworkSketch` share: how a sketch is filled, read, compared and cut. A tuple of one level
    needs no half that passes unrotated, as positions are known; so all of the signal is in the rotated part.

    Args:
        d: dimension of the sketch.
        seed: of the rotations.
        weight: $w$, positive.
        device, dtype: of the sketch.

    Attributes:
        vector: the sketch, (..., kept), to be stored or sent; `None` before anything was recorded. A vector that comes
            from elsewhere, made with the same settings, may be put here.
        kept: how many entries of it are there.
    """

    def __init__(
        self,
        d: int,
        seed: int,
        weight: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.sketcher = Sketcher(d, seed, device=device, dtype=dtype)
        self.kept = d
        self._weight = weight
        self._vector: Tensor | None = None
        self._filled: set[Slot] = set()
        self._rows: dict[Slot, Tensor] = {}
        self._dictionary: tuple[list[Slot], SketchDictionary] | None = None
        self._codes: tuple[Tensor, Decoder | None, dict[Slot, tuple[Tensor, Tensor]]] | None = None

    @property
    @abc.abstractmethod
    def slots(self) -> list[Slot]:
        """Where objects are or may be, in order."""

    @property
    def d(self) -> int:
        """Dimension of the sketch before anything of it is erased."""
        return self.sketcher.d

    @property
    def vector(self) -> Tensor | None:
        return self._vector

    @vector.setter
    def vector(self, vector: Tensor) -> None:
        _check.finite("vector", _check.tensor("vector", vector))
        if vector.dim() == 0 or vector.shape[-1] > self.d or vector.dtype != self.sketcher.dtype:
            raise ValueError(
                f"vector must be a sketch (..., {self.d}) of {self.sketcher.dtype}, or a prefix of one, got "
                f"{tuple(vector.shape)} of {vector.dtype}."
            )
        self._vector, self.kept, self._codes = vector, vector.shape[-1], None

    def dictionary(self) -> SketchDictionary:
        """The linear map from all attributes (and for each object a 1 where it is there) to the sketch."""
        if self._dictionary is None or self._dictionary[0] != self.slots or self._dictionary[1].kept != self.kept:
            blocks = [block for slot in self.slots for block in self._blocks(slot)]
            self._dictionary = list(self.slots), SketchDictionary(blocks, self.kept)
        return self._dictionary[1]

    def similarity(self: Self, other: Self | Tensor, baseline: Self | Tensor | None = None) -> Tensor:
        r"""The cosine of two sketches, (...), see `unrolled.sketch.similarity`.

        Args:
            other: a sketch, or its vector.
            baseline: what all sketches have in common, such as the mean of many vectors. Without one, traces of one
                network are alike because the same layers ran, whatever these did.
        """
        common = None if baseline is None else self._other("baseline", baseline)
        return similarity(self._need(), self._other("other", other), common)

    def truncate(self: Self, d_kept: int) -> Self:
        """A copy of which only the first `d_kept` entries are left: it reads worse, not wrong.

        Args:
            d_kept: from 1 to what is there.
        """
        if _check.integer("d_kept", d_kept) > self.kept:
            raise ValueError(f"d_kept must be at most {self.kept}, what is there of the sketch, got {d_kept}.")
        part = copy.copy(self)
        part._filled = set(self._filled)
        part.vector = self._need()[..., :d_kept].clone()
        return part

    def _add(self, slot: Slot, x: Tensor, present: Tensor | None = None) -> None:
        """Add an object to the sketch; samples where `present` is False are left as they are."""
        if slot in self._filled:
            raise ValueError(
                f"{slot.module!r}, position {slot.position}, is in the sketch already: what is added cannot be "
                "replaced. Begin a new sketch."
            )
        if self._vector is not None and x.shape[:-1] != self._vector.shape[:-1]:
            raise ValueError(
                f"the attributes of {slot.module!r} have the batch dimensions {tuple(x.shape[:-1])}, those before "
                f"{tuple(self._vector.shape[:-1])}. All objects of a sketch have the same: where a module sees a part "
                "of the batch, or samples cut into pieces, sketch one sample at a time or leave it out."
            )
        if slot.size <= FEW:
            there = x.new_ones(x.shape[:-1]) if present is None else present.to(x.dtype)
            _check.finite(f"attributes of {slot.module!r}", x)
            sketch = torch.cat((x * there.unsqueeze(-1), there.unsqueeze(-1)), -1) @ self._rows_of(slot)
        else:
            sketch = self._weight * self._position(slot)(self.sketcher.attribute_sketch(slot.module, x))
            sketch = sketch if present is None else sketch * present.unsqueeze(-1).to(sketch.dtype)
        sketch = sketch[..., : self.kept]
        self._vector = sketch if self._vector is None else self._vector + sketch
        self._filled.add(slot)
        self._codes = None

    @torch.no_grad()
    def _rows_of(self, slot: Slot) -> Tensor:
        """What each attribute of a slot, and its being there, adds to the sketch: (size + 1, d)."""
        if slot not in self._rows:
            eyes = (torch.eye(n, dtype=self.sketcher.dtype, device=self.sketcher.device) for n in (slot.size, 1))
            blocks = zip(self._blocks(slot), eyes, strict=True)
            self._rows[slot] = torch.cat([block.forward(eye) for block, eye in blocks])
        return self._rows[slot]

    def _clear(self) -> None:
        self._vector, self._codes, self.kept = None, None, self.d
        self._filled = set()

    def _position(self, slot: Slot) -> Rotation:
        return self.sketcher.rotation("position", slot.position)

    def _blocks(self, slot: Slot) -> list[Block]:
        rotation = self.sketcher.rotation
        position, weight = self._position(slot), self._weight / 2
        return [
            Block(slot.size, (position, rotation("attributes", slot.module)), weight),
            Block(1, (position, rotation("module", slot.module)), weight),
        ]

    def _read(self, decoder: Decoder | None) -> dict[Slot, tuple[Tensor, Tensor]]:
        """Of every slot the attributes (..., size) and how much an object is there, (...): 1 or 0, and noise."""
        vector = self._need()
        if self._codes is None or self._codes[0] is not vector or self._codes[1] != decoder:
            dictionary = self.dictionary()
            parts = iter((decoder or best_decoder(dictionary))(dictionary, vector).split(dictionary.sizes, -1))
            found = {slot: (next(parts), next(parts).squeeze(-1)) for slot in self.slots}
            self._codes = vector, decoder, found
        return self._codes[2]

    def _of_module(self, module: str, decoder: Decoder | None) -> list[tuple[Tensor, Tensor]]:
        known = list(dict.fromkeys(slot.module for slot in self.slots))
        if module not in known:
            raise ValueError(
                f"module {module!r} is not in this sketch; it has: {', '.join(map(repr, known)) or 'none'}."
            )
        return [found for slot, found in self._read(decoder).items() if slot.module == module]

    def count(self, module: str, *, decoder: Decoder | None = None) -> Tensor:
        """How many objects of a module are in the sketch of each sample, (...).

        Args:
            module: its name.
            decoder: how to read; least squares where it is determined, else the matched filter, if not given.
        """
        return torch.stack([there for _, there in self._of_module(module, decoder)]).sum(0)

    def mean(self, module: str, *, decoder: Decoder | None = None) -> Tensor:
        """The mean of the attributes of the objects of a module, (..., size); 0 where there is none.

        Args:
            module: its name.
            decoder: as for `count`.
        """
        found = self._of_module(module, decoder)
        if len({x.shape[-1] for x, _ in found}) > 1:
            raise ValueError(f"the objects of {module!r} have different numbers of attributes: there is no mean.")
        count = self.count(module, decoder=decoder).round().clamp(min=1)
        return torch.stack([x for x, _ in found]).sum(0) / count.unsqueeze(-1)

    def _need(self) -> Tensor:
        if self._vector is None:
            raise RuntimeError("nothing is in the sketch yet: record something first.")
        return self._vector

    def _other(self, name: str, other: FlatSketch | Tensor) -> Tensor:
        if not isinstance(other, FlatSketch):
            return other
        if (other.d, other.sketcher.seed) != (self.d, self.sketcher.seed):
            raise ValueError(
                f"{name} has d={other.d} and seed={other.sketcher.seed}, this sketch d={self.d} and "
                f"seed={self.sketcher.seed}: they share no rotations. Make both with the same settings."
            )
        return other._need()
