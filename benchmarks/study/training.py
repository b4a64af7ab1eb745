"""One training run of the study, in this process: SFT for warm starts, every method for its arms."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from study.judges import ErringJudge

from mrpo.config import Config
from mrpo.run import load_inputs, train
from mrpo.runtime import Runtime
from mrpo.settings import load_config

COMMON = (
    "data.name=phantom",
    "data.phantom_look=hard",
    "data.train_size=60000",
    "prompt.instruction=",
    "eval.at_start=false",
    "eval.at_end=false",
    "checkpoint.every=0",
    "checkpoint.export=true",
    "log.tensorboard=false",
    "log.plots=false",
    "log.samples=0",
)


@cache
def runtime() -> Runtime:
    """This process's, alone."""
    return Runtime.start(0)


def configure(overrides: Sequence[str]) -> Config:
    return load_config(None, [*COMMON, *overrides])


def train_policy(config: Config, *, flipped: float = 0.0, missing: float = 0.0) -> Path:
    """Trains and returns the folder of the policy; an unfinished earlier run in the same place is replaced."""
    shutil.rmtree(config.output_dir, ignore_errors=True)
    inputs = load_inputs(config)
    if flipped or missing:
        inputs = replace(inputs, judge=ErringJudge(inputs.judge, flipped=flipped, missing=missing, seed=config.seed))
    status = train(config, inputs, runtime(), resume=False, overwrite=False)
    if status:
        raise RuntimeError(f"the run in {config.output_dir} ended with status {status}")
    return config.output_dir / "policy"
