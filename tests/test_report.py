"""`LayerReport`: for untrained solvers every prediction holds; a layer that is broken on purpose gets its verdict."""

import copy
import json
import math
import sys
import types
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from unrolled import LFISTA, LISTA, LISTACP, Momentum, Step, StepLISTA, Tolerance, Trace, Unroll
from unrolled.gradient import Implicit
from unrolled.report import Column, FISTATheory, ISTATheory, Kind, LayerReport, Row, Rules, Theory

F64 = torch.float64
ALPHA = 0.1


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


DICTIONARY = torch.nn.functional.normalize(randn(20, 40), dim=0)
CODES = randn(24, 40, seed=1) * (torch.rand(24, 40, generator=torch.Generator().manual_seed(2)) < 0.1)
SIGNALS = CODES @ DICTIONARY.T
THEORY = ISTATheory(DICTIONARY, ALPHA)


def report(net, y=SIGNALS, theory=THEORY, **options):
    return LayerReport(net, y, theory, **options)


def names(found):
    return {verdict.name for verdict in found.verdicts}


# ---- The self-test: untrained solvers --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("network", "options"),
    [
        (LISTA, {}),
        (LISTA, {"factored": True, "tied": True}),
        (LISTACP, {}),
        (LISTACP, {"tied": ("weight",)}),
        (StepLISTA, {}),
    ],
)
def test_everything_that_is_predicted_of_ista_holds(network, options, dtype):
    net = network(DICTIONARY.to(dtype), 6, alpha=ALPHA, **options)
    found = report(net, SIGNALS.to(dtype), ISTATheory(DICTIONARY.to(dtype), ALPHA), truth=CODES.to(dtype))
    assert found.holds() and len(found.predictions()) == 6 * 7
    assert (found.value("decrease") == 1).all()
    assert (found.value("lipschitz") <= 1 + 1e-3).all()
    assert (found.value("gain") <= 1).all()
    assert names(found) <= {"as predicted", "stalling"}
    for quantity, tolerance in (("step", 1e-3), ("threshold", 1e-3)):
        np.testing.assert_allclose(found.value(quantity), 1, atol=tolerance)
    np.testing.assert_allclose(found.value("on support"), found.predicted("on support"), rtol=1e-3)
    np.testing.assert_allclose(found.value("drift"), 0, atol=1e-6)


@pytest.mark.parametrize("network", [lambda: LISTA(DICTIONARY, 6, alpha=ALPHA, momentum=True),
                                     lambda: LISTACP(DICTIONARY, 6, alpha=ALPHA, momentum=True),
                                     lambda: LFISTA(DICTIONARY, 6, alpha=ALPHA)])  # fmt: skip
def test_everything_that_is_predicted_of_fista_holds(network):
    found = report(network(), theory=FISTATheory(DICTIONARY, ALPHA))
    assert found.holds() and len(found.predictions()) == 6 * 6
    assert "gain" not in found.columns  # FISTA has no such law


def test_complex_ista():
    D = torch.nn.functional.normalize(torch.complex(randn(12, 20, seed=3), randn(12, 20, seed=4)), dim=0)
    y = torch.complex(randn(8, 12, seed=5), randn(8, 12, seed=6))
    found = LayerReport(LISTA(D, 4, alpha=ALPHA), y, ISTATheory(D, ALPHA))
    assert found.holds()


def test_the_bound_is_the_theorem_and_the_numbers_are_those_of_the_iterates():
    net = LISTA(DICTIONARY, 4, alpha=ALPHA)
    found = report(net, truth=CODES)
    x = [torch.zeros_like(CODES), *net.iterates(SIGNALS)]
    for k in range(4):
        before, after = (torch.linalg.vector_norm(v.detach() - CODES, dim=-1) for v in x[k : k + 2])
        assert found.row("gain to truth", k).measured == pytest.approx(float((after / before).mean()), rel=1e-12)
        support = (x[k + 1] != 0, CODES != 0)
        hits = float((support[0] & support[1]).sum())
        assert found.row("precision", k).measured == pytest.approx(hits / float(support[0].sum()), rel=1e-12)
        assert found.row("recall", k).measured == pytest.approx(hits / float(support[1].sum()), rel=1e-12)
        assert found.row("zeros", k).measured == pytest.approx(float((x[k + 1] == 0).double().mean()), rel=1e-12)
    # The bound is 1 + c / k: what is left of it after 1 falls like 1/k.
    bound = found.predicted("objective") - 1
    np.testing.assert_allclose(bound * np.arange(1, 5), bound[0], rtol=1e-9)


