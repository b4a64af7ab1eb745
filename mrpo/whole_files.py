"""Files and folders that are whole whenever they have their name, whatever kills the process or fills the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def partial_path(path: Path) -> Path:
    """Where `path` is written until it is whole: a hidden name in the same folder."""
    return path.with_name(f".{path.name}.partial")


def write_whole(path: Path, parts: Iterable[str]) -> None:
    """Writes the texts `parts`, one after the other, to `path`: the old content or the new is there at any moment.

    Raises:
        OSError: it cannot be written; the old content is still there.
    """
    partial = partial_path(path)
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    flush_folder(path.parent)


def replace_folder(partial: Path, folder: Path) -> None:
    """Gives `partial` the name `folder`. What had that name goes first: a kill may leave none, but no half of one."""
    flush_tree(partial)
    remove_path(folder)
    partial.rename(folder)
    flush_folder(folder.parent)


def remove_path(path: Path) -> None:
    """Removes a file, a folder with all that is in it, or a link, but not what the link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush_tree(folder: Path) -> None:
    """Forces every file and folder below `folder` to disk, so that a rename cannot outrun the data."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        flush_folder(path)


def flush_folder(folder: Path) -> None:
    """Forces the names in `folder` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
