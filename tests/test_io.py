"""Networks come back from files as they were, and files that say anything else than they should are refused."""

from __future__ import annotations

import copy
import dataclasses
import enum
import gc
import inspect
import json
import os
import pickle
import random
import subprocess
import sys
import weakref

import pytest
import torch
from systems import GradientDescent, System, _randn, readme_example
from systems_crf import LATTICE
from systems_image import NAMED, Halving
from systems_lowrank import JoinedRobustNMF, JoinedRPCA
from test_contract import SYSTEMS, perturbed

from unrolled import (
    ALISTA,
    GLISTA,
    LISTA,
    TNRD,
    Autoencoder,
    Checkpointed,
    HyperLISTA,
    Implicit,
    KMeans,
    L0Encoder,
    Step,
    Tolerance,
    Truncated,
    Unroll,
)
from unrolled._config import KEY
from unrolled.gradient import Anderson
from unrolled.io import load, save
from unrolled.io.names import _ours, known, name_of
from unrolled.operators import Boundary, Composition, Convolution, Dense
from unrolled.report import AddMomentum, Drop, ISTATheory, LayerReport, Repeat, Scale, Untie
from unrolled.shrinkage import GeneralizedShrinkage, PiecewiseLinear, RadialBasis, Shrinkage, SoftThreshold
from unrolled.sparse import inverse_gate
from unrolled.stopping import Halting, Reading, Settling

safetensors = pytest.importorskip("safetensors", reason="the extra 'io' is not installed")
from safetensors.torch import load_file, save_file  # noqa: E402

OURS = [
    GradientDescent,
    readme_example().TotalVariation,
    Halving,
    JoinedRPCA,
    JoinedRobustNMF,
]  # no part of the library
ALL = [*SYSTEMS, NAMED, LATTICE]
DICTIONARY = _randn(6, 10)
MATRIX = _randn(10, 6)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


def lista(num_iters=4, **options):
    return LISTA(DICTIONARY, num_iters, **{"alpha": 0.4, **options})


def signals(batch=3):
    return _randn(batch, 6, seed=1)


def assert_same(net, twin, *inputs):
    assert type(twin) is type(net)
    # A rule that is set later is shown last, and one that was taken away as None.
    lines, its_lines = (sorted(set(repr(one).splitlines()) - {"  (stop): None"}) for one in (net, twin))
    assert lines == its_lines
    with torch.no_grad():
        assert torch.equal(twin(*inputs), net(*inputs))
    mine, its = dict(net.named_parameters()), dict(twin.named_parameters())
    assert list(mine) == list(its), "what was shared must be shared"
    for name, parameter in mine.items():
        assert torch.equal(its[name], parameter) and its[name].dtype == parameter.dtype
        assert its[name].requires_grad == parameter.requires_grad
        assert its[name].data_ptr() != parameter.data_ptr()
    for (name, buffer), (its_name, other) in zip(net.named_buffers(), twin.named_buffers()):
        assert name == its_name and torch.equal(buffer, other) and buffer.dtype == other.dtype
    assert set(net.state_dict()) == set(twin.state_dict())
    assert [module.training for module in net.modules()] == [module.training for module in twin.modules()]


def round_trip(net, path, *inputs, classes=()):
    save(net, path)
    twin = load(path, classes=classes)
    assert_same(net, twin, *inputs)
    return twin


# ---- There and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [None, False])
@pytest.mark.parametrize("system", ALL, ids=lambda system: system.name)
def test_every_system(system: System, tied: bool | None, path):
    net = perturbed(system.make(**({} if tied is None else {"tied": tied})))
    before = torch.get_rng_state()
    twin = round_trip(net, path, *system.inputs(3), classes=OURS)
    assert torch.equal(torch.get_rng_state(), before), "neither takes random numbers"
    # The twin is no dead copy: it can go on as the network could.
    assert len(copy.deepcopy(twin[:2])) == 2
    round_trip(twin, path, *system.inputs(2), classes=OURS)
    with pytest.raises(ValueError, match="num_iters must be"):
        twin(*system.inputs(1), num_iters=0)


