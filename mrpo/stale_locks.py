"""Locks that killed processes left in the folder where PyTorch builds extensions for DeepSpeed.

Whoever builds or loads an extension holds a lock file there, and whoever finds one waits for it to go, without end. A
process that is killed at that moment would make every later run hang.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

# A holder that lets go closes the file and then removes it: one look could fall between the two.
_LOOKS, _PAUSE = 3, 0.1


def extension_root() -> Path:
    """The folder under which PyTorch builds extensions."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def remove_stale_locks(root: Path) -> list[Path]:
    """Removes this user's locks under `root` that no process of this machine holds, and returns them.

    Processes on other machines cannot be seen: not for runs on several hosts whose `root` is one folder.
    """
    removed = []
    for path in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            # One process at a time looks and removes: else one could remove the lock that another has just taken.
            fcntl.flock(folder, fcntl.LOCK_EX)
            if _is_abandoned(path):
                path.unlink(missing_ok=True)
                removed.append(path)
        finally:
            os.close(folder)
    return removed


def _is_abandoned(path: Path) -> bool:
    """Whether the lock is this user's, and no process has it open, as its holder does until it lets go."""
    for _ in range(_LOOKS):
        try:
            lock = path.stat()
        except FileNotFoundError:
            return False
        if lock.st_uid != os.getuid() or any(os.path.samestat(lock, opened) for opened in _open_files()):
            return False
        time.sleep(_PAUSE)
    return True


def _open_files() -> Iterator[os.stat_result]:
    """Every open file of every process of this user."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            yield descriptor.stat()
        except OSError:  # closed in the meantime, or another user's
            continue
