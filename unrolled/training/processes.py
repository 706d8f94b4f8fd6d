"""What a training has to agree on when several processes share it, as under `torchrun`; by oneself, plain values."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unrolled.gradient import Backprop, Checkpointed
from unrolled.unroll import Unroll


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if distributed() else 0


def num_processes() -> int:
    return dist.get_world_size() if distributed() else 1


def mean(value: float, device: torch.device) -> float:
    """The mean over the processes, which talk to each other by tensors on this device."""
    if not distributed():
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def anyone(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process."""
    return mean(float(flag), device) > 0


def gather(value: Any) -> list[Any]:
    """The values of all processes, in all processes."""
    if not distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Go on when all processes are here."""
    if distributed():
        dist.barrier()


def unwrap(net: nn.Module) -> nn.Module:
    return net.module if isinstance(net, DistributedDataParallel) else net


def share(objective: nn.Module) -> nn.Module:
    """`objective`, such that a backward pass averages the gradients over the processes."""
    if not distributed() or any(isinstance(module, DistributedDataParallel) for module in objective.modules()):
        return objective
    from torch.distributed.tensor import DTensor  # takes half a second

    if any(isinstance(parameter, DTensor) for parameter in objective.parameters()):
        raise TypeError(
            "net has parameters in shards (DTensor), as fully_shard leaves them. This loop averages whole gradients; "
            "write one of your own, such as train_sharded in examples/train_distributed.py."
        )
    # DistributedDataParallel waits for the gradient of every parameter unless it is told that some may not come.
    unused = any(
        isinstance(module, Unroll)
        and module.tied is not True
        and (module.stop is not None or not isinstance(module.gradient, Backprop | Checkpointed))
        for module in objective.modules()
    )
    return DistributedDataParallel(objective, find_unused_parameters=unused)
