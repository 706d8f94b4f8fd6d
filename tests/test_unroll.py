"""`Unroll`: tying by name, slices, warm starts, what the loop calls and what it refuses."""

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from unrolled import LISTA, Backprop, Checkpointed, Momentum, Step, Tolerance, Truncated, Unroll

K = 4


class Layered(Step):
    """A parameter, a buffer and a submodule, with names that begin alike."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("offset", torch.ones(3))
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.inner_gain = nn.Parameter(torch.ones(3))

    def init(self, y):
        return torch.zeros_like(y)

    def forward(self, x, y):
        return y + self.scale * self.inner_gain * self.inner(x + self.offset)


class Walk(Step):
    """x+ = x + speed: every iteration's parameter has the gradient 1."""

    def __init__(self):
        super().__init__()
        self.speed = nn.Parameter(torch.tensor(1.0))

    def init(self, y):
        return torch.zeros_like(y)

    def forward(self, x, y):
        return x + self.speed


class Logged(Walk):
    """Writes down every call that it gets."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def __deepcopy__(self, memo):  # the copies write into the same log
        return Logged(self.log)

    def check(self, y):
        self.log.append("check")

    def prepare(self, y):
        self.log.append("prepare")
        return y

    def init(self, y):
        self.log.append("init")
        return super().init(y)

    def forward(self, x, y):
        self.log.append("forward")
        return super().forward(x, y)

    def readout(self, x):
        self.log.append("readout")
        return x


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Nested(NamedTuple):
    x: Tensor
    pair: Pair
    count: Tensor


class NestedStep(Step):
    """x+ = a x + y with its last value and its running sum in a state inside the state."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def init(self, y):
        return Nested(torch.zeros_like(y), Pair(torch.zeros_like(y), torch.zeros_like(y)), y.new_zeros(()))

    def forward(self, state, y):
        x, pair, count = state
        return Nested(self.decay * x + y, Pair(x, pair.second + x), count + 1)

    def readout(self, state):
        return state.x + state.pair.second


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- Tying by name ---------------------------------------------------------------------------------------------------

TIES = {
    "scale": {"scale"},
    "offset": {"offset"},
    "inner": {"inner.0.weight", "inner.0.bias"},
    "inner.0.bias": {"inner.0.bias"},
}


def tensors(module):
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def shared(net):
    """The names under which all layers hold one and the same tensor."""
    return {name for name, held in tensors(net[0]).items() if all(tensors(step)[name] is held for step in net)}


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_meta(module):
    return copy.deepcopy(module).to("meta").to_empty(device="cpu")


def by_state_dict(assign):
    def load(module):
        twin = copy.deepcopy(module)
        twin.load_state_dict(module.state_dict(), assign=assign)
        return twin

    return load


TRANSFORMS = {
    "nothing": lambda module: module,
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "double": lambda module: module.double(),
    "meta": lambda module: module.to("meta"),
    "to_empty": through_meta,
    "load": by_state_dict(assign=False),
    "load assign": by_state_dict(assign=True),
    "load assign into pickled": lambda module: by_state_dict(assign=True)(through_pickle(module)),
}


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "inside a model"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("name", TIES)
def test_tied_names_stay_tied_and_the_others_apart(name, transform, nested):
    net = Unroll(Layered(), K, tied=(name,))
    net = transform(nn.Sequential(nn.Linear(3, 3), net))[1] if nested else transform(net)
    assert shared(net) == TIES[name]
    assert shared(net[1:3]) == TIES[name]
    held = [tensor for step in net for tensor in tensors(step).values()]
    everything = len(tensors(net[0]))
    assert len({id(tensor) for tensor in held}) == K * everything - (K - 1) * len(TIES[name])


def test_tying_several_names_takes_any_sequence_and_keeps_it():
    names = ["scale", "inner"]
    net = Unroll(Layered(), K, tied=names)
    names.append("nonsense")
    assert net.tied == ("scale", "inner")
    assert shared(net) == {"scale", "inner.0.weight", "inner.0.bias"}
    assert shared(Unroll(Layered(), K, tied=())) == set()
    everything = set(tensors(Layered()))
    assert shared(Unroll(Layered(), K, tied=sorted(everything))) == everything


