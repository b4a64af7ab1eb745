from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from mrpo.errors import UserError
from mrpo.report.curves import collect_series
from mrpo.report.style import INK, TIME_COLORS
from mrpo.report.timeline import draw_timeline, stage_seconds

STEP = {"rollout": 2.0, "logprobs": 0.5, "judge_wait": 1.0, "update": 3.0, "sync": 0.5}


def records(count: int, **changes: float) -> list[dict[str, Any]]:
    stages = {f"time/{name}": seconds for name, seconds in (STEP | changes).items()}
    return [{"step": step, **stages, "time/step": sum(stages.values()) + 1.0} for step in range(1, count + 1)]


def draw(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_timeline(folder / "metrics.jsonl", folder / "timeline.png")
    return folder / "timeline.png"


def share_of_colour(path: Path, colour: str) -> float:
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)
    return float((np.abs(pixels - np.rint(np.array(to_rgb(colour)) * 255)) <= 2).all(axis=-1).mean())


def test_the_area_of_a_stage_is_its_time(tmp_path: Path) -> None:
    path = draw(tmp_path, records(40))
    areas = {name: share_of_colour(path, color) for name, color in TIME_COLORS.items()}
    for name, seconds in (STEP | {"other": 1.0}).items():
        # The key's little boxes add about as much to each.
        assert areas[name] / areas["update"] == pytest.approx(seconds / 3.0, abs=0.04), name


def test_stages_are_of_their_own_steps_and_the_rest_is_other() -> None:
    rows = [
        {"step": 1, "time/rollout": 2.0, "time/update": 1.0, "time/step": 3.5},
        {"step": 2, "time/update": 4.0, "time/judge_wait": 0.5, "time/step": 4.0},
        {"step": 4, "time/rollout": 1.0, "time/update": 1.0, "time/step": 2.0, "time/sync": 0.0},
    ]
    steps, stages = stage_seconds(collect_series(rows))
    assert steps.tolist() == [1, 2, 4]
    assert {name: seconds.tolist() for name, seconds in stages.items()} == {
        "rollout": [2, 0, 1],
        "judge_wait": [0, 0.5, 0],
        "update": [1, 4, 1],
        "other": [0.5, 0, 0],  # never below 0: clocks are read one after the other
    }


def test_the_judges_share_is_drawn_where_it_is_known(tmp_path: Path) -> None:
    without = Image.open(draw(tmp_path, records(5)))
    rows = [row | {"judge/overlapped": 0.95} for row in records(5)]
    path = draw(tmp_path, rows)
    assert Image.open(path).height > 1.2 * without.height
    assert share_of_colour(path, INK) > 0


@pytest.mark.parametrize("count", [1, 500])
def test_one_step_and_many(tmp_path: Path, count: int) -> None:
    path = draw(tmp_path, records(count))
    assert share_of_colour(path, TIME_COLORS["update"]) > 0.01


def test_a_run_without_times_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: holds no time/step"):
        draw(tmp_path, [{"step": 1, "loss": 1.0}])
