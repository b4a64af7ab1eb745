"""The paper's effect in miniature: base, SFT, GRPO, GDPO and MRPO on phantom scans, with ablations of MRPO.

Same warm starts, same prompts in the same order (SFT on as many questions, and on one for every completion of the
others), same number of steps; a learning rate for each method, found on validation questions with the same budget.
Every arm is measured once, on test questions that nothing was chosen by. What the runs leave (answers to every
question, with the judge's word on every step) is kept in runs/study or runs/study-quick: a broken run goes on there,
tables and figures are made from it, and removing it starts over. MRPO_STUDY_DIR names another folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from results import Case, Measured, Result
from study.credit import EFFECTS, agreement
from study.experiment import Experiment, stages
from study.figures import draw_accumulation, draw_accuracy, draw_differences, draw_incorrect, draw_learning, draw_stages
from study.jobs import Job, run_jobs
from study.learning import CURVES, learning_difference, mean_curve, windows
from study.plan import ABLATIONS, BASE, METHODS, SAMPLING, Plan
from study.statistics import BINS, METRICS, Difference, differences, estimates, tabulate
from tables import Table

from mrpo.estimates import Estimate
from mrpo.report.page.paper import ACCURACY as PAPER_ACCURACY
from mrpo.report.page.paper import CASCADE_BACKBONE, EARLIEST_FAR, STAGE_SHARES
from mrpo.report.page.paper import METHODS as PAPER_METHODS

SOURCES = ("benchmarks/study",)
TARGETS = ()
FULL = Plan(
    cells=7, ablation_cells=3, steps=40, perceive=100, err=60, questions=1000, shifted_questions=1000,
    sampled=2, tuning_questions=500, rates=(5e-5, 1e-4, 2e-4), credit_prompts=96, continuations=8,
)  # fmt: skip
QUICK = Plan(
    cells=2, ablation_cells=1, steps=12, perceive=60, err=40, questions=300, shifted_questions=200,
    sampled=1, tuning_questions=100, rates=(1e-4,), credit_prompts=8, continuations=4, held_out="validation",
    ablations=ABLATIONS[1:3],
)  # fmt: skip
PLANS = {"full": FULL, "quick": QUICK}
ARMS = (BASE, *(arm.name for arm in METHODS))
# What the ablations are told apart by.
_TOLD_APART = {"accuracy": "Accuracy", "early_of_all": "Early failures", "fully_valid": "Fully valid chains"}


def unfit() -> str | None:
    return None


def cases(quick: bool) -> list[Case]:
    size = "quick" if quick else "full"
    plan = {name: value for name, value in asdict(PLANS[size]).items() if isinstance(value, int)}
    return [Case("study", {"size": size, **plan}, lambda skip: _measure(_experiment(size)))]


def _measure(experiment: Experiment) -> list[Measured]:
    """Runs what is not finished; the seconds of the runs of every arm."""
    seconds: dict[str, list[float]] = {}
    for stage, jobs in stages(experiment):
        finished = sum(job.seconds() is not None for job in jobs)
        print(f"study, {stage}: {len(jobs)} runs, {finished} of them finished before", flush=True)
        run_jobs(jobs, workers=os.cpu_count() or 1, log=experiment.folder / "log.txt", report=_report)
        for job in jobs:
            seconds.setdefault(job.name.rpartition(" ")[0], []).append(job.seconds() or 0.0)
    return measured_arms(experiment, seconds)


def measured_arms(experiment: Experiment, seconds: Mapping[str, Sequence[float]]) -> list[Measured]:
    """Every arm with the seconds of its runs and, of the methods, estimates on both sets: [value, low, high]."""
    values: dict[str, dict[str, list[float | None]]] = {}
    for arm in _finished(experiment):
        for name in ("test", "shifted"):
            found = estimates(tabulate(experiment.samples(arm, name), METRICS))
            values.setdefault(arm, {}).update({f"{name} {k}": [e.value, e.low, e.high] for k, e in found.items()})
    return [
        Measured(name, median(found), min(found), max(found), len(found), values=values.get(name, {}))
        for name, found in seconds.items()
    ]


def _report(job: Job, seconds: float) -> None:
    print(f"study: {job.name}, {seconds:.0f} s", flush=True)


def figures(result: Result) -> dict[str, dict[str, float]]:
    """By method, the estimates on test questions."""
    return {
        one.name: {
            name.removeprefix("test "): value
            for name, (value, _, _) in one.values.items()
            if name.startswith("test ") and value is not None
        }
        for one in result.measured
        if one.values
    }


def summary(results: Sequence[Result]) -> list[Table]:
    """The methods with their intervals, and the paper's numbers for the same quantities."""
    return [table for result in results if not result.failure for table in (_summary(result), _paper_table())]


