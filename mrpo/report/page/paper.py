"""The paper's results, to stand beside ours: arXiv 2606.31825. Percentages, as the paper prints them."""

from __future__ import annotations

SOURCE = "arXiv 2606.31825"
CASCADE_BACKBONE = "Qwen3-VL-8B"
METHODS = ("base", "SFT", "GRPO", "GDPO", "MRPO")

# Average answer accuracy over eight data sets, in the order of METHODS.
ACCURACY: dict[str, tuple[float, ...]] = {
    "Qwen2.5-VL-7B": (23.36, 23.59, 26.06, 25.92, 26.79),
    "Qwen3-VL-8B": (26.83, 26.79, 28.69, 29.01, 29.09),
    "InternVL3-8B": (28.07, 27.94, 30.84, 30.11, 31.94),
}

# CASCADE_BACKBONE: share of samples whose first failure is early, mid, late; and the FAR in the earliest FFP bin.
STAGE_SHARES: dict[str, tuple[float, float, float]] = {
    "base": (64.0, 26.4, 9.6),
    "GRPO": (21.2, 35.1, 43.6),
    "GDPO": (21.4, 37.4, 41.3),
    "MRPO": (13.0, 39.9, 47.0),
}
EARLIEST_FAR: dict[str, float] = {"base": 64.6, "GRPO": 62.9, "GDPO": 58.4, "MRPO": 43.3}
