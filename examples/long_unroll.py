"""A solver of 300 iterations, trained in the memory of one: a denoiser's filters, five ways for gradients to flow.

    python examples/long_unroll.py --out long_unroll

The denoiser is the minimum of |x - y|^2 / 2 + sum_j lam_j sum_p delta log cosh((k_j * x)_p / delta), found by 300 steps
of gradient descent. Filters k_j and weights lam_j learn from pairs of clean and noisy patches (photographs of
scikit-learn): what comes out is the image that the *converged* solver gives, so the gradient must know of all its
iterations. Backpropagation keeps them all. `Checkpointed` keeps some, `Implicit` none: at the minimum the gradient has
an equation of its own. `Phantom` and `Truncated(1)` keep a few and are biased. Only the argument `gradient` differs.

Expect the exact ones to agree to a hundredth of a dB, `Implicit` in the least memory and half the time. The biased ones
follow other gradients and end elsewhere, higher or lower. Where the library warns of a gradient, the warning is shown.

Prints a table over the seeds; writes `results.json` and, where matplotlib is installed, `long_unroll.png` into the
folder given by `--out`.
"""

import argparse
import json
import statistics
import time
import warnings
import weakref
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import conv2d, conv_transpose2d

from unrolled import Backprop, Checkpointed, Step, Truncated, Unroll, fit
from unrolled.gradient import GradientWarning, Implicit, Phantom

NOISE = 25 / 255
SIZE = 24  # pixels of a patch's side


class Denoiser(Step):
    """x+ = x - s (x - y + sum_j lam_j k_j' * tanh(k_j * x / delta)), s = 1 / (1 + sum_j lam_j / delta)."""

    event_dim = 3

    def __init__(self, lam=0.02, delta=0.01):
        super().__init__()
        cosines = torch.cos(torch.pi / 3 * (torch.arange(3) + 0.5) * torch.arange(3)[:, None])
        atoms = torch.einsum("ai,bj->abij", cosines, cosines).flatten(0, 1)[1:]  # the DCT's, without the constant
        self.raw = nn.Parameter(atoms.unsqueeze(1))  # (8, 1, 3, 3)
        self.log_lam = nn.Parameter(torch.full((8,), lam).log())
        self.delta = delta

    def prepare(self, y):
        kernels = self.raw - self.raw.mean((2, 3), keepdim=True)
        kernels = kernels / kernels.abs().sum((2, 3), keepdim=True)  # no filter makes anything longer: norm at most 1
        lam = self.log_lam.exp()
        return y, kernels, lam[:, None, None], 1 / (1 + lam.sum() / self.delta)

    def init(self, context):
        return context[0]

    def forward(self, x, context):
        y, kernels, lam, step = context
        influence = lam * torch.tanh(conv2d(x, kernels) / self.delta)
        return x - step * (x - y + conv_transpose2d(influence, kernels))


def patches(generator):
    """Grey patches of two photographs in [0, 1]: of the left three quarters of each, and of the right quarter."""
    from sklearn.datasets import load_sample_images

    found = []
    for image in load_sample_images().images:
        grey = torch.tensor(image, dtype=torch.float32).mean(-1) / 255
        cut = grey.unfold(0, SIZE, SIZE).unfold(1, SIZE, SIZE)  # (rows, columns, SIZE, SIZE)
        border = 3 * cut.shape[1] // 4
        found.append((cut[:, :border].flatten(0, 1), cut[:, border:].flatten(0, 1)))
    training, test = (torch.cat(part).unsqueeze(1) for part in zip(*found))
    return training, test[torch.randperm(len(test), generator=generator)[:64]]


def endless(clean, batch_size, generator):
    while True:
        x = clean[torch.randint(len(clean), (batch_size,), generator=generator)]
        yield x + NOISE * torch.randn(x.shape, generator=generator), x


def squared_error(net, batch):
    noisy, clean = batch
    return (net(noisy) - clean).square().mean()


def peak_bytes(net, batch):
    """What autograd holds at most at a time in one step, every storage once; a window computed again is added."""
    counts, held = {}, [0, 0]

    class Handle:
        def __init__(self, tensor):
            self.tensor = tensor.detach()

    def drop(key, size):
        counts[key] -= 1
        held[0] -= size if counts[key] == 0 else 0

    def pack(tensor):
        handle, storage = Handle(tensor), tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        counts[key] = counts.get(key, 0) + 1
        held[0] += size if counts[key] == 1 else 0
        held[1] = max(held)
        weakref.finalize(handle, drop, key, size)
        return handle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda handle: handle.tensor):
        squared_error(net, batch).backward()
    net.zero_grad()
    if isinstance(net.gradient, Checkpointed):
        return held[1] + peak_bytes(Unroll(net[0], net.gradient.every), batch)
    return held[1]


