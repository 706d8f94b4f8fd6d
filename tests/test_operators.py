"""Linear operators: against SciPy and dense matrices, and the identities that define adjoint and norm."""

import copy
import pickle

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unrolled.operators import Boundary, Composition, Convolution, Dense, LinearOperator, Subsampling, as_operator

F64, C128 = torch.float64, torch.complex128
BOUNDARIES = list(Boundary)
quick = settings(max_examples=25, deadline=None)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def materialise(A, dtype=F64):
    """The matrix of an operator, column by column."""
    basis = torch.eye(int(np.prod(A.in_shape)), dtype=dtype)
    return A(basis.reshape(-1, *A.in_shape)).flatten(1).mT


def examples(dtype=F64):
    """One operator of every kind."""
    mask = randn(2, 6, 5, seed=9) > 0.3
    kernel = randn(3, 2, 3, 2, seed=1, dtype=dtype)
    blur = Convolution(kernel[:2], (2, 6, 5), boundary=Boundary.REFLECT)
    return {
        "dense": Dense(randn(4, 7, dtype=dtype)),
        "conv1d": Convolution(randn(2, 3, 4, seed=2, dtype=dtype), (3, 9)),
        **{f"conv2d-{b.name}": Convolution(kernel, (2, 6, 5), boundary=b) for b in BOUNDARIES},
        "subsampling": Subsampling(mask),
        "composition": Composition(Subsampling(mask), blur),
        "chain": Composition(Dense(randn(2, 4, seed=3, dtype=dtype)), Dense(randn(4, 7, dtype=dtype))),
    }


every_operator = pytest.mark.parametrize("kind", list(examples()))


def inner(a, b):
    return torch.vdot(a.flatten(), b.flatten())


def assert_adjoint(A, batch, dtype, seed=0):
    x = randn(*batch, *A.in_shape, seed=seed, dtype=dtype)
    y = randn(*batch, *A.out_shape, seed=seed + 1, dtype=dtype)
    Ax, Aty = A(x), A.adjoint(y)
    assert Ax.shape == y.shape and Aty.shape == x.shape
    size = torch.linalg.vector_norm(Ax) * torch.linalg.vector_norm(y) + 1
    assert (inner(y, Ax) - inner(Aty, x)).abs() <= 1e-12 * size


# --- the identities -------------------------------------------------------------------------------------------------


@every_operator
@pytest.mark.parametrize("dtype", [F64, C128])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_adjoint(kind, dtype, batch):
    assert_adjoint(examples(dtype)[kind], batch, dtype)


@quick
@given(st.data())
def test_adjoint_of_any_convolution(data):
    dims = data.draw(st.integers(1, 2))
    sizes = data.draw(st.tuples(*[st.integers(1, 7)] * dims))
    boundary = data.draw(st.sampled_from(BOUNDARIES))
    # Only zeros may surround a kernel larger than the signal.
    kernel = [data.draw(st.integers(1, size + 3 if boundary is Boundary.ZERO else size)) for size in sizes]
    c_out, c_in = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dtype = data.draw(st.sampled_from([F64, C128]))
    A = Convolution(randn(c_out, c_in, *kernel, seed=5, dtype=dtype), (c_in, *sizes), boundary=boundary)
    assert_adjoint(A, data.draw(st.sampled_from([(), (2,), (1, 3)])), dtype)


@quick
@given(st.lists(st.booleans(), min_size=6, max_size=6).filter(any), st.integers(0, 3))
def test_adjoint_of_any_subsampling(kept, channels):
    mask = torch.tensor(kept).reshape(2, 3)
    A = Subsampling(mask) if channels == 0 else Subsampling(mask, (channels, 2, 3))
    assert_adjoint(A, (2,), F64)
    y = randn(4, *A.out_shape)
    assert torch.equal(A(A.adjoint(y)), y)  # A A^H = I


