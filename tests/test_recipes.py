"""The recipes: what the greedy search sets is what the networks then do, and training goes on from there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from unrolled import LISTA, Unroll, operators, recipes, solvers
from unrolled.metrics import nmse_db, per_sample_nmse_db
from unrolled.problems import SparseRecovery
from unrolled.recipes import recovery, search
from unrolled.sparse import (
    ALISTA,
    GLISTA,
    LAMP,
    LFISTA,
    LISTACP,
    NAALISTA,
    HyperLISTA,
    StepLISTA,
    SupportSelection,
    TiLISTA,
    analytic_weight,
)

PROBLEM = SparseRecovery(24, 48, sparsity=0.06, dtype=torch.float64)
SELECTION = SupportSelection(rate=2.0, maximum=8.0)
LAYERS = 5

GREEDY: dict[str, Callable[[torch.Tensor], Unroll]] = {
    "ALISTA": lambda A: ALISTA(A, LAYERS, support_selection=SELECTION),
    "ALISTA, soft": lambda A: ALISTA(A, LAYERS, support_selection=None),
    "TiLISTA": lambda A: TiLISTA(A, LAYERS, support_selection=SELECTION),
    "LISTA-CP": lambda A: LISTACP(A, LAYERS),
    "LISTA-CPSS": lambda A: LISTACP(A, LAYERS, support_selection=SELECTION),
    "GLISTA": lambda A: GLISTA(A, LAYERS, support_selection=SELECTION),
    "LISTA": lambda A: LISTA(A, LAYERS, alpha=0.4),
    "LISTA, factored": lambda A: LISTA(A, LAYERS, alpha=0.4, factored=True),
    "LFISTA": lambda A: LFISTA(A, LAYERS, alpha=0.4),
    "LAMP": lambda A: LAMP(A, LAYERS),
}
OTHERS: dict[str, Callable[[torch.Tensor], Unroll]] = {
    "NAALISTA": lambda A: NAALISTA(A, LAYERS, hidden=8, support_selection=SELECTION),
    "HyperLISTA": lambda A: HyperLISTA(A, LAYERS),
    "StepLISTA": lambda A: StepLISTA(A, LAYERS, alpha=0.1),
    "StepLISTA, momentum": lambda A: StepLISTA(A, LAYERS, alpha=0.1, momentum=True),
}


def _scramble(net: Unroll) -> Unroll:
    """Other parameters than those of the start: greedy must not depend on any."""
    with torch.no_grad():
        for k, parameter in enumerate(net.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))
    return net


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_reaches_with_the_network_what_it_says(name: str) -> None:
    net = _scramble(GREEDY[name](PROBLEM.dictionary))
    reached = recipes.greedy(net, PROBLEM, num_signals=100)
    y, x = next(PROBLEM.batches(100))
    assert reached == pytest.approx([nmse_db(found, x) for found in net.iterates(y)], abs=1e-6)
    assert all(after < before for before, after in itertools.pairwise([0.0, *reached]))
    unseen = PROBLEM.validation(300)
    assert nmse_db(net(unseen.y), unseen.x) < -7  # ISTA is at -2 dB


def test_what_is_not_set_may_be_shared() -> None:
    for net in (
        LISTA(PROBLEM.dictionary, 3, alpha=0.1, factored=True, tied=("dictionary",)),
        LAMP(PROBLEM.dictionary, 1),
    ):
        assert recipes.greedy(net, PROBLEM, num_signals=50)[-1] < -3


def test_ista_is_far_behind() -> None:
    y, x = PROBLEM.validation(300)
    assert nmse_db(solvers.ista(PROBLEM.dictionary, y, 0.1, num_iters=LAYERS), x) > -6


def test_no_other_number_of_the_last_layer_is_much_better() -> None:
    net = GREEDY["ALISTA"](PROBLEM.dictionary)
    (*_, reached) = recipes.greedy(net, PROBLEM, num_signals=100)
    y, x = next(PROBLEM.batches(100))
    step = net[-1]
    start = step.log_gamma.item(), step.log_theta.item()
    with torch.no_grad():
        for gamma, theta in itertools.product((-0.3, 0.0, 0.3), (-0.5, 0.0, 0.5)):
            step.log_gamma.fill_(start[0] + gamma)
            step.log_theta.fill_(start[1] + theta)
            assert nmse_db(net(y), x) > reached - 0.05


def test_greedy_keeps_the_weight_of_alista_and_gives_tilista_the_analytic_one() -> None:
    weight = analytic_weight(PROBLEM.dictionary, damping=0.3)
    net = ALISTA(PROBLEM.dictionary, LAYERS, weight=weight)
    recipes.greedy(net, PROBLEM, num_signals=50)
    assert torch.equal(net[0].weight.matrix, weight)
    net = GREEDY["TiLISTA"](PROBLEM.dictionary)
    recipes.greedy(net, PROBLEM, num_signals=50)
    assert torch.equal(net[-1].weight.matrix, analytic_weight(PROBLEM.dictionary))


@pytest.mark.parametrize(("snr", "damped"), [(None, False), (10.0, True)])
def test_noise_asks_for_damping(snr: float | None, damped: bool) -> None:
    problem = SparseRecovery(40, 80, sparsity=0.06, snr=snr, condition_number=10.0, dtype=torch.float64)
    net = LISTACP(problem.dictionary, LAYERS)
    recipes.greedy(net, problem, num_signals=200)
    weight = net[-1].weight.matrix
    # Without damping the weight is (A A')^-1 A up to the scale of its columns; with all of it, A.
    cosine = torch.nn.functional.cosine_similarity(weight, problem.dictionary, dim=0).mean()
    undamped = torch.nn.functional.cosine_similarity(
        analytic_weight(problem.dictionary), problem.dictionary, dim=0
    ).mean()
    assert (cosine > (undamped + 1) / 2) == damped


def test_greedy_takes_any_operator_that_alista_takes() -> None:
    kernel = torch.randn(1, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernel = kernel / kernel.square().sum((0, 2, 3), keepdim=True).sqrt()
    A = operators.Convolution(kernel, in_shape=(3, 8, 8))

    class Images:
        dictionary = torch.eye(1)

        def batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            source = torch.Generator().manual_seed(1)
            while True:
                x = torch.randn(batch_size, 3, 8, 8, dtype=torch.float64, generator=source)
                x = x * (torch.rand(x.shape, generator=source) < 0.02)
                yield A(x), x

        def validation(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
            return next(self.batches(count))

    net = ALISTA(A, LAYERS, weight=A, support_selection=SELECTION)
    reached = recipes.greedy(net, Images(), num_signals=20)
    y, x = next(Images().batches(20))
    assert reached == pytest.approx([nmse_db(found, x) for found in net.iterates(y)], abs=1e-6)
    assert reached[-1] < -6


@pytest.mark.parametrize("name", [*GREEDY, *OTHERS])
def test_training_leaves_no_network_worse_than_its_start(name: str) -> None:
    make = {**GREEDY, **OTHERS}[name]
    net, start = make(PROBLEM.dictionary), make(PROBLEM.dictionary)
    history = recipes.train(net, PROBLEM, effort=0.03, batch_size=16)
    if name in GREEDY:
        recipes.greedy(start, PROBLEM, num_signals=400)
    y, x = PROBLEM.validation(1000)
    if isinstance(net, StepLISTA):

        def error(net: Unroll) -> float:
            return solvers.lasso_objective(PROBLEM.dictionary, y, net(y), 0.1).mean().item()
    elif isinstance(net, HyperLISTA):

        def error(net: Unroll) -> float:
            return per_sample_nmse_db(net(y), x)
    else:

        def error(net: Unroll) -> float:
            return nmse_db(net(y), x)

    # What is compared on these signals is the loss, of which a tenth (for NA-ALISTA half) is that of earlier layers.
    assert error(net) < error(start) + (0.0 if name == "StepLISTA" else 0.1)
    assert len(history) == sum(stage.steps for stage in history.stages)
    assert history.seconds > 0
    assert all(p.requires_grad for p in net.parameters())


def test_training_gains_on_the_search() -> None:
    net, start = GREEDY["LISTA-CPSS"](PROBLEM.dictionary), GREEDY["LISTA-CPSS"](PROBLEM.dictionary)
    recipes.greedy(start, PROBLEM, num_signals=400)
    history = recipes.train(net, PROBLEM, effort=0.25)
    y, x = PROBLEM.test(1000)
    assert nmse_db(net(y), x) < nmse_db(start(y), x) - 1
    assert [(stage.name, stage.steps, stage.layers) for stage in history.stages] == [
        ("numbers", 100, LAYERS),
        ("all", 50, LAYERS),
    ]


def test_the_same_training_gives_the_same_weights() -> None:
    nets = [_scramble(GREEDY["GLISTA"](PROBLEM.dictionary)) for _ in range(2)]
    for net in nets:
        recipes.train(net, PROBLEM, effort=0.02)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_stagewise_training_goes_through_all_layers() -> None:
    net = GREEDY["LISTA-CPSS"](PROBLEM.dictionary)
    history = recipes.train(net, PROBLEM, effort=0.02, stagewise=True)
    assert [stage.layers for stage in history.stages] == [LAYERS, *(t for t in range(1, LAYERS + 1) for _ in range(3))]
    y, x = PROBLEM.validation(300)
    assert nmse_db(net(y), x) < -7


def test_hyperlista_is_searched_from_where_it_is() -> None:
    net = HyperLISTA(PROBLEM.dictionary, 8, c1=0.3, c2=1e-3, c3=0.1)
    y, x = PROBLEM.test(300)
    before = per_sample_nmse_db(net(y), x)
    history = recipes.train(net, PROBLEM, effort=0.5)
    assert len(history) == 31  # the start, and 30 points
    assert min(history.loss) < history.loss[0] - 3
    assert per_sample_nmse_db(net(y), x) < before - 3


def test_loss_of_the_layers() -> None:
    net = GREEDY["ALISTA"](PROBLEM.dictionary)
    y, x = PROBLEM.validation(20)
    errors = [(found - x).square().sum().log().item() for found in net.iterates(y)]
    expected = errors[4] + 0.3 * sum(errors[1:4]) / 3  # of 5 layers, the first is left out
    assert recovery._LayerErrors(0.3)(net, (y, x)).item() == pytest.approx(expected, rel=1e-12)
    one = net[:1]
    assert recovery._LayerErrors(0.3)(one, (y, x)).item() == pytest.approx(errors[0], rel=1e-12)
    assert recovery._LayerErrors()(net, (0 * y, 0 * x)).isfinite()  # all codes exact


@pytest.mark.parametrize("recipe", [recipes.greedy, recipes.train])
@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda A: ALISTA(A, 4, tied=True), ValueError, "net has tied=True"),
        (lambda A: LISTACP(A, 4, tied=("log_theta",)), ValueError, "log_theta must be set for every layer"),
        (lambda A: LISTA(A, 4, alpha=0.1, tied=("weight",)), ValueError, "weight must be set for every layer"),
        (lambda A: LAMP(A, 4, tied=("weight", "log_lambda")), ValueError, "weight, log_lambda must be set"),
        (lambda A: LISTA(A, 4, alpha=0.1, momentum=True), TypeError, "can't set layers of type Momentum"),
        (lambda A: ALISTA(A[:, :40], 4), ValueError, r"problem has codes torch.float64 \(48,\), the network returns"),
        (lambda A: torch.nn.Linear(24, 48), TypeError, "Linear.*ALISTA, TiLISTA"),
    ],
)
def test_networks_that_cannot_be_set_are_refused(recipe, make, error, match) -> None:
    with pytest.raises(error, match=match):
        recipe(make(PROBLEM.dictionary), PROBLEM)


def test_more_that_is_refused() -> None:
    A = PROBLEM.dictionary
    with pytest.raises(TypeError, match="greedy can't set a HyperLISTA"):
        recipes.greedy(HyperLISTA(A, 4), PROBLEM)
    with pytest.raises(ValueError, match="num_signals must be at least 1"):
        recipes.greedy(ALISTA(A, 4), PROBLEM, num_signals=0)
    with pytest.raises(ValueError, match="effort must be greater than 0"):
        recipes.train(ALISTA(A, 4), PROBLEM, effort=0.0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        recipes.train(ALISTA(A, 4), PROBLEM, batch_size=0)
    with pytest.raises(ValueError, match="stagewise is for networks that learn by gradients"):
        recipes.train(HyperLISTA(A, 4), PROBLEM, stagewise=True)
    convolution = operators.Convolution(torch.ones(1, 2, 3), in_shape=(2, 5))
    with pytest.raises(TypeError, match="greedy needs a matrix"):
        search.Schedule(LISTACP(convolution, 4), PROBLEM)
