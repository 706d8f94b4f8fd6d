"""Training: against the plain PyTorch loop, bit for bit; interrupted against uninterrupted; one process against two."""

import contextlib
import copy
import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from unrolled.gradient import Truncated
from unrolled.losses import Lasso
from unrolled.sparse import LISTA
from unrolled.step import Step
from unrolled.training import History, default_optimizer, fit, fit_stagewise, freeze, unfreeze
from unrolled.unroll import Unroll


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class GradientDescent(Step):
    """x+ = x - W (A x - y), optionally with dropout: something that draws random numbers in train mode."""

    def __init__(self, matrix, dropout=0.0):
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())
        self.weight = nn.Parameter(0.1 * matrix.mT)
        self.bias = nn.Parameter(torch.zeros(len(matrix)))
        self.dropout = nn.Dropout(dropout)

    def init(self, y):
        return y.new_zeros(*y.shape[:-1], self.matrix.shape[1])

    def forward(self, x, y):
        return x - self.dropout(x @ self.matrix.mT - y - self.bias) @ self.weight.mT


MATRIX = randn(4, 6) / 2
CODES = randn(24, 6, seed=1)
PAIRS = TensorDataset(CODES @ MATRIX.mT, CODES)
BATCHES = list(DataLoader(PAIRS, batch_size=6))


def network(num_iters=3, dropout=0.0, **options):
    return Unroll(GradientDescent(MATRIX, dropout), num_iters, **{"tied": False, **options})


def error(net, batch):
    y, x = batch
    return (net(y) - x).square().mean()


def evaluated(net):
    with torch.no_grad():
        return float(error(net, PAIRS.tensors))


def weights(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- fit -------------------------------------------------------------------------------------------------------------


def test_equals_the_plain_loop_bit_for_bit():
    net = network(dropout=0.2)
    plain = copy.deepcopy(net)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)
    loader = DataLoader(PAIRS, batch_size=5, shuffle=True)
    losses = []
    torch.manual_seed(0)
    for _ in range(3):
        for batch in loader:
            optimizer.zero_grad()
            loss = error(plain, batch)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    mine = torch.optim.Adam(net.parameters(), lr=1e-2)
    steered = torch.optim.lr_scheduler.StepLR(mine, 4, gamma=0.5)
    history = fit(net, loader, error, num_steps=15, optimizer=mine, scheduler=steered, seed=0)
    assert same(weights(net), weights(plain))
    assert history.loss == losses
    assert mine.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**3)


def test_default_optimizer_is_adam_with_two_rates():
    net = network()
    plain = copy.deepcopy(net)
    groups = [
        {"params": [p for p in plain.parameters() if p.dim() >= 2], "lr": 1e-3},
        {"params": [p for p in plain.parameters() if p.dim() < 2], "lr": 1e-2},
    ]
    fit(net, BATCHES, error, num_steps=5)
    fit(plain, BATCHES, error, num_steps=5, optimizer=torch.optim.Adam(groups))
    assert same(weights(net), weights(plain))


def test_the_default_optimizer_leaves_out_what_is_frozen():
    net = network()
    freeze(net, "*matrix")
    matrices, others = default_optimizer(net, lr=2e-3).param_groups
    assert (matrices["lr"], others["lr"]) == (2e-3, 2e-2)
    assert set(matrices["params"]) == {p for key, p in net.named_parameters() if key.endswith("weight")}
    assert set(others["params"]) == {p for key, p in net.named_parameters() if key.endswith("bias")}
    freeze(net, "*")
    with pytest.raises(ValueError, match="nothing to train"):
        default_optimizer(net)
    with pytest.raises(ValueError, match="lr must be greater than 0"):
        default_optimizer(network(), lr=0.0)


def test_learns_a_faster_solver():
    dictionary = nn.functional.normalize(randn(10, 20), dim=0)
    y = randn(64, 20, seed=1) @ dictionary.mT
    net, loss = LISTA(dictionary, 4, alpha=0.1), Lasso(dictionary, alpha=0.1)
    untrained = copy.deepcopy(net)
    fit(net, y.split(32), loss, num_steps=100)
    with torch.no_grad():
        solver = LISTA(dictionary, 1000, alpha=0.1, tied=True)
        before, after, solved = (loss(each, y) for each in (untrained, net, solver))
    assert after - solved < 0.5 * (before - solved)


