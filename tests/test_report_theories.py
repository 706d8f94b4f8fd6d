"""Theories of mean field, k-means and diffusion: what they predict holds, and broken layers are found."""

import copy

import numpy as np
import pytest
import torch

from unrolled import LISTA, Step, Unroll
from unrolled.cluster.lloyd import KMeans
from unrolled.crf import CRFasRNN
from unrolled.crf.filters import Exact, Normalization
from unrolled.crf.kernels import Bilateral, Spatial
from unrolled.image.diffusion import LearnedPDE
from unrolled.report import DiffusionTheory, LayerReport, LloydTheory, MeanFieldTheory
from unrolled.solvers.kmeans import kmeans_objective, kmeans_plus_plus

F64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def names(found):
    return {verdict.name for verdict in found.verdicts}


# ---- Mean field ------------------------------------------------------------------------------------------------------

LOGITS = randn(2, 3, 6, 7)
IMAGE = torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(1), dtype=F64) * 255


def crf(weight=4.0, normalization=Normalization.SYMMETRIC, num_iters=4, **options):
    kernels = [
        Bilateral(theta_alpha=5.0, theta_beta=60.0, weight=weight, normalization=normalization, filter=Exact()),
        Spatial(weight=weight, normalization=normalization, filter=Exact()),
    ]
    return CRFasRNN(3, kernels, num_iters, dtype=F64, **options)


def crf_report(net, image=IMAGE):
    return LayerReport(net, (LOGITS, image), MeanFieldTheory(), sensitivity=False, power_iters=0)


@pytest.mark.parametrize("damping", [0.0, 0.4])
def test_the_free_energy_of_a_mean_field_falls_by_the_divergence(damping):
    found = crf_report(crf(damping=damping))
    assert found.holds()
    assert (np.diff(found.value("objective")) < 0).all()
    np.testing.assert_allclose(found.value("symmetry"), 0, atol=1e-9)
    assert (found.value("curvature") > 0).all() and (found.value("residual") > 0).all()


def test_the_free_energy_is_that_of_the_dense_matrices():
    net = crf(num_iters=1)
    found = crf_report(net)
    u = net(LOGITS, IMAGE).detach()
    q = u.softmax(1).flatten(2)  # (batch, L, N)
    B = torch.zeros(2, 42, 42, dtype=F64)
    places = torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")).flatten(1).to(F64)
    colours = IMAGE.flatten(2)
    for b in range(2):
        spatial = torch.cdist(places.T, places.T) ** 2
        both = spatial / 5.0**2 + torch.cdist(colours[b].T, colours[b].T) ** 2 / 60.0**2
        for distance in (both, spatial / 3.0**2):
            K = torch.exp(-distance / 2)
            n = K.sum(1).rsqrt()
            B[b] += 4.0 * n[:, None] * K * n
    entropy = (q * q.log()).sum((1, 2))
    energy = entropy - (q * LOGITS.flatten(2)).sum((1, 2)) - (q * (q @ B)).sum((1, 2)) / 2
    assert found.row("objective", 0).measured == pytest.approx(float(energy.mean()), rel=1e-9)


def test_kernels_that_are_not_symmetric_are_found():
    stripe = torch.zeros_like(IMAGE)
    stripe[..., 2] = 255.0  # few pixels here, many there: their kernels are divided by different numbers
    assert "off theory: symmetry" in names(crf_report(crf(normalization=Normalization.AFTER), stripe))
    assert crf_report(crf(), stripe).holds()


def test_classes_that_repel_have_no_law_and_are_found():
    found = crf_report(crf(weight=-9.0))
    assert {"no sufficient decrease", "off theory: curvature", "objective rises"} <= set(found.names(0))
    assert "damp it" in next(v.reason for v in found.verdicts if v.name == "no sufficient decrease")


# ---- k-means ---------------------------------------------------------------------------------------------------------

POINTS = randn(3, 40, 2) + 4 * torch.randint(2, (3, 40, 1), generator=torch.Generator().manual_seed(5)).to(F64)
CENTRES = kmeans_plus_plus(POINTS, 3, generator=torch.Generator().manual_seed(0))


def lloyd_report(net, *weights):
    return LayerReport(net, (POINTS, CENTRES, *weights), LloydTheory())


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"spherical": True}, {"step_size": 1.0}], ids=str)
def test_all_that_is_predicted_of_kmeans_holds(options):
    found = lloyd_report(KMeans(4, dtype=F64, **options))
    assert found.holds() and (np.diff(found.value("objective")) <= 1e-12).all()
    known = found.value("step")[~np.isnan(found.value("step"))]
    np.testing.assert_allclose(known, 1, rtol=1e-6)


