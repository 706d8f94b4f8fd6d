"""What looks at a glimpse and what draws one: the two parts of AIR that depend on what the objects are."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from unrolled import _check


class GlimpseEncoder(nn.Module):
    r"""$q(z_\mathrm{what} \mid \mathrm{glimpse})$: a network of one hidden layer, from pixels to a mean and a spread.

    Args:
        glimpse: shape (C, height, width) of what comes in.
        what_dim: entries of $z_\mathrm{what}$; twice as many come out, the means first.
        hidden: width of the hidden layer.
        device, dtype: of the parameters.

    Shape:
        - input: (batch, C, height, width)
        - output: (batch, 2 what_dim)
    """

    def __init__(
        self,
        glimpse: tuple[int, int, int],
        what_dim: int,
        *,
        hidden: int = 200,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.glimpse = tuple(_check.integer("glimpse", side) for side in glimpse)
        self.what_dim, self.hidden = _check.integer("what_dim", what_dim), _check.integer("hidden", hidden)
        self.inner = nn.Linear(math.prod(self.glimpse), self.hidden, device=device, dtype=dtype)
        self.outer = nn.Linear(self.hidden, 2 * self.what_dim, device=device, dtype=dtype)

    def forward(self, glimpse: Tensor) -> Tensor:
        return self.outer(self.inner(glimpse.flatten(1)).relu())


class GlimpseDecoder(nn.Module):
    r"""$\mathrm{sigmoid}(f(z_\mathrm{what}) + b)$ with $b = -2$: a network of one hidden layer that draws a glimpse.

    The bias makes it begin with nearly empty glimpses. Without it every object begins as a grey square that makes the
    reconstruction worse, and the number of objects goes to 0 before anything is learned.

    Args:
        what_dim: entries of $z_\mathrm{what}$.
        glimpse: shape (C, height, width) of what comes out.
        hidden: width of the hidden layer.
        bias: $b$, added before the sigmoid.
        device, dtype: of the parameters.

    Shape:
        - input: (batch, what_dim)
        - output: (batch, C, height, width), in (0, 1)
    """

    def __init__(
        self,
        what_dim: int,
        glimpse: tuple[int, int, int],
        *,
        hidden: int = 200,
        bias: float = -2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.glimpse = tuple(_check.integer("glimpse", side) for side in glimpse)
        self.bias = _check.real("bias", bias)
        self.what_dim, self.hidden = _check.integer("what_dim", what_dim), _check.integer("hidden", hidden)
        self.inner = nn.Linear(self.what_dim, self.hidden, device=device, dtype=dtype)
        self.outer = nn.Linear(self.hidden, math.prod(self.glimpse), device=device, dtype=dtype)

    def forward(self, what: Tensor) -> Tensor:
        return (self.outer(self.inner(what).relu()) + self.bias).sigmoid().unflatten(1, self.glimpse)

    def extra_repr(self) -> str:
        return f"bias={self.bias:g}"
