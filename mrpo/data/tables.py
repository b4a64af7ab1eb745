"""Rows from CSV, Parquet and Arrow files, and the images that are stored inside the latter two."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mrpo.data.reading import BadRow, MissingFile, decode_problem, read_text
from mrpo.errors import UserError
from mrpo.pictures import open_image


def first_file(root: Path, *names: str) -> Path:
    """The first of `names` that is a file below `root`.

    Raises:
        MissingFile: none is.
    """
    for name in names:
        if (root / name).is_file():
            return root / name
    raise MissingFile(f"{root} holds none of {', '.join(names)}")


def read_csv(file: Path, *columns: str) -> list[dict[str, str] | BadRow]:
    """The rows of a CSV file whose first line names the columns; a row of another length is a `BadRow`.

    Raises:
        UserError: as `read_text`, the file is no CSV, or one of `columns` is missing.
    """
    lines = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
    try:
        header, *rows = [line for line in lines if line] or [[]]
    except csv.Error as error:
        raise UserError(f"{file}: not valid CSV: line {lines.line_num}: {error}") from None
    _require(file, header, columns)
    return [
        dict(zip(header, row, strict=True))
        if len(row) == len(header)
        else BadRow(f"{len(row)} fields, the first line names {len(header)}")
        for row in rows
    ]


def find_shards(root: Path, split: str, *folders: str) -> list[Path]:
    """The Parquet or Arrow files of a split in the layouts of the Hugging Face hub, in order; empty if there are none.

    Known are `FOLDER/SPLIT-*.parquet`, `FOLDER/SPLIT.parquet`, and `FOLDER/SPLIT/*` as the hub converts to Parquet and
    as `save_to_disk` writes Arrow; FOLDER is one of `folders`, the root, or its `data` and `default`.
    """
    patterns = (f"{split}-*.parquet", f"{split}.parquet", f"{split}/*.parquet", f"{split}/*.arrow")
    for folder in (*folders, ".", "data", "default"):
        for pattern in patterns:
            if files := sorted((root / folder).glob(pattern)):
                return files
    return []


def read_shards(files: Sequence[Path], *columns: str) -> Iterator[dict[str, Any]]:
    """The rows of Parquet or Arrow files one after another, read a few at a time.

    Raises:
        UserError: pyarrow is not installed, a file is broken, or one of `columns` is missing.
    """
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise UserError(f"{files[0]}: reading it needs pyarrow: pip install mrpo[data]") from None

    for file in files:
        try:
            if file.suffix == ".arrow":
                with ipc.open_stream(file) as stream:
                    _require(file, stream.schema.names, columns)
                    for batch in stream:
                        yield from batch.to_pylist()
            else:
                with parquet.ParquetFile(file) as table:
                    _require(file, table.schema_arrow.names, columns)
                    for batch in table.iter_batches(batch_size=64):
                        yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: not readable as {file.suffix[1:]}: {error}") from None


def _require(file: Path, present: Sequence[str], columns: Sequence[str]) -> None:
    absent = [column for column in columns if column not in present]
    if absent:
        raise UserError(f"{file}: no column {', '.join(map(repr, absent))}; it has {', '.join(map(repr, present))}")


class ImageStore:
    """Images from the cells of a table, one picture or file for all cells with the same bytes.

    With a folder they are written there unchanged, as `MD5.FORMAT`; without, they are pictures, decoded on first use.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._stored: dict[str, Path | Image.Image] = {}

    def __call__(self, row: Mapping[str, Any], key: str = "image") -> tuple[Path | Image.Image, str]:
        """The image under `key`, bytes or `{"bytes": …}`, and the MD5 of its bytes in hexadecimal.

        Raises:
            BadRow: there are no bytes, or they cannot be decoded.
        """
        cell = row.get(key)
        data = cell.get("bytes") if isinstance(cell, Mapping) else cell
        if not isinstance(data, bytes) or not data:
            raise BadRow(f'"{key}" holds no image bytes')
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if digest not in self._stored:
            problem = decode_problem(io.BytesIO(data))
            if problem is not None:
                raise BadRow(f'"{key}" cannot be decoded: {problem}')
            self._stored[digest] = self._store(data, digest)
        return self._stored[digest], digest

    def _store(self, data: bytes, digest: str) -> Path | Image.Image:
        image = open_image(io.BytesIO(data))
        if self.folder is None:
            return image
        path = self.folder.resolve() / f"{digest}.{(image.format or 'image').lower()}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        return path
