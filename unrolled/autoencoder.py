"""`Autoencoder`: an unrolled encoder, a dictionary learned with it, and a head on the codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled.functional import normalize_columns


class Autoencoder(nn.Module):
    r"""$x = \mathrm{encoder}(y)$, $\hat y = D x$ with unit atoms $d_j = v_j / \|v_j\|_2$: a dictionary that learns too.

    Calling it returns the codes, so it stands wherever its encoder could. Train it with `unrolled.losses`:
    `DictionaryLearning` for codes and dictionary from signals alone, `Classification` for a head with them. Unit atoms
    keep the codes from shrinking at the atoms' expense.

    Args:
        encoder: maps signals (..., m) to codes (..., n), such as `LISTA(dictionary, 16, alpha=0.1)`.
        dictionary: $D$ to start from, (m, n), atoms as columns; they are divided by their norms.
        head: maps codes to what is learned from them, such as `torch.nn.Linear(n, 10)` to class scores.
        device, dtype: of the dictionary; its own where not given.

    Shape:
        - y: (..., m)
        - output: (..., n)

    Raises:
        TypeError: `encoder` or `head` is no module, `dictionary` no floating point or complex tensor.
        ValueError: `dictionary` is no finite matrix without zero atoms.

    Example:
        >>> D = torch.nn.functional.normalize(torch.randn(64, 100), dim=0)
        >>> net = Autoencoder(LISTA(D, 8, alpha=0.1), D, head=torch.nn.Linear(100, 10))
        >>> codes = net(torch.randn(5, 64))
        >>> net.decode(codes).shape, net.head(codes).shape
        (torch.Size([5, 64]), torch.Size([5, 10]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        dictionary: Tensor,
        head: nn.Module | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, module in (("encoder", encoder), ("head", head)):
            if not isinstance(module, nn.Module) and not (name == "head" and module is None):
                raise TypeError(f"{name} must be a torch.nn.Module, got {module!r}.")
        self.encoder = encoder
        self.head = head
        _check.dictionary("dictionary", dictionary, allow_complex=True)
        start = _check.converted("dictionary", dictionary, device, dtype)
        self.directions = nn.Parameter(torch.empty_like(start, memory_format=torch.contiguous_format))
        self.reset_parameters(dictionary)

    @torch.no_grad()
    def reset_parameters(self, dictionary: Tensor) -> None:
        """The dictionary back to this one. Encoder and head have a `reset_parameters` of their own."""
        self.directions.copy_(normalize_columns(dictionary))

    @property
    def dictionary(self) -> Tensor:
        """$D$, (m, n), with unit atoms."""
        return self.directions / torch.linalg.vector_norm(self.directions, dim=0)

    def decode(self, x: Tensor) -> Tensor:  # (..., n) -> (..., m)
        """D x of every code."""
        return nn.functional.linear(x, self.dictionary)

    def forward(self, y: Tensor) -> Any:
        return self.encoder(y)

    def extra_repr(self) -> str:
        m, n = self.directions.shape
        return f"signal={m}, atoms={n}"
