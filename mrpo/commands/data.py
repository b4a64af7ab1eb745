"""`mrpo data`: makes prepared data of a data set's files, shows it, and checks every row and image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mrpo.commands.parser import Commands

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mrpo.data.prepare import Counts
    from mrpo.records import Example

NAMES = (
    "phantom",
    "vqa_rad",
    "slake",
    "path_vqa",
    "pmc_vqa",
    "vqa_med",
    "quilt_vqa",
    "rad_vqa",
    "mimic_vqa",
    "generic",
)

_PREPARE_EPILOG = """\
examples:
  mrpo data prepare vqa_rad --root DATA/vqa-rad --out vqa_rad.jsonl
  mrpo data prepare slake --root DATA/slake --gold DATA/MedThink --split train --out slake.jsonl
  mrpo data prepare generic --file mine.parquet --out mine.jsonl
  mrpo train data.name=prepared data.file=vqa_rad.jsonl output_dir=runs/mine

rows of generic data, in JSON, JSON lines, Parquet, or a folder that `datasets` saved:
  {image | images, problem | question, solution | answer, rationale?, id?, split?}"""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "data",
        help="prepare, show and check data",
        description="Makes one JSONL file of a data set's own files, shows samples of it, and checks it.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    _add_prepare(actions)
    _add_show(actions)
    _add_check(actions)


def _add_prepare(actions: Commands) -> None:
    prepare = actions.add_parser(
        "prepare",
        help="write a data set as one JSONL file and print its counts",
        description="Writes a data set as one JSONL file and prints its counts.",
        epilog=_PREPARE_EPILOG,
    )
    prepare.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    prepare.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="folder of the files, or where to download them; generic: of its images",
    )
    prepare.add_argument("--out", type=Path, metavar="FILE", required=True, help="JSONL file to write")
    prepare.add_argument(
        "--file", type=Path, metavar="ROWS", help="generic: file or folder of rows, or OWNER/NAME at the hub"
    )
    prepare.add_argument("--gold", type=Path, metavar="DIR", help="folder of MedThink's rationales (R-RAD, ...)")
    prepare.add_argument(
        "--split",
        choices=("train", "validation", "test", "all"),
        default="all",
        help="split to prepare (train, validation, test); default: all whose files are there",
        metavar="S",
    )
    prepare.add_argument(
        "--questions",
        choices=("open", "all"),
        help="open: leave out questions answered by yes or no; all: keep them (default for generic)",
    )
    prepare.add_argument(
        "--on-error", choices=("raise", "skip"), default="raise", help="broken rows: report all and stop, or leave out"
    )
    prepare.add_argument("--dataset", metavar="NAME", help="what tables call it; default: NAME, or ROWS for generic")
    prepare.add_argument("--size", type=_positive, metavar="N", help="phantom: questions in each split")
    prepare.add_argument("--seed", type=int, default=0, metavar="N", help="phantom: seed; default: 0")
    prepare.add_argument("--json", action="store_true", help="print the counts as JSON")
    prepare.set_defaults(run=run_prepare)


def _add_show(actions: Commands) -> None:
    show = actions.add_parser(
        "show", help="print samples of a prepared file", description="Prints samples of a prepared file."
    )
    _add_file(show)
    show.add_argument("-n", type=_positive, default=3, metavar="N", help="how many; default: 3")
    show.add_argument("--seed", type=int, metavar="N", help="draw them at random with this seed; default: the first")
    show.set_defaults(run=run_show)


def _add_check(actions: Commands) -> None:
    check = actions.add_parser(
        "check",
        help="check every row and image of a prepared file",
        description="Checks every row and decodes every image; lists all problems and then ends with status 1.",
    )
    _add_file(check)
    check.add_argument("--json", action="store_true", help="print the result as JSON")
    check.set_defaults(run=run_check)


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="JSONL file that `mrpo data prepare` wrote")
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder of the images; default: the rows' own")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def run_prepare(args: argparse.Namespace) -> int:
    from mrpo.data.prepare import Order, prepare

    is_generic = args.name == "generic"
    order = Order(
        name=args.name,
        root=args.root,
        source=(args.file or args.root) if is_generic else args.file,
        splits=() if args.split == "all" else (args.split,),
        questions=args.questions or ("all" if is_generic else "open"),
        on_error=args.on_error,
        gold=args.gold,
        size=args.size,
        seed=args.seed,
        dataset=args.dataset,
    )
    counts = prepare(order, args.out)
    if args.json:
        _print_json({"file": str(args.out), "name": args.name, **_counts_record(counts)})
    else:
        _print(_counts_table(counts))
        _print(_summary(counts["total"], args.out))
    return 0


def run_show(args: argparse.Namespace) -> int:
    import random

    from mrpo.data.prepared import read_lines, row_reader
    from mrpo.data.reading import BadRow

    rows = read_lines(args.file)
    read_row = row_reader(args.file, root=args.root, missing="allow")
    numbers = list(range(min(args.n, len(rows))))
    if args.seed is not None:
        numbers = sorted(random.Random(args.seed).sample(range(len(rows)), len(numbers)))
    for number in numbers:
        try:
            _print(_sample_panel(read_row(rows[number]), number + 1))
        except BadRow as problem:
            _print(f"row {number + 1}: {problem}")
    _print(f"{len(numbers)} of {len(rows):,} rows of {args.file}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    from mrpo.data.prepared import read_lines, read_prepared
    from mrpo.data.reading import BadRows

    num_rows = len(read_lines(args.file))
    problems: tuple[str, ...] = ()
    try:
        read_prepared(args.file, root=args.root)
    except BadRows as error:
        problems = error.problems
    if args.json:
        _print_json({"file": str(args.file), "rows": num_rows, "ok": not problems, "problems": list(problems)})
    else:
        for problem in problems:
            _print(f"{args.file}: {problem}")
        found = f"{len(problems):,} of {num_rows:,} rows are bad" if problems else f"{num_rows:,} rows, all fine"
        _print(f"{args.file}: {found}")
    return 1 if problems else 0


def _counts_table(counts: dict[str, Counts]) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("split")
    for name in ("questions", "open-ended", "written", "distinct", "gold", "images", "missing"):
        table.add_column(name, justify="right")
    for split, one in counts.items():
        table.add_row(split, *(f"{value:,}" for value in one.as_dict().values()))
    return table


def _counts_record(counts: dict[str, Counts]) -> dict[str, object]:
    """The counts over all, and those of each split under `splits`."""
    splits = {split: one.as_dict() for split, one in counts.items() if split != "total"}
    return {**counts["total"].as_dict(), "splits": splits}


def _summary(total: Counts, file: Path) -> str:
    line = f"{total.written:,} questions in {file}"
    if not total.missing_images:
        return line
    return f"{line}; none of their {total.images:,} images is there: `mrpo data check` lists them"


def _sample_panel(example: Example, number: int) -> RenderableType:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from mrpo.telemetry.text import clean_text

    fields = Table.grid(padding=(0, 2))
    fields.add_column(style="bold", no_wrap=True)
    fields.add_column(overflow="fold")
    rows = [*(("image", _image_text(image)) for image in example.images), ("question", example.question)]
    rows += [("answer", example.answer), ("rationale", example.rationale or "none")]
    rows += [(key, str(value)) for key, value in example.metadata.items() if key != "dataset"]
    for name, value in rows:
        fields.add_row(Text(clean_text(name)), Text(clean_text(value)))
    title = f"{number}: {example.id} ({example.metadata['dataset']}, {example.split})"
    return Panel(fields, title=Text(clean_text(title)), title_align="left", border_style="dim")


def _image_text(image: object) -> str:
    from mrpo.pictures import shown_size

    if not isinstance(image, Path):
        return "in memory"
    if not image.exists():
        return f"{image} (missing)"
    width, height = shown_size(image)
    return f"{image} ({width} x {height})"


def _print(content: RenderableType) -> None:
    """Text as it is, without control characters and without being broken into lines; or a table."""
    from mrpo.telemetry.run_log import stdout_console
    from mrpo.telemetry.text import clean_text

    if isinstance(content, str):
        print(clean_text(content))
    else:
        stdout_console().print(content)


def _print_json(record: dict[str, object]) -> None:
    import json

    print(json.dumps(record, indent=2))
