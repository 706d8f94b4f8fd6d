"""LISTA on several processes: the weights of one process, checkpoints that change hands, a dictionary in shards.

    python examples/train_distributed.py --out scaling_out
    torchrun --nproc-per-node 4 examples/train_distributed.py --out run
    torchrun --nproc-per-node 4 examples/train_distributed.py --out run --shard

The first line needs no launcher. It trains the same network in one process and in two that it starts itself (gloo, on
the CPU), averaging gradients (`fit`, which takes DistributedDataParallel) and with every parameter cut in two (FSDP2,
`fully_shard`). Each training is also interrupted half way and finished by the other number of processes. Expect all
weights to differ by rounding alone, and half of the bytes in each process where parameters are in shards. This is in
float64: in float32, rounding moves a code across a threshold now and then, and Adam makes steps of that.

Under `torchrun` it is a training script, with nccl where there are GPUs: call it again, with any number of processes
that divides the batch, and it goes on from its checkpoint.

Prints a table; writes `results.json` and, where matplotlib is installed, `train_distributed.png` into the folder given
by `--out`. Under `torchrun` only `results.json` and the checkpoint.
"""

import argparse
import contextlib
import itertools
import json
import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from unrolled import LISTA, fit
from unrolled.losses import Lasso
from unrolled.problems import SparseRecovery
from unrolled.training import default_optimizer

ALPHA = 0.1
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # checkpoints of one process are meant to be


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


class Task:
    """What all processes agree on: the problem, the network at its start, the order of the signals."""

    def __init__(self, options, device="cpu", dtype=torch.float32):
        self.options, self.device = options, torch.device(device)
        self.problem = SparseRecovery(m=options.m, n=options.n, snr=40.0, seed=0, dtype=dtype)
        self.signals = next(self.problem.batches(options.signals)).y
        self.lasso = Lasso(self.problem.dictionary, alpha=ALPHA).to(self.device)

    def net(self):
        o = self.options
        return LISTA(self.problem.dictionary, o.layers, alpha=ALPHA, factored=True, device=self.device)

    def batches(self):
        """This process's share of every batch. The sampler deals out one order, card by card, whoever takes part."""
        sampler = DistributedSampler(self.signals, num_replicas=num_processes(), rank=rank(), seed=0)
        return DataLoader(self.signals, batch_size=self.options.batch // num_processes(), sampler=sampler)

    def loss(self, net, y):
        return self.lasso(net, y.to(self.device))  # a mean over the signals, so that means of shares can be averaged

    @torch.no_grad()
    def objective(self, model):
        return self.loss(model, self.problem.test(200).y).item()


# ---- Gradients averaged: DistributedDataParallel ---------------------------------------------------------------------


def train(task, num_steps, checkpoint=None):
    """`fit` wraps the network itself; it writes the checkpoint, and goes on from one that is there."""
    net = task.net()
    fit(net, task.batches(), task.loss, num_steps=num_steps, checkpoint=checkpoint, seed=0)
    return net


# ---- Parameters in shards: FSDP2 -------------------------------------------------------------------------------------


class Parts(nn.Module):
    """The layers of an untied network, a few at a time: the same function, in units that FSDP gathers one by one."""

    def __init__(self, net, every):
        super().__init__()
        self.parts = nn.ModuleList(net[k : k + every] for k in range(0, len(net), every))
        self.readout = net[0].readout

    def forward(self, y):
        state = None
        for part in self.parts:
            state = part.run(y, state=state)
        return self.readout(state)


def shard(net, device, every=None):
    """Leave each process its share of every parameter; returns the module to call. Afterwards `net` holds the shards.

    Parameters are whole only inside of calls that FSDP knows of. A step's `prepare` uses them, too, and it is called by
    the network, so the unit is an `Unroll`: all of it, or of an untied one a slice of `every` layers.
    """
    mesh = init_device_mesh(device.type, (num_processes(),))
    # Numbers cannot be cut. Every process keeps them, and averages their gradients itself.
    numbers = {p for p in net.parameters() if p.dim() == 0}
    for number in numbers:
        number.register_post_accumulate_grad_hook(average)
    if every is None:  # a tied network has nothing to gather one after another
        return fully_shard(net, mesh=mesh, reshard_after_forward=True, ignored_params=numbers)
    model = Parts(net, every)
    for part in model.parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=numbers)
        register_fsdp_forward_method(part, "run")
    return fully_shard(model, mesh=mesh, ignored_params=numbers)


