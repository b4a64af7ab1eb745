"""Text for people: model output made harmless, numbers and durations made short."""

from __future__ import annotations

import math
import re

_ESCAPE_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor movement, erasing
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC: window titles, links, clipboard
    r"|(?:\x1b[PX^_]|[\x90\x98\x9e\x9f])[^\x1b\x9c]*(?:\x1b\\|\x9c)?"  # DCS, SOS, PM, APC strings
    r"|\x1b[ -/]*[0-~]"  # two-character escapes
)
# C0 but tab and newline, DEL, C1, and the bidirectional overrides that make text read as what it is not.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")

UNDEFINED = "–"  # noqa: RUF001 - an en dash, the typographer's sign for "no value"


def clean_text(text: str) -> str:
    """`text` without terminal escapes and control characters; tabs and newlines stay, lone surrogates become U+FFFD."""
    return _SURROGATE.sub("\ufffd", _CONTROL.sub("", _ESCAPE_SEQUENCE.sub("", text)))


def format_number(value: float | None, digits: int = 2) -> str:
    """`value` with `digits` decimals and without the zero before the point: .61, -.02, 1.31; a dash when undefined."""
    if value is None or not math.isfinite(value):
        return UNDEFINED
    text = f"{value:.{digits}f}"
    if float(text) == 0.0:
        text = text.removeprefix("-")
    return re.sub(r"^(-?)0\.", r"\1.", text)


def format_compact(value: float | None) -> str:
    """`value` with two or three significant digits, as 1e-04 where a decimal would be long; a dash when undefined."""
    if value is None or not math.isfinite(value):
        return UNDEFINED
    size = abs(value)
    if value == 0.0:
        return "0"
    if not 1e-3 <= size < 1e5:
        return f"{value:.1e}".replace(".0e", "e")
    return format_number(value, 3 if size < 0.1 else 2 if size < 10 else 1 if size < 100 else 0)


def format_duration(seconds: float) -> str:
    """Whole seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