@every_operator
def test_linear_and_batched(kind):
    A = examples()[kind]
    x, z = randn(2, 3, *A.in_shape, seed=1), randn(2, 3, *A.in_shape, seed=2)
    torch.testing.assert_close(A(2 * x - z), 2 * A(x) - A(z), rtol=0, atol=1e-12)
    torch.testing.assert_close(A(x)[1, 2], A(x[1, 2]), rtol=0, atol=1e-12)
    y = A(z)
    torch.testing.assert_close(A.adjoint(y)[1, 2], A.adjoint(y[1, 2]), rtol=0, atol=1e-12)


@every_operator
@pytest.mark.parametrize("dtype", [F64, C128])
def test_norm_is_the_largest_singular_value(kind, dtype):
    A = examples(dtype)[kind]
    exact = torch.linalg.svdvals(materialise(A, dtype))[0]
    closed_form = kind in ("dense", "conv2d-CIRCULAR", "subsampling")
    # Power iteration comes from below; its error is the square of its tolerance, over the relative gap.
    assert exact * (1 - (1e-12 if closed_form else 1e-5)) <= A.norm() <= exact * (1 + 1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 3, 2), (1, 3, 3, 2), (3, 1, 3, 2), (2, 3, 6, 5), (2, 2, 4)])
def test_circular_norm_for_any_channels(shape):
    A = Convolution(randn(*shape), (shape[1], 6, 5)[: len(shape) - 1], boundary=Boundary.CIRCULAR)
    torch.testing.assert_close(A.norm(), torch.linalg.svdvals(materialise(A))[0], rtol=1e-12, atol=0)


# --- against other libraries ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [(1, 1), (3, 3), (2, 4), (4, 5)])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_convolution_is_that_of_scipy(k, boundary):
    kernel, x = randn(1, 1, *k, seed=3), randn(1, 7, 6, seed=4)
    y = Convolution(kernel, (1, 7, 6), boundary=boundary)(x)[0]
    if boundary is Boundary.REFLECT:
        width = [(n // 2, (n - 1) // 2) for n in k]
        expected = scipy.signal.convolve2d(np.pad(x[0].numpy(), width, mode="reflect"), kernel[0, 0], mode="valid")
    else:
        mode = "valid" if boundary is Boundary.VALID else "same"
        wrap = "wrap" if boundary is Boundary.CIRCULAR else "fill"
        expected = scipy.signal.convolve2d(x[0].numpy(), kernel[0, 0].numpy(), mode=mode, boundary=wrap)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("boundary", "mode"), [(Boundary.ZERO, "constant"), (Boundary.CIRCULAR, "wrap"), (Boundary.REFLECT, "mirror")]
)
def test_odd_kernels_are_centred_as_in_ndimage(boundary, mode):
    kernel, x = randn(1, 1, 5, 3, seed=3), randn(1, 7, 6, seed=4)
    y = Convolution(kernel, (1, 7, 6), boundary=boundary)(x)[0]
    np.testing.assert_allclose(y, scipy.ndimage.convolve(x[0].numpy(), kernel[0, 0].numpy(), mode=mode), atol=1e-12)


def test_channels_add_up():
    kernel, x = randn(2, 3, 4), randn(3, 9, seed=1)
    y = Convolution(kernel, (3, 9))(x)
    expected = [sum(scipy.signal.convolve(x[c], kernel[o, c], mode="same") for c in range(3)) for o in range(2)]
    np.testing.assert_allclose(y, np.stack(expected), rtol=0, atol=1e-12)


def test_weights_of_torch_layers_carry_over_by_a_flip():
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False, padding_mode="circular", dtype=F64)
    x = randn(4, 2, 6, 5)
    A = Convolution(layer.weight.flip(-2, -1), (2, 6, 5), boundary=Boundary.CIRCULAR)
    torch.testing.assert_close(A(x), layer(x), rtol=0, atol=1e-12)


def test_subsampling_is_boolean_indexing():
    mask, x = randn(4, 3) > 0, randn(5, 4, 3, seed=1)
    assert torch.equal(Subsampling(mask)(x), x[:, mask])
    both = Subsampling(mask, in_shape=(2, 4, 3))
    image = randn(5, 2, 4, 3)
    assert torch.equal(both(image), image[:, :, mask].flatten(1))


