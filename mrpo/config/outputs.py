"""The sections of what a run tells and leaves: evaluations, checkpoints, logs."""

from __future__ import annotations

from pydantic import Field

from mrpo.config.section import NonNegative, Positive, Section


class EvalConfig(Section):
    """Greedy evaluation on held-out questions."""

    at_start: bool = Field(True, description="Evaluate before training")
    at_end: bool = Field(True, description="Evaluate after training")
    every: NonNegative = Field(
        0,
        description="Steps between evaluations on the validation split; 0: none. A data set without one uses its test "
        "questions: choose nothing by them then",
    )


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: NonNegative = Field(
        20, description="Steps between checkpoints; 0: only on SIGTERM and after the last step, which always make one"
    )
    keep_last: Positive = Field(2, description="Newest checkpoints kept")
    keep_best: NonNegative = Field(
        1, description="Best checkpoints kept however old, by mean reward of their step; they may be among the newest"
    )
    export: bool = Field(True, description="Write the final policy in Hugging Face format to OUTPUT_DIR/policy")


class LogConfig(Section):
    """What a run leaves behind besides checkpoints."""

    tensorboard: bool = Field(True, description="Write TensorBoard events to OUTPUT_DIR/tensorboard")
    wandb: bool = Field(False, description="Log to Weights & Biases (needs the wandb package)")
    wandb_project: str = Field("mrpo", description="Weights & Biases project")
    samples: NonNegative = Field(4, description="Judged completions written to OUTPUT_DIR/samples.jsonl per step")
    plots: bool = Field(True, description="Draw OUTPUT_DIR/curves.png, timeline.png and failures.png at the end")
