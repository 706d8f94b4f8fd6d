"""Several processes: averaged gradients, checkpoints that change hands, parameters in shards. Two talk by gloo.

The functions under test are those of `examples/train_distributed.py` and the script of `docs/scaling-out.md`: they are
what a reader copies.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from unrolled import LISTA, Checkpointed, Truncated, fit
from unrolled.gradient import Implicit, Phantom
from unrolled.problems import SparseRecovery
from unrolled.training import processes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import train_distributed as example  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # a checkpoint of one process
    pytest.mark.filterwarnings("ignore::unrolled.gradient.GradientWarning"),  # biased ones must be equal, not good
]

CPU = torch.device("cpu")
OPTIONS = SimpleNamespace(m=20, n=51, layers=6, every=2, signals=96, batch=32, steps=10)
HALF = 5

# Odd numbers of rows, which do not divide by two.
WIDE = SparseRecovery(m=21, n=41, seed=0, dtype=torch.float64)
TALL = SparseRecovery(m=40, n=21, seed=0, dtype=torch.float64)  # where ISTA contracts, as Implicit needs it
SHARDED: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "untied": {"tied": False},
    "untied, in parts": {"tied": False, "every": 2},
    "untied, in parts, checkpointed": {"tied": False, "every": 3, "gradient": Checkpointed(2)},
    "untied, in parts, momentum": {"tied": False, "every": 2, "momentum": True},
    "some tied": {"tied": ("inhibition",)},
    "dictionary tied": {"tied": ("dictionary",), "factored": True},
    "momentum": {"tied": True, "momentum": True},
    "Checkpointed": {"tied": True, "gradient": Checkpointed(2)},
    "Truncated": {"tied": True, "gradient": Truncated(2)},
    "Truncated, untied": {"tied": False, "gradient": Truncated(2)},
    "Phantom": {"tied": True, "gradient": Phantom(3, 0.5)},
    "Implicit": {"tied": True, "gradient": Implicit(tol=1e-12), "problem": TALL, "num_iters": 300},
}


class Task(example.Task):
    """The example's, which counts the steps: who goes on from a checkpoint makes the missing half."""

    steps = 0

    def loss(self, net: nn.Module, y: Tensor) -> Tensor:
        self.steps += 1
        return super().loss(net, y)


def make(*, problem: SparseRecovery = WIDE, num_iters: int = 6, every: int | None = None, **options: Any) -> LISTA:
    return LISTA(problem.dictionary, num_iters, alpha=0.1, **options)


def signals(problem: SparseRecovery = WIDE) -> Tensor:
    return problem.validation(16).y


def backward(model: nn.Module, y: Tensor) -> None:
    model(y).square().sum(-1).mean().backward()


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else example.whole(p.grad) for name, p in net.named_parameters()}


# ---- What each of the two processes does -----------------------------------------------------------------------------


PATIENCE = 120  # seconds that one process waits for the other: something is wrong then


def worker(folder: Path, ports: list[str]) -> None:
    """Each group meets at a port of its own: the next one could come before the last has left."""
    torch.set_num_threads(1)
    os.chdir(folder)
    meet = iter(ports)
    results: dict[str, Any] = {"page": run_page(next(meet))}
    for arguments in ([], ["--shard"]):
        run_script(next(meet), folder, arguments)
    os.environ["MASTER_PORT"] = next(meet)
    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    results |= {"averaged": averaged(folder), "sharded": {name: sharded(**SHARDED[name]) for name in SHARDED}}
    results |= {"resumed": resumed(folder), "meta": on_meta(folder), "refused": refused(), "methods": methods()}
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def page_script() -> str:
    text = (ROOT / "docs" / "scaling-out.md").read_text()
    return text.split("a script for torchrun -->\n```python\n")[1].split("```")[0]


def run_page(port: str) -> dict[str, Tensor]:
    """The script of the page, as torchrun would start it."""
    os.environ["MASTER_PORT"] = port
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(page_script(), "scaling-out.md", "exec"), names)
    return names["net"].state_dict()


