from __future__ import annotations

import json
import math

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from mrpo.errors import UserError
from mrpo.report.curves import collect_series, draw_curves, smooth
from mrpo.report.style import ORANGE, STAGE_COLORS
from mrpo.telemetry import JsonLines


def write_metrics(path, records) -> None:
    file = JsonLines(path, resume_step=None)
    for step, record in enumerate(records, start=1):
        file.write(step, record)
    file.close()


def share_of_colour(path, colour: str) -> float:
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.int16)
    return float((np.abs(pixels - np.rint(np.array(to_rgb(colour)) * 255)) <= 2).all(axis=-1).mean())


RL = {
    "reward": 1.0, "reward/answer": 0.5, "reward/process": 0.6, "reward/length": -0.1, "answer/correct": 0.4,
    "failures/early": 0.3, "failures/mid": 0.1, "failures/late": 0.1, "far": math.nan, "loss": 0.01, "kl": 0.0,
    "grad_norm": 1.0, "completion/tokens": 90.0, "num_steps": 6.0, "time/rollout": 1.0, "time/update": 1.0,
}  # fmt: skip


def test_area_of_early_failures_is_their_share(tmp_path):
    shares = []
    for early in (0.2, 0.6):
        stages = {"failures/early": early, "failures/mid": 0.1, "failures/late": 0.1}
        write_metrics(tmp_path / "metrics.jsonl", [stages] * 30)
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "new" / "curves.png")
        shares.append(share_of_colour(tmp_path / "new" / "curves.png", STAGE_COLORS["early"]))
    assert shares[1] / shares[0] == pytest.approx(3.0, rel=0.1)


def test_panels_without_data_are_left_out(tmp_path):
    write_metrics(tmp_path / "rl.jsonl", [RL] * 3)
    write_metrics(tmp_path / "sft.jsonl", [{"loss": 2.0 - step / 50, "grad_norm": 1.0} for step in range(50)])
    draw_curves(tmp_path / "rl.jsonl", tmp_path / "rl.png")
    draw_curves(tmp_path / "sft.jsonl", tmp_path / "sft.png")
    rl, sft = Image.open(tmp_path / "rl.png"), Image.open(tmp_path / "sft.png")
    assert rl.width > 2.5 * sft.width
    assert rl.height > 1.8 * sft.height
    assert share_of_colour(tmp_path / "sft.png", ORANGE) == 0.0


def test_a_single_step_is_visible(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", [{"reward/length": -0.5}])
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert share_of_colour(tmp_path / "curves.png", ORANGE) > 0.0


def test_a_torn_last_line_is_no_obstacle(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n" + '{"step": 2, "lo')
    draw_curves(path, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").format == "PNG"


def test_nothing_to_draw_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": null}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    with pytest.raises(UserError, match=r"other\.jsonl"):
        draw_curves(tmp_path / "other.jsonl", tmp_path / "curves.png")


def test_series_skip_missing_and_undefined_values():
    series = collect_series([{"step": 1, "far": None, "loss": 1}, {"step": 2, "far": 0.5}, {"step": 4, "loss": 3.0}])
    assert {name: (s.tolist(), v.tolist()) for name, (s, v) in series.items()} == {
        "loss": ([1.0, 4.0], [1.0, 3.0]),
        "far": ([2.0], [0.5]),
    }


def test_smoothing_is_a_centred_mean():
    values = np.random.default_rng(0).normal(size=50)
    expected = [values[max(0, i - 2) : i + 3].mean() for i in range(50)]  # 50 // 24 = 2 to either side
    np.testing.assert_allclose(smooth(values), expected, atol=1e-12)
    np.testing.assert_array_equal(smooth(values[:5]), values[:5])
