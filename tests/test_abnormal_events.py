"""The shared mathematics of the abnormal-event example: flow, patches, scores."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import roc_auc_score


def load():
    path = Path(__file__).parent.parent / "examples" / "abnormal_events.py"
    spec = importlib.util.spec_from_file_location("abnormal_events", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load()


@pytest.mark.parametrize("velocity", [(0.4, 0.0), (-0.5, 0.2), (0.0, -0.3)])
def test_flow_of_a_pattern_that_moves_as_one(velocity):
    """(u, v) is x and y: the flow of a texture that shifts by a known vector each frame."""
    rng = np.random.default_rng(0)
    texture = 40 * ndimage.gaussian_filter(rng.standard_normal((60, 60)), 2, mode="wrap")
    texture *= 30 / texture.std()
    clip = np.stack(
        [ndimage.shift(texture, (velocity[1] * t, velocity[0] * t), order=3, mode="grid-wrap") for t in range(12)]
    )
    u, v = example.lucas_kanade(clip.astype(np.float32), np.ones(clip.shape, np.float32), 1e-3)
    inner = np.s_[4:-4, 12:-12, 12:-12]
    # Central differences take a gradient of this texture a few per cent too low in space, but less so in time, and the
    # aperture differs from place to place: hence the median, and 0.03 pixels.
    assert abs(np.median(u[inner]) - velocity[0]) < 0.03
    assert abs(np.median(v[inner]) - velocity[1]) < 0.03


def test_flow_is_zero_where_nothing_is_foreground():
    clip = np.random.default_rng(0).normal(size=(6, 20, 20)).astype(np.float32)
    u, v = example.lucas_kanade(clip, np.zeros_like(clip))
    assert not u.any() and not v.any()


@pytest.mark.parametrize("view", example.VIEWS, ids=lambda view: view.name)
def test_views_share_one_grid(view):
    features = {name: torch.randn(2, 80, 120) for name in view.channels}
    assert view.patches(features).shape == (2, 20, 30, len(view.channels) * view.size**2)


def test_a_patch_is_what_lies_around_its_place():
    view = example.View("speed", ("speed",), 2, 5)
    speed = torch.randn(1, 80, 120)
    patch = view.patches({"speed": speed})[0, 3, 4].reshape(5, 5)
    pooled = speed.reshape(40, 2, 60, 2).mean((1, 3))
    torch.testing.assert_close(patch, pooled[4:9, 6:11])


def test_cost_of_still_patches_is_half_their_energy():
    """The shortcut for patches in which nothing moves is the cost of the code 0."""
    moving = torch.zeros(4, 80, 120)
    moving[:, 40:50, 30:60] = torch.rand(4, 10, 30) + 1
    view = example.View("speed", ("speed",), 2, 5)
    patches = example.Patches(view, [{"speed": moving}])
    still = [1e-3 * torch.rand(2, 80, 120)]

    def never(y):
        raise AssertionError("still patches need no code")

    costs = patches.costs({"speed": still[0]}, never)
    y = view.patches({"speed": still[0]}) * patches.scale
    np.testing.assert_allclose(costs, y.square().sum(-1).numpy() / 2, rtol=1e-5)
    # Training patches have norm 1 in the mean square.
    assert patches.training.square().sum(1).mean().item() == pytest.approx(1, rel=1e-4)


def pixel_auc_by_thresholds(maps, labels, masks):
    """The definition, threshold by threshold."""
    every = np.unique(np.concatenate([m.ravel() for m in maps]))
    thresholds = np.concatenate(([-np.inf], every, [np.inf]))[::-1]
    points = []
    for threshold in thresholds:
        found, alarms = [], []
        for clip, label, mask in zip(maps, labels, masks, strict=True):
            for m, abnormal, where in zip(clip, label, mask, strict=True):
                hit = m >= threshold
                if abnormal:
                    # >= 40 % of the pixels that are abnormal
                    found.append(hit[where].sum() >= 0.4 * where.sum())
                else:
                    alarms.append(hit.any())
        points.append((np.mean(alarms), np.mean(found)))
    alarms, found = np.array(points).T
    return np.trapezoid(found, alarms)


@pytest.mark.parametrize("seed", range(3))
def test_pixel_level_auc_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    labels = [rng.random(15) < 0.5, rng.random(10) < 0.5]
    # Whole numbers, so that there are ties; 5 or 6 abnormal pixels, so that 40 % falls on a pixel or between two.
    maps = [rng.integers(0, 9, (len(label), 4, 5)).astype(float) for label in labels]
    masks = []
    for label in labels:
        mask = np.zeros((len(label), 4, 5), bool)
        for t in np.flatnonzero(label):
            mask[t].ravel()[rng.choice(20, rng.integers(5, 8), replace=False)] = True
            maps[len(masks)][t][mask[t]] += 2
        masks.append(mask)
    score = example.pixel_scores(maps, labels, masks)
    assert roc_auc_score(np.concatenate(labels), score) == pytest.approx(
        pixel_auc_by_thresholds(maps, labels, masks), abs=1e-12
    )


def test_a_map_that_marks_the_right_frame_in_the_wrong_place():
    """Frame level forgives it, pixel level does not."""
    label = np.arange(12) >= 6
    mask = np.zeros((12, 8, 8), bool)
    mask[6:, :2, :2] = True
    right, wrong = np.full((2, 12, 8, 8), 0.5)
    right[6:, :2, :2] = 1
    wrong[6:, 6:, 6:] = 1
    wrong[:, :2, :2] = 0.1
    for maps, pixel in ((right, 1.0), (wrong, 0.0)):
        result, _ = example.evaluate([maps], [label], [mask])
        assert result["frame_auc"] == 1
        assert result["pixel_auc"] == pixel


def test_calibration_puts_the_held_out_quantile_at_the_weight():
    rng = np.random.default_rng(0)
    held_out = [rng.random((50, 5, 6))]
    scaled = example.calibrated(held_out, held_out, weight=0.7)
    peaks = example.smooth(scaled)[0].max((1, 2))
    assert np.quantile(peaks, 0.9) == pytest.approx(0.7)


def test_running_sums_undo_the_differences(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (7, 6, 5), dtype=np.uint8)
    delta = np.diff(frames, axis=0, prepend=np.zeros_like(frames[:1]))
    start = np.array([0, 3, 7])
    label = rng.random(7) < 0.5
    np.savez(
        tmp_path / "ped2.npz",
        train_delta=delta,
        test_delta=delta,
        train_start=start,
        test_start=start,
        test_label=label,
        test_mask=np.zeros(frames.shape, bool),
    )
    video = example.load(tmp_path)  # the folder, as well as the file
    np.testing.assert_array_equal(np.concatenate(video.test), frames)
    assert [len(clip) for clip in video.train] == [3, 4]
    with pytest.raises(SystemExit, match="does not exist"):
        example.load(tmp_path / "missing.npz")
    np.savez(tmp_path / "other.npz", x=frames)
    with pytest.raises(SystemExit, match="no array train_delta"):
        example.load(tmp_path / "other.npz")
