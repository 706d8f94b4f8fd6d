"""One iteration of AIR: one more object of a scene."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unrolled import _check
from unrolled.scene.parts import GlimpseDecoder, GlimpseEncoder
from unrolled.scene.windows import crop, paint
from unrolled.step import Step

FLOOR = 1e-4  # the least spread of a posterior: its logarithm stays finite


class Scene(NamedTuple):
    """What is explained of a scene so far."""

    canvas: Tensor  # (..., C, H, W): the objects found so far, painted
    where: Tensor  # (..., 3): scale, x and y of the last one
    what: Tensor  # (..., what_dim): of the last one
    hidden: Tensor  # (..., hidden): the LSTM's output, which the next object is inferred from
    cell: Tensor  # (..., hidden)
    logit: Tensor  # (...): of the probability that there is a next object
    nats: Tensor  # (...): Kullback-Leibler divergence of the places and looks of all objects so far
    number: Tensor  # (): iterations so far, which is where the next one finds its noise


class _Prepared(NamedTuple):
    x: Tensor  # (..., C, H, W)
    drive: Tensor  # (..., 4 hidden): what the LSTM gets from x, the same in every iteration
    noise: Tensor | None  # (..., T, where + what); None for posterior means


class AIRStep(Step):
    r"""$z_t \sim q(z \mid x, z_{<t}),\ y_t = y_{t-1} + \mathrm{paint}(\mathrm{decode}(z^t_{what}), z^t_{where})$.

    One more object: an LSTM that sees the scene and what was found last proposes a place. The window there is cut out
    and encoded, the code is decoded and painted, and the LSTM says whether there is another object. It runs as if there
    were one; `Halting` decides.

    Args:
        canvas: shape (C, height, width) of the scenes.
        glimpse: height and width of a glimpse in pixels.
        scale: side of the window in units of the canvas, above 0.
        scale_sd: prior standard deviation of the logarithm of the scale; `None` holds the scale fixed.
        position_sd: prior standard deviation of a place, where the canvas reaches from -1 to 1.
        what_dim: entries of $z_\mathrm{what}$.
        hidden: width of the LSTM and of the layer that reads it.
        encoder: a module from glimpses (batch, C, *glimpse) to (batch, 2 what_dim); `None` is `GlimpseEncoder`.
        decoder: a module from (batch, what_dim) to glimpses; `None` is `GlimpseDecoder`.
        device, dtype: of the parameters that are made here.
    """

    event_dim = 3

    def __init__(
        self,
        canvas: tuple[int, int, int],
        glimpse: tuple[int, int],
        *,
        scale: float,
        scale_sd: float | None = None,
        position_sd: float = 0.6,
        what_dim: int = 10,
        hidden: int = 128,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.canvas = cast(tuple[int, int, int], sides("canvas", canvas, 3))
        self.glimpse = cast(tuple[int, int], sides("glimpse", glimpse, 2))
        if self.glimpse[0] > self.canvas[1] or self.glimpse[1] > self.canvas[2]:
            raise ValueError(
                f"glimpse {self.glimpse} is larger than the canvas {self.canvas[1:]}. A glimpse shows one object; "
                "make it smaller than the scene."
            )
        self.scale = _check.real("scale", scale, above=0.0)
        self.scale_sd = None if scale_sd is None else _check.real("scale_sd", scale_sd, above=0.0)
        self.position_sd = _check.real("position_sd", position_sd, above=0.0)
        self.what_dim = _check.integer("what_dim", what_dim)
        self.hidden = _check.integer("hidden", hidden)
        for name, part in (("encoder", encoder), ("decoder", decoder)):
            if part is not None and not isinstance(part, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {part!r}.")
        shape = (self.canvas[0], *self.glimpse)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.encoder = GlimpseEncoder(shape, self.what_dim, **kind) if encoder is None else encoder
        self.decoder = GlimpseDecoder(self.what_dim, shape, **kind) if decoder is None else decoder
        self.place_dim = 2 if self.scale_sd is None else 3
        self.look = nn.Linear(math.prod(self.canvas), 4 * self.hidden, **kind)
        self.recall = nn.Linear(self.hidden + self.place_dim + self.what_dim, 4 * self.hidden, bias=False, **kind)
        self.inner = nn.Linear(self.hidden, self.hidden, **kind)
        self.outer = nn.Linear(self.hidden, 1 + 2 * self.place_dim, **kind)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the LSTM and its reader anew, as torch does, but for places that start all over the canvas.

        Encoder and decoder stay as they are.
        """
        for layer in (self.look, self.recall, self.inner, self.outer):
            layer.reset_parameters()
        # A spread of softplus(0) = 0.7 reaches from the middle to the border: windows find objects by chance first.
        self.outer.bias.zero_()

    @property
    def noise_dim(self) -> int:
        """How many random numbers an object takes."""
        return self.place_dim + self.what_dim

    def check(self, x: Tensor, noise: Tensor | None = None) -> None:
        _check.images("x", x, self.look.weight, 1.0, shaped=False)
        if x.shape[-3:] != self.canvas:
            raise ValueError(f"x must have shape (..., {', '.join(map(str, self.canvas))}), got {tuple(x.shape)}.")
        if _check.can_look_at(x) and (x.detach().amin() < -1e-3 or x.detach().amax() > 1 + 1e-3):
            low, high = float(x.detach().amin()), float(x.detach().amax())
            raise ValueError(f"x must lie in [0, 1], got values from {low:.4g} to {high:.4g}. Rescale it first.")
        if noise is not None and (noise.dim() != x.dim() - 1 or noise.shape[:-2] != x.shape[:-3]):
            raise ValueError(
                f"noise must have shape (..., T, {self.noise_dim}) with the batch dimensions {tuple(x.shape[:-3])} of "
                f"x, got {tuple(noise.shape)}."
            )
        if noise is not None and noise.shape[-1] != self.noise_dim:
            raise ValueError(f"noise must have {self.noise_dim} entries an object, got {noise.shape[-1]}.")

    def prepare(self, x: Tensor, noise: Tensor | None = None) -> _Prepared:
        return _Prepared(x, self.look(x.flatten(-3)), noise)

    def init(self, context: _Prepared) -> Scene:
        drive = context.drive
        batch = drive.shape[:-1]
        nothing = drive.new_zeros(*batch, self.noise_dim)
        still = drive.new_zeros(*batch, self.hidden)
        hidden, cell = self._recur(drive, still, still, nothing)
        return Scene(
            canvas=torch.zeros_like(context.x),
            where=drive.new_zeros(*batch, 3),
            what=drive.new_zeros(*batch, self.what_dim),
            hidden=hidden,
            cell=cell,
            logit=self._read(hidden)[0],
            nats=drive.new_zeros(batch),
            number=torch.zeros((), dtype=torch.long, device=drive.device),
        )

    def forward(self, state: Scene, context: _Prepared) -> Scene:
        x, drive, noise = context
        place_noise: Tensor | None = None
        what_noise: Tensor | None = None
        if noise is not None:
            drawn = noise.index_select(-2, state.number.reshape(1)).squeeze(-2)
            place_noise, what_noise = drawn[..., : self.place_dim], drawn[..., self.place_dim :]
        _, mean, raw = self._read(state.hidden)
        place, place_nats = _draw(mean, raw, place_noise, self._place_sd(mean))
        where = self._where(place)
        code = _samplewise(self.encoder, crop(x, where, self.glimpse), 3)
        if code.shape != (*where.shape[:-1], 2 * self.what_dim):
            raise ValueError(
                f"encoder must return {2 * self.what_dim} numbers a glimpse, got {tuple(code.shape)} for "
                f"{tuple(where.shape[:-1])} glimpses."
            )
        mean, raw = code.chunk(2, -1)
        what, what_nats = _draw(mean, raw, what_noise, None)
        canvas = state.canvas + self.draw(what, where)
        hidden, cell = self._recur(drive, state.hidden, state.cell, torch.cat([place, what], -1))
        nats = state.nats + place_nats + what_nats
        return Scene(canvas, where, what, hidden, cell, self._read(hidden)[0], nats, state.number + 1)

    def draw(self, what: Tensor, where: Tensor) -> Tensor:
        """What an object looks like on a canvas of its own, (..., C, H, W)."""
        window = _samplewise(self.decoder, what, 1)
        if window.shape != (*what.shape[:-1], self.canvas[0], *self.glimpse):
            raise ValueError(
                f"decoder must return glimpses {(self.canvas[0], *self.glimpse)}, got {tuple(window.shape)} for "
                f"{tuple(what.shape[:-1])} codes."
            )
        return paint(window, where, self.canvas[1:])

    def readout(self, state: Scene) -> Tensor:
        return state.canvas

    def prior_places(self, noise: Tensor) -> Tensor:
        """Places (..., 3) from the prior, made of standard normal noise (..., place_dim)."""
        return self._where(noise * self._place_sd(noise))

    def _place_sd(self, like: Tensor) -> Tensor:
        scale = [] if self.scale_sd is None else [self.scale_sd]
        return like.new_tensor([*scale, self.position_sd, self.position_sd])

    def _where(self, place: Tensor) -> Tensor:
        if self.scale_sd is None:
            return torch.cat([torch.full_like(place[..., :1], self.scale), place], -1)
        return torch.cat([self.scale * place[..., :1].exp(), place[..., 1:]], -1)

    def _read(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logit of an object, (...), and the mean and raw spread of its place, (..., place_dim) each."""
        out = self.outer(self.inner(hidden).relu())
        logit, mean, raw = out.split([1, self.place_dim, self.place_dim], -1)
        return logit.squeeze(-1), mean, raw

    def _recur(self, drive: Tensor, hidden: Tensor, cell: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        """The LSTM: its share of x, which does not change, is in `drive`."""
        gates = drive + self.recall(torch.cat([hidden, found], -1))
        enter, keep, value, show = gates.chunk(4, -1)
        cell = keep.sigmoid() * cell + enter.sigmoid() * value.tanh()
        return show.sigmoid() * cell.tanh(), cell

    def extra_repr(self) -> str:
        free = "" if self.scale_sd is None else f", scale_sd={self.scale_sd:g}"
        return f"canvas={self.canvas}, glimpse={self.glimpse}, scale={self.scale:g}{free}, what_dim={self.what_dim}"


def _draw(mean: Tensor, raw: Tensor, noise: Tensor | None, prior_sd: Tensor | None) -> tuple[Tensor, Tensor]:
    """A draw from N(mean, softplus(raw)^2), or the mean, and the divergence from N(0, prior_sd^2) in nats, (...)."""
    sd = F.softplus(raw) + FLOOR
    wide = torch.ones_like(mean) if prior_sd is None else prior_sd
    nats = (wide / sd).log() + ((sd / wide).square() + (mean / wide).square() - 1) / 2
    return mean if noise is None else mean + sd * noise, nats.sum(-1)


def _samplewise(module: Callable[[Tensor], Tensor], value: Tensor, event_dim: int) -> Tensor:
    """Call a module that takes one batch dimension with any number of them."""
    batch = value.shape[: value.dim() - event_dim]
    out = module(value.reshape(-1, *value.shape[value.dim() - event_dim :]))
    return out.reshape(*batch, *out.shape[1:])


def sides(name: str, shape: Any, count: int) -> tuple[int, ...]:
    if not isinstance(shape, tuple | list | torch.Size) or len(shape) != count:
        kinds = {2: "one number of pixels or (height, width)", 3: "one number of pixels, (height, width) or (C, H, W)"}
        raise ValueError(f"{name} must be {kinds[count]}, got {shape!r}.")
    return tuple(_check.integer(name, side) for side in shape)
