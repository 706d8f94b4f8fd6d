"""Auto-encoders for deep clustering: the published fully connected and convolutional ones, in any size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from unrolled import _check


class Coders(NamedTuple):
    """An encoder and the decoder that undoes it."""

    encoder: nn.Module  # (n, *shape) -> (n, code_features)
    decoder: nn.Module  # (n, code_features) -> (n, *shape)


def fully_connected_coders(
    shape: int | Sequence[int], code_features: int = 10, *, hidden: Sequence[int] = (500, 500, 2000)
) -> Coders:
    r"""$f(x) = A_L\,\mathrm{ReLU}(A_{L-1} \cdots \mathrm{ReLU}(A_1 x))$ with affine maps $A$; and its mirror image.

    The published fully connected auto-encoder, for vectors or for images, which are flattened. Codes and
    reconstructions come out of a linear layer: both may have either sign.

    Args:
        shape: of a sample: a number of features, or (channels, height, width) or the like.
        code_features: length of a code.
        hidden: widths of the hidden layers of the encoder; the decoder has them in reverse. `()` leaves one linear
            layer each.

    Returns:
        `Coders`, the pair (encoder, decoder).

    Raises:
        TypeError, ValueError: a size that is no int of at least 1.

    Example:
        >>> encoder, decoder = fully_connected_coders(64, 10, hidden=(32,))
        >>> decoder(encoder(torch.rand(5, 64))).shape
        torch.Size([5, 64])

    Reference:
        The widths are those of J. Xie, R. Girshick and A. Farhadi, "Unsupervised Deep Embedding for Clustering
        Analysis", ICML 2016.
    """
    dims = _shape(shape)
    code_features = _check.integer("code_features", code_features)
    widths = [math.prod(dims), *(_check.integer(f"hidden[{i}]", width) for i, width in enumerate(hidden))]
    widths.append(code_features)
    encoder, decoder = _perceptron(widths), _perceptron(widths[::-1])
    return Coders(nn.Sequential(nn.Flatten(), *encoder), nn.Sequential(*decoder, nn.Unflatten(1, dims)))


def convolutional_coders(
    shape: Sequence[int],
    code_features: int = 10,
    *,
    channels: Sequence[int] = (16, 32, 32, 16),
    hidden: int = 256,
) -> Coders:
    r"""Convolutions 3 x 3, every second one of stride 2, then two linear layers; and its mirror image.

    The published convolutional auto-encoder. Each convolution is followed by batch normalisation and a ReLU, the first
    linear layer by a ReLU. The decoder ends in a sigmoid: pixels from 0 to 1.

    Batches in training must have at least two samples, for the normalisation.

    Args:
        shape: (channels, height, width) of an image.
        code_features: length of a code.
        channels: of the convolutions of the encoder, those at odd places (the second, the fourth) halve the image; the
            decoder has them in reverse.
        hidden: width of the linear layer between the convolutions and the code.

    Returns:
        `Coders`, the pair (encoder, decoder).

    Raises:
        TypeError, ValueError: a size that is no int of at least 1, or a shape that is not of an image.

    Example:
        >>> encoder, decoder = convolutional_coders((1, 28, 28))
        >>> encoder(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    Reference:
        X. Peng, Y. Li, I. W. Tsang, H. Zhu, J. Lv and J. T. Zhou, "XAI Beyond Classification: Interpretable Neural
        Clustering", Journal of Machine Learning Research 23, 2022.
    """
    dims = _shape(shape)
    if len(dims) != 3:
        raise ValueError(f"shape must be (channels, height, width), got {dims}. For vectors: fully_connected_coders.")
    code_features = _check.integer("code_features", code_features)
    hidden = _check.integer("hidden", hidden)
    widths = [dims[0], *(_check.integer(f"channels[{i}]", count) for i, count in enumerate(channels))]
    encoder: list[nn.Module] = []
    decoder: list[nn.Module] = []  # back to front
    size = dims[1:]
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        stride = 1 + i % 2
        encoder += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
        decoder += [nn.Sigmoid()] if i == 0 else [nn.ReLU(), nn.BatchNorm2d(before)]
        if stride == 1:
            decoder.append(nn.Conv2d(after, before, 3, 1, 1))
        else:  # an even size was halved, an odd one rounded up: the padding tells them apart
            even = (1 - size[0] % 2, 1 - size[1] % 2)
            decoder.append(nn.ConvTranspose2d(after, before, 3, 2, 1, output_padding=even))
            size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    inner = (widths[-1], *size)
    encoder += [nn.Flatten(), *_perceptron([math.prod(inner), hidden, code_features])]
    decoder += [nn.Unflatten(1, inner), nn.ReLU(), *_perceptron([code_features, hidden, math.prod(inner)])[::-1]]
    return Coders(nn.Sequential(*encoder), nn.Sequential(*decoder[::-1]))


def _perceptron(widths: Sequence[int]) -> list[nn.Module]:
    """Linear layers with ReLUs between them."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers[:-1]


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = shape if isinstance(shape, Sequence) else (shape,)
    if not sizes:
        raise ValueError("shape is empty. It is the shape of one sample, such as 784 or (1, 28, 28).")
    return tuple(_check.integer(f"shape[{i}]", size) for i, size in enumerate(sizes))
