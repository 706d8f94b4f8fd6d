"""The examples run from a command line, leave what they promise, and their networks learn."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.filterwarnings("default")  # warnings of scikit-learn and Pillow are theirs


def run(name, *arguments):
    """The results that an example leaves in its folder."""
    finished = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_own_algorithm(tmp_path):
    printed = run("own_algorithm.py", "--smoke", "--out", tmp_path)
    assert "PSNR" in printed
    for mse in json.loads((tmp_path / "results.json").read_text())["mse"]:
        assert mse["trained"] < mse["untrained"] < mse["noisy"]
        assert mse["converged"] < mse["untrained"]
    assert is_png(tmp_path / "own_algorithm.png")


def test_sparse_patches(tmp_path):
    printed = run("sparse_patches.py", "--smoke", "--out", tmp_path)
    assert "photographs of scikit-learn" in printed
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows
    for row in rows:
        assert 0 < row["trained"] < row["untrained"]
    assert is_png(tmp_path / "sparse_patches.png")


def test_compressed_sensing(tmp_path):
    printed = run("compressed_sensing.py", "--smoke", "--out", tmp_path)
    assert "recovered" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    nmse = {name: row["nmse_db"] for name, row in results["recovery"].items()}
    assert nmse["FISTA"] < nmse["ISTA"] < 0
    for name in ("HyperLISTA, not trained", "ALISTA, searched", "ALISTA, trained", "LISTA-CPSS, trained"):
        assert nmse[name] < nmse["FISTA"] - 10
    ista, fista, steps, momentum = results["spikes"].values()
    assert 0 < momentum < fista < ista
    assert 0 < steps < ista
    assert is_png(tmp_path / "compressed_sensing.png")
    assert is_png(tmp_path / "spikes.png")


def test_images_of_ones_own(tmp_path):
    """Files, folders and arrays, grey or in colour."""
    from PIL import Image

    example = load("sparse_patches")
    colour = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "a.png")
    Image.fromarray(colour[..., 0]).save(tmp_path / "b.png")
    (tmp_path / "notes.txt").write_text("no image")
    np.save(tmp_path / "c.npy", np.stack([colour] * 3))
    np.savez(tmp_path / "d.npz", grey=colour[..., 0], many=np.stack([colour[..., 0]] * 4))

    def shapes(path):
        return [image.shape for image in example.load_images(path, smoke=False)[0]]

    assert shapes(tmp_path) == [(20, 30)] * 2
    assert shapes(tmp_path / "a.png") == [(20, 30)]
    assert shapes(tmp_path / "c.npy") == [(20, 30)] * 3
    assert shapes(tmp_path / "d.npz") == [(20, 30)] * 5
    np.testing.assert_allclose(example.load_images(tmp_path / "c.npy", smoke=False)[0][0], colour.mean(-1))


def test_images_that_are_none(tmp_path):
    example = load("sparse_patches")
    np.save(tmp_path / "vector.npy", np.zeros(5))
    (tmp_path / "notes.txt").write_text("no image")
    for path, message in (
        ("vector.npy", r"shape \(5,\)"),
        ("missing.png", "does not exist"),
        ("notes.txt", "no image"),
    ):
        with pytest.raises(SystemExit, match=message):
            example.load_images(tmp_path / path, smoke=False)
    with pytest.raises(SystemExit, match="8 x 8 pixels"):
        example.patches([np.zeros((7, 50))], 10, 0)


def test_offline_takes_the_photographs(monkeypatch, capsys):
    example = load("sparse_patches")

    def unreachable(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(example.urllib.request, "urlopen", unreachable)
    images, what = example.load_images(None, smoke=False)
    assert what == "photographs of scikit-learn"
    assert [image.ndim for image in images] == [2, 2]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "no route to host" in lines[0]


def test_training_and_test_patches_come_from_different_images():
    example = load("sparse_patches")
    images = [np.full((9, 9), float(i)) for i in range(5)]
    training, test = example.held_out(images)
    assert [image[0, 0] for image in training] == [0, 1, 2, 3]
    assert [image[0, 0] for image in test] == [4]
    only = np.arange(40.0).reshape(20, 2)
    training, test = example.held_out([only])
    np.testing.assert_array_equal(np.concatenate(training + test), only)
    assert len(training[0]) == 15


def test_background(tmp_path):
    printed = run("background.py", "--smoke", "--out", tmp_path)
    assert "F-measure" in printed
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    *_, encoder = rows.values()
    assert encoder["f_measure"] > 0.9 and abs(encoder["gap"]) < 0.1
    assert is_png(tmp_path / "background.png")


def test_digits_features(tmp_path):
    run("digits_features.py", "--smoke", "--out", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["features"]
    assert rows["SparseEncoder"]["accuracy"] > 0.95
    assert is_png(tmp_path / "features.png")


def test_abnormal_events(tmp_path):
    run("abnormal_events.py", "--smoke", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["SC2Net"]["frame_auc"] > 0.8
    assert results["SC2Net"]["pixel_auc"] > 0.8
    assert is_png(tmp_path / "abnormal_events.png")
    assert is_png(tmp_path / "abnormal_frames.png")


def test_segmentation(tmp_path):
    printed = run("segmentation.py", "--smoke", "--out", tmp_path)
    assert "mean IoU" in printed
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    alone = rows["network, more steps"]["mean_iou"]
    assert rows["CRF after network, more steps"]["mean_iou"] > alone + 0.1
    assert rows["joint"]["mean_iou"] > alone + 0.1
    assert is_png(tmp_path / "segmentation.png")


def test_long_unroll(tmp_path):
    printed = run("long_unroll.py", "--smoke", "--out", tmp_path)
    assert "kB held" in printed
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    exact = rows["Backprop()"][0]
    assert abs(rows["Checkpointed(9)"][0]["psnr"] - exact["psnr"]) < 0.01
    assert abs(rows["Implicit()"][0]["psnr"] - exact["psnr"]) < 0.05
    assert rows["Implicit()"][0]["bytes"] < exact["bytes"] / 20
    assert is_png(tmp_path / "long_unroll.png")


def test_design_loop(tmp_path):
    printed = run("design_loop.py", "--smoke", "--out", tmp_path)
    assert "add momentum" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    design, fista = results["rows"]["the design"], results["rows"]["FISTA, 5 iterations"]
    assert design["layers"] < 5 and design["gap_db"] < fista["gap_db"]
    assert is_png(tmp_path / "design_loop.png") and is_png(tmp_path / "report.png")
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_learned_pde(tmp_path):
    run("learned_pde.py", "--smoke", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    psnr = results["psnr"]
    assert sum(psnr["learned PDE"]) > sum(psnr["learned PDE, not trained"]) + 0.5
    assert results["asymmetry"] < 1e-3
    assert is_png(tmp_path / "learned_pde.png")


def test_seeded_diffusion(tmp_path):
    run("seeded_diffusion.py", "--smoke", "--out", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    error = {name: row["mean_absolute_error"] for name, row in rows.items()}
    assert error["diffused, trained"] < error["diffused, not trained"] - 0.01
    assert is_png(tmp_path / "seeded_diffusion.png")


def test_decoupled_mlp(tmp_path):
    printed = run("decoupled_mlp.py", "--smoke", "--out", tmp_path)
    assert "test accuracy" in printed
    curves = json.loads((tmp_path / "results.json").read_text())["accuracy"]
    assert curves["backpropagation"][-1] > 0.85 and curves["cDNI"][-1] > 0.75
    assert is_png(tmp_path / "decoupled_mlp.png")


def test_deep_clustering(tmp_path):
    run("deep_clustering.py", "--smoke", "--out", tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows["trained together"]["nmi"] > 50
    assert is_png(tmp_path / "deep_clustering.png")


def test_denoise(tmp_path):
    printed = run("denoise.py", "--smoke", "--out", tmp_path)
    assert "CPU s" in printed
    psnr = json.loads((tmp_path / "results.json").read_text())["psnr"]
    assert psnr["TNRD"] > psnr["DCT shrinkage"] + 0.3 > psnr["noisy"] + 4
    assert is_png(tmp_path / "denoise.png") and is_png(tmp_path / "denoised.png")


def test_deblur(tmp_path):
    run("deblur.py", "--smoke", "--out", tmp_path)
    rows = {row["what"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert rows["true kernel"]["psnr"] > rows["blurred"]["psnr"] + 2
    assert rows["true kernel"]["kernel_error"] < 1e-4 < rows["schedule by hand"]["kernel_error"] < 1
    assert is_png(tmp_path / "deblur.png")


def test_train_distributed(tmp_path):
    run("train_distributed.py", "--smoke", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert max(results["differences"].values()) < 1e-10 and results["moved"] > 1e-2
    one, half = results["bytes"].values()
    assert half["all"] < 0.52 * one["all"]
    assert is_png(tmp_path / "train_distributed.png")


def test_sketch(tmp_path):
    printed = run("sketch.py", "--smoke", "--out", tmp_path)
    assert "layers counted: 16.000000" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["objective"]["all 256 numbers"] < 1e-6 < results["objective"]["a quarter, 64"]
    assert results["recovered"] < 1e-4
    assert results["nearest"]["2048"] > 0.8 > results["nearest"]["2"]
    assert is_png(tmp_path / "sketch.png")


def test_boundary_tree(tmp_path):
    printed = run("boundary_tree.py", "--smoke", "--out", tmp_path)
    assert "tree on learned features" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["tree on learned features"]["examples"] < results["tree on pixels"]["examples"] / 2
    assert results["moons"]["error"] < 2
    for name in ("boundary_tree", "boundary_tree_walks", "boundary_tree_moons"):
        assert is_png(tmp_path / f"{name}.png")


def test_halting(tmp_path):
    run("halting.py", "--smoke", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["easy"] < results["hard"]
    assert is_png(tmp_path / "halting.png")


def test_attend_infer_repeat(tmp_path):
    run("attend_infer_repeat.py", "--smoke", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["after"]["reconstruction MSE"] < results["before"]["reconstruction MSE"]
    assert is_png(tmp_path / "air.png")