def test_removal_and_repetition_are_those_of_the_shorter_and_the_longer_network():
    net = LISTACP(DICTIONARY, 3, alpha=ALPHA)
    with torch.no_grad():
        for k, step in enumerate(net.steps):
            step.log_theta += 0.3 * k
    found = report(net, truth=CODES)

    def decibel(output):
        return 10 * math.log10(float((output.detach() - CODES).square().sum() / CODES.square().sum()))

    shorter = copy.deepcopy(net)
    shorter.steps, shorter.num_iters = torch.nn.ModuleList([net[0], net[2]]), 2
    longer = copy.deepcopy(net)
    longer.steps, longer.num_iters = torch.nn.ModuleList([net[0], net[1], net[1], net[2]]), 4
    with torch.no_grad():
        full = decibel(net(SIGNALS))
        assert found.quality == pytest.approx(full, abs=1e-9)
        assert found.row("removal", 1).measured == pytest.approx(decibel(shorter(SIGNALS)) - full, abs=1e-9)
        assert found.row("repeat", 1).measured == pytest.approx(decibel(longer(SIGNALS)) - full, abs=1e-9)
    tied = report(LISTA(DICTIONARY, 3, alpha=ALPHA, tied=True), truth=CODES).value("removal")
    two, three = (decibel(LISTA(DICTIONARY, k, alpha=ALPHA, tied=True)(SIGNALS)) for k in (2, 3))
    np.testing.assert_allclose(tied, two - three, atol=1e-9)


# ---- Layers broken on purpose ----------------------------------------------------------------------------------------


def scaled(factor, layer=2, num_iters=5):
    """Step-LISTA with the step of a layer multiplied."""
    net = StepLISTA(DICTIONARY, num_iters, alpha=ALPHA)
    with torch.no_grad():
        net[layer].log_gamma += math.log(factor)
    return net


def coupled(change, layer=2, num_iters=5):
    """LISTA-CP with one layer changed."""
    net = LISTACP(DICTIONARY, num_iters, alpha=ALPHA)
    with torch.no_grad():
        change(net[layer])
    return net


def silence(step):
    """A layer that does nothing."""
    step.weight.matrix.zero_()
    step.log_theta.fill_(-80.0)


def without_but(layer, num_iters=5):
    """All layers but one do nothing: all the work is done by this one."""
    net = LISTACP(DICTIONARY, num_iters, alpha=ALPHA)
    with torch.no_grad():
        for k, step in enumerate(net.steps):
            if k != layer:
                step.weight.matrix *= 0.05
                step.log_theta += math.log(0.05)
    return net


BROKEN = {
    "expansive": lambda: scaled(3.0),
    "no sufficient decrease": lambda: scaled(3.0),
    "step beyond 2/L": lambda: scaled(3.0),
    "moving away": lambda: coupled(lambda step: step.weight.matrix.neg_()),
    "objective rises": lambda: scaled(12.0),
    "slower than the bound": lambda: coupled_all(0.001),
    "off theory: step": lambda: scaled(0.5),
    "off theory: threshold": lambda: coupled(lambda step: step.log_theta.add_(0.2)),
    "off theory: on support": lambda: coupled(lambda step: step.weight.matrix.add_(0.1 * randn(20, 40, seed=9))),
    "over-thresholding": lambda: coupled(lambda step: step.log_theta.add_(2.0)),
    "under-thresholding": lambda: coupled(lambda step: step.log_theta.sub_(2.0)),
    "redundant": lambda: coupled(silence),
    "harmful": lambda: coupled(lambda step: step.log_theta.add_(4.0), layer=4),
    "load-bearing": lambda: without_but(2),
    "worth repeating": lambda: without_but(2),
}


def coupled_all(factor):
    net = StepLISTA(DICTIONARY, 40, alpha=ALPHA)
    with torch.no_grad():
        for step in net.steps:
            step.log_gamma += math.log(factor)
    return net


