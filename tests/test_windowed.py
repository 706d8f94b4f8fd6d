"""Training in windows, each by a loss of its own."""

import itertools

import pytest
import torch
from torch import nn

from unrolled import LISTA, Checkpointed, SC2Net, Tolerance, fit
from unrolled.crf import CRFasRNN, Exact, Spatial
from unrolled.losses import CodeError, Lasso
from unrolled.training.windowed import WindowedLoss

F64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(num_iters=12, kind=LISTA, **options):
    net = kind(randn(6, 10), num_iters, alpha=0.3, **options)
    with torch.no_grad():
        for k, parameter in enumerate(net.parameters()):
            parameter += 0.03 * randn(*parameter.shape, seed=k)
    return net


def crf(num_iters=12):
    return CRFasRNN(3, (Spatial(theta_gamma=1.5, filter=Exact()),), num_iters, dtype=F64)


BATCH = randn(3, 6, seed=1), randn(3, 10, seed=2)


def squared(net, batch):
    return (net(batch[0]) - batch[1]).square().mean()


def by_hand(net, batch, window, inputs):
    """The sum of the losses, every window a network of its own that starts from the detached state of the last."""
    total, state = 0.0, None
    borders = [0, *range(len(net) % window or window, len(net) + 1, window)]
    for begin, end in itertools.pairwise(borders):
        part = net[begin:end]
        last = part.run(*inputs, state=state)
        total = total + (part[0].readout(last) - batch[-1]).square().mean()
        state = last.detach() if isinstance(last, torch.Tensor) else type(last)(*(x.detach() for x in last))
    return total


def slopes(loss, net):
    return torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)


@pytest.mark.parametrize("window", [1, 4, 5, 12])
@pytest.mark.parametrize("tied", [True, False, ("weight",)], ids=str)
def test_it_is_the_sum_over_windows(tied, window):
    net = network(tied=tied)
    loss, expected = WindowedLoss(squared, window)(net, BATCH), by_hand(net, BATCH, window, BATCH[:1])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(slopes(loss, net), slopes(expected, net), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["SC2Net", "CRF"])
def test_other_systems(name):
    """A state of two tensors; a context with more than one input, prepared once for all windows."""
    if name == "SC2Net":
        net, inputs, target = network(kind=SC2Net), BATCH[:1], BATCH[1]
    else:
        net, inputs, target = crf(), (randn(2, 3, 4, 5), 20 * randn(2, 1, 4, 5, seed=1)), randn(2, 3, 4, 5, seed=2)

    def loss(net, batch):
        return (net(*batch[:-1]) - batch[-1]).square().mean()

    found, expected = WindowedLoss(loss, 4)(net, (*inputs, target)), by_hand(net, (*inputs, target), 4, inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slopes(found, net), slopes(expected, net), rtol=1e-11, atol=1e-12)


def test_one_window_is_the_loss_itself():
    net = network(tied=True)
    one, plain = WindowedLoss(squared, 12)(net, BATCH), squared(net, BATCH)
    assert torch.equal(one, plain)
    torch.testing.assert_close(slopes(one, net), slopes(plain, net), rtol=1e-13, atol=0)


def test_every_layer_learns_from_its_own_window_alone():
    net = network()
    short = slopes(WindowedLoss(squared, 4)(net, BATCH), net)
    assert all(g is not None for g in short[3:])
    with torch.no_grad():  # what comes later makes no difference to the first window
        for step in net.steps[4:]:
            step.weight += 0.1
    for one, other in zip(slopes(WindowedLoss(squared, 4)(net, BATCH), net)[:12], short[:12]):
        torch.testing.assert_close(one, other)


def test_zero_grad_before_backward_erases_nothing():
    net = network(tied=True)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    loss = WindowedLoss(squared, 4)(net, BATCH)
    assert all(p.grad is None for p in net.parameters())
    optimizer.zero_grad()
    (2 * loss).backward()
    for p, expected in zip(net.parameters(), slopes(by_hand(net, BATCH, 4, BATCH[:1]), net)):
        torch.testing.assert_close(p.grad, 2 * expected, rtol=1e-12, atol=1e-13)


