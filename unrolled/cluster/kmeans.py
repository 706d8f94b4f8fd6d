"""`KMeansHead`: k-means as a layer, whose weights are the centres."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from unrolled import _check
from unrolled.cluster._geometry import assignments, euclidean_move, one_hot, spherical_move, unit
from unrolled.cluster.starts import KMeansPlusPlus, Start
from unrolled.solvers.kmeans import draw


class Clusters(NamedTuple):
    """How samples belong to clusters, and how far they are from the centres."""

    assignments: Tensor  # (..., k), sum to 1
    distances: Tensor  # (..., k), squared, at least 0


class KMeansHead(nn.Module):
    r"""$z = W x + b - \|x\|^2$ with $W = 2C$, $b_j = -\|c_j\|^2$: logits that are $-\|x - c_j\|^2$ exactly.

    k-means as the last layer of a network. Its one parameter are the centres; weight and bias are tied to them. The
    assignments are $\mathrm{softmax}(z / \tau)$, for $\tau = 0$ the one-hot of the nearest centre, and the loss
    $\sum_j P_{ij} \|x_i - c_j\|^2$ trains centres and encoder by gradients, as any layer.

    On the sphere (`spherical`) samples and centres are divided by their norms first, so that
    $\|x - c\|^2 = 2 - 2\cos(x, c)$, whatever an optimiser makes of the norms. There $b$ is constant and the trivial
    minimum, an encoder that sends everything to 0, does not exist: take it wherever the encoder learns too.

    Centres come from data, by `reset_centres`; before that they are random directions, at which clusters would stay
    empty. Keep them alive by `revive`. Move them by an optimiser, or without one by `spherical_step` or
    `euclidean_step`, which need no learning rate tuned to the data.

    Args:
        in_features: d, the length of a sample.
        num_clusters: k.
        spherical: whether samples and centres count by their directions alone.
        temperature: $\tau$, at least 0, in the units of the squared distances (on the sphere these are at most 4); an
            attribute that may be set at any time, see `AnnealTemperature`.
        init: how `reset_centres` chooses, `KMeansPlusPlus()` or `DataPoints()`.
        device, dtype: of the centres.

    Attributes:
        centres: the parameter, (k, d). On the sphere only the directions of its rows count.

    Shape:
        - x: (..., d), the dtype and device of the centres
        - output: `Clusters`: assignments (..., k), distances (..., k), which are squared

    Raises:
        TypeError: `init` is no object that chooses centres, `x` is no tensor of the right dtype.
        ValueError: a number out of range, a shape or device that does not fit, NaN, on the sphere a sample of zeros
            (where looking is free: not on an accelerator, where its direction counts as 0).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 3.0]])
        >>> head = KMeansHead(2, num_clusters=2)
        >>> head.reset_centres(x, generator=torch.Generator().manual_seed(0))
        >>> labels = head.predict(x)
        >>> bool(labels[0] == labels[1] != labels[2])
        True
        >>> cosines = torch.nn.functional.normalize(x) @ head.positions.mT
        >>> torch.allclose(-head.logits(x), 2 - 2 * cosines, atol=1e-5)
        True

    Reference:
        X. Peng, Y. Li, I. W. Tsang, H. Zhu, J. Lv and J. T. Zhou, "XAI Beyond Classification: Interpretable Neural
        Clustering", Journal of Machine Learning Research 23, 2022, equations 5 to 9.
    """

    def __init__(
        self,
        in_features: int,
        num_clusters: int,
        *,
        spherical: bool = True,
        temperature: float = 0.0,
        init: Start = KMeansPlusPlus(),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = _check.integer("in_features", in_features)
        self.num_clusters = _check.integer("num_clusters", num_clusters)
        self.spherical = bool(spherical)
        self.temperature = temperature
        self.init = _start(init)
        self.centres = nn.Parameter(torch.empty(self.num_clusters, self.in_features, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def temperature(self) -> float:
        """$\\tau$ of the assignments; 0 is the hard limit."""
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self._temperature = _temperature(temperature)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random directions, until there are data for `reset_centres`."""
        self.centres.copy_(unit(torch.randn_like(self.centres)))

    @torch.no_grad()
    def reset_centres(
        self,
        x: Tensor,
        *,
        init: Start | None = None,
        sample_weight: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Centres from data: some of the samples, chosen by `init`.

        Where there are fewer distinct samples than clusters, every distinct sample gets a centre (by k-means++) and the
        surplus centres are copies, to which no sample is assigned.

        Args:
            x: (n, d) with n at least k: the data, their codes, or a part drawn at random.
            init: another way to choose than the head's own.
            sample_weight: (n,), at least 0.
            generator: of the random numbers; one on the CPU gives the same centres on every device.
        """
        x = self._samples(x, self.num_clusters)
        init = self.init if init is None else _start(init)
        weights = self._weights(sample_weight, x)
        self.centres.copy_(init(x, self.num_clusters, weights=weights, generator=generator))

    # ---- The layer ---------------------------------------------------------------------------------------------------

    @property
    def positions(self) -> Tensor:
        """The centres as they count, (k, d): on the sphere divided by their norms."""
        return unit(self.centres) if self.spherical else self.centres

    @property
    def weight(self) -> Tensor:
        """$W = 2C$, (k, d): with `bias` an ordinary linear classifier of the clusters."""
        return 2 * self.positions

    @property
    def bias(self) -> Tensor:
        r"""$b_j = -\|c_j\|^2$, (k,)."""
        return -self.positions.square().sum(-1)

    def logits(self, x: Tensor) -> Tensor:
        r"""$W x + b - \|x\|^2 = -\|x - c_j\|^2$, up to rounding, (..., k).

        Args:
            x: (..., d).
        """
        return self._logits(self._inputs(x))

    def forward(self, x: Tensor) -> Clusters:
        logits = self.logits(x)
        return Clusters(assignments(logits, self.temperature), (-logits).relu())

    def predict(self, x: Tensor) -> Tensor:
        """The nearest centre of each sample, (...); the first where two are as near.

        Args:
            x: (..., d).
        """
        return self.logits(x).argmax(-1)

    def loss(self, x: Tensor, *, detach: bool = True, sample_weight: Tensor | None = None) -> Tensor:
        r"""$\frac1{\sum_i w_i} \sum_i w_i \sum_j P_{ij} \|x_i - c_j\|^2$: the mean squared distance to the centres, ().

        With temperature 0 it is the k-means objective, the published loss. At a positive temperature, $P$ is a constant
        by default (`detach`), so that it weighs the gradient and passes none itself. Taken from high to low
        temperatures (`AnnealTemperature`), this hardly depends on where the centres began. With `detach=False` the
        gradient goes through the softmax too: the relaxed loss of the publication, which is the worse in practice.

        Args:
            x: (..., d), codes of an encoder that learns from this loss, or data.
            detach: whether the assignments are constants.
            sample_weight: $w_i$, (...), at least 0; 1 where not given.
        """
        parts, distances = self(x)
        each = ((parts.detach() if detach else parts) * distances).sum(-1)
        if sample_weight is None:
            return each.mean()
        weights = self._weights(sample_weight, each.unsqueeze(-1))
        return weights.flatten() @ each.flatten() / weights.sum()

    # ---- Moves without an optimiser ----------------------------------------------------------------------------------

    @torch.no_grad()
    def spherical_step(
        self,
        x: Tensor,
        step_size: float = 0.1,
        *,
        sample_weight: Tensor | None = None,
    ) -> None:
        r"""$c_j \leftarrow u(c_j + s\, u(\sum_i P_{ij} x_i))$ with $u(v) = v / \|v\|$: the published step.

        Gradient descent on the loss, with a gradient scaled to the length $s$: fast, and the same whatever the number
        of samples. For $s \to \infty$ and temperature 0 it is an iteration of spherical k-means. A centre without
        samples stays where it is. Let the step fall to 0: a fixed one ends in a ball around the optimum.

        Args:
            x: a batch, (..., d).
            step_size: $s$, positive; 0.1 in the publication.
            sample_weight: (...), at least 0; 1 where not given.
        """
        if not self.spherical:
            raise ValueError("spherical_step needs spherical=True; a Euclidean head has euclidean_step.")
        step_size = _check.real("step_size", step_size, above=0.0)
        sums, _ = self._sums(x, sample_weight)
        self.centres.copy_(spherical_move(unit(self.centres), sums, step_size))

    @torch.no_grad()
    def euclidean_step(self, x: Tensor, step_size: float = 1.0, *, sample_weight: Tensor | None = None) -> None:
        r"""$c_j \leftarrow c_j + s\,(\bar x_j - c_j)$ with the mean $\bar x_j = \sum_i P_{ij} x_i / \sum_i P_{ij}$.

        Gradient descent on the summed loss with the step $s / (2 n_j)$, $n_j$ the samples of a centre. For $s = 1$,
        temperature 0 and all the data it is an iteration of Lloyd's algorithm. A centre without samples stays where it
        is.

        Args:
            x: a batch, (..., d).
            step_size: $s$, positive.
            sample_weight: (...), at least 0; 1 where not given.
        """
        if self.spherical:
            raise ValueError("euclidean_step needs spherical=False; a spherical head has spherical_step.")
        step_size = _check.real("step_size", step_size, above=0.0)
        self.centres.copy_(euclidean_move(self.centres, *self._sums(x, sample_weight), step_size))

    @torch.no_grad()
    def revive(
        self,
        x: Tensor,
        *,
        min_share: float = 0.001,
        sample_weight: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Send every centre with less than `min_share` of the samples to a sample; returns which, (k,) bool.

        The samples are drawn in proportion to the squared distance to their nearest centre, one after another, as in
        k-means++: so a revived centre has at least one sample. Once every sample is at a centre there is nowhere left
        to go, and surplus centres stay.

        Args:
            x: (n, d), all the data or a large part.
            min_share: share of the samples, from 0 to 1, in any case no more than half of an even share; at 0 only
                centres without any sample are sent.
            sample_weight: (n,), at least 0; 1 where not given.
            generator: of the random numbers.
        """
        if _check.real("min_share", min_share, minimum=0.0) > 1:
            raise ValueError(f"min_share must be at most 1, got {min_share}. It is a share of the samples.")
        x = self._samples(x, 1)
        logits = self._logits(x)
        weights = self._weights(sample_weight, x)
        sizes = weights @ one_hot(logits.argmax(-1), self.num_clusters, x.dtype)
        dead = (sizes == 0) | (sizes < min(min_share, 0.5 / self.num_clusters) * weights.sum())
        places, moved = revived(self.positions, dead, x, weights, generator)
        self.centres.copy_(places)
        return moved

    # ---- Parts -------------------------------------------------------------------------------------------------------

    def _logits(self, x: Tensor) -> Tensor:
        """Of samples that `_inputs` let in."""
        with _check.full_precision(x.device):  # differences of squares: not in half precision
            return linear(x, self.weight, self.bias) - x.square().sum(-1, keepdim=True)

    def _inputs(self, x: Tensor) -> Tensor:
        """x checked, in the dtype of the centres, and on the sphere with norm 1."""
        if isinstance(x, Tensor) and _check.autocast(x.device):
            x = x.to(self.centres.dtype)
        _check.signals("x", x, self.centres, self.in_features, of="the head")
        if not self.spherical:
            return x
        if _check.can_look_at(x) and not bool(x.any(-1).all()):
            zero = int((~x.any(-1)).sum())
            raise ValueError(
                f"x has {zero} samples that are zero, which have no direction. Remove them, or take spherical=False."
            )
        return unit(x)

    def _samples(self, x: Tensor, least: int) -> Tensor:
        """x checked as a matrix (n, d) of at least so many samples."""
        x = self._inputs(x)
        if x.dim() != 2:
            raise ValueError(f"x must have shape (n, {self.in_features}), got {tuple(x.shape)}.")
        if len(x) < least:
            raise ValueError(f"x has {len(x)} samples for {least} clusters. Pass at least as many samples as clusters.")
        return x

    def _weights(self, sample_weight: Tensor | None, x: Tensor) -> Tensor:  # (...) for x (..., d)
        if sample_weight is None:
            return x.new_ones(x.shape[:-1])
        weights = _check.finite("sample_weight", _check.tensor("sample_weight", sample_weight)).to(x)
        if weights.shape != x.shape[:-1]:
            raise ValueError(f"sample_weight must have shape {tuple(x.shape[:-1])}, got {tuple(weights.shape)}.")
        if _check.can_look_at(weights) and bool((weights < 0).any()):
            raise ValueError(f"sample_weight must be at least 0, got {weights.min().item():g}.")
        if _check.can_look_at(weights) and not bool(weights.any()):
            raise ValueError("sample_weight is zero everywhere: at least one sample must count.")
        return weights

    def _sums(self, x: Tensor, sample_weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """For every centre the sum of its samples (k, d) and their number (k,), both weighted by the assignments."""
        x = self._inputs(x)
        parts = assignments(self._logits(x), self.temperature)
        if sample_weight is not None:
            parts = parts * self._weights(sample_weight, x).unsqueeze(-1)
        parts = parts.reshape(-1, self.num_clusters)
        with _check.full_precision(x.device):
            return parts.mT @ x.reshape(-1, self.in_features), parts.sum(0)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_clusters={self.num_clusters}, spherical={self.spherical}, "
            f"temperature={self.temperature:g}, init={self.init}"
        )


def revived(
    centres: Tensor,  # (k, d)
    dead: Tensor,  # (k,)
    x: Tensor,  # (n, d)
    weights: Tensor,  # (n,)
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """The centres with the dead ones at samples far from the others, and which of them moved."""
    centres, moved = centres.clone(), torch.zeros_like(dead)
    if not bool(dead.any()):
        return centres, moved
    distances = torch.full_like(weights, torch.inf)
    if not bool(dead.all()):
        # By differences, so that the distance of a copy is exactly 0.
        distances = torch.cdist(x, centres[~dead], compute_mode="donot_use_mm_for_euclid_dist").amin(1).square()
    # Nearer than this, logits cannot tell a sample from a centre.
    noise = 16 * torch.finfo(x.dtype).eps * x.square().sum(1)
    for j in dead.nonzero().flatten().tolist():
        chances = torch.where(distances.isinf(), 1.0, torch.where(distances > noise, distances, 0.0)) * weights
        if not bool((chances > 0).any()):
            break
        centres[j] = x[int(draw(chances, 1, generator))]
        moved[j] = True
        distances = torch.minimum(distances, (x - centres[j]).square().sum(1))
    return centres, moved


def _start(init: Start) -> Start:
    if isinstance(init, type) or not callable(init):
        raise TypeError(f"init must be an object that chooses centres, such as KMeansPlusPlus(), got {init!r}.")
    return init


def _temperature(value: float) -> float:
    return _check.real("temperature", value, minimum=0.0, hint="0 assigns each sample to its nearest centre.")
