"""Stopping by a tolerance, as solvers do."""

from __future__ import annotations

from torch import Tensor

from unrolled import _check
from unrolled._tree import State
from unrolled.step import Step
from unrolled.stopping.rule import Stopping, change_and_size


class Tolerance(Stopping):
    r"""Stop a sample once $\|x_{k+1} - x_k\| \le \mathrm{atol} + \mathrm{rtol}\,\|x_{k+1}\|$.

    $x$ is the readout and the norm is taken over one sample. From then on the sample keeps its state, whatever its
    batch mates do, so an answer never depends on the batch that it came in. Once all samples have stopped, eager mode
    on the CPU leaves the loop; compiled, exported and vmapped forms and accelerators run on with frozen samples, to the
    same answer. `unrolled.Trace` tells how many iterations each sample used.

    Args:
        rtol: relative tolerance, at least 0.
        atol: absolute tolerance in the units of the readout, at least 0. One of the two must be positive.

    Raises:
        ValueError: where both tolerances are 0 or one is negative.
    """

    def __init__(self, rtol: float = 1e-3, atol: float = 0.0) -> None:
        super().__init__()
        self.rtol = _check.real("rtol", rtol, minimum=0.0)
        self.atol = _check.real("atol", atol, minimum=0.0)
        if self.rtol == self.atol == 0:
            raise ValueError("rtol and atol are both 0, so that nothing would ever stop. Make one of them positive.")

    def settled(self, step: Step, before: State, after: State) -> Tensor:
        change, size = change_and_size(step, before, after)
        # What has diverged has not settled: NaN compares as False, infinity needs the second condition.
        return (change <= self.atol + self.rtol * size) & size.isfinite()

    def extra_repr(self) -> str:
        return f"rtol={self.rtol:g}, atol={self.atol:g}"
