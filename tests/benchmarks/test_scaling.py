"""The arithmetic of docs/scaling.md: what it says by hand, and that the document shows what the script computes."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_document_shows_what_the_script_computes() -> None:
    from scaling import DOCUMENT, written

    text = DOCUMENT.read_text(encoding="utf-8")
    assert written(text) == text, "run: python benchmarks/scaling.py --write"


def test_the_document_has_the_command_that_a_server_needs() -> None:
    from mrpo.rollout.vllm_server import server_command
    from mrpo.settings import load_config

    overrides = ["data.root=DATA", "rollout.engine=vllm_server", "rollout.servers=[http://host:8000]"]
    command = server_command(load_config(ROOT / "configs" / "qwen3_vl_8b.yaml", overrides))
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").replace("\\\n", " ")
    assert shlex.join(command) in re.sub(r" +", " ", text)


@pytest.mark.parametrize("line", [0, 1, 2, 3, 4])
def test_the_commands_of_the_document_are_valid_configurations(line: int) -> None:
    from mrpo.settings import load_config

    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^deepspeed .*mrpo/train.py --config (\S+) (.*)$", text, flags=re.MULTILINE)
    assert len(found) == 5
    path, overrides = found[line]
    config = load_config(ROOT / path, overrides.replace(",…,", ",").split())
    assert config.optim.batch_size % config.rollout.group_size == 0


def test_collectives_by_hand() -> None:
    from scaling import Inputs, collective, memory, zero1, zero3

    inputs = Inputs(parameters=1e9, nvlink=400e9, network=25e9, efficiency=0.5, gpus_per_node=8)
    # 2 GB of weights: 7/8 of them at 200 GB/s within a node, 15/16 at 8 x 12.5 GB/s between two.
    assert collective(inputs, 8) == pytest.approx(2e9 * 7 / 8 / 200e9)
    assert collective(inputs, 16) == pytest.approx(2e9 * 15 / 16 / 100e9)
    # 33 samples in passes of 16: three passes, each with two all-gathers and one reduce-scatter.
    assert zero3(inputs, 8, 33) == pytest.approx(9 * collective(inputs, 8))
    assert zero3(replace(inputs, overlap=0.5), 8, 33) == pytest.approx(4.5 * collective(inputs, 8))
    assert zero1(inputs, 8) == pytest.approx(2 * collective(inputs, 8))
    assert memory(inputs, 4) == {"ZeRO 1": 7e9, "ZeRO 2": 5.5e9, "ZeRO 3": 4e9}


def test_latencies_are_those_of_the_distribution() -> None:
    from scaling import Inputs, mean_latency, slowest_verdict, unjudged
    from step_judge import latencies

    inputs = Inputs(judge_median=2.0, judge_tail=10.0)
    drawn = sorted(latencies(10_000, 2.0, 10.0))
    assert drawn[5000] == pytest.approx(2.0, rel=1e-3)
    assert drawn[9900] == pytest.approx(10.0, rel=0.01)
    assert sum(drawn) / len(drawn) == pytest.approx(mean_latency(inputs), rel=0.01)
    assert sum(second > 8.0 for second in drawn) / len(drawn) == pytest.approx(unjudged(inputs, 8.0), abs=2e-4)
    # The slowest of 64, as often as one likes.
    sigma, draw = math.log(5) / 2.3263, random.Random(0)
    slowest = sorted(max(2.0 * math.exp(sigma * draw.gauss(0, 1)) for _ in range(64)) for _ in range(2000))
    assert slowest_verdict(inputs, 64) == pytest.approx(slowest[1000], rel=0.1)


def test_a_step_adds_up_and_names_its_limit() -> None:
    from scaling import Inputs, step

    inputs = Inputs(judge_median=0.01, judge_tail=0.02)
    found = step(inputs, 8, 64)
    assert found.total == 512
    assert found.seconds == pytest.approx(found.rollout + found.update + found.traffic + found.push + found.judge)
    assert found.one_ahead == found.work
    assert (found.limit(), found.limit_ahead()) == ("update", "update")
    assert step(replace(inputs, update=1.0), 8, 64).limit() == "rollout"
    assert step(replace(inputs, nvlink=1e9), 8, 64).limit() == "traffic"
    slow = step(replace(inputs, judge_median=5.0, judge_tail=6.0), 8, 64)
    assert (slow.limit(), slow.limit_ahead()) == ("slowest verdict", "slowest verdict")
    # Two requests under way at once: 64 take 32 times the mean.
    assert step(replace(inputs, judge_concurrency=2), 8, 64).judge == pytest.approx(0.32, rel=0.1)


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("judge", [0.5, 5.0, 20.0])
def test_sampling_ahead_takes_what_a_clock_says(judge: float, ahead: int) -> None:
    from scaling import period

    rollout, update, now = 2.0, 1.5, 0.0
    begun: list[float] = []
    verdicts: list[float] = []
    for step in range(201):
        begun.append(now)
        while len(verdicts) <= step + ahead:
            now += rollout
            verdicts.append(now + judge)
        now = max(now, verdicts[step]) + update
    # The first step samples all that are under way.
    assert (begun[-1] - begun[1]) / 199 == pytest.approx(period(rollout + update, judge, ahead), rel=0.03)


def test_a_broadcast_costs_the_same_for_any_number_of_servers() -> None:
    from scaling import Inputs, group_push, server_push

    inputs = Inputs(parameters=1e9, efficiency=0.5, nvlink=4e9, network=2e9)
    assert group_push(inputs, inputs.gpus_per_node) == pytest.approx(1.0)
    assert group_push(inputs, 64) == group_push(inputs, 512) == pytest.approx(2.0)
    assert server_push(inputs, 2) == 2 * server_push(inputs, 1)


def test_accepted_results_take_the_place_of_the_marks(tmp_path: Path) -> None:
    from scaling import measured

    assert measured(tmp_path) == ({}, {})
    seconds = {
        "update": {"64 samples, Qwen3-VL-8B": ("ours", 1.5)},
        "rollout": {"64 samples, Qwen3-VL-8B": ("ours, vLLM", 1.9), "weight sync": ("ours, vLLM", 0.2)},
    }
    for suite, found in seconds.items():
        cases = [
            {"key": name, "name": name, "settings": {}, "measured": [{"name": way, "seconds": took}], "seconds": 1.0}
            for name, (way, took) in found.items()
        ]
        content = {"machine": {"gpu": "NVIDIA H200"}, "commit": "c", "cases": [c | {"failure": None} for c in cases]}
        (tmp_path / f"{suite}-nvidia-h200.json").write_text(json.dumps(content))
    values, sources = measured(tmp_path)
    assert values == {"update": 1.5, "rollout": 1.9, "push": 0.2}
    assert sources["update"] == "benchmarks/results/update-nvidia-h200.json"
    assert sources["push"] == "benchmarks/results/rollout-nvidia-h200.json"


def test_inputs_are_options() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), "--update", "99"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "| update of 64 samples, one GPU (`--update`) | 99 s | given |" in done.stdout
