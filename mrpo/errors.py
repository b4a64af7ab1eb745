"""The one exception for input that a user can fix: printed without a traceback, exit status 2."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message names the file, key or value that is wrong and what would be right."""