@pytest.mark.parametrize("verdict", BROKEN)
def test_the_verdict_on_a_broken_layer(verdict):
    net = BROKEN[verdict]()
    found = report(net)
    broken = len(net) - 1 if len(net) == 40 else 4 if verdict == "harmful" else 2
    assert verdict in found.names(broken)
    reason = next(v.reason for v in found.verdicts if v.layer == broken and v.name == verdict)
    assert any(character.isdigit() for character in reason), "a reason has a number"
    # The classical layer before it is not blamed.
    if verdict not in ("load-bearing", "worth repeating", "slower than the bound"):
        assert set(found.names(1)) <= {"as predicted", "stalling", "load-bearing", "redundant"}


def test_a_verdict_names_the_condition_that_is_broken():
    found = report(scaled(3.0))
    (reason,) = [v.reason for v in found.verdicts if v.name == "no sufficient decrease" and v.layer == 2]
    assert "its step is" in reason and "/L" in reason


def test_stalling():
    D = torch.nn.functional.normalize(DICTIONARY + 0.3, dim=0)  # atoms that are alike: a large L, small steps
    found = LayerReport(LISTA(D, 20, alpha=0.01), CODES @ D.T, ISTATheory(D, 0.01), sensitivity=False)
    assert "stalling" in found.names(19) and "as predicted" in found.names(0)
    assert names(found) == {"as predicted", "stalling"}


class Growing(Step):
    """x+ = a x + y"""

    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor, dtype=F64))

    def init(self, y):
        return torch.zeros_like(y)

    def forward(self, x, y):
        return self.factor * x + y


def test_changes_that_grow():
    assert "changes grow" in report(Unroll(Growing(1.2), 4), theory=None).names(3)
    assert "stalling" in report(Unroll(Growing(0.99), 4), theory=None).names(3)
    assert names(report(Unroll(Growing(0.5), 4), theory=None)) == set()


def test_rules_are_arguments():
    net = LISTA(DICTIONARY, 5, alpha=ALPHA, tied=True)
    assert "stalling" in names(report(net, rules=Rules(stalling=0.5)))
    assert "redundant" in names(report(net, rules=Rules(redundant_db=50.0)))
    assert names(report(net)) == {"as predicted"}
    found = report(net)
    assert "stalling" in names(found.with_rules(Rules(stalling=0.5))) and names(found) == {"as predicted"}
    with pytest.raises(ValueError, match="stalling must be at least 0"):
        Rules(stalling=-1.0)


# ---- What it needs, and what it leaves alone -------------------------------------------------------------------------


def test_without_a_theory_there_is_what_can_be_measured():
    found = report(Unroll(Growing(0.5), 3), theory=None)
    assert list(found.columns) == ["change", "residual gain", "lipschitz", "removal", "repeat"]
    assert not found.predictions() and found.unit == "share" and found.quality is None
    np.testing.assert_allclose(found.value("lipschitz"), 0.5, rtol=1e-6)
    np.testing.assert_allclose(found.value("residual gain"), [np.nan, 0.5, 0.5], rtol=1e-12)


def test_an_objective_of_ones_own():
    def misfit(x, y):
        return (x - 2 * y).square().sum(-1)

    found = report(Unroll(Growing(0.5), 3), theory=None, objective=misfit)
    np.testing.assert_allclose(found.value("objective") / found.value("objective")[0], [1, 1 / 4, 1 / 16], rtol=1e-9)
    # F goes from 4 |y|^2 to 1/16 |y|^2; one iteration less leaves 1/4.
    np.testing.assert_allclose(found.value("removal"), (1 / 4 - 1 / 16) / (4 - 1 / 16), rtol=1e-9)
    for wrong in (lambda x, y: x.sum(), lambda x, y: 1.0):
        with pytest.raises(ValueError, match="one real number a sample"):
            report(Unroll(Growing(0.5), 3), theory=None, objective=wrong)


