"""Downloads: what is here is not fetched, a half download is never taken for a whole, and errors name the remedy."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from mrpo.data.hub import REPOSITORIES, data_folder, local_or_hub
from mrpo.errors import UserError


class FakeHub:
    """Stands in for HfApi: writes one JSON file and one archive, or breaks off after the first."""

    breaks_off = False
    requests: list[tuple[str, Any]]

    def __init__(self) -> None:
        self.requests = type(self).requests

    def dataset_info(self, repo_id: str) -> None:
        self.requests.append(("info", repo_id))

    def snapshot_download(self, repo_id: str, *, repo_type: str, allow_patterns: list[str], local_dir: Path) -> str:
        self.requests.append((repo_type, allow_patterns))
        (local_dir / "train.json").write_text("[]")
        if self.breaks_off:
            raise ConnectionError("connection reset\nby peer")
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("imgs/xmlab1/source.jpg", b"picture")
        (local_dir / "imgs.zip").write_bytes(packed.getvalue())
        return str(local_dir)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    class Hub(FakeHub):
        requests: list[tuple[str, Any]] = []  # noqa: RUF012

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, hub: type[FakeHub]) -> None:
    assert local_or_hub(tmp_path, "owner/name", ["*"]) == tmp_path
    assert hub.requests == []


def test_a_download_is_unpacked_and_found_the_next_time(tmp_path: Path, hub: type[FakeHub]) -> None:
    root = tmp_path / "data/slake"
    assert data_folder("slake", root) == root
    assert (root / "imgs/xmlab1/source.jpg").read_bytes() == b"picture"
    assert hub.requests == [("info", "BoKelvin/SLAKE"), ("dataset", ["*.json", "imgs.zip"])]
    assert data_folder("slake", root) == root
    assert len(hub.requests) == 2


def test_without_a_root_it_goes_beside_the_cache(
    tmp_path: Path, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert local_or_hub(None, "owner/name", ["*"]) == tmp_path / "mrpo/owner--name"


def test_a_broken_off_download_is_not_taken_for_the_whole(tmp_path: Path, hub: type[FakeHub]) -> None:
    root = tmp_path / "slake"
    hub.breaks_off = True
    with pytest.raises(
        UserError, match="BoKelvin/SLAKE failed: connection reset\\. Name a folder that holds"
    ) as caught:
        data_folder("slake", root)
    assert str(root) in str(caught.value)
    assert not root.exists()
    hub.breaks_off = False
    assert (data_folder("slake", root) / "imgs.zip").exists()


def test_offline_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    partial = tmp_path / ".none.partial"
    partial.mkdir()
    (partial / "train.json").write_text("half")
    with pytest.raises(UserError, match=r"none does not exist, and the download .*owner/name failed: .*offline"):
        local_or_hub(tmp_path / "none", "owner/name", ["*.json"])
    assert not (tmp_path / "none").exists()


def test_sets_that_are_not_on_the_hub_need_their_folder(tmp_path: Path) -> None:
    assert "mimic_vqa" not in REPOSITORIES
    assert data_folder("mimic_vqa", tmp_path) == tmp_path
    for root in (None, tmp_path / "none"):
        with pytest.raises(UserError, match="must be the folder of mimic_vqa's files; they are not on the hub"):
            data_folder("mimic_vqa", root)
