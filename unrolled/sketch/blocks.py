"""A sketch as a linear map of what was sketched: the dictionary that every decoder works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from unrolled import _check
from unrolled.operators import LinearOperator


@dataclass(frozen=True, eq=False)
class Block:
    r"""What becomes of one vector $x$ of `size` numbers in a sketch: $w\, A_1 A_2 \cdots A_p\, [x; 0]$.

    Args:
        size: of $x$.
        path: $A_1, \dots, A_p$, from the whole sketch down to the vector.
        weight: $w$, positive.
        key: $B_1, \dots, B_q$, by which a matched filter finds this vector and no other, $B_q^T \cdots B_1^T s$; the
            path itself where not given.
        gain: $g$ with $B_q^T \cdots B_1^T\, w A_1 \cdots A_p \approx g I$; the weight where not given.
    """

    size: int
    path: tuple[LinearOperator, ...]
    weight: float
    key: tuple[LinearOperator, ...] | None = None
    gain: float | None = None

    def forward(self, x: Tensor) -> Tensor:  # (..., size) -> (..., d)
        """What $x$ adds to the sketch."""
        vector = pad(x, (0, self.path[0].in_shape[0] - self.size))
        for operator in reversed(self.path):
            vector = operator(vector)
        return self.weight * vector

    def adjoint(self, sketch: Tensor) -> Tensor:  # (..., d) -> (..., size)
        """The adjoint of `forward`."""
        return self.weight * self._back(self.path, sketch)

    def matched(self, sketch: Tensor) -> Tensor:  # (..., d) -> (..., size)
        """The estimate of a matched filter: $x$ and noise."""
        key = self.path if self.key is None else self.key
        return self._back(key, sketch) / (self.weight if self.gain is None else self.gain)

    def _back(self, operators: tuple[LinearOperator, ...], sketch: Tensor) -> Tensor:
        for operator in operators:
            sketch = operator.adjoint(sketch)
        return sketch[..., : self.size]


class SketchDictionary(LinearOperator):
    r"""$D x = \sum_t D_t x_t$, of which the first `kept` entries are left: vectors in, a sketch out.

    To read a sketch is to solve $s = D x$: by a matched filter, by least squares, or by sparse coding.

    Args:
        blocks: one `Block` for each vector, in their order in $x$.
        kept: how much of the sketch is there; all of it where not given.

    Shape:
        - x: (..., n), the vectors one after the other
        - output: (..., kept)

    Raises:
        ValueError: no block, one that is larger than d, or `kept` is not from 1 to d.

    Example:
        >>> D = SketchDictionary([Block(3, (Rotation(64, seed=t),), weight=0.5) for t in range(2)])
        >>> D(torch.ones(6)).shape, D.columns().shape
        (torch.Size([64]), torch.Size([64, 6]))
    """

    def __init__(self, blocks: Sequence[Block], kept: int | None = None) -> None:
        if not blocks:
            raise ValueError("blocks is empty: there is nothing in the sketch. Record something first.")
        self.d = blocks[0].path[0].out_shape[0]
        self.sizes = [_check.integer("size", block.size) for block in blocks]
        if max(self.sizes) > self.d:
            raise ValueError(f"size of a block must be at most d = {self.d}, got {max(self.sizes)}. Take a larger d.")
        kept = self.d if kept is None else _check.integer("kept", kept)
        if kept > self.d:
            raise ValueError(f"kept must be at most {self.d}, the dimension of the sketch, got {kept}.")
        super().__init__((sum(self.sizes),), (kept,))
        self.blocks = tuple(blocks)
        self._columns: Tensor | None = None

    @property
    def kept(self) -> int:
        """How many entries of the sketch there are."""
        return self.out_shape[0]

    def forward(self, x: Tensor) -> Tensor:
        parts = self.check("x", x, self.in_shape).split(self.sizes, -1)
        total = sum(block.forward(part) for block, part in zip(self.blocks, parts, strict=True))
        assert isinstance(total, Tensor)
        return total[..., : self.kept]

    def adjoint(self, y: Tensor) -> Tensor:
        whole = self._whole(y)
        return torch.cat([block.adjoint(whole) for block in self.blocks], -1)

    def matched(self, y: Tensor) -> Tensor:
        """The matched filter's estimate of all vectors, (..., n)."""
        # What is left of a rotated vector has kept/d of its energy: the entries of a rotation are all alike in size.
        whole = self._whole(y) * (self.d / self.kept)
        return torch.cat([block.matched(whole) for block in self.blocks], -1)

    @torch.no_grad()
    def columns(self) -> Tensor:
        """$D$ itself, (kept, n), computed once; for what has few columns."""
        if self._columns is None:
            numbers = self._numbers()
            eyes = (torch.eye(size, dtype=numbers.dtype, device=numbers.device) for size in self.sizes)
            parts = [block.forward(eye)[:, : self.kept] for block, eye in zip(self.blocks, eyes, strict=True)]
            self._columns = torch.cat(parts).T.contiguous()
        return self._columns

    def _whole(self, y: Tensor) -> Tensor:
        return pad(self.check("y", y, self.out_shape), (0, self.d - self.kept))

    def _numbers(self) -> Tensor:
        # Rotations belong to the sketcher, which shares them with other dictionaries: they are no submodules of this.
        found = self.blocks[0].path[-1]._numbers()
        return torch.empty(0) if found is None else found
