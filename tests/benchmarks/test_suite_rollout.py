"""The suite `rollout`: its checks, its driver, its arithmetic, and one tiny case with every way that is installed."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import processes_naming

ROOT = Path(__file__).parents[2]
TINY = '''"""The suite `rollout` at a tiny size."""

from suite_rollout import *
from suite_rollout import SOURCES, TARGETS


def cases(quick):
    setting = Setting(SMALL, 2, 4, 16, 6, max_samples=8, max_image_tokens=16, max_length=6, measured_prompts=1)
    return as_cases([
        Job("main", "rollout", setting, (OURS, HF, REFERENCE), turns=2),
        *(Job(f"G = {n}", "rollout", replace(setting, group=n), (HF,), turns=1, sweep="group") for n in (1, 2)),
        Job(SYNC, "sync", setting, (OURS,), turns=2),
    ])
'''
# Answers at once, and writes down what it was asked.
FAKE = """
import sys
from pathlib import Path

from way_mailbox import run_way

HERE = Path(__file__).parent


class Fake:
    def __init__(self, name, mailbox, folder):
        self.name = name

    def carry_out(self, command):
        with (HERE / "asked").open("a") as file:
            file.write(f"{self.name}: {command['do']}\\n")
        if self.name == "ours, hf" and command["do"] == "round":
            raise MemoryError("no room | at all")
        wrong = self.name == "reference's way"
        return {
            "prepare": {"start s": 3.0, "peak": 1.0, "before": 1.0, "started": 11.0},
            "check": {"logprobs": 0.2 if wrong else 0.01, "greedy": 0.1},
            "check_sync": {"synced": 0.01, "stale": 0.5, "restored": 0.01},
            "round": {"seconds": 2.0, "tokens": 8.0, "peak": 2.0},
            "sync": {"seconds": 0.1, "parameters": 10, "bytes": 20, "peak": 1.0},
        }[command["do"]]

    def close(self):
        pass


