"""What the parsers of the training script and of the `mrpo` commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_config(parser: argparse.ArgumentParser, help_text: str) -> None:
    """`--config FILE`, at most once."""
    parser.add_argument("--config", type=Path, action=_Once, metavar="FILE", help=help_text)


class _Once(argparse.Action):
    """Refuses an option's second value, where argparse would forget the first one without a word."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        first = getattr(namespace, self.dest)
        if first is not None:
            raise argparse.ArgumentError(self, f"given twice, as {first} and {value}; name one file")
        setattr(namespace, self.dest, value)
