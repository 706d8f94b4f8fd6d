"""The losses: against their formulas, and what they refuse."""

import pytest
import torch

from unrolled import LISTA, Trace, solvers
from unrolled.losses import CodeError, Lasso
from unrolled.operators import Convolution
from unrolled.sparse import StepLISTA

F64, C128 = torch.float64, torch.complex128


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def coder(dtype=F64):
    return LISTA(randn(6, 10, dtype=dtype), 4, alpha=0.3, tied=True)


@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6)], ids=str)
def test_lasso_is_the_mean_objective(shape, dtype):
    dictionary, y, net = randn(6, 10, dtype=dtype), randn(*shape, seed=1, dtype=dtype), coder(dtype)
    loss = Lasso(dictionary, alpha=0.7)(net, y)
    x = net(y)
    torch.testing.assert_close(loss, solvers.lasso_objective(dictionary, y, x, 0.7).mean())
    misfit = (y - x @ dictionary.mT).abs().square().sum(-1) / 2 + 0.7 * x.abs().sum(-1)
    torch.testing.assert_close(loss, misfit.mean())
    assert loss.shape == () and loss.dtype == F64


def test_lasso_teaches_the_network_and_nothing_else():
    dictionary = randn(6, 10).requires_grad_()
    loss, net, y = Lasso(dictionary, alpha=0.7), coder(), randn(5, 6, seed=1)
    loss(net, y).backward()
    assert dictionary.grad is None and not list(loss.parameters())
    assert list(loss.state_dict()) == ["dictionary"]
    expected = torch.autograd.grad(
        solvers.lasso_objective(dictionary.detach(), y, net(y), 0.7).mean(), net.parameters()
    )
    torch.testing.assert_close([p.grad for p in net.parameters()], list(expected))


def test_lasso_takes_an_operator():
    kernel = torch.nn.Parameter(randn(2, 3, 4))
    A = Convolution(kernel, (3, 8))
    net = StepLISTA(A, 3, alpha=0.3)
    y = randn(5, *A.out_shape, seed=1)
    loss = Lasso(A, alpha=0.7)
    value = loss(net, y)
    torch.testing.assert_close(value, solvers.lasso_objective(A, y, net(y), 0.7).mean())
    assert not any(parameter.requires_grad for parameter in loss.parameters()) and kernel.requires_grad
    with torch.no_grad():
        kernel.mul_(2.0)  # the caller goes on to learn it: the loss stays what it was
    x = net(y).detach()
    before = solvers.lasso_objective(Convolution(kernel.detach() / 2, (3, 8)), y, x, 0.7).mean()
    torch.testing.assert_close(loss(lambda y: x, y), before)


def test_lasso_keeps_the_dictionary_it_was_given():
    dictionary = randn(6, 10)
    before = dictionary.clone()
    loss, net, y = Lasso(dictionary, alpha=0.7), coder(), randn(5, 6, seed=1)
    value = loss(net, y)
    dictionary.mul_(2.0)  # the caller goes on to learn it, say
    torch.testing.assert_close(loss(net, y), value)
    assert torch.equal(loss.dictionary, before)


def test_code_error_is_the_mean_squared_distance():
    net, y, x = coder(), randn(5, 6, seed=1), randn(5, 10, seed=2)
    squares = (net(y) - x).square().sum(-1)
    torch.testing.assert_close(CodeError()(net, (y, x)), squares.mean())
    torch.testing.assert_close(CodeError()(net, [y, x]), squares.mean())  # as a DataLoader gives it
    torch.testing.assert_close(CodeError(log=True)(net, (y, x)), squares.sum().log())

    net, y, x = coder(C128), randn(5, 6, seed=1, dtype=C128), randn(5, 10, seed=2, dtype=C128)
    error = CodeError()(net, (y, x))
    torch.testing.assert_close(error, (net(y) - x).abs().square().sum(-1).mean())
    assert error.dtype == F64


def test_the_logarithm_keeps_its_slope_as_the_error_fades():
    net, y = coder(), randn(5, 6, seed=1)
    slopes = {}
    for log in (False, True):
        for distance in (1e-1, 1e-4):
            x = net(y).detach() + distance
            gradient = torch.autograd.grad(CodeError(log=log)(net, (y, x)), net[0].weight)[0]
            slopes[log, distance] = float(gradient.norm()) * (distance if log else 1.0)
    assert slopes[False, 1e-4] == pytest.approx(1e-3 * slopes[False, 1e-1], rel=1e-6)
    assert slopes[True, 1e-4] == pytest.approx(slopes[True, 1e-1], rel=1e-6)  # grows like 1 / distance


def test_the_network_runs_once_a_loss():
    net, y = coder(), randn(5, 6, seed=1)
    for loss, batch in ((Lasso(randn(6, 10), alpha=0.1), y), (CodeError(), (y, randn(5, 10)))):
        calls = []
        handle = net.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with Trace(net) as trace:
            loss(net, batch)
        handle.remove()
        assert len(calls) == 1 and len(trace) == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((randn(6, 10), 0.0), ValueError, "alpha must be greater than 0"),
        ((randn(6, 10), -0.1), ValueError, "alpha must be greater than 0"),
        ((randn(6, 10), "0.1"), TypeError, "alpha must be a real number"),
        ((randn(10), 0.1), ValueError, r"dictionary must be a matrix \(m, n\)"),
        ((torch.full((2, 2), torch.nan), 0.1), ValueError, "dictionary has 4 NaN"),
        ((torch.zeros(2, 2), 0.1), ValueError, "dictionary has 2 zero atoms"),
        ((randn(6, 10).numpy(), 0.1), TypeError, "dictionary must be a torch.Tensor"),
    ],
)
def test_what_lasso_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Lasso(*arguments)


def test_lasso_refuses_a_network_of_another_dictionary():
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 12\)"):
        Lasso(randn(6, 12), alpha=0.1)(coder(), randn(5, 6))


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((randn(5, 6), randn(5, 9)), ValueError, r"codes have shape \(5, 9\), the network returns \(5, 10\)"),
        ((randn(5, 6), randn(10)), ValueError, r"codes have shape \(10,\)"),
        (randn(5, 6), (TypeError, ValueError), r"batch must be a pair \(y, x\)"),
        (randn(2, 6), (TypeError, ValueError), r"batch must be a pair \(y, x\)"),
        ((randn(5, 6),), (TypeError, ValueError), r"batch must be a pair \(y, x\)"),
    ],
    ids=["codes", "unbatched codes", "signals alone", "two signals", "no codes"],
)
def test_what_code_error_refuses(batch, error, message):
    with pytest.raises(error, match=message):
        CodeError()(coder(), batch)


def test_repr():
    assert repr(Lasso(randn(6, 10), alpha=0.1)) == "Lasso(alpha=0.1)"
    assert repr(CodeError(log=True)) == "CodeError(log=True)"
