"""What every system must hold, line by line. A system that cannot meet a line names it, with the reason, in its row."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import systems
import systems_cluster
import systems_crf
import systems_deconvolution
import systems_diffusion
import systems_features
import systems_image
import systems_l0
import systems_lowrank
import systems_shrinkage
import systems_sparse
import torch
from systems import System
from torch import Tensor

from unrolled import Checkpointed, Tolerance, Truncated, Unroll

BATCH = 3
SHORT = 2  # a first and a later layer: tracing takes seconds for some, and as many times more for five
EXACT = {"rtol": 0.0, "atol": 1e-12}  # the same float64 operations, perhaps in another order

SYSTEMS = [
    *systems.SYSTEMS,
    *systems_sparse.SYSTEMS,
    *systems_l0.L0_SYSTEMS,
    *systems_features.FEATURE_SYSTEMS,
    *systems_lowrank.LOWRANK_SYSTEMS,
    *systems_crf.CRF_SYSTEMS,
    *systems_cluster.CLUSTER_SYSTEMS,
    *systems_shrinkage.SHRINKAGE_SYSTEMS,
    *systems_image.IMAGE_SYSTEMS,
    *systems_deconvolution.DECONVOLUTION_SYSTEMS,
    *systems_diffusion.DIFFUSION_SYSTEMS,
]
every_system = pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)


def perturbed(net: Unroll) -> Unroll:
    """Away from the untrained values, where layers differ and nothing sits on a kink."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return net


def gradients(net: Unroll, inputs: tuple[Tensor, ...], weights: Tensor) -> list[Tensor]:
    loss = (net(*inputs) * weights).sum()
    return list(torch.autograd.grad(loss, list(net.parameters())))


def weights_for(net: Unroll, inputs: tuple[Tensor, ...]) -> Tensor:
    out = net(*inputs)
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=out.dtype)


@every_system
def test_untrained_is_the_classical_solver(system: System) -> None:
    inputs = system.inputs(BATCH)
    for num_iters in (1, 2, 5, 20):
        expected = system.reference(num_iters, *inputs)
        torch.testing.assert_close(system.make(num_iters=num_iters)(*inputs), expected, rtol=0, atol=1e-10)
        assert expected.abs().max() > 0.1


@every_system
def test_gradcheck(system: System) -> None:
    net = perturbed(system.make(num_iters=3))
    inputs = tuple(x.requires_grad_() for x in system.inputs(2))
    names, parameters = zip(*net.named_parameters(), strict=True)

    def call(*tensors: Tensor) -> Tensor:
        here, values = tensors[: len(inputs)], dict(zip(names, tensors[len(inputs) :], strict=True))
        return torch.func.functional_call(net, values, here)

    # The fast mode compares random projections of the Jacobians: enough to catch a wrong one, at every parameter.
    assert torch.autograd.gradcheck(call, (*inputs, *(p.detach().requires_grad_() for p in parameters)), fast_mode=True)


@every_system
@pytest.mark.parametrize("tied", [None, True, False])
def test_every_parameter_learns(system: System, tied: bool | None) -> None:
    net = perturbed(system.make(**({} if tied is None else {"tied": tied})))
    inputs = system.inputs(BATCH)
    found = dict(zip(dict(net.named_parameters()), gradients(net, inputs, weights_for(net, inputs)), strict=True))
    still = {name for name, gradient in found.items() if not gradient.any()}
    assert all(gradient.isfinite().all() for gradient in found.values())
    shared = net.tied if isinstance(net.tied, tuple) else ()
    dead = {name for name in system.dead if name.removeprefix("steps.0.") not in shared}
    assert still == (set() if net.tied is True else dead)


@every_system
def test_a_step_keeps_the_state(system: System) -> None:
    from unrolled._tree import same_structure

    net = system.make()
    inputs = system.inputs(BATCH)
    prepared = net[0].prepare(*inputs)
    state = net[0].init(prepared)
    assert same_structure(state, net[0](state, prepared))
    assert same_structure(state, net.run(*inputs))
    single, inputs32 = copy.deepcopy(net).float(), tuple(x.float() for x in inputs)
    assert single(*inputs32).dtype == torch.float32


@every_system
def test_answers_do_not_depend_on_batch_mates(system: System) -> None:
    net = perturbed(system.make())
    inputs = system.inputs(BATCH)
    out = net(*inputs)
    torch.testing.assert_close(net(*(x[:1] for x in inputs)), out[:1], **EXACT)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(net(*(x[order] for x in inputs)), out[order], **EXACT)


@every_system
def test_stopping_does_not_depend_on_batch_mates(system: System) -> None:
    net = system.make(num_iters=60)
    inputs = system.inputs(BATCH)
    net.stop = Tolerance(rtol=1e-2)
    out = net(*inputs)
    for i in range(BATCH):
        torch.testing.assert_close(net(*(x[i : i + 1] for x in inputs)), out[i : i + 1], **EXACT)
    net.stop = None
    assert not torch.equal(net(*inputs), out)


@every_system
def test_tied_and_untied_start_the_same(system: System) -> None:
    inputs = system.inputs(BATCH)
    torch.testing.assert_close(system.make(tied=True)(*inputs), system.make(tied=False)(*inputs), **EXACT)


@every_system
def test_untied_layers_have_storages_of_their_own(system: System) -> None:
    net = system.make(tied=False)
    pointers = [parameter.data_ptr() for parameter in net.parameters()]
    shared = net.tied if isinstance(net.tied, tuple) else ()  # some systems always share, such as an analytic weight
    names = [name for name, _ in net[0].named_parameters()]
    own = [name for name in names if not any(name == tied or name.startswith(f"{tied}.") for tied in shared)]
    assert own and len(set(pointers)) == len(pointers) == len(net) * len(own) + len(names) - len(own)


