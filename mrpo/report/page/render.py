"""Puts the page together: a folder that opens from disk, with figures, tables, thumbnails and traces beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import mrpo
from mrpo.errors import UserError
from mrpo.report.export import Column, Row, show, write_table
from mrpo.report.page import sections
from mrpo.report.page.collect import Sources, read_sources
from mrpo.report.page.images import shown, write_thumbnails
from mrpo.report.page.svg import inline_svg, save_figure
from mrpo.report.page.tables import PageTable
from mrpo.report.page.traces import TraceFile, write_chunks
from mrpo.whole_files import remove_path

# In the order in which the page runs them.
_SCRIPTS = ("dom.js", "store.js", "list.js", "trace.js", "app.js")
_STATIC = Path(__file__).parent / "static"
# Nothing from elsewhere and no script in the page itself. Not every browser counts files as 'self' of a page on disk.
_POLICY = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file: 'unsafe-inline'; img-src 'self' file:; "
    "base-uri 'none'; form-action 'none'"
)
# All that a report writes: these folders, and the page.
_FOLDERS = ("data", "figures", "images", "static", "tables")
_PAGE = "index.html"
_GENERATOR = '<meta name="generator" content="mrpo report">'

# Shows a name and a total while its block runs, and gives a function to be told how many more are done.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def write_report(folders: Sequence[Path], out: Path, progress: Progress) -> Path:
    """Write the report of run and evaluation folders; the path of its page.

    An earlier report in `out` is replaced; other files beside it stay.

    Raises:
        UserError: a folder or a file in it is not what it should be, or `out` holds a source or something else.
    """
    out = out.resolve()
    partial = out.with_name(f".{out.name}.partial")
    try:
        sources = read_sources(folders)
        _check_out(out)
        _check_apart(sources, out)
        shutil.rmtree(partial, ignore_errors=True)
        _write(sources, partial, progress)
        _put_in_place(partial, out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out / _PAGE


def _check_out(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    page = out / _PAGE
    if out.exists() and not (page.is_file() and _GENERATOR in page.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"--out {out}: exists and is no report; name a new folder, or one that mrpo report wrote")


def _check_apart(sources: Sources, out: Path) -> None:
    for folder in [source.folder for source in sources.runs] + [source.folder for source in sources.evaluations]:
        if folder.is_relative_to(out):
            raise UserError(f"--out {out}: the source {folder} lies in it; name a folder apart from the sources")


def _put_in_place(partial: Path, out: Path) -> None:
    """Makes `out` the report in `partial`; what else is in `out` stays.

    The old page goes last, as `_check_out` knows a report by it: a replacement that is killed can be repeated.
    """
    if not out.exists() or not any(out.iterdir()):
        partial.rename(out)
        return
    for name in _FOLDERS:
        remove_path(out / name)
        if (partial / name).exists():
            (partial / name).rename(out / name)
    (partial / _PAGE).replace(out / _PAGE)


def _write(sources: Sources, out: Path, progress: Progress) -> None:
    for folder in ("data", "figures", "tables"):
        (out / folder).mkdir(parents=True)
    shutil.copytree(_STATIC, out / "static")
    summary = sections.summary_tables(sources)
    shown_sections = sections.sections(sources)
    for table in (*summary, *(table for section in shown_sections for table in section.tables)):
        write_table(table.rows, table.columns, out / "tables" / table.stem)
    drawn = [figure for section in shown_sections for figure in section.figures]
    with progress("figures", len(drawn)) as advance:
        for figure in drawn:
            save_figure(figure.figure, figure.stem, out / "figures")
            advance(1)
    traces = _write_traces(sources.trace_files, out, progress)
    environment = Environment(
        loader=PackageLoader("mrpo.report.page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["cell"] = _cell
    page = environment.get_template("index.html.jinja").render(
        title=_title(sources),
        version=mrpo.__version__,
        policy=_POLICY,
        scripts=_SCRIPTS,
        cards=sections.cards(sources),
        summary=summary,
        sections=shown_sections,
        inline_svg=lambda figure: inline_svg(figure.figure, figure.stem, figure.title),
        traces=traces,
    )
    (out / _PAGE).write_text(page, encoding="utf-8")


def _title(sources: Sources) -> str:
    names = [*(run.name for run in sources.runs), *(evaluation.name for evaluation in sources.evaluations)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _write_traces(files: Sequence[TraceFile], out: Path, progress: Progress) -> dict[str, Any]:
    """The trace browser's data and images; what the page says of them."""
    paths = list(dict.fromkeys(_image_paths(files)))
    with progress("images", len(paths)) as advance:
        thumbnails = write_thumbnails(paths, out, advance=lambda: advance(1))
    chunks, total = write_chunks(
        files, out / "data", lambda file, images: [shown(_absolute(file, image), thumbnails) for image in images]
    )
    lost = sum(thumbnail is None for thumbnail in thumbnails.values())
    missing = [f"{lost} of {len(paths)} images are missing or broken; a placeholder stands for them"] if lost else []
    if not total:
        missing.append("no source holds traces (a run's samples.jsonl, an evaluation's MODEL.traces.jsonl)")
    return {"chunks": chunks, "total": total, "missing": missing}


def _image_paths(files: Sequence[TraceFile]) -> Iterable[Path]:
    return (_absolute(file, image) for file in files for trace in file.traces() for image in trace["images"])


def _absolute(file: TraceFile, image: str) -> Path:
    """An image is named by an absolute path, or relative to the folder of its trace file."""
    return file.path.parent / image


def _cell(row: Row, column: Column, number: int, table: PageTable) -> Markup:
    """A table's cell: its text, or its value and the interval in small letters under it."""
    text = show(row.get(column.key), column)
    if column is table.columns[0]:
        return Markup('<th scope="row" class="text">{}</th>').format(text)
    if column.is_text:
        return Markup('<td class="text">{}</td>').format(text)
    value, mark, interval = text.replace("-", "\N{MINUS SIGN}").partition(" [")
    note = Markup("<small>[{}</small>").format(interval) if mark else ""
    return Markup('<td class="{}">{}{}</td>').format(table.styles.get((number, column.key), ""), value, note)