def test_drift_is_measured_against_the_network_before_training():
    net = Unroll(Growing(0.5), 3)
    before = copy.deepcopy(net)
    with torch.no_grad():
        net[0].factor.fill_(0.75)
    assert "drift" not in report(net, theory=None).columns
    np.testing.assert_allclose(report(net, theory=None, untrained=before).value("drift"), 0.5)
    with pytest.raises(ValueError, match="untrained must be an Unroll of 3 layers"):
        report(net, theory=None, untrained=Unroll(Growing(0.5), 2))
    with pytest.raises(ValueError, match="parameters of the shapes"):
        report(LISTA(DICTIONARY, 3, alpha=ALPHA), untrained=LISTA(DICTIONARY[:, :30], 3, alpha=ALPHA))


def test_the_report_changes_nothing():
    net = LISTA(DICTIONARY, 4, alpha=ALPHA, stop=Tolerance(1e-2))
    net.train()
    net.steps[1].eval()
    net(SIGNALS).sum().backward()
    weights = copy.deepcopy(net.state_dict())
    grads = [p.grad.clone() for p in net.parameters()]
    modes = [module.training for module in net.modules()]
    generator = torch.get_rng_state()
    with Trace(net) as trace:
        net(SIGNALS)
        count = len(trace)
        found = report(net)
        found.suggest()
        assert len(trace) == count, "a trace that is open does not see the report"
    assert all(torch.equal(p, weights[name]) for name, p in net.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), grads))
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert net.stop is not None and all(p.requires_grad for p in net.parameters())


def test_all_layers_are_run_whatever_stops_or_differentiates_the_network():
    usual = report(LISTA(DICTIONARY, 4, alpha=ALPHA, tied=True)).value("objective")
    for options in ({"stop": Tolerance(0.5)}, {"gradient": Implicit(max_iters=2)}):
        net = LISTA(DICTIONARY, 4, alpha=ALPHA, tied=True, **options)
        np.testing.assert_array_equal(report(net).value("objective"), usual)


def test_probes_and_batches():
    net = LISTA(DICTIONARY, 3, alpha=ALPHA)
    few, all_of_them = report(net, num_probes=4), report(net, num_probes=100)
    np.testing.assert_array_equal(few.value("decrease"), all_of_them.value("decrease"))
    one = report(net, SIGNALS[0])  # no batch dimension at all
    np.testing.assert_allclose(one.value("objective"), report(net, SIGNALS[:1]).value("objective"), rtol=1e-12)
    assert "lipschitz" not in report(net, power_iters=0).columns
    assert "removal" not in report(net, sensitivity=False).columns


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LayerReport(torch.nn.Linear(2, 2), SIGNALS), TypeError, "net must be an Unroll, got Linear"),
        (lambda: report(NET, theory=ISTATheory), TypeError, "got the class ISTATheory"),
        (lambda: report(NET, objective=3), TypeError, "objective must be called"),
        (lambda: report(NET, rules={}), TypeError, "rules must be a Rules"),
        (lambda: report(NET, power_iters=-1), ValueError, "power_iters must be at least 0"),
        (lambda: report(NET, num_probes=0), ValueError, "num_probes must be at least 1"),
        (lambda: report(NET, truth=CODES[:3]), ValueError, "truth must be like what the network returns"),
        (lambda: report(NET, SIGNALS.float()), TypeError, "y is torch.float32"),
        (lambda: report(NET, theory=FISTATheory(DICTIONARY, ALPHA)), ValueError, "no momentum: take ISTATheory"),
        (lambda: report(WITH_MOMENTUM), ValueError, "has momentum: take FISTATheory"),
        (
            lambda: report(NET, theory=ISTATheory(DICTIONARY[:, :30], ALPHA)),
            ValueError,
            "Pass the network's dictionary",
        ),
        (lambda: ISTATheory(DICTIONARY, 0.0), ValueError, "alpha must be greater than 0"),
        (lambda: report(NET).value("charm"), KeyError, "no column 'charm'"),
        (lambda: report(NET).row("step", 9), IndexError, "out of range"),
        (lambda: Column("a", 3), TypeError, "measure must be a function"),
        (lambda: Column("a", abs, 1.0), ValueError, "a prediction must say what it claims"),
        (lambda: Column("a", abs, kind=Kind.AT_MOST), ValueError, "a prediction must say what it claims"),
        (lambda: Column("a", abs, 1.0, "law"), TypeError, "kind must be one of"),
    ],
)
def test_errors_at_the_door(call, error, message):
    with pytest.raises(error, match=message):
        call()


