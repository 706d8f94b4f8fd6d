"""Deep clustering: the model, its training, resumption, several processes, the estimator, bad input."""

import copy
import importlib
import itertools
import math
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from unrolled.cluster import AnnealTemperature, KMeansHead
from unrolled.cluster.deep import DeepKMeans
from unrolled.cluster.deep_augmentation import RandomAffine
from unrolled.cluster.deep_losses import Attraction, Contrast, LogLikelihood
from unrolled.cluster.encoders import convolutional_coders, fully_connected_coders
from unrolled.estimators.deep_kmeans import DeepKMeansNet
from unrolled.solvers.kmeans import kmeans_objective, lloyd
from unrolled.training.deep_kmeans import Alternating, DeepHistory, Joint, best_of_seeds, fit_deep_kmeans
from unrolled.training.deep_kmeans_samples import Samples


@parametrize_with_checks(
    [
        DeepKMeansNet(hidden=(16,), n_components=3, pretrain_epochs=10, max_iter=2),
        DeepKMeansNet(hidden=(8,), n_components=2, pretrain_epochs=10, max_iter=1, dtype="float32", batch_size=64),
    ]
)
def test_scikit_learns_checks(estimator, check):
    """All of them, with none expected to fail."""
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X / 16, dtype=torch.float32), y