@torch.no_grad()
def psnr(net, batch):
    return -10 * squared_error(net, batch).log10().item()


def run(strategy, seed, options):
    """Train one denoiser; returns what it reached and what that took."""
    generator = torch.Generator().manual_seed(seed)
    training, test = patches(generator)
    test = test + NOISE * torch.randn(test.shape, generator=generator), test
    batches = endless(training, 8, generator)
    net = Unroll(Denoiser(), options.num_iters, gradient=strategy)
    curve = [(0.0, psnr(net, test))]

    def watch(step, loss, net):
        if step % options.every == 0:
            curve.append((time.process_time() - begin - paused[0], psnr(net, test)))
            paused[0] = time.process_time() - begin - curve[-1][0]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GradientWarning)
        held = peak_bytes(net, next(batches))
        begin, paused = time.process_time(), [0.0]
        optimizer = torch.optim.Adam([{"params": [net[0].log_lam], "lr": 5e-2}, {"params": [net[0].raw], "lr": 2e-2}])
        fit(net, batches, squared_error, num_steps=options.num_steps, optimizer=optimizer, callbacks=[watch])
    return {
        "psnr": curve[-1][1],
        "bytes": held,
        "seconds": curve[-1][0],
        "curve": curve,
        "warned": [str(one.message) for one in caught if one.category is GradientWarning],
        "noisy": -10 * (test[0] - test[1]).square().mean().log10().item(),
    }


def report(results, num_iters):
    print(f"\n{num_iters} iterations; medians over {len(next(iter(results.values())))} seeds, PSNR of test patches\n")
    print(f"{'':38}  {'PSNR dB':>7}  {'kB held':>9}  {'CPU s':>6}  warned")
    for name, rows in results.items():
        median = {key: statistics.median(row[key] for row in rows) for key in ("psnr", "bytes", "seconds")}
        warned = "yes" if any(row["warned"] for row in rows) else "no"
        print(f"{name:38}  {median['psnr']:7.2f}  {median['bytes'] / 1e3:9.0f}  {median['seconds']:6.1f}  {warned}")
    rows = next(iter(results.values()))
    print(f"\nnoisy: {rows[0]['noisy']:.2f} dB, before training: {rows[0]['curve'][0][1]:.2f} dB")
    for name, rows in results.items():
        for message in rows[0]["warned"]:
            print(f"\n{name} warned: {message}")


def plot(results, path):
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ["#000000", "#0072b2", "#009e73", "#cc79a7", "#d55e00"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for (name, rows), colour in zip(results.items(), colours):
        left.plot(*zip(*rows[0]["curve"]), "o-", color=colour, markersize=3, label=name)
    left.set_xlabel("CPU seconds of training")
    left.set_title("PSNR of test patches (dB)", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    names = list(results)
    right.barh(names, [results[name][0]["bytes"] / 1e6 for name in names], color=colours)
    right.invert_yaxis()
    right.set_xscale("log")
    right.set_title("MB held for the backward pass (logarithmic)", loc="left", fontsize=10)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("long_unroll"), help="folder for the results")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that everything works")
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings of each kind")
    arguments = parser.parse_args()
    options = argparse.Namespace(num_iters=300, num_steps=40, every=10, seeds=range(arguments.seeds))
    if arguments.smoke:
        options = argparse.Namespace(num_iters=80, num_steps=4, every=2, seeds=range(1))

    strategies = {
        "Backprop()": Backprop,
        f"Checkpointed({round(options.num_iters**0.5)})": lambda: Checkpointed(round(options.num_iters**0.5)),
        "Implicit()": Implicit,
        "Phantom(5, 0.5)": lambda: Phantom(5, 0.5),
        "Truncated(1)": lambda: Truncated(1),
    }
    results = {name: [run(make(), seed, options) for seed in options.seeds] for name, make in strategies.items()}
    report(results, options.num_iters)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.json"
    path.write_text(json.dumps({"num_iters": options.num_iters, "rows": results}, indent=1) + "\n")
    print(f"written: {path}")
    plot(results, arguments.out / "long_unroll.png")


if __name__ == "__main__":
    main()