NET = LISTA(DICTIONARY, 3, alpha=ALPHA)
WITH_MOMENTUM = Unroll(Momentum(NET[0]), 3)


# ---- Rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "measured", "holds"),
    [
        (Kind.EQUALITY, 2.01, True),
        (Kind.EQUALITY, 2.03, False),
        (Kind.EQUALITY, 1.97, False),
        (Kind.AT_MOST, 1.0, True),
        (Kind.AT_MOST, 2.03, False),
        (Kind.BOUND, 2.03, False),
        (Kind.AT_LEAST, 9.0, True),
        (Kind.AT_LEAST, 1.97, False),
        (Kind.MEASURED, 1.97, None),
        (Kind.AT_LEAST, math.nan, None),
    ],
)
def test_whether_a_prediction_holds(kind, measured, holds):
    row = Row(0, "a", measured, 2.0, kind, 0.01)  # relative to the prediction: 0.02
    assert row.holds is holds
    assert row.to_dict()["holds"] is holds
    assert math.isnan(measured) or row.deviation == pytest.approx(measured - 2)


# ---- Output ----------------------------------------------------------------------------------------------------------


def test_the_table():
    text = str(report(scaled(3.0), truth=CODES))
    header, _, names, theory, _, *body = text.splitlines()
    assert "StepLISTA, 5 layers, 24 samples" in header and "ISTA, alpha=0.1" in header and "NMSE in dB" in header
    assert names.split()[0] == "layer" and "decrease" in names and "≥ 1" in theory
    assert len(body) == 5 and [line.split()[0] for line in body] == list("01234")
    assert "*" in body[2] and "*" not in body[1] and "expansive" in body[2]
    explained = report(scaled(3.0)).explain()
    assert "lemma 2.3" in explained and "layer 2: expansive" in explained
    assert repr(report(NET)).startswith("LayerReport(LISTA, 3 layers, theory=ISTA")


def test_plain_data_goes_to_json_and_back():
    found = report(scaled(3.0))
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["layers"] == 5 and data["unit"] == "dB" and len(data["rows"]) == 5 * len(found.columns)
    assert {"layer": 2, "name": "expansive"}.items() <= next(
        v for v in data["verdicts"] if v["name"] == "expansive"
    ).items()
    first = next(row for row in data["rows"] if row["quantity"] == "residual gain")
    assert first["measured"] is None, "NaN is not JSON"


def test_a_data_frame_where_pandas_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        report(NET).to_frame()
    made = {}
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=lambda columns: made.update(columns)))
    found = report(NET)
    found.to_frame()
    assert {len(values) for values in made.values()} == {len(found.rows)}
    assert made["quantity"][0] == "objective" and made["kind"][0] == "bound"


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.cells, self.links = [], 0, []

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta", "br", "polyline"}:
            self.open.append(tag)
        self.cells += tag == "td"
        self.links += [value for name, value in attrs if name in {"src", "href"}]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(tmp_path):
    found = report(scaled(3.0), truth=CODES)
    found.save_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == [] and page.links == [] and "http" not in text
    assert page.cells >= 5 * len(found.columns)
    assert "✗" in text and "step beyond 2/L" in text and "|x - x*|" in text
    assert "<script" not in text


def test_a_report_of_one_layer():
    found = report(LISTA(DICTIONARY, 1, alpha=ALPHA))
    assert found.holds() and "1 layers" not in found.to_html().split("<table>")[1]
    assert str(found)


def test_a_theory_of_ones_own():
    class Geometric(Theory):
        def columns(self, run):
            def ratio(layer):
                goal = 2 * layer.inputs[0]
                return layer.distance(layer.new_x, goal) / layer.distance(layer.x, goal)

            return [Column("ratio", ratio, 0.5, Kind.EQUALITY, equation="|x+ - 2y| = |x - 2y| / 2", broken="no half")]

    assert report(Unroll(Growing(0.5), 3), theory=Geometric()).holds()
    found = report(Unroll(Growing(0.6), 3), theory=Geometric())
    assert [found.names(k) for k in range(3)] == [
        ["as predicted"],
        ["no half"],
        ["no half"],
    ]  # |y - 2y| is half of |2y|
    assert "|x+ - 2y|" in found.explain()
