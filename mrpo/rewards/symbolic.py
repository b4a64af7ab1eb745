"""Whether two short answers are the same quantity, by math-verify.

math-verify reads the last number it can find: "3 cm" equals "3 mm" to it, "2 left" equals "2 right", and the range
"2-3" equals "4-5". So an answer is handed over only when it is one number, fraction, power or formula as a whole, and
both answers must name the same unit. The grammar also bounds the work: sympy would try to write out 9^9^9 and to expand
(a+b)^9(c+d)^9, its parser tries every reading of nested braces, and math-verify's own time-out is a signal that only
the main thread may set.
"""

from __future__ import annotations

import logging
import re
from itertools import accumulate

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
# A fraction takes no unit: 120/80 mmHg is not 60/40 mmHg.
_PLAIN = re.compile(rf"({_NUMBER}\s*(?:/\s*{_NUMBER}|\^\s*\d{{1,2}}|%))|({_NUMBER})\s*([^\W\d_]\D*)?")
_FORMULA = re.compile(r"\$([^$]+)\$(\D*)|(\\[^$]+)")
_FORMULA_UNIT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}\d]*)\}")
_FORMULA_PART = r"""
    \\(?:[dt]?frac|sqrt|times|cdot|pi|pm|left|right|boxed)(?![a-z])  # known commands
  | \\[%,;!\ ] | [\d.,+\-*/=(){}\s]
  | \^(?:\d|\{-?\d{1,2}\})                                            # small powers
  | (?<![a-z])[a-z](?![a-z])                                          # variables
"""
_SAFE_FORMULA = re.compile(rf"(?:{_FORMULA_PART})+", re.VERBOSE | re.IGNORECASE)
_COMMAND = re.compile(r"\\[a-z]+", re.IGNORECASE)
_POWER_OF_GROUP = re.compile(r"[)}]\s*\^")
_MAX_CHARS = 64
_MAX_POWERS = 2
_MAX_VARIABLES = 2
_MAX_DEPTH = 6  # of parentheses and braces
_EXTRACTION = (LatexExtractionConfig(), ExprExtractionConfig())

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it runs without a time-out


def same_quantity(prediction: str, gold: str) -> bool:
    """True when both answers are one quantity with one unit and math-verify finds them equal."""
    predicted, expected = _quantity(prediction), _quantity(gold)
    if predicted is None or expected is None or predicted[1] != expected[1]:
        return False
    sides = [parse(text, list(_EXTRACTION), parsing_timeout=None) for text in (expected[0], predicted[0])]
    return verify(*sides, timeout_seconds=None)


def _quantity(text: str) -> tuple[str, str] | None:
    """The expression and the unit that `text` consists of, or None when it is not one quantity."""
    text = text.strip().rstrip(".")
    if len(text) > _MAX_CHARS:
        return None
    if plain := _PLAIN.fullmatch(text):
        return (plain[1] or plain[2]).lstrip("+"), _unit(plain[3] or "")
    if not (formula := _FORMULA.fullmatch(text)):
        return None
    body = formula[1] or formula[3]
    unit = _unit(" ".join([*_FORMULA_UNIT.findall(body), formula[2] or ""]))
    body = _FORMULA_UNIT.sub("", body).strip()
    return (f"${body}$", unit) if _is_cheap(body) else None


def _is_cheap(body: str) -> bool:
    """Whether sympy reads and compares a formula at once."""
    variables = set(filter(str.isalpha, _COMMAND.sub(" ", body)))
    return (
        _SAFE_FORMULA.fullmatch(body) is not None
        and body.count("^") <= _MAX_POWERS
        and not _POWER_OF_GROUP.search(body)
        and len(variables) <= _MAX_VARIABLES
        and max(accumulate((char in "({") - (char in ")}") for char in body)) <= _MAX_DEPTH
    )


def _unit(text: str) -> str:
    return " ".join(text.casefold().replace(".", " ").split())
