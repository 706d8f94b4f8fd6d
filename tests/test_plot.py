"""The figures: what was passed is what is drawn, and bad input is refused by name."""

import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    axes = plot.gap_curve({"ISTA": [0.5, 0.4, 0.3], "net": [0.5, 0.1]})
    assert axes.get_yscale() == "log"
    np.testing.assert_array_equal(lines(axes)["ISTA"].get_xydata(), [[1, 0.5], [2, 0.4], [3, 0.3]])
    np.testing.assert_array_equal(lines(axes)["net"].get_ydata(), [0.5, 0.1])
    assert lines(axes)["ISTA"].get_color() != lines(axes)["net"].get_color()


def test_gap_curve_marks_where_the_other_draws_level():
    axes = plot.gap_curve({"slow": [0.5, 0.4, 0.3, 0.2, 0.1], "net": [0.5, 0.25]}, level=("net", "slow"))
    (note,) = axes.texts
    assert note.get_text() == "slow needs 4"


@pytest.mark.parametrize("slow", [[0.5, 0.4, 0.3], [0.2, 0.1]], ids=["never", "sooner"])
def test_gap_curve_marks_no_level_that_is_not_reached_later(slow):
    axes = plot.gap_curve({"slow": slow, "net": [0.5, 0.25]}, level=("net", "slow"))
    assert len(axes.texts) == 0


def test_dictionary_mosaic_shows_every_atom_upright():
    D = np.random.default_rng(0).normal(size=(6, 5))
    axes = plot.dictionary_mosaic(D, patch_shape=(2, 3))
    picture = axes.images[0].get_array().filled(np.nan)
    columns = (picture.shape[1] - 1) // 4
    for k in range(5):
        top, left = k // columns * 3 + 1, k % columns * 4 + 1
        atom = picture[top : top + 2, left : left + 3]
        np.testing.assert_allclose(atom, D[:, k].reshape(2, 3) / np.abs(D[:, k]).max(), rtol=1e-12)
    shown = np.isfinite(picture).sum()
    assert shown == D.size


def test_dictionary_mosaic_shows_a_zero_atom_as_grey():
    axes = plot.dictionary_mosaic(np.zeros((4, 1)))
    assert (axes.images[0].get_array().compressed() == 0).all()


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


SINGLE = {
    "gap_curve": lambda ax=None: plot.gap_curve({"a": [1.0, 0.5]}, ax=ax),
    "layer_values": lambda ax=None: plot.layer_values({"a": [1.0, 0.5]}, ax=ax),
    "influence_functions": lambda ax=None: plot.influence_functions([0.0, 1.0], {"a": [0.0, 1.0]}, ax=ax),
    "cost_curve": lambda ax=None: plot.cost_curve({"a": ([1, 2], [1, 4])}, ax=ax),
    "dictionary_mosaic": lambda ax=None: plot.dictionary_mosaic(np.eye(4), ax=ax),
    "kernel_mosaic": lambda ax=None: plot.kernel_mosaic(np.ones((2, 3, 3)), ax=ax),
    "centre_mosaic": lambda ax=None: plot.centre_mosaic(np.eye(4), ax=ax),
    "filmstrip": lambda ax=None: plot.filmstrip(np.zeros((2, 3, 3)), ax=ax),
    "support_evolution": lambda ax=None: plot.support_evolution(np.eye(3), ax=ax),
    "tree_of_examples": lambda ax=None: plot.tree_of_examples([-1, 0, 0], ax=ax),
    "walk_over_examples": lambda ax=None: plot.walk_over_examples(np.eye(3), np.ones((2, 3, 3)), ax=ax),
    "decision_boundary": lambda ax=None: plot.decision_boundary(
        lambda x: (x[:, 0] > 0).astype(int), np.eye(2) - 0.5, [0, 1], resolution=5, ax=ax
    ),
}


def test_every_function_is_either_of_one_panel_or_returns_a_figure():
    drawn = {name for name in vars(plot) if name.islower() and not name.startswith("_")}
    functions = {name for name in drawn if callable(getattr(plot, name))}
    assert functions - set(SINGLE) == {"before_after", "layer_profile", "scaling", "layer_report", "layer_quantity"}


@pytest.mark.parametrize("name", SINGLE)
def test_one_panel_goes_into_the_axes_given_and_comes_back(name):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert SINGLE[name](right) is right
    assert not (left.lines or left.images) and (right.lines or right.images)
    own = SINGLE[name]()
    assert isinstance(own, Axes) and own.figure is not figure
    with pytest.raises(TypeError, match="ax must be a matplotlib Axes"):
        SINGLE[name](figure)


def test_layer_values_draws_each_network_and_the_classical_value():
    many = np.random.default_rng(0).normal(size=(3, 11))
    axes = plot.layer_values({"one": [1.0, 2.0, 3.0], "many": many}, classical=0.5, title="step size")
    np.testing.assert_array_equal(lines(axes)["one"].get_xydata(), [[1, 1], [2, 2], [3, 3]])
    np.testing.assert_allclose(lines(axes)["many"].get_ydata(), np.median(many, 1))
    np.testing.assert_array_equal(lines(axes)["classical"].get_ydata(), [0.5] * 3)
    assert axes.get_title(loc="left") == "step size"