def run_script(port: str, folder: Path, arguments: list[str]) -> None:
    """The example, as torchrun would start it."""
    os.environ["MASTER_PORT"] = port
    before, sys.argv = sys.argv, ["train_distributed.py", "--smoke", "--out", f"script{len(arguments)}", *arguments]
    example.main()
    sys.argv = before


def averaged(folder: Path) -> dict[str, Tensor]:
    task = Task(OPTIONS, dtype=torch.float64)
    found = {"straight": example.flat(example.train(task, OPTIONS.steps))}
    example.train(task, HALF, folder / "two.pt")
    task.steps = 0
    found["from one"] = example.flat(example.train(task, OPTIONS.steps, folder / "one.pt"))
    assert task.steps == OPTIONS.steps - HALF
    # One process drew the numbers of `seed`; a second that joins shall draw others, as a fresh one would.
    drawn: list[Tensor] = []
    fit(
        task.net(),
        task.batches(),
        task.loss,
        num_steps=HALF + 1,
        checkpoint=folder / "joined.pt",
        seed=0,
        callbacks=[lambda *_: drawn.append(torch.rand(3))],
    )
    return found | {"drawn": drawn[0]}


class Gathers(TorchDispatchMode):
    """How often parameters are put together."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "allgather" in str(func)
        return func(*args, **(kwargs or {}))


def sharded(*, every: int | None = None, **options: Any) -> dict[str, Any]:
    net = make(**options)
    model = example.shard(net, CPU, every)
    shares = {name: example.local(p).shape for name, p in net.named_parameters()}
    y = signals(options.get("problem", WIDE))
    with Gathers() as gathers:  # first: FSDP gathers once more where it has seen a pass without a backward pass
        backward(model, y[dist.get_rank() :: 2])
    found: dict[str, Any] = {"gradients": gradients(net)}
    with torch.no_grad():
        found["output"] = model(y)
    return found | {
        "shares": {name: list(shape) for name, shape in shares.items()},
        "gathered": example.gathered_bytes(net, model, y),
        "gathers": gathers.count,
        "kept": all(isinstance(p, DTensor) or p.dim() == 0 for p in net.parameters()),
    }


def resumed(folder: Path) -> dict[str, Any]:
    task = Task(OPTIONS, dtype=torch.float64)
    net, _, optimizer = example.train_sharded(task, OPTIONS.steps)
    sizes = example.held_bytes(net, optimizer)
    example.train_sharded(task, HALF, folder / "two")
    task.steps = 0
    joined, _, _ = example.train_sharded(task, OPTIONS.steps, folder / "one")
    assert task.steps == OPTIONS.steps - HALF
    return {"straight": example.flat(net), "from one": example.flat(joined), "bytes": sizes}


def on_meta(folder: Path) -> dict[str, Tensor]:
    """Networks that no process ever holds as a whole: made without memory, cut, then filled from a checkpoint."""
    found = {}
    for name in ("untied", "some tied"):
        net = LISTA(WIDE.dictionary.to("meta"), 6, alpha=0.1, tied=SHARDED[name]["tied"])
        model = example.shard(net, CPU)
        net.to_empty(device="cpu")
        dcp.load(net.state_dict(), checkpoint_id=folder / name)  # into the shards themselves
        found[name] = model(signals()).detach()
    return found


def refused() -> dict[str, str]:
    """What goes wrong, with the words that it goes wrong with."""
    mesh = init_device_mesh("cpu", (2,))
    said = {}

    def attempt(name: str, call: Any) -> None:
        try:
            call()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"

    step, whole_net = make(tied=True), make(tied=False)
    fully_shard(step[0], mesh=mesh)
    fully_shard(whole_net, mesh=mesh)
    y = signals()
    attempt("step", lambda: step(y))
    attempt("fit", lambda: fit(whole_net, [y], lambda net, y: net(y).square().mean(), num_steps=1))
    attempt("slice", lambda: whole_net[:2])
    attempt("iterates", lambda: whole_net.iterates(y))
    attempt("number", lambda: fully_shard(make(momentum=True), mesh=mesh))
    return said


def methods() -> Tensor:
    """A method beside `forward`, registered."""
    net = make(tied=False)
    example.shard(net, CPU)
    register_fsdp_forward_method(net, "iterates")
    return torch.stack(net.iterates(signals())).detach()


# ---- One process, and the two beside it ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Everything in one process, with half-way checkpoints for the two."""
    folder = tmp_path_factory.mktemp("distributed")
    task = Task(OPTIONS, dtype=torch.float64)
    weights = example.flat(example.train(task, OPTIONS.steps))
    example.train(task, HALF, folder / "one.pt")
    example.train(task, HALF, folder / "joined.pt")
    net, _, optimizer = example.train_sharded(task, OPTIONS.steps)
    example.train_sharded(task, HALF, folder / "one")
    for name in ("untied", "some tied"):
        dcp.save(make(**SHARDED[name]).state_dict(), checkpoint_id=folder / name)
    return SimpleNamespace(folder=folder, task=task, weights=weights, bytes=example.held_bytes(net, optimizer))


