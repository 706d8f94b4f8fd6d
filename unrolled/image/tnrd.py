"""Trainable nonlinear reaction diffusion: filters, influence functions and a data term in a few learned stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State
from unrolled.gradient import Backprop, Gradient
from unrolled.image import _weights
from unrolled.image._filters import adjoint, filtered
from unrolled.operators import LinearOperator
from unrolled.shrinkage.radial_basis import RadialBasis
from unrolled.solvers.denoising import dct_atoms, noise_part, odd, symmetric_pad
from unrolled.step import Step
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll

Projection = Callable[[Tensor, Tensor], Tensor]

RADIUS = 310.0  # grey levels up to which influence functions are free


class _Prepared(NamedTuple):
    start: Tensor  # (..., C, H + 2p, W + 2p), in grey levels like all that follows
    data: Tensor  # the image, continued like `start` where there is neither operator nor projection
    kernels: Tensor  # (N, channels, m, m)


class TNRDStep(Step):
    r"""$u_{t+1} = u_t - \bigl[\sum_i \bar k_i * \phi_i(k_i * u_t) + \lambda A^T(A u_t - f)\bigr]$: one stage.

    Filters have norm 1 and mean 0: $k_i$ is a combination of the DCT atoms, divided by its norm. Influence functions
    are `RadialBasis`. $\lambda$ is the modulus of its parameter, and so never negative; its derivative at 0 is 1.

    Args:
        sigma, filter_size, channels, operator, projection, padding, data_range, device, dtype: as for `TNRD`.
    """

    event_dim = 3
    atoms: Tensor  # (N, channels m²)

    def __init__(
        self,
        *,
        sigma: float = 25.0,
        filter_size: int = 5,
        channels: int = 1,
        operator: LinearOperator | None = None,
        projection: Projection | None = None,
        padding: int | None = None,
        data_range: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.sigma = _check.real("sigma", sigma, above=0.0, hint="It is the noise in grey levels of 0..255.")
        self.filter_size = odd("filter_size", filter_size)
        self.channels = _check.integer("channels", channels)
        self.data_range = _check.real("data_range", data_range, above=0.0)
        margin = 2 * (self.filter_size // 2)
        self.padding = margin if padding is None else _check.integer("padding", padding, minimum=0)
        if operator is not None and not isinstance(operator, LinearOperator):
            raise TypeError(f"operator must be an unrolled.operators.LinearOperator, got {type(operator).__name__}.")
        if projection is not None and not callable(projection):
            raise TypeError(f"projection must be called as projection(u, image), got {type(projection).__name__}.")
        if operator is not None and projection is not None:
            raise ValueError("operator and projection are two data terms: pass one of them.")
        self.operator = operator
        self.projection = projection
        number = channels * filter_size**2 - 1
        self.coefficients = nn.Parameter(torch.empty(number, number, device=device, dtype=dtype))
        self.influence = RadialBasis(number, -3, num_knots=63, radius=RADIUS, device=device, dtype=dtype)
        self.raw_reaction = nn.Parameter(self.coefficients.new_empty(())) if projection is None else None
        # Made of the constants above, and so not saved with the weights.
        atoms = self.coefficients.new_empty(number, channels * filter_size**2)
        self.register_buffer("atoms", atoms, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to `solvers.dct_shrinkage`."""
        m = self.filter_size
        self.atoms.copy_(dct_atoms(m, self.channels).flatten(1))
        self.coefficients.copy_(torch.eye(len(self.coefficients)))
        self.influence.reset_parameters(lambda x: noise_part(x, self.sigma) / m**2)
        if self.raw_reaction is not None:
            self.raw_reaction.zero_()

    @property
    def reaction(self) -> Tensor:
        r"""$\lambda$, (), at least 0."""
        if self.raw_reaction is None:
            raise AttributeError("A stage that projects has no reaction.")
        return torch.where(self.raw_reaction >= 0, self.raw_reaction, -self.raw_reaction)

    @property
    def kernels(self) -> Tensor:
        """The filters, (N, channels, m, m), each of norm 1 and mean 0."""
        unit = self.coefficients / torch.linalg.vector_norm(self.coefficients, dim=1, keepdim=True)
        return (unit @ self.atoms).unflatten(1, (self.channels, self.filter_size, self.filter_size))

    def check(self, image: Tensor, start: Tensor | None = None) -> None:
        self._check_image("image", image, self.operator is None)
        if self.operator is not None:
            self.operator.check("image", image, self.operator.out_shape)
        if start is not None:
            self._check_image("start", start, True)
            batch = image.shape[: image.dim() - (3 if self.operator is None else len(self.operator.out_shape))]
            size = image.shape[-3:] if self.operator is None else self.operator.in_shape
            if start.shape != (*batch, *size):
                raise ValueError(f"start must have shape {(*batch, *size)} to go with image, got {tuple(start.shape)}.")

    def _check_image(self, name: str, image: Tensor, shaped: bool) -> None:
        _check.images(name, image, self.coefficients, self.data_range, channels=self.channels, shaped=shaped)

    def prepare(self, image: Tensor, start: Tensor | None = None) -> _Prepared:
        scale = 255 / self.data_range
        with _check.full_precision(image.device):
            data = image.to(self.coefficients.dtype) * scale
            if start is not None:
                begin = start.to(self.coefficients.dtype) * scale
            else:
                begin = data if self.operator is None else self.operator.adjoint(data)
            begin = symmetric_pad(begin, self.padding)
            if self.operator is None and self.projection is None:
                data = symmetric_pad(data, self.padding) if start is not None else begin
            return _Prepared(begin, data, self.kernels)

    def init(self, context: _Prepared) -> Tensor:
        return context.start

    def forward(self, u: Tensor, context: _Prepared) -> Tensor:
        with _check.full_precision(u.device):
            images = u.reshape(-1, self.channels, *u.shape[-2:])
            responses = filtered(images, context.kernels)
            moved = u - adjoint(self.influence(responses), context.kernels).reshape(u.shape)
            if self.projection is not None:
                return symmetric_pad(self.projection(self._cropped(moved), context.data), self.padding)
            if self.operator is None:
                return moved + self.reaction * (context.data - u)
            misfit = context.data - self.operator(self._cropped(u))
            return moved + self.reaction * symmetric_pad(self.operator.adjoint(misfit), self.padding)

    def _cropped(self, u: Tensor) -> Tensor:
        p = self.padding
        return u[..., p : u.shape[-2] - p, p : u.shape[-1] - p]

    def readout(self, u: Tensor) -> Tensor:
        return self._cropped(u) * (self.data_range / 255)

    def extra_repr(self) -> str:
        return (
            f"sigma={self.sigma:g}, filter_size={self.filter_size}, channels={self.channels}, "
            f"padding={self.padding}, data_range={self.data_range:g}"
        )


