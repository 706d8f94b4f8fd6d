"""The demo's report: one HTML file beside its pictures, readable without a network."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any

from unrolled.demo.figures import Picture


def coding_table(results: dict[str, Any]) -> list[list[str]]:
    """The comparison of the solvers: a heading and one row a method, as text."""
    clock = "CPU µs a patch" if results["settings"]["device"] == "cpu" else "µs a patch"
    rows = [["sparse coding", "iterations", "gap to optimum", "nonzeros", clock]]
    for row, time in zip(results["coding"]["methods"], results["timings"]["microseconds_a_patch"], strict=True):
        iterations = "many" if row["iterations"] is None else str(row["iterations"])
        rows.append([row["name"], iterations, _gap(row["gap"]), f"{row['nonzeros']:.1f}", f"{time:.1f}"])
    return rows


def _gap(gap: float) -> str:
    # Below, what is seen is how exactly the optimum itself is known.
    return f"{gap:.1e}" if gap > 1e-8 else "< 1e-8"


def denoising_table(results: dict[str, Any]) -> list[list[str]]:
    """The comparison of the denoisers, as text."""
    rows = [["denoising", "iterations", "PSNR in dB"]]
    for row in results["denoising"]["methods"]:
        rows.append([row["name"], str(row["iterations"] or ""), f"{row['psnr']:.2f}"])
    return rows


def as_text(results: dict[str, Any]) -> str:
    """What happened and the two tables, for the terminal."""
    parts = [*map(_aligned, (coding_table(results), denoising_table(results))), *map(textwrap.fill, story(results))]
    return "\n\n".join(["", *parts]).replace("µ", "u")  # whatever the terminal's encoding


def as_html(results: dict[str, Any], pictures: Sequence[Picture]) -> str:
    """The whole page."""
    figures = "\n".join(
        f'<figure><h2>{escape(p.title)}</h2><img src="{escape(p.file)}" alt="{escape(p.title)}">'
        f"<figcaption>{escape(p.caption)}</figcaption></figure>"
        for p in pictures
    )
    return _PAGE.format(
        introduction=_INTRODUCTION,
        story="\n".join(f"<p>{escape(text)}</p>" for text in story(results)),
        coding=_table(coding_table(results)),
        denoising=_table(denoising_table(results)),
        figures=figures,
        usage=escape(_USAGE),
    )


def story(results: dict[str, Any]) -> list[str]:
    """What the figures say, a paragraph an experiment."""
    level, layers = results["coding"]["fista_iterations_to_draw_level"], results["settings"]["num_layers"]
    gaps = {(m["name"], m["iterations"]): m["gap"] for m in results["coding"]["methods"]}
    fista, trained = gaps["FISTA", layers], gaps["LISTA with momentum, trained", layers]
    if level is None:
        needs = f"more than {results['settings']['curve']} iterations of FISTA"
    else:
        needs = f"{level} iterations of FISTA"
    coding = (
        f"After {layers} iterations FISTA's objective is {fista:.2%} above the optimum; after as many layers the "
        f"trained network's is {trained:.2%} above it. That is worth {needs}."
    )
    _, fista, converged, solver, denoiser = (m["psnr"] for m in results["denoising"]["methods"])
    denoising = (
        f"Being nearer to the optimum does not by itself make a better picture: the Lasso, solved to the end, gives "
        f"{converged:.2f} dB, the network trained to solve it {solver:.2f} dB. The same {layers} layers, trained to "
        f"denoise instead, give {denoiser:.2f} dB, {denoiser - fista:+.2f} dB against {layers} iterations of FISTA."
    )
    report, n = results["report"], len(results["report"]["verdicts"])
    removal = report["columns"]["removal"]
    kept = sum(value == 1.0 for value in report["columns"]["decrease"])
    most = max(range(n), key=lambda k: removal[k])
    layers_do = (
        f"Training traded laws for speed: the decrease that theory guarantees of ISTA holds for all patches in {kept} "
        f"of the {n} layers of the network without momentum. Leaving out layer {most} costs most, {removal[most]:.1f} "
        f"{report['unit']}; the layer that costs least, {min(removal):.1f} {report['unit']}."
    )
    return [coding, layers_do, denoising]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns one under the other: names to the left, figures to the right."""
    name, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [
        "  ".join([f"{row[0]:<{name}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths, strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _table(rows: Sequence[Sequence[str]]) -> str:
    def line(row: Sequence[str], tag: str) -> str:
        kind = ' class="ours"' if "trained" in row[0] else ""
        return f"<tr{kind}>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in row)}</tr>"

    body = "\n".join(line(row, "td") for row in rows[1:])
    return f'<div class="scroll"><table><thead>{line(rows[0], "th")}</thead><tbody>{body}</tbody></table></div>'


_INTRODUCTION = """\
<p>A small patch of a photograph can be composed of a few <em>atoms</em> of a dictionary. Which ones, and how much of
each, is the answer to the Lasso: <em>min</em><sub>x</sub> ½‖y &minus; Dx‖² + &alpha;‖x‖₁, for a patch y, a dictionary D
and a code x that is mostly zeros. The usual solvers, ISTA and FISTA, repeat one simple step many times.</p>
<p>Here a fixed number of these steps became the layers of a neural network. Untrained it <em>is</em> the solver. Then
its steps, thresholds and matrices were trained on patches of one photograph, and everything on this page was measured
on another one.</p>"""

_USAGE = """\
import torch
from unrolled import LISTA

saved = torch.load("network.pt", weights_only=True)
dictionary = saved["dictionary"]                   # (64, 256), one atom a column
net = LISTA(dictionary, **saved["config"])
net.load_state_dict(saved["state_dict"])

patches = torch.randn(10, 64)                      # yours: 8x8 pixels each, row by row
patches = patches - patches.mean(1, keepdim=True)  # mean 0 and norm 1, as in training
patches = patches / patches.norm(dim=1, keepdim=True)
codes = net(patches)                               # (10, 256), mostly zeros
approximation = codes @ dictionary.T               # (10, 64)"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>unrolled: a solver that learned to hurry</title>
<style>
:root {{ color-scheme: light; }}
body {{ margin: 0; background: #fff; color: #222; font: 17px/1.6 system-ui, -apple-system, "Segoe UI", sans-serif; }}
main {{ max-width: 46rem; margin: 0 auto; padding: 1.5rem 1.1rem 4rem; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; margin: .5rem 0 1rem; }}
h2 {{ font-size: 1.2rem; margin: 2.5rem 0 .6rem; }}
figure {{ margin: 0; }}
img {{ display: block; width: 100%; height: auto; }}
figcaption {{ color: #555; font-size: .92rem; margin-top: .5rem; }}
.scroll {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .4rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }}
th:first-child, td:first-child {{ text-align: left; padding-left: .3rem; }}
th {{ border-bottom: 2px solid #999; }}
.ours {{ background: #eaf3fa; }}
pre {{ background: #f5f5f3; padding: 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.5; border-radius: 6px; }}
</style>
</head>
<body>
<main>
<h1>A solver that learned to hurry</h1>
{introduction}
<h2>What came of it</h2>
{coding}
{denoising}
{story}
{figures}
<h2>Use the network</h2>
<p>The network is in <code>network.pt</code>, beside this page; every number above, and more, is in
<code>results.json</code>; what each layer does, with equations and verdicts, is in
<a href="layers.html">layers.html</a>.</p>
<pre><code>{usage}</code></pre>
</main>
</body>
</html>
"""
