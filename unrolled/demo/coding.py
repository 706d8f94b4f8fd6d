"""How near to the optimum each solver comes, in how many iterations and how much time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from unrolled import solvers
from unrolled.demo.networks import ALPHA, Size, config
from unrolled.sparse import LISTA
from unrolled.trace import Trace

CHUNK = 2048  # patches coded at a time: few enough to stay in the processor's cache
Coder = Callable[[Tensor], Tensor]  # (patches, 64) -> (patches, atoms)


class Method(NamedTuple):
    """One row of the table."""

    name: str
    iterations: int | None  # None: as many as it takes
    gap: float  # mean of (F - F*) / F*
    nonzeros: float  # mean number of atoms used by a patch
    microseconds: float  # a patch


class Comparison(NamedTuple):
    methods: list[Method]
    curves: dict[str, list[float]]  # gap after every iteration or layer
    level: int | None  # how many iterations bring FISTA level with the last network, None if more than were run
    usage: Tensor  # (atoms,), in how many patches each atom is used


@torch.no_grad()
def compare(dictionary: Tensor, y: Tensor, networks: Mapping[str, LISTA], size: Size) -> Comparison:
    """Code the patches y by the solvers and by the networks, the best network last."""
    best = optimum(dictionary, y)
    classical = {
        name: LISTA(dictionary, **{**config(size, ALPHA, momentum=momentum), "num_iters": size.curve}, tied=True)
        for name, momentum in (("ISTA", False), ("FISTA", True))
    }
    curves = {name: gap_by_iteration(net, dictionary, y, best) for name, net in {**classical, **networks}.items()}
    level = first_level(curves["FISTA"], curves[list(networks)[-1]][-1])

    K = size.num_layers
    coders: list[tuple[str, int | None, Coder]] = [
        ("ISTA", K, partial(solvers.ista, dictionary, alpha=ALPHA, num_iters=K)),
        ("FISTA", K, partial(solvers.fista, dictionary, alpha=ALPHA, num_iters=K)),
    ]
    if level is not None and level > K:
        coders.append(("FISTA", level, partial(solvers.fista, dictionary, alpha=ALPHA, num_iters=level)))
    coders += [(name, K, net) for name, net in networks.items()]
    coders.append(("scikit-learn, lasso_cd", None, coordinate_descent(dictionary)))

    methods = []
    for name, iterations, code in coders:
        x, microseconds = timed(code, y)
        nonzeros = (x != 0).double().sum(1).mean().item()
        methods.append(Method(name, iterations, relative_gap(dictionary, y, x, best), nonzeros, microseconds))
    return Comparison(methods, curves, level, (x != 0).sum(0).cpu())


def optimum(dictionary: Tensor, y: Tensor) -> Tensor:  # (patches,), float64, on the CPU
    """The least objective of every patch, by FISTA with restarts in float64 until nothing moves any more."""
    D, y = dictionary.cpu().double(), y.cpu().double()
    x = [solvers.fista(D, part, ALPHA, num_iters=5000, restart=True, tol=1e-6) for part in y.split(512)]
    return solvers.lasso_objective(D, y, torch.cat(x), ALPHA)


def relative_gap(dictionary: Tensor, y: Tensor, x: Tensor, best: Tensor) -> float:
    """The mean of (F(x) - F*) / F* over the patches, computed in float64."""
    objective = solvers.lasso_objective(dictionary.cpu().double(), y.cpu().double(), x.cpu().double(), ALPHA)
    return ((objective - best) / best).mean().item()


def gap_by_iteration(net: LISTA, dictionary: Tensor, y: Tensor, best: Tensor) -> list[float]:
    """The gap after every iteration of a solver or layer of a network."""
    with torch.no_grad(), Trace(net, {"gap": lambda x: relative_gap(dictionary, y, x, best)}) as trace:
        net(y)
    return trace["gap"].tolist()


def first_level(curve: list[float], goal: float) -> int | None:
    """After how many iterations a curve is at or below `goal` for the first time."""
    return next((k for k, gap in enumerate(curve, 1) if gap <= goal), None)


def coordinate_descent(dictionary: Tensor) -> Coder:
    """scikit-learn's solver, the usual choice."""
    from sklearn.decomposition import sparse_encode
    from sklearn.exceptions import ConvergenceWarning

    atoms = dictionary.T.cpu().double().numpy()

    def code(y: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            x = sparse_encode(y.cpu().double().numpy(), atoms, algorithm="lasso_cd", alpha=ALPHA)
        return torch.from_numpy(x)

    return code


def timed(code: Coder, y: Tensor) -> tuple[Tensor, float]:
    """The codes, and the microseconds a patch: of CPU time, or of wall-clock time on an accelerator."""

    def clock() -> float:
        if y.device.type == "cpu":
            return time.process_time()
        y.sum().item()  # waits until the device has done its work
        return time.perf_counter()

    times = []
    for _ in range(3):
        start = clock()
        x = torch.cat([code(part) for part in y.split(CHUNK)])
        times.append(clock() - start)
    return x, 1e6 * min(times) / len(y)
