"""CRF-RNN: mean-field inference in a dense CRF as a recurrent network."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled._tree import State
from unrolled.crf.filters import Plan
from unrolled.crf.kernels import Bilateral, Compatibility, Kernel, Spatial, Weights
from unrolled.gradient import Backprop, Gradient
from unrolled.step import Step
from unrolled.stopping import Stopping
from unrolled.unroll import Unroll


class _Prepared(NamedTuple):
    unary: Tensor  # (..., *spatial, L)
    plans: tuple[Plan, ...]  # the normalised filter of each kernel
    weights: Tensor  # (M,) or (M, L), or the transposes of Mu W_m, (M, L, L)


class CRFStep(Step):
    r"""$u_{k+1} = U - \sum_m \mu\, W_m \tilde K_m\, \mathrm{softmax}(u_k)$: one mean-field update of a dense CRF.

    $U$ are the logits that come in, $\tilde K_m$ the normalised filters, $W_m$ their weights, and $\mu$ what classes
    next to each other cost; Potts' is $-I$, up to a constant for each pixel that softmax does not see. The state is
    $u$, the logits of the marginals, with the classes in the last dimension.

    Args:
        num_classes, kernels, weights, compatibility, damping, spatial_dims, device, dtype: as for `CRFasRNN`.
    """

    def __init__(
        self,
        num_classes: int,
        kernels: Sequence[Kernel] = (Bilateral(), Spatial()),
        *,
        weights: Weights = Weights.MATRIX,
        compatibility: Compatibility = Compatibility.POTTS,
        damping: float = 0.0,
        spatial_dims: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = _check.integer("num_classes", num_classes)
        self.spatial_dims = _check.integer("spatial_dims", spatial_dims)
        self.event_dim = 1 + self.spatial_dims
        self.damping = _check.real("damping", damping, minimum=0.0)
        if self.damping >= 1:
            raise ValueError(f"damping must be less than 1, got {damping}: nothing would ever change.")
        self.kernels = _kernels(kernels, self.num_classes)
        for name, value, kind in (("weights", weights, Weights), ("compatibility", compatibility, Compatibility)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be one of {', '.join(map(str, kind))}, got {value!r}.")
        if weights is Weights.SCALAR and any(isinstance(kernel.weight, Sequence) for kernel in self.kernels):
            raise ValueError("Weights.SCALAR takes kernels with one weight each; take Weights.PER_CLASS for several.")
        sizes = {Weights.SCALAR: 0, Weights.PER_CLASS: 1, Weights.MATRIX: 2}
        classes = (self.num_classes,) * sizes[weights]
        self.weights = nn.Parameter(torch.empty(len(self.kernels), *classes, device=device, dtype=dtype))
        self.compatibility = (
            nn.Parameter(self.weights.new_empty(self.num_classes, self.num_classes))
            if compatibility is Compatibility.LEARNED
            else None
        )
        self.bandwidths = nn.ModuleList([_Bandwidths(kernel, self.weights) for kernel in self.kernels])
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the given weights and bandwidths and to Potts' compatibility."""
        for mine, kernel in zip(self.weights, self.kernels, strict=True):
            given = mine.new_tensor(kernel.weight)
            mine.copy_(torch.diag(given.expand(self.num_classes)) if mine.dim() == 2 else given)
        if self.compatibility is not None:
            self.compatibility.copy_(-torch.eye(self.num_classes))
        for bandwidths in self.bandwidths:
            bandwidths.reset_parameters()  # type: ignore[operator]

    def check(self, logits: Tensor, image: Tensor, mask: Tensor | None = None) -> None:
        n, like = self.spatial_dims, self.weights
        _check.tensor("logits", logits)
        form = f"(..., {self.num_classes}, {', '.join('*' * n)})"
        if logits.dim() < 1 + n or logits.shape[-1 - n] != self.num_classes:
            raise ValueError(
                f"logits must have shape {form}, {self.num_classes} classes and {n} spatial dimensions, got "
                f"{tuple(logits.shape)}. Check num_classes and spatial_dims."
            )
        if logits.dtype != like.dtype and not _check.autocast(like.device):
            raise TypeError(f"logits is {logits.dtype} but the CRF is {like.dtype}. Convert one with .to(...).")
        if not isinstance(image, Tensor) or not (image.is_floating_point() or image.dtype == torch.uint8):
            got = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"image must be a floating point or uint8 tensor, got {got}. Convert it first.")
        batch, spatial = logits.shape[: -1 - n], logits.shape[-n:]
        if image.dim() != logits.dim() or image.shape[: -1 - n] != batch or image.shape[-n:] != spatial:
            raise ValueError(
                f"image must have the batch and the size of logits, {(*batch, 'C', *spatial)} with any number of "
                f"channels C, got {tuple(image.shape)}. Resize one of the two."
            )
        if image.shape[-1 - n] == 0:
            raise ValueError(f"image has no channels, its shape is {tuple(image.shape)}.")
        for name, value in (("logits", logits), ("image", image)):
            if value.device != like.device:
                raise ValueError(
                    f"{name} is on {value.device} but the CRF is on {like.device}. Move one with .to(...)."
                )
            if value.is_floating_point():
                _check.finite(name, value)
        if mask is not None:
            _check_mask(mask, (*batch, *spatial), n)
        _warn_of_range(image, self.kernels)

    def prepare(self, logits: Tensor, image: Tensor, mask: Tensor | None = None) -> _Prepared:
        n, like = self.spatial_dims, self.weights
        with _check.full_precision(like.device):
            unary = logits.movedim(-1 - n, -1).to(like.dtype).contiguous()
            pixels = image.movedim(-1 - n, -1).to(like.dtype)
            pixels = pixels.reshape(-1, *pixels.shape[-1 - n :])
            padding = None if mask is None else mask.reshape(-1, *mask.shape[mask.dim() - n :])
            plans = []
            for kernel, bandwidths in zip(self.kernels, self.bandwidths, strict=True):
                features = kernel.features(pixels, bandwidths())
                plan = kernel.filter.prepare(features, padding)
                ones = features.new_ones(features.shape[:-1]).unsqueeze(-1)
                plans.append(kernel.normalization.apply(plan, ones, padding))
            return _Prepared(unary, tuple(plans), self._weights())

    def _weights(self) -> Tensor:
        """What the messages are multiplied by from the right, with the sign of a benefit: -(mu W_m)^T."""
        if self.compatibility is None:
            return self.weights.mT if self.weights.dim() == 3 else self.weights
        benefit = -self.compatibility
        if self.weights.dim() == 3:
            return (benefit @ self.weights).mT
        columns = self.weights.unsqueeze(-1) if self.weights.dim() == 2 else self.weights[:, None, None]
        return columns * benefit.mT

    def init(self, context: _Prepared) -> Tensor:
        return context.unary

    def forward(self, logits: Tensor, context: _Prepared) -> Tensor:
        unary, plans, weights = context
        n = self.spatial_dims
        with _check.full_precision(unary.device):
            q = torch.softmax(logits, dim=-1)
            q = q.reshape(-1, *q.shape[-1 - n :])
            total = unary.reshape(-1, self.num_classes)
            for m, (plan, weight) in enumerate(zip(plans, weights.unbind(), strict=True)):
                message = plan(q).reshape(total.shape)
                # Without a graph the sum, from the second message on, may be overwritten: fresh memory takes time.
                out = total if m > 0 and not torch.is_grad_enabled() else None
                add = torch.addmm if weight.dim() == 2 else torch.addcmul
                total = add(total, message, weight, out=out)
            out = total.reshape(unary.shape)
            return torch.lerp(out, logits, self.damping) if self.damping else out

    def readout(self, logits: Tensor) -> Tensor:
        return logits.movedim(-1, -1 - self.spatial_dims)

    def extra_repr(self) -> str:
        kernels = ", ".join(map(repr, self.kernels))
        return f"num_classes={self.num_classes}, kernels=({kernels}), damping={self.damping:g}"


