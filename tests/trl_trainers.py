"""TRL's trainer with MRPO in it, for the shipped policy. To be imported where TRL is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl import GRPOConfig
from trl_models import CONFIG, examples, vision_policy

from mrpo.config import Config
from mrpo.integrations.trl import MRPOTrainer, to_dataset
from mrpo.judge.phantom import PhantomJudge


def arguments(folder: Path, **changes: Any) -> GRPOConfig:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 96,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "use_bias_correction_kl": False,
        "logging_steps": 1,
    }
    return GRPOConfig(**(settings | changes))


def vision_trainer(folder: Path, judge: Any = None, *, config: Config = CONFIG, **changes: Any) -> MRPOTrainer:
    model, processor = vision_policy()
    fused = changes.pop("fused_loss", True)
    return MRPOTrainer(
        model,
        judge or PhantomJudge(),
        arguments(folder, **changes),
        config=config,
        fused_loss=fused,
        train_dataset=to_dataset(examples(8)),
        processing_class=processor,
    )