@pytest.fixture(scope="module")
def pair(one: SimpleNamespace) -> list[dict[str, Any]]:
    """What both processes found."""
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(4)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2"}
    settings |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # torchrun has the store, too
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(one.folder), *(str(store.port) for store in stores)],
            env={**settings, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=2 * PATIENCE)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert [process.returncode for process in running] == [0, 0], b"\n".join(said).decode()
    return [torch.load(one.folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def near(weights: Tensor, expected: Tensor) -> bool:
    """Rounding leaves 1e-14 after ten steps of Adam. In float32 it moves a code across a threshold now and then."""
    return bool((weights - expected).abs().max() <= 1e-10)


@contextlib.contextmanager
def group_of_one() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---- Averaged gradients ----------------------------------------------------------------------------------------------


def test_two_processes_reach_the_weights_of_one(one, pair):
    start = example.flat(one.task.net())
    assert (one.weights - start).abs().max() > 1e-2  # there was something to agree on
    for found in pair:
        assert near(found["averaged"]["straight"], one.weights)
    assert torch.equal(pair[0]["averaged"]["straight"], pair[1]["averaged"]["straight"])


def test_a_checkpoint_of_one_process_is_finished_by_two(one, pair):
    for found in pair:
        assert near(found["averaged"]["from one"], one.weights)


def test_a_checkpoint_of_two_processes_is_finished_by_one(one, pair):
    saved = torch.load(one.folder / "two.pt", weights_only=True)
    assert len(saved["places"]) == 2 and len(saved["history"]) == HALF
    task = Task(OPTIONS, dtype=torch.float64)
    assert near(example.flat(example.train(task, OPTIONS.steps, one.folder / "two.pt")), one.weights)
    assert task.steps == OPTIONS.steps - HALF


def test_a_process_that_joins_draws_numbers_of_its_own(pair):
    assert not torch.equal(pair[0]["averaged"]["drawn"], pair[1]["averaged"]["drawn"])


def test_the_script_of_the_page(pair):
    """It trains under two processes, which end with the same weights, and those are not where it began."""
    first, second = pair[0]["page"], pair[1]["page"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    dictionary = SparseRecovery(m=20, n=50, seed=0).dictionary
    assert not torch.equal(first["steps.0.weight"], LISTA(dictionary, 1, alpha=0.1)[0].weight)


def test_the_example_under_torchrun(one, pair):
    for folder in ("script0", "script1"):
        results = (one.folder / folder / "results.json").read_text()
        assert '"processes": 2' in results
    assert (one.folder / "script0" / "checkpoint.pt").exists()
    assert list((one.folder / "script1" / "checkpoint").glob("*/.metadata"))


def test_untied_layers_that_truncation_leaves_out_must_be_announced():
    """By hand, DistributedDataParallel must be told; `fit` finds out by itself."""
    y = signals()

    def two_steps(**options: Any) -> None:
        wrapped = DistributedDataParallel(make(tied=False, gradient=Truncated(2)), **options)
        for _ in range(2):
            wrapped(y).square().mean().backward()

    with group_of_one():
        with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
            two_steps()
        two_steps(find_unused_parameters=True)
        net = make(tied=False, gradient=Truncated(2))
        assert processes.share(net).find_unused_parameters  # type: ignore[union-attr]
        fit(net, [y], lambda net, y: net(y).square().mean(), num_steps=2)


# ---- Parameters in shards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_network_is_the_network(name, pair):
    """The outputs, and the gradients of a batch of which each process has half."""
    options = SHARDED[name]
    net, y = make(**options), signals(options.get("problem", WIDE))
    backward(net, y)
    expected = gradients(net)
    with torch.no_grad():
        output = net(y)
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in expected.values())
    for found in pair:
        found = found["sharded"][name]
        # float64 and the same products in the same order: the halves of the batch differ by the order of one sum.
        torch.testing.assert_close(found["output"], output, rtol=0, atol=1e-12)
        assert found["gradients"].keys() == expected.keys()
        for key, gradient in expected.items():
            got = found["gradients"][key]
            if gradient is None:
                assert got is None, key
            else:
                torch.testing.assert_close(got, gradient, rtol=1e-9, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", SHARDED)
def test_each_process_holds_its_share(name, pair):
    net = make(**SHARDED[name])
    first, second = (found["sharded"][name] for found in pair)
    for key, parameter in net.named_parameters():
        rows = len(parameter) if parameter.dim() else None
        if rows is not None:
            assert first["shares"][key] == [(rows + 1) // 2, *parameter.shape[1:]]
            assert second["shares"][key] == [rows // 2, *parameter.shape[1:]]
    assert first["kept"] and second["kept"]  # after the backward pass, too


@pytest.mark.parametrize("name", SHARDED)
def test_a_unit_is_gathered_once_forward_and_once_backward(name, pair):
    """However often a tied network uses its step; and of parts only one is whole at a time."""
    options = SHARDED[name]
    cut = [p for p in make(**options).parameters() if p.dim() > 0]
    parts = 6 // options["every"] if "every" in options else 1
    numbers = sum(p.nbytes for p in make(**options).parameters() if p.dim() == 0)
    for found in pair:
        assert found["sharded"][name]["gathers"] == 2 * parts
        assert found["sharded"][name]["gathered"] == sum(p.nbytes for p in cut) // parts + numbers


def test_training_in_shards_reaches_the_weights_of_one(one, pair):
    for found in pair:
        assert near(found["resumed"]["straight"], one.weights)
    held = [found["resumed"]["bytes"] for found in pair]
    for what in ("parameters", "all"):
        assert sum(size[what] for size in held) == one.bytes[what]
        assert max(size[what] for size in held) < 0.52 * one.bytes[what]  # 51 rows: 26 and 25


def test_shards_of_one_process_are_finished_by_two(one, pair):
    for found in pair:
        assert near(found["resumed"]["from one"], one.weights)


def test_shards_of_two_processes_are_finished_by_one(one, pair):
    assert list((one.folder / "two").glob("*/.metadata"))
    task = Task(OPTIONS, dtype=torch.float64)
    net, _, _ = example.train_sharded(task, OPTIONS.steps, one.folder / "two")
    assert near(example.flat(net), one.weights)
    assert task.steps == OPTIONS.steps - HALF


@pytest.mark.parametrize("name", ["untied", "some tied"])
def test_a_network_that_no_process_ever_holds(name, pair):
    expected = make(**SHARDED[name])(signals())
    for found in pair:
        torch.testing.assert_close(found["meta"][name], expected, rtol=0, atol=1e-12)


def test_other_methods_must_be_registered(pair):
    expected = torch.stack(make(tied=False).iterates(signals()))
    for found in pair:
        assert "mixed torch.Tensor and DTensor" in found["refused"]["iterates"]
        torch.testing.assert_close(found["methods"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("step", "mixed torch.Tensor and DTensor"),
        ("fit", "TypeError: net has parameters in shards"),
        ("slice", "TypeError"),
        ("number", "ValueError: fully_shard doesn't support scalar parameters. Change offset"),
    ],
)
def test_what_does_not_work_says_so(name, message, pair):
    for found in pair:
        assert message in found["refused"][name]


if __name__ == "__main__":
    worker(Path(sys.argv[1]), sys.argv[2:])
