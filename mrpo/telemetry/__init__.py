"""What a run tells while it runs: metric and sample files, TensorBoard, Weights & Biases, the terminal."""

from mrpo.telemetry.jsonl import JsonLines, read_json_lines
from mrpo.telemetry.run_log import RunLog
from mrpo.telemetry.sinks import require_packages
from mrpo.telemetry.text import clean_text

__all__ = ["JsonLines", "RunLog", "clean_text", "read_json_lines", "require_packages"]
