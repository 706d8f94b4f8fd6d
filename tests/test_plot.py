"""The figures: what was passed is what is drawn, and bad input is refused by name."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from unrolled import plot


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_importing_the_package_does_not_import_matplotlib():
    code = "import sys, unrolled; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_figure_is_left_with_pyplot():
    code = "import sys, unrolled.plot as p; p.gap_curve({'a': [1]}); sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_gap_curve_draws_each_curve_from_iteration_one():
    figure = plot.gap_curve({"ISTA": [0.5, 0.4, 0.3], "net": [0.5, 0.1]})
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    np.testing.assert_array_equal(lines(axes)["ISTA"].get_xydata(), [[1, 0.5], [2, 0.4], [3, 0.3]])
    np.testing.assert_array_equal(lines(axes)["net"].get_ydata(), [0.5, 0.1])
    assert lines(axes)["ISTA"].get_color() != lines(axes)["net"].get_color()


def test_gap_curve_marks_where_the_other_draws_level():
    figure = plot.gap_curve({"slow": [0.5, 0.4, 0.3, 0.2, 0.1], "net": [0.5, 0.25]}, level=("net", "slow"))
    (note,) = figure.axes[0].texts
    assert note.get_text() == "slow needs 4"


@pytest.mark.parametrize("slow", [[0.5, 0.4, 0.3], [0.2, 0.1]], ids=["never", "sooner"])
def test_gap_curve_marks_no_level_that_is_not_reached_later(slow):
    figure = plot.gap_curve({"slow": slow, "net": [0.5, 0.25]}, level=("net", "slow"))
    assert len(figure.axes[0].texts) == 0


def test_dictionary_mosaic_shows_every_atom_upright():
    D = np.random.default_rng(0).normal(size=(6, 5))
    figure = plot.dictionary_mosaic(D, patch_shape=(2, 3))
    picture = figure.axes[0].images[0].get_array().filled(np.nan)
    columns = (picture.shape[1] - 1) // 4
    for k in range(5):
        top, left = k // columns * 3 + 1, k % columns * 4 + 1
        atom = picture[top : top + 2, left : left + 3]
        np.testing.assert_allclose(atom, D[:, k].reshape(2, 3) / np.abs(D[:, k]).max(), rtol=1e-12)
    shown = np.isfinite(picture).sum()
    assert shown == D.size


def test_dictionary_mosaic_shows_a_zero_atom_as_grey():
    figure = plot.dictionary_mosaic(np.zeros((4, 1)))
    assert (figure.axes[0].images[0].get_array().compressed() == 0).all()


def test_before_after_shows_every_picture_on_one_scale():
    pictures = {"a": np.full((4, 6), 0.2), "b": np.full((4, 6), 0.8), "c": np.eye(4, 6)}
    figure = plot.before_after(pictures)
    shown = {axes.get_title(): axes.images[0] for axes in figure.axes if axes.images}
    assert list(shown) == ["a", "b", "c"]
    for name, image in shown.items():
        np.testing.assert_array_equal(image.get_array(), pictures[name])
        assert image.get_clim() == (0, 1)


def test_layer_profile_draws_medians_bands_and_the_classical_value():
    many = np.random.default_rng(0).normal(size=(3, 101))
    figure = plot.layer_profile(
        {"threshold": {"net": many}, "momentum": {"net": [0.0, 0.5, 0.7]}}, classical={"threshold": 1.0}
    )
    first, second = figure.axes
    np.testing.assert_allclose(lines(first)["net"].get_ydata(), np.median(many, 1))
    np.testing.assert_array_equal(lines(first)["classical"].get_ydata(), [1, 1, 1])
    assert len(first.collections) == 1 and len(second.collections) == 0
    assert "classical" not in lines(second)
    assert lines(first)["net"].get_color() == lines(second)["net"].get_color()


def test_scaling_draws_each_method_in_one_colour_and_ticks_at_the_data():
    figure = plot.scaling(
        {
            "atoms": {"net": ([500, 1000], [0.1, 0.4]), "OMP": ([500], [3.0])},
            "layers": {"net": ([4, 8, 16], [0.1, 0.2, 0.4])},
        },
        columns=2,
    )
    atoms, layers = figure.axes
    assert (atoms.get_xscale(), atoms.get_yscale()) == ("log", "log")
    np.testing.assert_array_equal(lines(atoms)["OMP"].get_xydata(), [[500, 3.0]])
    np.testing.assert_array_equal(lines(layers)["net"].get_ydata(), [0.1, 0.2, 0.4])
    assert lines(atoms)["net"].get_color() == lines(layers)["net"].get_color() != lines(atoms)["OMP"].get_color()
    assert list(atoms.get_xticks()) == [500, 1000]
    assert atoms.get_xlabel() == "atoms" and atoms.get_ylabel() == "seconds"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["net", "OMP"]


@pytest.mark.parametrize(
    ("draw", "name"),
    [
        (lambda: plot.gap_curve({}), "curves"),
        (lambda: plot.gap_curve({"a": [[1.0]]}), "curves"),
        (lambda: plot.gap_curve({"a": []}), "curves"),
        (lambda: plot.gap_curve({"a": [float("nan")]}), "curves"),
        (lambda: plot.gap_curve({"a": [1.0]}, level=("a", "b")), "'b'"),
        (lambda: plot.dictionary_mosaic(np.ones(4)), "dictionary"),
        (lambda: plot.dictionary_mosaic(np.ones((6, 2))), "patch_shape"),
        (lambda: plot.before_after({}), "pictures"),
        (lambda: plot.before_after({"a": np.ones(3)}), "pictures"),
        (lambda: plot.before_after({"a": np.ones((3, 3))}, columns=0), "columns"),
        (lambda: plot.layer_profile({}), "panels"),
        (lambda: plot.layer_profile({"a": {}}), "panels"),
        (lambda: plot.layer_profile({"a": {"net": np.ones((2, 2, 2))}}), "panels"),
        (lambda: plot.layer_profile({"a": {"net": [1.0]}}, classical={"b": 1.0}), "classical"),
        (lambda: plot.scaling({}), "panels"),
        (lambda: plot.scaling({"n": {}}), r"panels\['n'\]"),
        (lambda: plot.scaling({"n": {"a": ([1, 2], [1])}}), "2 x and 1 y"),
        (lambda: plot.scaling({"n": {"a": ([1, 2], [1, 0])}}), "not positive"),
        (lambda: plot.scaling({"n": {"a": ([1], [1])}}, columns=0), "columns"),
    ],
)
def test_bad_input_is_refused_by_name(draw, name):
    with pytest.raises(ValueError, match=name):
        draw()


def test_figures_can_be_saved_without_warnings(tmp_path):
    figures = (
        plot.gap_curve({"a": [1.0, 0.1], "b": [1.0, 0.5, 0.05]}, level=("a", "b")),
        plot.dictionary_mosaic(np.eye(16)),
        plot.before_after({"a": np.eye(8), "b": np.eye(8)}),
        plot.layer_profile({"a": {"net": np.ones((3, 4))}}, classical={"a": [1.0, 2.0, 3.0]}),
        plot.scaling({"n": {"a": ([1, 2], [1, 4])}, "K": {"a": ([1, 2], [1, 2])}}, columns=1),
        plot.scaling({"n": {"a": ([1, 2], [1, 4])}, "K": {"a": ([1], [1])}, "B": {"a": ([1], [1])}}, columns=2),
    )
    for k, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{k}.png")
        assert (tmp_path / f"{k}.png").read_bytes().startswith(b"\x89PNG")
