"""The benchmark command, and that the peers it compares compute the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCHMARKS / "run.py"), *arguments], capture_output=True, text=True)


def test_suites_are_listed_and_unknown_ones_refused() -> None:
    assert run("--list").stdout.startswith("kernels ")
    refused = run("kernel")
    assert refused.returncode == 2
    assert "unknown suite 'kernel'" in refused.stderr


def test_every_installed_peer_has_the_same_gradients() -> None:
    import peers
    import suite_kernels

    problem = peers.HeadProblem.make(3, 7, 16, 301, dtype=torch.float32, device=torch.device("cpu"))
    # Liger compiles its loss, which takes half a minute: the suite itself checks it before it times it.
    losses = {name: loss for name, loss in peers.installed().items() if not name.startswith("Liger")}
    steps = {
        name: suite_kernels.partial(suite_kernels._forward_backward, problem, loss) for name, loss in losses.items()
    }
    agreeing, errors = suite_kernels._agreeing(problem, steps, 1e-5)
    assert {"ours", "eager full logits"} <= agreeing
    assert agreeing == set(losses), errors


def test_one_that_computes_something_else_is_found_out() -> None:
    import peers
    import suite_kernels

    problem = peers.HeadProblem.make(2, 5, 8, 31, dtype=torch.float32, device=torch.device("cpu"))
    steps = {
        "eager full logits": lambda: suite_kernels._forward_backward(problem, peers.eager),
        "wrong": lambda: suite_kernels._forward_backward(problem, lambda p: 1.01 * peers.eager(p)),
    }
    agreeing, errors = suite_kernels._agreeing(problem, steps, 1e-4)
    assert agreeing == {"eager full logits"}
    assert errors["wrong"] == pytest.approx(0.01, rel=1e-3)


def test_timings_take_turns() -> None:
    import harness

    order: list[str] = []
    candidates = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = harness.interleaved(candidates, repeats=2, warmup=1)
    assert order == list("ababab")
    assert timings["a"].low <= timings["a"].median <= timings["a"].high