def test_memory_is_that_of_one_window():
    """The peak of what autograd holds, each storage once, until it is let go."""
    import weakref

    def peak(num_iters, wrapped):
        net = LISTA(randn(6, 10), num_iters, alpha=0.3, tied=True)
        held, now, most = {}, [0], [0]

        class Handle:
            def __init__(self, tensor):
                self.tensor = tensor

        def release(key):
            held[key][1] -= 1
            if held[key][1] == 0:
                now[0] -= held.pop(key)[0]

        def pack(tensor):
            key = tensor.untyped_storage().data_ptr()
            if key not in held:
                held[key] = [tensor.untyped_storage().nbytes(), 0]
                now[0] += held[key][0]
                most[0] = max(most[0], now[0])
            held[key][1] += 1
            handle = Handle(tensor.detach())  # an output that its own node held through Python would be a cycle
            weakref.finalize(handle, release, key)
            return handle

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor):
            loss = WindowedLoss(squared, 4) if wrapped else squared
            loss(net, BATCH).backward()
        return most[0]

    assert peak(96, True) == peak(16, True) <= peak(96, False) / 8


def test_with_fit_and_the_losses_of_the_package():
    net, dictionary = network(24), randn(6, 10)
    y = randn(64, 6, seed=3)
    history = fit(net, [y], WindowedLoss(Lasso(dictionary, alpha=0.3), every=8), num_steps=30)
    assert history.loss[-1] < 0.9 * history.loss[0]
    fit(net, [BATCH], WindowedLoss(CodeError(), every=8), num_steps=2)


def test_a_loss_that_learns():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5, dtype=F64))

        def forward(self, net, batch):
            return (self.scale * net(batch[0]) - batch[1]).square().mean()

    loss, net = Scaled(), network()
    WindowedLoss(loss, 4)(net, BATCH).backward()
    assert loss.scale.grad is not None and loss.scale.grad != 0


def test_without_gradients():
    net = network()
    with torch.no_grad():
        value = WindowedLoss(squared, 4)(net, BATCH)
    assert not value.requires_grad
    torch.testing.assert_close(value, by_hand(net, BATCH, 4, BATCH[:1]).detach())


def test_repr():
    assert "every=8" in repr(WindowedLoss(CodeError(), 8)) and "CodeError" in repr(WindowedLoss(CodeError(), 8))
    assert "squared, every=8" in repr(WindowedLoss(squared, 8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: WindowedLoss(squared, 0), ValueError, "every must be at least 1"),
        (lambda: WindowedLoss(squared, 2.0), TypeError, "every must be an int"),
        (lambda: WindowedLoss(CodeError, 2), TypeError, r"loss must be a function loss\(net, batch\)"),
        (lambda: WindowedLoss(squared, 13)(network(), BATCH), ValueError, "every is 13, the network has 12"),
        (lambda: WindowedLoss(squared, 4)(nn.Linear(6, 10), BATCH), TypeError, "net must be an Unroll, got Linear"),
        (
            lambda: WindowedLoss(squared, 4)(network(gradient=Checkpointed(2)), BATCH),
            ValueError,
            r"gradient=Checkpointed\(every=2\), but here windows",
        ),
        (lambda: WindowedLoss(squared, 4)(network(stop=Tolerance()), BATCH), ValueError, "net has stop=Tolerance"),
        (
            lambda: WindowedLoss(squared, 4)(network(), (randn(3, 6).requires_grad_(), BATCH[1])),
            ValueError,
            "a tensor of the batch requires a gradient",
        ),
        (
            lambda: WindowedLoss(lambda net, batch: squared(net, batch) + squared(net, batch), 4)(network(), BATCH),
            ValueError,
            "called the network twice",
        ),
        (
            lambda: WindowedLoss(lambda net, batch: next(net.parameters()).sum(), 4)(network(), BATCH),
            ValueError,
            "did not call the network",
        ),
        (lambda: WindowedLoss(lambda net, batch: net(batch[0]), 4)(network(), BATCH), ValueError, "a real scalar"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
