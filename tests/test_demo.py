"""The demo: what it writes, that it writes the same again, and every kind of file that someone may hand it."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
from PIL import Image
from sklearn.decomposition import sparse_encode

from unrolled import LISTA, solvers
from unrolled.__main__ import main
from unrolled.demo import coding, data, denoising, figures, load_network, networks

FILES = {
    "index.html",
    "results.json",
    "network.pt",
    "layers.html",
    "report.png",
    "gap.png",
    "dictionary.png",
    "layers.png",
    "denoised.png",
    "detail.png",
}


def demo(*arguments):
    return subprocess.run([sys.executable, "-m", "unrolled", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One tiny run, in a process of its own: its folder and its output."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    done = demo("--smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def results(out):
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    del found["timings"]
    return found


def texture(height=40, width=48, seed=0):
    """Grey levels 0..255 with structure."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4)), dtype=np.uint8)
    return coarse.repeat(4, 0).repeat(4, 1)[:height, :width]


def refusal(capsys, *arguments):
    """The one line on stderr with which a call is refused."""
    assert main(list(map(str, arguments))) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("unrolled: ") and printed.err.count("\n") == 1
    return printed.err


class TestRun:
    def test_writes_everything(self, smoke):
        out, done = smoke
        assert {path.name for path in out.iterdir()} == FILES
        assert "Traceback" not in done.stderr and "Warning" not in done.stderr
        assert "10/10" in done.stderr  # the progress bar

    def test_results(self, smoke):
        found = results(smoke[0])
        gaps = {(row["name"], row["iterations"]): row["gap"] for row in found["coding"]["methods"]}
        assert gaps["scikit-learn, lasso_cd", None] == pytest.approx(0, abs=1e-6)
        assert gaps["LISTA with momentum, trained", 4] < gaps["FISTA", 4] < gaps["ISTA", 4]
        curves = found["coding"]["gap_by_iteration"]
        for (name, iterations), gap in gaps.items():
            if name in curves:  # the untrained networks of the curves against the plain solvers of the table
                assert curves[name][iterations - 1] == pytest.approx(gap, rel=1e-4)
        level = found["coding"]["fista_iterations_to_draw_level"]
        goal = curves["LISTA with momentum, trained"][-1]
        assert curves["FISTA"][level - 1] <= goal < curves["FISTA"][level - 2]
        noisy, *others = (row["psnr"] for row in found["denoising"]["methods"])
        assert noisy == pytest.approx(20 * np.log10(255 / 25), abs=0.2)
        assert all(psnr > noisy for psnr in others)

    def test_report_is_of_the_network(self, smoke):
        """Against the report that anybody would make of it, but for the patches, which are others here."""
        found = results(smoke[0])["report"]
        assert found["unit"] == "dB" and len(found["verdicts"]) == 4
        assert found["columns"]["removal"][0] > 0 and min(found["columns"]["drift"]) > 0
        trained = results(smoke[0])["layers"]["LISTA, trained"]["step size"]
        for layer, step in enumerate(found["columns"]["step"]):  # atoms weighted in another way
            assert 0.9 * trained["10%"][layer] < step < 1.1 * trained["90%"][layer]
        page = (smoke[0] / "layers.html").read_text(encoding="utf-8")
        assert "ISTA" in page and page.count("<tr>") > 4

    def test_prints_the_table(self, smoke):
        out, done = smoke
        lines = [line.split() for line in done.stdout.splitlines()]
        for row in results(out)["denoising"]["methods"]:
            iterations = [] if row["iterations"] is None else [str(row["iterations"])]
            assert [*row["name"].split(), *iterations, f"{row['psnr']:.2f}"] in lines
        assert done.stdout.isascii()

    def test_page_shows_every_picture_and_needs_no_network(self, smoke):
        page = (smoke[0] / "index.html").read_text(encoding="utf-8")
        for name in FILES - {"index.html", "results.json", "network.pt", "layers.html"}:
            assert f'src="{name}"' in page
        assert 'href="layers.html"' in page
        assert "http" not in page
        assert "{" not in page.split("</style>")[1]  # no placeholder is left

    def test_pages_usage_works(self, smoke, monkeypatch):
        out = smoke[0]
        from unrolled.demo.page import _USAGE

        monkeypatch.chdir(out)
        names = {}
        exec(_USAGE, names)
        assert names["approximation"].shape == (10, 64)

    def test_network_loads_and_codes_as_it_did(self, smoke):
        out = smoke[0]
        net, D = load_network(out / "network.pt")
        generator = torch.Generator().manual_seed(0)
        samples = data.unit_patches(data.sample_photograph("china.jpg"))
        data.choose(samples, networks.SMOKE.dictionary_patches, generator)
        y = data.choose(data.unit_patches(data.sample_photograph("flower.jpg")), networks.SMOKE.test_patches, generator)
        with torch.no_grad():
            gap = coding.relative_gap(D, y, net(y), coding.optimum(D, y))
        rows = results(out)["coding"]["methods"]
        (row,) = (row for row in rows if row["name"] == "LISTA with momentum, trained")
        assert gap == pytest.approx(row["gap"], rel=1e-5)

    def test_again_is_the_same_and_another_seed_is_not(self, smoke, tmp_path):
        assert main(["--smoke", "--out", str(tmp_path / "a")]) == 0
        assert results(tmp_path / "a") == results(smoke[0])
        first, again = (torch.load(out / "network.pt") for out in (smoke[0], tmp_path / "a"))
        assert all(torch.equal(value, again["state_dict"][key]) for key, value in first["state_dict"].items())
        assert main(["--smoke", "--out", str(tmp_path / "b"), "--seed", "1"]) == 0
        assert results(tmp_path / "b")["coding"] != results(smoke[0])["coding"]

    def test_own_image(self, smoke, tmp_path):
        Image.fromarray(texture(16, 30)).save(tmp_path / "own.png")
        assert main(["--smoke", "--out", str(tmp_path / "o"), "--image", str(tmp_path / "own.png")]) == 0
        assert results(tmp_path / "o")["coding"] != results(smoke[0])["coding"]

    @pytest.mark.slow
    def test_full_size_halves_the_iterations(self, tmp_path):
        assert main(["--out", str(tmp_path)]) == 0
        found = results(tmp_path)
        gaps = {(row["name"], row["iterations"]): row["gap"] for row in found["coding"]["methods"]}
        assert gaps["LISTA with momentum, trained", 16] < gaps["FISTA", 16] / 5
        assert found["coding"]["fista_iterations_to_draw_level"] >= 30
        psnr = {(row["name"], row["iterations"]): row["psnr"] for row in found["denoising"]["methods"]}
        assert psnr["LISTA with momentum, trained to denoise", 16] > psnr["FISTA", 16]


