"""Corrections share what they leave alone, suggestions answer verdicts, and a design keeps its log."""

import copy
import math

import numpy as np
import pytest
import torch

from unrolled import ALISTA, LFISTA, LISTA, LISTACP, StepLISTA, Unroll, fit
from unrolled.gradient import Implicit
from unrolled.losses import Lasso
from unrolled.report import (
    AddMomentum,
    CapLipschitz,
    Design,
    Drop,
    FISTATheory,
    ISTATheory,
    LayerReport,
    Repeat,
    Rules,
    Scale,
    Untie,
)
from unrolled.report.theories import _parameters

F64 = torch.float64
ALPHA = 0.1


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


DICTIONARY = torch.nn.functional.normalize(randn(16, 30), dim=0)
SIGNALS = randn(20, 16, seed=1)
THEORY = ISTATheory(DICTIONARY, ALPHA)


def report(net, theory=THEORY, **options):
    return LayerReport(net, SIGNALS, theory, **options)


def shaken(net, size=0.2):
    """Every layer another one."""
    with torch.no_grad():
        for k, step in enumerate(net.steps):
            for p in step.parameters():
                p += size * 0.1 * randn(*p.shape, seed=k)
    return net


def ista(num_iters=4, **options):
    return LISTA(DICTIONARY, num_iters, alpha=ALPHA, **options)


# ---- Corrections -----------------------------------------------------------------------------------------------------


def test_drop_and_repeat_share_the_layers_that_stay():
    net = shaken(ista())
    found = report(net)
    shorter = found.apply(Drop(1))
    assert type(shorter) is LISTA and len(shorter) == 3
    assert [shorter[k] for k in range(3)] == [net[0], net[2], net[3]]
    longer = found.apply(Repeat(1))
    assert len(longer) == 5 and longer[1] is net[1] and longer[3] is net[2]
    assert longer[2] is not net[1] and torch.equal(longer[2].weight, net[1].weight)
    assert len(net) == 4
    for correction, quantity in ((Drop(1), "removal"), (Repeat(1), "repeat")):
        after = report(found.apply(correction))
        assert after.quality - found.quality == pytest.approx(found.row(quantity, 1).measured, abs=1e-9)


def test_of_a_tied_network_it_is_the_number_of_iterations():
    net = ista(tied=True)
    found = report(net)
    shorter, longer = found.apply(Drop(0)), found.apply(Repeat(3))
    assert (len(shorter), len(longer), len(net)) == (3, 5, 4)
    assert shorter[0] is longer[0] is net[0]
    torch.testing.assert_close(longer(SIGNALS), ista(5, tied=True)(SIGNALS))


def test_untie():
    net = ista(tied=True)
    free = report(net).apply(Untie())
    assert free.tied is False and len(set(map(id, free.steps))) == 4 and free[0] is net[0]
    assert len(list(free.parameters())) == 4 * len(list(net.parameters()))
    torch.testing.assert_close(free(SIGNALS), net(SIGNALS), rtol=0, atol=0)
    partly = LISTACP(DICTIONARY, 4, alpha=ALPHA, tied=("weight",))
    free = report(partly).apply(Untie())
    assert free[0].weight.matrix is not free[1].weight.matrix
    assert free[0].dictionary.matrix is free[3].dictionary.matrix, "what does not learn stays shared"
    moved = copy.deepcopy(free).to(torch.float32)
    assert moved[0].dictionary.matrix is moved[3].dictionary.matrix
    with pytest.raises(ValueError, match="have parameters of their own already"):
        report(ista()).apply(Untie())
    with pytest.raises(ValueError, match="tied=True"):
        report(ista(tied=True, gradient=Implicit())).apply(Untie())


@pytest.mark.parametrize("tied", [True, False, ("weight",)])
def test_momentum_makes_fista(tied):
    net = ista(tied=tied)
    fast = report(net).apply(AddMomentum())
    torch.testing.assert_close(fast(SIGNALS), ista(momentum=True)(SIGNALS))
    assert fast[0].step is net[0]
    assert report(fast, FISTATheory(DICTIONARY, ALPHA)).holds()
    with pytest.raises(ValueError, match="has momentum already"):
        report(fast, None).apply(AddMomentum())
    if tied == ("weight",):
        assert copy.deepcopy(fast).double()[0].step.weight is not fast[0].step.weight
        assert fast[0].step.weight is fast[3].step.weight


