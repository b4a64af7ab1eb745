"""What a judge model is to look at, as text that nobody can take for anything else.

The material is one JSON object between two delimiters. Inside its strings every `<` and `>`, a bracket that opens a
tag such as [INST], and every character that is not to be seen (controls, bidirectional overrides, zero-width and tag
characters, lone surrogates) stands as a JSON escape. So no text of a completion can close the delimiters, forge a
special token of a chat template or hide what it says, and `json.loads` still gives back every text as it was (a pair
of surrogates, which no decoder makes, as the character that it stands for).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

BEGIN, END = "<record>", "</record>"

# Controls, formats (bidirectional, zero-width, tags), unassigned, private, surrogates, line and paragraph separators.
_UNSEEN = frozenset({"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"})
_SUSPECT = re.compile(r"[<>]|\[(?=/?[A-Z])|[^\x20-\x7e]")


def write_record(record: Mapping[str, Any]) -> str:
    """`record` as delimited JSON."""
    return f"{BEGIN}\n{_SUSPECT.sub(_escape, json.dumps(record, ensure_ascii=False))}\n{END}"


def _escape(found: re.Match[str]) -> str:
    character = found.group()
    if character in "<>[":
        return f"\\u{ord(character):04x}"
    return json.dumps(character)[1:-1] if unicodedata.category(character) in _UNSEEN else character
