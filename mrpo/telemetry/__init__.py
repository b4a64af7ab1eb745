"""What a run tells while it runs: metric and sample files, TensorBoard, Weights & Biases, the terminal."""

from mrpo.telemetry.jsonl import JsonLines, append_line, read_json_lines, whole_lines
from mrpo.telemetry.progress import show_progress
from mrpo.telemetry.run_log import RunLog
from mrpo.telemetry.sinks import require_packages
from mrpo.telemetry.text import clean_text

__all__ = [
    "JsonLines",
    "RunLog",
    "append_line",
    "clean_text",
    "read_json_lines",
    "require_packages",
    "show_progress",
    "whole_lines",
]
