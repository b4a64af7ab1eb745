"""One update is the same whatever the packing, the number of processes and the ZeRO stage, and after lack of memory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from tiny_models import TINY_FAMILIES, build_tiny_model

WORKER = Path(__file__).parent / "update_worker.py"
FAILING = [f"qwen3_vl zero {stage} fails {where}" for stage in (0, 1) for where in ("forward", "backward")]
IN_PARTS = [f"qwen3_vl zero {stage} in parts" for stage in (0, 1, 2, 3)]
IN_PARTS += [f"qwen3_vl zero {stage} in parts fails backward" for stage in (0, 1)]
# Of all parts but the last, by number of processes.
COMPUTED = {1: [True, False, True, True, True], 2: [True, False, False, True, True]}
PLAIN = [f"qwen3_vl zero {stage}" for stage in (0, 1, 2, 3)]
# What one dense process without ZeRO gives: on how many processes the same must come out, in which settings.
SAME = {
    "qwen3_vl dense": {
        1: PLAIN + FAILING + IN_PARTS,
        2: [*PLAIN, *FAILING, *IN_PARTS, "qwen3_vl dense zero 3", "qwen3_vl offloaded reference"],
    },
    "qwen2_5_vl dense": {2: ["qwen2_5_vl zero 3"]},
    "internvl dense": {2: ["internvl zero 3"]},
    "lora dense": {1: ["lora zero 0"], 2: ["lora zero 0", "lora zero 3"]},
}
CASES = [
    (expected, processes, name)
    for expected, by_processes in SAME.items()
    for processes, names in by_processes.items()
    for name in names
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict[str, Any]]:
    """What an update gave, by number of processes and name of the setting."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("update")
    for family in TINY_FAMILIES:
        build_tiny_model(family, folder / family)
    found = {}
    for num_processes in (1, 2):
        out = folder / f"{num_processes}.pt"
        done = launch(WORKER, [str(folder), str(out)], num_processes)
        assert out.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
        found |= {(num_processes, name): result for name, result in torch.load(out, weights_only=False).items()}
    return found


@pytest.mark.parametrize(("expected", "processes", "name"), CASES)
def test_gradients_agree(results: dict, expected: str, processes: int, name: str) -> None:
    gradients, found = results[1, expected]["gradients"], results[processes, name]["gradients"]
    assert found.keys() == gradients.keys()
    assert len(gradients) > 40
    scale = max(float(gradient.norm()) for gradient in gradients.values())
    for parameter, gradient in gradients.items():
        error = (found[parameter].double() - gradient.double()).norm()
        assert error <= 1e-5 * gradient.double().norm() + 1e-7 * scale, parameter


@pytest.mark.parametrize(("expected", "processes", "name"), CASES)
def test_loss_norm_and_weights_agree(results: dict, expected: str, processes: int, name: str) -> None:
    reference, found = results[1, expected], results[processes, name]
    torch.testing.assert_close(found["sums"], reference["sums"], rtol=1e-5, atol=1e-6)
    assert found["norm"] == pytest.approx(reference["norm"], rel=1e-5)
    for group, pair in reference["logprobs"].items():
        for values, others in zip(pair, found["logprobs"][group], strict=True):
            torch.testing.assert_close(others, values, rtol=1e-5, atol=2e-5)
    for parameter, weight in reference["weights"].items():
        # Adam's first step is lr * sign(gradient) wherever the gradient is not tiny.
        moved = (found["weights"][parameter] - weight).abs() > 1e-5
        assert moved.float().mean() < 0.01, parameter


@pytest.mark.parametrize("name", IN_PARTS[:4])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_part_is_computed_before_the_next_is_asked_for(results: dict, processes: int, name: str) -> None:
    run = results[processes, name]["passes before parts"]
    # Nothing is computed for a part that nobody has rows of.
    assert [later > earlier for earlier, later in pairwise(run)] == COMPUTED[processes]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_reference_is_the_policy_without_adapters(results: dict, processes: int) -> None:
    for old, reference in results[processes, "lora zero 0"]["logprobs"].values():
        assert (old - reference).abs().max() > 1e-2


@pytest.mark.parametrize("name", FAILING)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_pass_without_memory_is_split_and_told(results: dict, processes: int, name: str) -> None:
    found = results[processes, name]
    plain = results[processes, name.partition(" fails")[0]]
    passes, _, _, splits, _ = (found["work"] - plain["work"]).tolist()
    assert (passes, splits) == (1, 1)
    [message] = [message for message in found["messages"] if "was split" in message]
    assert "injected" in message


@pytest.mark.parametrize("stage", [0, 1])
def test_nothing_is_counted_twice_in_bfloat16(results: dict, stage: int) -> None:
    plain, failed = (results[1, f"bf16 zero {stage}{end}"]["gradients"] for end in ("", " fails backward"))
    for parameter, gradient in plain.items():
        if gradient.norm() > 1e-3 * max(other.norm() for other in plain.values()):
            assert (failed[parameter] - gradient).norm() < 0.05 * gradient.norm(), parameter