def test_history():
    history = fit(network(), BATCHES, error, num_steps=7)
    assert len(history) == len(history.loss) == 7 and history.seconds > 0
    assert json.loads(json.dumps(history.to_dict())) == history.to_dict()
    assert repr(history).startswith(f"History(7 steps, loss {history.loss[0]:.4g} -> {history.loss[-1]:.4g}, ")
    assert repr(History()) == "History(0 steps, 0.0 s)"
    assert history == History(history.loss, seconds=99.0)


def test_seed_decides_and_the_callers_random_state_is_left():
    loader = DataLoader(PAIRS, batch_size=5, shuffle=True)
    nets = [network(dropout=0.2) for _ in range(3)]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first, again, other = (fit(net, loader, error, num_steps=6, seed=s) for net, s in zip(nets, (7, 7, 8), strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again and same(weights(nets[0]), weights(nets[1]))
    assert first.loss != other.loss


def test_modes_are_train_meanwhile_and_restored():
    net = network().train()
    net.steps[1].eval()
    before = {name: module.training for name, module in net.named_modules()}
    seen = []

    def look(step, loss, net):
        seen.append(all(module.training for module in net.modules()))
        net.eval()

    fit(net, BATCHES, error, num_steps=3, callbacks=[look])
    assert seen == [True] * 3
    assert {name: module.training for name, module in net.named_modules()} == before


def test_callbacks_get_step_loss_net_and_may_stop():
    net, seen = network(), []
    answers = iter([None, 17, False, np.bool_(False), torch.tensor(True)])  # 17: what file.write returns

    def callback(step, loss, given):
        seen.append((step, loss, given))
        return next(answers)

    history = fit(net, BATCHES, error, num_steps=100, callbacks=[callback])
    assert [step for step, _, _ in seen] == [1, 2, 3, 4, 5]
    assert [loss for _, loss, _ in seen] == history.loss and len(history) == 5
    assert all(given is net for _, _, given in seen)


def test_every_callback_is_called_even_if_one_stops():
    calls = []
    fit(network(), BATCHES, error, num_steps=9, callbacks=[lambda *_: True, lambda step, *_: calls.append(step)])
    assert calls == [1]


def test_progress(capfd):
    fit(network(), BATCHES, error, num_steps=3)
    silent = capfd.readouterr()
    assert silent.out == silent.err == ""
    history = fit(network(), BATCHES, error, num_steps=3, progress=True)
    shown = capfd.readouterr()
    assert shown.out == "" and "3/3" in shown.err and f"loss={history.loss[-1]:.4g}" in shown.err


# ---- batches ---------------------------------------------------------------------------------------------------------


def test_an_iterable_starts_anew():
    seen = []
    fit(network(), BATCHES, lambda net, b: (seen.append(b), error(net, b))[1], num_steps=10)
    assert all(b is BATCHES[k % 4] for k, b in enumerate(seen))


def test_an_iterator_that_ends_says_so_and_keeps_what_was_learned():
    net = network()
    with pytest.raises(ValueError, match=r"batches ran out after 4 steps.*num_steps=4"):
        fit(net, iter(BATCHES), error, num_steps=5)
    enough = network()
    fit(enough, iter(BATCHES), error, num_steps=4)
    assert same(weights(net), weights(enough))


@pytest.mark.parametrize("empty", [[], iter([]), DataLoader(PAIRS, batch_size=100, drop_last=True)])
def test_empty_batches(empty):
    with pytest.raises(ValueError, match="batches gave nothing"):
        fit(network(), empty, error, num_steps=1)


def test_a_distributed_sampler_is_told_the_epoch():
    sampler = DistributedSampler(PAIRS, num_replicas=2, rank=0)
    epochs = []
    sampler.set_epoch = epochs.append
    fit(network(), DataLoader(PAIRS, batch_size=6, sampler=sampler), error, num_steps=5)
    assert epochs == [0, 1, 2]


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoilt():
    net = network()
    poisoned = [*BATCHES[:2], (torch.full((6, 4), torch.inf), CODES[:6])]
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step 3.*learning rate"):
        fit(net, poisoned, error, num_steps=5)
    two = network()
    fit(two, BATCHES, error, num_steps=2)
    assert same(weights(net), weights(two))


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_spoilt():
    net = network()
    before = weights(net)

    def root(net, batch):  # sqrt(0) is fine, its derivative is not
        return (net(batch[0]) * 0).square().sum().sqrt() + net.steps[0].bias.sum()

    with pytest.raises(FloatingPointError, match=r"gradient of steps\.\d\.\w+ is not finite at step 1.*anomaly"):
        fit(net, BATCHES, root, num_steps=5)
    assert same(weights(net), before)


def test_large_gradients_that_are_finite_are_no_error():
    net = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(net.weight)
    huge = 3e38 * torch.ones(2, 2)
    assert huge.isfinite().all() and not huge.sum().isfinite()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-38)
    fit(net, [huge], lambda net, b: (net.weight * b).sum(), num_steps=1, optimizer=optimizer)
    torch.testing.assert_close(net.weight.detach(), torch.full((2, 2), -3.0))


LINEAR = nn.Linear(3, 1)
FROZEN = nn.Linear(3, 1).requires_grad_(False)
ADAM = torch.optim.Adam(LINEAR.parameters())


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"net": LINEAR.forward}, TypeError, r"net must be a torch\.nn\.Module"),
        ({"net": FROZEN}, ValueError, "net has nothing to train"),
        ({"batches": torch.ones(4, 3)}, TypeError, r"batches is one Tensor of shape \(4, 3\)"),
        ({"batches": 3}, TypeError, "batches must be iterable"),
        ({"loss": nn.MSELoss}, TypeError, "loss must be a function"),
        ({"loss": lambda net, b: 1.0}, TypeError, "loss must return a scalar torch.Tensor, got float"),
        (
            {"loss": lambda net, b: net(b)},
            ValueError,
            r"loss must return a real scalar, got \S+ of shape \(2, 1\)",
        ),
        ({"loss": lambda net, b: net(b).detach().sum()}, ValueError, "loss has no gradient"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1"),
        ({"num_steps": 2.0}, TypeError, "num_steps must be an int"),
        ({"optimizer": torch.optim.Adam}, TypeError, "optimizer must be an object"),
        ({"optimizer": torch.optim.Adam(nn.Linear(3, 1).parameters())}, ValueError, "optimizer has nothing to train"),
        ({"scheduler": torch.optim.lr_scheduler.StepLR}, TypeError, "scheduler must be an object"),
        ({"scheduler": torch.optim.lr_scheduler.StepLR(ADAM, 2)}, ValueError, "scheduler steers another optimizer"),
        ({"callbacks": print}, TypeError, "callbacks must be a list"),
        ({"callbacks": ["print"]}, TypeError, "callbacks must be a list"),
        ({"checkpoint": "no/such/folder/run.pt"}, ValueError, "checkpoint must be a file in a folder that exists"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_bad_arguments(change, kind, message):
    arguments = {"net": LINEAR, "batches": [torch.ones(2, 3)], "loss": lambda net, b: net(b).sum(), "num_steps": 1}
    with pytest.raises(kind, match=message):
        fit(**{**arguments, **change})


# ---- checkpoints -----------------------------------------------------------------------------------------------------


class Stream:
    """Fresh batches for ever, from torch's global generator."""

    def __iter__(self):
        while True:
            x = torch.randn(6, 6)
            yield x @ MATRIX.mT, x


def shuffled_by_its_own_generator():
    return DataLoader(PAIRS, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(3))


def shuffled_by_its_samplers_generator():
    sampler = RandomSampler(PAIRS, generator=torch.Generator().manual_seed(3))
    return DataLoader(PAIRS, batch_size=5, sampler=sampler)


SOURCES = {
    "list": lambda: BATCHES,
    "iterator": lambda: iter(BATCHES * 6),
    "shuffled": lambda: DataLoader(PAIRS, batch_size=5, shuffle=True),
    "shuffled, own generator": shuffled_by_its_own_generator,
    "shuffled, sampler's generator": shuffled_by_its_samplers_generator,
    "stream": Stream,
    "generator": lambda: iter(Stream()),
}


class Interrupted(Exception):
    pass


def interrupt_at(last):
    def callback(step, loss, net):
        if step == last:
            raise Interrupted

    return callback


def trained(source, path=None, interrupt=None, num_steps=19, every=4, seed=0):
    """Dropout, momentum, a scheduler: whatever has a state."""
    net = network(dropout=0.2)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    history = fit(
        net,
        source,
        error,
        num_steps=num_steps,
        optimizer=optimizer,
        scheduler=scheduler,
        checkpoint=path,
        checkpoint_every=every,
        callbacks=[interrupt_at(interrupt)] if interrupt else [],
        seed=seed,
    )
    return net, history, optimizer


@pytest.mark.parametrize("interrupt", [9, 12, 16])  # in an epoch of five, of four, between two epochs
@pytest.mark.parametrize("kind", list(SOURCES))
def test_resumed_equals_uninterrupted_bit_for_bit(kind, interrupt, tmp_path):
    path = tmp_path / "run.pt"
    whole, history, _ = trained(SOURCES[kind]())
    with pytest.raises(Interrupted):
        trained(SOURCES[kind](), path, interrupt)
    assert len(torch.load(path, weights_only=True)["history"]) == (interrupt - 1) // 4 * 4
    torch.manual_seed(99)  # another process would come with other random numbers
    net, resumed, optimizer = trained(SOURCES[kind](), path, seed=5)
    assert same(weights(net), weights(whole))
    assert resumed == history
    assert optimizer.param_groups[0]["lr"] < 1e-2
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("seed", [None, 0])
def test_resumed_at_the_end_of_an_epoch_and_with_the_same_loader(seed, own, tmp_path):
    def loader():
        generator = torch.Generator().manual_seed(3) if own else None
        return DataLoader(PAIRS, batch_size=6, shuffle=True, generator=generator)

    torch.manual_seed(4)
    whole, history, _ = trained(loader(), seed=seed)
    torch.manual_seed(4)
    path, again = tmp_path / "run.pt", loader()
    with pytest.raises(Interrupted):
        trained(again, path, interrupt=9, seed=seed)  # written at step 8, the last of the second epoch of four
    net, resumed, _ = trained(again, path, seed=seed)
    assert same(weights(net), weights(whole)) and resumed == history


def test_a_finished_run_only_loads_and_a_longer_one_goes_on(tmp_path):
    path = tmp_path / "run.pt"
    net, history, _ = trained(BATCHES, path, num_steps=6)
    again, loaded, _ = trained(BATCHES, path, num_steps=6)
    assert same(weights(net), weights(again)) and loaded == history
    longer, grown, _ = trained(BATCHES, path, num_steps=11)
    whole, full, _ = trained(BATCHES, num_steps=11)
    assert same(weights(longer), weights(whole)) and grown == full


def test_the_weights_can_be_read_from_the_file(tmp_path):
    net, _, _ = trained(BATCHES, tmp_path / "run.pt", num_steps=3)
    other = network()
    other.load_state_dict(torch.load(tmp_path / "run.pt", weights_only=True)["net"])
    assert same(weights(net), weights(other))


def test_early_stop_writes_too(tmp_path):
    history = fit(
        network(), BATCHES, error, num_steps=50, callbacks=[lambda step, *_: step == 3], checkpoint=tmp_path / "run.pt"
    )
    assert torch.load(tmp_path / "run.pt", weights_only=True)["history"] == history.loss and len(history) == 3


class WeightedError(nn.Module):
    """A loss with a state of its own."""

    def __init__(self, size=6):
        super().__init__()
        self.register_buffer("scale", torch.ones(size))

    def forward(self, net, batch):
        self.scale *= 0.9
        return ((net(batch[0]) - batch[1]).square() * self.scale).mean()


def test_the_losss_state_is_restored(tmp_path):
    whole = fit(network(), BATCHES, WeightedError(), num_steps=6)
    fit(network(), BATCHES, WeightedError(), num_steps=3, checkpoint=tmp_path / "run.pt")
    assert fit(network(), BATCHES, WeightedError(), num_steps=6, checkpoint=tmp_path / "run.pt") == whole


def test_a_checkpoint_of_something_else_is_refused_before_anything_changes(tmp_path):
    path = tmp_path / "run.pt"
    fit(network(), BATCHES, WeightedError(), num_steps=3, checkpoint=path)

    def refused(message, net=None, loss=None, num_steps=5, **options):
        net, loss = net or network(), loss or WeightedError()
        before = weights(net)
        with pytest.raises(ValueError, match=message):
            fit(net, BATCHES, loss, num_steps=num_steps, checkpoint=path, **options)
        assert same(weights(net), before)

    refused(r"another net: steps\.3\.matrix is None there, torch.float32 \(4, 6\) here", network(4))
    refused(r"another net: .* torch.float32 .* there, torch.float64 .* here", network().double())
    refused("another loss: scale is .* there, None here", loss=error)
    refused(r"another loss: scale is torch.float32 \(6,\) there, torch.float32 \(1,\) here", loss=WeightedError(1))
    refused("3 steps on, num_steps is 2", num_steps=2)
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    refused("with optimizer Adam, not SGD", net, optimizer=optimizer)
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    refused("parameter group", net, optimizer=optimizer)
    path.write_bytes(b"not a checkpoint")
    refused("cannot be read")
    torch.save({"weights": torch.ones(3)}, path)
    refused("was not written by fit")


def test_a_scheduler_without_state_cannot_be_checkpointed(tmp_path):
    class Bare:
        def step(self):
            pass

    fit(network(), BATCHES, error, num_steps=1, scheduler=Bare())
    with pytest.raises(TypeError, match="scheduler Bare needs state_dict"):
        fit(network(), BATCHES, error, num_steps=1, scheduler=Bare(), checkpoint=tmp_path / "run.pt")


# ---- freeze ----------------------------------------------------------------------------------------------------------


def test_frozen_parameters_stay_and_unfrozen_ones_move_again():
    net = network()
    fit(net, BATCHES, error, num_steps=3)  # leaves gradients behind
    before = weights(net)
    names = freeze(net, "steps.*.matrix")
    assert names == [f"steps.{k}.matrix" for k in range(3)]
    assert all(step.matrix.grad is None for step in net.steps)
    everything = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    for optimizer in (None, everything):
        fit(net, BATCHES, error, num_steps=3, optimizer=optimizer)
    after = weights(net)
    assert {name for name in before if torch.equal(before[name], after[name])} == set(names)
    assert unfreeze(net, "steps.[01].matrix") == names[:2]
    fit(net, BATCHES, error, num_steps=3)
    moved = {name for name in names if not torch.equal(net.state_dict()[name], after[name])}
    assert moved == {"steps.1.matrix"}  # the first layer starts at zero: its matrix makes no difference


def test_freezing_a_shared_parameter_by_any_of_its_names():
    net = network(tied=("matrix",))
    assert freeze(net, "steps.2.matrix") == ["steps.2.matrix"]
    assert not net.steps[0].matrix.requires_grad


def test_freeze_without_a_match_lists_the_names():
    with pytest.raises(ValueError, match=r"pattern 'dictionary' matches no parameter. There are: weight, bias"):
        freeze(nn.Linear(3, 1), "dictionary")


# ---- fit_stagewise ---------------------------------------------------------------------------------------------------


class Recorder:
    """An optimizer factory and a callback: which parameters had which rates, and what moved in each stage."""

    def __init__(self, net):
        self.names = {parameter: name for name, parameter in net.named_parameters()}
        self.net, self.rates, self.states = net, [], [weights(net)]

    def __call__(self, groups):
        self.states.append(weights(self.net))
        self.rates.append({self.names[p]: group["lr"] for group in groups for p in group["params"]})
        return torch.optim.Adam(groups)

    def moved(self, stage):
        before, after = [*self.states[1:], weights(self.net)][stage : stage + 2]
        return {name for name in before if not torch.equal(before[name], after[name])}


def test_stages_rates_and_what_moves():
    net = network()
    recorder = Recorder(net)
    history = fit_stagewise(net, BATCHES, error, num_steps=4, lr=1e-2, optimizer=recorder)
    assert [(stage.layers, stage.name, stage.steps) for stage in history.stages] == [
        (t, name, 4) for t in (1, 2, 3) for name in ("new layer", "joint x 0.2", "joint x 0.02")
    ]
    assert len(history) == 36
    assert [stage.first_loss for stage in history.stages] == history.loss[::4]
    assert [stage.last_loss for stage in history.stages] == history.loss[3::4]
    keys = ("matrix", "weight", "bias")
    for t in range(3):
        new, *joint = recorder.rates[3 * t : 3 * t + 3]
        assert new == {f"steps.{t}.{key}": 1e-2 for key in keys}
        for rate, rho in zip(joint, (0.2, 0.02), strict=True):
            expected = {f"steps.{j}.{key}": 1e-2 * rho * 0.3 ** (t - j) for j in range(t + 1) for key in keys}
            assert rate == pytest.approx(expected, rel=1e-12)
        still = {"steps.0.matrix"}  # the first layer starts at zero: its matrix makes no difference
        assert recorder.moved(3 * t) == {f"steps.{t}.{key}" for key in keys} - still
        assert recorder.moved(3 * t + 1) == {f"steps.{j}.{key}" for j in range(t + 1) for key in keys} - still
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_every_stage_lowers_the_loss():
    net = network()
    found = []
    fit_stagewise(
        net,
        [PAIRS.tensors],
        error,
        num_steps=60,
        lr=1e-2,
        callbacks=[lambda step, loss, part: found.append((len(part), evaluated(part))) if step in (1, 60) else None],
    )
    assert [layers for layers, _ in found] == [t for t in (1, 2, 3) for _ in range(6)]
    assert all(after < before for (_, before), (_, after) in zip(found[::2], found[1::2], strict=True))
    assert evaluated(net) == found[-1][1] < 0.8 * evaluated(network())


def test_the_first_stage_is_fit_on_the_slice():
    net, plain = network(), network()
    fit_stagewise(net, BATCHES, error, num_steps=4, lr=1e-2, joint_rates=())
    for t in (1, 2, 3):
        optimizer = torch.optim.Adam(plain.steps[t - 1].parameters(), lr=1e-2)
        fit(plain[:t], BATCHES, error, num_steps=4, optimizer=optimizer)
    assert same(weights(net), weights(plain))


def test_shared_parameters_belong_to_the_first_layer():
    net = network(tied=("matrix",))
    recorder = Recorder(net)
    fit_stagewise(net, BATCHES, error, num_steps=2, lr=1e-2, joint_rates=(0.5,), optimizer=recorder)
    assert [("steps.0.matrix" in rates) for rates in recorder.rates] == [True, True, False, True, False, True]
    assert recorder.rates[5]["steps.0.matrix"] == pytest.approx(1e-2 * 0.5 * 0.3**2)
    assert net.steps[0].matrix is net.steps[2].matrix


def test_frozen_parameters_and_layers_are_left_out():
    net = network()
    names = [*freeze(net, "steps.*.bias"), *freeze(net, "steps.1.*")]
    before = weights(net)
    history = fit_stagewise(net, BATCHES, error, num_steps=2, joint_rates=(0.5,))
    assert [(stage.layers, stage.name) for stage in history.stages] == [
        (1, "new layer"), (1, "joint x 0.5"), (2, "joint x 0.5"), (3, "new layer"), (3, "joint x 0.5")
    ]  # fmt: skip
    assert all(torch.equal(before[name], net.state_dict()[name]) for name in names)
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == set(names)


def test_the_best_weights_of_a_stage_are_restored_and_patience_ends_it():
    values = iter([5.0, 4.0, 3.0, 3.5, 3.0, 0.0])  # before the stage and after 2, 4, 6, 8 steps: best at 4
    net, seen = network(1), []

    def validation(part):
        assert not part.training and not torch.is_grad_enabled() and len(part) == 1
        seen.append(weights(part))
        return next(values)

    history = fit_stagewise(
        net, BATCHES, error, num_steps=50, lr=1e-2, joint_rates=(), validation=validation, validate_every=2, patience=4
    )
    assert history.stages[0].steps == 8 and len(seen) == 5
    assert same(weights(net), seen[2]) and not same(seen[2], seen[4])
    assert net.training


def test_a_stage_never_leaves_worse_weights_behind():
    net = network()
    before = weights(net)
    fit_stagewise(net, BATCHES, error, num_steps=5, lr=10.0, joint_rates=(), validation=evaluated)  # too fast
    assert same(weights(net), before)


def test_stagewise_seed_covers_all_stages():
    loader = DataLoader(PAIRS, batch_size=5, shuffle=True)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    runs = [fit_stagewise(network(2, dropout=0.2), loader, error, num_steps=2, seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0] == runs[1] and runs[0].loss != runs[2].loss


def test_an_iterator_goes_on_from_stage_to_stage():
    history = fit_stagewise(network(2), iter(Stream()), error, num_steps=3, joint_rates=(0.1,))
    assert len(history) == 12
    with pytest.raises(ValueError, match="batches gave nothing"):
        fit_stagewise(network(2), iter(BATCHES), error, num_steps=4)


def test_stagewise_progress(capfd):
    fit_stagewise(network(2), BATCHES, error, num_steps=2, progress=True)
    assert "6/6" in capfd.readouterr().err


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"net": nn.Linear(3, 1)}, TypeError, "net must be an Unroll, got Linear"),
        ({"net": network(tied=True)}, ValueError, "net has tied=True"),
        ({"net": network().requires_grad_(False)}, ValueError, "net has nothing to train"),
        ({"batches": torch.ones(3, 4)}, TypeError, "batches is one Tensor"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1"),
        ({"lr": 0.0}, ValueError, "lr must be greater than 0"),
        ({"joint_rates": (0.2, -1.0)}, ValueError, r"joint_rates\[1\] must be greater than 0"),
        ({"layer_decay": 0.0}, ValueError, "layer_decay must be greater than 0"),
        ({"patience": 5}, ValueError, "patience needs a validation"),
        ({"patience": 0, "validation": evaluated}, ValueError, "patience must be at least 1"),
        ({"validate_every": 0}, ValueError, "validate_every must be at least 1"),
        ({"validation": lambda net: math.nan}, ValueError, "validation returned nan for 1 layers at step 0"),
    ],
)
def test_bad_stagewise_arguments(change, kind, message):
    with pytest.raises(kind, match=message):
        fit_stagewise(**{"net": network(), "batches": BATCHES, "loss": error, "num_steps": 1, **change})


