"""A report as one HTML page: styles and drawings within, nothing to load."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from unrolled.report import table
from unrolled.report.columns import Row
from unrolled.report.verdicts import AS_PREDICTED

if TYPE_CHECKING:
    from unrolled.report.layer_report import LayerReport

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { font-weight: 600; } td.text, th.text { text-align: left; white-space: normal; }
td.fails { background: #fde3cf; font-weight: 600; } td.holds { color: #444; }
small { color: #666; } svg { display: block; margin: .2em 0 0 auto; }
.scroll { overflow-x: auto; }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1b; color: #ddd; } td.fails { background: #5a3414; } td.holds { color: #bbb; }
  th, td { border-color: #444; } small { color: #aaa; }
}
"""


def page(report: LayerReport) -> str:
    """The whole page.

    Args:
        report: what it shows.
    """
    title = f"Layer report: {type(report.net).__name__}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head>',
            f"<body><h1>{escape(title)}</h1><p>{escape(table.heading(report))}</p>",
            '<div class="scroll"><table>',
            _header(report),
            *(_line(report, k) for k in range(len(report))),
            "</table></div>",
            "<p><small>Marked with ✗: a prediction that fails by more than its tolerance. Small numbers: what is "
            "predicted, where it differs from layer to layer.</small></p>",
            "<h2>Verdicts</h2>",
            _verdicts(report),
            "<h2>Columns</h2>",
            _columns(report),
            "</body></html>\n",
        ]
    )


def _header(report: LayerReport) -> str:
    cells = ["<th>layer</th>"]
    for name in report.columns:
        says = escape(table.prediction(report, name).strip().replace("...", "")) or "&nbsp;"
        cells.append(f"<th>{escape(name)}<br><small>{says}</small>{spark(report.value(name))}</th>")
    return f'<thead><tr>{"".join(cells)}<th class="text">verdict</th></tr></thead>'


def _line(report: LayerReport, k: int) -> str:
    cells = [f"<td>{k}</td>", *(_cell(report, report.row(name, k)) for name in report.columns)]
    return f'<tr>{"".join(cells)}<td class="text">{escape(table.short(report.names(k)))}</td></tr>'


def _cell(report: LayerReport, row: Row) -> str:
    value = table.number(row.measured)
    if row.holds is None:
        return f"<td>{value}</td>"
    mark, kind = ("", "holds") if row.holds else (" ✗", "fails")
    says = f"{row.kind.sign} {table.number(row.predicted)}"
    varies = table.prediction(report, row.quantity).endswith("... ")
    small = f" <small>{says}</small>" if varies else ""
    title = f"predicted {says}, deviation {table.number(row.deviation)}, tolerance {row.tolerance:g}"
    return f'<td class="{kind}" title="{escape(title)}">{value}{mark}{small}</td>'


def _verdicts(report: LayerReport) -> str:
    rows = [
        f'<tr><td>{v.layer}</td><td class="text">{escape(v.name)}</td><td class="text">{escape(v.reason)}</td></tr>'
        for v in report.verdicts
        if v.name != AS_PREDICTED
    ]
    if not rows:
        return "<p>Every law and equality holds.</p>" if report.predictions() else "<p>None.</p>"
    return (
        f'<table><tr><th>layer</th><th class="text">verdict</th><th class="text">why</th></tr>{"".join(rows)}</table>'
    )


def _columns(report: LayerReport) -> str:
    rows = []
    for column in report.columns.values():
        cells = (column.name, column.kind.name.lower().replace("_", " "), column.equation, column.citation)
        text = "".join(f'<td class="text">{escape(cell)}</td>' for cell in cells)
        rows.append(f"<tr>{text}<td>{column.tolerance if column.kind.sign else ''}</td></tr>")
    names = "".join(f'<th class="text">{name}</th>' for name in ("column", "kind", "equation", "source"))
    return f"<table><tr>{names}<th>tolerance</th></tr>{''.join(rows)}</table>"


def spark(values: np.ndarray, width: int = 70, height: int = 20) -> str:
    """The values of all layers as a small line.

    Args:
        values: (layers,); NaN is left out.
        width, height: in pixels.
    """
    known = [(k, float(v)) for k, v in enumerate(values) if math.isfinite(v)]
    if len(known) < 2:
        return ""
    low, high = min(v for _, v in known), max(v for _, v in known)
    span = high - low or 1.0
    points = " ".join(
        f"{2 + (width - 4) * k / (len(values) - 1):.1f},{height - 2 - (height - 4) * (v - low) / span:.1f}"
        for k, v in known
    )
    line = f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
    return f'<svg width="{width}" height="{height}" role="img" aria-label="by layer">{line}</svg>'
