"""`train_blind`: the schedule of blind deconvolution learned by trial, as no gradient sees a threshold jump."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fft import irfft2, rfft2

from unrolled import _check
from unrolled.image.blind import BlindDeconvolution
from unrolled.image.deconvolution import NonBlindDeconvolution
from unrolled.metrics import align
from unrolled.recipes.deconvolution import Blurs, SyntheticBlurs
from unrolled.solvers.blind_deconvolution import enlarged, scales
from unrolled.training import History
from unrolled.training.loop import progress_bar

# What is moved, how far at first and which way, and whether by amounts that grow from iteration to iteration. Steps are
# large, factors of two to ten: results of single images jump about, and only what changes many can be told from that.
MOVES = (
    ("log_ridge", 2.0, False),
    ("raw_coarse", 1.0, False),
    ("logit_cut", -0.9, False),
    ("log_select", 2.0, False),
    ("shrinkage.log_weight", -0.7, True),
    ("raw_level", 0.7, False),
    ("raw_fine", 0.7, False),
    ("shrinkage.log_weight", -0.7, False),
    ("log_start", 1.1, False),
    ("log_penalty", -1.1, False),
    ("shrinkage.raw_p", -0.15, True),
    ("shrinkage.raw_p", 0.15, False),
)
WORST = 4.0  # a kernel that is wrong is wrong: a ratio of 100 counts no more than one of 16


class LogErrorRatio:
    r"""$\log_2 \frac{\|\hat x - x\|^2}{\|x_k - x\|^2}$, mean over images: doublings of the error.

    What not knowing the kernel costs: $\hat x$ is what a `BlindDeconvolution` makes of a blurred image, and $x_k$ what
    its `deconvolution` makes of it with the true kernel, both clipped to [0, 1] and moved to where they fit best. Each
    image counts from 0 to 4.

    Args:
        batches: blurred images, their kernels and what they were, such as `SyntheticBlurs` makes.
        deconvolution: that of the networks to be judged, which is to stay as it is.

    Example:
        >>> problem = SyntheticBlurs(torch.rand(3, 1, 48, 48), crop=48, sides=(5, 7))
        >>> net = BlindDeconvolution()
        >>> cost = LogErrorRatio([next(problem.batches(2, seed=0))], net.deconvolution)
        >>> 0 <= cost(net) <= 4
        True
    """

    @torch.no_grad()
    def __init__(self, batches: list[Blurs], deconvolution: NonBlindDeconvolution) -> None:
        if not batches:
            raise ValueError("batches is empty. Take some from SyntheticBlurs(images).batches(8, seed=0).")
        self.batches = batches
        self.known = [_errors(deconvolution(batch.blurred, batch.kernel), batch) for batch in batches]

    def __call__(self, net: BlindDeconvolution) -> float:
        return torch.cat(list(self.each(net))).mean().item()

    @torch.no_grad()
    def each(self, net: BlindDeconvolution) -> Iterator[Tensor]:
        """The cost of each image, one batch after another."""
        for batch, known in zip(self.batches, self.known, strict=True):
            found = _errors(net(batch.blurred, batch.kernel.shape[-1]).image, batch)
            yield (found / known).log2().clamp(0, WORST)


def _errors(found: Tensor, batch: Blurs) -> Tensor:
    """The squared error of each image, without a border."""
    border = max(5, batch.kernel.shape[-1] // 2 + 2)
    pairs = (align(x[None].clamp(0, 1), true[None], border=border) for x, true in zip(found, batch.sharp, strict=True))
    return torch.stack([(pair.found - pair.true).square().sum() for pair in pairs])


class _Contest:
    """The smallest cost so far. Who is clearly worse on the first eighth of the images, or two, or four, is out."""

    def __init__(self, batches: list[Blurs], net: BlindDeconvolution) -> None:
        self.cost = LogErrorRatio(batches, net.deconvolution)
        self.looks = [len(batches) // share for share in (8, 4, 2)]
        self.costs = list(self.cost.each(net))

    @property
    def best(self) -> float:
        return torch.cat(self.costs).mean().item()

    def falls(self, net: BlindDeconvolution) -> bool:
        """Whether the network is better than the best one, and takes its place."""
        costs: list[Tensor] = []
        for cost in self.cost.each(net):
            costs.append(cost)
            if len(costs) in self.looks and self._loses(costs):
                return False
        if torch.cat(costs).mean() < torch.cat(self.costs).mean():
            self.costs = costs
            return True
        return False

    def _loses(self, costs: list[Tensor]) -> bool:
        """Worse by a standard error. Both see the same images, so that it is their differences that count."""
        gaps = torch.cat(costs) - torch.cat(self.costs[: len(costs)])
        return len(gaps) > 1 and bool(gaps.mean() >= gaps.std() / len(gaps) ** 0.5)


class _Move:
    """A change of one kind of parameter in all iterations: by the same amount, or more and more."""

    def __init__(self, parameters: list[nn.Parameter], shares: list[float], step: float) -> None:
        self.parameters, self.shares, self.step = parameters, shares, step

    def by(self, amount: float) -> list[Tensor]:
        """Make it; returns what the parameters were."""
        before = [parameter.clone() for parameter in self.parameters]
        for parameter, share in zip(self.parameters, self.shares, strict=True):
            parameter.add_(amount * share)
        return before

    def undo(self, before: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, before, strict=True):
            parameter.copy_(value)


def _moves(net: BlindDeconvolution) -> list[_Move]:
    steps = list(dict.fromkeys(net.kernel_estimation))  # one, if they are tied
    moves = []
    for name, size, grows in MOVES:
        parameters = [step.get_parameter(name) for step in steps]
        if not grows:
            moves.append(_Move(parameters, [1.0] * len(steps), size))
        elif len(steps) > 1:
            moves.append(_Move(parameters, torch.linspace(-1, 1, len(steps)).tolist(), size))
    return moves


@torch.no_grad()
def train_blind(
    net: BlindDeconvolution,
    problem: SyntheticBlurs,
    *,
    num_trials: int = 30,
    num_images: int = 96,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> History:
    r"""Train the kernel estimation of a `BlindDeconvolution` by trial, for the smallest `LogErrorRatio`.

    Thresholds jump, and no gradient sees a jump. So all parameters of a kind are moved together, in all iterations by
    the same amount; exponents and weights also by amounts that grow linearly from iteration to iteration, from minus
    to plus. One such move after another is tried one way, then the other. What lowers the cost stays, and the next step
    of this move is 1.5 times as large; where neither way does, half as large. All trials see the same images; one that
    is worse by a standard error on the first eighth, quarter or half of them ends there.

    Args:
        net: the network, changed in place. Its deconvolution is left as it is and makes the images that count.
        problem: where the blurs come from; its kernels' sides are given to the network as `kernel_size`.
        num_trials: how many settings are looked at, the first one among them.
        num_images: how many, at least one batch.
        batch_size: images that have one side of the kernel.
        seed: of the images.
        progress: whether to show a progress bar.

    Returns:
        The `History`: the smallest cost so far after every trial, that of the network as it came first.

    Raises:
        TypeError, ValueError: a network of another kind, numbers below 1.

    Example:
        >>> from unrolled.image import KernelEstimation, NonBlindDeconvolution
        >>> problem = SyntheticBlurs(torch.rand(3, 1, 48, 48), crop=48, sides=(5, 7))
        >>> net = BlindDeconvolution(KernelEstimation(2), NonBlindDeconvolution(2))
        >>> history = train_blind(net, problem, num_trials=3, num_images=2, batch_size=2)
        >>> history.loss[-1] <= history.loss[0]
        True
    """
    if not isinstance(net, BlindDeconvolution):
        raise TypeError(f"net must be a BlindDeconvolution, got {type(net).__name__}.")
    if not isinstance(problem, SyntheticBlurs):
        raise TypeError(f"problem must be SyntheticBlurs, got {type(problem).__name__}.")
    _check.integer("num_trials", num_trials)
    batches = problem.batches(_check.integer("batch_size", batch_size), seed=seed)
    count = max(1, _check.integer("num_images", num_images) // batch_size)
    begin = time.process_time()
    cost = _Contest([next(batches) for _ in range(count)], net)
    turns = itertools.cycle(_moves(net))
    history = History(loss=[cost.best])
    with progress_bar(num_trials, progress) as bar:
        bar.update()
        while len(history.loss) < num_trials:
            move = next(turns)
            for amount in (move.step, -move.step)[: num_trials - len(history.loss)]:
                before = move.by(amount)
                better = cost.falls(net)
                history.loss.append(cost.best)
                bar.update()
                bar.set_postfix(cost=f"{cost.best:.3f}")
                if better:
                    move.step = 1.5 * amount
                    break
                move.undo(before)
            else:
                move.step /= 2
    history.seconds = time.process_time() - begin
    return history


class KernelError:
    r"""$\|\hat k - k\|_2 / \|k\|_2$ at every scale, k moved to where it fits $\hat k$ best, the mean.

    The finest scale counts as much as all others together.
    """

    def __call__(self, net: nn.Module, batch: Blurs) -> Tensor:
        assert isinstance(net, BlindDeconvolution)
        side = batch.kernel.shape[-1]
        found = net.kernels(batch.blurred, side)
        errors = [
            kernel_distance(kernel, enlarged(batch.kernel, coarse)).mean()
            for kernel, coarse in zip(found, scales(side), strict=True)
        ]
        if len(errors) == 1:
            return errors[0]
        return (errors[-1] + torch.stack(errors[:-1]).mean()) / 2


def kernel_distance(found: Tensor, true: Tensor) -> Tensor:
    r"""$\min_s \|\hat k - k(\cdot - s)\|_2 / \|k\|_2$ over shifts s of quarters of a pixel.

    Args:
        found: kernels $\hat k$.
        true: the kernels k.

    Shape:
        - found, true: (..., side, side)
        - output: (...)

    Example:
        >>> kernel = motion_kernel(15, torch.Generator().manual_seed(0))
        >>> kernel_distance(kernel.roll((1, -2), (-2, -1)), kernel) < 1e-3
        tensor([True])
    """
    size, fine = 2 * true.shape[-1], 4
    T, K = (rfft2(kernel, s=(size, size)) for kernel in (true, found))
    # The shift is where the correlation, interpolated by zeros among the high frequencies, is best.
    with torch.no_grad():
        cross = torch.fft.fftshift(
            torch.fft.fft2(found, s=(size, size)) * torch.fft.fft2(true, s=(size, size)).conj(), (-2, -1)
        )
        margin = (fine - 1) * size // 2
        cross = torch.fft.ifftshift(nn.functional.pad(cross, (margin,) * 4), (-2, -1))
        best = torch.fft.ifft2(cross).real.flatten(-2).argmax(-1)
        rows, columns = best // (fine * size) / fine, best % (fine * size) / fine
        down = torch.fft.fftfreq(size, dtype=true.dtype, device=true.device)[:, None]
        across = torch.fft.rfftfreq(size, dtype=true.dtype, device=true.device)
        turn = -2 * math.pi * (down * rows[..., None, None] + across * columns[..., None, None])
    error = irfft2(K - T * torch.polar(torch.ones_like(turn), turn), s=(size, size))
    return error.square().sum((-2, -1)).add(1e-12).sqrt() / true.square().sum((-2, -1)).sqrt()