def average(parameter):
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def train_sharded(task, num_steps, folder=None):
    """A loop by hand; with a folder it goes on from what is there, and leaves its state there in the end."""
    net = task.net()
    model = shard(net, task.device, task.options.every) if dist.is_initialized() else net
    optimizer = default_optimizer(net)  # after sharding: it takes the shards
    done = 0 if folder is None else load(folder, net, optimizer)
    order = itertools.chain.from_iterable(epochs(task.batches()))
    for y in itertools.islice(order, done, num_steps):
        optimizer.zero_grad()
        task.loss(model, y).backward()
        optimizer.step()
    if folder is not None:
        save(folder, net, optimizer, num_steps)
    return net, model, optimizer


def epochs(batches):
    for epoch in itertools.count():
        batches.sampler.set_epoch(epoch)
        yield batches


def save(folder, net, optimizer, step):
    """Every process writes what it holds; the names are those of the network, not of its parts."""
    weights, moments = get_state_dict(net, optimizer)
    dcp.save({"net": weights, "optimizer": moments}, checkpoint_id=folder / f"{step:08d}")


def load(folder, net, optimizer):
    """Every process reads what it needs, however many wrote it; returns the steps done, 0 where nothing is there."""
    complete = sorted(path.parent for path in folder.glob("*/.metadata"))  # that file is written last
    if not complete:
        return 0
    weights, moments = get_state_dict(net, optimizer)
    state = {"net": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=complete[-1])
    set_state_dict(net, optimizer, model_state_dict=state["net"], optim_state_dict=state["optimizer"])
    return int(complete[-1].name)


def held_bytes(net, optimizer):
    """What this process holds between two steps: parameters, and with the gradients and the optimizer's moments."""
    parameters = list(net.parameters())
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    gradients = [p.grad for p in parameters if p.grad is not None]
    return {
        "parameters": sum(local(p).nbytes for p in parameters),
        "all": sum(local(tensor).nbytes for tensor in (*parameters, *gradients, *moments)),
    }


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


@torch.no_grad()
def gathered_bytes(net, model, y):
    """The most that is there as whole parameters at a time, in a forward pass."""
    seen = []

    def look(*_):
        seen.append(sum(p.nbytes for p in net.parameters() if not isinstance(p, DTensor)))

    hooks = [step.register_forward_hook(look) for step in net.steps]
    model(y)
    for hook in hooks:
        hook.remove()
    return max(seen)


def flat(net):
    return torch.cat([whole(p).flatten() for p in net.parameters()])


# ---- One process against two -----------------------------------------------------------------------------------------


