"""`fit_deep_kmeans`: an encoder that learns to be clustered, from the first epoch of its auto-encoder to the last."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unrolled import _check
from unrolled._modes import modes_kept
from unrolled.cluster.annealing import AnnealTemperature
from unrolled.cluster.deep import DeepKMeans
from unrolled.cluster.deep_losses import ClusteringLoss, Contrast, LogLikelihood
from unrolled.training import processes
from unrolled.training.deep_kmeans_run import DeepRun, Plan, Schedule
from unrolled.training.deep_kmeans_samples import Augment, Rows, Samples
from unrolled.training.loop import Callback, _is_true, _writable, progress_bar

Fitted = TypeVar("Fitted")


def _adam(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


@dataclass(frozen=True)
class Alternating:
    """Centres in one epoch, the encoder in the next: the published order.

    Args:
        centres_first: whether the first epoch is one of the centres.
    """

    centres_first: bool = True

    def __call__(self, epoch: int) -> tuple[bool, bool]:
        """Whether the centres move in this epoch (from 0), and whether the encoder is drawn to them."""
        centres = (epoch % 2 == 0) == self.centres_first
        return centres, not centres


@dataclass(frozen=True)
class Joint:
    """Centres and encoder in every step."""

    def __call__(self, epoch: int) -> tuple[bool, bool]:
        """As for `Alternating`: both, in every epoch."""
        return True, True


@dataclass(repr=False)
class DeepHistory:
    """What `fit_deep_kmeans` returns.

    Attributes:
        pretraining: the reconstruction error of every epoch of the auto-encoder alone, as a share of the variance; 0
            without a decoder.
        reconstruction: that of every epoch after; empty without a decoder.
        clustering: the mean squared distance of all codes to their nearest centres: at the start of the centres, then
            after every epoch.
        changed: the share of the samples whose cluster changed, in every epoch with clustering.
        revived: how many centres were revived after each of these.
        seconds: CPU seconds of this process, over all its threads. Left out of comparisons.
    """

    pretraining: list[float] = field(default_factory=list)
    reconstruction: list[float] = field(default_factory=list)
    clustering: list[float] = field(default_factory=list)
    changed: list[float] = field(default_factory=list)
    revived: list[int] = field(default_factory=list)
    seconds: float = field(default=0.0, compare=False)

    def __len__(self) -> int:
        """How many epochs were done."""
        return len(self.pretraining) + len(self.changed)

    def __repr__(self) -> str:
        losses = f", clustering {self.clustering[0]:.4g} -> {self.clustering[-1]:.4g}" if self.clustering else ""
        return f"DeepHistory({len(self.pretraining)} + {len(self.changed)} epochs{losses}, {self.seconds:.1f} s)"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers, ready for JSON."""
        return {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}


