"""Lipschitz constants of layers: power iteration by products alone, against Jacobians written out."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.function import once_differentiable

from unrolled import LISTA, Step, Unroll
from unrolled.functional import generalized_threshold
from unrolled.report import LayerReport
from unrolled.report.jacobian import norm

F64 = torch.float64


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact(function, x):
    """The spectral norms of the samples' own Jacobians."""
    return torch.stack([torch.linalg.matrix_norm(torch.func.jacrev(function)(one), 2) for one in x])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x @ randn(6, 4, seed=1),
        lambda x: torch.tanh(x @ randn(6, 6, seed=2)) * x,
        lambda x: torch.relu(x - 0.3) - torch.relu(-x - 0.3),
        lambda x: x.softmax(-1),
    ],
    ids=["linear", "tanh", "soft threshold", "softmax"],
)
def test_it_is_the_norm_of_the_jacobian(function):
    x = randn(5, 6)
    found = norm([x], lambda parts: [function(parts[0])], 1, 400)
    torch.testing.assert_close(found, exact(function, x), rtol=1e-6, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_it_never_exceeds_the_norm_and_grows_with_the_iterations(seed, power_iters):
    M, x = randn(7, 7, seed=seed), randn(1, 7, seed=seed + 1)
    true = torch.linalg.matrix_norm(M, 2)
    less, more = (norm([x], lambda parts: [parts[0] @ M], 1, k) for k in (power_iters, power_iters + 1))
    assert less <= more * (1 + 1e-12) and more <= true * (1 + 1e-12)


def test_batches_complex_numbers_and_masks():
    M = torch.complex(randn(5, 5, seed=3), randn(5, 5, seed=4))
    x = torch.complex(randn(2, 3, 5, seed=5), randn(2, 3, 5, seed=6))
    found = norm([x], lambda parts: [parts[0] @ M], 2, 400)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found, torch.linalg.matrix_norm(M, 2).expand(2, 3), rtol=1e-6, atol=0)
    keep = torch.tensor([True, False, True, True, False])
    masked = norm([x[0]], lambda parts: [parts[0] @ M], 1, 400, keep.expand(3, 5))
    torch.testing.assert_close(masked, torch.linalg.matrix_norm(M[keep][:, keep], 2).expand(3), rtol=1e-6, atol=0)


def test_what_does_not_depend_on_the_state_has_norm_zero():
    x = randn(3, 4)
    assert (norm([x], lambda parts: [torch.ones_like(parts[0])], 1, 5) == 0).all()
    assert (norm([x], lambda parts: [parts[0].detach()], 1, 5) == 0).all()


class Cube(torch.autograd.Function):
    """Without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class Refusing(Cube):
    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise RuntimeError("no second derivative")
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


@pytest.mark.parametrize(("dtype", "rtol"), [(F64, 1e-8), (torch.float32, 1e-3)], ids=str)
@pytest.mark.parametrize("operation", [Cube, Refusing])
def test_without_a_second_derivative_there_are_differences(operation, dtype, rtol):
    x, M = randn(4, 6, dtype=dtype), randn(6, 6, seed=1, dtype=dtype)
    # Autograd would leave the cube out of the second derivative in silence, and find the identity's 1.
    found = norm([x], lambda parts: [operation.apply(parts[0] @ M) + parts[0]], 1, 200)
    torch.testing.assert_close(found, exact(lambda x: (x @ M) ** 3 + x, x), rtol=rtol, atol=0)


def test_a_function_that_fails_is_not_taken_for_one_without_a_second_derivative():
    class Failing(Cube):
        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("a fault of its own")

    with pytest.raises(RuntimeError, match="a fault of its own"):
        norm([randn(2, 3)], lambda parts: [Failing.apply(parts[0])], 1, 3)


def test_a_shrinkage_without_a_second_derivative_in_a_layer():
    class Shrink(Step):
        def init(self, y):
            return y

        def forward(self, x, y):
            return generalized_threshold(x, 0.3, 0.5)

    y = randn(4, 6)
    found = LayerReport(Unroll(Shrink(), 1), y, power_iters=60)
    x = y.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(generalized_threshold(x, 0.3, 0.5).sum(), x)  # every entry by itself
    assert found.value("lipschitz")[0] == pytest.approx(float(slopes.abs().max()), rel=1e-6)


class Pair(NamedTuple):
    a: Tensor
    b: Tensor
    count: Tensor


class Coupled(Step):
    """Two tensors that exchange places, and a counter that the whole batch shares."""

    def init(self, y):
        return Pair(y, 2 * y, y.new_zeros(()))

    def forward(self, state, y):
        return Pair(3 * state.b, state.a + state.b, state.count + 100)

    def readout(self, state):
        return state.a


def test_states_of_several_tensors():
    found = LayerReport(Unroll(Coupled(), 3), randn(4, 5), power_iters=100)
    true = torch.linalg.matrix_norm(torch.tensor([[0.0, 3.0], [1.0, 1.0]]), 2).item()
    assert found.value("lipschitz") == pytest.approx([true] * 3, rel=1e-6)


def test_the_report_takes_the_largest_of_the_first_samples():
    D = torch.nn.functional.normalize(randn(10, 20), dim=0)
    net, y = LISTA(D, 3, alpha=0.1), randn(8, 10, seed=1)
    found = LayerReport(net, y, power_iters=200, num_probes=5)
    x = net.iterates(y)[1].detach()
    context = net[2].prepare(y[0])
    with torch.enable_grad():
        seen = exact(lambda x: net[2](x, context._replace(drive=context.drive.detach())), x[:1])
    each = [LayerReport(net, y[k : k + 1], power_iters=200).value("lipschitz")[2] for k in range(5)]
    assert found.value("lipschitz")[2] == pytest.approx(max(each), rel=1e-9)
    assert each[0] == pytest.approx(float(seen.detach()), rel=1e-6)