def test_a_tied_buffer_that_a_layer_updates_is_seen_by_all():
    net = Unroll(Layered(), K, tied=("offset",)).double()
    net[2].offset.fill_(7.0)
    assert all(bool((step.offset == 7).all()) for step in net)


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "inside a model"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", ["scale", "offset", "inner"])
def test_a_state_whose_layers_disagree_on_a_tied_name_is_refused(name, assign, nested):
    def wrapped(net):
        return nn.Sequential(nn.Linear(3, 3), net) if nested else net

    tied, untied = Unroll(Layered(), K, tied=(name,)), Unroll(Layered(), K, tied=False)
    agreeing = wrapped(untied).state_dict()
    wrapped(tied).load_state_dict(agreeing, assign=assign)  # copies that agree may be merged

    (full, *_) = sorted(TIES[name])
    with torch.no_grad():
        tensors(untied[2])[full].add_(1.0)
    with pytest.raises(RuntimeError, match=rf"disagree on {full}, which this network ties"):
        wrapped(tied).load_state_dict(wrapped(untied).state_dict(), assign=assign)


def test_a_saved_tied_state_with_nan_can_be_loaded_again():
    net = Unroll(Layered(), K, tied=("scale",))
    with torch.no_grad():
        net[0].scale.fill_(torch.nan)  # a training that diverged: its checkpoint is still worth looking at
    Unroll(Layered(), K, tied=("scale",)).load_state_dict(net.state_dict())


@pytest.mark.parametrize(
    ("tied", "error", "message"),
    [
        ("scale", TypeError, "tied must be True, False or a sequence of names"),
        (("scale", 3), TypeError, "tied must be True, False or a sequence of names"),
        (None, TypeError, "tied must be True, False or a sequence of names"),
        (1, TypeError, "tied must be True, False or a sequence of names"),
        ((name for name in ("scale",)), TypeError, "tied must be True, False or a sequence of names"),
        (("scale", "inn"), ValueError, r"tied names 'inn', which Layered does not have\. It has: scale"),
        (("inner.1",), ValueError, "tied names 'inner.1'"),  # a submodule without a tensor
        (("",), ValueError, "tied names ''"),
    ],
)
def test_what_tied_refuses(tied, error, message):
    with pytest.raises(error, match=message):
        Unroll(Layered(), K, tied=tied)


def test_one_sgd_step_moves_each_parameter_by_its_own_gradient():
    for tied, expected in ((False, [0.9] * K), (True, [0.6] * K), (("speed",), [0.6] * K)):
        net = Unroll(Walk(), K, tied=tied)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        net(torch.zeros(1)).sum().backward()
        optimiser.step()
        assert [step.speed.item() for step in net] == pytest.approx(expected)


# ---- Slices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False, ("speed",)], ids=str)
@pytest.mark.parametrize(
    "index", [slice(2), slice(1, None), slice(-2, None), slice(0, 6, 2), slice(None, -1), slice(3, 99)], ids=str
)
def test_slices_keep_the_layers_that_python_would(index, tied):
    net = Unroll(Walk(), 6, tied=tied)
    part, kept = net[index], list(net)[index]
    assert len(part) == part.num_iters == len(kept)
    assert all(a is b for a, b in zip(part, kept, strict=True))
    assert part(torch.zeros(1)).item() == len(kept)
    assert len(net) == len(list(net)) == 6


def test_slices_of_slices_and_single_layers():
    net = Unroll(Walk(), 8, tied=False)
    assert list(net[2:][::2][1:]) == [net[4], net[6]]
    assert net[-1] is net[7]
    assert [id(step) for step in net] == [id(net[k]) for k in range(8)]
    for k in (8, -9):
        with pytest.raises(IndexError):
            net[k]
    tied = Unroll(Walk(), 8)
    assert tied[3] is tied[0]
    with pytest.raises(IndexError):
        tied[8]


