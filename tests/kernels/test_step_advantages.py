from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import TRITON, device_of

from mrpo.kernels import step_advantages
from mrpo.kernels.dispatch import use

every_implementation = pytest.mark.parametrize("implementation", ["reference", TRITON])

PENALTIES = ("exponential", "linear", "none", "reversed")
STEP_IDS = [-1, 0, 0, 1, 2, 3, -1]  # four steps, a tag before and the answer after them


def shape(
    advantage: float,
    valid: list[bool],
    step_ids: list[int],
    *,
    correct: bool = False,
    num_steps: int,
    implementation: str = "reference",
    **options: Any,
) -> list[float]:
    """One completion in fp64."""
    arguments = (
        torch.tensor([advantage], dtype=torch.float64),
        torch.tensor([correct]),
        torch.tensor([step_ids]),
        torch.tensor([valid], dtype=torch.bool),
        torch.tensor([num_steps]),
    )
    with use(implementation):
        shaped = step_advantages(*(tensor.to(device_of(implementation)) for tensor in arguments), **options)
    return shaped[0].tolist()


@every_implementation
def test_wrong_answer_with_four_invalid_steps_by_hand(implementation: str) -> None:
    w = [2.718281828459045, 1.9477340410546757, 1.3956124250860895, 1.0]  # e, e^(2/3), e^(1/3), 1
    expected = [-2.0, -2 * w[0], -2 * w[0], -2 * w[1], -2 * w[2], -2 * w[3], -2.0]
    shaped = shape(-2.0, [False] * 4, STEP_IDS, num_steps=4, implementation=implementation)
    assert shaped == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_valid_steps_are_rewarded_and_invalid_ones_punished_whatever_the_sign(advantage: float) -> None:
    shaped = shape(advantage, [True, False, True, False], STEP_IDS, num_steps=4)
    expected = [advantage, 2, 2, -2 * 1.9477340410546757, 2, -2, advantage]
    assert shaped == pytest.approx(expected, rel=1e-14)


def test_correct_answer_keeps_the_advantage_at_every_token() -> None:
    assert shape(1.5, [False] * 4, STEP_IDS, correct=True, num_steps=4) == [1.5] * 7


@every_implementation
def test_unjudged_completion_keeps_the_advantage_at_every_token(implementation: str) -> None:
    assert shape(-1.5, [False] * 4, STEP_IDS, num_steps=0, implementation=implementation) == [-1.5] * 7
    assert shape(-1.5, [], STEP_IDS, num_steps=0, implementation=implementation) == [-1.5] * 7


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_single_invalid_step_has_weight_one(penalty: str) -> None:
    assert shape(0.5, [False], [-1, 0, 0], num_steps=1, penalty=penalty) == [0.5, -0.5, -0.5]


@every_implementation
def test_steps_that_the_judge_did_not_return_keep_the_advantage(implementation: str) -> None:
    for valid in ([True, True, True, True], [True, True]):
        shaped = shape(-1.0, valid, STEP_IDS, num_steps=2, implementation=implementation)
        assert shaped == [-1, 1, 1, 1, -1, -1, -1]


@every_implementation
def test_rounded_weights_have_two_decimals(implementation: str) -> None:
    shaped = shape(1.0, [False] * 4, STEP_IDS, num_steps=4, implementation=implementation, round_weights=True)
    assert shaped == [1.0, -2.72, -2.72, -1.95, -1.4, -1.0, 1.0]


def test_linear_and_equal_penalties() -> None:
    linear = shape(3.0, [False] * 4, STEP_IDS, num_steps=4, penalty="linear")
    assert linear == pytest.approx([3.0, -6.0, -6.0, -5.0, -4.0, -3.0, 3.0])
    assert shape(3.0, [False] * 4, STEP_IDS, num_steps=4, penalty="none") == [3.0, -3, -3, -3, -3, -3, 3.0]