def details(results: Sequence[Result], machine: Mapping[str, Any]) -> list[Table]:
    return [
        table for result in results if not result.failure for table in _details(_experiment(result.settings["size"]))
    ]


def plots(results: Sequence[Result], out: Path) -> list[Path]:
    return [
        path for result in results if not result.failure for path in _plots(_experiment(result.settings["size"]), out)
    ]


def _experiment(size: str) -> Experiment:
    folder = os.environ.get("MRPO_STUDY_DIR", "runs/study-quick" if size == "quick" else "runs/study")
    return Experiment(PLANS[size], Path(folder).absolute())


def _finished(experiment: Experiment, arms: Iterable[str] = ARMS) -> list[str]:
    return [arm for arm in arms if experiment.samples(arm, "test")]


def _summary(result: Result) -> Table:
    keys = ("valid_steps", "fully_valid", "early_of_all", "early_sampled", "early_of_failures", "far", "far_bin1")
    columns = ("test accuracy", "shifted accuracy", *(f"test {key}" for key in keys))
    names = {metric.key: metric.name for metric in METRICS}
    rows = [
        [arm, *(_cell(Estimate(*result[arm].values[column])) for column in columns)]
        for arm in ARMS
        if result[arm].values
    ]
    plan = PLANS[result.settings["size"]]
    note = (
        f"Percent, 95 % intervals over cells and questions; {plan.cells} warm starts, each with a seed of its own; "
        f"{plan.steps} steps of 128 completions; {plan.questions} test, {plan.shifted_questions} shifted questions."
    )
    header = ["", "accuracy", "accuracy, shifted", *(names[key] for key in keys)]
    return Table("The study on phantom data", header, rows, note)


def _paper_table() -> Table:
    averages = [sum(values[i] for values in PAPER_ACCURACY.values()) / 3 for i in range(len(PAPER_METHODS))]
    rows = [
        [
            method,
            f"{averages[i]:.1f}",
            f"{STAGE_SHARES[method][0]:.1f}" if method in STAGE_SHARES else "",
            f"{EARLIEST_FAR[method]:.1f}" if method in EARLIEST_FAR else "",
        ]
        for i, method in enumerate(PAPER_METHODS)
    ]
    header = [
        "",
        "accuracy, mean of three backbones",
        f"early share of failures, {CASCADE_BACKBONE}",
        "FAR, FFP 0.0-0.2",
    ]
    return Table("The paper's (8 data sets, 7-8 B models)", header, rows)


def _details(experiment: Experiment) -> list[Table]:
    return [
        *(_paired(experiment, name) for name in ("test", "shifted")),
        *(_bins(experiment, name, title) for name, title in _BIN_TITLES.items()),
        _kinds(experiment),
        *_learning(experiment),
        _by_cell(experiment),
        _ablations(experiment),
        *_credit(experiment),
        *_tuning(experiment),
    ]


_BIN_TITLES = {
    "far, incorrect": "FAR by first failure point, wrong answers",
    "far, correct": "FAR by first failure point, right answers",
    "incorrect": "Wrong answers by first failure point",
}


def _paired(experiment: Experiment, question_set: str) -> Table:
    """MRPO minus each of the others, and telescoped credit minus the methods that it is to beat."""
    keys = ["accuracy", "valid_steps", "fully_valid", "early_of_all", "early_of_failures", "far", "omits"]
    if question_set == "test":
        keys = ["accuracy", "accuracy_sampled", *keys[1:4], "early_sampled", *keys[4:]]
    tables = {arm: tabulate(experiment.samples(arm, question_set), METRICS) for arm in _finished(experiment)}
    pairs = [("MRPO", arm) for arm in (BASE, "SFT", "SFT, 16 a step", "GRPO", "GDPO")]
    pairs += [("telescoped", arm) for arm in ("GRPO", "GDPO", "MRPO")]
    rows = []
    for ours, arm in pairs:
        if ours in tables and arm in tables:
            found = differences(tables[arm], tables[ours])
            rows.append([f"{ours} - {arm}", *(_difference(found[key]) for key in keys)])
    names = {metric.key: metric.name for metric in METRICS}
    note = (
        "Points with 95 % intervals, cells and questions resampled together; p of the exact sign-flip test over cells; "
        "in how many cells the first is higher."
    )
    return Table(f"Paired differences, {question_set} questions", ["", *(names[key] for key in keys)], rows, note)