class TNRD(Unroll):
    r"""$u_{t+1} = u_t - \bigl[\sum_i \bar k^t_i * \phi^t_i(k^t_i * u_t) + \lambda^t A^T(A u_t - f)\bigr]$, $u_0 = f$.

    Restores images in a few stages. Each filters the image with its own small filters, passes the responses through
    influence functions of its own, filters back with the same filters turned by 180 degrees, and takes the result off;
    the data term draws the image back to what was observed. Without an `operator` ($A = I$) it removes noise.

    Untrained, the first stage is `solvers.dct_shrinkage` and the others change nothing, so the network is that
    classical method. `TNRD.pretrained(sigma=25)` is a trained one.

    The output is not clipped to the range. Images of a batch do not influence each other. Under autocast it computes in
    its own precision all the same. For images too large for memory see `unrolled.image.tiled`.

    Args:
        num_iters: number of stages T.
        sigma: standard deviation of the noise that the untrained network is for, in grey levels of 0..255 whatever
            `data_range` is; positive. A trained network is for the noise that it was trained on.
        filter_size: side m of the filters, odd, at least 3. A stage has `channels` m² - 1 of them.
        channels: 1 treats every channel as an image of its own, however many there are; 3 filters all three of a
            colour image jointly.
        operator: $A$, a `LinearOperator` from images (C, H, W) to observations; None is the identity.
        projection: in place of the term with $\lambda$: after each stage's diffusion, `projection(u, f)` gives the
            nearest image that agrees with the observed f, both in grey levels of 0..255. See `JPEGBox`.
        padding: by how many pixels the image is continued by its mirror image, before the first stage; cropped at the
            end. 2 (m // 2) where not given.
        data_range: images without noise are in [0, `data_range`].
        tied: each stage its own parameters (`False`), one stage's for all (`True`; then all of them shrink), or the
            names of those shared.
        gradient: how gradients flow through the stages, see `unrolled.gradient`.
        stop: when a sample stops before the last stage, see `unrolled.Tolerance`.
        device, dtype: of the parameters.

    Shape:
        - image: (..., C, height, width) of any size, the dtype and device of the parameters; (..., *A.out_shape) with
          an operator
        - start: $u_0$ where it is not the image (for an operator, not $A^T f$): (..., C, height, width)
        - output: (..., C, height, width)

    Raises:
        TypeError: an image that is not floating point or of another dtype; options of the wrong kind.
        ValueError: a wrong shape or device, NaN or infinity, values far outside of [0, `data_range`], `sigma <= 0`, an
            even `filter_size`, both `operator` and `projection`.

    Example:
        >>> net = TNRD.pretrained(sigma=25)
        >>> clean = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
        >>> noisy = clean + 25 / 255 * torch.randn(1, 1, 64, 64)
        >>> ((net(noisy) - clean).std() / (noisy - clean).std()).item() < 0.3
        True

    Reference:
        Y. Chen and T. Pock, "Trainable Nonlinear Reaction Diffusion: A Flexible Framework for Fast and Effective Image
        Restoration", TPAMI 2017.
    """

    def __init__(
        self,
        num_iters: int = 5,
        *,
        sigma: float = 25.0,
        filter_size: int = 5,
        channels: int = 1,
        operator: LinearOperator | None = None,
        projection: Projection | None = None,
        padding: int | None = None,
        data_range: float = 1.0,
        tied: bool | Sequence[str] = False,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        step = TNRDStep(
            sigma=sigma,
            filter_size=filter_size,
            channels=channels,
            operator=operator,
            projection=projection,
            padding=padding,
            data_range=data_range,
            device=device,
            dtype=dtype,
        )
        super().__init__(step, num_iters, tied=tied, gradient=gradient, stop=stop)
        for later in cast(list[TNRDStep], list(self.steps[1:])):
            if later.influence.weight is not step.influence.weight:
                nn.init.zeros_(later.influence.weight)

    def forward(  # type: ignore[override]  # each system says what it takes
        self,
        image: Tensor,
        start: Tensor | None = None,
        *,
        state: State | None = None,
        num_iters: int | None = None,
    ) -> Tensor:
        return super().forward(image, *(() if start is None else (start,)), state=state, num_iters=num_iters)

    @property
    def reach(self) -> int:
        """How many pixels away noise makes a difference to a pixel of the output, where there is no operator."""
        return len(self) * 2 * (cast(TNRDStep, self.steps[0]).filter_size // 2)

    def with_operator(self, operator: LinearOperator) -> TNRD:
        """The same network, sharing all parameters, with another operator: say, for images of another size.

        Args:
            operator: the new $A$.
        """
        if not isinstance(operator, LinearOperator) or cast(TNRDStep, self.steps[0]).operator is None:
            raise TypeError(f"operator must be a LinearOperator, for a TNRD that has one, got {operator!r}.")
        twin = self[:]
        steps = [copy.copy(step) for step in self.steps]
        for step in steps:
            step.__dict__["_modules"] = {**step._modules, "operator": operator}
        twin.steps = nn.ModuleList(steps)
        return twin

    @classmethod
    def pretrained(
        cls,
        sigma: float = 25,
        *,
        filter_size: int = 5,
        data_range: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TNRD:
        """A network of five stages with weights trained on photographs with Gaussian noise, which come along.

        Args:
            sigma: standard deviation of the noise in grey levels of 0..255.
            filter_size: side of the filters.
            data_range: images without noise are in [0, `data_range`].
            device, dtype: of the parameters.

        Raises:
            ValueError: there are no weights for this noise and filter size; it says which there are.
        """
        values = _weights.load(f"tnrd_{filter_size}x{filter_size}_sigma{sigma:g}")
        num_iters = 1 + max(int(name.split(".")[1]) for name in values)
        net = cls(num_iters, sigma=sigma, filter_size=filter_size, data_range=data_range, device=device, dtype=dtype)
        net.load_state_dict(values)
        return net.eval()
