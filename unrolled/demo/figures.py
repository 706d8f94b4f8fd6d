"""The figures of the page and what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from unrolled.demo.coding import Comparison
from unrolled.demo.denoising import Denoising
from unrolled.demo.networks import nesterov
from unrolled.report import LayerReport


class Picture(NamedTuple):
    """One figure of the page."""

    file: str
    title: str
    caption: str


def draw(
    dictionary: Tensor,
    compared: Comparison,
    layers: dict[str, dict[str, Any]],
    report: LayerReport,
    denoised: Denoising,
    out: Path,
) -> list[Picture]:
    """Write the figures into the folder `out`."""
    from unrolled import plot

    figures: dict[str, Any] = {}
    shown_until = 3 * (compared.level or 20) // 2
    # Networks first, so that they have the same colours in all figures.
    curves = {name: compared.curves[name][:shown_until] for name in (*layers, *compared.curves)}
    figures["gap.png"] = plot.gap_curve(curves, level=(list(layers)[-1], "FISTA")).figure
    order = compared.usage.argsort(descending=True, stable=True)
    figures["dictionary.png"] = plot.dictionary_mosaic(dictionary[:, order.to(dictionary.device)].cpu()).figure

    panels = {
        "step size of an atom, in units of 1/L": {name: values["step size"] for name, values in layers.items()},
        "threshold of an atom, in units of alpha/L": {name: values["threshold"] for name, values in layers.items()},
        "momentum": {name: values["momentum"] for name, values in layers.items() if "momentum" in values},
    }
    first, second, last = panels
    usual = nesterov(len(next(iter(panels[last].values()))))
    figures["layers.png"] = plot.layer_profile(panels, classical={first: 1.0, second: 1.0, last: usual})

    figures["report.png"] = plot.layer_report(report, ["decrease", "lipschitz", "gain", "removal", "zeros", "drift"])

    noisy, fista, *_, trained = denoised.methods
    shown = {
        "clean": denoised.clean,
        f"noisy, {noisy.psnr:.1f} dB": noisy.picture,
        f"FISTA, {fista.iterations} iterations, {fista.psnr:.1f} dB": fista.picture,
        f"trained network, {trained.iterations} layers, {trained.psnr:.1f} dB": trained.picture,
    }
    figures["denoised.png"] = plot.before_after(shown)
    rows, columns = busiest_window(denoised.clean, 128)
    details = {name: picture[rows, columns] for name, picture in shown.items()}
    figures["detail.png"] = plot.before_after(details)

    for name, figure in figures.items():
        figure.savefig(out / name, dpi=150)
    return [Picture(name, *_CAPTIONS[name]) for name in figures]


def busiest_window(picture: Tensor, side: int) -> tuple[slice, slice]:
    """Where in a picture, at most `side` pixels each way, grey values change most from pixel to pixel."""
    height, width = (min(length, side) for length in picture.shape)
    change = picture[1:, 1:] - picture[:-1, :-1]
    # Half a window apart; the change has one row and column less.
    steps = max(1, height // 2), max(1, width // 2)
    activity = change.abs().unfold(0, height - 1, steps[0]).unfold(1, width - 1, steps[1]).mean((2, 3))
    row, column = divmod(int(activity.argmax()), activity.shape[1])
    top, left = row * steps[0], column * steps[1]
    return slice(top, top + height), slice(left, left + width)


_CAPTIONS = {
    "gap.png": (
        "How near to the optimum",
        "How far the Lasso's objective F is above its minimum F*, as (F - F*) / F*, on average over patches of the "
        "photograph that was not trained on, after every iteration of the solvers and every layer of the networks. An "
        "iteration and a layer cost about the same. Networks are trained on what comes out of the last layer alone, so "
        "the layers before it may take detours.",
    ),
    "dictionary.png": (
        "The dictionary",
        "The atoms of which patches are composed, learned from the training photograph. Those that most patches of the "
        "test photograph use come first; grey is 0.",
    ),
    "denoised.png": (
        "A photograph without its noise",
        "Noise of standard deviation 25 (of 255) was put on the test photograph. Every 8x8 patch is then composed anew "
        "of a few atoms, by FISTA or by the network trained to denoise, and overlapping patches are averaged. PSNR: "
        "more is better.",
    ),
    "detail.png": ("The same, enlarged", "The part of the photograph with most detail; the PSNR is that of all of it."),
    "layers.png": (
        "What each layer learned",
        "Before training all layers are the same and lie on the dashed lines, which are ISTA and, for the momentum, "
        "FISTA. Lines are medians over the atoms, bands run from the 10th to the 90th percentile.",
    ),
    "report.png": (
        "What each layer does, and what theory says of it",
        "The network without momentum, layer by layer. Decrease: the share of patches whose objective falls by as much "
        "as an iteration of ISTA guarantees. Lipschitz: by how much the layer can move two codes apart, at most 1 for "
        "ISTA. Gain: by how much it comes nearer to the optimum. Removal: what leaving the layer out costs, in dB. "
        "Zeros: the share of zeros after it. Drift: how far its parameters have moved in training. A law that training "
        "has broken is marked by a cross: that is not a fault, but a description of what the layer has become.",
    ),
}
