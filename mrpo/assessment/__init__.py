"""Judging finished completions (`mrpo eval`): answer accuracy, reasoning quality, tests between models.

What an evaluation says is one JSON object, eval.json:

    {"models": {NAME: {"file", "model", "think_tag", "questions", "samples",
                       "datasets": {DATASET | "average": {METRIC: {"value", "low", "high", "n"}}}}},
     "tests": [{"dataset", "metric", "first", "second", "difference": {"value", "low", "high", "n"}, "p",
                "mcnemar": {"first_only", "second_only", "p"} | null}],
     "metrics": {METRIC: {"name", "over", "percent"}},
     "judge": "who judged steps; who judged answers",
     "settings": {"judge": {…}, "reward": {…}, "advantage": {"tau"}, "resamples", "level", "seed"}}

`samples` is the number k of completions per question. Shares lie in [0, 1]. `low` and `high` end the bootstrap interval
over questions; `n` is the number of completions that define the metric (of a difference: of questions that define it
for both models). Undefined is null. "average" takes all questions together, so data sets weigh by their items.
Accuracy, exact and lexical are of a question's first completion, the greedy one where inference was greedy; the other
metrics are of all completions. A difference is that of the second model minus the first on the same questions.
McNemar's exact test, of accuracy alone, counts the questions that only one model answers rightly.

The metrics are those of `metrics.METRICS`, and with k > 1 also "mean@k" and "pass@k".
"""

from mrpo.assessment.assessed import Assessed
from mrpo.assessment.judging import Assessor
from mrpo.assessment.metrics import METRICS, MetricTable, tabulate
from mrpo.assessment.paired import compare, mcnemar_exact
from mrpo.assessment.questions import ModelCompletions, check_same_questions, read_models

__all__ = [
    "METRICS",
    "Assessed",
    "Assessor",
    "MetricTable",
    "ModelCompletions",
    "check_same_questions",
    "compare",
    "mcnemar_exact",
    "read_models",
    "tabulate",
]
