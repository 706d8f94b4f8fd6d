"""`Autoencoder` and the losses that learn its dictionary: against their formulas, and what they refuse."""

import copy
import pickle

import pytest
import torch
from torch import nn

from unrolled import LISTA, Autoencoder, fit, solvers
from unrolled.functional import normalize_columns
from unrolled.losses import Classification, DictionaryLearning

F64, C128 = torch.float64, torch.complex128
ALPHA = 0.3


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def autoencoder(dtype=F64, head=False, tied=True):
    D = 3 * randn(6, 10, dtype=dtype)
    torch.manual_seed(0)
    return Autoencoder(
        LISTA(normalize_columns(D), 4, alpha=ALPHA, tied=tied),
        D,
        head=nn.Linear(10, 3, dtype=dtype) if head else None,
    )


@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
def test_the_atoms_are_unit_whatever_is_learned(dtype):
    net = autoencoder(dtype)
    torch.testing.assert_close(net.dictionary, normalize_columns(3 * randn(6, 10, dtype=dtype)))
    with torch.no_grad():
        net.directions.mul_(7.0).add_(0.1)
    torch.testing.assert_close(torch.linalg.vector_norm(net.dictionary, dim=0), torch.ones(10, dtype=F64))
    x = randn(2, 5, 10, seed=1, dtype=dtype)
    torch.testing.assert_close(net.decode(x), x @ net.dictionary.mT)


def test_it_stands_where_its_encoder_could():
    net, y = autoencoder(), randn(5, 6, seed=1)
    assert torch.equal(net(y), net.encoder(y))


def test_copies_pickles_and_states():
    net, y = autoencoder(head=True), randn(5, 6, seed=1)
    other = autoencoder(head=True)
    with torch.no_grad():
        other.directions.mul_(randn(6, 10, seed=2))
    other.load_state_dict(net.state_dict())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), other):
        assert torch.equal(twin.decode(twin(y)), net.decode(net(y)))
        assert torch.equal(twin.head(twin(y)), net.head(net(y)))
    assert net.float().dictionary.dtype == torch.float32


@pytest.mark.parametrize("supervision", [0.0, 0.5])
def test_dictionary_learning_is_the_objective_of_its_name(supervision):
    net, y = autoencoder(), randn(5, 6, seed=1)
    loss = DictionaryLearning(ALPHA, supervision=supervision)(net, y)
    D = net.dictionary.detach()
    values = [solvers.lasso_objective(D, y, x, ALPHA).mean() for x in net.encoder.iterates(y)]
    torch.testing.assert_close(loss, values[-1] + supervision * torch.stack(values[:-1]).mean())


def test_the_gradient_of_the_dictionary_is_the_numeric_one():
    net, y = autoencoder(), randn(5, 6, seed=1)
    x = net(y).detach()

    def objective(directions):
        D = directions / torch.linalg.vector_norm(directions, dim=0)
        return solvers.lasso_objective(D, y, x, ALPHA).mean()

    torch.autograd.gradcheck(objective, net.directions)
    DictionaryLearning(ALPHA)(net, y).backward()
    (expected,) = torch.autograd.grad(objective(net.directions), net.directions)
    torch.testing.assert_close(net.directions.grad, expected)
    # Moving an atom along itself changes nothing.
    radial = (net.directions.grad * net.directions).sum(0)
    torch.testing.assert_close(radial, torch.zeros(10, dtype=F64), rtol=0, atol=1e-12)


def test_learning_recovers_a_dictionary_that_made_the_signals():
    truth = normalize_columns(randn(8, 10, dtype=torch.float32))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 10, generator=generator) * (torch.rand(4000, 10, generator=generator) < 0.15)
    y = x @ truth.mT
    start = normalize_columns(truth + 0.25 * randn(8, 10, seed=2, dtype=torch.float32))
    net = Autoencoder(LISTA(start, 12, alpha=0.05, tied=True), start)

    def alignment():
        return (net.dictionary.mT @ truth).abs().amax(0).mean().item()

    loss, before = DictionaryLearning(0.05), alignment()
    first = loss(net, y).item()
    batches = (y[torch.randint(len(y), (128,), generator=generator)] for _ in range(500))
    fit(net, batches, loss, num_steps=500, optimizer=torch.optim.Adam(net.parameters(), lr=3e-3))
    assert before < 0.9 and alignment() > 0.97
    assert loss(net, y).item() < 0.8 * first


def test_classification_is_cross_entropy_and_objective():
    net, y, labels = autoencoder(head=True), randn(5, 6, seed=1), torch.tensor([0, 1, 2, 0, 1])
    x = net(y)
    entropy = nn.functional.cross_entropy(net.head(x), labels)
    objective = solvers.lasso_objective(net.dictionary, y, x, ALPHA).mean()
    torch.testing.assert_close(Classification(ALPHA, weight=0.0)(net, (y, labels)), entropy)
    torch.testing.assert_close(Classification(ALPHA, weight=0.7)(net, [y, labels]), entropy + 0.7 * objective)
    Classification(ALPHA, weight=0.7)(net, (y, labels)).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Autoencoder(lambda y: y, randn(6, 10)), TypeError, "encoder must be a torch.nn.Module"),
        (lambda: Autoencoder(nn.Identity(), randn(6, 10), head=3), TypeError, "head must be a torch.nn.Module"),
        (lambda: Autoencoder(nn.Identity(), torch.zeros(6, 10)), ValueError, "dictionary has 10 zero atoms"),
        (lambda: DictionaryLearning(0.0), ValueError, "alpha must be greater than 0"),
        (lambda: DictionaryLearning(0.1, supervision=-1.0), ValueError, "supervision must be at least 0"),
        (lambda: Classification(0.1, weight=-1.0), ValueError, "weight must be at least 0"),
        (lambda: DictionaryLearning(0.1)(nn.Identity(), randn(5, 6)), TypeError, "net must be an Autoencoder"),
        (
            lambda: DictionaryLearning(0.1, supervision=1.0)(Autoencoder(nn.Identity(), randn(6, 10)), randn(5, 6)),
            TypeError,
            "net must be an Unroll for supervision=1",
        ),
        (lambda: Classification(0.1, weight=1.0)(autoencoder(), (randn(5, 6), [0])), ValueError, "net has no head"),
        (lambda: Classification(0.1, weight=1.0)(autoencoder(), randn(5, 6)), TypeError, r"a pair \(y, labels\)"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