def _bins(experiment: Experiment, name: str, title: str) -> Table:
    rows = []
    for arm in _finished(experiment):
        found = estimates(tabulate(experiment.samples(arm, "test"), BINS[name]))
        rows.append([arm, *(_cell(estimate) for estimate in found.values())])
    labels = [f"{i / 5:.1f}-{(i + 1) / 5:.1f}" for i in range(5)]
    return Table(title, ["", *labels], rows, "Greedy and sampled completions.")


def _kinds(experiment: Experiment) -> Table:
    """Greedy accuracy by kind of question."""
    kinds: list[str] = []
    rows = []
    for arm in _finished(experiment):
        samples = [s for of_cell in experiment.samples(arm, "test").values() for s in of_cell if s.greedy]
        kinds = sorted({sample.kind for sample in samples})
        right = {kind: [s.correct for s in samples if s.kind == kind] for kind in kinds}
        rows.append([arm, *(f"{100 * sum(found) / len(found):.1f}" for found in right.values())])
    return Table("Accuracy by kind of question", ["", *kinds], rows)


def _learning(experiment: Experiment) -> list[Table]:
    """Of every quarter of the training steps, the methods beside GRPO, and the ablations beside MRPO."""
    ablations = [arm.name for arm in experiment.plan.ablations]
    # Of the others, a run's own word on steps is that of the judge that errs.
    judged = [arm.name for arm in experiment.plan.ablations if not arm.flipped and not arm.missing]
    note = (
        "Training completions (128 a step, the same prompts for all), percent, and points with 95 % intervals over the "
        "cells that both have; p of the exact sign-flip test; in how many cells the first is higher."
    )
    found = _learning_table(experiment, "While ablations learn", "MRPO", ablations, ("answer/symbolic",))
    steps = _learning_table(experiment, "", "MRPO", judged, ("failures/early",))
    tables = [
        _learning_table(experiment, "While they learn", "GRPO", [arm.name for arm in SAMPLING], tuple(CURVES)),
        replace(found, rows=[*found.rows, *steps.rows]),
    ]
    return [replace(table, note=note) for table in tables if table.rows]


def _learning_table(
    experiment: Experiment, title: str, against: str, arms: Sequence[str], keys: Sequence[str]
) -> Table:
    rows: list[list[str]] = []
    header = [""]
    for key in keys:
        levels = experiment.curves(against, key)
        for arm in (against, *(arm for arm in arms if arm != against)):
            curves = experiment.curves(arm, key)
            shared = [cell for cell in curves if cell in levels]
            if not shared:
                continue
            ours, theirs = (windows({cell: of[cell] for cell in shared}) for of in (curves, levels))
            header = ["", "", *(f"steps {window.first} to {window.last}" for window in ours)]
            if arm == against:
                rows.append([arm, CURVES[key], *(f"{100 * window.by_cell.mean():.1f}" for window in ours)])
            else:
                apart = (_difference(learning_difference(a, b)) for a, b in zip(theirs, ours, strict=True))
                rows.append([f"{arm} - {against}", CURVES[key], *apart])
    return Table(title, header, rows, names=2)


def _by_cell(experiment: Experiment) -> Table:
    """Accuracy and early failures of every run: nothing is averaged away."""
    rows = []
    cells = list(experiment.samples(BASE, "test"))
    for arm in _finished(experiment):
        table = tabulate(experiment.samples(arm, "test"), METRICS)
        keys = [metric.key for metric in METRICS]
        places = [keys.index("accuracy"), keys.index("early_of_all")]
        values = dict(zip(table.cells, 100 * table.by_cell()[:, places], strict=True))
        rows.append([arm, *(" / ".join(f"{value:.1f}" for value in values[cell]) for cell in cells)])
    return Table("Accuracy / early failures of every run", ["", *cells], rows)


def _ablation_differences(experiment: Experiment) -> dict[str, dict[str, Difference]]:
    """Each ablation minus MRPO in the cells of the ablations; and GRPO likewise, to see how far that is."""
    ours = tabulate(experiment.samples("MRPO", "test"), METRICS)
    arms = ["GRPO", *(arm.name for arm in experiment.plan.ablations)]
    return {
        arm: differences(ours, tabulate(experiment.samples(arm, "test"), METRICS))
        for arm in _finished(experiment, arms)
    }