# ---- several processes -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_a_group_of_one_is_the_same_as_none(tmp_path):
    path = tmp_path / "run.pt"
    net, plain = network(), network()
    with group_of_one():
        history = fit(net, BATCHES, Deep(), num_steps=6, checkpoint=path)
        assert fit(network(), BATCHES, Deep(), num_steps=6, checkpoint=path) == history
    assert fit(plain, BATCHES, Deep(), num_steps=6) == history
    assert same(weights(net), weights(plain))


def test_a_network_that_is_already_wrapped():
    net, plain = network(), network()
    with group_of_one():
        fit(nn.parallel.DistributedDataParallel(net), BATCHES, error, num_steps=6)
    fit(plain, BATCHES, error, num_steps=6)
    assert same(weights(net), weights(plain))


class Deep(nn.Module):
    """A loss on every layer, which calls more of the network than its forward."""

    def forward(self, net, batch):
        return sum((x - batch[1]).square().mean() for x in net.iterates(batch[0]))


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_training import BATCHES, Deep, Interrupted, interrupt_at, error, evaluated, network
from unrolled.gradient import Truncated
from unrolled.training import fit, fit_stagewise

dist.init_process_group("gloo")
rank = dist.get_rank()
folder = Path(sys.argv[2])
half = [(y[3 * rank :][:3], x[3 * rank :][:3]) for y, x in BATCHES]
results = {}

