"""Figures as files for papers, and as SVG inside the page, where they follow its light or dark theme."""

from __future__ import annotations

import io
import re
from pathlib import Path

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from mrpo.report.style import INK, MUTED, figure_style, save_png

# Colours of paper and ink become the page's own; those of data stay.
_THEMED = {
    INK: "--ink",
    MUTED: "--muted",
    "#ffffff": "--surface",
    "#eceef2": "--figure-grid",
    "#c5c9d1": "--figure-axis",
}
_COLOR = re.compile(r"\b(fill|stroke): (" + "|".join(_THEMED) + r")\b")
_SVG_TAG = re.compile(r"<svg\b[^>]*?\bviewBox=\"([^\"]*)\"[^>]*>", re.DOTALL)
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)


def save_figure(figure: Figure, stem: str, folder: Path) -> None:
    """Write FOLDER/STEM.png and .svg; in the SVG letters are outlines, so that it looks the same everywhere."""
    with figure_style():
        save_png(figure, folder / f"{stem}.png")
        # The panels have their places now; laying them out again for each file takes most of the time.
        figure.set_layout_engine("none")
    (folder / f"{stem}.svg").write_text(_svg(figure, stem, fonttype="path"), encoding="utf-8")


def inline_svg(figure: Figure, stem: str, title: str) -> Markup:
    """The figure as an <svg> element with real text, themed by the page's custom properties.

    matplotlib escapes the texts in it, and ids are made the figure's own, as a page holds several.
    """
    svg = _svg(figure, stem, fonttype="none")
    found = _SVG_TAG.search(svg)
    if found is None:
        raise ValueError("matplotlib wrote no <svg> with a viewBox")
    body = _METADATA.sub("", svg[found.end() :])
    body = re.sub(r'\bid="', f'id="{stem}-', body)
    body = re.sub(r'href="#', f'href="#{stem}-', body)
    body = re.sub(r"url\(#", f"url(#{stem}-", body)
    body = _COLOR.sub(lambda color: f"{color[1]}: var({_THEMED[color[2]]}, {color[2]})", body)
    width = found[1].split()[2]
    opening = Markup('<svg viewBox="{}" style="--width: {}" role="img" aria-label="{}">').format(found[1], width, title)
    return opening + Markup(body)


def _svg(figure: Figure, stem: str, *, fonttype: str) -> str:
    buffer = io.StringIO()
    # Without salt and date the same figure would be another file each time.
    with figure_style(), matplotlib.rc_context({"svg.fonttype": fonttype, "svg.hashsalt": stem}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.1, metadata={"Date": None})
    return buffer.getvalue()