@pytest.mark.parametrize(
    "network",
    [
        lambda: ista(),
        lambda: ista(factored=True),
        lambda: ista(tied=True),
        lambda: LISTACP(DICTIONARY, 4, alpha=ALPHA),
        lambda: ALISTA(DICTIONARY, 4, alpha=ALPHA, weight=DICTIONARY / THEORY.L, support_selection=None),
    ],
)
def test_scale_multiplies_step_and_threshold(network):
    net = network()
    before = copy.deepcopy(net.state_dict())
    scaled = report(net).apply(Scale((0.5,) * 4, (2.0,) * 4))
    found = report(scaled)
    np.testing.assert_allclose(found.value("step"), 0.5, rtol=1e-6)
    np.testing.assert_allclose(found.value("threshold"), 2.0, rtol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "the old one is as it was"


def test_scale_of_what_has_one_number_only_or_is_shared():
    found = report(StepLISTA(DICTIONARY, 3, alpha=ALPHA))
    both = report(found.apply(Scale((1.0, 0.5, 1.0))))
    np.testing.assert_allclose(both.value("step"), [1, 0.5, 1], rtol=1e-6)
    assert found.apply(Scale((1.0, 0.5, 1.0)))[0] is found.net[0]
    with pytest.raises(ValueError, match="does not know how to scale a StepLISTAStep"):
        found.apply(Scale((1.0,) * 3, (2.0,) * 3))
    with pytest.raises(ValueError, match="takes one factor"):
        report(ista(tied=True)).apply(Scale((1.0, 2.0, 1.0, 1.0)))
    with pytest.raises(ValueError, match="the layers share weight"):
        report(ista(tied=("weight",))).apply(Scale((1.0, 2.0, 1.0, 1.0)))
    with pytest.raises(ValueError, match="2 factors for 4 layers"):
        report(ista()).apply(Scale((1.0, 2.0)))
    with pytest.raises(ValueError, match="must be greater than 0"):
        Scale((0.0,))


def test_scaling_a_layer_with_momentum_and_matrices_of_its_own():
    for net in (ista(momentum=True), LFISTA(DICTIONARY, 4, alpha=ALPHA)):
        theory = FISTATheory(DICTIONARY, ALPHA)
        found = report(report(net, theory).apply(Scale((0.5,) * 4)), theory)
        np.testing.assert_allclose(found.value("step"), 0.5, rtol=1e-6)


def test_the_cap_goes_no_further_than_it_must():
    net = LISTACP(DICTIONARY, 3, alpha=ALPHA)
    with torch.no_grad():
        net[1].weight.matrix += 0.15 * randn(16, 30, seed=3)
    found = report(net)
    assert "expansive" in found.names(1)
    capped = found.apply(CapLipschitz(1))
    assert capped[0] is net[0] and capped[2] is net[2]
    after = report(capped)
    assert "expansive" not in after.names(1)
    assert 0 < after.row("drift", 1).measured < found.row("drift", 1).measured, "on the way, not at its end"
    assert found.apply(CapLipschitz(1, limit=0.9999)) is not None
    with pytest.raises(ValueError, match="even before training"):
        found.apply(CapLipschitz(1, limit=0.1))


def test_the_cap_needs_to_know_what_was_before_training():
    net = shaken(ALISTA(DICTIONARY, 3, alpha=ALPHA))
    with pytest.raises(ValueError, match="pass untrained="):
        report(net).apply(CapLipschitz(1))


def test_untrained_steps_are_the_classical_ones():
    for net in (
        ista(),
        ista(factored=True),
        ista(momentum=True),
        LISTACP(DICTIONARY, 4, alpha=ALPHA),
        StepLISTA(DICTIONARY, 4, alpha=ALPHA),
    ):
        before = copy.deepcopy(net[2])
        step = _parameters.untrained(shaken(net)[2], THEORY.dictionary, ALPHA, THEORY.L)
        for mine, its in zip(step.parameters(), before.parameters()):
            torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-12)
    assert _parameters.untrained(ALISTA(DICTIONARY, 2, alpha=ALPHA)[0], THEORY.dictionary, ALPHA, THEORY.L) is None


def test_wrong_corrections():
    found = report(ista())
    with pytest.raises(TypeError, match="suggestion must be a Suggestion or a Correction"):
        found.apply("drop layer 3")
    with pytest.raises(ValueError, match="layer must be less than 4"):
        found.apply(Drop(4))
    with pytest.raises(ValueError, match="has one layer"):
        report(ista(1)).apply(Drop(0))
    with pytest.raises(ValueError, match="limit must be greater than 0"):
        CapLipschitz(0, limit=0.0)


# ---- Suggestions -----------------------------------------------------------------------------------------------------


def kinds(found):
    return {type(suggestion.correction) for suggestion in found.suggest()}


def test_a_stalling_solver_is_told_what_helps():
    found = report(ista(tied=True), rules=Rules(stalling=0.5))
    suggestions = {type(s.correction): s for s in found.suggest()}
    assert {AddMomentum, Untie} <= set(suggestions)
    assert suggestions[AddMomentum].effect < 0 and "gains" in suggestions[AddMomentum].expected
    assert suggestions[Untie].effect == 0 and "changes nothing" in suggestions[Untie].expected
    assert "stalling" in str(suggestions[Untie])
    effects = [s.effect for s in found.suggest()]
    assert effects == sorted(effects)
    fast = report(found.apply(suggestions[AddMomentum]), FISTATheory(DICTIONARY, ALPHA))
    assert fast.quality - found.quality == pytest.approx(suggestions[AddMomentum].effect, abs=1e-6)


