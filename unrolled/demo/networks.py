"""The networks of the demo: built, trained, looked into, saved and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unrolled import solvers
from unrolled.momentum import Momentum
from unrolled.sparse import LISTA
from unrolled.training import default_optimizer, fit
from unrolled.training.loop import Loss

ALPHA = 0.1  # weight of the l1 norm, for patches and atoms of norm 1


@dataclass(frozen=True)
class Size:
    """How much the demo does."""

    num_layers: int = 16
    num_atoms: int = 256
    dictionary_patches: int = 10_000
    passes: int = 3  # over these patches
    steps: int = 300  # of training, a network
    batch: int = 128
    test_patches: int = 2048
    report_patches: int = 256
    curve: int = 100  # iterations in which FISTA may draw level
    stride: int = 2  # between the patches of denoising
    side: int = 640  # of the part of a photograph that is denoised, pixels


SMOKE = Size(
    num_layers=4, num_atoms=64, dictionary_patches=500, passes=1, steps=10, test_patches=128, curve=40, side=64
)


def config(size: Size, alpha: float, *, momentum: bool) -> dict[str, Any]:
    """What `LISTA` takes besides the dictionary, plain values."""
    return {"num_iters": size.num_layers, "alpha": alpha, "momentum": momentum, "factored": True}


def train(net: LISTA, batches: Iterator[Any], loss: Loss, steps: int) -> None:
    """Adam, its rates falling to 0 along a cosine."""
    optimizer = default_optimizer(net, lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    fit(net, batches, loss, num_steps=steps, optimizer=optimizer, scheduler=scheduler, progress=True)


def random_batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of random rows."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield rows[torch.randint(len(rows), (size,), generator=generator)]


def nesterov(num_iters: int) -> list[float]:
    """FISTA's momentum in every iteration; the first one has nothing to extrapolate."""
    found, t = [0.0], 1.0
    while len(found) < num_iters:
        before, t = t, (1 + (1 + 4 * t * t) ** 0.5) / 2
        found.append((before - 1) / t)
    return found


@torch.no_grad()
def layer_values(net: LISTA, dictionary: Tensor, alpha: float) -> dict[str, list[Any]]:
    r"""What each layer does: a step size and a threshold for every atom, ISTA's being 1; the momentum where there is.

    The step size of an atom is its entry on the diagonal of $L W_k D_k$: how far the layer moves its coefficient
    for a residual along it.
    """
    L = solvers.lipschitz(dictionary)
    layers: list[Any] = list(net)
    found: dict[str, list[Any]] = {}
    if isinstance(layers[0], Momentum):
        usual = nesterov(len(layers))
        found["momentum"] = [m + layer.offset.item() for m, layer in zip(usual, layers, strict=True)]
        layers = [layer.step for layer in layers]
    found["step size"] = [(L * (layer.weight * layer.dictionary.T).sum(1)).tolist() for layer in layers]
    found["threshold"] = [(L * layer.theta / alpha).tolist() for layer in layers]
    return found


def percentiles(values: list[Any]) -> dict[str, list[float]]:
    """A layer's values for all atoms in three numbers: layer by layer the 10th, 50th and 90th percentile."""
    table = torch.tensor(values, dtype=torch.float64).reshape(len(values), -1)
    return {f"{p}%": table.quantile(p / 100, 1).tolist() for p in (10, 50, 90)}


def save_network(path: Path, net: LISTA, dictionary: Tensor, config: dict[str, Any]) -> None:
    """Write all that `load_network` needs: nothing but tensors and plain values, so that it is safe to load."""
    state = {name: value.cpu() for name, value in net.state_dict().items()}
    torch.save({"config": config, "dictionary": dictionary.cpu(), "state_dict": state}, path)


def load_network(path: str | Path) -> tuple[LISTA, Tensor]:
    """The network that the demo wrote to `network.pt`, and its dictionary.

    Example:
        >>> net, dictionary = load_network("demo/network.pt")   # doctest: +SKIP
        >>> codes = net(patches)                                # doctest: +SKIP
        >>> approximation = codes @ dictionary.T                # doctest: +SKIP
    """
    saved = torch.load(path, weights_only=True)
    net = LISTA(saved["dictionary"], **saved["config"])
    net.load_state_dict(saved["state_dict"])
    return net, saved["dictionary"]