def test_composition_is_the_product():
    A, B, C = Dense(randn(2, 3)), Dense(randn(3, 4, seed=1)), Dense(randn(4, 5, seed=2))
    torch.testing.assert_close(materialise(Composition(A, B, C)), A.matrix @ B.matrix @ C.matrix, rtol=0, atol=1e-12)


# --- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_gradients_of_convolution(boundary):
    kernel, x = randn(2, 1, 3, 2).requires_grad_(), randn(1, 4, 3, seed=1).requires_grad_()
    y = Convolution(kernel, (1, 4, 3), boundary=boundary)(x).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda k, x: Convolution(k, (1, 4, 3), boundary=boundary)(x), (kernel, x))
    assert torch.autograd.gradcheck(lambda k, y: Convolution(k, (1, 4, 3), boundary=boundary).adjoint(y), (kernel, y))


def test_gradient_of_subsampling():
    A = Subsampling(torch.tensor([[True, False], [True, True]]))
    assert torch.autograd.gradcheck(A, randn(2, 2).requires_grad_())
    assert torch.autograd.gradcheck(A.adjoint, randn(3).requires_grad_())


@pytest.mark.parametrize("kind", [kind for kind in examples() if kind != "subsampling"])
def test_gradient_of_the_norm_is_that_of_the_singular_value(kind):
    A = examples()[kind]
    tensors = [b.requires_grad_() for b in A.buffers() if b.is_floating_point()]
    found = torch.autograd.grad(A.norm(), tensors)
    expected = torch.autograd.grad(torch.linalg.matrix_norm(materialise(A), 2), tensors)
    # The power iteration's error enters the gradient to first order: 1e-5 a step, over the relative gap.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


# --- modules --------------------------------------------------------------------------------------------------------


