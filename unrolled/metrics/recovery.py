"""How well sparse codes were recovered: three figures that can differ by 20 dB on the same network, so name yours.

All are computed in float64 and add no constant to any error: an exactly recovered code is at minus infinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unrolled import _check


def nmse_db(found: Tensor, true: Tensor) -> float:
    r"""$10 \log_{10} \frac{\sum_i \|\hat x_i - x_i\|^2}{\sum_i \|x_i\|^2}$: the aggregate NMSE in dB.

    A few codes that were not recovered decide it, however well the others were.

    Args:
        found: recovered codes $\hat x$, real or complex.
        true: the codes $x$.

    Shape:
        - found, true: (..., n), the same

    Returns:
        The error in dB, minus infinity where all codes are exact.

    Raises:
        TypeError: no floating point or complex tensors.
        ValueError: shapes that differ, NaN or infinity, `true` all zero (the ratio means nothing).

    Example:
        >>> true = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> round(nmse_db(1.1 * true, true), 3)
        -20.0
    """
    error, power = _errors(found, true)
    return _decibel(error.sum(), power.sum()).item()


def per_sample_nmse_db(found: Tensor, true: Tensor) -> float:
    r"""$\frac1N \sum_i 10 \log_{10} \frac{\|\hat x_i - x_i\|^2}{\|x_i\|^2}$: the mean of the codes' own NMSE in dB.

    Codes that are zero have no relative error and are left out. One exact code makes the mean minus infinity.

    Args:
        found: recovered codes $\hat x$, real or complex.
        true: the codes $x$.

    Shape:
        - found, true: (..., n), the same

    Returns:
        The mean error in dB.

    Raises:
        TypeError, ValueError: as `nmse_db`.

    Example:
        >>> true = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> round(per_sample_nmse_db(true * torch.tensor([[1.1], [1.01]]), true), 3)
        -30.0
    """
    return sample_nmse_db(found, true).mean().item()


def sample_nmse_db(found: Tensor, true: Tensor) -> Tensor:
    r"""$10 \log_{10} (\|\hat x_i - x_i\|^2 / \|x_i\|^2)$ of each code that is not zero: for medians and histograms.

    Args:
        found: recovered codes $\hat x$, real or complex.
        true: the codes $x$.

    Shape:
        - found, true: (..., n), the same
        - output: (N,), float64, N the number of nonzero codes, in their order

    Raises:
        TypeError, ValueError: as `nmse_db`.

    Example:
        >>> true = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> sample_nmse_db(true, true)
        tensor([-inf, -inf], dtype=torch.float64)
    """
    error, power = _errors(found, true)
    return _decibel(error[power > 0], power[power > 0])


def fraction_recovered(found: Tensor, true: Tensor, threshold_db: float = -60.0) -> float:
    r"""$\frac1N \#\{i : 10 \log_{10} (\|\hat x_i - x_i\|^2 / \|x_i\|^2) \le t\}$: how many codes were recovered.

    Codes that are zero have no relative error and are left out.

    Args:
        found: recovered codes $\hat x$, real or complex.
        true: the codes $x$.
        threshold_db: $t$, the NMSE in dB up to which a code counts as recovered.

    Shape:
        - found, true: (..., n), the same

    Returns:
        A fraction, from 0 to 1.

    Raises:
        TypeError, ValueError: as `nmse_db`; a threshold that is no finite number.

    Example:
        >>> true = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> fraction_recovered(torch.tensor([[1.0, 0.0], [0.0, 0.9]]), true)
        0.5
    """
    _check.real("threshold_db", threshold_db)
    return (sample_nmse_db(found, true) <= threshold_db).double().mean().item()


@dataclass(frozen=True)
class RecoveryReport:
    """Three figures for one set of codes, see `recovery_report`; prints as one line."""

    nmse_db: float
    per_sample_nmse_db: float
    fraction_recovered: float
    threshold_db: float
    num_samples: int

    def __str__(self) -> str:
        return (
            f"NMSE {self.nmse_db:.2f} dB aggregate, {self.per_sample_nmse_db:.2f} dB per sample, "
            f"{self.fraction_recovered:.1%} of {self.num_samples} recovered to {self.threshold_db:g} dB"
        )


def recovery_report(found: Tensor, true: Tensor, threshold_db: float = -60.0) -> RecoveryReport:
    """`nmse_db`, `per_sample_nmse_db` and `fraction_recovered` of the same codes.

    Args:
        found: recovered codes, real or complex.
        true: the codes.
        threshold_db: the NMSE in dB up to which a code counts as recovered.

    Shape:
        - found, true: (..., n), the same

    Raises:
        TypeError, ValueError: as `fraction_recovered`.

    Example:
        >>> true = torch.eye(4)
        >>> print(recovery_report(1.0001 * true, true))
        NMSE -80.00 dB aggregate, -80.00 dB per sample, 100.0% of 4 recovered to -60 dB
    """
    return RecoveryReport(
        nmse_db(found, true),
        per_sample_nmse_db(found, true),
        fraction_recovered(found, true, threshold_db),
        threshold_db,
        len(sample_nmse_db(found, true)),
    )


@torch.no_grad()
def _errors(found: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error and squared norm of each code, in float64; refuses what has no relative error at all."""
    _check.tensor("true", true, allow_complex=True)
    _check.tensor("found", found, allow_complex=True)
    if found.shape != true.shape or true.dim() == 0:
        raise ValueError(
            f"found and true must both have shape (..., n), got {tuple(found.shape)} and {tuple(true.shape)}."
        )
    _check.finite("found", found)
    _check.finite("true", true)
    wide = torch.complex128 if found.is_complex() or true.is_complex() else torch.float64
    found, true = found.to(wide), true.to(wide)
    error = (found - true).abs().square().sum(-1).flatten()
    power = true.abs().square().sum(-1).flatten()
    if not bool((power > 0).any()):
        raise ValueError("true is zero everywhere: an error relative to nothing means nothing.")
    return error, power


def _decibel(error: Tensor, power: Tensor) -> Tensor:
    return 10 * torch.log10(error / power)