@every_implementation
def test_reversed_penalty_runs_from_one_to_e(implementation: str) -> None:
    shaped = shape(-1.0, [False] * 3, [0, 1, 2], num_steps=3, implementation=implementation, penalty="reversed")
    assert shaped == pytest.approx([-1.0, -math.sqrt(math.e), -math.e], rel=1e-14)


@every_implementation
def test_penalty_may_be_a_function_of_step_and_steps(implementation: str) -> None:
    options = {"num_steps": 4, "implementation": implementation}
    shaped = shape(1.0, [False] * 4, STEP_IDS, penalty=lambda k, num_steps: 10 * num_steps + k, **options)
    assert shaped == [1, -41, -41, -42, -43, -44, 1]


@every_implementation
@pytest.mark.parametrize("num_steps", [2, 4])
def test_penalty_may_be_a_table(implementation: str, num_steps: int) -> None:
    by_step = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0], device=device_of(implementation))  # longer than any completion
    by_steps_and_step = by_step + 10 * torch.arange(1, 6, device=by_step.device)[:, None]
    options = {"num_steps": num_steps, "implementation": implementation}
    weights = [-9.0, -9.0, -8.0, -7.0, -6.0]
    expected = [1.0, *weights[: num_steps + 1], *[1.0] * (5 - num_steps)]
    assert shape(1.0, [False] * 4, STEP_IDS, penalty=by_step, **options) == expected
    higher = [value if value > 0 else value - 10 * num_steps for value in expected]
    assert shape(1.0, [False] * 4, STEP_IDS, penalty=by_steps_and_step, **options) == higher


@every_implementation
def test_weights_halfway_between_two_decimals_round_to_the_even_one(implementation: str) -> None:
    """As Python and PyTorch do: 1 + 1/8, 1 + 3/8 and 1 + 5/8 are exact in binary."""
    options = {"num_steps": 9, "implementation": implementation, "penalty": "linear", "round_weights": True}
    assert shape(1.0, [False] * 9, [3, 5, 7], **options) == [-1.62, -1.38, -1.12]


@every_implementation
def test_the_hundredfold_of_a_weight_is_rounded_before_its_nearest_integer(implementation: str) -> None:
    """As PyTorch does: 100 times the double nearest to 0.065 is 6.5 in fp64, but lies above 6.5 in exact arithmetic."""
    options = {"num_steps": 2, "implementation": implementation, "round_weights": True}
    assert shape(1.0, [False] * 2, [0, 1], penalty=torch.tensor([0.065, 0.145]), **options) == [-0.06, -0.14]


@every_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_result_has_the_dtype_and_device_of_the_advantages(implementation: str, dtype: torch.dtype) -> None:
    device = device_of(implementation)
    arguments = {name: tensor.to(device) for name, tensor in valid_arguments().items()}
    arguments["advantages"] = arguments["advantages"].to(dtype)
    with use(implementation):
        shaped = step_advantages(**arguments)
    assert shaped.dtype == dtype
    assert shaped.device.type == device
    # Steps 0 and 1 of 2: weights e and 1, rounded to the dtype; the second is valid.
    expected = torch.tensor([-1.0, -math.e, -math.e, 1.0, 1.0], dtype=dtype, device=device)
    torch.testing.assert_close(shaped[1], expected)  # Triton's interpreter truncates to bf16


def test_completions_without_tokens() -> None:
    arguments = valid_arguments()
    arguments["step_ids"] = arguments["step_ids"][:, :0]
    assert step_advantages(**arguments).shape == (2, 0)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    batch, tokens, max_steps = draw(st.integers(1, 4)), draw(st.integers(0, 9)), draw(st.integers(0, 6))

    def rows(element: st.SearchStrategy[Any], length: int) -> list[list[Any]]:
        return [draw(st.lists(element, min_size=length, max_size=length)) for _ in range(batch)]

    return {
        "advantages": [draw(st.floats(-5, 5)) for _ in range(batch)],
        "answer_correct": [draw(st.booleans()) for _ in range(batch)],
        "step_ids": rows(st.integers(-1, 7), tokens),
        "step_valid": rows(st.booleans(), max_steps),
        "num_steps": [draw(st.integers(0, max_steps)) for _ in range(batch)],
        "penalty": draw(st.sampled_from(PENALTIES)),
        "round_weights": draw(st.booleans()),
    }