@pytest.mark.parametrize("index", [slice(2, 2), slice(9, None), slice(None, None, -1), slice(3, 0, -1)], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_empty_and_reversed_slices_are_refused(index, tied):
    with pytest.raises(ValueError, match="of 4 layers must keep some, in order"):
        Unroll(Walk(), K, tied=tied)[index]


def test_slices_share_parameters_but_nothing_else():
    net = Unroll(Walk(), K, tied=False)
    part = net[:2]
    part(torch.zeros(1)).sum().backward()
    assert [None if step.speed.grad is None else step.speed.grad.item() for step in net] == [1, 1, None, None]

    calls = []
    for name, module in (("net", net), ("part", part)):
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    part.gradient, part.stop = Checkpointed(1), Tolerance()
    part.extra = nn.Linear(1, 1)
    net(torch.zeros(1))
    assert calls == ["net"]
    part(torch.zeros(1))
    assert calls == ["net", "part"]
    assert net.gradient == Backprop() and net.stop is None and "extra" not in dict(net.named_modules())


# ---- Calls -----------------------------------------------------------------------------------------------------------


def test_the_loop_calls_the_step_and_nothing_else():
    log = []
    y = torch.zeros(2, 1)
    Unroll(Logged(log), 3)(y)
    assert log == ["check", "prepare", "init", "forward", "forward", "forward", "readout"]

    log.clear()
    Unroll(Logged(log), 3, tied=False)(y)  # a layer prepares what it needs just before its turn
    assert log == ["check", "prepare", "init", "forward", "prepare", "forward", "prepare", "forward", "readout"]

    log.clear()
    Unroll(Logged(log), 3).iterates(y)
    assert log == ["check", "prepare", "init", "forward", "readout", "forward", "readout", "forward", "readout"]

    log.clear()
    Unroll(Logged(log), 3).run(y)
    assert log == ["check", "prepare", "init", "forward", "forward", "forward"]


def test_the_step_is_taken_not_copied_and_runs_as_given():
    step = Walk()
    net = Unroll(step, 1)
    assert net[0] is step and len(net) == 1
    assert Unroll(step, K, tied=False)[0] is step


def test_num_iters_in_a_call():
    y = torch.zeros(1)
    tied, untied = Unroll(Walk(), K), Unroll(Walk(), K, tied=("speed",))
    assert tied(y, num_iters=11).item() == 11
    assert len(tied.iterates(y, num_iters=2)) == untied(y, num_iters=2).item() == 2
    for call in (untied, untied.run, untied.iterates):
        with pytest.raises(ValueError, match="num_iters is 5, but this untied network has 4 layers"):
            call(y, num_iters=5)
    assert tied.num_iters == untied.num_iters == K


@pytest.mark.parametrize("tied", [True, False])
def test_a_warm_start_goes_on_where_the_state_was(tied):
    dictionary, y = randn(6, 10), randn(3, 6, seed=1)
    net = LISTA(dictionary, 8, alpha=0.2, momentum=True, tied=tied)
    half = net[:4].run(y)
    torch.testing.assert_close(net[4:](y, state=half), net(y), rtol=0, atol=1e-14)
    torch.testing.assert_close(net[4:].iterates(y, state=half), net.iterates(y)[4:], rtol=0, atol=1e-14)
    # Gradients flow through the state that was passed on.
    whole = torch.autograd.grad(net(y).sum(), net[0].step.weight)
    parts = torch.autograd.grad(net[4:](y, state=net[:4].run(y)).sum(), net[0].step.weight)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(2, 3).double(), None, (), "x"], ids=str)
def test_a_state_of_another_structure_is_refused(bad):
    net = Unroll(NestedStep(), K)
    y = torch.ones(2, 3, dtype=torch.float64)
    good = net.run(y)
    with pytest.raises(ValueError, match=r"state must be like Nested\(x=float64 \(2, 3\), pair=Pair\(first="):
        net(y, state=Nested(good.x, bad, good.count))


# ---- States ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [Backprop(), Checkpointed(2), Truncated(K)], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_states_within_states(gradient, tied):
    y = randn(2, 3).requires_grad_()
    net = Unroll(NestedStep(), K, tied=tied, gradient=gradient)
    state = net.run(y)
    # x_k = (1 + a + ... + a^(k-1)) y and the sum holds x_0 .. x_(K-1).
    x = [sum(0.4**i for i in range(k)) for k in range(K + 1)]
    torch.testing.assert_close(state.x, x[K] * y)
    torch.testing.assert_close(state.pair.first, x[K - 1] * y)
    torch.testing.assert_close(state.pair.second, sum(x[:K]) * y)
    assert state.count.item() == K
    (slope,) = torch.autograd.grad(net(y).sum(), y)
    torch.testing.assert_close(slope, torch.full_like(y, sum(x)))

    net.stop = Tolerance(rtol=1e-12)
    torch.testing.assert_close(net.run(y), state)


BREAKS = {
    "shape": (lambda x: x[..., :1], r"float32 \(2, 1\) went out"),
    "batch": (lambda x: x[:1], r"float32 \(1, 3\) went out"),
    "dtype": (lambda x: x.double(), r"float64 \(2, 3\) went out"),
    "none": (lambda x: None, "NoneType went out"),
    "list": (lambda x: [x], "list went out"),
    "tuple": (lambda x: Pair(x, x), r"Pair\(first=float32 \(2, 3\), second=.* went out"),
    "device": (lambda x: x.to("meta"), r"float32 \(2, 3\) on meta went out"),
}