def small(seed=0, *, features=6, code=3, clusters=3, dropout=0.0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    encoder, decoder = fully_connected_coders(features, code, hidden=(8,))
    if dropout:
        encoder = nn.Sequential(*encoder[:-1], nn.Dropout(dropout), encoder[-1])
    return DeepKMeans(encoder, decoder, KMeansHead(code, clusters, **options)).to(dtype)


def blobs(n=60, features=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(3, features, generator=generator)
    x = centres[torch.arange(n) % 3] + 0.1 * torch.randn(n, features, generator=generator)
    return x.to(dtype)


SHORT = {"pretrain_epochs": 3, "epochs": 4, "batch_size": 16, "tol": 0.0}


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- The model -------------------------------------------------------------------------------------------------------


def test_the_two_errors_are_those_of_equation_15():
    model = small(dtype=torch.float64)
    x = blobs(10, dtype=torch.float64)
    codes = model.encoder(x) / model.encoder(x).norm(dim=1, keepdim=True)
    centres = model.head.centres / model.head.centres.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.encode(x), codes, rtol=0, atol=1e-14)
    expected = torch.cdist(codes, centres).square()
    torch.testing.assert_close(model(x).distances, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(model.clustering_error(codes), expected.amin(1), rtol=0, atol=1e-13)
    reconstructed = model.decoder(codes)
    torch.testing.assert_close(
        model.reconstruction_error(codes, x), (reconstructed - x).square().sum(1), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(model.prototypes(), model.decoder(centres), rtol=0, atol=1e-14)
    assert torch.equal(model.predict(x), expected.argmin(1))


def test_gradients_of_both_errors():
    model = small(dtype=torch.float64)
    x = blobs(4, dtype=torch.float64).requires_grad_()

    def loss(x):
        codes = model.encode(x)
        return model.reconstruction_error(codes, x).sum() + model.clustering_error(codes).sum()

    assert torch.autograd.gradcheck(loss, x)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 4), st.floats(0.1, 3.0), st.integers(0, 100))
def test_losses_against_their_definitions(count, clusters, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    distances = torch.rand(count, clusters, generator=generator, dtype=torch.float64)
    parts = torch.rand(count, clusters, generator=generator, dtype=torch.float64).softmax(1)
    attracted, likely = Attraction()(distances, parts), LogLikelihood(temperature)(distances, parts)
    codes, others = torch.randn(2, count, 3, generator=generator, dtype=torch.float64)
    contrasted = Contrast(2.0, temperature)(codes, others)
    cosine = torch.nn.functional.cosine_similarity(codes.unsqueeze(1), others.unsqueeze(0), dim=2)
    for i in range(count):
        torch.testing.assert_close(attracted[i], sum(parts[i, j] * distances[i, j] for j in range(clusters)))
        chances = [math.exp(-float(d) / temperature) for d in distances[i]]
        expected = -sum(float(parts[i, j]) * math.log(chances[j] / sum(chances)) for j in range(clusters))
        assert float(likely[i]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        row, column = (cosine[i] / temperature).exp(), (cosine[:, i] / temperature).exp()
        torch.testing.assert_close(contrasted[i], -(row[i] / row.sum()).log() - (column[i] / column.sum()).log())


def test_gradients_of_the_losses():
    generator = torch.Generator().manual_seed(0)
    codes, others = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    centres = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    parts = torch.rand(4, 2, generator=generator, dtype=torch.float64).softmax(1)
    assert torch.autograd.gradcheck(Contrast(), (codes, others))
    assert torch.autograd.gradcheck(lambda c: LogLikelihood()(torch.cdist(c, centres).square(), parts), codes)


def test_likelihood_pushes_away_from_the_other_centres():
    """Two codes equally far from their own centre: what is near another moves more, by LogLikelihood alone."""
    distances = torch.tensor([[1.0, 1.1], [1.0, 4.0]], requires_grad=True)
    own = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    (attraction,) = torch.autograd.grad(Attraction()(distances, own).sum(), distances)
    assert torch.equal(attraction, own)
    (likelihood,) = torch.autograd.grad(LogLikelihood()(distances, own).sum(), distances)
    assert likelihood[0, 0] > 10 * likelihood[1, 0] > 0 and likelihood[0, 1] < 10 * likelihood[1, 1] < 0


@pytest.mark.parametrize("spherical", [True, False])
def test_the_start_is_k_means_on_the_codes(spherical):
    model = small(spherical=spherical, dtype=torch.float64)
    x = blobs(dtype=torch.float64)
    model.start_centres(x, generator=torch.Generator().manual_seed(0))
    codes = model.encode(x).detach()
    settled = lloyd(codes, model.head.centres.detach(), spherical=spherical)
    torch.testing.assert_close(settled, model.head.centres.detach(), rtol=0, atol=1e-12)  # a fixed point of Lloyd's
    ours = kmeans_objective(codes, settled, spherical=spherical)
    if not spherical:  # scikit-learn has no spherical k-means
        theirs = KMeans(3, n_init=10, random_state=0).fit(codes.numpy()).inertia_
        assert float(ours) == pytest.approx(theirs, rel=1e-9)
    assert sorted(torch.bincount(model.predict(x)).tolist()) == [20, 20, 20]


def test_euclidean_codes_keep_their_length():
    model = small(spherical=False)
    x = blobs(5)
    assert torch.equal(model.encode(x), model.encoder(x))


@settings(deadline=None, max_examples=15)
@given(st.integers(4, 17), st.integers(4, 17), st.integers(1, 3), st.integers(1, 4))
def test_the_convolutional_decoder_gives_back_the_shape(height, width, channels, layers):
    encoder, decoder = convolutional_coders((channels, height, width), 4, channels=(3, 5, 2, 4)[:layers], hidden=7)
    x = torch.rand(2, channels, height, width)
    codes = encoder(x)
    assert codes.shape == (2, 4)
    assert decoder(codes).shape == x.shape


def test_the_published_sizes():
    """Parameters counted by hand from the widths: 784-500-500-2000-10 and the convolutions of 16, 32, 32, 16."""

    def count(module):
        return sum(p.numel() for p in module.parameters())

    widths = (784, 500, 500, 2000, 10)
    expected = sum(a * b + b for a, b in itertools.pairwise(widths))
    encoder, decoder = fully_connected_coders(784)
    assert count(encoder) == expected
    assert count(decoder) == expected - 10 + 784
    channels = (1, 16, 32, 32, 16)
    expected = sum(9 * a * b + 3 * b for a, b in itertools.pairwise(channels))  # bias and batch normalisation: 3
    expected += 16 * 7 * 7 * 256 + 256 + 256 * 10 + 10
    assert count(convolutional_coders((1, 28, 28)).encoder) == expected


# ---- Augmentation ----------------------------------------------------------------------------------------------------


def test_no_movement_is_the_image_itself():
    x = torch.rand(3, 2, 6, 9, dtype=torch.float64)
    still = RandomAffine(0.0, 0.0)
    torch.testing.assert_close(still(x), x, rtol=0, atol=1e-12)
    flat = RandomAffine(0.0, 0.0, shape=(2, 6, 9))
    torch.testing.assert_close(flat(x.flatten(1)), x.flatten(1), rtol=0, atol=1e-12)


def test_turning_keeps_distances_in_an_image_that_is_not_square():
    """A point at distance r from the centre of the image is at distance r after the turn, in pixels."""
    x = torch.zeros(50, 1, 21, 41)
    x[:, 0, 10, 26] = 1.0  # 6 pixels to the right of the centre
    turned = RandomAffine(degrees=60.0, shift=0.0)(x, torch.Generator().manual_seed(0))[:, 0]
    mass = turned.sum((1, 2))
    rows, columns = torch.arange(21.0) - 10, torch.arange(41.0) - 20
    down = (turned.sum(2) * rows).sum(1) / mass
    across = (turned.sum(1) * columns).sum(1) / mass
    assert down.abs().max() > 3  # it did turn
    torch.testing.assert_close(torch.hypot(down, across), torch.full((50,), 6.0), rtol=0, atol=0.15)  # interpolation


def test_shifts_are_as_large_as_they_say():
    x = torch.zeros(200, 1, 20, 20)
    x[:, 0, 10, 10] = 1.0
    moved = RandomAffine(degrees=0.0, shift=0.1)(x, torch.Generator().manual_seed(0))[:, 0]
    columns = (moved.sum(1) * (torch.arange(20.0) - 10)).sum(1) / moved.sum((1, 2))
    assert 1.8 < columns.max() <= 2.0 + 1e-4 and -2.0 - 1e-4 <= columns.min() < -1.8


def test_augmentation_is_drawn_from_the_generator():
    x = torch.rand(3, 1, 8, 8)
    first, again = (RandomAffine(scale=0.2)(x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, RandomAffine(scale=0.2)(x, torch.Generator().manual_seed(2)))


# ---- Training --------------------------------------------------------------------------------------------------------


def accuracy(y, found):
    counts = np.zeros((10, 10))
    np.add.at(counts, (y, found), 1)
    return counts[linear_sum_assignment(-counts)].sum() / len(y)


def test_digits(digits):
    """Both phases do what they are for. k-means on the pixels reaches a normalised mutual information of 0.74."""
    X, y = digits
    torch.manual_seed(0)
    coders = fully_connected_coders(64, hidden=(256, 128))
    model = DeepKMeans(*coders, KMeansHead(10, 10))
    found = {}

    def look(epoch, loss, model):
        if epoch in (50, 80):
            found[epoch] = model.eval().predict(X).numpy()

    history = fit_deep_kmeans(model, X, pretrain_epochs=50, epochs=30, tol=0.0, callbacks=[look])
    assert history.pretraining[-1] < 0.25 < 0.9 < history.pretraining[0]
    assert history.reconstruction[-1] < history.pretraining[-1]
    assert history.clustering[-1] < 0.9 * history.clustering[0]
    before, after = (normalized_mutual_info_score(y, found[epoch]) for epoch in (50, 80))
    assert before > 0.74
    assert after > before + 0.005
    assert accuracy(y, found[80]) > 0.75


def test_with_no_weight_it_is_the_auto_encoder():
    """Clustering with weight 0 leaves encoder and decoder to the reconstruction, the centres follow."""
    options = SHORT | {"weight": 0.0, "restarts": 0}
    alone, followed = small(), small()
    fit_deep_kmeans(alone, blobs(), **options, schedule=lambda epoch: (False, True))
    fit_deep_kmeans(followed, blobs(), **options, schedule=Joint())
    assert same(weights(alone.encoder), weights(followed.encoder))
    assert same(weights(alone.decoder), weights(followed.decoder))
    assert not torch.equal(alone.head.centres, followed.head.centres)


def test_schedules_move_what_they_say():
    def after_an_epoch(schedule):
        model = small()
        fit_deep_kmeans(model, blobs(), pretrain_epochs=0, epochs=1, schedule=schedule, restarts=0, min_share=0.0)
        return model

    centres = small().head.centres
    only_centres, only_encoder = after_an_epoch(Alternating()), after_an_epoch(Alternating(centres_first=False))
    assert not torch.equal(only_centres.head.centres, centres)
    assert torch.equal(only_encoder.head.centres, centres)
    plain = after_an_epoch(lambda epoch: (False, False))
    assert same(weights(only_centres.encoder), weights(plain.encoder))
    assert not same(weights(only_encoder.encoder), weights(plain.encoder))


def test_augmented_samples_are_drawn_to_the_clusters_of_the_samples_themselves():
    """An 'augmentation' that swaps the blobs: the assignments stay those of the samples that came in."""
    x = blobs()
    seen = []

    def recorded(x, generator):
        seen.append(x)
        return x.roll(1, 0)

    model = small()
    model.start_centres(x, generator=torch.Generator().manual_seed(0))
    calls = []
    error = model.clustering_error
    model.clustering_error = lambda codes, parts, loss: calls.append((codes, parts)) or error(codes, parts, loss)
    frozen = model.requires_grad_(False)
    frozen.decoder[-2].bias.requires_grad_(True)
    fit_deep_kmeans(frozen, x, pretrain_epochs=0, epochs=2, restarts=0, augment=recorded, tol=0.0, batch_size=60)
    ((codes, parts),) = calls
    torch.testing.assert_close(parts, model(seen[1]).assignments)
    torch.testing.assert_close(codes, model.encode(seen[1].roll(1, 0)))


def test_the_encoder_sees_neighbours():
    """Of every sample one of its neighbours and no other, all of them in time; augmented after that."""
    x = blobs()
    near = torch.stack([(torch.arange(60) + shift) % 60 for shift in (3, 6)], 1)
    drawn = []

    def recorded(seen, generator):
        drawn.append(seen)
        return seen + 1000

    samples = Samples(x, near, recorded, like=x, at_once=7)
    index, generator = torch.tensor([5, 59, 0]), torch.Generator().manual_seed(0)
    for _ in range(20):
        assert torch.equal(samples.seen(index, x[index], generator), drawn[-1] + 1000)
    for i in range(3):
        came = {tuple(rows[i].tolist()) for rows in drawn}
        assert came == {tuple(x[j].tolist()) for j in near[index[i]]}


def test_contrast_and_neighbours_find_the_digits(digits):
    """k-means on the pixels reaches 0.74, on the codes of an auto-encoder alone less than 0.8."""
    X, y = digits
    near = torch.from_numpy(NearestNeighbors(n_neighbors=5).fit(X).kneighbors(return_distance=False))
    torch.manual_seed(0)
    model = DeepKMeans(*fully_connected_coders(64, hidden=(256, 128)), KMeansHead(10, 10))
    augment = RandomAffine(shape=(1, 8, 8))
    fit_deep_kmeans(
        model, X, pretrain_epochs=30, epochs=15, neighbours=near, augment=augment, contrast=Contrast(), tol=0.0
    )
    labels = model.eval().predict(X).numpy()
    assert normalized_mutual_info_score(y, labels) > 0.84
    assert accuracy(y, labels) > 0.9


def test_contrast_alone_keeps_codes_apart():
    """Without a decoder the attraction would send all codes to a few points."""
    torch.manual_seed(0)
    model = DeepKMeans(nn.Linear(6, 3), None, KMeansHead(3, 3))
    near = (torch.arange(60).unsqueeze(1) + torch.tensor([3, 6])) % 60  # of the same blob
    history = fit_deep_kmeans(model, blobs(), **SHORT, neighbours=near, contrast=Contrast())
    assert len(history.pretraining) == 3 and set(history.pretraining) == {0.0}
    assert sorted(torch.bincount(model.predict(blobs())).tolist()) == [20, 20, 20]


def test_a_frozen_encoder_without_a_decoder():
    model = DeepKMeans(nn.Linear(6, 3).requires_grad_(False), None, KMeansHead(3, 3))
    history = fit_deep_kmeans(model, blobs(), pretrain_epochs=0, epochs=4, schedule=Joint())
    assert history.clustering[-1] < 0.5 and history.reconstruction == [] and history.pretraining == []
    assert model.head.centres.requires_grad


def test_it_ends_when_clusters_stay():
    history = fit_deep_kmeans(small(), blobs(), pretrain_epochs=30, epochs=40, batch_size=16, tol=0.001)
    assert len(history.changed) < 40
    assert max(history.changed[-2:]) < 0.001


def test_a_callback_ends_it():
    history = fit_deep_kmeans(small(), blobs(), **SHORT, callbacks=[lambda epoch, loss, model: epoch == 5])
    assert (len(history), len(history.pretraining), len(history.clustering)) == (5, 3, 3)


def test_annealing_hardens():
    model = small()
    seen = []
    fit_deep_kmeans(
        model,
        blobs(),
        **SHORT,
        annealing=AnnealTemperature(3, start=1.0, end=0.001),
        callbacks=[lambda epoch, loss, model: seen.append(model.head.temperature)],
    )
    # Three epochs before, of which the last ends in the warm start; then epochs 0 to 3.
    assert seen == pytest.approx([0.0, 0.0, 1.0, 1.0, 0.1, 0.01, 0.001])


def test_dead_centres_are_revived():
    """All centres but one at the far side of the sphere, where no code is."""
    model = small()
    x = blobs()
    code = model.encode(x).detach()[0]
    with torch.no_grad():
        model.head.centres.copy_(torch.stack([code, -code, -code]))
    history = fit_deep_kmeans(model, x, pretrain_epochs=0, epochs=6, restarts=0, tol=0.0, batch_size=60)
    assert history.revived[0] == 2 and history.revived[-1] == 0
    assert len(model.predict(x).unique()) == 3


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 12), st.integers(0, 2), st.booleans())
@example(clusters=11, seed=2, spherical=False)
def test_more_clusters_than_distinct_samples(clusters, seed, spherical):
    """k from 1 to n, with copies: finite weights, labels in range, copies at one place."""
    x = blobs(6)[[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]]
    model = small(seed, clusters=clusters, spherical=spherical)
    history = fit_deep_kmeans(model, x, pretrain_epochs=1, epochs=2, tol=0.0, seed=seed)
    assert all(value.isfinite().all() for value in weights(model).values())
    assert np.isfinite(history.clustering).all()
    labels = model.predict(x)
    assert labels.max() < clusters
    # Two centres at one place are told apart by rounding, so the labels of copies may differ, but not the places.
    places = model.head.positions.detach()[labels]
    torch.testing.assert_close(places[0::2], places[1::2], rtol=0, atol=1e-6)


def test_constant_data():
    model = small()
    history = fit_deep_kmeans(model, torch.ones(12, 6), **SHORT)
    assert np.isfinite(history.pretraining).all() and np.isfinite(history.clustering).all()


def test_bfloat16_learns_the_same(digits):
    X = digits[0][:500]
    errors = []
    for autocast in (None, torch.bfloat16):
        torch.manual_seed(0)
        model = DeepKMeans(*fully_connected_coders(64, hidden=(64,)), KMeansHead(10, 10))
        history = fit_deep_kmeans(model, X, pretrain_epochs=15, epochs=0, batch_size=25, autocast=autocast)
        assert all(value.dtype == torch.float32 for value in weights(model).values())
        errors.append(history.pretraining[-1])
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    assert errors[1] < 0.7 * history.pretraining[0]  # weights that autocast had kept from the first step would not


# ---- Seeds, checkpoints ----------------------------------------------------------------------------------------------


def test_the_seed_decides_everything():
    results = []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        model = small(dropout=0.3)
        torch.manual_seed(global_seed)
        history = fit_deep_kmeans(model, blobs(), **SHORT, seed=seed, augment=jitter)
        assert torch.initial_seed() == global_seed
        results.append((weights(model), history))
    assert same(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert not same(results[0][0], results[2][0])


def jitter(x, generator):
    return x + 0.05 * torch.randn(x.shape, generator=generator)


class Interrupted(Exception):
    pass


def interrupt_at(at):
    def callback(epoch, loss, model):
        if epoch == at:
            raise Interrupted

    return callback


@pytest.mark.parametrize("at", [2, 4, 6])
def test_resumed_is_uninterrupted(tmp_path, at):
    """Bit for bit, with dropout, augmentation, annealing and Adam's memory."""
    options = SHORT | {"augment": jitter, "annealing": AnnealTemperature(4, start=1.0, end=0.01), "seed": 3}
    whole = small(dropout=0.2)
    history = fit_deep_kmeans(whole, blobs(), **options)
    path = tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        fit_deep_kmeans(
            small(dropout=0.2), blobs(), **options, checkpoint=path, checkpoint_every=1, callbacks=[interrupt_at(at)]
        )
    torch.manual_seed(99)  # nothing outside matters
    resumed = small(seed=7, dropout=0.2)
    again = fit_deep_kmeans(resumed, blobs(), **options, checkpoint=path)
    assert same(weights(whole), weights(resumed))
    assert again == history
    finished = small(seed=8, dropout=0.2)
    assert fit_deep_kmeans(finished, blobs(), **options, checkpoint=path) == history
    assert same(weights(finished), weights(whole))
    assert finished.head.temperature == whole.head.temperature


def test_a_checkpoint_of_another_run(tmp_path):
    path = tmp_path / "run.pt"
    fit_deep_kmeans(small(), blobs(), **SHORT, checkpoint=path)
    with pytest.raises(ValueError, match=r"another plan: batch_size is 16 there, 20 here"):
        fit_deep_kmeans(small(), blobs(), **SHORT | {"batch_size": 20}, checkpoint=path)
    with pytest.raises(ValueError, match="another model: .*centres"):
        fit_deep_kmeans(small(clusters=4), blobs(), **SHORT, checkpoint=path)
    with pytest.raises(ValueError, match="written with Adam, not SGD"):
        fit_deep_kmeans(small(), blobs(), **SHORT, checkpoint=path, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="cannot be read"):
        fit_deep_kmeans(small(), blobs(), **SHORT, checkpoint=path)
    torch.save({"net": {}}, path)
    with pytest.raises(ValueError, match="not written by fit_deep_kmeans"):
        fit_deep_kmeans(small(), blobs(), **SHORT, checkpoint=path)


def test_modes_and_requirements_come_back():
    model = small()
    model.eval()
    model.decoder.train()
    fit_deep_kmeans(model, blobs(), **SHORT)
    assert not model.encoder.training and model.decoder.training
    assert all(p.requires_grad for p in model.parameters())


def test_the_best_of_seeds_has_the_least_loss():
    def train(seed):
        return seed, DeepHistory(clustering=[1.0, {0: 0.3, 1: 0.1, 2: 0.2}[seed]])

    best, histories = best_of_seeds(train, range(3))
    assert best == 1 and [history.clustering[-1] for history in histories] == [0.3, 0.1, 0.2]
    with pytest.raises(ValueError, match="0 seeds"):
        best_of_seeds(train, [])


def test_progress_is_shown_when_asked_for(capsys):
    fit_deep_kmeans(small(), blobs(), **SHORT)
    assert capsys.readouterr() == ("", "")
    fit_deep_kmeans(small(), blobs(), **SHORT, progress=True)
    assert "7/7" in capsys.readouterr().err


def test_rows_from_elsewhere():
    """Anything with len and rows by number, as a file would give them."""

    class File:
        def __len__(self):
            return 60

        def __getitem__(self, index):
            assert index.dtype == torch.long
            return blobs()[index]

    model, plain = small(), small()
    fit_deep_kmeans(model, File(), **SHORT)
    fit_deep_kmeans(plain, blobs(), **SHORT)
    assert same(weights(model), weights(plain))


# ---- Several processes -----------------------------------------------------------------------------------------------

TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_deep_kmeans import SHORT, Interrupted, blobs, fit_deep_kmeans, interrupt_at, small

dist.init_process_group("gloo")
folder, rank = Path(sys.argv[2]), dist.get_rank()
results = {}
for name, options in {"spherical": {}, "euclidean": {"spherical": False}}.items():
    model = small(dtype=torch.float64, **options)
    history = fit_deep_kmeans(model, blobs(61, dtype=torch.float64), **SHORT)
    results[name] = history.to_dict(), model.state_dict()

path = folder / "run.pt"
try:
    fit_deep_kmeans(small(dtype=torch.float64), blobs(61, dtype=torch.float64), **SHORT, checkpoint=path,
        checkpoint_every=1, callbacks=[interrupt_at(5)])
except Interrupted:
    pass
model = small(seed=9, dtype=torch.float64)
history = fit_deep_kmeans(model, blobs(61, dtype=torch.float64), **SHORT, checkpoint=path)
results["resumed"] = history.to_dict(), model.state_dict()
torch.save(results, folder / f"{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_what_one_does_alone(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command += [f"--master-port={port}", str(script), str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, (history, state) in first.items():
        assert same(state, second[name][1]), name
        model = small(dtype=torch.float64, spherical=name != "euclidean")
        alone = fit_deep_kmeans(model, blobs(61, dtype=torch.float64), **SHORT).to_dict()
        for key in ("pretraining", "reconstruction", "clustering", "changed", "revived"):
            assert history[key] == pytest.approx(alone[key], rel=1e-8), (name, key)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-7, atol=1e-8)
    assert same(first["resumed"][1], first["spherical"][1])


# ---- The estimator ---------------------------------------------------------------------------------------------------

QUICK = {"hidden": (32,), "n_components": 4, "pretrain_epochs": 10, "max_iter": 4, "random_state": 0}


def test_the_estimator_is_fit_deep_kmeans(digits):
    X = digits[0][:300].numpy()
    model = DeepKMeansNet(10, **QUICK, n_init=2).fit(X)
    assert model.losses_.argmin() == list(model.losses_).index(model.history_.clustering[-1])
    np.testing.assert_array_equal(model.predict(X), model.labels_)
    distances = model.transform(X)
    np.testing.assert_array_equal(distances.argmin(1), model.labels_)
    codes = model.encode(X)
    np.testing.assert_allclose(np.linalg.norm(codes, axis=1), 1, rtol=0, atol=1e-6)
    expected = np.linalg.norm(codes[:, None] - model.cluster_centers_, axis=2)
    np.testing.assert_allclose(distances, expected, rtol=0, atol=1e-3)  # square roots of what float32 leaves of 0
    assert model.inertia_ == pytest.approx(np.square(expected.min(1)).sum(), rel=1e-4)
    assert model.score(X) == pytest.approx(-model.inertia_)
    assert model.prototypes_.shape == (10, 64)
    inside = X.min() - 0.5 < model.prototypes_.min() and model.prototypes_.max() < X.max() + 0.5
    assert inside  # back in the units of X


def test_units_and_offsets_do_not_matter(digits):
    X = digits[0][:200].numpy().astype(float)
    first = DeepKMeansNet(5, **QUICK).fit(X)
    second = DeepKMeansNet(5, **QUICK).fit(1000 + 255 * X)
    np.testing.assert_allclose(second.prototypes_, 1000 + 255 * first.prototypes_, rtol=1e-6)
    np.testing.assert_array_equal(first.labels_, second.labels_)


def test_networks_of_ones_own_and_augmentation(digits):
    X = digits[0][:200].numpy()
    seen = []

    def shifted(x, generator):
        seen.append(x)
        return RandomAffine(shape=(1, 8, 8))(x, generator)

    def coders(features, components):
        encoder, decoder = convolutional_coders((1, 8, 8), components, channels=(4, 4), hidden=16)
        return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), encoder), nn.Sequential(decoder, nn.Flatten())

    model = DeepKMeansNet(10, **QUICK, coders=coders, augment=shifted, standardize=False).fit(X)
    assert model.prototypes_.min() >= 0 and model.prototypes_.max() <= 1
    model = DeepKMeansNet(10, **QUICK, augment=shifted).fit(X)
    assert seen[-1].min() > -1e-5 and seen[-1].max() < 1 + 1e-5  # rows of X, not what the network sees


def test_memory_maps_and_pickles(digits, tmp_path):
    X = (255 * digits[0][:200].numpy()).astype(np.uint8)
    path = tmp_path / "X.npy"
    np.save(path, X)
    model = DeepKMeansNet(10, **QUICK, dtype="float32").fit(np.load(path, mmap_mode="r"))
    expected = DeepKMeansNet(10, **QUICK, dtype="float32").fit(X)
    np.testing.assert_array_equal(model.labels_, expected.labels_)
    loaded = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(loaded.transform(X), model.transform(X))
    np.testing.assert_array_equal(copy.deepcopy(model).predict(X), model.labels_)


# ---- The recipe for CIFAR-100, of which there is no copy here --------------------------------------------------------


def test_the_recipe_for_cifar100_on_a_stand_in(tmp_path, monkeypatch):
    """Two superclasses of five classes, in the format of the archive: each is a data set of its own with k = 5."""
    random = np.random.default_rng(0)
    fine = np.tile(np.arange(10) * 7, 6)  # the classes of a superclass are not numbered from 0, nor in a row
    for name in ("train", "test"):
        images = (25 * fine[:, None] % 256 + random.integers(0, 20, (60, 3072))) % 256
        part = {b"data": images.astype(np.uint8), b"fine_labels": fine.tolist(), b"coarse_labels": (fine % 2).tolist()}
        (tmp_path / name).write_bytes(pickle.dumps(part))
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    benchmark = importlib.import_module("deep_clustering")
    saved = {}
    monkeypatch.setattr(benchmark, "save", lambda name, result: saved.update({name: copy.deepcopy(result)}))
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    arguments = ["--cifar100", str(tmp_path), "--smoke", "--seeds", "0", "--variants", "+ contrast"]
    monkeypatch.setattr(sys, "argv", ["deep_clustering.py", *arguments])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    benchmark.main()
    assert saved.keys() == {"deep_clustering_cifar100-0", "deep_clustering_cifar100-1"}
    for result in saved.values():
        assert result["samples"] == 60
        scores = result["variants"]["+ contrast"]["together"]["mean"]
        assert scores.keys() == {"acc", "nmi", "ari"} and 20 <= scores["acc"] <= 100  # of five classes of equal size
    sets = [(superclass, tuple(x.shape), sorted(set(y))) for superclass, x, y in benchmark.cifar100(tmp_path)]
    assert sets == [(0, (60, 3, 32, 32), list(range(5))), (1, (60, 3, 32, 32), list(range(5)))]


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (torch.zeros(0, 6), {}, ValueError, "data is empty"),
        (blobs(2), {}, ValueError, "2 samples for 3 clusters"),
        (blobs().double(), {}, TypeError, r"data is torch.float64 but the model is torch.float32"),
        (blobs().index_fill(0, torch.tensor([7]), torch.nan), {}, ValueError, "data has 6 NaN"),
        (3, {}, TypeError, "must be a Tensor or have len"),
        (blobs().numpy(), {}, TypeError, "must be a torch.Tensor, got ndarray"),
        (blobs(), {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        (blobs(), {"epochs": -1}, ValueError, "epochs must be at least 0"),
        (blobs(), {"weight": -0.1}, ValueError, "weight must be at least 0"),
        (blobs(), {"step_size": 0.0}, ValueError, "step_size must be greater than 0"),
        (blobs(), {"schedule": "joint"}, TypeError, "schedule must be callable"),
        (blobs(), {"augment": lambda x, generator: x[1:]}, ValueError, "augment must return samples of shape"),
        (blobs(), {"attraction": LogLikelihood}, TypeError, "attraction must be callable"),
        (blobs(), {"contrast": Contrast()}, ValueError, "Pass augment, neighbours or both"),
        (
            blobs(),
            {"neighbours": torch.zeros(59, 2).long()},
            ValueError,
            r"each of the 60 samples, got shape \(59, 2\)",
        ),
        (blobs(), {"neighbours": torch.zeros(60, 0).long()}, ValueError, "at least one number"),
        (blobs(), {"neighbours": torch.zeros(60, 2)}, TypeError, "torch.int64, got torch.float32"),
        (blobs(), {"neighbours": torch.full((60, 2), 60)}, ValueError, "from 0 to 59, got 60 to 60"),
        (blobs(), {"neighbours": [[0]] * 60}, TypeError, "must be a Tensor of row numbers, got list"),
        (blobs(), {"checkpoint": "no/such/folder/run.pt"}, ValueError, "a folder that exists"),
        (blobs(), {"min_share": 2.0}, ValueError, "min_share must be at most 1"),
        (blobs(), {"optimizer": lambda p: torch.optim.SGD(p, 1e9)}, FloatingPointError, "not finite|is nan|is inf|NaN"),
    ],
)
def test_bad_input(data, options, error, message):
    with pytest.raises(error, match=message):
        fit_deep_kmeans(small(), data, **SHORT | options)


def test_bad_models():
    with pytest.raises(TypeError, match="model must be a DeepKMeans, got Linear"):
        fit_deep_kmeans(nn.Linear(6, 3), blobs())
    with pytest.raises(TypeError, match="head must be a KMeansHead"):
        DeepKMeans(nn.Identity(), None, 10)
    with pytest.raises(TypeError, match="encoder must be a torch.nn.Module"):
        DeepKMeans(lambda x: x, None, KMeansHead(3, 3))
    with pytest.raises(ValueError, match="at least 1"):
        KMeansHead(3, 0)
    coder = nn.Linear(6, 3)
    with pytest.raises(ValueError, match="pretraining needs a decoder"):
        fit_deep_kmeans(DeepKMeans(coder, None, KMeansHead(3, 3)), blobs())
    with pytest.raises(ValueError, match=r"codes of shape \(n, 4\)"):
        DeepKMeans(coder, None, KMeansHead(4, 3)).predict(blobs())
    with pytest.raises(ValueError, match=r"decoder gave shape \(60, 5\) for samples of shape \(60, 6\)"):
        fit_deep_kmeans(DeepKMeans(coder, nn.Linear(3, 5), KMeansHead(3, 3)), blobs())
    with pytest.raises(ValueError, match="nothing to pretrain"):
        fit_deep_kmeans(small().requires_grad_(False), blobs())
    zero = nn.Linear(6, 3)
    nn.init.constant_(zero.bias, -100.0)
    with pytest.raises(ValueError, match="60 codes of 60 that are zero"):
        DeepKMeans(nn.Sequential(zero, nn.ReLU()), None, KMeansHead(3, 3)).predict(blobs())
    with pytest.raises(ValueError, match="without one|no decoder"):
        DeepKMeans(coder, None, KMeansHead(3, 3)).prototypes()


def test_bad_shapes_of_coders_and_images():
    with pytest.raises(ValueError, match=r"shape must be \(channels, height, width\)"):
        convolutional_coders((28, 28))
    with pytest.raises(ValueError, match="shape is empty"):
        fully_connected_coders(())
    with pytest.raises(ValueError, match=r"hidden\[1\] must be at least 1"):
        fully_connected_coders(5, hidden=(3, 0))
    with pytest.raises(ValueError, match="temperature must be greater than 0"):
        LogLikelihood(0.0)
    with pytest.raises(ValueError, match="weight must be greater than 0"):
        Contrast(0.0)
    with pytest.raises(ValueError, match="scale must be less than 1"):
        RandomAffine(scale=1.0)
    with pytest.raises(ValueError, match="Say how its vectors are images"):
        RandomAffine()(torch.rand(3, 64))


def test_bad_input_of_the_estimator(digits):
    X = digits[0][:50].numpy()
    with pytest.raises(ValueError, match=r"n_samples=50 should be >= n_clusters=51"):
        DeepKMeansNet(51).fit(X)
    with pytest.raises(ValueError, match="weight must be at least 0"):
        DeepKMeansNet(3, weight=-1.0).fit(X)
    with pytest.raises(ValueError, match="n_clusters == 0, must be >= 1"):
        DeepKMeansNet(0).fit(X)
    with pytest.raises(ValueError, match="n_neighbors"):
        DeepKMeansNet(3, n_neighbors=-1).fit(X)
    with pytest.raises(ValueError, match="contrast needs samples"):
        DeepKMeansNet(3, n_neighbors=0).fit(X)
    with pytest.raises(ValueError, match="NaN"):
        DeepKMeansNet(3).fit(np.full((9, 4), np.nan))
