from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_folders import silent, trace, write_evaluation, write_lines, write_run

from mrpo.cli import main
from mrpo.errors import UserError
from mrpo.report.page import paper, write_report
from mrpo.report.page.sections import mean_times
from mrpo.report.style import TIME_COLORS


class Links(HTMLParser):
    """Every address that the page loads or links to, and every id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.addresses.append(value)
            if name == "id" and value:
                self.ids.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two runs and an evaluation."""
    folder = tmp_path_factory.mktemp("site")
    runs = [write_run(folder / "one"), write_run(folder / "two", config="algorithm: grpo\noptim:\n  lr: 1.0e-3\n")]
    traces = [trace(n, (n % 2 == 0, True, False), correct=None if n == 5 else n % 3 == 0) for n in range(8)]
    evaluation = write_evaluation(folder / "eval", {"a": traces, "b": traces[:4]})
    return write_report([*runs, evaluation], folder / "out", silent).parent


def rows(site: Path, table: str) -> list[dict[str, str]]:
    with (site / "tables" / f"{table}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_page_needs_nothing_from_outside(site: Path) -> None:
    links = Links((site / "index.html").read_text(encoding="utf-8"))
    for address in links.addresses:
        file, _, anchor = address.partition("#")
        assert (site / file).is_file() if file else anchor in links.ids, address
    assert len(links.ids) == len(set(links.ids))
    for file in (site / "static").iterdir():
        text = re.sub(r"http://www\.w3\.org/\S+", "", file.read_text(encoding="utf-8"))
        assert "http:" not in text
        assert "https:" not in text


def test_every_figure_is_there_for_papers(site: Path) -> None:
    stems = {"curves", "failure_stages", "failure_accumulation", "incorrect_answers", "step_times"}
    assert {file.name for file in (site / "figures").iterdir()} == {
        f"{s}.{end}" for s in stems for end in ("png", "svg")
    }
    for stem in stems:
        assert (site / "figures" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        assert "var(" not in (site / "figures" / f"{stem}.svg").read_text(encoding="utf-8")


def test_tables_hold_our_numbers_and_the_papers(site: Path) -> None:
    failures = {row["evaluation"]: row for row in rows(site, "failures")}
    # The traces of a fail at step 3 of 3 (even) or at step 1 of 3 (odd): four late, four early.
    assert (failures["a"]["judged"], failures["a"]["failed"]) == ("8", "8")
    assert (failures["a"]["early"], failures["a"]["mid"], failures["a"]["late"]) == ("0.5", "0.0", "0.5")
    for method, shares in paper.STAGE_SHARES.items():
        row = failures[f"paper: {method}, Qwen3-VL-8B"]
        assert [float(row[stage]) for stage in ("early", "mid", "late")] == pytest.approx([s / 100 for s in shares])
    accuracies = {row["evaluation"]: row for row in rows(site, "accuracy")}
    assert accuracies["one, before"]["held out"] == "0.0"
    assert accuracies["one, after"]["held out"] == "1.0"
    assert "average" not in accuracies["a"]
    assert [accuracies["a"][f"toy{end}"] for end in ("", "_low", "_high")] == ["0.25", "0.125", "0.5"]
    papers = {row["backbone"]: row for row in rows(site, "paper_accuracy")}
    assert float(papers["InternVL3-8B"]["MRPO"]) == pytest.approx(0.3194)
    (test,) = rows(site, "differences_1")
    assert (test["difference"], test["p"], test["p_mcnemar"]) == ("12.5", "0.03125", "0.75")


def test_questions_without_a_verdict_are_counted_too(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "eval", {"a": [trace(0)], "b": [trace(1)]})
    summary = json.loads((folder / "eval.json").read_text())
    for figures in summary["models"]["a"]["datasets"].values():
        figures["exact"] = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 10}
    (folder / "eval.json").write_text(json.dumps(summary))
    site = write_report([folder], tmp_path / "out", silent).parent
    # Of a, 2 of 10 answers got no verdict; b's evaluation says only how many got one.
    assert {row["model"]: row["questions"] for row in rows(site, "evaluation_1")} == {"a": "10", "b": "8"}


def test_settings_show_where_runs_differ(site: Path) -> None:
    shown = {row["setting"]: (row["one"], row["two"]) for row in rows(site, "settings")}
    assert shown["algorithm"] == ("mrpo", "grpo")
    assert shown["optim.lr"] == ("0.0001", "0.001")


def test_step_times_add_up(site: Path) -> None:
    for row in rows(site, "step_times"):
        times = {part: float(row[part]) for part in ("rollout", "judge_wait", "update", "other", "step")}
        assert times == {"rollout": 1.0, "judge_wait": 0.25, "update": 0.5, "other": 0.25, "step": 2.0}


def test_mean_times_leave_out_steps_without_a_time() -> None:
    assert mean_times([{"step": 1}, {"step": 2, "time/step": None}]) is None
    records = [{"time/step": 3.0, "time/rollout": 1.0}, {"time/step": float("nan"), "time/rollout": 50.0}]
    assert mean_times(records) == dict.fromkeys(TIME_COLORS, 0.0) | {"rollout": 1.0, "other": 2.0}


def test_samples_share_the_thumbnail_of_their_image(site: Path) -> None:
    images = set(re.findall(r'"src":"(images/\w+\.png)"', (site / "data" / "traces-0000.js").read_text()))
    assert {f"images/{file.name}" for file in (site / "images").iterdir()} == images
    assert len(images) == 2  # one of each run


def test_what_is_missing_is_said_where_it_would_stand(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("samples.jsonl", "evaluation-before.json", "evaluation-after.json"):
        (run / name).unlink()
    write_lines(run / "metrics.jsonl", [])
    page = write_report([run], tmp_path / "out", silent).read_text(encoding="utf-8")
    for section in ("curves", "failures", "accuracy", "time", "traces"):
        _, _, rest = page.partition(f'<section id="{section}"')
        assert '<p class="missing">' in rest.partition("</section>")[0], section


def test_undefined_metrics_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = [
        '{"step": 1, "reward": NaN, "far": null}',
        '{"step": 2, "reward": 1.0, "loss": Infinity}',
        '{"step": 3, "re',
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    page = write_report([run], tmp_path / "out", silent).read_text(encoding="utf-8")
    assert "1.00 → 1.00" in page


def test_names_are_data_in_the_page_too(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>$x_1$"
    folder = write_evaluation(tmp_path / "_e&", {name: [trace(0, (True, False))], "_hidden": [trace(1, (False, True))]})
    page = write_report([folder], tmp_path / "out", silent).read_text(encoding="utf-8")
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    stages = (tmp_path / "out" / "figures" / "failure_stages.svg").read_text(encoding="utf-8")
    assert "<img" not in stages


def test_an_earlier_report_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()
    write_report([run], out, silent)
    (out / "data" / "stale.js").touch()
    write_report([run], out, silent)
    assert not (out / "data" / "stale.js").exists()
    other_run, file = write_run(tmp_path / "other"), tmp_path / "file"
    file.touch()
    for other in (other_run, file):
        with pytest.raises(UserError, match="is no report"):
            write_report([run], other, silent)
    assert (other_run / "metrics.jsonl").is_file()
    assert not list(tmp_path.glob(".*partial"))


def test_what_others_put_beside_a_report_stays(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    write_report([run], out, silent)
    written = {path.name for path in out.iterdir()}
    (out / "notes.txt").write_text("mine")
    evaluation = write_evaluation(out / "evaluation", {"a": [trace(0)]})
    (run / "samples.jsonl").unlink()
    page = write_report([run], out, silent)
    assert "no source holds traces" in page.read_text(encoding="utf-8")
    assert not list((out / "images").iterdir())
    assert (out / "notes.txt").read_text() == "mine"
    assert (evaluation / "eval.json").is_file()
    assert {path.name for path in out.iterdir()} == written | {"notes.txt", "evaluation"}


def test_a_replacement_that_is_killed_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    write_report([run], out, silent)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("rename", "replace"):
        with monkeypatch.context() as context:
            context.setattr(Path, step, die)
            with pytest.raises(KeyboardInterrupt):
                write_report([run], out, silent)
    page = write_report([run], out, silent)
    for address in Links(page.read_text(encoding="utf-8")).addresses:
        assert (out / address.partition("#")[0]).exists()


def test_a_report_does_not_take_the_place_of_its_sources(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    write_report([run], out, silent)
    evaluation = write_evaluation(out / "evaluation", {"a": [trace(0)]})
    (tmp_path / "link").symlink_to(evaluation)
    for source in (evaluation, tmp_path / "link"):
        with pytest.raises(UserError, match=rf"--out {out}: the source {evaluation} lies in it"):
            write_report([run, source], out, silent)
    assert (evaluation / "0.traces.jsonl").is_file()
    # A report within its source takes nothing from it.
    assert write_report([run], run / "report", silent).is_file()
    write_evaluation(out, {"a": [trace(0)]})
    with pytest.raises(UserError, match=rf"--out {out}: the source {out} lies in it"):
        write_report([out], out, silent)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    assert main(["report", str(run), "--out", str(tmp_path / "out")]) == 0
    assert f"wrote {tmp_path / 'out' / 'index.html'}" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
