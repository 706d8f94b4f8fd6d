"""A report as text, as plain data and as a data frame."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unrolled.report.columns import Kind, Row
from unrolled.report.verdicts import AS_PREDICTED

if TYPE_CHECKING:
    from unrolled.report.layer_report import LayerReport


def number(value: float) -> str:
    """Three digits, and no more places than they need; a dash for what is not known."""
    if math.isnan(value):
        return "-"
    if 0.9 < abs(value) < 1.1:
        return f"{value:.4g}"  # 1 is the limit of most laws
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
    return f"{value:.1e}"


def text(report: LayerReport) -> str:
    """The table of `print(report)`; a star marks what fails its prediction."""
    header = ["layer", *report.columns, "verdict"]
    predictions = ["theory", *(prediction(report, name) for name in report.columns), ""]
    body = []
    for k in range(len(report)):
        cells = [str(k)]
        for name in report.columns:
            row = report.row(name, k)
            cells.append(number(row.measured) + ("*" if row.holds is False else " " if row.kind.sign else ""))
        body.append([*cells, short(report.names(k)) or "-"])
    rows = [header, predictions, *body] if any(predictions[1:]) else [header, *body]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header) - 1)]
    lines = [
        "  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows
    ]
    rule = "-" * max(map(len, lines))
    lines.insert(2 if len(rows) > len(body) + 1 else 1, rule)
    return "\n".join([heading(report), rule, *lines])


def heading(report: LayerReport) -> str:
    """What the report is of, in one line."""
    samples = math.prod(report.run.batch)
    parts = [f"{type(report.net).__name__}, {len(report)} layers, {samples} samples", f"theory: {report.theory}"]
    if report.quality is not None:
        parts.append(f"{report.goal.describes}: {number(report.quality)}")
    if "removal" in report.columns:
        parts.append(f"removal and repeat in {report.unit}")
    return "; ".join(parts)


def short(names: Sequence[str]) -> str:
    """The verdicts of a layer in a few words: "off theory" once."""
    off = [name.removeprefix("off theory: ") for name in names if name.startswith("off theory: ")]
    others = [name for name in names if not name.startswith("off theory: ")]
    return "; ".join([*others, *([f"off theory: {', '.join(off)}"] if off else [])])


def prediction(report: LayerReport, name: str) -> str:
    """What is predicted of a column: a value if it is one for all layers, else only its kind."""
    kind, values = report.columns[name].kind, report.predicted(name)
    known = values[~_nan(values)]
    if kind is Kind.MEASURED or not len(known):
        return ""
    same = float(known.max() - known.min()) <= 1e-9 * max(1.0, float(abs(known).max()))
    return f"{kind.sign} {number(float(known[0]))} " if same else f"{kind.sign} ... "


def _nan(values: Any) -> Any:
    return values != values


def explanation(report: LayerReport) -> str:
    """Every column with its equation and citation, then every verdict with its reason."""
    lines = ["Columns"]
    for name, column in report.columns.items():
        says = f" {column.kind.value} {number(column.predict)}" if isinstance(column.predict, float) else ""
        rest = ", ".join(part for part in (column.equation, column.citation) if part)
        lines.append(f"  {name}{says}{': ' if rest else ''}{rest}")
    lines += ["", "Verdicts", *(f"  {v}" for v in report.verdicts if v.name != AS_PREDICTED)]
    fine = [v.layer for v in report.verdicts if v.name == AS_PREDICTED]
    if fine:
        lines.append(f"  {AS_PREDICTED}: {'layer' if len(fine) == 1 else 'layers'} {', '.join(map(str, fine))}")
    return "\n".join(lines)


def as_dict(report: LayerReport) -> dict[str, Any]:
    """Everything as plain data."""
    return {
        "network": type(report.net).__name__,
        "layers": len(report),
        "theory": str(report.theory),
        "unit": report.unit,
        "quality": report.quality,
        "quality_is": report.goal.describes,
        "rules": vars(report.rules),
        "columns": [
            {
                "name": column.name,
                "kind": column.kind.name.lower(),
                "tolerance": column.tolerance,
                "equation": column.equation,
                "citation": column.citation,
            }
            for column in report.columns.values()
        ],
        "rows": [row.to_dict() for row in report.rows],
        "verdicts": [verdict._asdict() for verdict in report.verdicts],
    }


def as_frame(report: LayerReport) -> Any:
    """One line a row."""
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError(
            "to_frame needs pandas, which is not installed: pip install pandas. to_dict() has the same rows without."
        ) from error
    columns = {name: [_field(row, name) for row in report.rows] for name in FIELDS}
    columns["verdict"] = [short(report.names(row.layer)) for row in report.rows]
    return pandas.DataFrame(columns)


FIELDS = ("layer", "quantity", "measured", "predicted", "deviation", "kind", "holds")


def _field(row: Row, name: str) -> Any:
    value = getattr(row, name)
    return value.name.lower() if isinstance(value, Kind) else value
