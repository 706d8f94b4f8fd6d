"""Synthetic problems with known answers, to train and measure networks on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from unrolled import _check
from unrolled.functional import normalize_columns


class Recovery(NamedTuple):
    """Signals and the sparse codes that they were made of."""

    y: Tensor  # (count, m)
    x: Tensor  # (count, n)


class SparseRecovery:
    r"""$y = D x + e$ with $x_i \sim \mathrm{Bernoulli}(p)\,\mathcal{N}(0, 1)$: find the sparse code x from y.

    The problem that LISTA and its descendants are compared on. Signals are drawn when they are asked for, and are the
    same for the same seed, device type and dtype. The dictionary, training batches, validation and test signals come
    from independent streams of random numbers.

    Unless given, the dictionary has independent Gaussian entries and then unit columns. With a `condition_number`
    $\kappa$, its singular values are replaced by a geometric sequence from 1 to $1/\kappa$ before the columns are made
    unit; this last step changes the condition number again, by a few per cent.

    The noise is white and Gaussian. Its standard deviation is set for every signal by itself:
    $10^{-\mathrm{snr}/20}$ times the standard deviation of the m entries of $D x$. A signal of zeros gets none.

    Args:
        m: entries of a signal; 250, or those of the given dictionary.
        n: atoms; 500, or those of the given dictionary.
        sparsity: probability $p$ of an entry of x to be nonzero, in (0, 1]. Some signals may be all zero.
        snr: signal-to-noise ratio in dB; `None` or infinity for no noise.
        condition_number: at least 1; `None` leaves the Gaussian matrix as it is.
        dictionary: (m, n), atoms as columns, used as it is; `None` draws one.
        seed: of everything that is drawn.
        device, dtype: of everything that is returned; those of the dictionary, or PyTorch's defaults.

    Attributes:
        dictionary: (m, n).

    Raises:
        TypeError: a number that is none, a dictionary that is no floating point matrix.
        ValueError: a number out of its range; `m` or `n` that differs from the dictionary's; both `dictionary` and
            `condition_number`.

    Example:
        >>> problem = SparseRecovery(m=20, n=40, snr=40.0)
        >>> y, x = next(problem.batches(64))
        >>> y.shape, x.shape
        (torch.Size([64, 20]), torch.Size([64, 40]))

    Reference:
        X. Chen, J. Liu, Z. Wang and W. Yin, "Theoretical Linear Convergence of Unfolded ISTA and Its Practical Weights
        and Thresholds", NeurIPS 2018.
    """

    dictionary: Tensor

    def __init__(
        self,
        m: int | None = None,
        n: int | None = None,
        *,
        sparsity: float = 0.1,
        snr: float | None = None,
        condition_number: float | None = None,
        dictionary: Tensor | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.sparsity = _check.real("sparsity", sparsity, above=0.0)
        if self.sparsity > 1:
            raise ValueError(f"sparsity must be at most 1, got {sparsity}. It is the probability of a nonzero entry.")
        self.snr = math.inf if snr is None or snr == math.inf else _check.real("snr", snr, hint="It is in dB.")
        self.seed = _check.integer("seed", seed, minimum=0)
        if dictionary is None:
            shape = _check.integer("m", 250 if m is None else m), _check.integer("n", 500 if n is None else n)
            device, dtype = torch.empty(0, device=device, dtype=dtype).device, dtype or torch.get_default_dtype()
            self.dictionary = self._draw_dictionary(shape, condition_number, device, dtype)
        elif condition_number is not None:
            raise ValueError(
                "condition_number and dictionary exclude each other: a given dictionary is used as it is. "
                "Leave one of them out."
            )
        else:
            _check.dictionary("dictionary", dictionary)
            for name, size, actual in (("m", m, dictionary.shape[0]), ("n", n, dictionary.shape[1])):
                if size is not None and _check.integer(name, size) != actual:
                    raise ValueError(f"{name} is {size}, but the dictionary has shape {tuple(dictionary.shape)}.")
            self.dictionary = dictionary.detach().to(device=device, dtype=dtype)

    def batches(self, batch_size: int = 64, *, start: int = 0) -> Iterator[Recovery]:
        """Fresh training batches without end.

        Args:
            batch_size: signals a batch.
            start: number of the first batch, to go on where an earlier run stopped; costs nothing.
        """
        _check.integer("batch_size", batch_size)
        _check.integer("start", start, minimum=0)
        return self._endless(batch_size, start)

    def validation(self, count: int = 1000) -> Recovery:
        """The validation signals, the same at every call with the same `count`: choose and tune by these."""
        return self._draw("validation", _check.integer("count", count), 0)

    def test(self, count: int = 1000) -> Recovery:
        """The test signals, the same at every call with the same `count`: look at them once, at the end."""
        return self._draw("test", _check.integer("count", count), 0)

    def _endless(self, batch_size: int, index: int) -> Iterator[Recovery]:
        while True:
            yield self._draw("training", batch_size, index)
            index += 1

    def _draw(self, stream: str, count: int, index: int) -> Recovery:
        D = self.dictionary
        source = self._generator(D.device, stream, count, index)
        shape = (count, D.shape[1])
        x = torch.randn(shape, generator=source, device=D.device, dtype=D.dtype)
        x = x * (torch.rand(shape, generator=source, device=D.device) < self.sparsity)
        y = x @ D.mT
        if self.snr < math.inf:
            scale = y.std(-1, correction=0, keepdim=True) * 10 ** (-self.snr / 20)
            y = y + scale * torch.randn(y.shape, generator=source, device=D.device, dtype=D.dtype)
        return Recovery(y, x)

    def _draw_dictionary(
        self, shape: tuple[int, int], condition_number: float | None, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        D = torch.randn(shape, generator=self._generator(device, "dictionary"), device=device, dtype=dtype)
        if condition_number is not None:
            _check.real("condition_number", condition_number, minimum=1.0)
            U, s, Vh = torch.linalg.svd(D, full_matrices=False)
            D = U * torch.logspace(0, -math.log10(condition_number), len(s)).to(D) @ Vh
        return normalize_columns(D)

    def _generator(self, device: torch.device, *key: object) -> torch.Generator:
        """A generator of its own for each key, so that no stream depends on how much was drawn from another."""
        digest = hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)

    def __repr__(self) -> str:
        m, n = self.dictionary.shape
        return f"SparseRecovery(m={m}, n={n}, sparsity={self.sparsity:g}, snr={self.snr:g}, seed={self.seed})"
