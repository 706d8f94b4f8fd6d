"""`Trace`: it records what `iterates` returns, changes nothing, and leaves nothing behind."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from unrolled import LISTA, Checkpointed, Step, Tolerance, Trace, Truncated, Unroll

F64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def coder(num_iters=6, **options):
    return LISTA(randn(6, 10), num_iters, alpha=0.4, **options)


def sparsity(x):
    return (x != 0).sum(-1)


def hooks(module):
    return [
        len(hook)
        for part in module.modules()
        for hook in (part._forward_hooks, part._forward_pre_hooks, part._forward_hooks_always_called)
    ]


y = randn(3, 6, seed=1)

# ---- What it records -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [None, Tolerance(0.05)], ids=["no stop", "stop"])
@pytest.mark.parametrize("gradient", [None, Checkpointed(2), Truncated(2)], ids=str)
@pytest.mark.parametrize("tied", [True, False, ("weight",)], ids=str)
def test_states_and_metrics_are_those_of_the_iterates(tied, gradient, stop):
    net = coder(tied=tied, stop=stop, **({} if gradient is None else {"gradient": gradient}))
    with Trace(
        net, {"sparsity": sparsity, "first": lambda x: x[0, 0], "sum": lambda x: float(x.sum())}, states=True
    ) as trace:
        net(y).sum().backward()  # Checkpointed computes iterations again: they are not new ones
    iterates = [x.detach() for x in net.iterates(y)]
    assert len(trace) == len(trace.states) == 6
    torch.testing.assert_close(trace.states, iterates, rtol=0, atol=1e-13)
    assert not any(state.requires_grad for state in trace.states)
    np.testing.assert_array_equal(trace["sparsity"], torch.stack([sparsity(x) for x in iterates]).numpy())
    np.testing.assert_allclose(trace["first"], [x[0, 0].item() for x in iterates])
    np.testing.assert_allclose(trace["sum"], [x.sum().item() for x in iterates])
    assert trace["sparsity"].shape == (6, 3) and trace["first"].shape == trace["sum"].shape == (6,)


def test_a_metric_gets_the_readout_of_a_state():
    net = coder(momentum=True)
    with Trace(net, {"code": lambda x: x}, states=True) as trace:
        net(y)
    assert type(trace.states[0]) is type(net.run(y))
    np.testing.assert_array_equal(trace["code"], torch.stack([state.x for state in trace.states]).numpy())
    torch.testing.assert_close(torch.from_numpy(trace["code"]), torch.stack(net.iterates(y)).detach())


def test_num_iters_per_sample_is_a_hand_count():
    many = randn(5, 6, seed=2) * torch.logspace(-1, 1, 5, dtype=F64)[:, None]
    net = coder(40, tied=True)
    iterates = torch.stack([torch.zeros(5, 10, dtype=F64), *net.iterates(many)])
    settled = (iterates[1:] - iterates[:-1]).norm(dim=-1) <= 0.03 * iterates[1:].norm(dim=-1)
    by_hand = settled.long().argmax(0) + 1  # the first time

    net.stop = Tolerance(0.03)
    with Trace(net, {"sum": lambda x: x.sum(-1)}) as trace:
        out = net(many)
    assert torch.equal(trace.num_iters, by_hand)
    assert trace.num_iters.dtype == torch.long and len(set(by_hand.tolist())) > 1
    assert len(trace) == len(trace["sum"]) == by_hand.max() < 40
    np.testing.assert_allclose(trace["sum"][-1], out.sum(-1).detach())


def test_num_iters_without_a_rule_is_a_number():
    net = coder(tied=True)
    with Trace(net) as trace:
        net(y, num_iters=9)
    assert trace.num_iters == 9


def test_the_latest_call_replaces_the_one_before():
    net = coder(tied=True)
    with Trace(net, {"sparsity": sparsity}, states=True) as trace:
        net(y)
        net(y[:2], num_iters=4)
    assert len(trace) == len(trace.states) == 4
    assert trace["sparsity"].shape == (4, 2)

    with trace:  # and it can be put on again
        net(y)
    assert trace["sparsity"].shape == (6, 3)


def test_an_unroll_inside_a_larger_model():
    net = coder()
    model = nn.Sequential(nn.Linear(6, 6, dtype=F64), net, nn.Linear(10, 2, dtype=F64))
    with Trace(net, {"sparsity": sparsity}, states=True) as trace:
        model(y)
    assert len(trace) == 6
    assert torch.equal(trace.states[-1], net(model[0](y)))
    with pytest.raises(TypeError, match="net must be an Unroll, got Sequential.*trace the Unroll inside it"):
        Trace(model)


def test_two_traces_at_once():
    inner, outer = coder(), coder(4)
    with Trace(inner) as first, Trace(outer) as second, Trace(inner) as third:
        inner(y)
        outer(y)
    assert (len(first), len(second), len(third)) == (6, 4, 6)


def test_what_is_kept_does_not_change_under_a_step_in_place():
    class Counting(Step):
        def init(self, y):
            return torch.zeros_like(y)

        def forward(self, x, y):
            return x.add_(1)

    net = Unroll(Counting(), 3)
    with Trace(net, {"first": lambda x: x[0, 0], "all": lambda x: x}, states=True) as trace:
        net(y)
    assert [state[0, 0].item() for state in trace.states] == [1, 2, 3]
    assert trace["first"].tolist() == [1, 2, 3]
    assert trace["all"][:, 0, 0].tolist() == [1, 2, 3]


# ---- What it leaves alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [None, Tolerance(0.05)], ids=["no stop", "stop"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_network_is_the_same_with_and_without(tied, stop):
    net = coder(tied=tied, stop=stop)
    before, bare = hooks(net), net(y)
    with Trace(net, {"sparsity": sparsity}, states=True) as trace:
        traced = net(y)
        assert sum(hooks(net)) > sum(before)
    assert torch.equal(traced, bare) and traced.requires_grad
    parameters = list(net.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(traced.sum(), parameters), torch.autograd.grad(bare.sum(), parameters), rtol=0, atol=0
    )
    assert hooks(net) == before
    recorded = len(trace)
    net(y[:1])
    assert len(trace) == recorded and trace["sparsity"].shape[1] == 3


@pytest.mark.parametrize("stop", [None, Tolerance(0.05)], ids=["no stop", "stop"])
def test_an_exception_leaves_no_hook_and_no_open_recording(stop):
    net = coder(tied=True, stop=stop)
    before = hooks(net)

    def failing(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Trace(net, {"failing": failing}):
        net(y)
    assert hooks(net) == before

    with Trace(net) as trace:
        with pytest.raises(ValueError, match="y must have shape"):
            net(y[:, :2])
        net[0](y.new_zeros(3, 10), net[0].prepare(y))  # outside a call of the network: no iteration of it
        assert len(trace) == 0
        net(y)
        assert len(trace) > 0
    assert hooks(net) == before


# ---- As data, and at the door ----------------------------------------------------------------------------------------


def test_to_dict_is_json():
    metrics = {"sparsity": sparsity, "mean": torch.mean, "plain": lambda x: 1.5}
    for stop, num_iters in ((None, 6), (Tolerance(1e-9), [6, 6, 6])):
        net = coder(stop=stop)
        with Trace(net, metrics, states=True) as trace:
            net(y)
        record = json.loads(json.dumps(trace.to_dict(), allow_nan=False))
        assert set(record) == {"num_iters", "sparsity", "mean", "plain"}
        assert record["num_iters"] == num_iters
        assert record["plain"] == [1.5] * 6
        np.testing.assert_allclose(record["mean"], trace["mean"])
        assert np.shape(record["sparsity"]) == (6, 3)


def test_a_metric_in_bfloat16():
    net = coder().to(torch.bfloat16)
    with Trace(net, {"mean": torch.mean}) as trace:
        net(y.to(torch.bfloat16))
    assert trace["mean"].shape == (6,)


def test_an_unknown_metric_is_told_what_there_is():
    net = coder()
    with Trace(net, {"sparsity": sparsity, "mean": torch.mean}) as trace:
        net(y)
    with pytest.raises(KeyError, match="'sparsty' is not recorded here; there is 'sparsity', 'mean'"):
        trace["sparsty"]
    with pytest.raises(KeyError, match="there is no metric"):
        Trace(net)["sparsity"]


def test_before_any_call_there_is_nothing_and_it_says_so():
    trace = Trace(coder(), {"sparsity": sparsity}, states=True)
    assert len(trace) == trace.num_iters == 0 and trace.states == []
    with pytest.raises((KeyError, RuntimeError), match="call"):
        trace["sparsity"]
    assert trace.to_dict() == {"num_iters": 0, "sparsity": []}


def test_metrics_must_be_functions():
    with pytest.raises(TypeError, match=r"metrics\['loss'\] must be a function of the readout, got 3"):
        Trace(coder(), {"loss": 3})


def test_a_compiled_network_is_refused():
    torch._dynamo.reset()
    net = coder(2)
    with pytest.raises(TypeError, match="Of a compiled network trace the original"):
        Trace(torch.compile(net, backend="eager"))
    net.compile(backend="eager")  # compiled in place it is still an Unroll, but its hooks do not run
    with pytest.raises(TypeError, match="compiled"):
        Trace(net)
