"""Linear operators: `forward` is A x, `adjoint` is A^H y, both over the trailing dimensions of a batch."""

from __future__ import annotations

import abc
import enum
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from unrolled import _check
from unrolled.functional import operator_norm


class LinearOperator(nn.Module, abc.ABC):
    r"""$y = A x$, with the adjoint defined by $\langle A x, y \rangle = \langle x, A^H y \rangle$.

    A subclass calls `super().__init__(in_shape, out_shape)` and writes `forward` and `adjoint`, which take any number
    of leading batch dimensions. Its tensors are parameters where they shall be trained and buffers where not.

    Args:
        in_shape: shape of one x, without batch dimensions.
        out_shape: shape of one y.

    Example:
        >>> class Difference(LinearOperator):
        ...     def forward(self, x):
        ...         return x[..., 1:] - x[..., :-1]
        ...     def adjoint(self, y):
        ...         return -torch.nn.functional.pad(y, (1, 1)).diff()
        >>> A = Difference(in_shape=(4,), out_shape=(3,))
        >>> A(torch.tensor([1.0, 2.0, 4.0, 7.0]))
        tensor([1., 2., 3.])
    """

    def __init__(self, in_shape: Sequence[int], out_shape: Sequence[int]) -> None:
        super().__init__()
        self.in_shape = _shape("in_shape", in_shape)
        self.out_shape = _shape("out_shape", out_shape)

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:  # (..., *in_shape) -> (..., *out_shape)
        """A x."""

    @abc.abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:  # (..., *out_shape) -> (..., *in_shape)
        """A^H y."""

    def norm(self) -> Tensor:
        """The largest singular value, a differentiable scalar: by power iteration where no closed form is known."""
        tensor = self._numbers()
        like = torch.empty(self.in_shape) if tensor is None else tensor.new_empty(self.in_shape)
        return operator_norm(self.forward, self.adjoint, like)

    def check(self, name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return `value`, the argument called `name`, if it is (..., *shape) with this operator's dtype and device."""
        _check.tensor(name, value, allow_complex=True)
        if value.shape[max(0, value.dim() - len(shape)) :] != shape:
            expected = ", ".join(map(str, ("...", *shape)))
            raise ValueError(f"{name} must have shape ({expected}) to fit {self._title()}, got {tuple(value.shape)}.")
        like = self._numbers()
        if like is not None and value.dtype != like.dtype and not _check.autocast(value.device):
            raise TypeError(
                f"{name} is {value.dtype} but {self._title()} is {like.dtype}. Convert one with .to(dtype)."
            )
        if like is not None and value.device != like.device:
            raise ValueError(
                f"{name} is on {value.device} but {self._title()} is on {like.device}. Move one with .to(device)."
            )
        return value

    def _numbers(self) -> Tensor | None:
        """The first floating point or complex tensor: the operator's dtype and device. None: it works with any."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((tensor for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()), None)

    def _title(self) -> str:
        return f"{type(self).__name__}({self.in_shape} -> {self.out_shape})"

    def extra_repr(self) -> str:
        return f"{self.in_shape} -> {self.out_shape}"


class Dense(LinearOperator):
    r"""$y = D x$ with a matrix $D$; $D^H y$ is the adjoint.

    Args:
        matrix: (m, n), real or complex. A Parameter becomes a parameter, to be trained; a Tensor becomes a buffer.

    Shape:
        - x: (..., n)
        - output: (..., m)

    Raises:
        TypeError: `matrix` is no floating point or complex tensor.
        ValueError: it is not two-dimensional, empty, or has NaN or infinity.

    Example:
        >>> A = Dense(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
        >>> A(torch.ones(2)), A.norm()
        (tensor([3., 4., 0.]), tensor(4.))
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        _matrix("matrix", matrix)
        super().__init__(in_shape=matrix.shape[1:], out_shape=matrix.shape[:1])
        _register(self, "matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.check("x", x, self.in_shape), self.matrix)

    def adjoint(self, y: Tensor) -> Tensor:
        return linear(self.check("y", y, self.out_shape), self.matrix.mH)

    def norm(self) -> Tensor:
        """The largest singular value, from the singular value decomposition."""
        # There is no decomposition in half precision.
        matrix = self.matrix.to(torch.promote_types(self.matrix.dtype, torch.float32))
        return torch.linalg.matrix_norm(matrix, 2).to(self.matrix.real.dtype)


class Boundary(enum.Enum):
    """What a convolution meets outside the signal `a b c d`, and so the size of its output."""

    ZERO = enum.auto()  # 0 0 | a b c d | 0 0, output of the same size
    CIRCULAR = enum.auto()  # c d | a b c d | a b, the same size
    REFLECT = enum.auto()  # c b | a b c d | c b, the same size; the edge itself is not repeated
    VALID = enum.auto()  # nothing: the output has size - kernel + 1 entries, those that need no outside


class Convolution(LinearOperator):
    r"""$y_o = \sum_c k_{oc} * x_c$ with the convolution $(k * x)_i = \sum_j k_j\, x_{i - j + \lfloor (K-1)/2 \rfloor}$.

    The kernel is laid out as in `torch.nn.functional.conv2d`, but this is convolution as mathematics has it, where
    torch correlates: an impulse becomes the kernel, not its mirror image. To use the weight of a `torch.nn.Conv2d`,
    pass `weight.flip(-2, -1)`. The output is centred as by `scipy.signal.convolve(mode="same")`; for `Boundary.VALID`
    it is that of `mode="valid"`.

    Args:
        kernel: (C_out, C_in, K) for signals, (C_out, C_in, K_1, K_2) for images, real or complex. A Parameter becomes
            a parameter, to be trained; a Tensor becomes a buffer.
        in_shape: shape of one x, (C_in, size) or (C_in, height, width).
        boundary: what lies outside of x, see `Boundary`.

    Shape:
        - x: (..., *in_shape)
        - output: (..., C_out, size) or (..., C_out, height, width), smaller for `Boundary.VALID`

    Raises:
        TypeError: `kernel` is no floating point or complex tensor, or `boundary` no `Boundary`.
        ValueError: `kernel` and `in_shape` do not fit each other, or the kernel is too large for this boundary.

    Example:
        >>> blur = Convolution(torch.full((1, 1, 3, 3), 1 / 9), in_shape=(1, 8, 8), boundary=Boundary.REFLECT)
        >>> blur(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 1, 8, 8])
    """

    kernel: Tensor

    def __init__(self, kernel: Tensor, in_shape: Sequence[int], *, boundary: Boundary = Boundary.ZERO) -> None:
        _check.finite("kernel", _check.tensor("kernel", kernel, allow_complex=True))
        in_shape = _shape("in_shape", in_shape)
        if kernel.dim() not in (3, 4) or len(in_shape) != kernel.dim() - 1 or in_shape[0] != kernel.shape[1]:
            raise ValueError(
                "kernel (C_out, C_in, K) needs in_shape (C_in, size), kernel (C_out, C_in, K_1, K_2) needs "
                f"in_shape (C_in, height, width); got kernel {tuple(kernel.shape)} and in_shape {in_shape}."
            )
        if not isinstance(boundary, Boundary):
            raise TypeError(f"boundary must be one of {', '.join(map(str, Boundary))}, got {boundary!r}.")
        sizes = tuple(kernel.shape[2:])
        if boundary is not Boundary.ZERO and any(k > size for k, size in zip(sizes, in_shape[1:], strict=True)):
            raise ValueError(
                f"kernel of size {sizes} is larger than x of size {in_shape[1:]}, which only Boundary.ZERO allows, "
                f"got {boundary}. Crop the kernel."
            )
        valid = boundary is Boundary.VALID
        out_sizes = [size - k + 1 if valid else size for k, size in zip(sizes, in_shape[1:], strict=True)]
        super().__init__(in_shape, (len(kernel), *out_sizes))
        self.boundary = boundary
        # (before, after): how far a kernel reaches beyond the first and the last entry of each axis.
        self._reach = [(0, 0) if valid else (k // 2, (k - 1) // 2) for k in sizes]
        _register(self, "kernel", kernel)

    def forward(self, x: Tensor) -> Tensor:
        self.check("x", x, self.in_shape)
        padded = x.reshape(-1, *self.in_shape)
        for axis, reach in enumerate(self._reach, start=2):
            padded = _extend(padded.transpose(axis, -1), *reach, self.boundary).transpose(axis, -1)
        correlate = nn.functional.conv1d if len(self._reach) == 1 else nn.functional.conv2d
        y = correlate(padded, self._mirrored())
        return y.reshape(*x.shape[: x.dim() - len(self.in_shape)], *self.out_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        self.check("y", y, self.out_shape)
        correlate_adjoint = nn.functional.conv_transpose1d if len(self._reach) == 1 else nn.functional.conv_transpose2d
        x = correlate_adjoint(y.reshape(-1, *self.out_shape), self._mirrored().conj())
        for axis, reach in enumerate(self._reach, start=2):
            x = _fold(x.transpose(axis, -1), *reach, self.boundary).transpose(axis, -1)
        return x.reshape(*y.shape[: y.dim() - len(self.out_shape)], *self.in_shape)

    def norm(self) -> Tensor:
        """The largest singular value: exact for `Boundary.CIRCULAR`, by power iteration for the others."""
        if self.boundary is not Boundary.CIRCULAR:
            return super().norm()
        # The Fourier transform makes a circular convolution one (C_out, C_in) matrix a frequency.
        response = torch.fft.fftn(self.kernel, s=self.in_shape[1:]).flatten(2).movedim(2, 0)
        of_rank_one = 1 in response.shape[1:]  # then its only singular value is the Frobenius norm, much cheaper
        return torch.linalg.matrix_norm(response, "fro" if of_rank_one else 2).amax()

    def _mirrored(self) -> Tensor:
        return self.kernel.flip(tuple(range(2, self.kernel.dim())))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel={tuple(self.kernel.shape[2:])}, boundary={self.boundary}"


def _extend(x: Tensor, before: int, after: int, boundary: Boundary) -> Tensor:
    """Pad the last axis by what the boundary condition says is there."""
    if boundary is Boundary.CIRCULAR:
        return torch.cat((x[..., x.shape[-1] - before :], x, x[..., :after]), -1)
    if boundary is Boundary.REFLECT:
        first, last = x[..., 1 : before + 1], x[..., x.shape[-1] - 1 - after : -1]
        return torch.cat((first.flip(-1), x, last.flip(-1)), -1)
    return pad(x, (before, after))


def _fold(y: Tensor, before: int, after: int, boundary: Boundary) -> Tensor:
    """The adjoint of `_extend`: every padded entry is added where it was copied from."""
    size = y.shape[-1] - before - after
    first, x, last = y.split((before, size, after), -1)
    if boundary is Boundary.CIRCULAR:
        return x + pad(first, (size - before, 0)) + pad(last, (0, size - after))
    if boundary is Boundary.REFLECT:
        return x + pad(first.flip(-1), (1, size - 1 - before)) + pad(last.flip(-1), (size - 1 - after, 1))
    return x


class Subsampling(LinearOperator):
    r"""$y = x_\Omega$: the entries of $x$ where the mask is True; the adjoint puts them back and zeros elsewhere.

    Works with real and complex x of any dtype. Its norm is 1.

    Args:
        mask: bool, which entries to keep, with at least one True.
        in_shape: shape of one x, to which the mask is broadcast (say one mask for all channels); the mask's own shape
            where not given.

    Shape:
        - x: (..., *in_shape)
        - output: (..., count), in the order of `x[mask]`

    Raises:
        TypeError: `mask` is no bool tensor.
        ValueError: it keeps nothing or does not fit `in_shape`.

    Example:
        >>> A = Subsampling(torch.tensor([True, False, True]))
        >>> A(torch.tensor([1.0, 2.0, 3.0])), A.adjoint(torch.tensor([5.0, 6.0]))
        (tensor([1., 3.]), tensor([5., 0., 6.]))
    """

    index: Tensor  # (count,) positions in the flattened x

    def __init__(self, mask: Tensor, in_shape: Sequence[int] | None = None) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, got {kind}. Write e.g. mask > 0.5.")
        in_shape = _shape("in_shape", mask.shape if in_shape is None else in_shape)
        try:
            index = mask.expand(in_shape).flatten().nonzero().flatten()
        except RuntimeError:
            raise ValueError(f"mask of shape {tuple(mask.shape)} cannot be broadcast to in_shape {in_shape}.") from None
        if len(index) == 0:
            raise ValueError("mask is False everywhere: it must keep at least one entry.")
        super().__init__(in_shape, (len(index),))
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return self.check("x", x, self.in_shape).flatten(-len(self.in_shape)).index_select(-1, self.index)

    def adjoint(self, y: Tensor) -> Tensor:
        self.check("y", y, self.out_shape)
        x = y.new_zeros(*y.shape[:-1], *self.in_shape).flatten(-len(self.in_shape))
        return x.scatter(-1, self.index.expand(y.shape), y).unflatten(-1, self.in_shape)

    def norm(self) -> Tensor:
        return torch.ones((), device=self.index.device)


class Composition(LinearOperator):
    r"""$y = A_1 A_2 \cdots A_N x$: the last operator is applied first, as matrices are written.

    Args:
        *operators: $A_1, \dots, A_N$, at least one; each takes what the next one gives.

    Raises:
        TypeError: one of them is no `LinearOperator`.
        ValueError: there is none, or two neighbours do not fit.

    Example:
        >>> blur = Convolution(torch.ones(1, 1, 3) / 3, in_shape=(1, 6))
        >>> every_other = Subsampling(torch.arange(6).reshape(1, 6) % 2 == 0)
        >>> Composition(every_other, blur)(torch.ones(1, 6))
        tensor([0.6667, 1.0000, 1.0000])
    """

    operators: Sequence[LinearOperator]

    def __init__(self, *operators: LinearOperator) -> None:
        if not operators:
            raise ValueError("operators: a Composition needs at least one operator.")
        for k, operator in enumerate(operators):
            if not isinstance(operator, LinearOperator):
                raise TypeError(
                    f"operators[{k}] must be a LinearOperator, got {type(operator).__name__}. Wrap a matrix in Dense."
                )
        for k, (left, right) in enumerate(itertools.pairwise(operators)):
            if left.in_shape != right.out_shape:
                raise ValueError(
                    f"operators[{k}], {left._title()}, cannot take what operators[{k + 1}], {right._title()}, gives. "
                    "The last operator is applied first."
                )
        super().__init__(operators[-1].in_shape, operators[0].out_shape)
        self.operators = nn.ModuleList(operators)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        for operator in reversed(self.operators):
            x = operator(x)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        for operator in self.operators:
            y = operator.adjoint(y)
        return y


def as_operator(dictionary: Tensor | LinearOperator) -> LinearOperator:
    """A matrix (m, n), wrapped in `Dense`; a `LinearOperator` as it is.

    Args:
        dictionary: the matrix, atoms as columns, or the operator.

    Raises:
        TypeError: it is neither, or a matrix that is not floating point or complex.
        ValueError: a tensor that is no matrix, is empty, or has NaN or infinity.
    """
    if isinstance(dictionary, LinearOperator):
        return dictionary
    if isinstance(dictionary, Tensor):
        return Dense(_matrix("dictionary", dictionary))
    raise TypeError(
        "dictionary must be a matrix (m, n) with atoms as columns, as a torch.Tensor, or a LinearOperator; got "
        f"{type(dictionary).__name__}. Convert an array by torch.as_tensor; for functions, subclass LinearOperator."
    )


def _matrix(name: str, value: Tensor) -> Tensor:
    _check.tensor(name, value, allow_complex=True)
    if value.dim() != 2:
        raise ValueError(
            f"{name} must have shape (m, n) and map (..., n) to (..., m), got {tuple(value.shape)}. As a dictionary it "
            "has atoms as columns: of scikit-learn's components_ pass the transpose."
        )
    return _check.finite(name, value)


def _shape(name: str, value: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) == 0:
        raise TypeError(f"{name} must be a non-empty tuple of sizes such as (1, 28, 28), got {value!r}.")
    return tuple(_check.integer(f"{name}[{k}]", size) for k, size in enumerate(value))


def _register(module: nn.Module, name: str, value: Tensor) -> None:
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)
