"""Photographs, their patches, and a dictionary learned from them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PATCH = 8  # side of a patch, in pixels
SMALLEST = 16  # side of the smallest picture that is worth coding
LARGEST = 640 * 480  # pixels; larger pictures are reduced, so that the demo keeps to its minute
_WHITE = (255, 255, 255, 255)


class UnusableImage(ValueError):
    """Why a picture can't be used, in one line."""


def sample_photograph(name: str) -> Tensor:  # (height, width)
    """One of the two photographs that come with scikit-learn, `china.jpg` or `flower.jpg`, grey, from 0 to 1."""
    from sklearn.datasets import load_sample_image

    return _grey(np.asarray(load_sample_image(name)) / 255)


def read_photograph(path: str | Path) -> Tensor:  # (height, width)
    """Read an image file as grey values from 0 to 1; transparent parts are laid on white.

    Raises:
        UnusableImage: there is no such file, or nothing that can be used in it.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                picture = ImageOps.exif_transpose(image)
                values = _values(picture)
    except FileNotFoundError:
        raise UnusableImage(f"there is no file {path}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UnusableImage(f"{path} has too many pixels; reduce it first") from None
    except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises, depending on the format
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnusableImage(f"can't read {path} as an image ({reason})") from None
    return _of_usable_size(_grey(values), path)


def centre(picture: Tensor, side: int) -> Tensor:
    """The middle of a picture, at most `side` pixels each way."""
    top, left = ((length - min(length, side)) // 2 for length in picture.shape)
    return picture[top : top + side, left : left + side]


def patches(picture: Tensor, stride: int = 1) -> Tensor:  # (patches, 64)
    """All 8x8 patches of a picture, at every `stride`-th row and column."""
    return F.unfold(_padded(picture, stride), PATCH, stride=stride)[0].T.contiguous()


def average(patches: Tensor, shape: torch.Size, stride: int = 1) -> Tensor:  # (height, width)
    """The inverse of `patches`: put them back and average where they overlap."""
    height, width = shape
    size = _padded(patches.new_empty(shape), stride).shape[-2:]
    total = F.fold(patches.T[None], size, PATCH, stride=stride)
    count = F.fold(torch.ones_like(patches).T[None], size, PATCH, stride=stride)
    return (total / count)[0, 0, :height, :width]


def unit_patches(picture: Tensor) -> Tensor:  # (patches, 64)
    """The patches with some structure (norm above 0.1 without their mean), with mean 0 and norm 1."""
    centred = patches(picture)
    centred = centred - centred.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    kept = norm[:, 0] > 0.1
    return centred[kept] / norm[kept]


def choose(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random rows, or all where there are fewer."""
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def learn_dictionary(samples: Tensor, num_atoms: int, alpha: float, *, passes: int, seed: int) -> Tensor:
    """Learn (64, num_atoms) unit atoms, as columns, for the Lasso of weight `alpha`, in a few passes over the data."""
    from sklearn.decomposition import MiniBatchDictionaryLearning
    from sklearn.exceptions import ConvergenceWarning

    learner = MiniBatchDictionaryLearning(
        num_atoms,
        alpha=alpha,
        batch_size=256,
        max_iter=passes,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        random_state=seed,
    )
    with warnings.catch_warnings():
        # A few passes give a good dictionary, not a converged one.
        warnings.simplefilter("ignore", ConvergenceWarning)
        learner.fit(samples.double().numpy())
    return F.normalize(torch.from_numpy(learner.components_.T).float(), dim=0).contiguous()


def _values(image: Any) -> np.ndarray:
    """Grey or RGB values from 0 to 1 of a picture in any of Pillow's modes."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which some formats and versions hold in 32
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its integers are not within 0..65535")
        return values / 65535
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not (values.min() >= 0 and values.max() <= 1):  # so that NaN is refused
            raise ValueError("its floating point values are not within 0..1")
        return values
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        from PIL import Image

        coloured = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", coloured.size, _WHITE), coloured)
    return np.asarray(image.convert("RGB")) / 255


def _grey(values: np.ndarray) -> Tensor:
    # The luma of ITU-R BT.601, as Pillow and most others compute it.
    grey = values @ np.array([0.299, 0.587, 0.114]) if values.ndim == 3 else values
    return torch.from_numpy(np.ascontiguousarray(grey, dtype=np.float32))


def _of_usable_size(picture: Tensor, path: str | Path) -> Tensor:
    height, width = picture.shape
    if height * width > LARGEST:
        factor = (LARGEST / (height * width)) ** 0.5
        size = (max(1, int(height * factor)), max(1, int(width * factor)))
        picture = F.interpolate(picture[None, None], size, mode="bilinear", antialias=True)[0, 0]
    if min(picture.shape) < SMALLEST:
        raise UnusableImage(f"{path} has {width} x {height} pixels; it must have at least {SMALLEST} each way")
    if len(unit_patches(picture)) == 0:
        raise UnusableImage(f"{path} shows nothing: all its patches are of one grey")
    return picture


def _padded(picture: Tensor, stride: int) -> Tensor:  # (1, 1, height', width')
    """The last row and column repeated until the patches at every `stride`-th pixel cover the picture."""
    height, width = picture.shape
    return F.pad(picture[None, None], (0, (PATCH - width) % stride, 0, (PATCH - height) % stride), mode="replicate")