class Faulty(Walk):
    """Returns something else as soon as x is 2."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def forward(self, x, y):
        x = super().forward(x, y)
        return self.fault(x) if bool((x > 2).all()) else x


@pytest.mark.parametrize("stop", [None, Tolerance(1e-9)], ids=["no stop", "stop"])
@pytest.mark.parametrize("name", BREAKS)
def test_a_step_that_changes_its_state_is_named_with_the_iteration(name, stop):
    fault, message = BREAKS[name]
    net = Unroll(Faulty(fault), K, stop=stop)
    with pytest.raises(ValueError, match=rf"Faulty.forward changed the state in iteration 2: .*{message}"):
        net(torch.zeros(2, 3))


@pytest.mark.parametrize("change", ["type", "inner shape", "fields"])
def test_a_change_inside_a_named_tuple_is_seen(change):
    class Changing(NestedStep):
        def forward(self, state, y):
            new = super().forward(state, y)
            if change == "type":
                return tuple(new)
            if change == "fields":
                return new.pair
            return new._replace(pair=new.pair._replace(second=new.pair.second[:1]))

    with pytest.raises(ValueError, match="Changing.forward changed the state in iteration 0"):
        Unroll(Changing(), K)(randn(2, 3))


def test_a_dtype_change_on_the_meta_device_is_seen():
    class Casting(Walk):
        def forward(self, x, y):
            return x.double()

    with pytest.raises(ValueError, match="Casting.forward changed the state in iteration 0"):
        Unroll(Casting().to("meta"), K)(torch.zeros(2, 3, device="meta"))


# ---- At the door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": nn.Linear(1, 1)}, "step must be an unrolled.Step instance, got Linear"),
        ({"step": Walk}, "step must be an unrolled.Step instance, got the class Walk"),
        ({"gradient": Backprop}, "gradient must be a strategy object .*, got the class Backprop"),
        ({"gradient": "backprop"}, "gradient must be a strategy object .*, got 'backprop'"),
        ({"gradient": None}, "gradient must be a strategy object .*, got None"),
        ({"stop": "x"}, "stop must be None or a rule .*, got 'x'"),
        ({"stop": 1e-3}, "stop must be None or a rule .*, got 0.001"),
        ({"stop": Tolerance}, "stop must be None or a rule .*, got the class Tolerance"),
        ({"num_iters": True}, "num_iters must be an int"),
        ({"num_iter": 3}, "num_iter"),  # a misspelt name is not swallowed
    ],
)
def test_what_unroll_refuses(arguments, message):
    with pytest.raises(TypeError, match=message):
        Unroll(**{"step": Walk(), "num_iters": K, **arguments})


def test_a_step_must_say_how_to_start_and_how_to_go_on():
    class NoInit(Step):
        def forward(self, state, context):
            return state

    class NoForward(Step):
        def init(self, context):
            return context

    for unfinished, missing in ((NoInit, "init"), (NoForward, "forward")):
        with pytest.raises(TypeError, match=missing):
            unfinished()


def test_momentum_needs_a_step_with_a_tensor_state():
    with pytest.raises(TypeError, match=r"step must be an unrolled.Step instance, got Linear"):
        Momentum(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="Momentum needs a step whose state is one Tensor, NestedStep has Nested"):
        Unroll(Momentum(NestedStep()), K)(randn(2, 3))


def test_momentum_around_a_step_without_parameters():
    class Halve(Step):
        def init(self, y):
            return y

        def forward(self, x, y):
            return x / 2

    y = torch.ones(1)
    # Its own schedule: x1 = 1/2, then z = x1 + (t1 - 1) / t2 (x1 - x0) with t1 = 1, so x2 = 1/4.
    assert Unroll(Momentum(Halve()), 2)(y).item() == pytest.approx(0.25)


def test_repr_names_every_option():
    net = Unroll(Layered(), K, tied=("scale",), gradient=Checkpointed(2), stop=Tolerance(rtol=1e-3))
    text = repr(net)
    assert "num_iters=4, tied=('scale',), gradient=Checkpointed(every=2)" in text
    assert "(stop): Tolerance(rtol=0.001, atol=0)" in text
    assert "tied=True, gradient=Backprop()" in repr(Unroll(Walk(), K))
    assert "num_iters=2, tied=False" in repr(Unroll(Walk(), K, tied=False)[1:3])