def test_longer_steps_where_the_support_is_small():
    """With large weights few atoms are used, and steps may be as long as 1/L_S on those."""
    theory = ISTATheory(DICTIONARY, 1.0)
    net = LISTA(DICTIONARY, 12, alpha=1.0)
    found = LayerReport(net, SIGNALS, theory, rules=Rules(stalling=0.5), power_iters=100)
    scale = next(s for s in found.suggest() if isinstance(s.correction, Scale))
    assert max(scale.correction.step_sizes) > 1.05 and scale.effect < 0
    support = net(SIGNALS).detach()[:16] != 0
    largest = max(float(torch.linalg.matrix_norm(DICTIONARY[:, s], 2)) ** 2 for s in support)
    assert scale.correction.step_sizes[-1] == pytest.approx(float(theory.L) / largest, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda step: (step.weight.matrix.zero_(), step.log_theta.fill_(-80.0)), Drop),
        (lambda step: step.weight.matrix.add_(0.15 * randn(16, 30, seed=3)), CapLipschitz),
        (lambda step: (step.weight.matrix.mul_(3.0), step.log_theta.add_(math.log(3.0))), Scale),
        (lambda step: step.log_theta.add_(2.0), Scale),
        (lambda step: step.log_theta.sub_(2.0), Scale),
    ],
    ids=["redundant", "expansive", "too long", "over-thresholding", "under-thresholding"],
)
def test_a_broken_layer_is_told_what_corrects_it(change, kind):
    net = LISTACP(DICTIONARY, 5, alpha=ALPHA)
    with torch.no_grad():
        change(net[2])
    suggestions = [s for s in report(net).suggest() if isinstance(s.correction, kind)]
    assert suggestions and suggestions[0].verdict.layer == 2
    if kind is Scale:
        after = report(report(net).apply(suggestions[0]))
        row = after.row("step" if suggestions[0].correction.step_sizes[2] != 1 else "threshold", 2)
        assert row.measured == pytest.approx(1, rel=1e-6), "back where it was"
        assert suggestions[0].correction.layers == [2] and "layer 2" in str(suggestions[0].correction)


def test_a_layer_that_does_all_the_work_is_worth_repeating():
    net = LISTACP(DICTIONARY, 5, alpha=ALPHA)
    with torch.no_grad():
        for k in (0, 1, 3, 4):
            net[k].weight.matrix *= 0.05
            net[k].log_theta += math.log(0.05)
    (suggestion,) = [s for s in report(net).suggest() if isinstance(s.correction, Repeat)]
    assert suggestion.correction == Repeat(2) and suggestion.effect < 0


def test_a_healthy_network_is_left_alone():
    assert report(ista(tied=True)).suggest() == []
    assert kinds(report(ista(tied=True), None)) == set()


# ---- The loop --------------------------------------------------------------------------------------------------------


def test_a_design_from_the_solver_to_fewer_layers():
    design = Design(ista(6, tied=True), SIGNALS, THEORY, rules=Rules(stalling=0.5))
    start = design.report().quality
    design.apply(next(s for s in design.report().suggest() if isinstance(s.correction, AddMomentum)))
    assert isinstance(design.theory, FISTATheory)
    design.apply(Untie(), "to be trained")
    y = randn(64, 16, seed=5)
    history = design.optimise(lambda net: fit(net, [y], Lasso(DICTIONARY, ALPHA), num_steps=30))
    assert len(history.loss) == 30
    spare = start - design.report().quality
    assert spare > 0
    drops = [s for s in design.report(Rules(redundant_db=spare)).suggest() if isinstance(s.correction, Drop)]
    design.apply(drops[0])
    assert len(design.net) == len(design.reasons) == 5
    assert [entry.layers for entry in design.log] == [6, 6, 6, 5]
    for before, after in zip(design.log, design.log[1:]):
        assert after.before == before.after, "the log has no gaps"
    assert design.log[-1].after < start, "fewer layers, and better than at the start"
    text = str(design)
    assert "add momentum" in text and "to be trained" in text and "redundant" in text
    assert text.count("an iteration of the classical solver") == 5


def test_reasons_follow_the_layers():
    design = Design(LISTACP(DICTIONARY, 4, alpha=ALPHA), SIGNALS, THEORY)
    design.apply(Scale((1.0, 0.5, 1.0, 1.0)))
    design.apply(Repeat(1), "to try")
    design.apply(Drop(0))
    design.apply(CapLipschitz(2))
    assert len(design.reasons) == 4
    assert "step size times 0.5" in design.reasons[0] and "repeats the layer before it: to try" in design.reasons[1]
    assert "cap the Lipschitz constant" in design.reasons[2] and ";" not in design.reasons[3]
    assert design.log[0].why == "no reason given"


def test_a_design_without_theory_or_objective():
    design = Design(Unroll(ista()[0], 3), SIGNALS, sensitivity=False)
    design.apply(Drop(2))
    assert design.log[0].after is None and "no theory" in str(design)