def test_in_another_process(path):
    net = perturbed(lista(shrinkage=RadialBasis(num_channels=10, dtype=torch.float64), tied=("shrinkage",)))
    save(net, path)
    code = (
        "import sys, torch; from unrolled.io import load; torch.set_num_threads(1); "
        "torch.save(load(sys.argv[1])(torch.load(sys.argv[2])), sys.argv[3])"
    )
    torch.save(signals(), path.with_name("y.pt"))
    names = [str(path), str(path.with_name("y.pt")), str(path.with_name("x.pt"))]
    subprocess.run([sys.executable, "-c", code, *names], check=True, cwd=os.path.dirname(os.path.dirname(__file__)))
    assert torch.equal(torch.load(path.with_name("x.pt")), net(signals()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_network_in_another_dtype(dtype, path):
    net = lista(shrinkage=RadialBasis(dtype=torch.float64)).to(dtype)
    save(net, path)
    assert {t.dtype for t in load_file(path).values()} == {dtype}
    twin = load(path)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), twin.state_dict().values()))
    basis, other = net[0].shrinkage.basis, twin[0].shrinkage.basis
    assert other.dtype == dtype and torch.equal(basis, other)


def test_a_table_that_was_rounded_is_kept(path):
    net = TNRD(2, filter_size=3).half().float()
    round_trip(net, path, torch.rand(1, 1, 8, 8))
    assert "steps.0.influence.basis" in load_file(path)
    round_trip(TNRD(2, filter_size=3).double(), path, torch.rand(1, 1, 8, 8).double())
    assert "steps.0.influence.basis" not in load_file(path), "casting the table of the constructor gives this one"


def test_the_default_dtype_is_that_of_the_file(path):
    net = TNRD(2, filter_size=3)
    save(net, path)
    torch.set_default_dtype(torch.float64)
    try:
        twin = load(path)
    finally:
        assert torch.get_default_dtype() == torch.float64
        torch.set_default_dtype(torch.float32)
    assert_same(net, twin, torch.rand(1, 1, 8, 8))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers(dtype, path):
    dictionary = _randn(6, 10, dtype=dtype)
    round_trip(LISTA(dictionary, 3, alpha=0.3), path, _randn(2, 6, seed=1, dtype=dtype))


def test_what_is_shared_is_written_once(path):
    net = lista(factored=True, tied=("dictionary",))
    round_trip(net, path, signals())
    names = list(load_file(path))
    assert len(names) == len(list(net.parameters())) < len(net.state_dict())
    twin = load(path)
    assert twin[0].dictionary is twin[3].dictionary and twin[0].weight is not twin[3].weight
    # Shared by hand, not by `tied`.
    net = lista()
    net[1].weight = net[2].weight
    twin = round_trip(net, path, signals())
    assert twin[1].weight is twin[2].weight and twin[0].weight is not twin[1].weight


def test_what_was_set_after_it_was_built(path):
    net = lista(tied=True)
    net.gradient, net.stop = Implicit(solver=Anderson(memory=3)), Tolerance(rtol=1e-2)
    twin = round_trip(net, path, signals())
    assert twin.gradient == net.gradient and twin.stop.rtol == 1e-2
    net.gradient, net.stop = Truncated(2), None
    assert round_trip(net, path, signals()).gradient == Truncated(2)
    net[0].weight.requires_grad_(False)
    net.eval()
    net[0].train()
    round_trip(net, path, signals())
    head = KMeans(3, temperature=0.5)
    head[0].alpha_of_mine = 1.0
    with pytest.raises(ValueError, match="alpha_of_mine of steps.0 was set or deleted after it was built"):
        save(head, path)
    net[0].alpha = 0.7  # a plain number of the constructor's
    assert round_trip(net, path, signals())[0].alpha == 0.7


def test_training_goes_on(path):
    net = lista()
    for _ in range(3):
        optimiser = torch.optim.SGD(net.parameters(), 0.1)
        net(signals()).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        twin = round_trip(net, path, signals())
    twin(signals()).square().sum().backward()
    net(signals()).square().sum().backward()
    for mine, its in zip(net.parameters(), twin.parameters()):
        assert torch.equal(mine.grad, its.grad)


