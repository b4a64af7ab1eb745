"""Evaluated completions as a JSON file: evaluation-before.json and evaluation-after.json of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mrpo.errors import UserError
from mrpo.records import EvaluatedSample
from mrpo.whole_files import write_whole


def write_evaluated(path: Path, samples: Sequence[EvaluatedSample]) -> None:
    """The whole file or none."""
    write_whole(path, [json.dumps([asdict(sample) for sample in samples])])


def read_evaluated(path: Path) -> list[EvaluatedSample]:
    """What `write_evaluated` wrote.

    Raises:
        UserError: the file cannot be read or is not a list of evaluated samples.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return [
            EvaluatedSample(**{**record, "validity": None if record["validity"] is None else tuple(record["validity"])})
            for record in records
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not a list of evaluated samples, as a run writes it: {error!r}") from None
