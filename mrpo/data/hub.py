"""Data sets from the Hugging Face hub, for those who have no local copy."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

from mrpo.errors import UserError

REPOSITORIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "vqa_rad": ("flaviagiammarino/vqa-rad", ("*.parquet",)),
    "slake": ("BoKelvin/SLAKE", ("*.json", "imgs.zip")),
    "path_vqa": ("flaviagiammarino/path-vqa", ("*.parquet",)),
    "pmc_vqa": ("RadGenome/PMC-VQA", ("train.csv", "test_clean.csv", "images.zip")),
    "quilt_vqa": ("wisdomik/Quilt_VQA", ("*.parquet",)),
    "rad_vqa": ("raidium/RadImageNet-VQA", ("*benchmark*.parquet",)),
}
"""Which repository a data set comes from, and which of its files; `vqa_med` and `mimic_vqa` are not on the hub."""


def data_folder(dataset: str, root: Path | None) -> Path:
    """The folder of a data set's files, downloaded if they are not here and the hub has them.

    Raises:
        UserError: `root` does not exist (or is not given) and the hub lacks the data set, or see `local_or_hub`.
    """
    if dataset in REPOSITORIES:
        return local_or_hub(root, *REPOSITORIES[dataset])
    if root is None or not root.is_dir():
        raise UserError(f"{root or 'data.root'} must be the folder of {dataset}'s files; they are not on the hub")
    return root


def local_or_hub(root: Path | None, repo_id: str, patterns: Sequence[str]) -> Path:
    """The folder with a data set's files: `root` if it exists, else a download of `patterns` from the hub to there.

    Without `root` the download goes to a folder of its own beside the hub's cache and is found there the next time.
    It appears under its name only when complete, ZIP archives unpacked; a broken-off one goes on where it stopped.

    Raises:
        UserError: the files are not here and the hub cannot be reached, or refuses them (a gated set without login).
    """
    from huggingface_hub import HfApi, constants

    folder = root or Path(constants.HF_HOME) / "mrpo" / repo_id.replace("/", "--")
    if folder.exists():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    api = HfApi()
    try:
        api.dataset_info(repo_id)  # fails without network, where snapshot_download takes half a download for the whole
        partial.mkdir(parents=True, exist_ok=True)
        api.snapshot_download(repo_id, repo_type="dataset", allow_patterns=list(patterns), local_dir=partial)
        for archive in sorted(partial.rglob("*.zip")):
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(archive.parent)
        os.replace(partial, folder)
    except Exception as error:  # whatever the HTTP library under huggingface_hub raises, BadZipFile, OSError, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{folder} does not exist, and the download of https://huggingface.co/datasets/{repo_id} failed: {reason}. "
            f"Name a folder that holds the files ({', '.join(patterns)})"
        ) from None
    return folder
