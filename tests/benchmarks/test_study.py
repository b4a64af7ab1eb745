"""The study's plan, errors of its judge, statistics, and what it shows, without training."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mrpo.data.phantom import PhantomDataset
from mrpo.judge.phantom import PhantomJudge
from mrpo.records import JudgeRequest, Unjudged, Verdict


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def requests(count: int) -> list[JudgeRequest]:
    """Gold rationales, every step of which is valid."""
    examples = PhantomDataset("test", size=count)[:]
    sentences = [[f"{part}." for part in e.metadata["gold_rationale"].rstrip(".").split(". ")] for e in examples]
    return [JudgeRequest(e, tuple(steps), e.answer) for e, steps in zip(examples, sentences, strict=True)]


def erring(flipped: float, missing: float) -> list[Verdict | Unjudged]:
    from study.judges import ErringJudge

    judge = ErringJudge(PhantomJudge(), flipped=flipped, missing=missing, seed=1)
    found = judge.judge(requests(200))
    assert [judge.submit(request).result() for request in requests(200)] == found
    return found


def test_a_judge_without_errors_is_the_judge_itself() -> None:
    assert erring(0.0, 0.0) == PhantomJudge().judge(requests(200))


def test_verdicts_are_flipped_at_the_rate_asked_for() -> None:
    steps = [valid for verdict in erring(0.2, 0.0) if isinstance(verdict, Verdict) for valid in verdict.validity]
    assert 1 - np.mean(steps) == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / len(steps)) ** 0.5)


def test_completions_stay_unjudged_at_the_rate_asked_for() -> None:
    found = erring(0.0, 0.5)
    assert np.mean([isinstance(verdict, Unjudged) for verdict in found]) == pytest.approx(0.5, abs=4 * 0.5 / 200**0.5)


def sample(question: str, *, correct: bool, steps: str, greedy: bool = True):
    from study.measuring import Sample

    return Sample(question, "count", greedy, correct, steps, 1.0, "f" * steps.count("0"))


def runs(accuracies: list[float], questions: int = 40):
    """One cell an accuracy; its first questions are answered rightly with valid steps, the others fail at once."""
    return {
        f"c{cell}": [
            sample(f"q{i}", correct=i < accuracy * questions, steps="1111" if i < accuracy * questions else "0000")
            for i in range(questions)
        ]
        for cell, accuracy in enumerate(accuracies)
    }


def test_sign_flip_p_by_hand() -> None:
    from study.statistics import sign_flip_p

    # Of 8 sign patterns only all plus and all minus reach |sum| = 6; with (1, 2, -3) every pattern reaches 0.
    assert sign_flip_p(np.array([1.0, 2.0, 3.0])) == 0.25
    assert sign_flip_p(np.array([1.0, 2.0, -3.0])) == 1.0
    assert sign_flip_p(np.array([2.0, 1.0, -1.0, np.nan])) == 0.75


def test_intervals_have_the_standard_error_of_few_cells() -> None:
    """Two cells in which all questions agree, 0 and 1: the standard error of their mean is 1 / 2."""
    from study.statistics import METRICS, draws, tabulate

    drawn = draws(tabulate(runs([0.0, 1.0]), METRICS[:1]), resamples=4000)
    assert drawn.std() == pytest.approx(0.5, rel=0.01)


def test_intervals_have_the_standard_error_of_questions_where_cells_agree() -> None:
    from study.statistics import METRICS, draws, tabulate

    drawn = draws(tabulate(runs([0.3, 0.3, 0.3], questions=100), METRICS[:1]), resamples=4000)
    assert drawn.std() == pytest.approx((0.3 * 0.7 / 100) ** 0.5, rel=0.05)


def test_differences_are_paired() -> None:
    """Cells differ widely, the arms by a tenth in each: the difference has no spread over cells."""
    from study.statistics import METRICS, differences, tabulate

    first, second = (tabulate(runs(values), METRICS) for values in ([0.2, 0.5, 0.8], [0.3, 0.6, 0.9]))
    accuracy = differences(first, second)["accuracy"]
    assert accuracy.estimate.value == pytest.approx(0.1)
    assert (accuracy.p, accuracy.higher, accuracy.cells) == (0.25, 3, 3)
    assert accuracy.estimate.low is not None
    assert accuracy.estimate.high is not None
    assert 0.0 <= accuracy.estimate.low < 0.1 < accuracy.estimate.high < 0.25
    same = differences(first, first)["accuracy"].estimate
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_only_shared_cells_are_compared() -> None:
    from study.statistics import METRICS, differences, tabulate

    first = tabulate(runs([0.2, 0.4]), METRICS)
    second = tabulate(dict(list(runs([0.3, 0.0]).items())[:1]), METRICS)
    found = differences(first, second)["accuracy"]
    assert found.cells == 1
    assert found.estimate.value == pytest.approx(0.1)


def test_metrics_of_hand_made_chains() -> None:
    from study.statistics import BINS, METRICS, tabulate

    chains = [
        sample("a", correct=True, steps="1111"),
        sample("b", correct=False, steps="0011"),  # first failure 1 / 4 early, one of three after it fails
        sample("c", correct=False, steps="11110"),  # late
        sample("c", correct=True, steps="110", greedy=False),
    ]
    table = tabulate({"c1": chains}, METRICS)
    found = dict(zip([metric.key for metric in METRICS], table.values(), strict=True))
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["accuracy_sampled"] == 1.0
    assert found["valid_steps"] == pytest.approx((1 + 0.5 + 0.8) / 3)
    assert found["early_of_all"] == pytest.approx(1 / 3)
    assert (found["early_of_failures"], found["late_of_failures"]) == (0.5, 0.5)
    assert found["far"] == pytest.approx(1 / 3)
    incorrect = tabulate({"c1": chains}, BINS["incorrect"]).values()
    assert incorrect[1] == 1.0
    assert incorrect[4] == 0.5
    assert np.isnan(incorrect[0])


def same_rates() -> dict[str, float]:
    return dict.fromkeys(("SFT", "SFT, 16 a step", "GRPO", "GDPO", "MRPO", "telescoped"), 1e-4)


@pytest.fixture
def experiment(tmp_path: Path):
    import suite_study
    from study.experiment import Experiment

    return Experiment(replace(suite_study.QUICK, held_out="test", cells=4, rates=(3e-4, 1e-4, 2e-4)), tmp_path)


def test_arms_of_a_cell_differ_in_nothing_but_the_arm(experiment) -> None:
    jobs = experiment.method_jobs(same_rates())
    assert len({job.folder for job in jobs}) == len(jobs) == 6 * 4
    of_cell = [job for job in jobs if job.name.endswith("c2")]
    assert len({(job.start, job.sets, job.flipped, job.missing) for job in of_cell}) == 1
    of_arm = ("algorithm", "advantage.credit", "optim.batch_size")
    assert len({tuple(o for o in job.overrides if not o.startswith(of_arm)) for job in of_cell}) == 1


def test_cells_share_no_seed_and_no_warm_start(experiment) -> None:
    made = [*experiment.perception_jobs(), *experiment.error_jobs()]
    of_starts = [o for job in made for o in job.overrides if o.startswith("seed=")]
    assert len(set(of_starts)) == len(of_starts) == 2 * 4
    jobs = [job for job in experiment.method_jobs(same_rates()) if job.name.startswith("MRPO ")]
    of_runs = [o for job in jobs for o in job.overrides if o.startswith("seed=")]
    assert len(set(of_runs)) == len({job.start for job in jobs}) == 4
    assert not set(of_runs) & set(of_starts)
    assert {job.start for job in jobs} == {job.start for job in experiment.base_jobs()}


def test_sft_on_as_many_questions_sees_those_of_the_other_methods(experiment) -> None:
    """Its batch holds the prompts of theirs, in their order."""
    from study.training import configure

    from mrpo.data.order import batch_indices

    jobs = {job.name: configure(job.overrides) for job in experiment.method_jobs(same_rates())}
    few, other = jobs["SFT, 16 a step c1"], jobs["MRPO c1"]
    prompts = other.optim.batch_size // other.rollout.group_size
    for step in (0, 1, 39):
        seen = batch_indices(few.data.train_size, few.optim.batch_size, step, few.seed)
        assert list(seen) == list(batch_indices(other.data.train_size, prompts, step, other.seed))


def test_nothing_is_chosen_by_test_questions(experiment) -> None:
    chosen_by = [*experiment.perception_jobs(), *experiment.error_jobs(), *experiment.tuning_jobs()]
    assert {s.split for job in chosen_by for s in job.sets} == {"validation"}
    final = [*experiment.base_jobs(), *experiment.method_jobs(same_rates())]
    assert {s.split for job in final for s in job.sets} == {"test"}
    assert not {s.seed for job in chosen_by for s in job.sets} & {s.seed for job in final for s in job.sets}
    tuning_seeds = {o for job in experiment.tuning_jobs() for o in job.overrides if o.startswith("seed=")}
    assert not tuning_seeds & {o for job in final for o in job.overrides or () if o.startswith("seed=")}


def test_every_method_has_the_same_tuning_budget(experiment) -> None:
    names = [job.name.rpartition(" ")[0] for job in experiment.tuning_jobs()]
    assert {name: names.count(name) for name in names} == dict.fromkeys(same_rates(), 3)


def test_the_best_rate_is_taken_and_of_equal_ones_the_lower(experiment) -> None:
    from study.measuring import write_samples

    for job, right in zip(experiment.tuning_jobs(), (1, 1, 0) * 6, strict=True):
        job.folder.mkdir(parents=True)
        write_samples(job.folder / "samples.json", {"validation": [sample("q", correct=bool(right), steps="1")]})
    assert experiment.rates() == same_rates()


def test_a_job_is_finished_only_as_it_was_specified(experiment) -> None:
    job = experiment.base_jobs()[0]
    assert job.seconds() is None
    job.folder.mkdir(parents=True)
    (job.folder / "result.json").write_text(json.dumps({"job": job.specification(), "seconds": 3.0}))
    assert job.seconds() == 3.0
    assert replace(job, flipped=0.1).seconds() is None


def test_a_job_is_not_finished_when_its_start_policy_was_made_anew(experiment) -> None:
    job, made = experiment.base_jobs()[0], experiment.error_jobs()[0]
    for folder, content in ((made.folder, "first recipe"), (job.folder, None)):
        folder.mkdir(parents=True)
        specification = job.specification() if content is None else content
        (folder / "result.json").write_text(json.dumps({"job": specification, "seconds": 3.0}))
    assert job.seconds() == 3.0
    (made.folder / "result.json").write_text(json.dumps({"job": "second recipe", "seconds": 3.0}))
    assert job.seconds() is None


def test_finished_jobs_are_not_run_again(experiment, tmp_path: Path) -> None:
    from study.jobs import run_jobs

    job = experiment.base_jobs()[0]
    job.folder.mkdir(parents=True)
    (job.folder / "result.json").write_text(json.dumps({"job": job.specification(), "seconds": 3.0}))
    run_jobs([job], workers=2, log=tmp_path / "log", report=lambda *_: pytest.fail("ran again"))


def test_samples_survive_their_file(tmp_path: Path) -> None:
    from study.measuring import read_samples, write_samples

    found = {"test": [sample("a", correct=True, steps="10"), sample("b", correct=False, steps="", greedy=False)]}
    write_samples(tmp_path / "samples.json", found)
    assert read_samples(tmp_path / "samples.json") == found


def test_tables_and_figures_of_finished_runs(experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import suite_study
    from results import Result
    from study.measuring import write_samples

    monkeypatch.setitem(suite_study.PLANS, "quick", experiment.plan)
    monkeypatch.setenv("MRPO_STUDY_DIR", str(tmp_path))
    rng = random.Random(0)
    jobs = [*experiment.base_jobs(), *experiment.method_jobs(same_rates())]
    jobs += experiment.ablation_jobs(same_rates())
    for job in jobs:
        right = 0.9 if job.name.startswith("MRPO") else 0.5
        samples = [
            sample(f"q{i}", correct=rng.random() < right, steps="".join(rng.choices("01", [1, 4], k=5)))
            for i in range(60)
        ]
        job.folder.mkdir(parents=True)
        write_samples(job.folder / "samples.json", {"test": samples, "shifted": samples})
        steps = [{"answer/symbolic": right, "failures/early": 0.1, "valid_steps": 0.8, "far": None}] * 12
        (job.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    names = dict.fromkeys(job.name.rpartition(" ")[0] for job in jobs)
    measured = suite_study.measured_arms(experiment, {name: [1.0, 2.0] for name in names})
    result = Result("study", suite_study.cases(quick=True)[0].settings, measured)
    assert suite_study.figures(result)["MRPO"]["accuracy"] == pytest.approx(0.9, abs=0.08)
    ours, paper = suite_study.summary([result])
    assert [row[0] for row in ours.rows] == ["base", "SFT", "SFT, 16 a step", "GRPO", "GDPO", "MRPO", "telescoped"]
    assert [row[0] for row in paper.rows] == ["base", "SFT", "GRPO", "GDPO", "MRPO"]
    assert float(ours.rows[5][1].split()[0]) == pytest.approx(90, abs=8)
    details = {table.title: table for table in suite_study.details([result], {})}
    difference = details["Paired differences, test questions"].rows[3]
    assert difference[0] == "MRPO - GRPO"
    assert difference[1].endswith("p 0.12, 4/4")  # 2 of 16 sign patterns
    learning = {tuple(row[:2]): row[2:] for row in details["While they learn"].rows}
    assert learning["GRPO", "accuracy"] == ["50.0"] * 4
    assert learning["MRPO - GRPO", "accuracy"] == ["+40.0 [+40.0, +40.0], p 0.12, 4/4"] * 4
    assert details["While they learn"].header[2:] == [f"steps {i} to {i + 2}" for i in (1, 4, 7, 10)]
    assert "reversed penalty - MRPO" in [row[0] for row in details["While ablations learn"].rows]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in suite_study.plots([result], tmp_path / "out"))


def test_windows_and_their_differences_by_hand() -> None:
    from study.learning import learning_difference, windows

    nan = float("nan")
    first = windows({"a": [0, 2, 4, 6, 8], "b": [1, 1, 1, 1, nan]}, 2)
    second = windows({"a": [1, 3, 5, 8, 8], "b": [1, 1, 1, 5, 3]}, 2)
    assert [(window.first, window.last) for window in first] == [(1, 3), (4, 5)]
    assert [window.by_cell.tolist() for window in first] == [[2, 1], [7, 1]]
    difference = learning_difference(first[1], second[1])
    assert difference.estimate.value == pytest.approx((1 + 3) / 2)
    assert (difference.estimate.low, difference.estimate.high) == (1, 3)  # of two cells one is drawn
    assert (difference.p, difference.higher, difference.cells) == (0.5, 2, 2)


def part(prompt: int, effect: float, *advantages: float, tokens: int = 1):
    from study.credit import Part

    return Part(prompt, 0, tokens, "first failure", (effect, -effect), advantages)


def test_agreement_is_the_cosine_over_tokens() -> None:
    from study.credit import agreement

    parts = [part(0, 1.0, 2.0, 1.0), part(1, -1.0, -2.0, 1.0), part(1, 0.0, 0.0, -1.0, tokens=2)]
    assert agreement(parts, 0, 0)[0].value == pytest.approx(1.0)
    assert agreement(parts, 0, 1)[0].value == pytest.approx(-1.0)
    assert agreement(parts, 1, 0)[0].value == pytest.approx(0.0)
    weighted = [part(0, 1.0, 1.0, tokens=3), part(0, 1.0, 0.0, tokens=1)]
    assert agreement(weighted, 0, 0)[0].value == pytest.approx(3 / (3 * 4) ** 0.5)


def test_effects_of_a_completion_add_up_to_its_outcome(tmp_path: Path) -> None:
    """Of the shipped policy: from the value of the prompt, which all completions share, to right or wrong."""
    from study.credit import read_parts, study_credit, write_parts
    from study.measuring import load
    from study.plan import METHODS
    from study.training import configure

    def config_of(arm):
        return configure([*arm.overrides, "rollout.group_size=2", "optim.batch_size=2"])

    examples = PhantomDataset("train", size=2)[:]
    parts = study_credit(load(config_of(METHODS[2])), examples, METHODS[2:], config_of, continuations=2)
    totals: dict[int, list[float]] = {0: [], 1: []}
    total = 0.0
    for found in parts:
        total += found.effects[0]
        if found.place == "outside":
            totals[found.prompt].append(total)
            total = 0.0
    for of_prompt in totals.values():
        assert len(of_prompt) == 2
        # Outcomes are 0 or 1, values halves: sums may differ between completions by whole numbers only.
        assert (of_prompt[0] - of_prompt[1]) % 1 == pytest.approx(0.0)
        assert all((2 * value) % 1 == pytest.approx(0.0) for value in of_prompt)
    write_parts(tmp_path / "parts.json", ["a"], parts)
    assert read_parts(tmp_path / "parts.json") == (["a"], parts)
