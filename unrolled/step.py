"""`Step`: one iterative algorithm, written once, run by `Unroll`."""

from __future__ import annotations

import abc
from typing import Any

from torch import nn

from unrolled._config import Recorded
from unrolled._tree import State


class Step(Recorded, nn.Module, abc.ABC):
    r"""One iteration $x_{k+1} = T_\theta(x_k; c)$ of an algorithm, with what surrounds the loop.

    An iterative algorithm prepares what does not change, starts somewhere, applies one update again and again, and
    reads its answer out of the last state. A subclass says these in four methods, of which it must write two:

    | method | runs | returns |
    |---|---|---|
    | `prepare(input, *context)` | once a call (once a layer when untied) | whatever the update needs of the input |
    | `init(context)` | once a call | the first state |
    | `forward(state, context)` | every iteration | the next state, of the same structure |
    | `readout(state)` | at the end | what the network returns |

    `context` is what `prepare` returned. A state is a Tensor, or a NamedTuple of Tensors where the algorithm carries
    more than its iterate (a momentum, a multiplier, a memory cell). Its tensors start with the batch dimensions of the
    readout; a tensor without dimensions is shared by the whole batch.

    `check(input, *context)` may refuse bad input; it runs once a call, before everything else.

    Attributes:
        event_dim: how many trailing dimensions of the readout make up one sample, as in `torch.distributions`: 1 for
            vectors (the default), 3 for images (channels, height, width). What comes before them is the batch.

    Example:
        >>> class GradientDescent(Step):            # x+ = x - s A'(A x - y)
        ...     def __init__(self, matrix):
        ...         super().__init__()
        ...         self.matrix = torch.nn.Parameter(matrix)
        ...         self.step_size = torch.nn.Parameter(1 / torch.linalg.matrix_norm(matrix, 2) ** 2)
        ...     def init(self, y):
        ...         return y.new_zeros(*y.shape[:-1], self.matrix.shape[1])
        ...     def forward(self, x, y):
        ...         return x - self.step_size * (x @ self.matrix.mT - y) @ self.matrix
        >>> net = Unroll(GradientDescent(torch.eye(3)), num_iters=2)
        >>> net(torch.ones(1, 3))
        tensor([[1., 1., 1.]], grad_fn=<SubBackward0>)
    """

    event_dim: int = 1

    def check(self, input: Any, *context: Any) -> None:
        """Raise a ValueError or TypeError where the input does not fit; the default accepts everything."""

    def prepare(self, input: Any, *context: Any) -> Any:
        """What the update needs and no iteration changes; the default is the input itself (a tuple with context)."""
        return (input, *context) if context else input

    @abc.abstractmethod
    def init(self, context: Any) -> State:
        """The first state."""

    @abc.abstractmethod
    def forward(self, state: State, context: Any) -> State:
        """One iteration: a state in, a new state of the same structure out. What came in must stay as it was."""

    def readout(self, state: State) -> Any:
        """What the network returns; the default is the state itself."""
        return state
