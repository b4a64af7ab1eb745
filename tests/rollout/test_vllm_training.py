"""Training with vLLM through the real launcher: the sampler draws from the very policy that is trained."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEEPSPEED = Path(sys.executable).parent / "deepspeed"
SHORT = (
    *("optim.steps=2", "optim.batch_size=32", "optim.lr=1e-3", "optim.warmup_steps=0", "rollout.group_size=4"),
    *("rollout.max_tokens=64", "data.eval_size=8", "checkpoint.every=0", "log.tensorboard=false", "log.plots=false"),
)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.timeout(900),
]


def _train(out: Path, port: int, *words: str) -> list[dict[str, float]]:
    """The metrics of each step of a run of two processes."""
    environment = {"TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [str(DEEPSPEED), "--master_port", str(port), "--num_gpus", "2", str(ROOT / "mrpo/train.py")]
    done = subprocess.run(
        [*command, f"output_dir={out}", *SHORT, *words], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def _assert_on_policy(steps: list[dict[str, float]]) -> None:
    """Both steps sampled from the trained weights: lr is high enough for stale ones to show in the second."""
    assert len(steps) == 2
    for step in steps:
        assert 0 < step["mismatch/mean"] < 1e-5
        assert step["mismatch/max"] < 1e-3
        assert step["mismatch/kl"] < 1e-8
        assert step["mismatch/effective"] == pytest.approx(1.0, abs=1e-6)
        assert step["grad_norm"] > 0


@pytest.mark.usefixtures("only_launched_engines")
@pytest.mark.parametrize(("stage", "tensor_parallel"), [(2, 2), (3, 1)])
def test_colocated_engines_sample_from_the_trained_policy(stage: int, tensor_parallel: int, tmp_path: Path) -> None:
    steps = _train(
        tmp_path / "run",
        29610 + stage,
        "rollout.engine=vllm",
        "rollout.enforce_eager=true",
        f"rollout.tensor_parallel={tensor_parallel}",
        f"deepspeed.zero_stage={stage}",
    )
    _assert_on_policy(steps)


def test_a_server_samples_from_the_trained_policy(server_url: str, tmp_path: Path) -> None:
    steps = _train(
        tmp_path / "run",
        29615,
        "rollout.engine=vllm_server",
        f"rollout.servers=[{server_url}]",
        "deepspeed.zero_stage=2",
    )
    _assert_on_policy(steps)
