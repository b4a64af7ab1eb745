"""The suite `step`: its judge, its driver, its arithmetic, and one tiny case with every way that is installed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launching import processes_naming

ROOT = Path(__file__).parents[2]
TINY = '''"""The suite `step` at a tiny size."""

from suite_step import *
from suite_step import SOURCES, TARGETS
from step_setting import Setting

import suite_step

suite_step.JUDGE_CPU = (0.02, 0.05)


def cases(quick):
    setting = Setting(SMALL, prompts=2, group=4, image_tokens=16, length=6)
    ways = (REFERENCE, OURS, TRL)
    return [step_case("main", setting, ways, turns=1), pair_case(setting, pairs=2)]
'''


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def judge() -> Iterator[Any]:
    from step_driver import JudgeProcess

    process = JudgeProcess(0.05, 0.1)
    yield process
    process.close()


def ask(url: str, steps: int) -> dict[str, Any]:
    record = {"question": "?", "steps": [{"index": i, "text": f"Step {i}."} for i in range(1, steps + 1)]}
    text = f"<record>\n{json.dumps(record)}\n</record>"
    body = {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": [{"text": text}]}]}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.loads(json.load(response)["choices"][0]["message"]["content"])


def test_the_judge_answers_every_step_and_counts(judge: Any) -> None:
    judge.begin(8)
    threads = [threading.Thread(target=ask, args=(judge.url, 3)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert judge.stats()["asked"] == 8
    assert judge.stats()["most"] > 1, "requests are answered one after the other"
    assert [entry["index"] for entry in ask(judge.url, 4)["steps"]] == [1, 2, 3, 4]
    assert ask(judge.url, 4) == ask(judge.url, 4)
    judge.begin(8)
    assert judge.stats()["asked"] == judge.stats()["active"] == 0


def test_every_round_has_the_same_latencies(judge: Any) -> None:
    from step_judge import latencies

    assert latencies(16, 2.0, 10.0) == latencies(16, 2.0, 10.0) != sorted(latencies(16, 2.0, 10.0))
    judge.begin(2)
    first, second = latencies(2, 0.05, 0.1)
    for expected in (first, second, first):
        began = time.perf_counter()
        ask(judge.url, 1)
        assert time.perf_counter() - began >= expected


def test_our_client_understands_the_judge(judge: Any) -> None:
    from mrpo.config import JudgeConfig
    from mrpo.data.phantom import PhantomDataset
    from mrpo.judge import make_judge
    from mrpo.records import JudgeRequest, Verdict

    client = make_judge(JudgeConfig(kind="openai", base_url=f"{judge.url}/v1", model="judge"), "phantom")
    try:
        [verdict] = client.judge([JudgeRequest(PhantomDataset("train", size=1)[0], ("The liver.", "A cyst."), "yes")])
    finally:
        client.close()
    assert isinstance(verdict, Verdict)
    assert len(verdict.steps) == 2


def test_a_step_of_several_processes_is_as_long_as_the_slowest() -> None:
    from step_checks import merge

    one = {"seconds": 2.0, "tokens": 10.0, "judged": 3.0, "peak": 5.0, "update s": 1.0}
    two = {"seconds": 3.0, "tokens": 12.0, "judged": 4.0, "peak": 6.0, "update s": 2.0}
    assert merge([one, two]) == {"seconds": 3.0, "tokens": 22.0, "judged": 7.0, "peak": 11.0, "update s": 1.5}


def test_a_missing_token_or_request_is_a_failure() -> None:
    from step_checks import check_counts
    from step_setting import Setting
    from way_process import FailedError

    setting = Setting("m", prompts=2, group=4, image_tokens=16, length=5)
    check_counts({"tokens": 40.0, "judged": 8.0, "requests": 8.0}, setting)
    with pytest.raises(FailedError, match="39 completion tokens instead of 40"):
        check_counts({"tokens": 39.0, "judged": 8.0, "requests": 8.0}, setting)
    with pytest.raises(FailedError, match="asked the judge 9 times about 8 completions"):
        check_counts({"tokens": 40.0, "judged": 8.0, "requests": 9.0}, setting)


def test_the_interval_of_a_median_holds_it_as_often_as_it_says() -> None:
    from step_checks import median_interval

    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    draw, held = random.Random(0), 0
    for _ in range(1000):
        low, high = median_interval([draw.gauss(0, 1) for _ in range(40)])
        held += low <= 0 <= high
    assert 950 <= held <= 985
    # The textbook's interval of 40 values: the 14th to the 27th.
    assert median_interval(list(map(float, range(1, 41)))) == (14.0, 27.0)


def test_figures_and_tables_follow_from_seconds() -> None:
    from results import Measured, Result
    from step_setting import GRPO, MRPO, OURS, REFERENCE, TRL
    from step_tables import SHAPING, figures, summary

    settings = {"kind": "step", "prompts": 8, "group": 8, "length": 100, "image_tokens": 64, "sweep": "", "rounds": 0}
    settings |= {"ways": [OURS, TRL, REFERENCE], "latency": [2.0, 10.0]}
    values = {"rollout s": 1.0, "judge s": 0.5, "update s": 0.5}
    measured = [
        Measured(OURS, 2.0, 1.9, 2.1, 3, 2**30, 1e-6, values=values),
        Measured(TRL, 8.0, 7.0, 9.0, 3, 2**31, 0.0, values=values),
        Measured(REFERENCE, failure="out | of memory"),
    ]
    result = Result("main", settings, measured)
    found = figures(result)
    assert found[OURS]["samples/s"] == 32
    assert found[OURS]["completion tokens/s"] == 3200
    assert found[OURS][f"faster than {TRL}"] == 4
    assert f"faster than {REFERENCE}" not in found[OURS]
    assert REFERENCE not in found
    [table] = summary([result])
    assert {len(row) for row in table.rows} == {len(table.header)}
    assert "| reference's way | out / of memory |" in table.markdown()
    shares = {f"of {GRPO}": 1.004, "low": 0.999, "high": 1.01}
    pair = [
        Measured(GRPO, 1.0, 1.0, 1.0, 9, 1, values={"shaping s": 0.001}),
        Measured(MRPO, 1.0, 1.0, 1.0, 9, 1, values={"shaping s": 0.003} | shares),
    ]
    paired = Result("pair", settings | {"kind": "pair"}, pair)
    assert figures(paired)[MRPO][SHAPING] == pytest.approx(0.002)
    [table] = summary([paired])
    assert table.rows[1] == [MRPO, "1.000", "3.0", "+0.40 %", "-0.10 % to +1.00 %"]


def test_a_judge_ends_with_who_started_it() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from step_driver import JudgeProcess; import os\n"
    code += "judge = JudgeProcess(0.1, 0.2); print(judge._process.pid, flush=True); os._exit(0)"
    command = [sys.executable, "-c", code, str(ROOT / "benchmarks")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{done.stdout.strip()}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_way_that_dies_is_a_failure_with_its_last_words(tmp_path: Path) -> None:
    from suite_step import SCRIPT
    from way_process import FailedError, WayProcess

    way = WayProcess(SCRIPT, "no such way", 1, tmp_path / "way")
    try:
        with pytest.raises(FailedError, match="KeyError: 'no such way'"):
            way.ask("prepare", timeout=120)
    finally:
        way.close()


def test_a_way_ends_with_who_commands_it_even_in_the_middle_of_a_command(tmp_path: Path) -> None:
    code = """if True:
        import sys, time
        sys.path.insert(0, sys.argv.pop(1))
        from way_mailbox import run_way

        class Sleeper:
            def carry_out(self, command):
                (folder / "asleep").touch()
                time.sleep(300)

        def make(name, mailbox, where):
            global folder
            folder = where
            return Sleeper()

        run_way(make)
    """
    (tmp_path / "0.json").write_text('{"do": "anything"}')
    commander = subprocess.Popen(["sleep", "300"])
    arguments = [str(ROOT / "benchmarks"), "way", str(tmp_path), str(commander.pid)]
    way = subprocess.Popen([sys.executable, "-c", code, *arguments])
    deadline = time.monotonic() + 60
    while not (tmp_path / "asleep").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    commander.kill()  # and nobody asks how it ended, so that its number lives on
    assert way.wait(timeout=30) == 1
    commander.wait()


def test_a_case_that_was_broken_off_goes_on_with_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import suite_step
    from step_setting import Setting

    done: list[str] = []
    made: Any = SimpleNamespace(keep_folder=tmp_path, kept=lambda key: tmp_path / key, pool=None)
    setting = Setting("model", prompts=2, group=4, image_tokens=16, length=6, processes=2)

    class Stopped(Exception):
        pass

    class Case(suite_step._Case):
        def _process(self, way: Any) -> None:
            pass

        def _prepare(self, way: Any) -> None:
            done.append("prepare")

        def _step(self, way: Any) -> None:
            if done.count("step") == 3:
                raise Stopped
            done.append("step")
            way.steps.append({"seconds": float(len(done)), "peak": 0.0})

    way = suite_step.Measurement(suite_step.OURS)
    with pytest.raises(Stopped):
        Case(made, setting, turns=5).measure([way])
    assert done == ["prepare", "step", "step", "step"]  # the first one to warm up
    done.clear()
    monkeypatch.setattr(Case, "_step", lambda self, way: way.steps.append({"seconds": 9.0, "peak": 0.0}))
    again = suite_step.Measurement(suite_step.OURS)
    Case(made, setting, turns=5).measure([again])
    assert [step["seconds"] for step in again.steps] == [3.0, 4.0, 9.0, 9.0, 9.0]
    Case(made, setting, turns=5).measure([finished := suite_step.Measurement(suite_step.OURS)])
    assert finished.steps == again.steps
    assert done == ["prepare"]


def test_vllm_gets_one_placeholder_an_image() -> None:
    pytest.importorskip("trl")
    from step_trl import one_placeholder_an_image

    assert one_placeholder_an_image([9, 9, 1, 9, 9, 9, 2, 9], 9) == [9, 1, 9, 2, 9]
    assert one_placeholder_an_image([1, 1, 2], 9) == [1, 1, 2]


def test_a_random_model_writes_sentences_and_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import model_folders
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from mrpo.backbones import load_processor
    from mrpo.config import Config
    from mrpo.steps import find_steps

    model_folders.make_folder("small Qwen3-VL", tmp_path / "small", torch.device("cpu"), torch.float32)
    config = AutoConfig.from_pretrained(tmp_path / "small")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert len(tokenizer) == config.text_config.vocab_size
    endings = json.loads((tmp_path / "small" / "generation_config.json").read_text())["eos_token_id"]
    processor = load_processor(Config.model_validate({"model": {"path": str(tmp_path / "small")}}))
    assert endings in processor.placeholder_ids, "it could be sampled"
    draw = random.Random(0)
    drawn = [draw.randrange(1000, 8000) for _ in range(200)]
    assert len(find_steps(drawn, processor.tokenizer, think_tag="thinking")) > 5
    [example] = model_folders.examples(tmp_path / "small", 1, 144)
    assert int(processor.encode_prompt(example).token_type_ids.sum()) == 144


def test_every_way_computes_the_same_and_asks_once(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "benchmarks" / "suite_tiny.py").write_text(TINY, encoding="utf-8")
    (tmp_path / "mrpo").symlink_to(ROOT / "mrpo")
    (tmp_path / "kernels").symlink_to(ROOT / "kernels")
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(tmp_path / "benchmarks" / "run.py"), "tiny", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    main, pair = json.loads((tmp_path / "out" / "tiny.json").read_text())["cases"]
    found = {one["name"]: one for one in main["measured"]}
    expected = {"ours", "reference's way"} | ({"TRL"} if find_spec("trl") else set())
    for name in expected:
        one = found[name]
        assert one["failure"] is None, name
        assert one["error"] < 1e-5
        assert one["values"]["requests"] == one["values"]["judged"] > 6
        assert one["values"]["tokens"] == 48
        stages = [value for key, value in one["values"].items() if re.fullmatch(r"\w+ s", key)]
        assert sum(stages) == pytest.approx(one["seconds"], rel=0.3)
    assert max(found[name]["error"] for name in expected) > 0, "nothing was compared"
    assert {one["name"] for one in pair["measured"]} == {"GRPO", "MRPO"}
    assert "step-stages.png" in {path.name for path in (tmp_path / "out").iterdir()}
    assert not processes_naming(str(tmp_path / "benchmarks")), "processes were left behind"
