"""`mrpo eval`: answer accuracy and reasoning quality of what `mrpo infer` wrote."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mrpo.arguments import add_config
from mrpo.commands.parser import Commands, positive
from mrpo.errors import UserError

if TYPE_CHECKING:
    from mrpo.assessment import ModelCompletions
    from mrpo.config import Config

_SETTING = re.compile(r"[a-z_.]+=")
_TAKEN = ("judge.", "reward.", "advantage.tau")

_DESCRIPTION = """\
Judges the completions of one model or more and writes to DIR: eval.json, tables as CSV, Markdown
and LaTeX, and every judged completion in NAME.traces.jsonl. Several models are tested against each
other on the same questions.

Metrics: answer accuracy (by judge, exact, lexical), where reasoning first fails and what follows,
valid steps, length and format, for each data set and averaged over all questions, with 95 %
bootstrap intervals."""

_EXAMPLES = """\
examples:
  mrpo eval base.jsonl mrpo.jsonl --out evaluation judge.kind=openai judge.model=gpt-5-mini
  mrpo eval runs/a.jsonl runs/b.jsonl --name before --name after --out evaluation"""


def _epilog() -> str:
    from mrpo.commands.parser import help_width
    from mrpo.help import config_help

    sections = config_help(help_width()).split("\n\n")
    shown = [section for section in sections if section.startswith(("judge:", "reward:"))]
    tau = "advantage.tau: the embedded judge calls an answer correct whose reward is above it"
    return "\n\n".join(["settings, as key=value:", *shown, tau, _EXAMPLES])


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="judge completions: accuracy, reasoning quality, tests between models",
        usage="%(prog)s COMPLETIONS [COMPLETIONS ...] --out DIR [options] [key=value ...]",
        description=_DESCRIPTION,
        epilog=_epilog,
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="COMPLETIONS", help="JSONL that `mrpo infer` wrote, one file for each model"
    )
    # argparse gives them to the first of the two; `run` sorts them.
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as in judge.kind=openai")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--name", action="append", default=[], metavar="NAME",
        help="what to call a model, once for each file in order; default: the file's name without its ending",
    )  # fmt: skip
    add_config(parser, "YAML file with settings, as of a training run")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR",
        help="folder that keeps the verdicts of an endpoint, to share; default: judge.cache, or OUT/cache",
    )  # fmt: skip
    parser.add_argument(
        "--resamples", type=positive, default=10_000, metavar="N", help="bootstrap resamples; default: 10000"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace another evaluation in DIR")
    parser.add_argument("--json", action="store_true", help="print eval.json instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from mrpo.assessment import check_same_questions, read_models
    from mrpo.assessment.folder import check_folder

    texts = [*args.inputs, *args.overrides]
    files = [Path(text) for text in texts if not _is_setting(text)]
    config = _load(args.config, [text for text in texts if _is_setting(text)])
    if not files:
        raise UserError("name at least one file of completions, as written by mrpo infer")
    models = read_models(files, args.name)
    check_same_questions(models)
    if not args.overwrite:
        check_folder(args.out, models, config, args.resamples)
    try:
        content = _evaluate(models, config, args)
    except OSError as error:
        raise UserError(f"{args.out} cannot be written: {error}") from None
    _print(content, as_json=args.json, out=args.out)
    return 0


def _is_setting(text: str) -> bool:
    return _SETTING.match(text) is not None and not os.path.exists(text)  # unlike Path's, it takes any length


def _load(file: Path | None, overrides: Sequence[str]) -> Config:
    from mrpo.settings import load_config

    config = load_config(file, overrides)
    for text in overrides:
        if not text.startswith(_TAKEN):
            raise UserError(f"{text}: mrpo eval takes judge.*, reward.* and advantage.tau")
    return config


def _evaluate(models: Sequence[ModelCompletions], config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Judges, and writes everything once all verdicts are there.

    The eval.json of an earlier evaluation goes before anything of it is replaced and the new one comes last, so that a
    folder with one is complete.
    """
    from contextlib import closing

    from mrpo.assessment import Assessor
    from mrpo.assessment.content import build_content
    from mrpo.assessment.folder import read_content, remove_evaluation, write_content, write_traces
    from mrpo.judge.cache import VerdictCache
    from mrpo.report.eval_tables import write_tables
    from mrpo.telemetry import show_progress
    from mrpo.telemetry.run_log import stderr_console

    earlier = read_content(args.out)
    folder = args.cache or config.judge.cache or args.out / "cache"
    cache = VerdictCache(folder) if config.judge.kind == "openai" else None
    args.out.mkdir(parents=True, exist_ok=True)
    console = stderr_console()
    assessed = {}
    with closing(Assessor(config, cache)) as assessor:
        for model in models:
            total = len(model.questions) * model.samples
            with show_progress(f"judging {model.name}", total, console=console) as progress:
                assessed[model.name] = assessor.assess(model, progress)
        judge = assessor.judge_name(models[0].datasets)
    content = build_content(models, assessed, judge, config, args.resamples)
    if earlier is not None:
        remove_evaluation(args.out, earlier)
    for name, completions in assessed.items():
        write_traces(args.out, name, completions)
    write_tables(content, args.out / "tables")
    write_content(args.out, content)
    return content


def _print(content: dict[str, Any], *, as_json: bool, out: Path) -> None:
    import json

    from mrpo.report.eval_tables import paired_table, summary_table
    from mrpo.telemetry.run_log import stdout_console

    if as_json:
        print(json.dumps(content, indent=1, allow_nan=False))
        return
    console = stdout_console()
    console.print(summary_table(content))
    if content["tests"]:
        console.print()
        console.print(paired_table(content))
    console.print(f"wrote {out}", markup=False)
