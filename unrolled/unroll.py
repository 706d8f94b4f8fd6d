"""`Unroll`: any Step, run for K iterations as a K-layer network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast, overload

from torch import Tensor, nn

from unrolled import _check
from unrolled._config import Recorded
from unrolled._tree import State, describe, same_structure
from unrolled.gradient import Advance, Backprop, Gradient, Loop
from unrolled.gradient.protocol import needs_tied
from unrolled.step import Step
from unrolled.stopping import Stopping, all_settled

Self = TypeVar("Self", bound="Unroll")


class Unroll(Recorded, nn.Module):
    r"""$x_{k+1} = T_{\theta_k}(x_k; c),\ k = 0 \dots K-1$: a step unrolled into a network of `num_iters` layers.

    Calling the network prepares the step, starts it, runs the iterations and returns the readout of the last state.
    Before any training it *is* the algorithm that the step describes.

    `net[:4]` is the network of the first four layers, `net[4]` one layer; both share their parameters with `net`.

    Args:
        step: the algorithm. It becomes the first layer, it is not copied.
        num_iters: how many iterations K, at least 1.
        tied: `True`, one step for all iterations (a recurrent network); `False`, a copy with parameters of its own for
            every iteration; a sequence of names, copies that share just these parameters, buffers or submodules.
        gradient: how gradients flow through the iterations, see `unrolled.gradient`.
        stop: when a sample stops before K iterations: a rule such as `Tolerance(rtol=1e-4)`, or `Halting()`, which
            learns when; `None` runs all.

    Raises:
        TypeError: `step` is no Step, `gradient` no strategy object, `stop` no stopping rule, `tied` a single string.
        ValueError: `num_iters` is less than 1, `tied` names something that the step does not have, or the layers have
            parameters of their own and the `gradient` is one of a single map, such as `Implicit`.

    Example:
        >>> net = Unroll(MyStep(), num_iters=16, tied=("dictionary",))   # doctest: +SKIP
        >>> x = net(y)                                                   # doctest: +SKIP
    """

    steps: nn.ModuleList

    def __init__(
        self,
        step: Step,
        num_iters: int,
        *,
        tied: bool | Sequence[str] = True,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(step, Step):
            raise TypeError(
                f"step must be an unrolled.Step instance, got {_kind(step)}. Subclass Step and pass an object."
            )
        if isinstance(gradient, type) or not callable(gradient):
            raise TypeError(f"gradient must be a strategy object such as Checkpointed(every=4), got {_kind(gradient)}.")
        if stop is not None and not isinstance(stop, Stopping):
            raise TypeError(f"stop must be None or a rule such as Tolerance(rtol=1e-4), got {_kind(stop)}.")
        self.num_iters = _check.integer("num_iters", num_iters)
        self.tied = _tied(tied, step)
        self.gradient = gradient
        self._check_gradient()
        self.stop = stop
        copies = 1 if self.tied is True else self.num_iters
        # deepcopy takes what its memo holds for copied already, and so leaves it shared.
        names = self.tied if isinstance(self.tied, tuple) else ()
        shared = [getattr(owner, key) for name in names for _, owner, key in _tensors(step, name)]
        twins = [copy.deepcopy(step, {id(tensor): tensor for tensor in shared}) for _ in range(copies - 1)]
        self.steps = nn.ModuleList([step, *twins])
        self.register_load_state_dict_post_hook(_tie_again)

    @property
    def _first(self) -> Step:
        return cast(Step, self.steps[0])

    def forward(self, input: Any, *context: Any, state: State | None = None, num_iters: int | None = None) -> Any:
        """Run the iterations and return the readout of the last state.

        Args:
            input: what the step's `prepare` takes.
            *context: the rest of what it takes.
            state: start from this state (of the same structure as `step.init` gives) in place of the step's own.
            num_iters: run this many iterations in this call; an untied network has at most its own number.
        """
        return self._first.readout(self.run(input, *context, state=state, num_iters=num_iters))

    def run(self, input: Any, *context: Any, state: State | None = None, num_iters: int | None = None) -> State:
        """Like calling the network, but returns the whole last state: pass it on as `state=` to go on from there."""
        advance, state, num_iters = self.start(input, *context, state=state, num_iters=num_iters)
        if self.stop is None:
            return self.gradient(advance, state, num_iters)
        return self.gradient(advance, self.stop.begin(self._first, state), num_iters).state

    def iterates(
        self, input: Any, *context: Any, state: State | None = None, num_iters: int | None = None
    ) -> list[Any]:
        """The readout after every iteration, differentiable by plain backpropagation: for losses on every layer."""
        advance, state, num_iters = self.start(input, *context, state=state, num_iters=num_iters)
        if self.stop is not None:
            state = self.stop.begin(self._first, state)
        readouts = []
        for k in range(num_iters):
            state = advance(state, k, k + 1)
            readouts.append(self._first.readout(state if self.stop is None else state.state))
        return readouts

    def start(
        self, input: Any, *context: Any, state: State | None = None, num_iters: int | None = None
    ) -> tuple[Advance, State, int]:
        """Check, prepare and start, for loops of one's own over parts of the network.

        Args:
            input, context, state, num_iters: as in a call.

        Returns:
            What runs the iterations `start .. stop - 1`, called as `advance(state, start, stop)`; the first state; and
            how many iterations there are. `net[0].readout(state)` is the answer of a state.
        """
        steps = cast(list[Step], list(self.steps))
        num_iters = self.num_iters if num_iters is None else _check.integer("num_iters", num_iters)
        if self.tied is not True and num_iters > len(steps):
            raise ValueError(
                f"num_iters is {num_iters}, but this untied network has {len(steps)} layers. Ask for at most that "
                "many, or build it with tied=True."
            )
        steps[0].check(input, *context)
        first = steps[0].prepare(input, *context)
        start = steps[0].init(first)
        if state is None:
            state = start
        elif not same_structure(start, state):
            raise ValueError(f"state must be like {describe(start)}, as this input asks for; got {describe(state)}.")

        # Backprop runs every iteration once, in this call. A strategy that runs some again in the backward pass would
        # by then meet other parameters where those of this call were swapped in, as by torch.func.functional_call.
        watched = None
        if not isinstance(self.gradient, Backprop):
            self._check_gradient()  # again: it can be set at any time
            watched = [list(map(id, step.parameters())) for step in steps]

        def advance(state: State, begin: int, end: int) -> State:
            if watched is not None:
                _same_parameters(steps, watched, begin, end)
            for k in range(begin, end):
                if k == 0 or self.tied is True:
                    step, prepared = steps[0], first
                else:  # prepared only when its turn comes: K of them at a time would cost memory
                    step, prepared = steps[k], steps[k].prepare(input, *context)
                if self.stop is None:
                    state = _same(step, k, state, step(state, prepared))
                elif all_settled(state):
                    break
                else:
                    state = self.stop(step, state, _same(step, k, state.state, step(state.state, prepared)))
            return state

        if watched is None:
            return advance, state, num_iters

        def once(state: State) -> State:
            return _same(steps[0], num_iters, state, steps[0].forward(state, first))

        return Loop(advance, once if self.tied is True else None, steps[0]), state, num_iters

    def _check_gradient(self) -> None:
        if self.tied is not True and getattr(self.gradient, "needs_tied", False):
            raise ValueError(needs_tied(self.gradient))

    def __len__(self) -> int:
        return self.num_iters

    def __iter__(self) -> Iterator[Step]:
        return (self[k] for k in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self: Self, index: slice) -> Self: ...
    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if not isinstance(index, slice):
            k = range(self.num_iters)[index]
            return self.steps[0 if self.tied is True else k]
        kept = range(self.num_iters)[index]
        if len(kept) == 0 or kept.step < 0:
            raise ValueError(
                f"net[{index.start}:{index.stop}:{index.step}] of {len(self)} layers must keep some, in order."
            )
        part = copy.copy(self)
        # copy.copy shares the dicts that hold the submodules and hooks: give the part its own, with the same modules.
        part.__dict__ = {
            key: copy.copy(value) if isinstance(value, dict) else value for key, value in vars(self).items()
        }
        part.num_iters = len(kept)
        if self.tied is not True:
            part.steps = nn.ModuleList([self.steps[k] for k in kept])
        return part

    def _tie(self) -> None:
        """Make every copy of the step hold the first one's tensors under the tied names."""
        for name in self.tied if isinstance(self.tied, tuple) else ():
            for prefix, owner, key in _tensors(self._first, name):
                for step in self.steps[1:]:
                    twin = step.get_submodule(prefix)
                    store = twin._parameters if key in owner._parameters else twin._buffers
                    store[key] = getattr(owner, key)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moves and casts may replace tensors one by one (always on the way to or from the meta device).
        super()._apply(fn, recurse)
        self._tie()
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        for name in self.tied if isinstance(self.tied, tuple) else ():
            for path, _, key in _tensors(self._first, name):
                full = f"{path}.{key}" if path else key
                values = [state_dict.get(f"{prefix}steps.{k}.{full}") for k in range(len(self.steps))]
                present = [value for value in values if value is not None and value.device.type != "meta"]
                if not all(_equal(value, present[0]) for value in present[1:]):
                    errors.append(
                        f"the layers of the loaded state disagree on {full}, which this network ties. "
                        "Load it into a network that does not tie it."
                    )

    def extra_repr(self) -> str:
        return f"num_iters={self.num_iters}, tied={self.tied}, gradient={self.gradient}"


