"""Attend, infer, repeat: a scene taken apart object by object, as many iterations as there are objects."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State
from unrolled.gradient import Backprop, Gradient
from unrolled.scene.estimators import Enumerated, Estimator
from unrolled.scene.step import AIRStep, sides
from unrolled.step import Step
from unrolled.stopping import Count, Halting, Stopping, outcomes
from unrolled.unroll import Unroll

WARMUP = 300  # updates of the default estimator in which every number of objects counts the same


class _Presence(nn.Module):
    """The halting head of AIR: the step itself carries the logit of one more object."""

    def __init__(self) -> None:  # its own, without the arbitrary arguments of nn.Module's: `unrolled.io` asks for them
        super().__init__()

    def forward(self, step: Step, before: State, after: State) -> Tensor:
        return after.logit


class Found(NamedTuple):
    """The objects of scenes, in the order in which they were found."""

    boxes: Tensor  # (..., T, 4): left, top, right and bottom border of the window, in pixels from the canvas's corner
    present: Tensor  # (..., T) bool: the first of them are, as many as were counted

    @property
    def centres(self) -> Tensor:
        """Middle of the windows, x and y in pixels, (..., T, 2)."""
        return (self.boxes[..., :2] + self.boxes[..., 2:]) / 2


class AIR(Unroll):
    r"""$x \approx \sum_{t \le n} \mathrm{paint}(\mathrm{decode}(z^t_{what}), z^t_{where})$ with n learned, too.

    How many objects a scene has, where they are, and what they look like: learned from scenes alone, without labels.
    Its iterations are objects. One finds the next, and the probability of going on is that there is one. So `net(x)`
    stops, scene by scene, when everything is found, and returns the scene as it was understood. The number of objects
    is enumerated in training, by the same pieces as for any network with `Halting`: all T iterations run once, and
    $\sum_n q(n)\,[-\log p(x \mid n)]$ is computed exactly, where the published system draws n (which `Sampled` does).

    Pixels have Gaussian noise. Places and looks have normal priors, the number of objects a geometric one.

    Args:
        canvas: the scenes' height and width, or (C, height, width).
        num_iters: T, the most objects that are looked for; one more than there are makes learning surer.
        glimpse: side of a glimpse in pixels, or (height, width): somewhat more than an object.
        scale: side of a window in units of the canvas; by default that of the glimpse, so that pixels keep their size.
        scale_sd: prior standard deviation of the logarithm of the scale; `None` holds the scale fixed.
        position_sd: prior standard deviation of a place, where the canvas reaches from -1 to 1.
        what_dim: entries of $z_\mathrm{what}$, the code of an object's look.
        hidden: width of the LSTM.
        encoder: a module from glimpses (batch, C, height, width) to (batch, 2 what_dim), the means and raw spreads of
            $z_\mathrm{what}$; `None` is `GlimpseEncoder`.
        decoder: a module from (batch, what_dim) to glimpses in [0, 1] that are nearly empty at the start; `None` is
            `GlimpseDecoder`.
        prior: probability that there is one more object; small, as an object then has to explain something.
        noise_sd: standard deviation of the pixels' noise.
        estimator: `Enumerated(warmup)` or `Sampled(baseline, warmup=...)`, how `loss` treats the number of objects;
            by default the first, with a warm-up of 300 updates. Without one, learning often stops at too few objects.
        tied: as in `Unroll`.
        gradient: as in `Unroll`; `loss` and `elbo` backpropagate through all iterations.
        stop: a rule that decides in place of the presence probabilities; `loss` and `elbo` need a `Halting`.
        device, dtype: of the parameters.

    Shape:
        - x: (..., C, H, W), values in [0, 1]
        - output: (..., C, H, W)

    Raises:
        TypeError: an argument or x is of the wrong kind or dtype.
        ValueError: a canvas smaller than the glimpse, x of another shape, outside [0, 1] or not finite, a number out
            of its range.

    Example:
        >>> net = AIR(24, num_iters=3, glimpse=10)
        >>> x = torch.rand(4, 1, 24, 24)
        >>> history = fit(net, [x], AIR.loss, num_steps=2)
        >>> net(x).shape, net.count(x).shape, net.locate(x).boxes.shape
        (torch.Size([4, 1, 24, 24]), torch.Size([4]), torch.Size([4, 3, 4]))

    Reference:
        S. M. A. Eslami, N. Heess, T. Weber, Y. Tassa, D. Szepesvari, K. Kavukcuoglu and G. E. Hinton, "Attend, Infer,
        Repeat: Fast Scene Understanding with Generative Models", NIPS 2016.
    """

    def __init__(
        self,
        canvas: int | tuple[int, ...],
        num_iters: int = 3,
        *,
        glimpse: int | tuple[int, int],
        scale: float | None = None,
        scale_sd: float | None = None,
        position_sd: float = 0.6,
        what_dim: int = 10,
        hidden: int = 128,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        prior: float = 0.01,
        noise_sd: float = 0.3,
        estimator: Estimator | None = None,
        tied: bool | tuple[str, ...] = True,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        plane = (canvas, canvas) if isinstance(canvas, int) else canvas
        shape = (1, *plane) if isinstance(plane, tuple) and len(plane) == 2 else plane
        shape = sides("canvas", shape, 3)
        size = sides("glimpse", (glimpse, glimpse) if isinstance(glimpse, int) else glimpse, 2)
        if estimator is not None and not isinstance(estimator, Estimator):
            raise TypeError(
                f"estimator must be an object such as Enumerated() or Sampled(baseline), got {estimator!r}."
            )
        step = AIRStep(
            cast(tuple[int, int, int], shape),
            cast(tuple[int, int], size),
            scale=max(size[0] / shape[1], size[1] / shape[2]) if scale is None else scale,
            scale_sd=scale_sd,
            position_sd=position_sd,
            what_dim=what_dim,
            hidden=hidden,
            encoder=encoder,
            decoder=decoder,
            device=device,
            dtype=dtype,
        )
        rule = Halting(_Presence(), prior=prior, at_start=True) if stop is None else stop
        super().__init__(step, num_iters, tied=tied, gradient=gradient, stop=rule)
        self.noise_sd = _check.real("noise_sd", noise_sd, above=0.0)
        self.estimator = Enumerated(warmup=WARMUP) if estimator is None else estimator

    @property
    def _air(self) -> AIRStep:
        return cast(AIRStep, self.steps[0])

    def forward(  # type: ignore[override]  # each system says what it takes
        self, x: Tensor, noise: Tensor | None = None, *, state: State | None = None, num_iters: int | None = None
    ) -> Tensor:
        """The scene as it was understood, (..., C, H, W).

        Args:
            x: scenes (..., C, H, W).
            noise: standard normal numbers (..., T, noise_dim) that draw places and looks from their posteriors; `None`
                takes the means.
            state, num_iters: as in `Unroll`.
        """
        return super().forward(x, noise, state=state, num_iters=num_iters)

    def noise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Standard normal noise (..., T, noise_dim) for scenes x; `generator` in place of torch's own."""
        shape = (*x.shape[:-3], self.num_iters, self._air.noise_dim)
        return torch.randn(shape, device=x.device, dtype=x.dtype, generator=generator)

    def losses(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Count]:
        r"""$-\log p(x \mid y_n) + \sum_{t \le n} \mathrm{KL}_t$ for each number n of objects, (..., T + 1), and q(n).

        Args:
            x: scenes (..., C, H, W).
            noise: as in a call; `None` draws it here.
        """
        ends = outcomes(self, x, self.noise(x) if noise is None else noise)
        scale = x.new_tensor(self.noise_sd)
        constant = math.prod(x.shape[-3:]) * (scale.log() + math.log(2 * math.pi) / 2)
        each = [((x - end.canvas) / scale).square().sum((-3, -2, -1)) / 2 + constant + end.nats for end in ends.states]
        return torch.stack(each, -1), ends.count

    def elbo(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """The lower bound of $\\log p(x)$ in nats, (...), with the number of objects enumerated.

        Args:
            x: scenes (..., C, H, W).
            noise: as in a call; `None` draws it here.
        """
        losses, count = self.losses(x, noise)
        return -count.expected(losses) - count.kl(self._rule.prior)

    def loss(self, x: Tensor) -> Tensor:
        """What training minimises, (): `fit(net, batches, AIR.loss, ...)` with batches of scenes x (batch, C, H, W)."""
        losses, count = self.losses(x)
        return self.estimator(losses, count, self._rule.prior, x).mean()

    @torch.no_grad()
    def count(self, x: Tensor) -> Tensor:
        """How many objects are in scenes x (..., C, H, W): (...) of integers from 0 to T."""
        return outcomes(self, x).count.decision

    @torch.no_grad()
    def locate(self, x: Tensor) -> Found:
        """Where the objects are in scenes x (..., C, H, W)."""
        ends = outcomes(self, x)
        where = torch.stack([end.where for end in ends.states[1:]], -2)  # (..., T, 3)
        height, width = self._air.canvas[1:]
        size = where.new_tensor([width, height])
        centres, half = (where[..., 1:] + 1) / 2 * size, where[..., :1] / 2 * size
        order = torch.arange(where.shape[-2], device=where.device)
        present = order < ends.count.decision[..., None]
        return Found(torch.cat([centres - half, centres + half], -1), present)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The scene as it was understood, (..., C, H, W): a call, without gradients."""
        return self(x)

    @torch.no_grad()
    def sample(self, number: Tensor | int, generator: torch.Generator | None = None) -> Tensor:
        """Dream scenes of objects whose places and looks are drawn from the prior, without the pixels' noise.

        Args:
            number: how many objects, one entry a scene (batch,), or one number for one scene. To draw them from the
                prior as well, give `Count(logits of the prior).sample()`; it is 0 nearly always where the prior is
                small.
            generator: in place of torch's own random numbers.

        Returns:
            (batch, C, H, W).
        """
        step = self._air
        weight = step.look.weight
        wanted = torch.as_tensor(number, device=weight.device).reshape(-1)
        if wanted.is_floating_point() or wanted.numel() == 0 or int(wanted.min()) < 0:
            raise ValueError(f"number must be integers of at least 0, one for each scene, got {number}.")
        scenes = weight.new_zeros(len(wanted), *step.canvas)
        for t in range(int(wanted.max())):
            noise = torch.randn(
                len(wanted), step.noise_dim, device=weight.device, dtype=weight.dtype, generator=generator
            )
            where, what = step.prior_places(noise[:, : step.place_dim]), noise[:, step.place_dim :]
            scenes += step.draw(what, where) * (t < wanted)[:, None, None, None]
        return scenes

    @property
    def _rule(self) -> Halting:
        if not isinstance(self.stop, Halting):
            raise TypeError(f"net must have stop=Halting(...) to learn, got {self.stop!r}.")
        return self.stop