@every_operator
def test_copies_are_the_same_operator(kind):
    A = examples()[kind]
    x = randn(*A.in_shape)
    for twin in (copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        assert torch.equal(twin(x), A(x))
        assert (twin.in_shape, twin.out_shape, repr(twin)) == (A.in_shape, A.out_shape, repr(A))
    other = copy.deepcopy(A)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(A.state_dict())
    assert torch.equal(other(x), A(x))


@every_operator
def test_single_precision(kind):
    A = examples()[kind].float()
    x = randn(*A.in_shape)
    assert A(x.float()).dtype == torch.float32
    torch.testing.assert_close(A(x.float()).double(), examples()[kind](x), rtol=1e-4, atol=1e-5)


def test_parameters_train_and_tensors_do_not():
    trained = nn.Parameter(randn(2, 3))
    assert dict(Dense(trained).named_parameters())["matrix"] is trained
    assert not list(Dense(trained.detach()).parameters()) and "matrix" in Dense(trained.detach()).state_dict()
    assert [name for name, _ in Convolution(nn.Parameter(randn(1, 1, 3)), (1, 5)).named_parameters()] == ["kernel"]


@every_operator
def test_export_with_a_dynamic_batch(kind):
    A = examples()[kind]

    class Normal(nn.Module):  # x -> A^H A x
        def __init__(self):
            super().__init__()
            self.A = A

        def forward(self, x):
            return self.A.adjoint(self.A(x))

    exported = torch.export.export(Normal(), (randn(4, *A.in_shape),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = randn(7, *A.in_shape, seed=2)
    torch.testing.assert_close(exported.module()(x), A.adjoint(A(x)), rtol=0, atol=1e-12)


def test_an_operator_of_ones_own():
    class Scale(LinearOperator):
        def forward(self, x):
            return 3 * self.check("x", x, self.in_shape)

        def adjoint(self, y):
            return 3 * y

    A = Scale((2, 3), (2, 3))
    assert A.norm() == pytest.approx(3) and repr(A) == "Scale((2, 3) -> (2, 3))"
    with pytest.raises(TypeError, match="abstract"):
        LinearOperator((2,), (2,))


def test_as_operator():
    D = randn(3, 4)
    A = as_operator(D)
    assert isinstance(A, Dense) and A.matrix is D and as_operator(A) is A


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Dense(np.eye(3)), TypeError, "matrix must be a torch.Tensor, got ndarray"),
        (lambda: Dense(torch.eye(3).long()), TypeError, "matrix must be floating point or complex"),
        (lambda: Dense(randn(3)), ValueError, r"matrix must have shape \(m, n\).*got \(3,\)"),
        (lambda: Dense(randn(3, 0)), ValueError, "matrix is empty"),
        (lambda: Dense(torch.full((2, 2), torch.nan)), ValueError, "matrix has 4 NaN"),
        (lambda: as_operator([[1.0]]), TypeError, "dictionary must be a matrix.*got list"),
        (lambda: as_operator(randn(3)), ValueError, r"dictionary must have shape \(m, n\)"),
        (lambda: Convolution(randn(3, 3), (3, 3)), ValueError, r"kernel \(C_out.*got kernel \(3, 3\)"),
        (lambda: Convolution(randn(1, 2, 3), (1, 5)), ValueError, r"in_shape \(C_in, size\).*in_shape \(1, 5\)"),
        (lambda: Convolution(randn(1, 1, 3), (1, 5, 5)), ValueError, "in_shape"),
        (lambda: Convolution(randn(1, 1, 3), 5), TypeError, "in_shape must be a non-empty tuple"),
        (lambda: Convolution(randn(1, 1, 3), (1, 0)), ValueError, r"in_shape\[1\] must be at least 1"),
        (
            lambda: Convolution(randn(1, 1, 3), (1, 5), boundary="zero"),
            TypeError,
            "boundary must be one of Boundary.ZE",
        ),
        (lambda: Convolution(randn(1, 1, 6), (1, 5), boundary=Boundary.VALID), ValueError, "kernel of size .* larger"),
        (lambda: Convolution(randn(1, 1, 3) * torch.inf, (1, 5)), ValueError, "kernel has 3 NaN or infinite"),
        (lambda: Subsampling(torch.ones(3)), TypeError, "mask must be a bool tensor, got torch.float32"),
        (lambda: Subsampling([True]), TypeError, "mask must be a bool tensor, got list"),
        (lambda: Subsampling(torch.zeros(3, dtype=torch.bool)), ValueError, "mask is False everywhere"),
        (lambda: Subsampling(torch.ones(3, dtype=torch.bool), (4,)), ValueError, "mask .* in_shape"),
        (lambda: Composition(), ValueError, "operators: .* at least one"),
        (lambda: Composition(randn(2, 2)), TypeError, r"operators\[0\] must be a LinearOperator, got Tensor"),
        (
            lambda: Composition(Dense(randn(2, 3)), Dense(randn(4, 3))),
            ValueError,
            r"operators\[0\], Dense\(\(3,\) -> \(2,\)\), cannot take what operators\[1\], Dense\(\(3,\) -> \(4,\)\)",
        ),
    ],
)
def test_errors_when_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


@every_operator
def test_errors_when_called(kind):
    A = examples()[kind]
    for name, call, shape in (("x", A, A.in_shape), ("y", A.adjoint, A.out_shape)):
        with pytest.raises(ValueError, match=rf"^{name} must have shape \(\.\.\., "):
            call(randn(2, *shape[:-1], shape[-1] + 1))
        with pytest.raises(ValueError, match=rf"^{name} must have shape"):
            call(torch.tensor(1.0, dtype=F64))
        with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor"):
            call(np.zeros(shape))
        with pytest.raises(ValueError, match=f"^{name} is empty"):
            call(randn(0, *shape))
        if kind != "subsampling":  # that one works with any dtype
            with pytest.raises(TypeError, match=r"is torch\.float32 but .* is torch\.float64"):
                call(randn(*shape, dtype=torch.float32))


def test_error_for_another_device():
    with pytest.raises(ValueError, match=r"^x is on meta but Dense\(\(3,\) -> \(2,\)\) is on cpu\. Move"):
        Dense(randn(2, 3))(torch.zeros(3, dtype=F64, device="meta"))
