r"""The spectral norm of a Jacobian, sample by sample, by power iteration on $J^T J$ with products alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unrolled._tree import State
from unrolled.gradient.protocol import moving, put

Function = Callable[[list[Tensor]], list[Tensor]]


def state_norm(apply: Callable[[State], State], state: State, batch_dims: int, power_iters: int) -> Tensor:
    """`norm` of a layer, from state to state, over all the tensors that iterations move."""
    return norm(moving(state), lambda x: moving(apply(put(state, x))), batch_dims, power_iters)


def norm(
    at: Sequence[Tensor], function: Function, batch_dims: int, power_iters: int, mask: Tensor | None = None
) -> Tensor:  # (batch)
    r"""$\|J\|_2$ of every sample: the largest value seen, which is a lower estimate.

    The samples of a batch do not influence each other, so that the Jacobian of the batch is block-diagonal and one
    product with it is one for every sample. Complex entries count as two real ones. Always starts at the same vectors.

    Args:
        at: where the Jacobian is taken, tensors (batch, ...).
        function: from such tensors to such tensors.
        batch_dims: how many leading dimensions count samples.
        power_iters: products with J and its transpose, at least 1.
        mask: for one tensor: rows and columns of J that are kept.
    """
    products = _Products(at, function)
    keep = None if mask is None else mask.to(products.at[0].dtype)
    if keep is not None and products.complex[0]:
        keep = keep.unsqueeze(-1)
    source = torch.Generator(at[0].device).manual_seed(0)

    def masked(tensors: list[Tensor]) -> list[Tensor]:
        return tensors if keep is None else [tensors[0] * keep]

    v = [torch.randn(x.shape, generator=source, device=x.device, dtype=x.dtype) for x in products.at]
    v = _unit(masked(v), batch_dims)
    size = _norm(v, batch_dims)
    for k in range(power_iters):
        w = masked(products.forward(v))
        size = _norm(w, batch_dims)
        if k < power_iters - 1:
            v = _unit(masked(products.transposed(w)), batch_dims)
    return size


class _Products:
    """J v and J^T w at one point, from one evaluation of the function.

    J^T w is a backward pass. J v is the derivative of u -> J^T u along v, a second one. Where a function has no second
    derivative, J v is a central difference, right to about five digits in float32.
    """

    def __init__(self, at: Sequence[Tensor], function: Function) -> None:
        self.complex = [x.is_complex() for x in at]
        self.at = [_real(x.detach()).clone().requires_grad_() for x in at]
        self.function = function
        with torch.enable_grad():
            self.value = self._evaluate(self.at)
            self.depends = [y.requires_grad for y in self.value]
            self.dual = [torch.zeros_like(y, requires_grad=True) for y in self.value]
            try:
                self.back = self._transposed(self.dual, create_graph=True)
                self.differs = any(map(_ends_in_error, self.back))
            except RuntimeError:  # an operation that refuses; were the error another one, the backward pass has it too
                self.differs = True

    def transposed(self, w: list[Tensor]) -> list[Tensor]:
        return [g.detach() for g in self._transposed(w, create_graph=False)]

    def forward(self, v: list[Tensor]) -> list[Tensor]:
        if self.differs:
            return self._difference(v)
        pairs = [(g, d) for g, d in zip(self.back, v, strict=True) if g.requires_grad]
        if not pairs:
            return [torch.zeros_like(y) for y in self.value]
        found = torch.autograd.grad(
            [g for g, _ in pairs], self.dual, [d for _, d in pairs], retain_graph=True, materialize_grads=True
        )
        return list(found)

    def _transposed(self, w: list[Tensor], *, create_graph: bool) -> list[Tensor]:
        some = [(y, d) for y, d, depends in zip(self.value, w, self.depends, strict=True) if depends]
        if not some:
            return [torch.zeros_like(x) for x in self.at]
        found = torch.autograd.grad(
            [y for y, _ in some],
            self.at,
            [d for _, d in some],
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )
        return list(found)

    def _difference(self, v: list[Tensor]) -> list[Tensor]:
        eps = torch.finfo(self.at[0].dtype).eps ** (1 / 3)
        pairs = list(zip(self.at, v, strict=True))
        width = [eps * max(1.0, float(x.detach().abs().max())) / max(float(d.abs().max()), 1e-30) for x, d in pairs]
        h = min(width)
        with torch.no_grad():
            ahead, behind = (self._evaluate([x + sign * h * d for x, d in pairs]) for sign in (1, -1))
        return [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)]

    def _evaluate(self, real: list[Tensor]) -> list[Tensor]:
        x = [torch.view_as_complex(r) if c else r for r, c in zip(real, self.complex, strict=True)]
        return [_real(y) for y in self.function(x)]


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _norm(tensors: list[Tensor], batch_dims: int) -> Tensor:
    squares = [
        t.detach().square().flatten(batch_dims).sum(-1) if t.dim() > batch_dims else t.detach().square()
        for t in tensors
    ]
    return torch.stack(squares).sum(0).sqrt()


def _unit(tensors: list[Tensor], batch_dims: int) -> list[Tensor]:
    """Divided by the norms of the samples; what is zero stays so."""
    size = _norm(tensors, batch_dims)
    size = torch.where(size > 0, size, 1)
    return [t / size.reshape(size.shape + (1,) * (t.dim() - size.dim())) for t in tensors]


def _ends_in_error(g: Tensor) -> bool:
    """Whether some operation's backward pass cannot be differentiated: asked for it, autograd would leave it out."""
    seen, ahead = set(), [g.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("::Error"):
            return True
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
    return False