class TestImages:
    """Grey values are right whatever the file holds."""

    def read(self, tmp_path, image, kind="png", **options):
        path = tmp_path / f"image.{kind}"
        image.save(path, **options)
        return data.read_photograph(path)

    def test_grey(self, tmp_path):
        levels = texture()
        found = self.read(tmp_path, Image.fromarray(levels))
        np.testing.assert_allclose(found, levels / 255, atol=1e-6)

    def test_colour(self, tmp_path):
        colours = np.stack([texture(seed=k) for k in range(3)], -1)
        found = self.read(tmp_path, Image.fromarray(colours))
        np.testing.assert_allclose(found, colours @ [0.299, 0.587, 0.114] / 255, atol=1e-6)

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_transparency_is_laid_on_white(self, tmp_path, mode):
        image = Image.fromarray(texture()).convert(mode)
        alpha = texture(seed=1)
        image.putalpha(Image.fromarray(alpha))
        weight = alpha / 255
        found = self.read(tmp_path, image)
        np.testing.assert_allclose(found, weight * texture() / 255 + 1 - weight, atol=1 / 255)

    def test_palette(self, tmp_path):
        levels = texture() // 64
        image = Image.frombytes("P", levels.shape[::-1], levels.tobytes())
        image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 255, 255, 255])
        found = self.read(tmp_path, image)
        np.testing.assert_allclose(found, np.array([0, 0.299, 0.587, 1])[levels], atol=1e-6)

    def test_palette_with_a_transparent_entry(self, tmp_path):
        levels = texture() // 64
        image = Image.frombytes("P", levels.shape[::-1], levels.tobytes())
        image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 255, 255, 255])
        found = self.read(tmp_path, image, transparency=0)
        np.testing.assert_allclose(found, np.array([1, 0.299, 0.587, 1])[levels], atol=1e-6)

    @pytest.mark.parametrize("kind", ["png", "tiff"])
    def test_sixteen_bits(self, tmp_path, kind):
        levels = texture().astype(np.uint16) * 257 - (texture() > 9) * np.uint16(3)
        found = self.read(tmp_path, Image.fromarray(levels), kind)
        np.testing.assert_allclose(found, levels / 65535, atol=1e-6)

    def test_black_and_white(self, tmp_path):
        image = Image.fromarray(texture() > 127)
        np.testing.assert_array_equal(self.read(tmp_path, image), texture() > 127)

    def test_floating_point(self, tmp_path):
        values = texture().astype(np.float32) / 255
        np.testing.assert_allclose(self.read(tmp_path, Image.fromarray(values), "tiff"), values, atol=1e-6)

    def test_orientation_is_followed(self, tmp_path):
        image = Image.fromarray(texture())
        exif = image.getexif()
        exif[0x0112] = 6  # a quarter turn clockwise to show it upright
        np.testing.assert_allclose(self.read(tmp_path, image, exif=exif), np.rot90(texture(), -1) / 255, atol=1e-6)

    def test_large_picture_is_reduced(self, tmp_path):
        found = self.read(tmp_path, Image.fromarray(texture(1200, 1600)))
        height, width = found.shape
        assert height * width <= data.LARGEST < 1.01 * (height + 1) * (width + 1)
        assert width / height == pytest.approx(4 / 3, rel=0.01)