def _ablations(experiment: Experiment) -> Table:
    keys = ("accuracy", "accuracy_sampled", "early_of_all", "early_sampled", "fully_valid", "far", "omits")
    names = {metric.key: metric.name for metric in METRICS}
    rows = [[arm, *(_difference(of[key]) for key in keys)] for arm, of in _ablation_differences(experiment).items()]
    note = "The arm minus MRPO, paired; in how many cells the arm is higher."
    return Table("Ablations", ["", *(names[key] for key in keys)], rows, note)


def _credit(experiment: Experiment) -> list[Table]:
    """How each scheme's advantages agree with what steps do, and what steps do by where they stand."""
    schemes, parts = experiment.parts()
    if not parts:
        return []
    rows = []
    of_grpo = {effect: agreement(parts, schemes.index("GRPO"), i)[1] for i, effect in enumerate(EFFECTS)}
    for place, scheme in enumerate(schemes):
        cells = []
        for i, effect in enumerate(EFFECTS):
            found, drawn = agreement(parts, place, i)
            above = (drawn <= of_grpo[effect]).mean() if scheme != "GRPO" else None
            cells.append(_cosine_cell(found) + ("" if above is None else f", {100 * (1 - above):.0f} %"))
        rows.append([scheme, *cells])
    note = (
        "Cosine of token advantages with true effects under the first start policy, interval over prompts, and in how "
        "many resamples it is above GRPO's; no training."
    )
    places = sorted({part.place for part in parts} - {"outside"})
    effects = [[p.effects for p in parts if p.place == place] for place in places]
    means = [[sum(e[i] for e in of) / len(of) for i in range(2)] for of in effects]
    by_place = [
        [place, f"{len(of):,}", *(f"{mean:+.3f}" for mean in row)]
        for place, of, row in zip(places, effects, means, strict=True)
    ]
    header = ["", "effect on right answers", "effect on reward"]
    return [
        Table("Whether advantages agree with what steps do", header, rows, note),
        Table("What steps do", ["", "steps", *header[1:]], by_place),
    ]


def _cosine_cell(found: Estimate) -> str:
    if found.value is None or found.low is None or found.high is None:
        return "–"  # noqa: RUF001
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _tuning(experiment: Experiment) -> list[Table]:
    tuned, rates = experiment.tuned(), experiment.plan.rates
    if not tuned:
        return []
    rows = [
        [method, *(f"{100 * scores.get(rate, float('nan')):.1f}" for rate in rates)] for method, scores in tuned.items()
    ]
    note = "Accuracy over all completions of validation questions, one run each; the best rate is taken."
    return [Table("Learning rates", ["", *(f"{rate:g}" for rate in rates)], rows, note)]


def _plots(experiment: Experiment, out: Path) -> list[Path]:
    arms = _finished(experiment)
    test = {arm: estimates(tabulate(experiment.samples(arm, "test"), METRICS)) for arm in arms}
    shifted = {arm: estimates(tabulate(experiment.samples(arm, "shifted"), METRICS)) for arm in arms}
    bins = {
        name: {arm: estimates(tabulate(experiment.samples(arm, "test"), BINS[name])) for arm in arms} for name in BINS
    }
    curves = {
        title.capitalize(): {a.name: mean_curve(found) for a in SAMPLING if (found := experiment.curves(a.name, key))}
        for key, title in CURVES.items()
    }
    return [
        draw_learning(curves, out / "study-learning.png"),
        draw_accuracy(test, shifted, out / "study-accuracy.png"),
        draw_stages(test, out / "study-stages.png"),
        draw_accumulation(bins["far, correct"], bins["far, incorrect"], test, out / "study-far.png"),
        draw_incorrect(bins["incorrect"], out / "study-incorrect.png"),
        draw_differences(_ablation_differences(experiment), _TOLD_APART, out / "study-ablations.png"),
    ]


def _cell(estimate: Estimate) -> str:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return "–"  # noqa: RUF001
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _difference(found: Difference) -> str:
    e = found.estimate
    if e.value is None or e.low is None or e.high is None:
        return "–"  # noqa: RUF001
    interval = f"[{100 * e.low:+.1f}, {100 * e.high:+.1f}]"
    return f"{100 * e.value:+.1f} {interval}, p {found.p:.2f}, {found.higher}/{found.cells}"
