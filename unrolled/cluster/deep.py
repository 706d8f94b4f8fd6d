"""`DeepKMeans`: an encoder, a decoder, and k-means between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unrolled import _check
from unrolled.cluster.deep_losses import Attraction, ClusteringLoss
from unrolled.cluster.kmeans import Clusters, KMeansHead
from unrolled.solvers.kmeans import kmeans_objective, kmeans_plus_plus, lloyd, unit


class DeepKMeans(nn.Module):
    r"""$L = \sum_i \|x_i - g(h_i)\|^2 + \lambda \sum_i \min_j \|h_i - c_j\|^2$ with codes $h = f(x) / \|f(x)\|$.

    Any encoder $f$, any decoder $g$, and a `KMeansHead` on the codes. The reconstruction keeps the codes apart, which
    clustering alone would all send to a few points; the clustering draws those of a cluster together. Train it by
    `unrolled.training.fit_deep_kmeans`. It also fits into a loop of your own: `reconstruction_error` and
    `clustering_error` are the two terms.

    With a Euclidean head (`spherical=False`) codes are not divided by their norms.

    Args:
        encoder: a module from samples (n, ...) to codes (n, d). End it in a linear layer, so that no code is 0.
        decoder: a module from codes (n, d) to samples (n, ...), or `None`: then there is no reconstruction, and
            nothing that keeps the codes apart. It suits an encoder that is trained already, and frozen.
        head: the clusters; d is its `in_features`.

    Shape:
        - x: (n, ...), whatever the encoder takes
        - output: `Clusters`: assignments (n, k), distances (n, k), which are squared

    Raises:
        TypeError: a part that is no module, or a head that is no `KMeansHead`.
        ValueError: codes of another length than the head takes, codes that are not finite, or on the sphere are 0.

    Example:
        >>> encoder, decoder = fully_connected_coders(64, 10, hidden=(32,))
        >>> model = DeepKMeans(encoder, decoder, KMeansHead(10, num_clusters=3))
        >>> x = torch.rand(20, 64)
        >>> model.start_centres(x, generator=torch.Generator().manual_seed(0))
        >>> model(x).assignments.sum(1).unique()
        tensor([1.])

    Reference:
        X. Peng, Y. Li, I. W. Tsang, H. Zhu, J. Lv and J. T. Zhou, "XAI Beyond Classification: Interpretable Neural
        Clustering", Journal of Machine Learning Research 23, 2022, equation 15.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module | None, head: KMeansHead) -> None:
        super().__init__()
        for name, part in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(part, nn.Module) and not (name == "decoder" and part is None):
                raise TypeError(f"{name} must be a torch.nn.Module, got {part!r}.")
        if not isinstance(head, KMeansHead):
            raise TypeError(f"head must be a KMeansHead, such as KMeansHead(10, num_clusters=10), got {head!r}.")
        self.encoder = encoder
        self.decoder = decoder
        self.head = head

    def encode(self, x: Tensor) -> Tensor:
        """The codes as they are clustered and decoded, (n, d): on the sphere of norm 1.

        Args:
            x: samples, (n, ...).
        """
        codes = self.encoder(x)
        d = self.head.in_features
        if not isinstance(codes, Tensor) or codes.dim() != 2 or codes.shape[1] != d:
            raise ValueError(
                f"encoder must return codes of shape (n, {d}) to fit the head, got {_check.shape_of(codes)}."
            )
        if _check.autocast(codes.device):
            codes = codes.to(self.head.centres.dtype)
        if not self.head.spherical:
            return codes
        if _check.can_look_at(codes) and not bool(codes.detach().any(1).all()):
            count = int((~codes.detach().any(1)).sum())
            raise ValueError(
                f"encoder gave {count} codes of {len(codes)} that are zero, which have no direction. End it in a "
                "linear layer, not in a ReLU, or take KMeansHead(..., spherical=False)."
            )
        return unit(codes)

    def forward(self, x: Tensor) -> Clusters:
        clusters: Clusters = self.head(self.encode(x))
        return clusters

    def predict(self, x: Tensor) -> Tensor:
        """The cluster of each sample, (n,).

        Args:
            x: samples, (n, ...).
        """
        return self.head.predict(self.encode(x))

    def prototypes(self) -> Tensor:
        """The centres, decoded, (k, ...): what a typical sample of each cluster looks like."""
        return self._decoder()(self.head.positions)

    def reconstruction_error(self, codes: Tensor, target: Tensor) -> Tensor:
        r"""$\|x_i - g(h_i)\|^2$ for every sample, (n,).

        Args:
            codes: $h$, (n, d), from `encode`.
            target: $x$, (n, ...).
        """
        decoded = self._decoder()(codes)
        if decoded.shape != target.shape:
            raise ValueError(
                f"decoder gave shape {tuple(decoded.shape)} for samples of shape {tuple(target.shape)}. They must be "
                "equal; nn.Unflatten at its end gives vectors the shape of images."
            )
        return (decoded - target).square().flatten(1).sum(1)

    def clustering_error(
        self, codes: Tensor, assignments: Tensor | None = None, loss: ClusteringLoss = Attraction()
    ) -> Tensor:
        r"""$\sum_j P_{ij}\|h_i - c_j\|^2$ for every sample, (n,), or another loss.

        Args:
            codes: $h$, (n, d), from `encode`.
            assignments: $P$, (n, k), from elsewhere, such as from the same images before they were augmented; where not
                given, the head's own, as constants.
            loss: `Attraction()`, `LogLikelihood()`, or a function of squared distances and assignments.
        """
        clusters = self.head(codes)
        parts = clusters.assignments.detach() if assignments is None else assignments
        return loss(clusters.distances, parts)

    @torch.no_grad()
    def start_centres(
        self, x: Tensor, *, restarts: int = 10, num_iters: int = 100, generator: torch.Generator | None = None
    ) -> None:
        """The centres of k-means on the codes: the best, by the objective, of several runs from k-means++.

        Args:
            x: samples, (n, ...) with n at least k.
            restarts: runs of k-means.
            num_iters: iterations of each, at most.
            generator: of the random numbers.
        """
        self.start_centres_of_codes(self.encode(x), restarts=restarts, num_iters=num_iters, generator=generator)

    @torch.no_grad()
    def start_centres_of_codes(
        self, codes: Tensor, *, restarts: int = 10, num_iters: int = 100, generator: torch.Generator | None = None
    ) -> None:
        """As `start_centres`, for codes (n, d) that are computed already.

        Args:
            codes: from `encode`, in as many batches as needed.
            restarts, num_iters, generator: as for `start_centres`.
        """
        k, spherical = self.head.num_clusters, self.head.spherical
        if k > len(codes):
            raise ValueError(f"x has {len(codes)} samples for {k} clusters. Pass at least as many samples as clusters.")
        best = None
        for _ in range(_check.integer("restarts", restarts)):
            start = kmeans_plus_plus(codes, k, spherical=spherical, generator=generator)
            centres = lloyd(codes, start, spherical=spherical, num_iters=num_iters)
            objective = kmeans_objective(codes, centres, spherical=spherical)
            if best is None or bool(objective < best[0]):
                best = objective, centres
        assert best is not None  # restarts is at least 1
        self.head.centres.copy_(best[1])

    def _decoder(self) -> nn.Module:
        if self.decoder is None:
            raise ValueError("there is no decoder: this DeepKMeans was made with decoder=None.")
        return self.decoder
