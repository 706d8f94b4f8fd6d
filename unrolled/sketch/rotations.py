"""Random rotations without a matrix: signs, a permutation and a cosine transform, the same for a name everywhere."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from unrolled import _check
from unrolled.operators import LinearOperator


def dct(x: Tensor) -> Tensor:
    r"""$X_k = \sqrt{2/d}\, c_k \sum_n x_n \cos\bigl(\pi (2n + 1) k / 2d\bigr)$, $c_0 = \sqrt{1/2}$, else $c_k = 1$.

    The orthonormal cosine transform (DCT-II) over the last dimension, by one real FFT of the same length.

    Args:
        x: real, float32 or float64.

    Shape:
        - x, output: (..., d), any d

    Raises:
        TypeError: `x` is no floating point tensor.
        ValueError: it is empty or has no dimension.

    Example:
        >>> x = torch.randn(5)
        >>> torch.allclose(dct(x).norm(), x.norm()), torch.allclose(dct(x)[0], x.sum() / 5**0.5)
        (True, True)

    Reference:
        J. Makhoul, "A fast cosine transform in one and two dimensions", IEEE Transactions on Acoustics, Speech, and
        Signal Processing 28, 1980.
    """
    d = _length("x", x)
    # The even entries forwards, then the odd ones backwards: of this signal the Fourier transform, turned by a quarter
    # of a sample, holds the cosine transform in its real part, and the mirrored half of it in its imaginary part.
    turned = torch.fft.rfft(torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), -1)) * _twiddle(d, x)
    head, tail = turned.real, turned.imag[..., 1 : (d + 1) // 2].flip(-1)
    return torch.cat((head, -tail), -1) * _scale(d, x)


def idct(x: Tensor) -> Tensor:
    r"""$x = C^T X$: the inverse of `dct`, which is its adjoint.

    Args:
        x: real, float32 or float64.

    Shape:
        - x, output: (..., d), any d

    Raises:
        TypeError, ValueError: as `dct`.

    Example:
        >>> x = torch.randn(3, 7)
        >>> torch.allclose(idct(dct(x)), x, atol=1e-6)
        True
    """
    d = _length("x", x)
    plain = x / _scale(d, x)
    half = d // 2 + 1
    # The imaginary part of entry k is minus the cosine transform at d - k; that of entry 0 is zero.
    mirrored = torch.cat((torch.zeros_like(plain[..., :1]), plain[..., d - half + 1 :].flip(-1)), -1)
    reordered = torch.fft.irfft(torch.complex(plain[..., :half], -mirrored) * _twiddle(d, x).conj(), n=d)
    middle = (d + 1) // 2
    result = torch.empty_like(reordered)
    result[..., ::2] = reordered[..., :middle]
    result[..., 1::2] = reordered[..., middle:].flip(-1)
    return result


class Rotation(LinearOperator):
    r"""$R v = a \odot \mathrm{DCT}(b \odot v_\pi)$ with random signs $a$, $b$ and a random permutation $\pi$.

    Orthonormal to rounding for every `d`, so that the adjoint is the inverse, and $O(d \log d)$: what is stored are
    three vectors, never a matrix. It takes two different seeds to two rotations whose columns are nearly orthogonal,
    with inner products of about $d^{-1/2}$.

    Args:
        d: dimension, at least 1.
        seed: an int. The same seed gives the same rotation in another process, whatever has drawn random numbers.
        device, dtype: of the signs; the CPU and torch's default dtype where not given.

    Shape:
        - v, output: (..., d)

    Raises:
        TypeError: `d` or `seed` is no int, or a `v` of another dtype.
        ValueError: `d` is less than 1, `seed` negative, a `v` of another length.

    Example:
        >>> R = Rotation(256, seed=3)
        >>> v = torch.randn(5, 256)
        >>> torch.allclose(R(v).norm(dim=-1), v.norm(dim=-1)), torch.allclose(R.adjoint(R(v)), v, atol=1e-6)
        (True, True)
    """

    output_signs: Tensor  # a
    input_signs: Tensor  # b
    order: Tensor  # pi

    def __init__(
        self, d: int, seed: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        d = _check.integer("d", d)
        self.seed = _check.integer("seed", seed, minimum=0)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be torch.float32 or torch.float64 for the cosine transform, got {dtype}.")
        super().__init__((d,), (d,))
        generator = torch.Generator().manual_seed(seed)
        for name in ("output_signs", "input_signs"):
            signs = 2 * torch.randint(2, (d,), generator=generator, device="cpu") - 1
            self.register_buffer(name, signs.to(device=device, dtype=dtype), persistent=False)
        order = torch.randperm(d, generator=generator, device="cpu")
        self.register_buffer("order", order.to(device), persistent=False)

    def forward(self, v: Tensor) -> Tensor:
        self.check("v", v, self.in_shape)
        return self.output_signs * dct(self.input_signs * v[..., self.order])

    def adjoint(self, u: Tensor) -> Tensor:
        self.check("u", u, self.out_shape)
        back = self.input_signs * idct(self.output_signs * u)
        return torch.empty_like(back).index_copy(-1, self.order, back)

    def norm(self) -> Tensor:
        """1."""
        return self.output_signs.new_ones(())

    def extra_repr(self) -> str:
        return f"{self.in_shape[0]}, seed={self.seed}"


class Transparent(LinearOperator):
    r"""$T v = \tfrac12 (I + R) v$: half of what comes in passes as it is, half is rotated.

    Args:
        rotation: $R$.

    Shape:
        - v, output: (..., d)

    Example:
        >>> T = Transparent(Rotation(64, seed=0))
        >>> v = torch.randn(64)
        >>> torch.allclose(2 * T(v) - v, Rotation(64, seed=0)(v), atol=1e-6)
        True
    """

    def __init__(self, rotation: Rotation) -> None:
        super().__init__(rotation.in_shape, rotation.out_shape)
        self.rotation = rotation

    def forward(self, v: Tensor) -> Tensor:
        return (v + self.rotation(v)) / 2

    def adjoint(self, u: Tensor) -> Tensor:
        return (u + self.rotation.adjoint(u)) / 2


def seed_of(seed: int, *key: str | int) -> int:
    """A seed for each name: the first 63 bits of a hash of `seed` and `key`, the same on every machine.

    Args:
        seed: of the whole family.
        *key: strings and ints.

    Example:
        >>> seed_of(0, "encoder", 1) == seed_of(0, "encoder", 1), seed_of(0, "encoder", 1) == seed_of(0, "encoder", 2)
        (True, False)
    """
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _length(name: str, x: Tensor) -> int:
    if _check.tensor(name, x).dim() == 0:
        raise ValueError(f"{name} must have shape (..., d), got a number.")
    return x.shape[-1]


def _twiddle(d: int, like: Tensor) -> Tensor:
    """exp(-i pi k / 2d) for k = 0 .. d // 2."""
    angle = torch.arange(d // 2 + 1, device=like.device, dtype=torch.float64) * (-math.pi / (2 * d))
    return torch.polar(torch.ones_like(angle), angle).to(
        torch.complex64 if like.dtype == torch.float32 else torch.complex128
    )


def _scale(d: int, like: Tensor) -> Tensor:
    scale = like.new_full((d,), math.sqrt(2 / d))
    scale[0] = math.sqrt(1 / d)
    return scale
