from __future__ import annotations

import io
import json
import math
import os
import pty
import signal
import subprocess
import sys
import textwrap
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mrpo.config import LogConfig
from mrpo.errors import UserError
from mrpo.telemetry import JsonLines, RunLog, clean_text, read_json_lines
from mrpo.telemetry.display import Pace, sparkline
from mrpo.telemetry.text import format_compact, format_duration, format_number

FILES_ONLY = LogConfig(tensorboard=False)
METRICS = {
    "reward": 1.31,
    "reward/answer": 0.61,
    "reward/process": 0.82,
    "reward/length": -0.02,
    "failures/early": 0.21,
    "tokens_per_s": 1234.4,
    "time/rollout": 0.4,
    "time/judge_wait": 0.0,
    "time/update": 0.6,
    "time/step": 1.0,
}


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_log(path: Path, clock: FakeClock | None = None, **options) -> tuple[RunLog, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=False, width=60)
    options = {"total_steps": 80, **options}
    return RunLog(path, FILES_ONLY, console=console, clock=clock or FakeClock(), **options), out


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_line_begins_with_step_and_has_null_for_undefined(tmp_path):
    log, _ = plain_log(tmp_path)
    with log:
        log.log_step(1, {"b": math.nan, "a": 2, "c": -math.inf, "d": 0.1})
        # Read before the log is closed: every line is on its way to the disk as soon as it is logged.
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 2.0, "b": null, "c": null, "d": 0.1}\n'


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_metrics_keep_every_bit(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("bits") / "metrics.jsonl"
    file = JsonLines(path, resume_step=None)
    file.write(3, {"loss": value})
    file.close()
    assert read_json_lines(path) == [{"step": 3, "loss": value}]


def test_samples_are_whole_records_of_any_text(tmp_path):
    sample = {"question": "où\n", "text": "\udcff\x1b[31m", "steps": [{"advantage": math.nan, "valid": None}]}
    log, _ = plain_log(tmp_path)
    with log:
        log.log_samples(4, [sample, {"step": 9, "text": "b"}])
    assert lines(tmp_path / "samples.jsonl") == [
        {"step": 4, "question": "où\n", "text": "\udcff\x1b[31m", "steps": [{"advantage": None, "valid": None}]},
        {"step": 4, "text": "b"},
    ]


@given(resume_step=st.integers(0, 6), torn=st.integers(0, 60))
def test_resume_keeps_the_past_and_drops_a_torn_line(tmp_path_factory, resume_step, torn):
    folder = tmp_path_factory.mktemp("resume")
    whole = [json.dumps({"step": step, "loss": step / 7}) + "\n" for step in range(1, 6)]
    last = json.dumps({"step": 1, "loss": 0.123456789, "note": "written when the run was killed"})
    (folder / "metrics.jsonl").write_text("".join(whole) + last[:torn])
    file = JsonLines(folder / "metrics.jsonl", resume_step=resume_step)
    file.write(resume_step + 1, {"loss": 9.0})
    file.close()
    expected = "".join(whole[:resume_step]) + json.dumps({"step": resume_step + 1, "loss": 9.0}) + "\n"
    assert (folder / "metrics.jsonl").read_text() == expected
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_resume_cuts_metrics_and_samples_and_a_new_run_begins_anew(tmp_path):
    for resume_step, expected in ((None, [1, 2, 3]), (2, [1, 2, 3]), (3, [1, 2, 3, 4]), (None, [1])):
        log, _ = plain_log(tmp_path, resume_step=resume_step)
        with log:
            for step in range((resume_step or 0) + 1, expected[-1] + 1):
                log.log_step(step, {"loss": 0.0})
                log.log_samples(step, [{"text": "a"}, {"text": "b"}])
        assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == expected
        assert [record["step"] for record in lines(tmp_path / "samples.jsonl")] == [s for s in expected for _ in "ab"]


@pytest.mark.parametrize("broken", ['{"step": 1, "lo\n', "[1]\n", '{"loss": 1.0}\n'])
def test_broken_middle_line_is_named(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1}\n' + broken + '{"step": 2}\n'
    path.write_text(text)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        JsonLines(path, resume_step=1)
    assert path.read_text() == text


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        read_json_lines(tmp_path / "nowhere.jsonl")


def test_a_kill_loses_no_logged_line(tmp_path):
    program = """
        import itertools, sys
        from pathlib import Path
        from mrpo.telemetry import JsonLines
        file = JsonLines(Path(sys.argv[1]), resume_step=None)
        for step in itertools.count(1):
            file.write(step, {"loss": 1.0, "text": "x" * 5000})
            print(step, flush=True)
    """
    path = tmp_path / "metrics.jsonl"
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    told = [int(child.stdout.readline()) for _ in range(50)][-1]
    child.send_signal(signal.SIGKILL)
    child.communicate()
    steps = [record["step"] for record in read_json_lines(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= told


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_forgets_the_steps_after_the_resumed_one(tmp_path):
    for resume_step, steps, loss in ((None, (1, 2, 3), 1.0), (1, (2, 3, 4), 2.0)):
        console = Console(file=io.StringIO())
        with RunLog(tmp_path, LogConfig(), total_steps=4, resume_step=resume_step, console=console) as log:
            for step in steps:
                log.log_step(step, {"loss": loss, "far": math.nan})
    assert scalars(tmp_path) == {"loss": [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]}


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"log\.wandb.*pip install mrpo\[wandb\]"):
        RunLog(tmp_path, LogConfig(tensorboard=False, wandb=True), total_steps=1)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"log\.tensorboard.*pip install tensorboard"):
        RunLog(tmp_path, LogConfig(), total_steps=1)
    assert list(tmp_path.iterdir()) == []


class FakeWandb(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.inits: list[dict] = []
        self.logged: list[dict] = []
        self.finished = 0

    def init(self, **options) -> FakeWandb:
        self.inits.append(options)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "global_step")

    def log(self, record: dict) -> None:
        self.logged.append(record)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_takes_up_its_run_on_resume_alone(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = LogConfig(tensorboard=False, wandb=True, wandb_project="p")
    for resume_step in (None, 1, None):
        console = Console(file=io.StringIO())
        with RunLog(tmp_path, config, total_steps=2, resume_step=resume_step, console=console) as log:
            log.log_step(2, {"loss": 0.5, "far": math.nan})
    ids = [options["id"] for options in wandb.inits]
    assert ids[0] == ids[1] != ids[2]
    assert all(options["project"] == "p" for options in wandb.inits)
    assert wandb.logged == [{"global_step": 2, "loss": 0.5}] * 3
    assert wandb.finished == 3


def test_other_ranks_write_and_print_nothing(tmp_path, capfd):
    with RunLog(tmp_path, LogConfig(wandb=True), total_steps=5, is_main=False, resume_step=3) as log:
        log.log_step(4, METRICS)
        log.log_samples(4, [{"text": "a"}])
        log.message("hello")
        with log.stage("evaluating", 5) as stage:
            stage.advance()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_plain_line_of_a_step(tmp_path):
    log, out = plain_log(tmp_path, total_steps=80, resume_step=11)
    log.log_step(12, METRICS | {"time/step": 58 / 68})
    assert out.getvalue() == (
        "step 12/80  reward 1.31 (answer .61 process .82 length -.02)  early .21  1,234 tok/s  "
        "rollout .4 s judge .0 s update .6 s  remaining 0:58\n"
    )


def test_plain_line_adapts_to_sft_and_to_missing_and_undefined_metrics(tmp_path):
    log, out = plain_log(tmp_path, total_steps=2)
    log.log_step(1, {"loss": 2.5, "grad_norm": 0.834, "lr": 1e-4, "time/update": 0.25, "time/step": 3661.0})
    log.log_step(2, {"reward": 0.5, "failures/early": math.nan})
    assert out.getvalue().splitlines() == [
        "step 1/2  loss 2.50  grad norm .83  lr 1e-04  update .2 s  remaining 1:01:01",
        "step 2/2  reward .50  early –  remaining 0:00",  # noqa: RUF001
    ]


def test_stage_in_plain_output_tells_begin_end_and_now_and_then(tmp_path):
    clock = FakeClock()
    log, out = plain_log(tmp_path, clock)
    with log.stage("evaluating [x]", 8) as stage:
        for _ in range(8):
            clock.now += 4.0
            stage.advance()
    assert out.getvalue().splitlines() == [
        "evaluating [x]  0/8",
        "evaluating [x]  3/8",
        "evaluating [x]  6/8",
        "evaluating [x]  8/8  in 0:32",
    ]


def test_remaining_time_leaves_out_stages_and_counts_skipped_steps():
    clock = FakeClock()
    pace = Pace(clock, total_steps=10, first_step=2)
    assert pace.remaining() is None
    clock.now += 6.0
    pace.step(5, None)  # three steps of 2 s
    assert pace.remaining() == pytest.approx(10.0)
    clock.now += 0.5
    assert pace.remaining() == pytest.approx(9.5)
    clock.now += 1000.0  # an evaluation
    pace.restart()
    clock.now += 4.0
    pace.step(6, None)
    assert pace.remaining() == pytest.approx((2.0 + 4.0) / 2 * 4)
    pace.step(7, 1.0)  # the trainer's own measure is preferred
    assert pace.remaining() == pytest.approx((2.0 + 4.0 + 1.0) / 3 * 3)
    assert pace.elapsed() == pytest.approx(1010.5)


def test_message_is_shown_as_it_is_on_one_line(tmp_path):
    log, out = plain_log(tmp_path)
    log.message("[red]not markup[/red] :smile: " + "x" * 100 + " \x1b[2J\x1b]0;title\x07\x07end")
    assert out.getvalue() == "[red]not markup[/red] :smile: " + "x" * 100 + " end\n"


def test_live_panel_shows_the_metrics_and_messages_above(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, height=40, color_system=None, legacy_windows=False)
    clock = FakeClock()
    log = RunLog(tmp_path, FILES_ONLY, total_steps=80, console=console, clock=clock, title="[b]x\x1b[2J")
    with log:
        log.message("[red] \x1b[2J")
        log.log_step(12, METRICS)
        clock.now += 42.0
        with log.stage("evaluating", 5) as stage:
            stage.advance(2)
            log.log_step(13, METRICS | {"reward": 1.5})
    text = out.getvalue()
    for expected in ("[b]x", "[red]", "step 13/80", "evaluating", "2/5", "1.50", "▁█", "1,234", "0:42 elapsed", "left"):
        assert expected in text
    assert "\x1b[2J" not in text  # the screen is never erased by what is printed
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is given back


def test_the_terminal_is_given_back_after_an_error(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    log = RunLog(tmp_path, FILES_ONLY, total_steps=2, console=console)
    with pytest.raises(ZeroDivisionError), log, log.stage("evaluating"):
        raise ZeroDivisionError
    assert out.getvalue().rstrip().endswith("\x1b[?25h")


PROGRAM = """
    import sys
    from pathlib import Path
    from mrpo.config import LogConfig
    from mrpo.telemetry import RunLog
    with RunLog(Path(sys.argv[1]), LogConfig(tensorboard=False), total_steps=3) as log:
        log.log_step(1, {"reward": 1.25, "time/step": 1.0})
        log.message("naïve \\u2713")
"""


def run_program(path: Path, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(PROGRAM), str(path)], **options)


def test_pseudo_terminal_gets_the_panel(tmp_path):
    controller, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    child = run_program(tmp_path, stdout=terminal, stdin=terminal, env=environment)
    os.close(terminal)
    output = b""
    while chunk := _read(controller):
        output += chunk
    os.close(controller)
    assert child.wait() == 0
    text = output.decode()
    assert "╭" in text
    assert "step 1/3" in text
    assert "\x1b[?25l" in text
    assert text.rstrip().endswith("\x1b[?25h")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux reports the closing of the other end so
        return b""


@pytest.mark.parametrize(("encoding", "message"), [("utf-8", "naïve ✓".encode()), ("ascii", b"na?ve ?")])
def test_pipe_gets_plain_lines_even_where_colour_is_forced(tmp_path, encoding, message):
    environment = os.environ | {"FORCE_COLOR": "1", "PYTHONIOENCODING": encoding}
    output, _ = run_program(tmp_path, stdout=subprocess.PIPE, env=environment).communicate()
    assert output == b"step 1/3  reward 1.25  remaining 0:02\n" + message + b"\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain [red]\ttext\n", "plain [red]\ttext\n"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x9b31mred", "red"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x07", "link"),
        ("a\x1b]52;c;payload", "a"),
        ("\x1bPdevice\x1b\\b", "b"),
        ("\x1bcreset\x1b(B", "reset"),
        ("bell\x07 back\x08 null\x00 del\x7f cr\r", "bell back null del cr"),
        ("\u202eesrever\u2066", "esrever"),
        ("\udcff", "\ufffd"),
        ("肝臓の病変 ✓", "肝臓の病変 ✓"),
    ],
)
def test_clean_text(text, expected):
    assert clean_text(text) == expected