def test_the_decrease_of_kmeans_is_that_of_parabolas():
    """With the points held to their centres, F falls by exactly the bound; freed, by more."""
    weights = torch.rand(3, 40, generator=torch.Generator().manual_seed(1), dtype=F64)
    for step_size in (0.5, 1.0, 1.7):
        net = KMeans(3, step_size=step_size, dtype=F64)
        found = lloyd_report(net, weights)
        assert (found.value("decrease") == 1).all() and (found.value("monotone") == 1).all()
        assert found.row("step", 0).measured == pytest.approx(step_size, rel=1e-9)
    after = kmeans_objective(POINTS, net.iterates(POINTS, CENTRES, weights)[0].detach(), weights=weights).mean()
    assert found.row("objective", 0).measured == pytest.approx(float(after), rel=1e-9)


def test_centres_without_points_are_counted():
    far = CENTRES.clone()
    far[:, 2] = 1e3
    found = LayerReport(KMeans(2, dtype=F64), (POINTS, far), LloydTheory())
    np.testing.assert_allclose(found.value("dead"), 1 / 3)


def test_a_step_too_long_makes_the_inertia_rise():
    found = lloyd_report(KMeans(4, step_size=2.5, dtype=F64))
    assert {"inertia rises", "off theory: step", "expansive"} <= set(found.names(1))
    assert "the law needs at most 2" in next(v.reason for v in found.verdicts if v.name == "inertia rises")


def test_centres_moved_at_random_do_not_descend_enough():
    class Shuffling(Step):
        event_dim = 2

        def init(self, context):
            return context[1]

        def forward(self, centres, context):
            return centres.roll(1, -2) + 0.1  # it learns nothing from the points

    found = LayerReport(Unroll(Shuffling(), 2), (POINTS, CENTRES), LloydTheory())
    assert "no sufficient decrease" in names(found) or "inertia rises" in names(found)


# ---- Diffusion -------------------------------------------------------------------------------------------------------

PICTURES = torch.rand(3, 1, 12, 14, generator=torch.Generator().manual_seed(2), dtype=F64)


class Heat(Step):
    """u+ = u + d Laplacian(u) + c, five points, no gradient across the border."""

    event_dim = 3

    def __init__(self, d, c=0.0):
        super().__init__()
        self.d, self.c = d, c

    def init(self, y):
        return y

    def forward(self, u, y):
        wide = torch.nn.functional.pad(u, (1, 1, 1, 1), mode="replicate")
        around = wide[..., 2:, 1:-1] + wide[..., :-2, 1:-1] + wide[..., 1:-1, 2:] + wide[..., 1:-1, :-2]
        return u + self.d * (around - 4 * u) + self.c


def heat_report(*arguments):
    return LayerReport(Unroll(Heat(*arguments), 3), PICTURES, DiffusionTheory(nine_point=False))


def test_all_that_is_predicted_of_diffusion_holds():
    found = heat_report(0.25)
    assert found.holds() and names(found) == {"as predicted"}
    np.testing.assert_allclose(found.value("diffusivity"), 0.25, rtol=1e-9)
    untrained = LayerReport(LearnedPDE(3, dtype=F64), PICTURES, DiffusionTheory())
    assert untrained.holds()
    np.testing.assert_allclose(untrained.value("diffusivity"), 0.1, rtol=1e-6)


def test_diffusion_beyond_the_limit_is_unstable():
    found = heat_report(0.6)
    assert {"unstable", "maximum principle broken", "roughness rises", "expansive"} <= set(found.names(0))
    assert "exceeds 0.25" in next(v.reason for v in found.verdicts if v.name == "maximum principle broken")


def test_a_drift_of_the_mean_is_found():
    assert "off theory: mean" in heat_report(0.2, 0.01).names(0)


def test_the_limit_is_an_argument():
    found = LayerReport(Unroll(Heat(0.2), 2), PICTURES, DiffusionTheory(nine_point=False, limit=0.1))
    assert "unstable" in found.names(0)
    with pytest.raises(ValueError, match="limit must be greater than 0"):
        DiffusionTheory(limit=0.0)


# ---- At the door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theory", "message"),
    [
        (MeanFieldTheory(), "MeanFieldTheory is about states that are logits"),
        (LloydTheory(), "LloydTheory is about centres"),
        (DiffusionTheory(), "DiffusionTheory is about images"),
    ],
    ids=str,
)
def test_a_theory_of_something_else_is_refused(theory, message):
    net = LISTA(randn(6, 10), 2, alpha=0.1)
    with pytest.raises(ValueError, match=message):
        LayerReport(net, randn(3, 6), theory)


def test_reports_know_what_a_network_was_before_training():
    net = KMeans(3, temperature=0.7, tied=False, dtype=F64)
    trained = copy.deepcopy(net)
    with torch.no_grad():
        trained.steps[1].log_step_size += 0.5
    drift = lloyd_report(trained).value("drift")
    assert drift[0] == drift[2] == 0 and drift[1] > 0
