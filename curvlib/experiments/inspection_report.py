"""What an inspection tells: tables on the terminal, a JSON document, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import torch
from rich.table import Table

from curvlib import __version__
from curvlib.experiments.inspection import Inspected, InspectedRow
from curvlib.experiments.inspection_choice import ON_UNSUPPORTED
from curvlib.experiments.inspection_figures import Picture
from curvlib.experiments.inspection_memory import size_text

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 92rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 0.8rem 0; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; }
td { text-align: right; font-variant-numeric: tabular-nums; } th, td:first-child { text-align: left; }
td.text { text-align: left; } img { max-width: 100%; height: auto; } .note { color: #666; max-width: 60rem; }
code { background: #f2f2f2; padding: 0.1rem 0.3rem; }
"""


@dataclass(frozen=True, kw_only=True)
class _Column:
    title: str
    text: Callable[[InspectedRow], str]


def results_table(inspected: Inspected) -> Table:
    """Return one row an approximation; those that do not apply, or are another one's copy, say so."""
    table = Table(title=_what(inspected))
    table.add_column("approximation", no_wrap=True)
    for column in _columns(inspected):
        table.add_column(column.title, justify="right", no_wrap=True)
    for row in inspected.rows:
        cells = ["-"] * len(_columns(inspected)) if row.reason else [c.text(row) for c in _columns(inspected)]
        table.add_row(row.name, *cells)
    return table


def remarks(inspected: Inspected) -> list[str]:
    """Return a line for everything that the numbers alone do not say."""
    lines = [f"exact: {inspected.note}."] if inspected.note else []
    lines += _unsupported(inspected)
    for row in inspected.rows:
        if row.reason:
            lines.append(f"{row.name} does not apply: {row.reason}")
        if row.note:
            lines.append(f"{row.name}: {row.note}.")
        if row.same_as:
            lines.append(f"{row.name} has the same entries as {row.same_as} on these layers, and is drawn there.")
    return lines


def _unsupported(inspected: Inspected) -> list[str]:
    refusing = [row.name for row in inspected.rows if row.refuses_unsupported]
    if not refusing:
        return []
    outside = set(inspected.unsupported)
    seen = outside & {region.name for region in inspected.selection.regions}
    where = "" if seen else ", none of them in the layers looked at, so that the errors are the same with each of these"
    return [
        f"{', '.join(refusing)} left out for parameters outside every layer ({', '.join(sorted(outside))}): give them "
        f"something with --on-unsupported {', '.join(ON_UNSUPPORTED[1:])}{where}."
    ]


def legend(inspected: Inspected) -> str:
    """Return what the columns are."""
    share = "" if inspected.diagonal_share is None else (
        f" {inspected.diagonal_share:.0%} of the exact matrix's squared Frobenius norm lies in the layers' own blocks."
    )  # fmt: skip
    inverse = "inverse error: the same of the inverses; " if inspected.inspection.inverses else ""
    return (
        "error: relative difference from the exact matrix in the Frobenius norm; spectral: in the spectral norm; "
        f"{inverse}step cosine: between -(C + damping I)^-1 g of the exact matrix and of the approximation, "
        f"damping {inspected.damping:.3g}; on the selected layers, all other parameters held fixed. memory: of the "
        f"operator's numbers, and time to estimate: for the whole model.{share}"
    )


def document(inspected: Inspected, how: Mapping[str, str], files: Sequence[str]) -> dict[str, Any]:
    """Return all numbers, for ``json.dump``.

    Args:
        inspected: what was seen.
        how: how it was made.
        files: names of the files that were written beside.
    """
    selection = inspected.selection
    return {
        "how": dict(how),
        "parameters": selection.total,
        "layers": [{"name": region.name, "size": region.size} for region in selection.regions],
        "matrix": inspected.inspection.matrix,
        "approximated": inspected.inspection.of,
        "on_unsupported": inspected.inspection.on_unsupported,
        "unsupported": dict(inspected.unsupported),
        "damping": inspected.damping,
        "diagonal_share": inspected.diagonal_share,
        "exact": {"note": inspected.note, "eigenvalues": inspected.exact.eigenvalues.tolist()},
        "approximations": [_row_document(row) for row in inspected.rows],
        "files": list(files),
    }


