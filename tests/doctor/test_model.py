"""The model check: sizes against the headers of weight files, and broken folders."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mrpo.backbones import model_folder
from mrpo.doctor.model import check_bertscore, check_model, find_source, get_model, read_model, weight_problems
from mrpo.errors import UserError
from mrpo.settings import load_config

SHIPPED = Path(model_folder("phantom"))


def header(file: Path) -> dict[str, dict[str, list[int]]]:
    with file.open("rb") as opened:
        tensors = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {name: entry for name, entry in tensors.items() if name != "__metadata__"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "model"))


def test_parameters_are_those_of_the_weight_file() -> None:
    tensors = {name: math.prod(entry["shape"]) for name, entry in header(SHIPPED / "model.safetensors").items()}
    size = read_model(load_config()).size
    assert size.parameters == size.trainable == sum(tensors.values())
    frozen = read_model(load_config(None, ["model.freeze_vision=true"])).size
    assert frozen.trainable == sum(count for name, count in tensors.items() if "visual" not in name.split("."))
    assert (size.text.layers, size.text.hidden, size.kv_width) == (3, 128, 2 * 32)


def test_a_large_model_is_counted_without_memory(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    # Qwen3-VL-8B-Instruct, of which its hub page says 9 B parameters (8.77 G in its weight files).
    config["text_config"] |= {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    config["vision_config"] |= {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "patch_size": 16,
        "out_hidden_size": 4096,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }
    (folder / "config.json").write_text(json.dumps(config))
    size = read_model(load_config(None, [f"model.path={folder}"])).size
    assert size.parameters == pytest.approx(8.77e9, rel=1e-3)


def test_the_shipped_model_is_whole() -> None:
    config = load_config()
    check = check_model(config, read_model(config))
    assert check.state == "ok"
    assert check.fact == "phantom: qwen3_vl, 1,253,568 parameters"


def truncate(folder: Path) -> str:
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-1])
    return f"model.safetensors has {size - 1:,} bytes instead of {size:,}"


def empty(folder: Path) -> str:
    (folder / "model.safetensors").write_bytes(b"")
    return "model.safetensors is no safetensors file"


def pointer(folder: Path) -> str:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2507\n")
    return "model.safetensors is no safetensors file"


def remove(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "no weights: model.safetensors is missing"


def pickled(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "only pickled weights (*.bin), which are not read; model.safetensors is missing"


def lose_a_shard(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return "model-00002-of-00002.safetensors is missing"


def break_the_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("[]")
    return "model.safetensors.index.json is not an index of safetensors files"


@pytest.mark.parametrize("damage", [truncate, empty, pointer, remove, pickled, lose_a_shard, break_the_index])
def test_a_broken_folder_is_named_with_what_is_wrong(damage: Callable[[Path], str], folder: Path) -> None:
    assert weight_problems(folder) == []
    expected = damage(folder)
    assert weight_problems(folder) == [expected]
    config = load_config(None, [f"model.path={folder}"])
    check = check_model(config, read_model(config))
    assert check.state == "missing"
    assert expected in check.fact
    assert str(folder) in check.fact


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        read_model(load_config(None, [f"model.path={folder}"]))


def test_the_command_that_fetches_a_model() -> None:
    assert get_model("Qwen/Qwen3-VL-8B-Instruct") == "hf download Qwen/Qwen3-VL-8B-Instruct"
    assert get_model("phantom") is None
    assert get_model("/no/such/folder") is None
    assert get_model(str(SHIPPED)) is None


def test_a_model_that_neither_cache_nor_hub_gives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"model.path=nobody/nothing is neither a folder nor in the hub's cache"):
        find_source("model.path", "nobody/nothing")


def test_the_bertscore_encoder_must_be_whole(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    config = load_config(None, [f"reward.bertscore_model={tmp_path}"])
    assert "no weights" in check_bertscore(config).fact
    shutil.copy(SHIPPED / "model.safetensors", tmp_path)
    assert check_bertscore(config).state == "ok"
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"reward\.bertscore_model"):
        check_bertscore(config)