@given(st.text(st.characters(exclude_categories=())))
def test_clean_text_leaves_no_control_and_can_be_written(text):
    clean = clean_text(text)
    assert not any((ord(c) < 32 and c not in "\t\n") or 0x7F <= ord(c) < 0xA0 for c in clean)
    clean.encode()
    assert clean_text(clean) == clean


def test_numbers_are_short():
    assert [format_number(x) for x in (0.614, -0.02, 1.31, -0.001, 1.0, None, math.nan)] == [
        ".61", "-.02", "1.31", ".00", "1.00", "–", "–",  # noqa: RUF001
    ]  # fmt: skip
    assert [format_compact(x) for x in (1e-4, 2.5e-5, 0.0123, 0.834, 12.34, 1234.0, 0.0)] == [
        "1e-04", "2.5e-05", ".012", ".83", "12.3", "1234", "0",
    ]  # fmt: skip
    assert [format_duration(x) for x in (0.4, 58.6, 60, 3661, -3)] == ["0:00", "0:59", "1:00", "1:01:01", "0:00"]


def test_sparkline_spans_the_values():
    assert sparkline([0.0, 7.0, math.nan, 3.0]) == "▁█▄"
    assert sparkline([2.0, 2.0]) == "▄▄"
    assert sparkline([math.nan]) == ""
    assert sparkline([float(x // 2) for x in range(16)], width=8) == "▁▂▃▄▅▆▇█"