def _row_document(row: InspectedRow) -> dict[str, Any]:
    keys = (
        "name", "reason", "note", "same_as", "error", "spectral_error", "inverse_error", "step_cosine", "layer_errors",
        "memory", "seconds",
    )  # fmt: skip
    eigenvalues = None if row.looked is None else row.looked.eigenvalues.tolist()
    return {**{key: getattr(row, key) for key in keys}, "eigenvalues": eigenvalues}


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    return {
        "versions": f"curvlib {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}, "
        f"matplotlib {matplotlib.__version__}"
    }


def html_page(title: str, inspected: Inspected, pictures: Sequence[Picture], how: Mapping[str, str]) -> str:
    """Return the whole report as one page, pictures inside.

    Args:
        title: what was looked at.
        inspected: what was seen.
        pictures: in order.
        how: how it was made, name to text.
    """
    layers = inspected.selection.regions
    columns = _columns(inspected)
    numbers = _html_table(
        ["approximation", *(column.title for column in columns)],
        [[row.name, *(column.text(row) for column in columns)] for row in inspected.rows if not row.reason],
    )
    blocks = _html_table(
        ["approximation", *(f"layer {region.name}" for region in layers)],
        [[row.name, *map(_number, row.layer_errors)] for row in inspected.rows if not row.reason],
    )
    refused = [[row.name, row.reason] for row in inspected.rows if row.reason]
    reasons = _html_table(["approximation", "reason"], refused, text=True)
    notes = "".join(f"<li>{escape(line)}</li>" for line in remarks(inspected) if "does not apply" not in line)
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_what(inspected))}.</p>",
        f"<h2>Errors, steps and cost</h2>{numbers}<p class='note'>{escape(legend(inspected))}</p>",
        f"<ul class='note'>{notes}</ul>" if notes else "",
        f"<h2>Errors of the layers' own blocks</h2>{blocks}",
        f"<h2>What does not apply</h2>{reasons}" if refused else "",
        *(_html_picture(picture) for picture in pictures),
        f"<h2>How this was made</h2>{_html_table(['', ''], [list(item) for item in how.items()], text=True)}",
    ]
    return (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style></head>\n<body>{chr(10).join(body)}</body></html>\n"
    )


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    title = escape(picture.title)
    return f"<h2>{title[:1].upper()}{title[1:]}</h2><img alt='{title}' src='data:image/png;base64,{data}'>"


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str | None]], *, text: bool = False) -> str:
    cell = "<td class='text'>" if text else "<td>"
    lines = ["<tr>" + "".join(f"<th>{escape(title)}</th>" for title in head) + "</tr>"] if any(head) else []
    lines += ["<tr>" + "".join(f"{cell}{escape(item or '-')}</td>" for item in row) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _columns(inspected: Inspected) -> list[_Column]:
    columns = [
        _Column(title="error", text=lambda row: _number(row.error)),
        _Column(title="spectral", text=lambda row: _number(row.spectral_error)),
        _Column(title="step cosine", text=lambda row: _number(row.step_cosine)),
        _Column(title="memory", text=lambda row: "-" if row.memory is None else size_text(row.memory)),
        _Column(title="time", text=lambda row: _time(row.seconds)),
    ]
    if inspected.inspection.inverses:
        columns.insert(2, _Column(title="inverse error", text=lambda row: _number(row.inverse_error)))
    return columns


def _what(inspected: Inspected) -> str:
    exact, approximated = inspected.inspection.matrix, inspected.inspection.approximated
    return f"Approximations of {approximated or exact} beside the exact {exact}, on {_layers(inspected)}"


def _layers(inspected: Inspected) -> str:
    selection = inspected.selection
    if selection.is_whole:
        return f"all {selection.total:,} parameters"
    names = ", ".join(region.name for region in selection.regions)
    return f"{selection.size:,} of {selection.total:,} parameters, in layers {names}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.2e}"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