def two(number, options, folder):
    """What each of the two processes does in the comparison."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=number, world_size=2)
    task, half = Task(options, dtype=torch.float64), options.steps // 2
    found = {"DDP, 2 processes": flat(train(task, options.steps))}
    single = flat(train(Task(options), options.steps))
    train(task, half, folder / "two.pt")
    found["DDP, 1 process, then 2"] = flat(train(task, options.steps, folder / "one.pt"))

    net, model, optimizer = train_sharded(task, options.steps)
    found["FSDP2, 2 processes"] = flat(net)
    sizes = held_bytes(net, optimizer)
    y = task.problem.test(16).y
    with torch.no_grad():
        found["output"] = model(y)
    sizes["gathered"] = gathered_bytes(net, model, y)
    train_sharded(task, half, folder / "two")
    found["FSDP2, 1 process, then 2"] = flat(train_sharded(task, options.steps, folder / "one")[0])

    unit = task.net()
    sizes["gathered, one unit"] = gathered_bytes(unit, shard(unit, task.device), y)
    torch.save({"found": found, "single": single, "sizes": sizes}, folder / f"{number}.pt")
    dist.barrier()
    dist.destroy_process_group()


def compare(options):
    """Train in one process and in two, in both ways, with and without a change of hands half way."""
    torch.set_num_threads(1)  # as the two have, which share this machine
    task, half = Task(options, dtype=torch.float64), options.steps // 2
    expected = flat(train(task, options.steps))
    single = flat(train(Task(options), options.steps))
    net, _, optimizer = train_sharded(task, options.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(task, half, folder / "one.pt")
        train_sharded(task, half, folder / "one")
        torch.multiprocessing.start_processes(two, (options, folder), nprocs=2, start_method="spawn")
        results = [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(2)]
        found = {key: [result["found"][key] for result in results] for key in results[0]["found"]}
        found["DDP, 2 processes, then 1"] = [flat(train(task, options.steps, folder / "two.pt"))]
        found["FSDP2, 2 processes, then 1"] = [flat(train_sharded(task, options.steps, folder / "two")[0])]
    with torch.no_grad():
        output = net(task.problem.test(16).y)
    outputs = found.pop("output")
    start = flat(task.net())
    return {
        "steps": options.steps,
        "moved": (expected - start).abs().max().item(),
        "differences": {key: largest(found[key], expected) for key in found},
        "difference_in_float32": largest([result["single"] for result in results], single),
        "output_difference": largest(outputs, output),
        "bytes": {"one process": held_bytes(net, optimizer), "a process of two": results[0]["sizes"]},
        "objective": {"untrained": task.objective(task.net()), "trained": task.objective(net)},
    }


def largest(found, expected):
    return max((one - expected).abs().max().item() for one in found)


def report(results):
    print(f"\nlargest difference of a weight from one process after {results['steps']} steps of Adam in float64")
    print(f"(training itself moved them by up to {results['moved']:.3f})\n")
    for name, difference in results["differences"].items():
        print(f"{name:30}  {difference:8.1e}")
    print(f"{'DDP, 2 processes, in float32':30}  {results['difference_in_float32']:8.1e}")
    one, half = results["bytes"].values()
    print(f"\n{'kB held between steps':30}  one process  of two, in shards")
    for key in ("parameters", "all"):
        label = "with gradients and moments" if key == "all" else key
        print(f"{label:30}  {one[key] / 1e3:11.0f}  {half[key] / 1e3:17.0f}")
    print(f"whole parameters at a time in a forward pass: {half['gathered'] / 1e3:.0f} kB in parts, ", end="")
    print(f"{half['gathered, one unit'] / 1e3:.0f} kB as one unit")


def plot(results, path):
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    differences = {
        **results["differences"],
        "DDP, 2 processes, in float32": results["difference_in_float32"],
        "(what training moved)": results["moved"],
    }
    left.barh(list(differences), [max(value, 1e-18) for value in differences.values()], color="#0072b2")
    left.set_xscale("log")
    left.set_title("Largest difference of a weight from one process", loc="left", fontsize=10)
    one, half = results["bytes"].values()
    bars = {
        "parameters, one process": one["parameters"],
        "parameters, in shards": half["parameters"],
        "all between steps, one process": one["all"],
        "all between steps, in shards": half["all"],
        "whole at a time, one unit": half["gathered, one unit"],
        "whole at a time, in parts": half["gathered"],
    }
    right.barh(list(bars), [value / 1e6 for value in bars.values()], color=["#000000", "#0072b2"] * 3)
    right.set_title("MB in a process", loc="left", fontsize=10)
    for axis in (left, right):
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=80)
    print(f"written: {path}")


# ---- Under torchrun --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def group():
    """The processes that torchrun started, each with a GPU of its own where there are GPUs."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def under_torchrun(arguments, options):
    with group() as device:
        if options.batch % num_processes():
            raise SystemExit(f"a batch of {options.batch} signals does not divide by {num_processes()} processes")
        task = Task(options, device)
        untrained = task.objective(task.net())
        if arguments.shard:
            net, model, _ = train_sharded(task, options.steps, arguments.out / "checkpoint")
        else:
            model = net = train(task, options.steps, arguments.out / "checkpoint.pt")
        results = {
            "processes": num_processes(),
            "objective": {"untrained": untrained, "trained": task.objective(model)},
            "parameter_bytes": sum(local(p).nbytes for p in net.parameters()),
        }
        if rank() == 0:
            print(json.dumps(results, indent=1))
            (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("train_distributed"), help="folder for results, checkpoints")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    parser.add_argument("--shard", action="store_true", help="under torchrun: FSDP2 in place of averaged gradients")
    arguments = parser.parse_args()
    options = argparse.Namespace(m=64, n=256, layers=8, every=2, signals=1024, batch=128, steps=60)
    if arguments.smoke:
        options = argparse.Namespace(m=20, n=51, layers=4, every=2, signals=96, batch=32, steps=8)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:  # torchrun sets it
        under_torchrun(arguments, options)
        return
    results = compare(options)
    report(results)
    path = arguments.out / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {path}")
    plot(results, arguments.out / "train_distributed.png")


if __name__ == "__main__":
    main()