def test_influence_functions_draws_the_curves_where_they_were_evaluated():
    x = torch.linspace(-1, 1, 5)
    axes = plot.influence_functions(x, {"phi": torch.tanh(x).requires_grad_()})
    np.testing.assert_allclose(lines(axes)["phi"].get_xydata(), torch.stack([x, x.tanh()], 1).numpy(), rtol=1e-6)


def test_cost_curve_has_logarithmic_axes_with_the_data_as_ticks():
    axes = plot.cost_curve({"net": ([500, 1000], [0.1, 0.4])}, xlabel="atoms")
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_xlabel()) == ("log", "log", "atoms")
    assert list(axes.get_xticks()) == [500, 1000]


@pytest.mark.parametrize(("signed", "low"), [(True, -1), (False, 0)])
def test_kernel_mosaic_scales_each_kernel_by_itself(signed, low):
    axes = plot.kernel_mosaic(np.stack([np.full((3, 3), 0.1), np.full((3, 3), 4.0)]), signed=signed)
    image = axes.images[0]
    assert image.get_clim() == (low, 1)
    np.testing.assert_array_equal(image.get_array().compressed(), np.ones(18))


def test_centre_mosaic_keeps_one_scale_for_all():
    axes = plot.centre_mosaic([[0.0, 0.5, 0.5, 1.0], [2.0, 0.5, 0.5, 0.0]])
    image = axes.images[0]
    assert image.get_clim() == (0, 2)
    np.testing.assert_array_equal(image.get_array().filled(np.nan)[1:3, 1:3], [[0, 0.5], [0.5, 1]])
    assert plot.centre_mosaic(np.eye(4), limits=(-1, 1)).images[0].get_clim() == (-1, 1)


def test_filmstrip_shows_the_pictures_from_left_to_right_with_their_titles():
    pictures = np.random.default_rng(0).random((3, 4, 5))
    axes = plot.filmstrip(pictures, titles=["1", "5", "10"])
    strip = axes.images[0].get_array().filled(np.nan)
    for k in range(3):
        np.testing.assert_array_equal(strip[:, 6 * k : 6 * k + 5], pictures[k])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "5", "10"]


def test_support_evolution_shows_sizes_of_one_code_and_shares_of_many():
    codes = np.array([[0.0, 0.0, 2.0], [0.0, -1.0, 4.0]])
    axes = plot.support_evolution(codes, truth=[0, 1, 1])
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0, 0, 1], [0, 0.25, 1]])
    np.testing.assert_array_equal(lines(axes)["true support"].get_xdata(), [1, 2])
    many = np.array([[[0.0, 1.0], [3.0, 1.0]]])
    np.testing.assert_array_equal(plot.support_evolution(many).images[0].get_array(), [[0.5, 1.0]])


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
        (lambda: plot.layer_values({}), "series"),
        (lambda: plot.influence_functions([0.0, 1.0], {"a": [1.0]}), "1 values for 2 places"),
        (lambda: plot.cost_curve({"a": ([1], [-1])}), "not positive"),
        (lambda: plot.kernel_mosaic(np.ones((3, 3))), "kernels"),
        (lambda: plot.centre_mosaic(np.ones((2, 5))), "patch_shape"),
        (lambda: plot.filmstrip(np.ones((2, 3, 3)), titles=["a"]), "titles"),
        (lambda: plot.support_evolution(np.ones(3)), "codes"),
        (lambda: plot.support_evolution(np.ones((2, 3)), truth=[1]), "truth"),
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
        plot.gap_curve({"a": [1.0, 0.1], "b": [1.0, 0.5, 0.05]}, level=("a", "b")).figure,
        plot.dictionary_mosaic(np.eye(16)).figure,
        plot.kernel_mosaic(np.ones((3, 5, 5)), signed=False).figure,
        plot.centre_mosaic(np.eye(4)).figure,
        plot.filmstrip(np.zeros((3, 4, 5))).figure,
        plot.support_evolution(np.eye(3, 6), truth=np.arange(6) < 2).figure,
        plot.layer_values({"net": np.ones((3, 4))}, classical=1.0, title="step").figure,
        plot.influence_functions([0.0, 1.0], {"phi": [0.0, 0.5]}).figure,
        plot.cost_curve({"a": ([1, 2], [1, 4])}).figure,
        plot.before_after({"a": np.eye(8), "b": np.eye(8)}),
        plot.layer_profile({"a": {"net": np.ones((3, 4))}}, classical={"a": [1.0, 2.0, 3.0]}),
        plot.scaling({"n": {"a": ([1, 2], [1, 4])}, "K": {"a": ([1, 2], [1, 2])}}, columns=1),
        plot.scaling({"n": {"a": ([1, 2], [1, 4])}, "K": {"a": ([1], [1])}, "B": {"a": ([1], [1])}}, columns=2),
    )
    for k, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{k}.png")
        assert (tmp_path / f"{k}.png").read_bytes().startswith(b"\x89PNG")
