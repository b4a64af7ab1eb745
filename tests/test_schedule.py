import pytest

from mrpo.config import OptimConfig
from mrpo.schedule import learning_rate


def rates(schedule: str, total: int = 12) -> list[float]:
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule=schedule)  # type: ignore[arg-type]
    return [learning_rate(config, step, total) for step in range(total)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    assert rates(schedule)[:3] == [0.5, 1.0, 1.0]


def test_decays() -> None:
    assert rates("constant")[2:] == [1.0] * 10
    assert rates("linear")[2:] == pytest.approx([1.0 - i / 10 for i in range(10)])
    assert rates("cosine")[7] == pytest.approx(0.5)
    assert rates("cosine")[-1] == pytest.approx(0.0244717, rel=1e-5)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(OptimConfig(lr=2.0, warmup_steps=0), 0, 10) == 2.0