class CRFasRNN(Unroll):
    r"""$u_{k+1} = U - \sum_m \mu\, W_m \tilde K_m\, \mathrm{softmax}(u_k)$, from $u_0 = U$: a dense CRF as a layer.

    Sharpens the logits of a segmentation network: pixels that are near and alike are drawn to the same class. Every
    pixel is tied to every other one, through Gaussian kernels of their positions and colours. Untrained it is
    mean-field inference as pydensecrf does it, with the defaults of CRF-RNN. Trained, end to end with the network
    below it, it learns the weights and the compatibilities of the classes.

    Images of a batch do not influence each other. Under autocast it computes in its own precision all the same.

    Args:
        num_classes: L.
        kernels: what ties pixels together, such as `Bilateral(theta_alpha=80, theta_beta=13, weight=10)`.
        num_iters: number of iterations K; the authors train with 5 and test with 10: pass `num_iters=10` in the call.
        weights: of the messages, `Weights.SCALAR`, `Weights.PER_CLASS` or `Weights.MATRIX`.
        compatibility: `Compatibility.POTTS`, or `Compatibility.LEARNED` for a matrix that starts as Potts'.
        damping: how much of the last iterate stays, at least 0 and less than 1; the fixed points are the same.
        spatial_dims: 1 for sequences, 2 for images, 3 for volumes.
        tied: one step for all iterations, or one each (which also builds the filters K times).
        gradient: how gradients flow through the iterations, see `unrolled.gradient`.
        stop: when a sample stops before the last iteration, see `unrolled.Tolerance`.
        device, dtype: of the parameters.

    Shape:
        - logits: (..., L, *spatial), the dtype and device of the parameters
        - image: (..., C, *spatial), floating point or uint8, in 0..255 (or see `Bilateral`'s `color_range`)
        - mask: (..., *spatial), bool, False where a pixel is padding
        - output: (..., L, *spatial), logits, not normalised

    Raises:
        TypeError: dtypes that do not fit, options that are no objects of the kinds above.
        ValueError: sizes that do not fit, NaN, bandwidths that are not positive, features too large for the lattice.
        RuntimeError: an image that requires a gradient with a filter that has none to give.

    Example:
        >>> crf = CRFasRNN(num_classes=4)
        >>> image = 255 * torch.rand(2, 3, 16, 24)
        >>> crf(torch.randn(2, 4, 16, 24), image).shape
        torch.Size([2, 4, 16, 24])

    Reference:
        S. Zheng, S. Jayasumana, B. Romera-Paredes, V. Vineet, Z. Su, D. Du, C. Huang and P. H. S. Torr, "Conditional
        Random Fields as Recurrent Neural Networks", ICCV 2015.
    """

    def __init__(
        self,
        num_classes: int,
        kernels: Sequence[Kernel] = (Bilateral(), Spatial()),
        num_iters: int = 5,
        *,
        weights: Weights = Weights.MATRIX,
        compatibility: Compatibility = Compatibility.POTTS,
        damping: float = 0.0,
        spatial_dims: int = 2,
        tied: bool | Sequence[str] = True,
        gradient: Gradient = Backprop(),
        stop: Stopping | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        step = CRFStep(
            num_classes,
            kernels,
            weights=weights,
            compatibility=compatibility,
            damping=damping,
            spatial_dims=spatial_dims,
            device=device,
            dtype=dtype,
        )
        super().__init__(step, num_iters, tied=tied, gradient=gradient, stop=stop)

    def forward(  # type: ignore[override]  # each system says what it takes
        self,
        logits: Tensor,
        image: Tensor,
        mask: Tensor | None = None,
        *,
        state: State | None = None,
        num_iters: int | None = None,
    ) -> Tensor:
        return super().forward(logits, image, mask, state=state, num_iters=num_iters)


class _Bandwidths(nn.Module):
    """The bandwidths of a kernel, positive whatever is learned: the logarithms are parameters, or buffers if fixed."""

    def __init__(self, kernel: Kernel, like: Tensor) -> None:
        super().__init__()
        self.kernel = kernel
        for name, value in kernel.bandwidths().items():
            log_theta = like.new_empty((len(value),) if isinstance(value, Sequence) else ())
            if kernel.learn:
                self.register_parameter(f"log_{name}", nn.Parameter(log_theta))
            else:
                self.register_buffer(name, log_theta)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name, value in self.kernel.bandwidths().items():
            if self.kernel.learn:
                mine: Tensor = getattr(self, f"log_{name}")
                mine.copy_(mine.new_tensor(value).log())
            else:
                getattr(self, name).copy_(getattr(self, name).new_tensor(value))

    def forward(self) -> Mapping[str, Tensor]:
        learn = self.kernel.learn
        return {name: getattr(self, f"log_{name}").exp() if learn else getattr(self, name) for name in self.names()}

    def names(self) -> list[str]:
        return list(self.kernel.bandwidths())


def _kernels(kernels: Sequence[Kernel], num_classes: int) -> tuple[Kernel, ...]:
    if not isinstance(kernels, Sequence) or not all(isinstance(kernel, Kernel) for kernel in kernels):
        raise TypeError(f"kernels must be a sequence of kernels such as (Bilateral(), Spatial()), got {kernels!r}.")
    if not kernels:
        raise ValueError("kernels is empty: a CRF without any changes nothing. Pass at least one, such as Spatial().")
    for kernel in kernels:
        if isinstance(kernel.weight, Sequence) and len(kernel.weight) != num_classes:
            raise ValueError(f"weight has {len(kernel.weight)} entries for {num_classes} classes, of {kernel!r}.")
    return tuple(kernels)


def _check_mask(mask: Tensor, shape: tuple[int, ...], spatial_dims: int) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, False where a pixel is padding, got {got}.")
    if mask.shape != shape:
        raise ValueError(f"mask must have shape {shape}, that of logits without the classes, got {tuple(mask.shape)}.")
    if _check.can_look_at(mask) and not bool(mask.flatten(-spatial_dims).any(-1).all()):
        raise ValueError("mask is False everywhere in some image. Leave that image out.")


def _warn_of_range(image: Tensor, kernels: tuple[Kernel, ...]) -> None:
    """Images in 0..1 taken for images in 0..255 make every pixel look like every other one."""
    if not image.is_floating_point() or not _check.can_look_at(image):
        return
    if any(isinstance(kernel, Bilateral) and kernel.color_range == 255 for kernel in kernels):
        low, high = torch.aminmax(image.detach())
        if low >= 0 and 0 < high <= 1 and bool((image != image.round()).any()):
            warnings.warn(
                "The image lies in 0..1, but color_range is 255: all its colours are within a third of theta_beta's "
                "usual 3 levels. Pass Bilateral(color_range=1), or the image times 255.",
                stacklevel=2,
            )