@pytest.mark.parametrize("options", [{"tied": True}, {"tied": False}, {"tied": ("weight",), "momentum": False}])
@pytest.mark.parametrize("part", [slice(2), slice(1, 3), slice(0, 4, 2)])
def test_slices(options, part, path):
    net = perturbed(lista(**options))
    save(net[part], path)
    twin = load(path)
    assert len(twin) == 2 and torch.equal(twin(signals()), net[part](signals()))
    save(net[2], path)  # one layer
    assert torch.equal(load(path).weight, net[2].weight)


@pytest.mark.parametrize(
    "correction",
    [Drop(1), Repeat(1), Untie(), AddMomentum(), Scale((1.0, 0.9, 0.8, 1.1))],
    ids=lambda c: type(c).__name__,
)
@pytest.mark.parametrize("tied", [True, False, ("weight",)])
def test_corrected_networks(correction, tied, path):
    net = perturbed(lista(tied=tied))
    report = LayerReport(net, signals(), ISTATheory(DICTIONARY, 0.4))
    try:
        new = report.apply(correction)
    except ValueError:
        pytest.skip("this correction does not fit this network")
    twin = round_trip(new, path, signals())
    assert len(twin) == len(new) and twin.tied == new.tied
    if isinstance(correction, AddMomentum):  # and once more, on the corrected one
        again = LayerReport(new, signals(), ISTATheory(DICTIONARY, 0.4).with_momentum()).apply(Drop(0))
        round_trip(again, path, signals())


def test_another_operator(path):
    kernel = torch.ones(1, 1, 3, 3) / 9
    net = TNRD(2, filter_size=3, operator=Convolution(kernel, (1, 8, 8), boundary=Boundary.REFLECT))
    round_trip(net, path, torch.rand(1, 1, 8, 8))
    larger = net.with_operator(Convolution(kernel, (1, 9, 7), boundary=Boundary.CIRCULAR))
    twin = round_trip(larger, path, torch.rand(2, 1, 9, 7))
    assert twin[0].operator.boundary is Boundary.CIRCULAR


def test_constructors_that_look_at_values(path):
    unit = torch.nn.functional.normalize(DICTIONARY, dim=0)
    for net in (HyperLISTA(unit, 3), HyperLISTA(unit, 3, symmetric=False), ALISTA(unit, 3, alpha=0.1)):
        round_trip(net, path, signals())
    round_trip(Unroll(Looking(DICTIONARY), 3), path, signals(), classes=[Looking])