@every_system
def test_slices_are_the_first_iterations(system: System) -> None:
    net = perturbed(system.make())
    inputs = system.inputs(BATCH)
    iterates = net.iterates(*inputs)
    assert len(iterates) == len(net) == 5
    for k in (1, 3, 5):
        torch.testing.assert_close(net[:k](*inputs), iterates[k - 1], **EXACT)
        torch.testing.assert_close(net(*inputs, num_iters=k), iterates[k - 1], **EXACT)
    assert type(net[:2]) is type(net)
    assert {p.data_ptr() for p in net[:2].parameters()} <= {p.data_ptr() for p in net.parameters()}
    # The first half, then the second from where it stopped, is the whole.
    torch.testing.assert_close(net[2:](*inputs, state=net[:2].run(*inputs)), iterates[-1], **EXACT)


def by_pickle(net: Unroll) -> Unroll:
    return pickle.loads(pickle.dumps(net))


def by_torch_save(net: Unroll) -> Unroll:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_system
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies(system: System, duplicate: Callable[[Unroll], Unroll]) -> None:
    net = perturbed(system.make())
    inputs = system.inputs(BATCH)
    twin = duplicate(net)
    assert torch.equal(twin(*inputs), net(*inputs))
    assert repr(twin) == repr(net)
    assert len(list(twin.parameters())) == len(list(net.parameters())), "tied parameters must stay tied"
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in net.parameters()}


@every_system
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(system: System, assign: bool) -> None:
    net, other = perturbed(system.make()), system.make()
    inputs = system.inputs(BATCH)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
    assert torch.equal(other(*inputs), net(*inputs))
    assert len(list(other.parameters())) == len(list(net.parameters())), "tied parameters must stay tied"


@every_system
def test_export_with_a_dynamic_batch(system: System) -> None:
    net = perturbed(system.make(num_iters=SHORT)).eval()
    inputs = system.inputs(BATCH)
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    program = torch.export.export(net, inputs, dynamic_shapes=dynamic)
    more = system.inputs(7)
    torch.testing.assert_close(program.module()(*more), net(*more), **EXACT)


@every_system
@pytest.mark.parametrize("stop", [None, Tolerance(rtol=1e-2)])
def test_compile_fullgraph(system: System, stop: Tolerance | None) -> None:
    torch._dynamo.reset()
    net = perturbed(system.make(num_iters=SHORT))
    net.stop = stop
    inputs = system.inputs(BATCH)
    weights = weights_for(net, inputs)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), net(*inputs), **EXACT)
    torch.testing.assert_close(gradients(compiled, inputs, weights), gradients(net, inputs, weights), **EXACT)


@every_system
def test_vmap_and_per_sample_gradients(system: System) -> None:
    net = perturbed(system.make())
    inputs = system.inputs(BATCH)
    out = net(*inputs)
    torch.testing.assert_close(torch.vmap(net)(*inputs), out, **EXACT)
    values = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def loss(values: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return torch.func.functional_call(net, values, sample).square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, *(0 for _ in inputs)))(values, *inputs)
    whole = torch.autograd.grad(net(*inputs).square().sum(), list(net.parameters()))
    for name, expected in zip(values, whole, strict=True):
        torch.testing.assert_close(each[name].sum(0), expected, rtol=1e-9, atol=1e-11)


@every_system
def test_autocast_stays_finite(system: System) -> None:
    net = system.make().float()
    inputs = tuple(x.float() for x in system.inputs(BATCH))
    exact = net(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(*inputs)
    assert out.isfinite().all()
    # bfloat16 has 8 bits; five iterations of a contraction lose few more.
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.05 * float(exact.detach().abs().max()))


@every_system
@pytest.mark.parametrize("strategy", [Checkpointed(every=1), Checkpointed(every=2), Truncated(last=5)])
def test_exact_gradient_strategies(system: System, strategy: Any) -> None:
    exact, other = perturbed(system.make()), perturbed(system.make(gradient=strategy))
    inputs = system.inputs(BATCH)
    weights = weights_for(exact, inputs)
    assert torch.equal(other(*inputs), exact(*inputs))
    torch.testing.assert_close(gradients(other, inputs, weights), gradients(exact, inputs, weights), **EXACT)


@every_system
def test_parameters_are_contiguous(system: System, tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="the extra 'io' is not installed")
    net, other = perturbed(system.make()), system.make()
    assert all(parameter.is_contiguous() for parameter in net.parameters())
    safetensors.save_model(net, str(tmp_path / "net.safetensors"))
    safetensors.load_model(other, str(tmp_path / "net.safetensors"))
    inputs = system.inputs(BATCH)
    assert torch.equal(other(*inputs), net(*inputs))


@every_system
def test_repr_tells_what_it_is(system: System) -> None:
    text = repr(system.make())
    assert "num_iters=5" in text and "tied=" in text and "gradient=Backprop()" in text


@every_system
def test_bad_input_is_refused(system: System) -> None:
    net = system.make()
    for inputs, error, message in system.bad.values():
        for call in (net, net.run, net.iterates):
            with pytest.raises(error, match=message):
                call(*inputs)
    for num_iters, error in ((0, ValueError), (-3, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match="num_iters must be"):
            system.make(num_iters=num_iters)
        with pytest.raises(error, match="num_iters must be"):
            net(*system.inputs(BATCH), num_iters=num_iters)
    with pytest.raises(ValueError, match="state must be like"):
        net(*system.inputs(BATCH), state=net.run(*system.inputs(BATCH + 1)))
