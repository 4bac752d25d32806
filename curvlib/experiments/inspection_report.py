"""What an inspection tells: tables on the terminal, a JSON document, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import torch
from rich.table import Table

from curvlib import __version__
from curvlib.experiments.inspection import Inspected, InspectedRow
from curvlib.experiments.inspection_choice import ON_UNSUPPORTED
from curvlib.experiments.inspection_estimate import CG_TOLERANCE, LANCZOS_TOLERANCE
from curvlib.experiments.inspection_figures import Picture
from curvlib.experiments.inspection_matrix import Looked
from curvlib.experiments.inspection_memory import size_text

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 92rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 0.8rem 0; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; }
td { text-align: right; font-variant-numeric: tabular-nums; } th, td:first-child { text-align: left; }
td.text { text-align: left; } figure { margin: 0; }
img { max-width: 100%; height: auto; } .note { color: #666; max-width: 60rem; }
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
    if inspected.interrupted:
        lines.append(f"Interrupted: {', '.join(inspected.interrupted)} not looked at.")
    for names, reason in _grouped(inspected, lambda row: None if row.refuses_unsupported else row.reason):
        lines.append(f"{names} do{'' if ',' in names else 'es'} not apply: {reason}")
    for names, note in _grouped(inspected, lambda row: row.note):
        lines.append(f"{names}: {note}.")
    for names, same in _grouped(inspected, lambda row: row.same_as):
        verb, drawn = ("have", "are") if "," in names else ("has", "is")
        lines.append(f"{names} {verb} the same entries as {same} on these layers, and {drawn} drawn there.")
    return lines


def _grouped(inspected: Inspected, text: Callable[[InspectedRow], str | None]) -> Iterator[tuple[str, str]]:
    """Yield what rows say, each text once, with the names of all rows that say it."""
    names: dict[str, list[str]] = {}
    for row in inspected.rows:
        said = text(row)
        if said:
            names.setdefault(said, []).append(row.name)
    return ((", ".join(group), said) for said, group in names.items())


def _unsupported(inspected: Inspected) -> list[str]:
    refusing = [row.name for row in inspected.rows if row.refuses_unsupported]
    if not refusing:
        return []
    outside = inspected.unsupported
    seen = outside.keys() & {region.name for region in inspected.selection.regions}
    where = "" if seen else " None of them is in the layers looked at: the errors are the same with each of these."
    return [
        f"{', '.join(refusing)} left out, because of parameters outside every layer ("
        f"{'; '.join(f'{name}: {reason}' for name, reason in outside.items())}). Take them in with --on-unsupported "
        f"{', '.join(ON_UNSUPPORTED[1:-1])} or {ON_UNSUPPORTED[-1]}, which says what those parameters get.{where}"
    ]


def legend(inspected: Inspected) -> str:
    """Return what the columns are."""
    inverse = "inverse error: the same of the inverses; " if inspected.inspection.inverses else ""
    share = "" if inspected.diagonal_share is None else (
        f" {inspected.diagonal_share:.0%} of the exact matrix's squared Frobenius norm lies in the layers' own blocks."
    )  # fmt: skip
    estimates = (
        " All by products: the error with its standard error, the spectral error by Lanczos to a relative residual of "
        f"{LANCZOS_TOLERANCE:g}, the steps by conjugate gradients to one of {CG_TOLERANCE:g}."
    )
    held = "" if inspected.selection.is_whole else "; on the selected layers, all other parameters held fixed"
    return (
        "error: relative difference from the exact matrix in the Frobenius norm; spectral: in the spectral norm; "
        f"{inverse}step cosine: between -(C + damping I)^-1 g of the exact matrix and of the approximation, "
        f"damping {inspected.damping:.3g}{held}. memory: of the operator's numbers, and time to estimate: for the "
        f"whole model.{estimates if inspected.inspection.estimate else share}"
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
        "exact": {"note": inspected.note, **_eigenvalues(inspected.exact)},
        "approximations": [_row_document(row) for row in inspected.rows],
        "interrupted": list(inspected.interrupted),
        "files": list(files),
    }


def _row_document(row: InspectedRow) -> dict[str, Any]:
    keys = (
        "name", "reason", "note", "same_as", "error", "error_deviation", "spectral_error", "inverse_error",
        "step_cosine", "layer_errors", "memory", "seconds",
    )  # fmt: skip
    return {**{key: getattr(row, key) for key in keys}, **_eigenvalues(row.looked)}


def _eigenvalues(looked: Looked | None) -> dict[str, Any]:
    if looked is None:
        return {"eigenvalues": None, "rounding": None}
    return {"eigenvalues": looked.eigenvalues.tolist(), "rounding": looked.rounding}


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
    columns = _columns(inspected)
    rows = [row for row in inspected.rows if not row.reason]
    numbers = _html_table(
        ["approximation", *(column.title for column in columns)],
        [[row.name, *(column.text(row) for column in columns)] for row in rows],
    )
    refused = list(_grouped(inspected, lambda row: row.reason))
    reasons = _html_table(["approximation", "reason"], refused, text=True)
    notes = "".join(f"<li>{escape(line)}</li>" for line in remarks(inspected) if " not apply: " not in line)
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_what(inspected))}.</p>",
        f"<h2>Errors, steps and cost</h2>{numbers}<p class='note'>{escape(legend(inspected))}</p>",
        f"<ul class='note'>{notes}</ul>" if notes else "",
        _layer_errors(inspected, rows),
        f"<h2>What does not apply</h2>{reasons}" if refused else "",
        *(_html_picture(picture) for picture in pictures),
        f"<h2>How this was made</h2>{_html_table(['', ''], [list(item) for item in how.items()], text=True)}",
    ]
    return (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style></head>\n<body>{chr(10).join(body)}</body></html>\n"
    )


def _layer_errors(inspected: Inspected, rows: Sequence[InspectedRow]) -> str:
    if inspected.exact is None:
        return ""
    head = ["approximation", *(f"layer {region.name}" for region in inspected.selection.regions)]
    table = _html_table(head, [[row.name, *map(_number, row.layer_errors)] for row in rows])
    return (
        f"<h2>Errors of the layers' own blocks</h2>{table}<p class='note'>Relative, in the Frobenius norm; - where the "
        "exact block is zero.</p>"
    )


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    title = escape(picture.title)
    return (
        f"<h2>{title[:1].upper()}{title[1:]}</h2><figure><img alt='{title}' src='data:image/png;base64,{data}'>"
        f"<figcaption class='note'>{escape(picture.caption)}</figcaption></figure>"
    )


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str | None]], *, text: bool = False) -> str:
    cell = "<td class='text'>" if text else "<td>"
    lines = ["<tr>" + "".join(f"<th>{escape(title)}</th>" for title in head) + "</tr>"] if any(head) else []
    lines += ["<tr>" + "".join(f"{cell}{escape(item or '-')}</td>" for item in row) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def _columns(inspected: Inspected) -> list[_Column]:
    columns = [
        _Column(title="error", text=_error),
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


def _error(row: InspectedRow) -> str:
    deviation = "" if row.error_deviation is None else f" +- {row.error_deviation:.1g}"
    return f"{_number(row.error)}{deviation}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.2e}"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
