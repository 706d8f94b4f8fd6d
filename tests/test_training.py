"""Training: `fit` is the plain loop, resumes bit for bit, refuses what would spoil a run; stages train their layers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from unrolled import LISTA, fit, fit_stagewise, freeze, unfreeze
from unrolled.losses import CodeError, Lasso
from unrolled.training import default_optimizer

GENERATOR = torch.Generator().manual_seed(0)
DICTIONARY = nn.functional.normalize(torch.randn(8, 16, generator=GENERATOR), dim=0)
SIGNALS = torch.randn(64, 8, generator=GENERATOR)
BATCHES = list(SIGNALS.split(16))
LASSO = Lasso(DICTIONARY, alpha=0.2)


def network(**options: Any) -> LISTA:
    return LISTA(DICTIONARY, 4, alpha=0.2, **options)


def weights(net: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def same(net: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_training_lowers_the_objective() -> None:
    net = network()
    before = LASSO(net, SIGNALS).item()
    history = fit(net, BATCHES, LASSO, num_steps=60)
    assert len(history) == 60 and LASSO(net, SIGNALS).item() < 0.97 * before
    assert history.to_dict()["loss"] == history.loss and "60 steps" in repr(history)


def test_fit_is_the_plain_loop() -> None:
    net, other = network(), network()
    fit(net, BATCHES, LASSO, num_steps=7, optimizer=torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for step in range(7):
        optimizer.zero_grad()
        LASSO(other, BATCHES[step % 4]).backward()
        optimizer.step()
    assert same(net, other)


def test_default_optimizer_gives_matrices_a_tenth() -> None:
    net = network()
    few, many = default_optimizer(net, lr=0.5).param_groups
    assert few["lr"] == 0.5 and all(parameter.dim() < 2 for parameter in few["params"])
    assert many["lr"] == 0.05 and all(parameter.dim() == 2 for parameter in many["params"])
    assert len(few["params"]) + len(many["params"]) == len(list(net.parameters()))


def test_seeds_repeat() -> None:
    def run(seed: int) -> nn.Module:
        net = network()
        loader = DataLoader(TensorDataset(SIGNALS), batch_size=8, shuffle=True)
        fit(net, loader, lambda net, batch: LASSO(net, batch[0]), num_steps=11, seed=seed)
        return net

    assert same(run(1), run(1)) and not same(run(1), run(2))


@pytest.mark.parametrize("interrupted_at", [3, 4, 8, 13])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_resumed_run_ends_at_the_same_bits(tmp_path: Path, interrupted_at: int, shuffled: bool) -> None:
    def noisy_loss(net: nn.Module, batch: Any) -> Tensor:  # draws random numbers, as dropout would
        y = batch[0] if shuffled else batch
        return LASSO(net, y + 0.1 * torch.randn_like(y))

    def run(net: nn.Module, **options: Any) -> Any:
        data: Any = DataLoader(TensorDataset(SIGNALS), batch_size=16, shuffle=True) if shuffled else BATCHES
        return fit(net, data, noisy_loss, num_steps=15, seed=5, checkpoint_every=1, **options)

    def interrupt(step: int, loss: float, net: nn.Module) -> None:
        if step == interrupted_at + 1:  # after the checkpoint of the step before
            raise KeyboardInterrupt

    whole = network()
    expected = run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(network(), checkpoint=tmp_path / "run.pt", callbacks=[interrupt])
    resumed = network()
    history = run(resumed, checkpoint=tmp_path / "run.pt")
    assert same(resumed, whole) and history.loss == expected.loss
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    # A finished run has nothing more to do.
    assert len(run(resumed, checkpoint=tmp_path / "run.pt")) == 15 and same(resumed, whole)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    fit(network(), BATCHES, LASSO, num_steps=2, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="checkpoint .* is not of this network"):
        fit(network(tied=True), BATCHES, LASSO, num_steps=4, checkpoint=tmp_path / "run.pt")


def test_batches_that_run_out() -> None:
    with pytest.raises(ValueError, match="batches ended after 4 steps"):
        fit(network(), iter(BATCHES), LASSO, num_steps=5)
    with pytest.raises(ValueError, match="batches ended after 0 steps"):
        fit(network(), [], LASSO, num_steps=1)


def test_a_bad_loss_leaves_the_weights_alone() -> None:
    net = network()
    kept: list[list[Tensor]] = []

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        kept.append(weights(net))
        return LASSO(net, batch) * (float("nan") if len(kept) == 3 else 1.0)

    with pytest.raises(ValueError, match="loss is nan in step 3"):
        fit(net, BATCHES, loss, num_steps=5)
    assert all(torch.equal(a, b) for a, b in zip(weights(net), kept[2], strict=True))
    with pytest.raises(ValueError, match="loss must return a scalar Tensor"):
        fit(network(), BATCHES, lambda net, y: net(y), num_steps=1)


def test_callbacks_see_every_step_and_can_end() -> None:
    seen: list[int] = []

    def callback(step: int, loss: float, net: nn.Module) -> bool:
        seen.append(step)
        return step == 6

    assert len(fit(network(), BATCHES, LASSO, num_steps=20, callbacks=[callback])) == 6
    assert seen == [1, 2, 3, 4, 5, 6]


def test_the_scheduler_steps_with_the_loop() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    rates: list[float] = []
    record = lambda step, loss, net: rates.append(optimizer.param_groups[0]["lr"])
    fit(net, BATCHES, LASSO, num_steps=5, optimizer=optimizer, scheduler=scheduler, callbacks=[record])
    assert rates == [1.0, 0.5, 0.5, 0.25, 0.25]


def test_the_mode_is_restored_and_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    net = network().eval()
    fit(net, BATCHES, LASSO, num_steps=3, callbacks=[lambda step, loss, net: not net.training])
    assert not net.training
    assert capsys.readouterr().err == ""
    fit(net, BATCHES, LASSO, num_steps=3, progress=True)
    assert "loss" in capsys.readouterr().err


def test_freeze() -> None:
    net = network()
    assert freeze(net, "steps.*.inhibition") == [f"steps.{k}.inhibition" for k in range(4)]
    before = weights(net)
    fit(net, BATCHES, LASSO, num_steps=3)
    moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
    assert moved == [parameter.requires_grad for parameter in net.parameters()]
    unfreeze(net, "*")
    assert all(parameter.requires_grad for parameter in net.parameters())
    with pytest.raises(ValueError, match=r"pattern 'dictionary' matches no parameter. There are: steps.0.weight"):
        freeze(net, "dictionary")
    # A tied parameter is found under the name of any layer.
    tied = network(tied=("weight",))
    freeze(tied, "steps.3.weight")
    assert not tied[0].weight.requires_grad
    freeze(tied, "*")
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        fit(tied, BATCHES, LASSO, num_steps=1)


def test_stages_train_what_they_say() -> None:
    net = network()
    codes = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)) * (SIGNALS[:, :1] > 0)
    batches = [(codes @ DICTIONARY.T, codes)]
    seen: list[tuple[int, list[bool]]] = []

    def loss(part: nn.Module, batch: Any) -> Tensor:
        moved = [
            any(not torch.equal(p, q) for p, q in zip(step.parameters(), first)) for step, first in zip(net, start)
        ]
        seen.append((len(part), moved))
        return CodeError()(part, batch)

    start = [weights(step) for step in net]
    history = fit_stagewise(net, batches, loss, num_steps=2, lr=1e-3)
    assert [(stage.layers, stage.rate, stage.steps) for stage in history.stages] == [
        (t, rate, 2) for t in (1, 2, 3, 4) for rate in (1.0, 0.2, 0.02)
    ]
    assert len(history) == 24
    for layers, moved in seen:
        assert not any(moved[layers:]), "a layer that is not there yet must not move"
    assert history.stages[-1].last_loss < history.loss[0]


def test_the_first_stage_of_a_layer_trains_it_alone_and_rates_decay() -> None:
    net = network()
    moves: list[list[float]] = []
    previous = [weights(step) for step in net]

    def loss(part: nn.Module, y: Tensor) -> Tensor:
        now = [weights(step) for step in net]
        moves.append([max(float((a - b).abs().max()) for a, b in zip(p, q)) for p, q in zip(now, previous)])
        previous[:] = now
        return LASSO(part, y)

    fit_stagewise(net, BATCHES, loss, num_steps=2, lr=1e-3, layer_decay=0.5)
    # The loss of call i sees the move of step i - 1; Adam's first move in a stage is the rate itself.
    first_of_stage = {stage: moves[2 * stage + 1] for stage in range(12)}
    for t in range(4):
        alone, joint = first_of_stage[3 * t], first_of_stage[3 * t + 1]
        assert [move > 0 for move in alone] == [k == t for k in range(4)]
        expected = [1e-3 * 0.2 * 0.5 ** (t - k) if k <= t else 0.0 for k in range(4)]
        assert joint == pytest.approx(expected, rel=2e-2)


def test_stages_keep_the_best_weights() -> None:
    net = network()
    values: list[float] = []

    def validation(part: nn.Module) -> float:
        values.append(float(LASSO(part, SIGNALS)))
        return values[-1]

    history = fit_stagewise(
        net, BATCHES, LASSO, num_steps=50, lr=0.5, validation=validation, validate_every=2, patience=6
    )
    assert all(stage.steps <= 50 for stage in history.stages) and any(stage.steps < 50 for stage in history.stages)
    best = history.stages[-1].validation
    assert best is not None and LASSO(net, SIGNALS).item() == pytest.approx(best)


def test_stage_errors() -> None:
    with pytest.raises(ValueError, match="net is tied"):
        fit_stagewise(network(tied=True), BATCHES, LASSO, num_steps=1)
    with pytest.raises(ValueError, match="patience needs a validation"):
        fit_stagewise(network(), BATCHES, LASSO, num_steps=1, patience=3)
    with pytest.raises(ValueError, match="layer_decay must be in"):
        fit_stagewise(network(), BATCHES, LASSO, num_steps=1, layer_decay=1.5)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        fit(network(), BATCHES, LASSO, num_steps=0)


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from unrolled import LISTA, Truncated, fit
from unrolled.losses import Lasso
torch.set_num_threads(1)
dist.init_process_group("gloo")
dictionary, signals = torch.load(sys.argv[1])
net = LISTA(dictionary, 4, alpha=0.2, gradient=Truncated(2))
half = [y.chunk(2)[dist.get_rank()] for y in signals.split(16)]
history = fit(net, half, Lasso(dictionary, 0.2), num_steps=6, checkpoint=sys.argv[2])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    from unrolled import Truncated

    torch.save((DICTIONARY, SIGNALS), tmp_path / "data.pt")
    (tmp_path / "script.py").write_text(DISTRIBUTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += ["--master-port=29561", str(tmp_path / "script.py"), str(tmp_path / "data.pt"), str(tmp_path / "run.pt")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    net = network(gradient=Truncated(2))
    history = fit(net, BATCHES, LASSO, num_steps=6)
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert state["loss"] == pytest.approx(history.loss, rel=1e-5)
    for name, parameter in net.state_dict().items():
        torch.testing.assert_close(state["net"][name], parameter, rtol=0, atol=1e-6)
