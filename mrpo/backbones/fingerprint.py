"""Which weights stand in a folder: two models under one name must not be taken for one."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from mrpo.backbones import model_folder

_BLOCK, _BLOCKS = 1 << 16, 256
_SUFFIXES = (".json", ".jinja", ".safetensors")


def fingerprint(path: str, model_config: Any) -> str:
    """32 hexadecimal digits that change with weights, configuration, tokenizer and prompt style of `model.path`.

    Of a file above 16 MiB only 256 blocks, evenly spread, are read: training moves every tensor. Of a model from the
    hub it is the commit.
    """
    folder = Path(model_folder(path))
    if not folder.is_dir():
        return str(getattr(model_config, "_commit_hash", None) or "")
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as content:
            if size <= _BLOCK * _BLOCKS:
                digest.update(content.read())
                continue
            for block in range(_BLOCKS):
                content.seek(block * (size - _BLOCK) // (_BLOCKS - 1), os.SEEK_SET)
                digest.update(content.read(_BLOCK))
    return digest.hexdigest()