def formula(batch: dict[str, Any]) -> list[list[float]]:
    """Token by token, as the method states it."""
    shaped = []
    for b, advantage in enumerate(batch["advantages"]):
        row, steps = [], batch["num_steps"][b]
        for step_id in batch["step_ids"][b]:
            if batch["answer_correct"][b] or not 0 <= step_id < steps:
                row.append(advantage)
            elif batch["step_valid"][b][step_id]:
                row.append(abs(advantage))
            else:
                k = step_id + 1
                late = 1.0 if steps == 1 else (k - 1) / (steps - 1)
                soon = 1.0 if steps == 1 else (steps - k) / (steps - 1)
                weights = {"exponential": math.exp(1 - late), "linear": 2 - late, "none": 1.0}
                weight = {**weights, "reversed": math.exp(1 - soon)}[batch["penalty"]]
                row.append(-(round(weight, 2) if batch["round_weights"] else weight) * abs(advantage))
        shaped.append(row)
    return shaped


@every_implementation
@settings(max_examples=100, deadline=None)
@given(batch=batches())
def test_agrees_with_the_formula_token_by_token(implementation: str, batch: dict[str, Any]) -> None:
    size, tokens = len(batch["advantages"]), len(batch["step_ids"][0])
    arguments = (
        torch.tensor(batch["advantages"], dtype=torch.float64),
        torch.tensor(batch["answer_correct"]),
        torch.tensor(batch["step_ids"], dtype=torch.int64).reshape(size, tokens),
        torch.tensor(batch["step_valid"], dtype=torch.bool).reshape(size, -1),
        torch.tensor(batch["num_steps"]),
    )
    options = {"penalty": batch["penalty"], "round_weights": batch["round_weights"]}
    with use(implementation):
        shaped = step_advantages(*(tensor.to(device_of(implementation)) for tensor in arguments), **options).cpu()
    expected = torch.tensor(formula(batch), dtype=torch.float64).reshape(size, tokens)
    torch.testing.assert_close(shaped, expected, rtol=1e-13, atol=1e-13)


def valid_arguments() -> dict[str, torch.Tensor]:
    return {
        "advantages": torch.tensor([1.0, -1.0]),
        "answer_correct": torch.tensor([True, False]),
        "step_ids": torch.tensor([[-1, 0, 1, 2, -1], [-1, 0, 0, 1, 1]]),
        "step_valid": torch.tensor([[True, False, True], [False, True, False]]),
        "num_steps": torch.tensor([3, 2]),
    }


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("advantages", torch.tensor([1, 2]), TypeError),
        ("advantages", torch.ones(3), ValueError),
        ("answer_correct", torch.ones(2), TypeError),
        ("answer_correct", torch.ones(2, 1, dtype=torch.bool), ValueError),
        ("step_ids", torch.zeros(5, dtype=torch.int64), ValueError),
        ("step_ids", torch.zeros(2, 5), TypeError),
        ("step_ids", torch.full((2, 5), -100), ValueError),
        ("step_valid", torch.ones(2, 3), TypeError),
        ("step_valid", torch.ones(3, 3, dtype=torch.bool), ValueError),
        ("num_steps", torch.tensor([3, 4]), ValueError),
        ("num_steps", torch.tensor([-1, 2]), ValueError),
        ("num_steps", torch.tensor([3, 2], dtype=torch.int32), TypeError),
        ("penalty", "quadratic", ValueError),
        ("penalty", torch.ones(2), ValueError),
        ("penalty", torch.ones(3, 4), ValueError),
        ("penalty", torch.ones(3, dtype=torch.int64), TypeError),
    ],
)
def test_bad_argument_is_named(name: str, value: Any, error: type[Exception]) -> None:
    arguments: dict[str, Any] = {**valid_arguments(), name: value}
    with pytest.raises(error, match=name):
        step_advantages(**arguments)