def _same(step: Step, k: int, state: State, new: State) -> State:
    if not same_structure(state, new):
        raise ValueError(
            f"{type(step).__name__}.forward changed the state in iteration {k}: {describe(state)} came in, "
            f"{describe(new)} went out. It must return the type, shapes, dtypes and device that it receives."
        )
    return new


def _same_parameters(steps: list[Step], watched: list[list[int]], begin: int, end: int) -> None:
    for step, before in list(zip(steps, watched, strict=True))[begin:end]:
        if list(map(id, step.parameters())) != before:
            raise RuntimeError(
                f"The parameters of {type(step).__name__} were replaced between the forward and the backward pass, "
                "where this gradient strategy runs iterations again. Use gradient=Backprop() with "
                "torch.func.functional_call and torch.func.grad."
            )


def _equal(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values, NaN among them; in shards, too, which have no allclose."""
    other = other.to(value)
    return value.shape == other.shape and bool(((value == other) | (value.isnan() & other.isnan())).all())


def _tied(tied: bool | Sequence[str], step: Step) -> bool | tuple[str, ...]:
    if isinstance(tied, bool):
        return tied
    names = isinstance(tied, Sequence) and not isinstance(tied, str) and all(isinstance(name, str) for name in tied)
    if not names:
        raise TypeError(f"tied must be True, False or a sequence of names such as ('dictionary',), got {tied!r}.")
    for name in tied:
        if not _tensors(step, name):
            known = [key for key, _ in (*step.named_parameters(), *step.named_buffers())]
            raise ValueError(
                f"tied names {name!r}, which {type(step).__name__} does not have. It has: {', '.join(known)}."
            )
    return tuple(tied)


def _tensors(step: Step, name: str) -> list[tuple[str, nn.Module, str]]:
    """The (submodule path, submodule, key) of each parameter and buffer that is called `name` or lies inside it."""
    found = []
    for path, module in step.named_modules():
        for key in (*module._parameters, *module._buffers):
            full = f"{path}.{key}" if path else key
            if full == name or full.startswith(f"{name}."):
                found.append((path, module, key))
    return found


def _tie_again(module: nn.Module, incompatible_keys: Any) -> None:
    """After `load_state_dict(assign=True)`, which gives every copy a tensor of its own."""
    assert isinstance(module, Unroll)
    module._tie()


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"{value!r}"
