"""Figures of layer reports: the numbers drawn are those of the report."""

import math

import numpy as np
import pytest
import torch

from unrolled import StepLISTA
from unrolled.plot import layer_quantity, layer_report
from unrolled.report import ISTATheory, LayerReport

D = torch.nn.functional.normalize(torch.randn(10, 20, generator=torch.Generator().manual_seed(0)), dim=0)
Y = torch.randn(12, 10, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def report():
    net = StepLISTA(D, 4, alpha=0.1)
    with torch.no_grad():
        net[2].log_gamma += math.log(3.0)
    return LayerReport(net, Y, ISTATheory(D, 0.1))


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_a_quantity(report):
    ax = layer_quantity(report, "step")
    drawn = lines(ax)
    assert set(drawn) == {"measured", "predicted", "prediction fails"}
    np.testing.assert_array_equal(drawn["measured"].get_ydata(), report.value("step"))
    np.testing.assert_array_equal(drawn["predicted"].get_ydata(), report.predicted("step"))
    np.testing.assert_array_equal(drawn["prediction fails"].get_xdata(), [2])
    assert "step" in ax.get_title(loc="left")
    styles = {(line.get_linestyle(), line.get_marker()) for line in drawn.values()}
    assert len(styles) == 3, "told apart without colours"
    again = layer_quantity(report, "zeros", ax=ax)
    assert again is ax


def test_what_is_only_measured_has_one_line(report):
    assert set(lines(layer_quantity(report, "change"))) == {"measured"}


def test_all_quantities(report):
    figure = report.plot()
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.axison]
    assert len(titles) == len(report.columns)
    assert all(any(title.startswith(name) for title in titles) for name in report.columns)
    figure.canvas.draw()
    two = layer_report(report, ["step", "decrease"], columns=1)
    assert len(two.axes) == 2


def test_wrong_arguments(report):
    with pytest.raises(KeyError, match="no column 'charm'"):
        report.plot(["charm"])
    with pytest.raises(ValueError, match="columns must be at least 1"):
        layer_report(report, columns=0)
