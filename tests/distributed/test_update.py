"""One update is the same whatever the number of processes and the ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch

WORKER = Path(__file__).parent / "update_worker.py"


@pytest.fixture(scope="module")
def results(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """What an update gave, by (number of processes, ZeRO stage)."""
    found = {}
    for num_processes in (1, 2):
        out = tmp_path_factory.mktemp("update") / "result.pt"
        done = launch(WORKER, [str(tiny_policy), str(out), "0.05"], num_processes)
        assert out.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
        for stage, result in torch.load(out, weights_only=False).items():
            found[num_processes, stage] = result
    return found


CASES = [(processes, stage) for processes in (1, 2) for stage in (0, 1, 2, 3)][1:]


@pytest.mark.parametrize("case", CASES)
def test_gradients_agree(results: dict, case: tuple[int, int]) -> None:
    expected, found = results[1, 0]["gradients"], results[case]["gradients"]
    assert found.keys() == expected.keys()
    assert len(expected) > 80
    for name, gradient in expected.items():
        error = (found[name].view_as(gradient).double() - gradient.double()).norm()
        assert error <= 1e-5 * gradient.double().norm() + 1e-9, name


@pytest.mark.parametrize("case", CASES)
def test_loss_norm_and_weights_agree(results: dict, case: tuple[int, int]) -> None:
    expected, found = results[1, 0], results[case]
    torch.testing.assert_close(found["sums"], expected["sums"], rtol=1e-5, atol=1e-6)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    for name, weight in expected["weights"].items():
        # Adam's first step is lr * sign(gradient) wherever the gradient is not tiny.
        moved = (found["weights"][name].view_as(weight) - weight).abs() > 1e-5
        assert moved.float().mean() < 0.01, name
