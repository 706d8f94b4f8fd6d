"""The recovery figures against their definitions, written out in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unrolled import metrics

METRICS = [metrics.nmse_db, metrics.per_sample_nmse_db, metrics.fraction_recovered, metrics.recovery_report]


def _codes(count: int = 20, n: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    true = torch.randn(count, n, generator=source, dtype=torch.float64)
    scale = torch.logspace(-6, 0, count, dtype=torch.float64)[:, None]
    return true + scale * torch.randn(count, n, generator=source, dtype=torch.float64), true


def test_against_numpy() -> None:
    found, true = _codes()
    error = np.linalg.norm(found.numpy() - true.numpy(), axis=-1) ** 2
    power = np.linalg.norm(true.numpy(), axis=-1) ** 2
    each = 10 * np.log10(error / power)
    assert metrics.nmse_db(found, true) == pytest.approx(10 * np.log10(error.sum() / power.sum()), rel=1e-12)
    assert metrics.per_sample_nmse_db(found, true) == pytest.approx(each.mean(), rel=1e-12)
    np.testing.assert_allclose(metrics.sample_nmse_db(found, true).numpy(), each, rtol=1e-12)
    assert metrics.fraction_recovered(found, true, -50.0) == np.mean(each <= -50)
    assert 0 < np.mean(each <= -50) < 1


def test_one_unrecovered_code_rules_the_aggregate_only() -> None:
    true = torch.ones(100, 4, dtype=torch.float64)
    found = true * (1 + 1e-5)
    found[0] = 0
    assert metrics.nmse_db(found, true) == pytest.approx(-20, abs=1e-6)
    assert metrics.per_sample_nmse_db(found, true) == pytest.approx(-99, abs=1e-6)
    assert metrics.fraction_recovered(found, true) == 0.99


def test_exact_codes_are_at_minus_infinity() -> None:
    _, true = _codes()
    report = metrics.recovery_report(true, true)
    assert report.nmse_db == report.per_sample_nmse_db == -math.inf
    assert report.fraction_recovered == 1
    found = true.clone()
    found[0] += 1
    assert metrics.nmse_db(found, true) > -60
    assert metrics.per_sample_nmse_db(found, true) == -math.inf


def test_float32_errors_are_not_rounded_away() -> None:
    true = torch.ones(3, 2)
    found = torch.nextafter(true, torch.tensor(2.0))  # off by 2^-23
    assert metrics.nmse_db(found, true) == pytest.approx(20 * math.log10(2**-23), rel=1e-9)
    tiny = torch.full((3, 2), 1e-30)  # whose square underflows in float32
    assert metrics.nmse_db(2 * tiny, tiny) == pytest.approx(0, abs=1e-6)


def test_zero_codes_count_in_the_aggregate_only() -> None:
    true = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    found = torch.tensor([[1.0, 0.1], [0.1, 0.0]])
    assert metrics.nmse_db(found, true) == pytest.approx(10 * math.log10(0.02), abs=1e-5)
    assert metrics.per_sample_nmse_db(found, true) == pytest.approx(-20, abs=1e-5)
    assert metrics.fraction_recovered(found, true, -19.0) == 1
    assert metrics.recovery_report(found, true).num_samples == 1


def test_complex_codes_and_further_batch_dimensions() -> None:
    found, true = (torch.complex(*parts) for parts in zip(_codes(seed=1), _codes(seed=2), strict=True))
    as_real = [torch.view_as_real(codes).flatten(-2) for codes in (found, true)]
    assert metrics.nmse_db(found, true) == pytest.approx(metrics.nmse_db(*as_real), rel=1e-12)
    folded = [codes.reshape(4, 5, -1) for codes in as_real]
    for metric in METRICS:
        assert metric(*folded) == metric(*as_real)


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-3, 1e3), relative=st.floats(1e-6, 1e3))
def test_all_agree_on_codes_of_equal_relative_error(scale: float, relative: float) -> None:
    _, true = _codes()
    found = scale * true * (1 + relative)
    expected = pytest.approx(20 * math.log10(relative), abs=1e-6)
    assert metrics.nmse_db(found, scale * true) == expected
    assert metrics.per_sample_nmse_db(found, scale * true) == expected


def test_report_prints_on_one_line() -> None:
    true = torch.eye(4, dtype=torch.float64)
    text = str(metrics.recovery_report(1.0001 * true, true, threshold_db=-70.0))
    assert text == "NMSE -80.00 dB aggregate, -80.00 dB per sample, 100.0% of 4 recovered to -70 dB"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("found", "true", "error", "match"),
    [
        (
            torch.ones(2, 3),
            torch.ones(3, 2),
            ValueError,
            r"found and true must both have shape .* \(2, 3\) and \(3, 2\)",
        ),
        (torch.ones(()), torch.ones(()), ValueError, "found and true must both have shape"),
        (torch.ones(2, 3), torch.zeros(2, 3), ValueError, "true is zero everywhere"),
        (torch.full((2, 3), torch.nan), torch.ones(2, 3), ValueError, "found has 6 NaN"),
        (torch.ones(2, 3), torch.full((2, 3), torch.inf), ValueError, "true has 6 NaN or infinite"),
        (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64), TypeError, "true must be floating point"),
        ([[1.0]], torch.ones(1, 1), TypeError, "found must be a torch.Tensor"),
        (torch.ones(0, 3), torch.ones(0, 3), ValueError, "true is empty"),
    ],
)
def test_what_has_no_error_is_refused(metric, found, true, error, match) -> None:
    with pytest.raises(error, match=match):
        metric(found, true)


def test_threshold_must_be_a_number() -> None:
    with pytest.raises(ValueError, match="threshold_db must be finite"):
        metrics.fraction_recovered(torch.ones(1, 1), torch.ones(1, 1), math.nan)