class Looking(Step):
    """Keeps a plain number that it computes from the values of its argument."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix.clone())
        self.length = 1 / float(torch.linalg.matrix_norm(matrix, 2)) ** 2
        self.register_buffer("table", matrix.mT @ matrix, persistent=False)

    def init(self, y):
        return y.new_zeros(*y.shape[:-1], self.matrix.shape[1])

    def forward(self, x, y):
        return x - self.length * (x @ self.table - y @ self.matrix)


class Observed(Step):
    """x+ = x + mask (y - x): an argument that says which."""

    def __init__(self, mask, *others, rate=0.5, **more):
        super().__init__()
        self.register_buffer("where", mask.nonzero().flatten())
        self.rate, self.others, self.more = rate, others, more

    def init(self, y):
        return torch.zeros_like(y)

    def forward(self, x, y):
        return x.index_add(-1, self.where, self.rate * (y - x)[..., self.where])


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Rate:
    value: float
    hidden: list = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)


def test_arguments_of_every_kind(path):
    mask = torch.tensor([True, False, True, True, False, True])
    net = Unroll(Observed(mask, 1, (2, [3.5, None]), "four", colour=Colour.RED, rates={"a": Rate(float("inf"))}), 3)
    mine = [Observed, Colour, Rate]
    twin = round_trip(net, path, signals(), classes=mine)
    assert twin[0].others == net[0].others and twin[0].more == net[0].more
    with pytest.raises(ValueError, match=r"names the class 'Observed', which is unknown.*classes=\[Observed\]"):
        load(path)
    with pytest.raises(ValueError, match="names the enum 'Colour'"):
        load(path, classes=[Observed, Rate])


def test_functions_of_a_module(path):
    net = GLISTA(DICTIONARY, 3, alpha=0.1, gate=inverse_gate)
    assert round_trip(net, path, signals())[0].gate is inverse_gate
    net = GLISTA(DICTIONARY, 3, alpha=0.1, gate=halved)
    round_trip(net, path, signals(), classes=[halved])
    with pytest.raises(ValueError, match="names the function 'halved'"):
        load(path)


def halved(w):
    return torch.exp(-w / 2)


@pytest.mark.parametrize(
    "module",
    [
        SoftThreshold(0.3, num_channels=6, dtype=torch.float64),
        PiecewiseLinear(4, 2, dtype=torch.float64),
        RadialBasis(dtype=torch.float64),
        GeneralizedShrinkage(-0.5, dtype=torch.float64),
        Dense(MATRIX),
        Dense(torch.nn.Parameter(MATRIX)),
        Composition(Dense(DICTIONARY), Dense(MATRIX)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_parts(module, path):
    round_trip(module, path, signals())


def test_stopping_rules(path):
    round_trip(lista(stop=Tolerance(atol=0.1)), path, signals())
    rule = Halting(Settling(0.3, sharpness=2.0, dtype=torch.float64), prior=0.8)
    with torch.no_grad():
        rule.head.log_rtol += 0.1
    net = lista(stop=rule).eval()
    twin = round_trip(net, path, signals())
    assert twin.stop.prior == 0.8 and twin.stop.head.rtol == 0.3
    with pytest.raises(TypeError, match=r"LISTA.stop.head.module is a Linear, a module that does not record"):
        save(lista(stop=Halting(Reading(torch.nn.Linear(10, 1).double()))), path)


def test_a_slope_that_was_annealed(path):
    net = L0Encoder(DICTIONARY, 3, alpha=0.2, slope=0.5)
    for step in net:
        step.slope.fill_(0.125)
    assert float(round_trip(net, path, signals())[0].slope) == 0.125


def test_the_device(path):
    save(lista(), path)
    net = load(path, "meta")
    assert {p.device.type for p in net.parameters()} == {"meta"}
    with pytest.raises(ValueError, match=r"steps.0.weight is on the meta device: there are no values"):
        save(net, path)
    net = LISTA(DICTIONARY, 2, alpha=0.1, device="cpu")
    assert "device" not in vars(net)[KEY].arguments


# ---- What cannot be saved --------------------------------------------------------------------------------------------


class Odd(Step):
    def __init__(self, thing=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def init(self, y):
        return y

    def forward(self, x, y):
        return self.weight * x


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (lambda x: x, r"thing is the function .*<lambda>, which has no name"),
        (torch.nn.Linear(2, 2), "thing is a Linear, a module that does not record"),
        (object(), "thing is an object of type object"),
        (DICTIONARY.numpy(), "thing is an object of type ndarray"),
        ([1, {"a": (2, object())}], r"thing\[1\]\['a'\]\[1\] is an object"),
        ({1: 2}, "thing is an object of type dict"),
        (torch.nn.Linear, "thing is <class"),
    ],
)
def test_arguments_that_cannot_be_written(thing, message, path):
    net = Unroll(Odd(thing), 2)
    assert pickle.loads(pickle.dumps(net))[0].weight == 1, "the record must not stand in the way of pickle"
    with pytest.raises(TypeError, match=message):
        save(net, path)
    assert not path.exists()


def test_a_curve_is_not_in_the_way_of_pickle():
    net = lista(shrinkage=RadialBasis(curve=lambda x: x, dtype=torch.float64))
    assert torch.equal(pickle.loads(pickle.dumps(net))(signals()), net(signals()))


def test_other_modules(path):
    with pytest.raises(TypeError, match="a Linear, a module that does not record what it was built from"):
        save(torch.nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match="net must be a network"):
        save({"weight": torch.ones(2)}, path)
    with pytest.raises(TypeError, match="OptimizedModule"):
        save(torch.compile(lista(), backend="eager"), path)
    with pytest.raises(TypeError, match="Autoencoder.encoder is|does not keep its argument"):
        save(Autoencoder(torch.nn.Linear(6, 10), DICTIONARY), path)


def test_networks_rebuilt_by_hand(path):
    net = Unroll(Odd(), 2)
    net[0].extra = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"cannot be built again .*steps.0.extra"):
        save(net, path)
    net = Unroll(Odd(), 2)
    net[0].weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"weight has shape \(3,\), and would have \(\)"):
        save(net, path)
    net = Unroll(Odd(), 2)
    net[0].inner = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"differs in its modules \['steps.0.inner'"):
        save(net, path)
    net = Unroll(Odd(), 2)
    net[0].plain = torch.ones(2)
    with pytest.raises(ValueError, match="plain of steps.0 was set or deleted"):
        save(net, path)
    step = Odd()
    step._cache = torch.ones(2)  # private, and so what the module makes for itself
    save(Unroll(step, 2), path)


def test_two_classes_of_one_name(path):
    class Odd(Step):  # another one
        init, forward = globals()["Odd"].init, globals()["Odd"].forward

        def __init__(self, step):
            super().__init__()
            self.step = step

    with pytest.raises(TypeError, match="two classes of this network are called Odd"):
        save(Unroll(Odd(globals()["Odd"]()), 2), path)
    with pytest.raises(ValueError, match="classes has two that are called Odd"):
        load(path, classes=[Odd, globals()["Odd"]])


def test_a_failed_save_leaves_the_old_file(path):
    save(lista(), path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save(Unroll(Odd(object()), 2), path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


# ---- What is not loaded ----------------------------------------------------------------------------------------------


def rewrite(path, change):
    """Let `change(content, tensors)` work on a file's description and tensors."""
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in list(file.keys())}
    content = json.loads(metadata["unrolled"])
    changed = change(content, tensors)
    save_file(tensors, path, {"unrolled": json.dumps(content if changed is None else changed)})