net = network()
results["plain"] = fit(net, half, Deep(), num_steps=9).loss, net.state_dict()

net = network(gradient=Truncated(1))
results["truncated"] = fit(net, half, error, num_steps=5).loss, net.state_dict()

net = network()
results["stopped"] = fit(net, half, error, num_steps=9, callbacks=[lambda step, *_: rank == 1 and step == 4]).loss, {}

net = network(2)
history = fit_stagewise(net, half, error, num_steps=3, validation=evaluated, patience=2)
results["stagewise"] = history.loss, net.state_dict()

path = folder / "run.pt"
net = network(dropout=0.2)
results["whole"] = fit(net, half, error, num_steps=9, seed=0).loss, net.state_dict()
try:
    fit(network(dropout=0.2), half, error, num_steps=9, checkpoint=path, checkpoint_every=4, seed=0,
        callbacks=[interrupt_at(6)])
except Interrupted:
    pass
net = network(dropout=0.2)
results["resumed"] = fit(net, half, error, num_steps=9, checkpoint=path, checkpoint_every=4).loss, net.state_dict()

torch.save(results, folder / f"{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_on_halves_equal_one_on_the_whole(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += [f"--master-port={port}", str(script), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, (losses, state) in first.items():
        assert losses == second[name][0], name
        assert same(state, second[name][1]), name

    def alike(name, history, net):
        torch.testing.assert_close(first[name][0], history.loss, rtol=1e-6, atol=1e-6)
        for key, value in net.state_dict().items():
            torch.testing.assert_close(first[name][1][key], value, rtol=1e-6, atol=1e-6)

    net = network()
    alike("plain", fit(net, BATCHES, Deep(), num_steps=9), net)
    net = network(gradient=Truncated(1))
    alike("truncated", fit(net, BATCHES, error, num_steps=5), net)
    net = network(2)
    alike("stagewise", fit_stagewise(net, BATCHES, error, num_steps=3, validation=evaluated, patience=2), net)
    assert len(first["stopped"][0]) == 4
    assert first["resumed"][0] == first["whole"][0] and same(first["resumed"][1], first["whole"][1])