def fit_deep_kmeans(
    model: DeepKMeans,
    data: Tensor | Rows,
    *,
    pretrain_epochs: int = 100,
    epochs: int = 50,
    batch_size: int = 256,
    weight: float = 0.4,
    schedule: Schedule = Alternating(),
    step_size: float = 0.1,
    annealing: AnnealTemperature | None = None,
    attraction: ClusteringLoss = LogLikelihood(),
    augment: Augment | None = None,
    neighbours: Tensor | None = None,
    contrast: Contrast | None = None,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] = _adam,
    restarts: int = 10,
    min_share: float = 0.001,
    tol: float = 0.001,
    autocast: torch.dtype | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10,
    seed: int = 0,
) -> DeepHistory:
    r"""$\min_{f,g,C} \frac{1}{\sigma^2}\|x - g(h)\|^2 + \lambda\,\ell(h, C)$, $h = f(x) / \|f(x)\|$, averaged.

    1. Pretraining: encoder and decoder learn to reconstruct, `pretrain_epochs` long.
    2. Warm start: the centres become those of k-means on the codes, the best of `restarts` runs.
    3. Clustering, `epochs` long, with the reconstruction always on: the centres step towards their samples
       (`KMeansHead.spherical_step`, its length falling to 0), and the encoder is drawn to the centres. After each epoch
       but the last, centres with hardly a sample are revived.

    Without 1 and 2, from random weights, nearly everything ends in two or three clusters. $\sigma^2$ is the variance of
    the data, so that $\lambda$ has no unit. The learning rate falls to 0 along half a cosine, in 1 and again in 3.

    Everything random comes from `seed`: on the CPU, the same arguments and weights give the same result, bit for bit,
    interrupted or not. Under `torchrun`, once `torch.distributed` is initialised, the processes share every batch and
    end with the same model as one process would but for rounding: give all of them the same data. (Batch normalisation
    and `contrast` see each process's part of a batch, as always under `DistributedDataParallel`; dropout, augmentation
    and neighbours draw other numbers.) The first process alone shows progress and writes checkpoints.

    Args:
        model: encoder, decoder and head. The seed of its own weights is yours: `torch.manual_seed` before you build it.
        data: (n, ...), the samples: a Tensor, or anything with `len` whose `data[index]` for a Tensor of row numbers is
            a Tensor of these rows, in the dtype of the model. They are moved to the model's device in batches.
        pretrain_epochs: how long the auto-encoder learns alone; 0 for an encoder that is trained already.
        epochs: how long everything learns together, at most; with 0 the result is k-means on the codes.
        batch_size: samples in a step, at most: the batches of an epoch differ in size by one sample or none. Under
            `torchrun`, over all processes.
        weight: $\lambda$, at least 0.
        schedule: `Alternating()` or `Joint()`, or a function from the epoch to two booleans: whether the centres move,
            and whether the encoder is drawn to them.
        step_size: of the centres at the beginning of 3, positive; it falls to 0 linearly.
        annealing: soft assignments at first, hard ones in the end; its steps are epochs. Hard where not given.
        attraction: $\ell$, how codes are drawn to the centres: `LogLikelihood()`, or as published `Attraction()`, or a
            function of squared distances and assignments.
        augment: `augment(x, generator)`, other samples of the same clusters, such as `RandomAffine()`. The encoder sees
            these, and learns to give them the cluster of `x` and enough to reconstruct `x` itself.
        neighbours: (n, m), int64: for each sample the numbers of m others that are probably of its cluster, such as the
            nearest ones. The encoder sees one of them in its place, drawn anew in every epoch, and then augmented.
        contrast: `Contrast()` asks the code of what the encoder sees to tell the sample that it stands for, in both
            phases. It needs `augment`, `neighbours` or both.
        optimizer: called once with the parameters of encoder and decoder that require a gradient; Adam at a rate of
            1e-3 where not given.
        restarts: runs of k-means in 2; with 0 the centres are left as they are.
        min_share: a centre with a smaller share of the samples is revived, see `KMeansHead.revive`.
        tol: training ends early when in each of two epochs a smaller share of the samples has changed its cluster.
        autocast: `torch.bfloat16` computes most of it in this dtype, which is faster where the processor knows it.
        callbacks: each is called as `callback(epoch, loss, model)` after every epoch, with the number of epochs done,
            both kinds, and the mean loss of the last; if one returns True, the training ends.
        progress: whether to show a progress bar.
        checkpoint: a file that is replaced, never half written, every `checkpoint_every` epochs and at the end. If it
            exists, training goes on from it. Call `fit_deep_kmeans` with the same arguments.
        checkpoint_every: epochs between two checkpoints, at least 1.
        seed: of batches, augmentation, dropout, k-means and revival; torch's own generators are put back afterwards.

    Returns:
        The `DeepHistory`. The trained `model` is in the modes, train or eval, that it came in: call `model.eval()`
        before you use it.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: no samples or fewer than clusters, NaN in the data, a number out of range, pretraining without a
            decoder, codes that are zero on the sphere, or a checkpoint of another run.
        FloatingPointError: the loss or a gradient is NaN or infinite; the weights are those before that step.

    Example:
        >>> encoder, decoder = fully_connected_coders(8, 2, hidden=(16,))
        >>> model = DeepKMeans(encoder, decoder, KMeansHead(2, num_clusters=3))
        >>> history = fit_deep_kmeans(model, torch.rand(60, 8), pretrain_epochs=2, epochs=4, tol=0.0)
        >>> len(history.pretraining), len(history.clustering)
        (2, 5)

    Reference:
        X. Peng, Y. Li, I. W. Tsang, H. Zhu, J. Lv and J. T. Zhou, "XAI Beyond Classification: Interpretable Neural
        Clustering", Journal of Machine Learning Research 23, 2022, equation 15. Pretraining, warm start, revival,
        annealing and augmentation are additions.
    """
    if not isinstance(model, DeepKMeans):
        raise TypeError(
            f"model must be a DeepKMeans, got {type(model).__name__}. Pass it neither compiled nor wrapped."
        )
    plan = Plan(
        pretrain_epochs=_check.integer("pretrain_epochs", pretrain_epochs, minimum=0),
        epochs=_check.integer("epochs", epochs, minimum=0),
        batch_size=_check.integer("batch_size", batch_size),
        weight=_check.real("weight", weight, minimum=0.0),
        step_size=_check.real("step_size", step_size, above=0.0),
        restarts=_check.integer("restarts", restarts, minimum=0),
        min_share=_check.real("min_share", min_share, minimum=0.0),
        seed=_check.integer("seed", seed, minimum=0),
    )
    tol = _check.real("tol", tol, minimum=0.0)
    _check.integer("checkpoint_every", checkpoint_every)
    functions = [("schedule", schedule), ("optimizer", optimizer), ("attraction", attraction)]
    functions += [("callbacks", callback) for callback in callbacks]
    for name, function in functions:
        if isinstance(function, type) or not callable(function):
            raise TypeError(f"{name} must be callable, got {function!r}.")
    path = None if checkpoint is None else _writable(checkpoint)

    history = DeepHistory()
    with modes_kept(model), _centres_frozen(model), progress_bar(plan.pretrain_epochs + plan.epochs, progress) as bar:
        samples = Samples(data, neighbours, augment, like=model.head.centres, at_once=4 * plan.batch_size)
        run = DeepRun(model, plan, history, samples, schedule, annealing, attraction, contrast, optimizer, autocast)
        if path is not None and path.exists():
            run.resume(path)
            bar.update(len(history))
        else:
            run.begin()
        stop = False
        while len(history) < plan.pretrain_epochs + plan.epochs and not stop and not _settled(history, tol):
            loss = run.advance()
            epoch = len(history)
            answers = [callback(epoch, loss, model) for callback in callbacks]
            stop = processes.anyone(any(map(_is_true, answers)), run.device)
            last = stop or epoch == plan.pretrain_epochs + plan.epochs or _settled(history, tol)
            if path is not None and (last or epoch % checkpoint_every == 0):
                run.save(path)
            changed = f"{100 * history.changed[-1]:.2f} %" if history.changed else "-"
            bar.set_postfix(loss=f"{loss:.4g}", changed=changed, refresh=False)
            bar.update()
    return history


