"""`PipelineStage`: a chain of decoupled modules, one in each process."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from unrolled import _check
from unrolled.decoupled.chain import DecoupledModule, Loss

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_HEADER = 10  # dtype, number of dimensions, up to eight sizes
_FORWARD, _BACK = 0, 1  # tags


class _Pending(NamedTuple):
    """An activation that was sent on, and the gradient that will come back for it."""

    h: Tensor
    target: Tensor | None
    gradient: Tensor
    works: list[Any]


class PipelineStage:
    r"""$\theta_r \leftarrow \theta_r - \alpha\,M_r(h_r, c)\,\partial h_r / \partial\theta_r$ in process r, at once.

    Every process of the group calls `update` once a batch. It takes the activation from the process before, runs and
    updates its own module, and sends its output on: the forward pass is all that modules wait for. The gradient that
    arrives at a module's input goes back as a lesson for the synthesiser before it, late: a process takes it up
    `delay` batches after it sent the activation, and is so far ahead of the next one at most. With `delay=0` the
    numbers are those of `DecoupledChain` in one process; the lessons are then waited for.

    Communication is by `torch.distributed`, which must be initialised, such as by
    `torch.distributed.init_process_group("gloo")` under `torchrun`. Nothing depends on timing: the same seeds give the
    same weights.

    Args:
        stage: this process's module, with its synthesiser and optimisers; no synthesiser in the last process.
        loss: `loss(output, target)`, a mean over the batch, in the last process.
        delay: batches after which a synthesiser takes up what came back, at least 0.
        group: the process group; the default one where not given.

    Raises:
        RuntimeError: `torch.distributed` is not initialised.
        TypeError: `stage` is no `DecoupledModule`.
        ValueError: the last process has no `loss`, or another one has no synthesiser.

    Example:
        >>> stage = PipelineStage(DecoupledModule(part, synthesiser, optimizer))   # doctest: +SKIP
        >>> for x, labels in batches:                                              # doctest: +SKIP
        ...     stage.update(x, labels)
        >>> stage.finish()                                                         # doctest: +SKIP

    Reference:
        M. Jaderberg et al., "Decoupled Neural Interfaces using Synthetic Gradients", ICML 2017.
    """

    def __init__(self, stage: DecoupledModule, *, loss: Loss | None = None, delay: int = 1, group: Any = None) -> None:
        if not isinstance(stage, DecoupledModule):
            raise TypeError(f"stage must be a DecoupledModule, got {type(stage).__name__}.")
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                'torch.distributed is not initialised. Call torch.distributed.init_process_group("gloo").'
            )
        self.stage, self.group = stage, group
        self.delay = _check.integer("delay", delay, minimum=0)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.loss = loss
        if self.last and loss is None:
            raise ValueError(f"process {self.rank} is the last of {self.size}: give it loss=...")
        if not self.last and stage.synthesiser is None:
            raise ValueError(f"process {self.rank} of {self.size} is not the last: its module needs a synthesiser.")
        self._pending: deque[_Pending] = deque()
        self._sent: deque[tuple[Tensor, Any]] = deque()

    @property
    def last(self) -> bool:
        """Whether this is the last process."""
        return self.rank == self.size - 1

    def update(self, x: Tensor | None, target: Tensor | None = None) -> Tensor | None:
        """One batch through this process's module, which is updated; returns the loss in the last one, else `None`.

        Args:
            x: the batch, in the first process; not used in the others.
            target: what the loss and conditioned synthesisers see.
        """
        if self.rank > 0:
            x = self._receive()
        elif x is None:
            raise ValueError("x is missing: the first process takes the batch.")
        out, gradient = self.stage.step(x, target, loss=self.loss if self.last else None)
        if self.rank > 0:
            assert gradient is not None
            gradient = gradient.contiguous()
            self._sent.append((gradient, self._isend(gradient, self.rank - 1, _BACK)))
            self._settle(self.delay + 1)
        if self.last:
            return out
        self._send(out, target)
        while len(self._pending) > self.delay:
            self._learn()
        return None

    def finish(self) -> None:
        """Take up what is still on its way; call it in every process after the last batch."""
        while self._pending:
            self._learn()
        self._settle(0)

    def _send(self, h: Tensor, target: Tensor | None) -> None:
        if h.dtype not in _DTYPES or h.dim() > _HEADER - 2:
            raise TypeError(f"the output must be a real floating point tensor of at most 8 dimensions, got {h.dtype}.")
        h = h.contiguous()
        header = [_DTYPES.index(h.dtype), h.dim(), *h.shape]
        told = torch.tensor(header + [0] * (_HEADER - len(header)), device=h.device)
        works = [self._isend(told, self.rank + 1, _FORWARD), self._isend(h, self.rank + 1, _FORWARD)]
        back = torch.empty_like(h)
        works.append(dist.irecv(back, self._peer(self.rank + 1), self.group, tag=_BACK))
        self._pending.append(_Pending(h, target, back, [*works, told]))

    def _receive(self) -> Tensor:
        device = next(self.stage.parameters()).device
        header = torch.zeros(_HEADER, dtype=torch.long, device=device)
        dist.recv(header, self._peer(self.rank - 1), self.group, tag=_FORWARD)
        dtype, dims, *sizes = header.tolist()
        h = torch.empty(sizes[:dims], dtype=_DTYPES[dtype], device=device)
        dist.recv(h, self._peer(self.rank - 1), self.group, tag=_FORWARD)
        return h

    def _learn(self) -> None:
        h, target, gradient, (*works, _) = self._pending.popleft()
        for work in works:
            work.wait()
        self.stage.learn(h, gradient, target)

    def _settle(self, count: int) -> None:
        """Wait until at most `count` gradients are on their way back: their memory is theirs until then."""
        while len(self._sent) > count:
            self._sent.popleft()[1].wait()

    def _isend(self, tensor: Tensor, rank: int, tag: int) -> Any:
        return dist.isend(tensor, self._peer(rank), self.group, tag=tag)

    def _peer(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)
