"""Where scalars go besides metrics.jsonl."""

from __future__ import annotations

import importlib
import importlib.util
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mrpo.config import LogConfig
from mrpo.errors import UserError


def require_packages(config: LogConfig) -> None:
    """Check that what `config` asks for is installed.

    Raises:
        UserError: a package is missing.
    """
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("log.tensorboard=true needs a package: pip install tensorboard, or set log.tensorboard=false")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb=true needs a package: pip install mrpo[wandb], or set log.wandb=false")


class Sink(Protocol):
    """Takes the metrics of a step."""

    def write(self, step: int, record: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Event files in OUTPUT_DIR/tensorboard. Events after `resume_step` of an earlier life of the run are purged."""

    def __init__(self, output_dir: Path, *, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops every earlier event whose step is at least purge_step.
        purge_step = 0 if resume_step is None else resume_step + 1
        self._writer: Any = SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge_step, flush_secs=10)

    def write(self, step: int, record: Mapping[str, float]) -> None:
        for name, value in record.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """One Weights & Biases run per output folder: its id is kept in OUTPUT_DIR/wandb_id.txt and taken up on resume.

    The run's own counter can not go back, so that metrics are plotted against `global_step`, which can.
    """

    def __init__(self, output_dir: Path, config: LogConfig, *, resume_step: int | None) -> None:
        wandb = importlib.import_module("wandb")
        id_file = output_dir / "wandb_id.txt"
        if resume_step is None or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run: Any = wandb.init(
            project=config.wandb_project, dir=str(output_dir), id=id_file.read_text(), resume="allow"
        )
        self._run.define_metric("*", step_metric="global_step")

    def write(self, step: int, record: Mapping[str, float]) -> None:
        self._run.log({"global_step": step} | {name: value for name, value in record.items() if math.isfinite(value)})

    def close(self) -> None:
        self._run.finish()