def arguments(content):
    return content["network"]["arguments"]


def setting(*keys):
    """A change: the value at these keys but the last becomes the last."""

    def change(content, tensors):
        *way, last, value = keys
        for key in way:
            content = content[key]
        content[last] = value

    return change


def without(*keys):
    def change(content, tensors):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def half(content, tensors):
    tensors["steps.0.weight"] = tensors["steps.0.weight"].half()


def half_consistently(content, tensors):
    half(content, tensors)
    content["tensors"]["steps.0.weight"]["dtype"] = "int64"
    tensors["steps.0.weight"] = tensors["steps.0.weight"].long()


def narrow(content, tensors):
    tensors["steps.0.weight"] = tensors["steps.0.weight"][:, :5].contiguous()


def narrow_consistently(content, tensors):
    narrow(content, tensors)
    content["tensors"]["steps.0.weight"]["shape"] = [10, 5]


def drop(content, tensors):
    del tensors["steps.0.weight"]


def drop_consistently(content, tensors):
    drop(content, tensors)
    del content["tensors"]["steps.0.weight"]


def add(content, tensors):
    tensors["steps.9.weight"] = torch.ones(2)
    content["tensors"]["steps.9.weight"] = {"dtype": "float32", "shape": [2]}


BAD = {
    "newer": (setting("format", 2), "format 2, this version of unrolled reads up to 1. Upgrade unrolled"),
    "no format": (without("format"), "no format number"),
    "unknown entry": (setting("hook", "print"), r"unknown entries \['hook'\]"),
    "missing entry": (without("layers"), r"lacks \['layers'\]"),
    "entry of another kind": (setting("fixed", {}), "fixed must be a list"),
    "default dtype": (setting("default_dtype", "int64"), "floating"),
    "unknown class": (setting("network", "class", "os.system"), "names the class 'os.system', which is unknown"),
    "unknown class of ours": (
        setting("network", "class", "unrolled.sparse.LISTB"),
        "This version of unrolled has none",
    ),
    "a builtin": (setting("network", "class", "eval"), "names the class 'eval', which is unknown"),
    "a function": (setting("network", "class", "unrolled.sparse.inverse_gate"), "as a class, which it is not"),
    "no network": (setting("network", {"class": "unrolled.gradient.Backprop", "arguments": {}}), "which is no network"),
    "no call": (setting("network", {"tuple": []}), "describes tuple, which is no network"),
    "class no string": (setting("network", "class", ["a"]), "which is unknown"),
    "unknown argument": (setting("network", "arguments", "hook", 1), r"does not take the arguments \['hook'\]"),
    "missing argument": (without("network", "arguments", "alpha"), r"is not given its arguments \['alpha'\]"),
    "argument of another kind": (setting("network", "arguments", "alpha", "much"), "cannot be built: alpha must be"),
    "argument out of range": (setting("network", "arguments", "num_iters", -1), "num_iters must be at least 1"),
    "unknown node": (setting("network", "arguments", "alpha", {"code": "1"}), "unknown entry"),
    "unknown member": (
        setting("network", "arguments", "alpha", {"enum": "unrolled.operators.Boundary", "member": "WALL"}),
        "has no 'WALL'; there are ZERO",
    ),
    "tensor": (setting("network", "arguments", "dictionary", "tensor", "shape", [-1]), "a tensor is described by"),
    "tensor's entry": (setting("network", "arguments", "dictionary", "tensor", "data", 1), "needed are shape"),
    "tensor's values": (setting("network", "arguments", "dictionary", "tensor", "values", "x"), "file lacks the"),
    "shape": (narrow, "steps.0.weight is .*, the description says"),
    "shape in both": (narrow_consistently, "steps.0.weight must be like"),
    "dtype": (half, "steps.0.weight is .*'float16'.*, the description says"),
    "dtype in both": (half_consistently, "steps.0.weight must be like"),
    "tensor dropped": (drop, "do not agree on"),
    "tensor dropped in both": (drop_consistently, r"do not agree on the tensors \['steps.0.weight'\]"),
    "tensor added": (add, r"do not agree on the tensors \['steps.9.weight'\]"),
    "shared with nothing": (setting("shared", {"steps.1.weight": "nothing"}), "do not agree|shares"),
    "computed": (setting("computed", {"steps.0.weight": "float64"}), "do not agree"),
    "fixed": (setting("fixed", ["nothing"]), "shares or fixes"),
    "attribute": (setting("attributes", {"steps.0": {"forward": 1}}), "which the network does not have"),
    "standard attribute": (setting("attributes", {"steps.0": {"_parameters": {"dict": {}}}}), "does not have"),
    "attribute of another kind": (setting("attributes", {"steps.0": {"alpha": "much"}}), "to 'much', in place of 0.4"),
    "evaluating": (setting("evaluating", ["steps.77"]), "steps.77"),
    "same": (setting("same", {"steps.0": "steps.77"}), "steps.77"),
    "same of another class": (setting("same", {"steps.0": "steps"}), "which is of another class"),
    "layers": (setting("layers", {"steps": []}), "layers in a way that is unknown"),
    "layers that are no steps": (
        setting("layers", {"steps": [1], "num_iters": 1, "tied": False}),
        "describes layers that are no steps",
    ),
}


