"""Diffusion from seeds over an image, with learned weights and guidance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled.image.elliptic import DENSE_NODES, grid_edges, solve_elliptic
from unrolled.image.seeds import greedy_seeds


class SeededDiffusion(nn.Module):
    r"""$\min_f \sum_{p \sim q} w_{pq} (f_p - f_q)^2 + \lambda \sum_p (f_p - g_p)^2$ where $f = 1$ at the seeds.

    A linear elliptic system on the pixels of an image. Its solution spreads from the seeds to what looks alike: the
    weight of two neighbours is $w_{pq} = \exp(-\sum_c (x_{pc} - x_{qc})^2 / 2\kappa_c^2)$. The guidance $g$ pulls,
    where no seed is near; it is a mixture of the guides that come in, maps of what is known beforehand. What is learned
    are the contrasts $\kappa_c$, the absorption $\lambda$ and the mixture; all stay positive by construction, and the
    mixture sums to 1. Images may be feature maps of another network, which then learns, too.

    Nothing is unrolled here: the system is solved exactly, dense for small images and by SciPy's sparse LU for large
    ones, and the gradient comes from a second solve. Before training the module is `solvers.seeded_diffusion`. No value
    of the result is outside the range of guides and seeds.

    Args:
        num_features: channels C of the images.
        num_guides: maps G that the guidance is mixed from.
        contrast: all $\kappa_c$ to begin with, in grey levels of 0..255.
        absorption: $\lambda$ to begin with, positive. What a seed says fades over about $\sqrt{w/\lambda}$ pixels.
        data_range: images are in [0, `data_range`].
        dense_nodes: up to so many pixels a dense solver is taken.
        device, dtype: of the parameters.

    Shape:
        - image: (..., C, height, width), the dtype and device of the parameters
        - guides: (..., G, height, width), the same
        - seeds: (..., height, width), bool
        - output: (..., height, width)

    Raises:
        TypeError: an image or guides that are no floating point tensors or not of the module's dtype, seeds that are
            not bool.
        ValueError: shapes that do not fit each other, NaN or infinity, a number that is not positive.

    Example:
        >>> net = SeededDiffusion(num_features=3)
        >>> image, guides = torch.rand(2, 3, 12, 16), torch.rand(2, 1, 12, 16)
        >>> seeds = net.choose_seeds(image, guides, num_seeds=2)
        >>> net(image, guides, seeds).shape, seeds.sum()
        (torch.Size([2, 12, 16]), tensor(4))

    Reference:
        R. Liu, G. Zhong, J. Cao, Z. Lin, S. Shan and Z. Luo, "Learning to Diffuse: A New Perspective to Design PDEs for
        Visual Analysis", IEEE TPAMI 2016.
    """

    def __init__(
        self,
        num_features: int = 3,
        num_guides: int = 1,
        *,
        contrast: float = 10.0,
        absorption: float = 0.01,
        data_range: float = 1.0,
        dense_nodes: int = DENSE_NODES,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = _check.integer("num_features", num_features)
        self.num_guides = _check.integer("num_guides", num_guides)
        self.first_contrast = _check.real("contrast", contrast, above=0.0, hint="It is in grey levels of 0..255.")
        self.first_absorption = _check.real("absorption", absorption, above=0.0)
        self.data_range = _check.real("data_range", data_range, above=0.0)
        self.dense_nodes = _check.integer("dense_nodes", dense_nodes, minimum=0)
        self.log_contrast = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.log_absorption = nn.Parameter(self.log_contrast.new_empty(()))
        self.logits = nn.Parameter(self.log_contrast.new_empty(num_guides))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the given contrast and absorption, and to the mean of the guides."""
        self.log_contrast.fill_(self.first_contrast).log_()
        self.log_absorption.fill_(self.first_absorption).log_()
        self.logits.zero_()

    @property
    def contrast(self) -> Tensor:
        """(C,), in grey levels, positive."""
        return self.log_contrast.exp()

    @property
    def absorption(self) -> Tensor:
        """(), positive."""
        return self.log_absorption.exp()

    @property
    def mixture(self) -> Tensor:
        """(G,), positive, with sum 1."""
        return self.logits.softmax(0)

    def forward(self, image: Tensor, guides: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Diffuse; without seeds from the guidance alone.

        Args:
            image: decides what is alike.
            guides: what the guidance is mixed from; 1 is as bright as a seed.
            seeds: True where the result is 1.
        """
        self._check(image, guides, seeds)
        edges, weights, absorption, guidance = self._system(image, guides)
        if seeds is not None:
            seeds = seeds.reshape(guidance.shape)
        f = solve_elliptic(edges, weights, absorption, guidance, seeds, dense_nodes=self.dense_nodes)
        return f.reshape(*image.shape[:-3], *image.shape[-2:])

    @torch.no_grad()
    def choose_seeds(self, image: Tensor, guides: Tensor, num_seeds: int, *, spacing: int = 1) -> Tensor:
        r"""The seeds that light up most of what the guidance believes in, chosen greedily, see `greedy_seeds`.

        They maximise $\sum_p (g_p - \bar g)_+ f_p(S)$: only pixels where the guidance is above its mean count, so
        that no seed goes where it is dark.

        Args:
            image, guides: as in a call; the guides in [0, 1].
            num_seeds: for each image.
            spacing: seeds lie on every so manyth row and column, beginning with half as many.

        Returns:
            Seeds, (..., height, width), bool.
        """
        self._check(image, guides, None)
        height, width = image.shape[-2:]
        start = _check.integer("spacing", spacing) // 2
        number = torch.arange(height * width).reshape(height, width)
        candidates = number[start::spacing, start::spacing].flatten()
        edges, weights, absorption, guidance = self._system(image, guides)
        seeds = torch.zeros_like(guidance, dtype=torch.bool)
        for i in range(len(guidance)):
            found = greedy_seeds(
                edges,
                weights[i],
                absorption[i],
                guidance[i],
                num_seeds=num_seeds,
                value=(guidance[i] - guidance[i].mean()).clamp(min=0),
                candidates=candidates,
                dense_nodes=self.dense_nodes,
            )
            seeds[i, found.nodes] = True
        return seeds.reshape(*image.shape[:-3], height, width)

    def _system(self, image: Tensor, guides: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Edges (2, E), weights (B, E), absorption and guidance (B, N)."""
        height, width = image.shape[-2:]
        edges = grid_edges(height, width, image.device)
        features = image.reshape(-1, self.num_features, height * width) * (255 / self.data_range)
        features = features / self.contrast.unsqueeze(-1)
        weights = torch.exp(-(features[..., edges[0]] - features[..., edges[1]]).square().sum(1) / 2)
        guidance = self.mixture @ guides.reshape(-1, self.num_guides, height * width)
        return edges, weights, self.absorption.expand(guidance.shape), guidance

    def _check(self, image: Tensor, guides: Tensor, seeds: Tensor | None) -> None:
        like = self.log_contrast
        for name, value, channels in (("image", image, self.num_features), ("guides", guides, self.num_guides)):
            _check.tensor(name, value)
            if value.dim() < 3 or value.shape[-3] != channels:
                raise ValueError(f"{name} must have shape (..., {channels}, height, width), got {tuple(value.shape)}.")
            if value.dtype != like.dtype:
                raise TypeError(f"{name} is {value.dtype} but the module is {like.dtype}. Convert one with .to(...).")
            if value.device != like.device:
                raise ValueError(f"{name} is on {value.device} but the module is on {like.device}. Move one.")
            _check.finite(name, value)
        shape = (*image.shape[:-3], *image.shape[-2:])
        if guides.shape[:-3] + guides.shape[-2:] != shape:
            raise ValueError(
                f"guides must have the batch and the size of image, (*{tuple(image.shape[:-3])}, {self.num_guides}, "
                f"{image.shape[-2]}, {image.shape[-1]}), got {tuple(guides.shape)}."
            )
        if seeds is not None and (not isinstance(seeds, Tensor) or seeds.dtype != torch.bool):
            got = seeds.dtype if isinstance(seeds, Tensor) else type(seeds).__name__
            raise TypeError(f"seeds must be a bool tensor, True where the result is 1, got {got}.")
        if seeds is not None and (seeds.shape != shape or seeds.device != like.device):
            raise ValueError(
                f"seeds must have shape {shape} on {like.device}, got {tuple(seeds.shape)} {seeds.device}."
            )

    def extra_repr(self) -> str:
        return (
            f"num_features={self.num_features}, num_guides={self.num_guides}, data_range={self.data_range:g}, "
            f"dense_nodes={self.dense_nodes}"
        )
