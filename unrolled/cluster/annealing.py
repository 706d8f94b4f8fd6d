"""`AnnealTemperature`: heads that begin soft and end hard."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from unrolled import _check
from unrolled.cluster.kmeans import KMeansHead


@dataclass(frozen=True)
class AnnealTemperature:
    r"""$\tau = \tau_0\,(\tau_1 / \tau_0)^{\min(t / T, 1)}$ after update t: a callback for `fit` that hardens all heads.

    A high temperature draws all centres to where the data are, a falling one lets them part. So the result depends less
    on where they began. It finds every `KMeansHead` in the network that is trained. Without `fit`, call
    `temperature(t)` and set `head.temperature`.

    The default suits the sphere, where squared distances are at most 4. Elsewhere multiply both ends by the mean
    squared distance of the data to their mean.

    Args:
        num_steps: T, after how many updates the temperature has reached its end, at least 1.
        start: $\tau_0$, positive.
        end: $\tau_1$, positive.

    Raises:
        TypeError: a number of the wrong type.
        ValueError: a number out of its range, or (when called) a network without a `KMeansHead`.

    Example:
        >>> anneal = AnnealTemperature(100, start=0.1, end=0.001)
        >>> round(anneal.temperature(50), 6)
        0.01
    """

    num_steps: int
    start: float = 0.1
    end: float = 0.005

    def __post_init__(self) -> None:
        _check.integer("num_steps", self.num_steps)
        _check.real("start", self.start, above=0.0)
        _check.real("end", self.end, above=0.0)

    def temperature(self, step: int) -> float:
        r"""$\tau$ after `step` updates."""
        return self.start * (self.end / self.start) ** min(step / self.num_steps, 1.0)

    def __call__(self, step: int, loss: float, net: nn.Module) -> None:
        """Set the temperature that follows update number `step`."""
        heads = [module for module in net.modules() if isinstance(module, KMeansHead)]
        if not heads:
            raise ValueError(f"net is a {type(net).__name__} without a KMeansHead: there is no temperature to anneal.")
        for head in heads:
            head.temperature = self.temperature(step)