@pytest.mark.parametrize("change", BAD)
def test_wrong_descriptions(change, path):
    save(lista(), path)
    change, message = BAD[change]
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_the_number_of_layers_must_fit(path):
    save(LayerReport(lista(), signals(), ISTATheory(DICTIONARY, 0.4)).apply(AddMomentum()), path)
    rewrite(path, setting("layers", "num_iters", 3))
    with pytest.raises(ValueError, match="4 distinct layers of a network of 3"):
        load(path)


def test_defaults_may_be_missing(path):
    """So that arguments can be added to a class: files from before still load."""
    save(lista(), path)
    rewrite(path, without("network", "arguments", "momentum"))
    assert_same(lista(), load(path), signals())


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_are_refused(legacy, path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was read",))

    if legacy:
        path.write_bytes(pickle.dumps(Trap()))
    else:
        torch.save({"net": lista().state_dict()}, path)
    with pytest.raises(ValueError, match="is a pickle, as torch.save writes it, which can run any code"):
        load(path)


def test_other_files_are_refused(path):
    with pytest.raises(FileNotFoundError):
        load(path)
    for content in (b"", b"junk", b"\x08\0\0\0\0\0\0\0{broken}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no safetensors file"):
            load(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="no description of a network"):
        load(path)
    save_file({"a": torch.ones(2)}, path, {"unrolled": "{"})
    with pytest.raises(ValueError, match="net.safetensors: "):
        load(path)
    save_file({"a": torch.ones(2)}, path, {"unrolled": "[" * 100_000})
    with pytest.raises(ValueError, match="net.safetensors: "):
        load(path)
    for classes, message in (([lista()], "Pass the class, no object"), (["LISTA"], "must hold classes")):
        with pytest.raises(TypeError, match=message):
            load(path, classes=classes)


def test_whatever_a_file_says_nothing_else_happens(path):
    """Entries replaced by junk at random: the network comes, or a ValueError does, and the file is named."""
    net = lista(2, shrinkage=PiecewiseLinear(dtype=torch.float64), tied=("weight",), gradient=Checkpointed(1))
    save(net, path)
    original = path.read_bytes()
    junk = [None, True, 0, -1, 1.5, "", "eval", [], [1], {}, {"class": "x"}, {"tuple": 1}, {"dict": []}, {"dtype": 1}]
    draw = random.Random(0)

    def places(value, way=()):
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, part in inner:
            yield (*way, key)
            yield from places(part, (*way, key))

    refused = 0
    for _ in range(150):
        path.write_bytes(original)

        def change(content, tensors):
            way = draw.choice(list(places(content)))
            (without(*way) if draw.random() < 0.2 else setting(*way, draw.choice(junk)))(content, tensors)

        rewrite(path, change)
        try:
            twin = load(path)
        except ValueError as error:
            assert "net.safetensors" in str(error)
            refused += 1
        else:
            assert isinstance(twin, LISTA)
    assert refused > 100


def test_without_safetensors(monkeypatch, path):
    save(lista(), path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: save(lista(), path), lambda: load(path)):
        with pytest.raises(ImportError, match=r"pip install 'unrolled\[io\]'"):
            call()


# ---- The record ------------------------------------------------------------------------------------------------------


def test_names_are_unique():
    found = known()
    assert all(found[name_of(thing)] is thing for thing in _ours())
    assert found["unrolled.sparse.LISTA"] is LISTA and found["unrolled.shrinkage.RadialBasis"] is RadialBasis
    assert not [name for name in found if not name.startswith("unrolled.")]
    assert "unrolled.io.save" not in found and "unrolled.solvers.ista" not in found


def test_signatures_stay():
    names = list(inspect.signature(LISTA).parameters)
    assert names[:3] == ["dictionary", "num_iters", "alpha"]
    assert (
        LISTA.__init__.__qualname__ == "LISTA.__init__" and inspect.signature(Odd).parameters["thing"].default is None
    )
    with pytest.raises(TypeError, match="alpha"):
        LISTA(DICTIONARY)


def test_the_outermost_constructor_is_recorded():
    net = lista(momentum=True)
    record = vars(net)[KEY]
    assert record.kind is LISTA and record.arguments["momentum"] is True and record.arguments["shrinkage"] is None

    class Named(LISTA):
        def __init__(self, size):
            super().__init__(torch.eye(size), 2, alpha=0.1)

    class Renamed(Named):
        pass

    assert vars(Named(3))[KEY] == (Named, {"size": 3})
    assert vars(Renamed(size=3))[KEY] == (Renamed, {"size": 3})
    assert vars(copy.deepcopy(net[:2]))[KEY] == record


def test_the_record_holds_no_memory():
    dictionary = _randn(6, 10)
    net = LISTA(dictionary, 2, alpha=0.1, shrinkage=SoftThreshold(dtype=torch.float64))
    gone = weakref.ref(dictionary)
    del dictionary
    gc.collect()
    assert gone() is None and KEY in vars(net)
    step = Odd()
    part = Unroll(step, 3, tied=False)[1:]
    gone = weakref.ref(step)
    del step
    gc.collect()
    assert gone() is None, "a part of a network must not keep the rest"
    assert len(part) == 2


def test_subclasses_without_a_constructor(path):
    class Half(Shrinkage):
        def forward(self, x, threshold=1.0):
            return x / 2

    net = lista(shrinkage=Half(num_channels=10))
    round_trip(net, path, signals(), classes=[Half])
