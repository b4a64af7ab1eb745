"""A run that is killed at any moment and resumed is the run that was never killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from launching import TRAIN, launch_command, launch_environment, read_metrics, train
from safetensors.torch import load_file

from mrpo.checkpoint import checkpoints

STEPS = 4


def settings(tiny_policy: Path, output_dir: Path) -> list[str]:
    return [
        f"output_dir={output_dir}",
        f"model.path={tiny_policy}",
        f"optim.steps={STEPS}",
        "optim.batch_size=16",
        "optim.micro_batch_size=6",
        "optim.schedule=linear",
        "prompt.instruction=",
        "rollout.max_tokens=24",
        "loss.beta=0.01",
        "loss.updates_per_rollout=2",
        "checkpoint.every=1",
        "eval.at_start=false",
        "eval.at_end=false",
        "log.plots=false",
        "log.tensorboard=false",
    ]


@pytest.fixture(scope="module")
def uninterrupted(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(*settings(tiny_policy, output_dir))
    return output_dir


def interrupt(arguments: list[str], ready: Callable[[], bool], kill: signal.Signals) -> int:
    """Starts a run, sends `kill` to its worker when `ready`, and returns the launcher's exit status."""
    command = launch_command(TRAIN, arguments)
    process = subprocess.Popen(command, env=launch_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, "the run ended before it was interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    (worker,) = [
        child for child in psutil.Process(process.pid).children(recursive=True) if str(TRAIN) in child.cmdline()[2:3]
    ]
    os.kill(worker.pid, kill)
    return process.wait(timeout=60)


def assert_same_run(resumed: Path, uninterrupted: Path) -> None:
    assert read_metrics(resumed) == read_metrics(uninterrupted)
    assert [r["step"] for r in read_metrics(resumed)] == list(range(1, STEPS + 1))
    samples = [(folder / "samples.jsonl").read_text() for folder in (resumed, uninterrupted)]
    assert samples[0] == samples[1]
    weights = [load_file(folder / "policy" / "model.safetensors") for folder in (resumed, uninterrupted)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_killed_during_a_step(tiny_policy: Path, tmp_path: Path, uninterrupted: Path) -> None:
    arguments = settings(tiny_policy, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    # Two finished steps, and the third under way.
    interrupt(arguments, lambda: len(checkpoints(folder)) >= 2 and not list(folder.glob(".partial*")), signal.SIGKILL)
    assert 2 <= checkpoints(folder)[-1][1].step < STEPS
    train(*arguments, "--resume")
    assert_same_run(tmp_path / "run", uninterrupted)


def test_killed_during_a_save(tiny_policy: Path, tmp_path: Path, uninterrupted: Path) -> None:
    arguments = settings(tiny_policy, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    interrupt(arguments, lambda: (folder / ".partial-step-000002").exists(), signal.SIGKILL)
    assert [state.step for _, state in checkpoints(folder)] == [1]
    assert (folder / ".partial-step-000002").exists()
    train(*arguments, "--resume")
    assert not list(folder.glob(".partial*"))
    assert_same_run(tmp_path / "run", uninterrupted)


def test_sigterm_saves_and_exits(tiny_policy: Path, tmp_path: Path, uninterrupted: Path) -> None:
    arguments = [a for a in settings(tiny_policy, tmp_path / "run") if not a.startswith("checkpoint.every")]
    folder = tmp_path / "run" / "checkpoints"
    metrics = tmp_path / "run" / "metrics.jsonl"
    status = interrupt(
        [*arguments, "checkpoint.every=0"],
        lambda: metrics.is_file() and metrics.stat().st_size > 0,
        signal.SIGTERM,
    )
    assert status != 0
    (saved,) = checkpoints(folder)
    assert saved[1].step == len(read_metrics(tmp_path / "run")) < STEPS
    train(*arguments, "checkpoint.every=0", "--resume")
    assert_same_run(tmp_path / "run", uninterrupted)


def test_killed_during_the_last_evaluation(tiny_policy: Path, tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    last = ["checkpoint.every=0", "eval.at_end=true", "data.eval_size=256"]
    arguments = [*settings(tiny_policy, run), *last]
    interrupt(arguments, lambda: bool(checkpoints(run / "checkpoints")), signal.SIGKILL)
    assert not (run / "evaluation-after.json").exists()
    assert [state.step for _, state in checkpoints(run / "checkpoints")] == [STEPS]
    assert_same_run(run, uninterrupted)
    train(*arguments, "--resume")
    assert (run / "evaluation-after.json").is_file()
    assert_same_run(run, uninterrupted)


def test_completions_sampled_ahead_survive_a_kill(tiny_policy: Path, tmp_path: Path, uninterrupted: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(*settings(tiny_policy, whole), "rollout.ahead=2")
    on_policy, ahead = read_metrics(uninterrupted), read_metrics(whole)
    assert ahead[0] == on_policy[0]  # the first step has nothing older to sample with
    assert ahead[1]["completion/tokens"] != on_policy[1]["completion/tokens"]
    arguments = [*settings(tiny_policy, run), "rollout.ahead=2"]
    folder = run / "checkpoints"
    interrupt(arguments, lambda: len(checkpoints(folder)) >= 2 and not list(folder.glob(".partial*")), signal.SIGKILL)
    assert 2 <= checkpoints(folder)[-1][1].step < STEPS
    train(*arguments, "--resume")
    assert_same_run(run, whole)


def test_a_resumed_run_packs_as_it_began_to(tmp_path: Path) -> None:
    """Of SFT on phantom, packed rows save about 5 %: update.packing=auto chooses dense by step 1, and not by step 3."""
    common = ["algorithm=sft", "eval.at_start=false", "eval.at_end=false"]
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    train(*common, f"output_dir={whole}", "optim.steps=3")
    train(*common, f"output_dir={parts}", "optim.steps=2")
    ((_, state),) = checkpoints(parts / "checkpoints")
    assert state.packing != "auto"
    train(*common, f"output_dir={parts}", "optim.steps=3", "--resume")
    assert read_metrics(parts) == read_metrics(whole)


def test_last_and_best_checkpoints_are_kept(uninterrupted: Path) -> None:
    rewards = {record["step"]: record["reward"] for record in read_metrics(uninterrupted)}
    best = max(rewards, key=lambda step: (rewards[step], step))
    kept = {state.step for _, state in checkpoints(uninterrupted / "checkpoints")}
    assert kept == {STEPS - 1, STEPS, best}


def test_the_exported_policy_loads_with_the_auto_classes(uninterrupted: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    folder = uninterrupted / "policy"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.config.model_type == "qwen3_vl"
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert AutoImageProcessor.from_pretrained(folder, backend="pil").patch_size == 8
    assert json.loads((folder / "mrpo_prompt.json").read_text()) == {
        "think_tag": "thinking", "instruction": "", "max_prompt_tokens": 1024, "max_image_pixels": 802_816
    }  # fmt: skip


def test_samples_name_the_images_that_the_run_keeps(uninterrupted: Path) -> None:
    samples = [json.loads(line) for line in (uninterrupted / "samples.jsonl").read_text().splitlines()]
    named = {image for sample in samples for image in sample["images"]}
    assert named == {f"images/{file.name}" for file in (uninterrupted / "images").iterdir()}
    assert len(named) > 1