class TestRefusals:
    """One line on stderr, exit code 2, and no traceback."""

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "text.jpg").write_text("this is no image")
        (tmp_path / "empty.png").touch()
        (tmp_path / "folder.png").mkdir()
        buffer = io.BytesIO()
        Image.fromarray(texture(200, 200)).save(buffer, "png")
        (tmp_path / "cut.png").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        Image.fromarray(texture(15, 40)).save(tmp_path / "tiny.png")
        Image.fromarray(np.full((40, 40), 99, np.uint8)).save(tmp_path / "blank.png")
        Image.fromarray(texture().astype(np.float32)).save(tmp_path / "unscaled.tiff")
        Image.fromarray(texture().astype(np.int32) * 1000).save(tmp_path / "integers.tiff")
        return tmp_path

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("missing.png", "there is no file"),
            ("text.jpg", "can't read"),
            ("empty.png", "can't read"),
            ("folder.png", "can't read"),
            ("cut.png", "can't read"),
            ("tiny.png", "40 x 15 pixels"),
            ("blank.png", "shows nothing"),
            ("unscaled.tiff", "within 0..1"),
            ("integers.tiff", "within 0..65535"),
        ],
    )
    def test_unusable_image(self, capsys, folder, name, reason):
        line = refusal(capsys, "--smoke", "--out", folder / "out", "--image", folder / name)
        assert reason in line and name in line
        assert not (folder / "out").exists()

    def test_far_too_many_pixels(self, capsys, folder, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        line = refusal(capsys, "--smoke", "--out", folder / "out", "--image", folder / "tiny.png")
        assert "too many pixels" in line

    def test_folder_that_is_a_file(self, capsys, folder):
        assert "--out" in refusal(capsys, "--smoke", "--out", folder / "text.jpg")

    @pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
    def test_device_that_is_not_there(self, capsys, tmp_path, device):
        line = refusal(capsys, "--smoke", "--out", tmp_path / "out", "--device", device)
        assert f"--device {device}" in line

    @pytest.mark.parametrize("seed", ["-1", "x", "1.5", "4294967296"])
    def test_seed(self, capsys, seed):
        with pytest.raises(SystemExit) as stop:
            main(["--smoke", "--seed", seed])
        assert stop.value.code == 2
        assert "--seed" in capsys.readouterr().err

    @pytest.mark.parametrize("package", ["matplotlib", "PIL"])
    def test_absent_package(self, capsys, tmp_path, monkeypatch, package):
        monkeypatch.setitem(sys.modules, package, None)
        assert "pip install 'unrolled[plot]'" in refusal(capsys, "--smoke", "--out", tmp_path / "out")


class TestParts:
    def test_patches_and_average_are_inverse(self):
        picture = torch.rand(21, 30, generator=torch.Generator().manual_seed(0))
        for stride in (1, 2, 3):
            back = data.average(data.patches(picture, stride), picture.shape, stride)
            torch.testing.assert_close(back, picture)

    def test_patches_are_rows_of_the_picture(self):
        picture = torch.arange(20.0 * 30).reshape(20, 30)
        found = data.patches(picture)
        torch.testing.assert_close(found[1].reshape(8, 8), picture[:8, 1:9])
        assert len(found) == 13 * 23

    def test_optimum_is_scikit_learns(self):
        generator = torch.Generator().manual_seed(0)
        D = torch.nn.functional.normalize(torch.randn(64, 100, generator=generator), dim=0)
        y = torch.nn.functional.normalize(torch.randn(20, 64, generator=generator), dim=1)
        D64, y64 = D.double(), y.double()
        x = sparse_encode(y64.numpy(), D64.T.numpy(), algorithm="lasso_cd", alpha=coding.ALPHA, max_iter=100_000)
        expected = solvers.lasso_objective(D64, y64, torch.from_numpy(x), coding.ALPHA)
        torch.testing.assert_close(coding.optimum(D, y), expected, rtol=1e-8, atol=0)

    @pytest.mark.parametrize("momentum", [False, True])
    def test_untrained_layers_are_the_classical_ones(self, momentum):
        D = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
        D = torch.nn.functional.normalize(D, dim=0)
        net = LISTA(D, **networks.config(networks.SMOKE, 0.3, momentum=momentum))
        found = networks.layer_values(net, D, 0.3)
        for name in ("step size", "threshold"):
            np.testing.assert_allclose(found[name], np.ones((4, 20)), rtol=1e-5)
        if momentum:
            np.testing.assert_allclose(found["momentum"], networks.nesterov(4))

    def test_nesterov(self):
        # t = 1, 1.618034, 2.193527, 2.749791
        np.testing.assert_allclose(networks.nesterov(4), [0, 0, 0.281754, 0.434043], atol=1e-6)

    def test_first_level(self):
        assert coding.first_level([3.0, 2.0, 1.0, 2.0], 1.5) == 3
        assert coding.first_level([3.0, 2.0], 1.5) is None

    def test_psnr(self):
        assert denoising.psnr(torch.full((3, 3), 0.6), torch.full((3, 3), 0.5)) == pytest.approx(20, abs=1e-4)

    def test_busiest_window(self):
        picture = torch.zeros(64, 96)
        picture[40:64, 70:96] = torch.rand(24, 26, generator=torch.Generator().manual_seed(0))
        rows, columns = figures.busiest_window(picture, 32)
        assert (rows.start, columns.start) == (32, 64) and picture[rows, columns].shape == (32, 32)

    def test_perfect_coder_gives_the_picture_back(self):
        picture = torch.rand(20, 23, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(denoising.denoise(picture, lambda y: y, torch.eye(64), 2), picture)
