"""Against deepinv: unfolded proximal gradient on the Lasso with a learned step size a layer, at equal output.

The same algorithm three times, x+ = soft(x + g_k A'(y - A x), alpha g_k) with 16 layers: `StepLISTA`, deepinv's
unfolded PGD, and a loop by hand. One thread, CPU milliseconds, median of the interleaved calls. deepinv pulls
torchvision, which breaks this project's environment: install both apart from it,

    python -m venv elsewhere
    elsewhere/bin/pip install torch==2.13.0 tqdm einops torchmetrics requests h5py natsort matplotlib pandas scipy \\
        scikit-learn
    elsewhere/bin/pip install --no-deps deepinv torchvision -e .
    elsewhere/bin/python benchmarks/deepinv_overhead.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import torch
from _common import interleaved, ratio, save, spread, table
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from unrolled.functional import soft_threshold
from unrolled.solvers import lipschitz
from unrolled.sparse import StepLISTA

K = 16
ALPHA = 0.1


def deepinv() -> Any:
    """deepinv, also where torchvision was built for another torch: its two operators are declared, never called."""
    library = torch.library.Library("torchvision", "DEF")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        library.define(schema)
    import deepinv

    return deepinv


class ByHand(nn.Module):
    def __init__(self, matrix: Tensor, step_size: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.log_steps = nn.ParameterList([step_size.log().clone() for _ in range(K)])

    def forward(self, y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), self.matrix.shape[1])
        for log_step in self.log_steps:
            step = log_step.exp()
            x = soft_threshold(x + step * linear(y - linear(x, self.matrix), self.matrix.mT), ALPHA * step)
        return x


def peer(library: Any, matrix: Tensor, step_size: float) -> Callable[[Tensor], Tensor]:
    physics = library.physics.LinearPhysics(A=lambda x: linear(x, matrix), A_adjoint=lambda y: linear(y, matrix.mT))
    net = library.optim.PGD(
        data_fidelity=library.optim.data_fidelity.L2(),
        prior=library.optim.prior.L1Prior(),
        # One tensor a layer: a list of one tensor, K times, would make all layers one parameter.
        stepsize=[torch.tensor(step_size) for _ in range(K)],
        lambda_reg=[torch.tensor(ALPHA) for _ in range(K)],
        max_iter=K,
        unfold=True,
        trainable_params=["stepsize"],
        custom_init=lambda y, physics: {"est": (y.new_zeros(len(y), matrix.shape[1]),) * 2},
    )
    call = lambda y: net(y, physics)
    call.net = net  # type: ignore[attr-defined]
    return call


def training_step(call: Callable[[Tensor], Tensor], y: Tensor) -> Callable[[], None]:
    def run() -> None:
        call(y).square().sum().backward()

    return run


def main() -> None:
    torch.set_num_threads(1)
    library = deepinv()
    rows, records = [], []
    for seed in range(3):
        for m, n, batch in ((250, 500, 64), (20, 40, 4)):
            torch.manual_seed(seed)
            matrix = normalize(torch.randn(m, n), dim=0)
            step_size = 1 / lipschitz(matrix)
            ours = StepLISTA(matrix, K, alpha=ALPHA)
            hand = ByHand(matrix, step_size)
            theirs = peer(library, matrix, float(step_size))
            y = torch.randn(batch, m)
            with torch.no_grad():
                torch.testing.assert_close(ours(y), hand(y), rtol=0, atol=1e-5)
                torch.testing.assert_close(theirs(y), hand(y), rtol=0, atol=1e-5)
            calls = {"unrolled": ours, "deepinv": theirs, "by hand": hand}
            for what in ("forward", "forward + backward"):
                if what == "forward":
                    with torch.no_grad():
                        seconds = interleaved({name: partial(f, y) for name, f in calls.items()}, 31)
                else:
                    seconds = interleaved({name: training_step(f, y) for name, f in calls.items()}, 31)
                ratios = {name: ratio(seconds, name, "by hand") for name in ("unrolled", "deepinv")}
                medians = {name: 1e3 * spread(values)["median"] for name, values in seconds.items()}
                rows.append([what, f"{m}x{n}", batch, seed, *medians.values(), *ratios.values()])
                records.append(
                    {"what": what, "size": f"{m}x{n}", "batch": batch, "seed": seed, "ms": medians, **ratios}
                )
    table(
        rows, ["what", "size", "batch", "seed", "unrolled", "deepinv", "by hand", "unrolled / hand", "deepinv / hand"]
    )
    save("deepinv_overhead", {"layers": K, "deepinv": metadata.version("deepinv"), "rows": records})


if __name__ == "__main__":
    main()