def best_of_seeds(
    train: Callable[[int], tuple[Fitted, DeepHistory]], seeds: Iterable[int]
) -> tuple[Fitted, list[DeepHistory]]:
    """The run with the smallest clustering loss over all the data, of several seeds.

    Selection by the loss needs no labels. Deep clusterings differ between seeds by several points of accuracy: train
    some, and keep this one.

    Args:
        train: `train(seed)`, which builds and trains a model and returns it with the history of `fit_deep_kmeans`.
        seeds: one for each run.

    Returns:
        The best model, and the histories of all runs in the order of the seeds.

    Raises:
        ValueError: there is no seed, or no run has clustered anything.

    Example:
        >>> def train(seed):
        ...     torch.manual_seed(seed)
        ...     model = DeepKMeans(torch.nn.Linear(8, 2), None, KMeansHead(2, num_clusters=3))
        ...     return model, fit_deep_kmeans(model, x, pretrain_epochs=0, epochs=2, seed=seed)
        >>> x = torch.rand(60, 8)
        >>> model, histories = best_of_seeds(train, seeds=range(3))
        >>> len(histories)
        3
    """
    best: tuple[float, Fitted] | None = None
    histories = []
    for seed in seeds:
        model, history = train(seed)
        histories.append(history)
        loss = history.clustering[-1] if history.clustering else math.inf
        if loss < (math.inf if best is None else best[0]):
            best = loss, model
    if best is None:
        raise ValueError(f"there is no run to choose from: {len(histories)} seeds, and no clustering loss.")
    return best[1], histories


def _settled(history: DeepHistory, tol: float) -> bool:
    # Two epochs, as one of an alternating schedule may only have moved the centres.
    return len(history.changed) >= 2 and max(history.changed[-2:]) < tol


class _centres_frozen:
    """The centres move by steps of their own: no gradient, so that processes need not wait for one either."""

    def __init__(self, model: DeepKMeans) -> None:
        self.centres = model.head.centres
        self.before = self.centres.requires_grad

    def __enter__(self) -> None:
        self.centres.requires_grad_(False)

    def __exit__(self, *exception: object) -> None:
        self.centres.requires_grad_(self.before)
