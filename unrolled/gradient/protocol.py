"""What a strategy is, and what it may ask of the loop that it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from unrolled import _check
from unrolled._tree import State, leaves, map_state
from unrolled.step import Step
from unrolled.stopping import Running

Advance = Callable[[State, int, int], State]


class Gradient(Protocol):
    """Runs `num_iters` iterations by calls of `advance(state, start, stop)` and decides what autograd sees of them.

    A strategy that makes sense for one map only, applied again and again, says so by an attribute `needs_tied = True`;
    networks whose iterations have parameters of their own then refuse it.
    """

    def __call__(self, advance: Advance, state: State, num_iters: int) -> State: ...


@dataclass(frozen=True, eq=False)
class Loop:
    """The `advance` that `Unroll` passes to a strategy: called like one, and it knows what it runs.

    Args:
        advance: runs the iterations `start .. stop - 1`.
        once: one more iteration of a tied network, without its stopping rule, of a state without `Running` around it;
            `None` where every iteration has parameters of its own. Hooks, such as those of `Trace`, do not see it.
        step: the first layer's step.
    """

    advance: Advance
    once: Callable[[State], State] | None
    step: Step

    def __call__(self, state: State, start: int, stop: int) -> State:
        return self.advance(state, start, stop)


def one_map(advance: Advance, strategy: Any) -> Callable[[State], State]:
    """The iteration of a tied network."""
    once = advance.once if isinstance(advance, Loop) else lambda state: advance(state, 0, 1)
    if once is None:
        raise ValueError(needs_tied(strategy))
    return once


def needs_tied(strategy: Any) -> str:
    return (
        f"gradient={strategy!r} needs a network with tied=True: it follows one map that is applied again and again to "
        "its fixed point, and layers with parameters of their own have none in common. Build the network with "
        "tied=True, or take Checkpointed(every), which is exact and as small as the square root of the iterations."
    )


def is_tied(advance: Advance) -> bool:
    """Whether all iterations are known to be one map."""
    return isinstance(advance, Loop) and advance.once is not None


def bare(state: State) -> State:
    """The step's own state: what a stopping rule wraps."""
    return state.state if isinstance(state, Running) else state


def batch_dims(advance: Advance, state: State) -> int:
    """How many leading dimensions of the state's tensors count samples."""
    if not isinstance(advance, Loop):
        return max(0, next(leaves(bare(state))).dim() - 1)
    readout = next(leaves(advance.step.readout(bare(state))))
    return max(0, readout.dim() - advance.step.event_dim)


def moving(state: State) -> list[Tensor]:
    """The tensors that iterations move towards a fixed point, and that gradients can flow through.

    Integer and boolean tensors are none of them. Nor are tensors without dimensions beside others that have some, which
    the whole batch shares: counters and momentum schedules, which go on whatever the iterate does.
    """
    return [leaf for leaf, moves in zip(leaves(state), _moves(state), strict=True) if moves]


def put(state: State, tensors: Sequence[Tensor]) -> State:
    """The state with these in place of its `moving` tensors."""
    moves, new = iter(_moves(state)), iter(tensors)
    return map_state(lambda leaf: next(new) if next(moves) else leaf, state)


def _moves(state: State) -> list[bool]:
    dims = max(leaf.dim() for leaf in leaves(state))
    return [(leaf.is_floating_point() or leaf.is_complex()) and (leaf.dim() > 0 or dims == 0) for leaf in leaves(state)]


def check_differentiable(strategy: Any, state: State) -> None:
    """Refuse a state that no gradient can flow through, where one is asked for."""
    if torch.is_grad_enabled() and not moving(bare(state)):
        dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves(bare(state))}))
        raise TypeError(
            f"gradient={strategy!r} cannot carry gradients through this state: its tensors are {dtypes}, and integers "
            "and booleans have no derivative. Keep what the gradient should flow through as floating point tensors in "
            "the state (soft assignments, say, in place of labels), or call the network under torch.no_grad()."
        )


def transforms() -> Iterator[Any]:
    """The transforms of torch.func (vmap, grad and so on) that the present call runs under."""
    for level in torch._C._functorch.get_interpreter_stack() or ():
        yield level.key()


def refuse_transforms(strategy: Any, *, only_gradients: bool) -> None:
    """Say clearly what does not run under torch.func, before something deep down says it less clearly."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    kinds = list(transforms())
    if torch._C._functorch.TransformType.Grad in kinds if only_gradients else kinds:
        raise RuntimeError(
            f"gradient={strategy!r} does not run under the transforms of torch.func (grad, vjp, jacrev, vmap with "
            "gradients). Set gradient=Backprop() on the network for them; for inference, torch.no_grad() suffices."
        )


def exporting() -> bool:
    """Whether torch.export runs this call; torch before 2.6 does not tell."""
    tells = getattr(torch.compiler, "is_exporting", None)
    return tells is not None and tells()


def can_look(state: State) -> bool:
    """Whether a strategy may branch on values: neither compiled nor under a transform."""
    return not (
        torch.compiler.is_compiling() or any(True for _ in transforms()) or any(map(_check.is_traced, leaves(state)))
    )
