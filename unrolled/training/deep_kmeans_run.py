"""`DeepRun`: a deep clustering between two epochs, which can be written to a file and taken up again."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from unrolled.cluster.annealing import AnnealTemperature
from unrolled.cluster.deep import DeepKMeans
from unrolled.cluster.deep_losses import ClusteringLoss, Contrast
from unrolled.training import processes
from unrolled.training.data import Random
from unrolled.training.deep_kmeans_samples import Samples, sum_over_processes
from unrolled.training.run import ADVICE, layout

if TYPE_CHECKING:
    from unrolled.training.deep_kmeans import DeepHistory

Schedule = Callable[[int], tuple[bool, bool]]


@dataclass(frozen=True)
class Plan:
    """The numbers of `fit_deep_kmeans` that a checkpoint must agree with."""

    pretrain_epochs: int
    epochs: int
    batch_size: int
    weight: float
    step_size: float
    restarts: int
    min_share: float
    seed: int


class Objective(nn.Module):
    """All the errors of a batch as one module, which DistributedDataParallel can wrap."""

    def __init__(self, model: DeepKMeans, attraction: ClusteringLoss, contrast: Contrast | None) -> None:
        super().__init__()
        self.model, self.attraction, self.contrast = model, attraction, contrast

    def forward(self, x: Tensor, seen: Tensor, variance: float, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """The summed loss, the summed reconstruction error in it, and the codes of what the encoder has `seen` of x."""
        model = self.model
        codes = model.encode(seen)
        reconstruction = codes.new_zeros(())
        if model.decoder is not None:
            reconstruction = model.reconstruction_error(codes, x).sum() / variance
        loss = reconstruction
        own = codes  # those of the samples themselves
        if self.contrast is not None:
            own = model.encode(x)
            loss = loss + self.contrast(codes, own).sum()
        if weight > 0:
            with torch.no_grad():  # what is seen belongs where the sample itself does
                own = model.encode(x) if seen is not x and self.contrast is None else own.detach()
                parts = model.head(own).assignments
            loss = loss + weight * model.clustering_error(codes, parts, self.attraction).sum()
        return loss, reconstruction.detach(), codes.detach()


class DeepRun:
    """Everything that one epoch hands on to the next. All that is random follows from the seed and the epoch."""

    def __init__(
        self,
        model: DeepKMeans,
        plan: Plan,
        history: DeepHistory,
        samples: Samples,
        schedule: Schedule,
        annealing: AnnealTemperature | None,
        attraction: ClusteringLoss,
        contrast: Contrast | None,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self.samples, self.plan, self.history = model, samples, plan, history
        self.schedule, self.annealing, self.autocast = schedule, annealing, autocast
        self.device = model.head.centres.device
        self.clock = time.process_time()
        self.labels = torch.zeros(0, dtype=torch.long)
        self.contrasted = contrast is not None
        self._check_sizes()
        self.variance = samples.variance()
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable and plan.pretrain_epochs > 0:
            raise ValueError("model has nothing to pretrain: no parameter requires a gradient. Take pretrain_epochs=0.")
        self.optimizer = optimizer(trainable) if trainable else None
        self.rates = [] if self.optimizer is None else [group["lr"] for group in self.optimizer.param_groups]
        self.objective: nn.Module = Objective(model, attraction, contrast)
        if trainable:
            self.objective = processes.share(self.objective)

    # ---- One epoch ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """What comes before the first epoch."""
        if self.plan.pretrain_epochs == 0:
            with self._seeded():
                self._warm_start()

    def advance(self) -> float:
        """One epoch; returns its mean loss."""
        history, plan = self.history, self.plan
        pretraining = len(history) < plan.pretrain_epochs
        with self._seeded():
            if pretraining:
                loss, reconstruction = self._epoch(len(history) / plan.pretrain_epochs, centres=False, weight=0.0)
                history.pretraining.append(reconstruction)
                if len(history) == plan.pretrain_epochs:
                    self._warm_start()
            else:
                epoch = len(history) - plan.pretrain_epochs
                if self.annealing is not None:
                    self.model.head.temperature = self.annealing.temperature(epoch)
                centres, encoder = self.schedule(epoch)
                weight = plan.weight if encoder else 0.0
                loss, reconstruction = self._epoch(epoch / plan.epochs, centres=centres, weight=weight)
                if self.model.decoder is not None:
                    history.reconstruction.append(reconstruction)
                self._look(last=epoch + 1 == plan.epochs)
        now = time.process_time()
        history.seconds += now - self.clock
        self.clock = now
        return loss

    def _epoch(self, progress: float, *, centres: bool, weight: float) -> tuple[float, float]:
        """Through all the batches; the mean loss, and the mean reconstruction error in it."""
        self.model.train()
        n = len(self.samples)
        generator = self._generator(0)
        batches = torch.randperm(n, generator=generator).tensor_split(self._num_batches())
        noise = self._generator(1 + processes.rank())
        learns = self.optimizer is not None and (self.model.decoder is not None or self.contrasted or weight > 0)
        total = torch.zeros(2, dtype=torch.float64)
        for i, batch in enumerate(batches):
            done = progress + i / len(batches) / max(self._length(), 1)
            index = batch.tensor_split(processes.num_processes())[processes.rank()]
            x = self.samples[index]
            seen = self.samples.seen(index, x, noise)
            if learns:
                loss, reconstruction, codes = self._update(x, seen, weight, len(batch), done)
                total += torch.tensor([loss, reconstruction], dtype=torch.float64)
            else:
                codes = self._encoded(seen)
            if centres:
                self._move(self._gathered(codes, len(batch)), self.plan.step_size * (1 - done))
        loss, reconstruction = (sum_over_processes(total, self.device) / n).tolist()
        return loss, reconstruction

    def _update(self, x: Tensor, seen: Tensor, weight: float, count: int, done: float) -> tuple[float, float, Tensor]:
        """One step of the optimizer. `count` is the size of the batch over all processes."""
        assert self.optimizer is not None
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
        self.optimizer.zero_grad()
        with self._casting():
            loss, reconstruction, codes = self.objective(x, seen, self.variance, weight)
        value = float(loss.detach())
        if not math.isfinite(processes.mean(value, self.device)):
            raise FloatingPointError(f"the loss is {value} in epoch {len(self.history) + 1}. {ADVICE}")
        # The gradients are averaged over the processes, whose parts of the batch may differ in size.
        (loss * (processes.num_processes() / count)).backward()
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not math.isfinite(sum(float(g.sum()) for g in gradients)) and not all(
            bool(g.isfinite().all()) for g in gradients
        ):
            raise FloatingPointError(f"a gradient is not finite in epoch {len(self.history) + 1}. {ADVICE}")
        self.optimizer.step()
        return value, float(reconstruction), codes

    def _move(self, codes: Tensor, step_size: float) -> None:
        if self.model.head.spherical:
            self.model.head.spherical_step(codes, step_size)
        else:
            self.model.head.euclidean_step(codes, step_size)

    def _warm_start(self) -> None:
        """Centres from k-means on the codes, the same in all processes."""
        codes = self._codes()
        if self.annealing is not None:
            self.model.head.temperature = self.annealing.temperature(0)
        if self.plan.restarts:
            generator = self._generator(-1)
            self.model.start_centres_of_codes(codes, restarts=self.plan.restarts, generator=generator)
        self._record(codes)

    def _look(self, *, last: bool) -> None:
        """At all the samples: who changed the cluster, how far they are, who needs to be revived."""
        before = self.labels
        codes = self._codes()
        self._record(codes)
        self.history.changed.append(float((self.labels != before).double().mean()))
        revived = 0
        if not last:
            generator = self._generator(-2)
            revived = int(self.model.head.revive(codes, min_share=self.plan.min_share, generator=generator).sum())
            self._same_centres()
        self.history.revived.append(revived)

    def _record(self, codes: Tensor) -> None:
        self._same_centres()
        logits = torch.cat([self.model.head.logits(part) for part in codes.split(65536)])
        nearest = logits.max(1)
        self.labels = nearest.indices
        self.history.clustering.append(float((-nearest.values).relu().double().mean()))

    # ---- Codes -------------------------------------------------------------------------------------------

    def _encoded(self, x: Tensor) -> Tensor:
        with torch.no_grad(), self._casting():
            return self.model.encode(x)

    def _codes(self) -> Tensor:
        """Of all samples, in eval mode; each process computes its part."""
        self.model.eval()
        codes = torch.cat([self._encoded(self.samples[index]) for index in self.samples.share()])
        if not bool(codes.isfinite().all()):
            raise FloatingPointError("encoder gave codes that are NaN or infinite. Lower the learning rate.")
        return self._gathered(codes, len(self.samples))

    def _gathered(self, part: Tensor, count: int) -> Tensor:
        """The parts of all processes, (count, d), as `tensor_split` dealt them out."""
        shares = processes.num_processes()
        if shares == 1:
            return part
        sizes = [len(one) for one in torch.empty(count).tensor_split(shares)]
        padded = part.new_zeros(max(sizes), *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(shares)]
        dist.all_gather(parts, padded)
        return torch.cat([one[:size] for one, size in zip(parts, sizes, strict=True)])

    def _same_centres(self) -> None:
        if processes.num_processes() > 1:
            dist.broadcast(self.model.head.centres.data, 0)

    def _check_sizes(self) -> None:
        n, k = len(self.samples), self.model.head.num_clusters
        if k > n:
            raise ValueError(f"data has {n} samples for {k} clusters. Pass at least as many samples as clusters.")
        if self.model.decoder is None and not self.contrasted and self.plan.pretrain_epochs > 0:
            raise ValueError("pretraining needs a decoder or a contrast. Without them take pretrain_epochs=0.")
        if self.contrasted and self.samples.neighbours is None and self.samples.augment is None:
            raise ValueError(
                "contrast needs samples that differ from those that they belong to. Pass augment, neighbours or both."
            )
        smallest = n // self._num_batches()
        if smallest < processes.num_processes():
            raise ValueError(
                f"batch_size={self.plan.batch_size} leaves batches of {smallest} samples for "
                f"{processes.num_processes()} processes. Every process needs a sample."
            )

    def _num_batches(self) -> int:
        return -(-len(self.samples) // self.plan.batch_size)

    def _length(self) -> int:
        """Epochs of the present phase."""
        return self.plan.pretrain_epochs if len(self.history) < self.plan.pretrain_epochs else self.plan.epochs

    # ---- Randomness, precision ---------------------------------------------------------------------------------------

    def _seed(self, purpose: int) -> int:
        words = [self.plan.seed, len(self.history), purpose + 2]
        return int(np.random.SeedSequence(words).generate_state(1, np.uint32)[0])

    def _generator(self, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(purpose))

    def _seeded(self) -> contextlib.AbstractContextManager[None]:
        return Random(self.model, ()).seeded(self._seed(0))

    @contextlib.contextmanager
    def _casting(self) -> Iterator[None]:
        # Entered anew for every step: autocast keeps its copies of the weights until it is left.
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            yield

    # ---- Checkpoints -------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Replace the file by one with everything that `resume` needs; the first process writes."""
        if processes.rank() == 0:
            temporary = path.with_name(f"{path.name}.tmp")
            torch.save(self._state(), temporary)
            os.replace(temporary, path)
        processes.wait()

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "temperature": self.model.head.temperature,
            "optimizer": {} if self.optimizer is None else self.optimizer.state_dict(),
            "kind": type(self.optimizer).__name__,
            "plan": asdict(self.plan) | {"samples": len(self.samples)},
            "labels": self.labels,
            "history": self.history.to_dict(),
        }

    def resume(self, path: Path) -> None:
        """Go on from the file."""
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever bytes that are no checkpoint make torch.load do
            raise ValueError(f"checkpoint {path} exists but cannot be read: {error}") from error
        own = self._state()
        if not isinstance(saved, dict) or saved.keys() != own.keys():
            raise ValueError(f"checkpoint {path} exists but was not written by fit_deep_kmeans. Choose another file.")
        advice = "Give this run a file of its own, or delete that one."
        there, here = layout(saved["model"]), layout(own["model"])
        for what, then, now in (("model", there, here), ("plan", saved["plan"], own["plan"])):
            if then != now:
                differing = [key for key in now | then if now.get(key) != then.get(key)]
                told = [f"{key} is {then.get(key)} there, {now.get(key)} here" for key in differing[:4]]
                raise ValueError(f"checkpoint {path} belongs to another {what}: {'; '.join(told)}. {advice}")
        if saved["kind"] != own["kind"]:
            raise ValueError(f"checkpoint {path} was written with {saved['kind']}, not {own['kind']}. {advice}")
        self.model.load_state_dict(saved["model"])
        self.model.head.temperature = saved["temperature"]
        if self.optimizer is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.labels = saved["labels"].to(self.device)
        for name, value in saved["history"].items():
            setattr(self.history, name, value)
