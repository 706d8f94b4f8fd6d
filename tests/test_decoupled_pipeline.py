"""A chain of decoupled modules in two processes that talk by gloo: neither waits for the other's update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from unrolled.decoupled import DecoupledChain, DecoupledModule, LinearSynthesiser, PipelineStage

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")

FEATURES, CLASSES, BATCHES, BATCH = 12, 3, 150, 32


def modules() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(6, FEATURES), nn.Tanh()), nn.Linear(FEATURES, CLASSES)]


def synthesiser() -> LinearSynthesiser:
    """One that has something to say from the beginning, so that a first update is seen to be one."""
    made = LinearSynthesiser(FEATURES, CLASSES)
    nn.init.normal_(made.last.weight, std=0.01, generator=torch.Generator().manual_seed(2))
    return made


def data() -> list[tuple[Tensor, Tensor]]:
    """Three clouds of points."""
    generator = torch.Generator().manual_seed(1)
    centres = 1.5 * torch.randn(CLASSES, 6, generator=generator)
    labels = torch.randint(CLASSES, (BATCHES, BATCH), generator=generator)
    x = centres[labels] + torch.randn(BATCHES, BATCH, 6, generator=generator)
    return list(zip(x, labels, strict=True))


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


OPTIMISERS = (sgd, adam)  # each module has its own


def one_process() -> tuple[list[float], list[list[float]]]:
    layers = modules()
    chain = DecoupledChain(layers, synthesiser(), adam)
    for stage, make in zip(chain.stages, OPTIMISERS, strict=True):
        stage.optimizer = make(stage.module.parameters())
    losses = [chain.update(x, labels, nn.functional.cross_entropy).item() for x, labels in data()]
    return losses, [list(flat(layer)) for layer in layers]


def flat(module: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()


def worker(rank: int, delay: int, hold: bool, folder: Path) -> None:
    """What each of the two processes does. With `hold` the second begins when the first has made `delay` updates."""
    torch.set_num_threads(1)
    patience = timedelta(seconds=120)
    store = dist.FileStore(str(folder / "store"), 2)
    store.set_timeout(patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
    module = DecoupledModule(modules()[rank], synthesiser() if rank == 0 else None, OPTIMISERS[rank], adam)
    stage = PipelineStage(module, loss=nn.functional.cross_entropy if rank == 1 else None, delay=delay)
    losses, ahead = [], 0
    if hold and rank == 1:
        store.wait(["ahead"])
    for x, labels in data():
        before = flat(module.module)
        loss = stage.update(x if rank == 0 else None, labels)
        losses += [] if loss is None else [loss.item()]
        ahead += flat(module.module) != before
        if hold and rank == 0 and ahead == delay:
            store.set("ahead", "yes")
    stage.finish()
    (folder / f"{rank}.json").write_text(json.dumps({"losses": losses, "weights": flat(module.module)}))
    dist.barrier()
    dist.destroy_process_group()


def two_processes(delay: int, folder: Path, hold: bool = False) -> tuple[list[float], list[list[float]]]:
    command = [sys.executable, __file__]
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, str(rank), str(delay), str(int(hold)), str(folder)], env=settings, stderr=-1)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], b"\n".join(errors).decode()
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert not first["losses"]
    return second["losses"], [first["weights"], second["weights"]]


def test_waiting_for_every_lesson_is_the_chain_in_one_process(tmp_path: Path) -> None:
    losses, weights = two_processes(0, tmp_path)
    expected, expected_weights = one_process()
    # The same operations on the same numbers; json keeps all digits.
    assert losses == expected
    assert weights == expected_weights


def test_nobody_waits_and_the_loss_is_the_same_within_noise(tmp_path: Path) -> None:
    """The first process makes three updates before the second is even there; its lessons are three batches late."""
    losses, _ = two_processes(3, tmp_path, hold=True)
    expected, _ = one_process()
    late, late_expected = torch.tensor(losses)[-50:], torch.tensor(expected)[-50:]
    assert late_expected.mean() < 0.5 * expected[0]
    # Both are means of 50 batches of 32: two standard errors of the batches' own spread.
    noise = 2 * late_expected.std() / 50**0.5
    assert (late.mean() - late_expected.mean()).abs() < noise


def test_a_stage_checks_its_place() -> None:
    module = DecoupledModule(nn.Linear(2, 2), None, adam)
    with pytest.raises(RuntimeError, match="init_process_group"):
        PipelineStage(module)
    with pytest.raises(TypeError, match="stage must be a DecoupledModule"):
        PipelineStage(nn.Linear(2, 2))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="process 0 is the last of 1: give it loss"):
            PipelineStage(module)
        with pytest.raises(ValueError, match="delay must be at least 0"):
            PipelineStage(module, loss=nn.functional.mse_loss, delay=-1)
        with pytest.raises(ValueError, match="x is missing"):
            PipelineStage(module, loss=nn.functional.mse_loss).update(None)
        alone = PipelineStage(module, loss=nn.functional.mse_loss)
        assert alone.update(torch.ones(4, 2), torch.zeros(4, 2)) > 0
        alone.finish()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", Path(sys.argv[4]))
