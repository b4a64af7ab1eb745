"""The suite `kernels`: that its truth is true, its peers agree, and its figures follow from seconds and bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TINY = '''"""The suite `kernels` at tiny sizes."""

from suite_kernels import *
from suite_kernels import SOURCES, TARGETS


def cases(quick):
    shape = dict(size=8, vocab=31, dtype=torch.float32, turns=2, leave_out={LIGER_FUSED: "compiles"})
    return [
        head_case("head, Qwen3-VL-8B", 2, 5, lean=True, **shape),
        head_case("frozen head, Qwen3-VL-8B", 2, 5, frozen=True, **shape),
        rows_case(8, 301, torch.float32, turns=2),
        *(head_case(f"N = {5 * n}", n, 5, sweep="tokens", **shape) for n in (1, 2)),
        variants_case(2, 5, 8, 31, torch.float32, turns=2),
    ]
'''


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def make_problem(dtype: torch.dtype = torch.float32, *, frozen: bool = False) -> Any:
    from peers import HeadProblem

    return HeadProblem.make(3, 7, 16, 301, dtype=dtype, device=torch.device("cpu"), frozen=frozen)


def test_the_truth_is_what_autograd_gives_in_double_precision() -> None:
    def loss(problem: Any) -> torch.Tensor:
        logprobs = (problem.hidden @ problem.weight.t()).log_softmax(-1).gather(1, problem.targets[:, None])[:, 0]
        ratio = (logprobs - logprobs.detach()).exp()
        return -(ratio * problem.advantages.double() * problem.weights.double()).sum()

    problem = make_problem(torch.float64)
    expected = problem.gradients(loss)
    for found, gradient in zip(problem.true_gradients(rows_at_once=4), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("frozen", [False, True])
def test_every_installed_peer_has_these_gradients(frozen: bool) -> None:
    import harness
    import peers

    problem = make_problem(frozen=frozen)
    truth = problem.true_gradients()
    tried = [peer for peer in (*peers.HEADS, *peers.variants_of_ours(torch.float32)) if peer.missing() is None]
    assert {"ours", "eager, full logits"} <= {peer.name for peer in tried}
    with torch.compiler.set_stance("force_eager"):  # Liger would compile for half a minute
        for peer in tried:
            found = problem.gradients(peer.loss)
            assert len(found) == len(truth), peer.name
            for value, true in zip(found, truth, strict=True):
                assert harness.relative_error(value, true) < 1e-5, peer.name


def test_ligers_triton_loss_has_them_too_under_the_interpreter() -> None:
    pytest.importorskip("liger_kernel")
    code = (
        "import torch, harness, peers\n"
        "p = peers.HeadProblem.make(2, 5, 8, 61, dtype=torch.float32, device=torch.device('cpu'))\n"
        "pairs = zip(p.gradients(peers.liger_triton), p.true_gradients(), strict=True)\n"
        "assert max(harness.relative_error(a, b) for a, b in pairs) < 1e-5\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_peer_that_is_not_there_says_what_to_install() -> None:
    from peers import Peer, eager

    assert (
        Peer("x", eager, "no_such_module", "no-such-package").missing() == "not installed (pip install no-such-package)"
    )


def test_figures_follow_from_seconds() -> None:
    from results import Measured, Result
    from suite_kernels import IN_ONE_GO, PRODUCTS, figures, rows_case
    from tables import Target, target_cell, targets_table

    settings = {"kind": "head", "N": 10, "H": 100, "V": 1000, "flops": 6_000_000, "frozen": False, "sweep": ""}
    products = [Measured(name, seconds=s) for name, s in zip(PRODUCTS, (1e-6, 2e-6, 3e-6), strict=True)]
    products.append(Measured(IN_ONE_GO, seconds=6.3e-6))
    heads = [Measured("ours", seconds=8e-6, peak_bytes=1 << 30), Measured("TRL chunked", seconds=12e-6)]
    found = figures(Result("head, Qwen3-VL-8B", settings, [*heads, *products]))
    assert found["ours"]["TFLOP/s"] == pytest.approx(0.75)
    assert found["ours"]["share of ceiling"] == pytest.approx(0.75)
    assert found["ours"]["times bare products"] == pytest.approx(8 / 6)
    assert found["ours"]["faster than TRL"] == pytest.approx(1.5)
    assert found["ours"]["peak GiB"] == 1
    assert found["product: logits"]["TFLOP/s"] == pytest.approx(2.0)
    assert found[IN_ONE_GO]["times bare products"] == pytest.approx(1.05)

    h200, cpu = {"gpu": "NVIDIA H200"}, {"gpu": None, "threads": 2}
    target = Target("head, Qwen3-VL-8B", "ours", "times bare products", "at most", 1.05, "x")
    said = target_cell([target], h200, "head, Qwen3-VL-8B", "ours", found["ours"])
    assert said == "times bare products at most 1.05 x: 1.33 x, **not met**"
    assert target_cell([target], cpu, "head, Qwen3-VL-8B", "ours", found["ours"]) == ""

    rows = rows_case(4, 50, torch.bfloat16, turns=1)
    measured = [Measured("cuda", seconds=8e-10), Measured("triton", seconds=2e-9), Measured("copy", seconds=4e-10)]
    found = figures(Result(rows.name, rows.settings, measured))
    assert found["cuda"]["TB/s"] == pytest.approx(2 * 4 * 50 * 2 / 8e-10 / 1e12)
    assert found["cuda"]["share of ceiling"] == pytest.approx(0.5)
    assert found["cuda"]["faster than Triton"] == pytest.approx(2.5)

    import suite_kernels

    table = targets_table(suite_kernels, [Result("loss on logits, 8192 rows", rows.settings, measured)], h200)
    assert table is not None
    assert [row[-1] for row in table.rows] == ["**not met**", "met"]
    assert targets_table(suite_kernels, [Result("loss on logits, 8192 rows", rows.settings, measured)], cpu) is None


def test_the_suite_runs_beside_a_peer_that_raises(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "benchmarks" / "suite_tiny.py").write_text(TINY, encoding="utf-8")
    (tmp_path / "peers" / "trl").mkdir(parents=True)
    (tmp_path / "peers" / "trl" / "__init__.py").write_text("raise RuntimeError('built for another torch')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "peers"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "benchmarks" / "run.py"), "tiny", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    cases = {case["name"]: case for case in json.loads((tmp_path / "out" / "tiny.json").read_text())["cases"]}
    head = {one["name"]: one for one in cases["head, Qwen3-VL-8B"]["measured"]}
    assert head["TRL chunked"]["failure"] == "RuntimeError: built for another torch"
    assert head["Apple CCE"]["failure"] == "needs a GPU" or torch.cuda.is_available()
    assert head["ours"]["error"] < 1e-5
    assert head["ours, lean"]["runs"] == 2
    assert "product: dweight" not in {one["name"] for one in cases["frozen head, Qwen3-VL-8B"]["measured"]}
    assert head["products in one go"]["runs"] == 2
    written = {path.name for path in (tmp_path / "out").iterdir()}
    plots = {"kernels-heads.png", "kernels-rows.png", "kernels-sweeps.png", "kernels-ours.png"}
    assert written == {"tiny.json", "tiny.csv", "tiny.md", "benchmarks.md", *plots}
    page = (tmp_path / "out" / "tiny.md").read_text()
    assert "| TRL chunked | RuntimeError: built for another torch |" in page
    assert "**Policy loss from logits**" in page
    assert "| *the bare products in one go* |" in page