run_way(Fake)
"""


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def make_setting() -> Any:
    from rollout_setting import Setting

    return Setting("phantom policy", 2, 2, 16, 2, max_samples=8, max_image_tokens=16, max_length=6)


def test_a_plain_forward_pass_tells_wrong_samples_from_right_ones() -> None:
    from rollout_checks import greedy_error, logits, logprob_error, move, move_back

    from mrpo.backbones import load_model, load_processor
    from mrpo.config import Config
    from mrpo.data.phantom import PhantomDataset
    from mrpo.records import Completion
    from mrpo.rollout import SamplingParams
    from mrpo.rollout.hf import HFEngine

    config = Config()
    processor, model = load_processor(config), load_model(config.model)
    prompts = [processor.encode_prompt(example) for example in PhantomDataset("test", size=2)]
    greedy = HFEngine(model, processor, batch_size=4, weights=nullcontext).generate(prompts, SamplingParams(1, 5, 0.0))
    assert logprob_error(model, processor, prompts, greedy) is None
    assert greedy_error(model, processor, prompts, greedy) < 1e-4
    [[right], [other]] = greedy
    least = logits(model, processor, prompts[0], right.token_ids)[-1]
    allowed = least.isfinite()
    last = int(torch.where(allowed, least, torch.inf).argmin())
    wrong = replace(right, token_ids=(*right.token_ids[:-1], last))
    missed = (least[allowed].max() - least[allowed].min()).item()
    assert greedy_error(model, processor, prompts, [[wrong], [other]]) == pytest.approx(missed, rel=1e-4)

    told, shifted = [], []
    for prompt, [one] in zip(prompts, greedy, strict=True):
        exact = logits(model, processor, prompt, one.token_ids).double()
        exact -= exact.logsumexp(dim=-1, keepdim=True)
        logprobs = [exact[place, token].item() for place, token in enumerate(one.token_ids)]
        told.append([Completion(one.token_ids, "", "length", tuple(logprobs))])
        shifted.append([replace(told[-1][0], logprobs=tuple(value + 0.25 for value in logprobs))])
    assert logprob_error(model, processor, prompts, told) < 1e-5  # type: ignore[operator]
    assert logprob_error(model, processor, prompts, shifted) == pytest.approx(0.25, abs=1e-4)

    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = move(model)
    assert logprob_error(model, processor, prompts, told) > 0.01  # type: ignore[operator]
    move_back(model, before)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())


def test_every_round_has_pictures_of_its_own(tmp_path: Path) -> None:
    from model_folders import PHANTOM, examples, make_folder
    from rollout_driver import Job

    make_folder(PHANTOM, tmp_path / "policy", torch.device("cpu"), torch.float32)
    jobs = [Job("a", "rollout", make_setting(), (), turns=20, number=number) for number in range(3)]
    firsts = [job.pictures(turn) for job in jobs for turn in range(-1, 21)]
    assert min(b - a for a, b in pairwise(firsts)) >= 256, "rounds share pictures"
    seen = [_pixels(one) for first in (0, 2, 1 << 16) for one in examples(tmp_path / "policy", 2, 16, first)]
    assert len({*seen}) == 6
    assert seen[1] == _pixels(examples(tmp_path / "policy", 1, 16, 1)[0])


def _pixels(example: Any) -> bytes:
    return example.images[0].tobytes()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"logprobs": 2e-4}, "off by, log p is 0.0002, above 0.0001"),
        ({"logprobs": math.nan}, "off by, log p is nan"),
        ({"logprobs": 5e-5, "greedy": 0.01}, "off by, greedy logit is 0.01, above 0.001"),
        ({"synced": 1e-5, "stale": 5e-5, "restored": 1e-5}, "moved weights differ by 5e-05 from those before"),
        ({"synced": 1e-5, "stale": math.nan, "restored": 1e-5}, "moved weights differ by nan"),
        ({"synced": 1.0, "stale": 1.0, "restored": 1e-5}, "off by, log p, synced is 1"),
        ({"synced": None}, "tells no log-probabilities"),
    ],
)
def test_what_the_weights_would_not_sample_is_a_failure(found: dict[str, float | None], message: str) -> None:
    from rollout_driver import Measurement, judge
    from way_process import FailedError

    with pytest.raises(FailedError, match=f"computes something else.*{message}"):
        judge(Measurement("way"), found, "float32")


def test_the_worst_of_several_checks_is_kept() -> None:
    from rollout_checks import ERROR, GREEDY_ERROR
    from rollout_driver import Measurement, judge

    way = Measurement("way")
    for value in (1e-2, 5e-2, 2e-2):
        judge(way, {"logprobs": value}, "bfloat16")
    judge(way, {"greedy": 0.0}, "bfloat16")
    assert way.checks == {ERROR: 5e-2, GREEDY_ERROR: 0.0}
    assert way.as_measured().failure == "not measured"


def test_a_missing_token_is_a_failure() -> None:
    from rollout_driver import check_count
    from way_process import FailedError

    check_count({"tokens": 8.0}, make_setting())
    with pytest.raises(FailedError, match="7 completion tokens instead of 8"):
        check_count({"tokens": 7.0}, make_setting())


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a fake worker, which all ways are run by, was asked."""
    import rollout_driver
    from way_process import Script

    (tmp_path / "fake.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setattr(rollout_driver, "SCRIPT", Script(str(tmp_path / "fake.py")))
    monkeypatch.setattr(rollout_driver, "missing", lambda name: None)
    return tmp_path / "asked"


def test_on_a_gpu_a_way_goes_through_all_its_cases_and_is_kept(asked: Path, tmp_path: Path) -> None:
    from rollout_driver import Driver, Job
    from rollout_setting import OURS, TRL

    def driver(name: str) -> Driver:
        return Driver(tmp_path / name, tmp_path / "models", tmp_path / "kept", ["stamp"])

    jobs = [
        Job("main", "rollout", make_setting(), (OURS, TRL), turns=1, number=0),
        Job("sync", "sync", make_setting(), (OURS, TRL), turns=2, number=1),
    ]
    first = driver("first")
    main = first.run(jobs[0], jobs, {TRL: "left the device unusable"})
    assert [(one.name, one.seconds, one.failure) for one in main] == [
        (OURS, 2.0, None),
        (TRL, None, "left the device unusable"),
    ]
    assert main[0].values["start s"] == 3.0
    rollout = ["prepare", "check", "round", "round"]
    sync = ["prepare", "check_sync", "sync", "sync", "sync"]
    assert asked.read_text().splitlines() == [f"{OURS}: {do}" for do in rollout + sync]
    asked.unlink()
    # A command that was broken off here and started anew finds the second case finished.
    found = driver("second").run(jobs[1], jobs, {})
    assert [(one.name, one.seconds, one.runs) for one in found] == [(OURS, 0.1, 2), (TRL, 0.1, 2)]
    assert asked.read_text().splitlines() == [f"{TRL}: {do}" for do in sync]
    assert not list((tmp_path / "kept").rglob("TRL*.json")), "finished cases are kept twice"


def test_ways_left_out_are_measured_later_and_the_others_not_again(asked: Path, tmp_path: Path) -> None:
    from results import left_out
    from rollout_driver import Driver, Job
    from rollout_setting import OURS, TRL
    from suite_rollout import as_cases

    job = Job("main", "rollout", make_setting(), (OURS, TRL), turns=1)
    [case] = as_cases([job])
    for name, skip in (("first", left_out(case, ["ours"])), ("second", {})):
        driver = Driver(tmp_path / name, tmp_path / "models", tmp_path / "kept", ["stamp"])
        found = driver.run(job, [job], skip)
        assert [one.failure for one in found] == [None, skip.get(TRL)]
    assert [line.split(":")[0] for line in asked.read_text().splitlines()] == [OURS] * 4 + [TRL] * 4


def test_ways_take_turns_and_fail_alone(asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rollout_driver
    from rollout_driver import Driver, Job
    from rollout_setting import HF, OURS, REFERENCE, TRL

    monkeypatch.setitem(rollout_driver.LOGPROBS, "float32", 0.1)
    monkeypatch.setitem(rollout_driver.GREEDY, "float32", 0.5)
    job = Job("main", "rollout", make_setting(), (OURS, TRL, HF, REFERENCE), turns=2)
    driver = Driver(tmp_path / "ways", tmp_path / "models", None, [])
    try:
        found = {one.name: one for one in driver.run(job, [job], {})}
    finally:
        driver.close()
    assert found[OURS].seconds == found[TRL].seconds == 2.0
    assert found[HF].failure == "MemoryError: no room | at all"
    assert "computes something else" in str(found[REFERENCE].failure)
    rounds = [line for line in asked.read_text().splitlines() if line.endswith("round")]
    assert rounds == [f"{name}: round" for name in (OURS, TRL, HF, OURS, TRL, OURS, TRL)]


def test_figures_and_tables_follow_from_seconds() -> None:
    from results import Measured, Result
    from rollout_setting import HF, OURS, REFERENCE, TRL
    from rollout_tables import figures, summary

    settings = {"kind": "rollout", "prompts": 8, "group": 8, "length": 100, "image_tokens": 64, "sweep": ""}
    settings |= {"ways": [OURS, TRL, HF, REFERENCE], "measured_prompts": 1, "model": "small"}
    measured = [
        Measured(OURS, 2.0, 1.9, 2.1, 3, 2**30, 1e-6, values={"tokens": 6400.0, "start s": 9.0}),
        Measured(TRL, failure="refuses | this vLLM"),
        Measured(HF, 8.0, 7.0, 9.0, 3, 2**31, values={"tokens": 6400.0}),
        Measured(REFERENCE, 64.0, 64.0, 64.0, 3, 2**31, values={"tokens": 6400.0}),
    ]
    result = Result("main", settings, measured)
    found = figures(result)
    assert found[OURS]["samples/s"] == 32
    assert found[OURS]["completion tokens/s"] == 3200
    assert (found[OURS][f"faster than {HF}"], found[OURS][f"faster than {REFERENCE}"]) == (4, 32)
    assert found[OURS]["start s"] == 9
    assert "start s" not in found[HF]
    assert TRL not in found
    assert f"faster than {TRL}" not in found[OURS]
    [table] = summary([result])
    assert {len(row) for row in table.rows} == {len(table.header)}
    text = table.markdown()
    assert "| TRL's VLLMGeneration | refuses / this vLLM |" in text
    assert "The reference's way was measured on 1 of the prompts and scaled to all." in text


def test_targets_are_read_from_the_figures_of_their_cases() -> None:
    import suite_rollout
    from results import Measured, Result
    from rollout_setting import COLD, OURS, SLEEP_1
    from rollout_tables import BIG, MAIN_GPU, SHARE, SLEEP, START, SYNC
    from tables import targets_table

    common = {"prompts": 8, "group": 8, "length": 200, "image_tokens": 784, "sweep": "", "measured_prompts": 0}
    common |= {"ways": [], "model": BIG}
    memory = {"before": 10.0, "started": 110.0, "awake": 111.0, "sleep s": 1.0, "wake s": 1.0, "start s": 60.0}
    sync = Measured(OURS, 0.05, 0.05, 0.05, 9, 1, values={"parameters": 8e9, "bytes": 16e9})
    results = [
        Result(MAIN_GPU, {"kind": "rollout", **common}, [Measured(OURS, 2.0, 2.0, 2.0, 5, 1)]),
        Result(SYNC, {"kind": "sync", **common}, [sync]),
        Result(
            SLEEP,
            {"kind": "sleep", **common},
            [
                Measured(SLEEP_1, 1.0, 1.0, 1.0, 3, 1, values=memory | {"asleep": 26.0}),
                Measured(OURS, 1.0, 1.0, 1.0, 3, 1, values=memory | {"asleep": 16.0}),
            ],
        ),
        Result(START, {"kind": "start", **common}, [Measured(COLD, 170.0, 170.0, 170.0, 1, 1)]),
    ]
    h200 = {"gpu": "NVIDIA H200", "threads": 16}
    table = targets_table(suite_rollout, results, h200)  # type: ignore[arg-type]
    assert table is not None
    assert [(row[0], row[4], row[5]) for row in table.rows] == [
        (MAIN_GPU, "6400.00 /s", "met"),
        (SYNC, "0.05 s", "met"),
        (SLEEP, "95 %", "met"),
    ]
    assert suite_rollout.figures(results[2])[SLEEP_1][SHARE] == 0.85
    assert suite_rollout.figures(results[1])[OURS]["GB/s"] == 320
    for table in (*suite_rollout.summary(results), *suite_rollout.details(results, h200)):
        assert {len(row) for row in table.rows} == {len(table.header)}
        assert not any("|" in cell for cell in table.header)
    assert targets_table(suite_rollout, results, {"gpu": None, "threads": 2}) is None  # type: ignore[arg-type]


def test_one_engine_of_ours_meets_all_targets_and_is_that_of_the_suite_step() -> None:
    from model_folders import LONGEST_TEXT
    from step_ours import ENGINE_ON_GPU
    from suite_rollout import TARGETS, _gpu_jobs

    jobs = {job.name: job for job in _gpu_jobs()}
    assert {target.candidate for target in TARGETS} == {jobs[target.case].ways[0] for target in TARGETS}
    [setting] = {job.setting for job in jobs.values()}
    assert setting.max_samples == ENGINE_ON_GPU["max_num_seqs"]
    assert setting.max_image_tokens + LONGEST_TEXT + setting.max_length == ENGINE_ON_GPU["max_model_len"]


def test_every_way_samples_what_the_weights_say(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "benchmarks" / "suite_tiny.py").write_text(TINY, encoding="utf-8")
    for name in ("mrpo", "kernels", "csrc"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(tmp_path / "benchmarks" / "run.py"), "tiny", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    main, *sweep, sync = json.loads((tmp_path / "out" / "tiny.json").read_text())["cases"]
    assert [case["failure"] for case in (main, *sweep, sync)] == [None] * 4
    found = {one["name"]: one for one in main["measured"]}
    has_vllm = find_spec("vllm") is not None
    for name in ("ours, hf", "reference's way", *(["ours, vLLM"] if has_vllm else [])):
        one = found[name]
        assert one["failure"] is None, name
        assert one["values"]["tokens"] == 48
        assert one["values"]["off by, greedy logit"] < 1e-3
        assert one["runs"] == 2
    [synced] = sync["measured"]
    if has_vllm:
        assert found["ours, vLLM"]["values"]["off by, log p"] < 1e-4
        assert found["ours, vLLM"]["values"]["start s"] > 0
        assert synced["values"]["off by, log p, synced"] < 1e-4
        assert synced["values"]["off by, log p, not synced"] > 1e-2
        assert synced["values"]["bytes"] == 4 * synced["values"]["parameters"] > 4e6
    else:
        assert found["ours, vLLM"]["failure"] == synced["failure"] == "not installed (pip install mrpo[vllm])"
    assert {"rollout-ways.png", "rollout-sweeps.png"} < {path.name for path in (tmp_path / "out").iterdir()}
    assert not processes_naming(str(tmp_path / "benchmarks")), "processes were left behind"
