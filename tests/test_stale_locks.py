"""Locks of killed processes go, those of living ones stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import file_baton

from mrpo.stale_locks import extension_root, remove_stale_locks

HOLDER = """
import runpy, sys, time

assert runpy.run_path(sys.argv[1])["FileBaton"](sys.argv[2]).try_acquire()
print("held", flush=True)
time.sleep(60)
"""


def hold(lock: Path) -> subprocess.Popen[str]:
    """A process that holds a lock as PyTorch does while it builds."""
    command = [sys.executable, "-c", HOLDER, file_baton.__file__, str(lock)]  # without importing torch
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("folder", ["extension", "py311_cpu/extension"])
def test_a_lock_stays_as_long_as_its_holder_lives(tmp_path: Path, folder: str) -> None:
    lock = tmp_path / folder / "lock"
    lock.parent.mkdir(parents=True)
    process = hold(lock)
    try:
        assert remove_stale_locks(tmp_path) == []
        assert lock.exists()
    finally:
        process.kill()
        process.communicate()
    assert lock.exists()
    assert remove_stale_locks(tmp_path) == [lock]
    assert not lock.exists()


def test_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "extension").mkdir()
    library = tmp_path / "extension" / "extension.so"
    library.touch()
    assert remove_stale_locks(tmp_path) == []
    assert library.exists()
    assert remove_stale_locks(tmp_path / "nothing here") == []


def test_the_folder_is_the_one_that_pytorch_builds_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    for root in (tmp_path, None):
        if root is not None:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(root))
        else:
            monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        built = Path(_get_build_directory("extension", verbose=False))
        assert extension_root() in (built.parent, built.parent.parent)
