import pytest

from mrpo.data.order import batch_indices, steps_for


def test_every_pass_shows_every_example_once() -> None:
    shown = [i for step in range(6) for i in batch_indices(12, 4, step, seed=3)]
    assert sorted(shown[:12]) == list(range(12))
    assert sorted(shown[12:]) == list(range(12))
    assert shown[:12] != shown[12:]


def test_a_batch_may_span_passes_and_exceed_the_data() -> None:
    shown = [i for step in range(3) for i in batch_indices(5, 7, step, seed=0)]
    for epoch in range(4):
        assert sorted(shown[5 * epoch : 5 * epoch + 5]) == list(range(5))


def test_order_depends_on_the_seed_and_on_nothing_else() -> None:
    assert batch_indices(100, 16, 3, seed=1) == batch_indices(100, 16, 3, seed=1)
    assert batch_indices(100, 16, 3, seed=1) != batch_indices(100, 16, 3, seed=2)


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (2.0, 5), (0.1, 1)])
def test_steps_for_rounds_up(epochs: float, steps: int) -> None:
    assert steps_for(10, 4, epochs) == steps
