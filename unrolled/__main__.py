"""`python -m unrolled`: turn a solver into a network, train it on one photograph, see what was gained on another."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unrolled.demo import coding, data, denoising, figures, networks, page
from unrolled.demo.coding import Comparison
from unrolled.demo.denoising import Denoising
from unrolled.demo.networks import ALPHA, SMOKE, Size
from unrolled.losses import Lasso
from unrolled.report import ISTATheory, LayerReport
from unrolled.sparse import LISTA


class Refused(ValueError):
    """What is wrong with the call, in one line."""


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit code, 2 where the call can't be served."""
    options = _parser().parse_args(argv)
    try:
        _check_packages()
        device = _device(options.device)
        picture = None if options.image is None else data.read_photograph(options.image)
        out = _folder(options.out)
    except (Refused, data.UnusableImage) as error:
        print(f"unrolled: {error}", file=sys.stderr)
        return 2
    # Batches are too small to gain much from more, and so CPU times can be compared, also on a busy machine.
    torch.set_num_threads(1)
    run(picture, out, seed=options.seed, device=device, size=SMOKE if options.smoke else Size())
    return 0


def run(picture: Tensor | None, out: Path, *, seed: int, device: torch.device, size: Size) -> None:
    """The demo from the photographs to the page; `picture` takes the place of scikit-learn's flower."""
    watch = Stopwatch()
    generator = torch.Generator().manual_seed(seed)
    training = data.sample_photograph("china.jpg")
    held_out = data.sample_photograph("flower.jpg") if picture is None else picture

    watch.begin("dictionary", f"Learning {size.num_atoms} atoms from 8x8 patches of the training photograph")
    samples = data.unit_patches(training)
    few = data.choose(samples, size.dictionary_patches, generator)
    D = data.learn_dictionary(few, size.num_atoms, ALPHA, passes=size.passes, seed=seed).to(device)

    watch.begin("training", f"Unrolling ISTA and FISTA into {size.num_layers} layers, and training without answers")
    trained = {}
    for name, momentum in (("LISTA, trained", False), ("LISTA with momentum, trained", True)):
        trained[name] = net = LISTA(D, **networks.config(size, ALPHA, momentum=momentum))
        batches = networks.random_batches(samples.to(device), size.batch, seed)
        networks.train(net, batches, Lasso(D, ALPHA, supervision=1.0), size.steps)

    watch.begin("coding", "Coding patches of the other photograph by all methods")
    y = data.choose(data.unit_patches(held_out), size.test_patches, generator).to(device)
    compared = coding.compare(D, y, trained, size)

    watch.begin("report", "Asking each layer of the first network what it does, and theory what it should do")
    report = LayerReport(trained["LISTA, trained"], y[: size.report_patches], ISTATheory(D, ALPHA))

    watch.begin("denoising", "Training two networks for noisy patches, and denoising the other photograph")
    denoised = denoising.compare(D, training, held_out, size, seed)

    watch.begin("page", "Writing the page")
    layers = {name: networks.layer_values(net, D, ALPHA) for name, net in trained.items()}
    networks.save_network(out / "network.pt", net, D, networks.config(size, ALPHA, momentum=True))
    pictures = figures.draw(D, compared, layers, report, denoised, out)
    report.save_html(out / "layers.html")
    results = {
        "settings": {"seed": seed, "device": device.type, "alpha": ALPHA, **vars(size)},
        **_findings(compared, denoised, layers, report),
        "timings": {"microseconds_a_patch": [m.microseconds for m in compared.methods], **watch.finish()},
    }
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (out / "index.html").write_text(page.as_html(results, pictures), encoding="utf-8")
    print(page.as_text(results))
    print(f"\nThe page is {out / 'index.html'}, the network {out / 'network.pt'}.")


def _findings(
    compared: Comparison, denoised: Denoising, layers: dict[str, dict[str, Any]], report: LayerReport
) -> dict[str, Any]:
    """What was found, as plain values: the same on every run with the same seed, so without any time."""
    coding_rows = [
        {"name": m.name, "iterations": m.iterations, "gap": m.gap, "nonzeros": m.nonzeros} for m in compared.methods
    ]
    denoising_rows = [{"name": m.name, "iterations": m.iterations, "psnr": m.psnr} for m in denoised.methods]
    return {
        "coding": {
            "methods": coding_rows,
            "fista_iterations_to_draw_level": compared.level,
            "gap_by_iteration": compared.curves,
        },
        "denoising": {"sigma": denoising.SIGMA, "alpha": denoised.alpha, "methods": denoising_rows},
        "layers": {
            name: {title: networks.percentiles(values) for title, values in found.items()}
            for name, found in layers.items()
        },
        "report": {
            "columns": {name: [_plain(value) for value in report.value(name)] for name in report.columns},
            "verdicts": [report.names(layer) for layer in range(len(report))],
            "unit": report.unit,
        },
    }


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None  # JSON has no NaN


class Stopwatch:
    """Says what the demo is at, and how long each part took."""

    def __init__(self) -> None:
        self.marks: list[tuple[str, float, float]] = []

    def begin(self, name: str, text: str) -> None:
        self.marks.append((name, time.perf_counter(), time.process_time()))
        print(f"{len(self.marks)}. {text} ...", flush=True)

    def finish(self) -> dict[str, Any]:
        """Seconds on the clock and of CPU time for each part and in total."""
        ends = [*self.marks[1:], ("", time.perf_counter(), time.process_time())]
        parts = {
            name: {"wall": wall_end - wall, "cpu": cpu_end - cpu}
            for (name, wall, cpu), (_, wall_end, cpu_end) in zip(self.marks, ends, strict=True)
        }
        return {"parts": parts, "total": {k: sum(part[k] for part in parts.values()) for k in ("wall", "cpu")}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unrolled", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--image", metavar="FILE", help="photograph to test on (default: scikit-learn's flower.jpg)")
    parser.add_argument("--out", metavar="DIR", default="demo", help="folder for page and network (default: demo)")
    parser.add_argument("--seed", type=_seed, default=0, metavar="N", help="of all random numbers (default: 0)")
    parser.add_argument("--device", default="cpu", help="where the networks run, such as cuda (default: cpu)")
    parser.add_argument("--smoke", action="store_true", help="a tiny version, to see that everything runs")
    return parser


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {2**32 - 1}, got {text!r}")
    return int(text)


def _check_packages() -> None:
    for module, package in (("matplotlib", "matplotlib"), ("PIL", "pillow")):
        try:
            importlib.import_module(module)
        except ImportError:
            raise Refused(f"the demo draws pictures with {package}: pip install 'unrolled[plot]'") from None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise Refused(f"can't compute on --device {name} here ({reason}); try --device cpu") from None
    return device


def _folder(name: str) -> Path:
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "index.html").touch()
    except OSError as error:
        raise Refused(f"can't write into the folder --out {name} ({error.strerror})") from None
    return path


if __name__ == "__main__":
    sys.exit(main())
