"""`mrpo infer`: a model's completions for a file of questions."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mrpo.commands.parser import Commands, positive

if TYPE_CHECKING:
    from mrpo.inference import InferredQuestion, Sampling

_DESCRIPTION = """\
Writes a model's completions for prepared questions, one JSON object a line, in the order of the data.

A run that was stopped at any moment goes on with the same command: rows that are there are kept. At temperature 0
completions are greedy; above, they follow from --seed and the question's id. The policy that a run wrote remembers the
run's prompt: tag, instruction, largest image, longest prompt. It does not remember rollout.max_tokens: see
--max-tokens."""

_BATCH_SIZES = {"hf": 32, "vllm": 256}


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "infer", help="let a model answer prepared questions", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="model folder or hub id; phantom is the shipped policy"
    )
    parser.add_argument(
        "--data", required=True, type=Path, metavar="FILE", help="questions that `mrpo data prepare` wrote"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="JSONL file to write or go on with")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE instead of going on with it")
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder of the images; default: what the data say")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N questions")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--samples", type=positive, default=1, metavar="K", help="completions per question; default: %(default)s"
    )
    sampling.add_argument(
        "--temperature", type=_temperature, default=0.0, metavar="T", help="0 is greedy; default: %(default)s"
    )
    sampling.add_argument(
        "--max-tokens",
        type=positive,
        default=512,
        metavar="N",
        help="longest completion (of a run: rollout.max_tokens); default: %(default)s",
    )
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument(
        "--max-prompt-tokens",
        type=positive,
        metavar="N",
        help="prompt.max_tokens: longer ones, image tokens included, are refused; default: the run's that wrote the "
        "model, else 1024",
    )
    prompt.add_argument(
        "--max-image-pixels",
        type=positive,
        metavar="N",
        help="data.max_image_pixels: larger images are scaled down; default: the run's that wrote the model, else "
        "802816",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--engine",
        choices=("auto", "hf", "vllm"),
        default="auto",
        help="auto: vllm where it is installed and a GPU is there, else hf (Hugging Face); default: %(default)s",
    )
    machine.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 on a GPU, else float32; default: %(default)s",
    )
    machine.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="completions generated at once; default: 32 with hf, 256 with vllm",
    )
    parser.set_defaults(run=run)


_EPILOG = """\
examples:
  mrpo infer --model phantom --data phantom.jsonl --out phantom.greedy.jsonl
  mrpo infer --model runs/mine/policy --data test.jsonl --out mine.jsonl --samples 8 --temperature 1"""


def run(args: argparse.Namespace) -> int:
    from mrpo.backbones import load_processor, read_prompt_style
    from mrpo.config import Config
    from mrpo.data.prepared import read_prepared
    from mrpo.inference import CompletionFile, check_prompts, infer, make_engine, make_header, read_completions
    from mrpo.telemetry import show_progress

    sampling = _sampling(args)
    examples = read_prepared(args.data, root=args.root)[: args.limit]
    style = read_prompt_style(os.path.expanduser(args.model))
    max_prompt_tokens = args.max_prompt_tokens or style.max_prompt_tokens
    max_image_pixels = args.max_image_pixels or style.max_image_pixels
    config = Config.model_validate(
        {
            "model": {"path": args.model, "dtype": sampling.dtype},
            "prompt": {"max_tokens": max_prompt_tokens} if max_prompt_tokens else {},
            "data": {"max_image_pixels": max_image_pixels} if max_image_pixels else {},
            "rollout": {"engine": sampling.engine},
        }
    )
    processor = load_processor(config)
    check_prompts(examples, processor)
    header = make_header(config.model.path, processor, sampling)
    with CompletionFile(args.out, header, examples, overwrite=args.overwrite) as out:
        if out.done < len(examples):
            batch_size = args.batch_size or _BATCH_SIZES[sampling.engine]
            engine = make_engine(
                config,
                processor,
                sampling,
                batch_size=batch_size,
                max_images=max(1, *(len(example.images) for example in examples)),
            )
            with show_progress(f"{args.model} on {args.data.name}", len(examples), done=out.done) as progress:
                infer(
                    examples,
                    out,
                    processor=processor,
                    engine=engine,
                    sampling=sampling,
                    batch_size=batch_size,
                    progress=progress,
                )
    print(_summary(args.out, read_completions(args.out)))
    return 0


def _sampling(args: argparse.Namespace) -> Sampling:
    """What to sample with on this machine."""
    import importlib.util

    import torch

    from mrpo.inference import Sampling
    from mrpo.rollout.vllm_engine import require_vllm

    has_gpu = torch.cuda.is_available()
    engine, dtype = args.engine, args.dtype
    if engine == "auto":
        engine = "vllm" if has_gpu and importlib.util.find_spec("vllm") else "hf"
    if engine == "vllm":
        require_vllm()
    if dtype == "auto":
        dtype = "bfloat16" if has_gpu else "float32"
    return Sampling(args.samples, args.temperature, args.max_tokens, args.seed, engine, dtype)


def _summary(out: Path, questions: Sequence[InferredQuestion]) -> str:
    completions = [item for question in questions for item in question.completions]
    cut = sum(item.completion.finish_reason == "length" for item in completions)
    unanswered = sum(item.answer is None for item in completions)
    return (
        f"{out}: {len(questions)} questions, {len(completions)} completions; "
        f"{cut} cut at the length limit, {unanswered} without an answer"
    )


def _temperature(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more")
    return value
