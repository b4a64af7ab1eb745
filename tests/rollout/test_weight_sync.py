"""The checksum: in real processes under DeepSpeed, engines hold the trainer's weights after every sync."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_models import build_engine_model

SCRIPT = Path(__file__).parent / "checksum_ranks.py"
DEEPSPEED = Path(sys.executable).parent / "deepspeed"
# Rounding of float32 through a whole model; weights that differ give 0.1 and more.
TOLERANCE = 5e-5

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(900),
]


def _cases(root: Path) -> dict[str, Path]:
    cases = {family: build_engine_model(family, root / family) for family in ("qwen2_5_vl", "qwen3_vl", "internvl")}
    cases["tied"] = build_engine_model("qwen3_vl", root / "tied", tie_word_embeddings=True)
    if importlib.util.find_spec("peft"):
        cases["qwen2_5_vl-lora"] = cases["qwen2_5_vl"]
    return cases


@pytest.mark.usefixtures("only_launched_engines")
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_engines_hold_the_trained_weights(tensor_parallel: int, tmp_path: Path) -> None:
    cases = _cases(tmp_path)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(SCRIPT.parent.parent)}
    words = [str(tensor_parallel), str(tmp_path), *(f"{case}={path}" for case, path in cases.items())]
    port = str(29600 + tensor_parallel)
    done = subprocess.run(
        [DEEPSPEED, "--master_port", port, "--num_gpus", "2", str(SCRIPT), *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for rank in range(2):
        lines = (tmp_path / f"rank{rank}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [(record["case"], record["stage"]) for record in records] == [(c, s) for c in cases for s in (2, 3)]
        for record in records:
            assert record["start"] < TOLERANCE, record
            assert record["stale"] > 100 * TOLERANCE, record
            assert record["synced"] < TOLERANCE, record
