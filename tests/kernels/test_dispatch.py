from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mrpo.kernels import dispatch, linear_logprobs, policy_loss, rows
from mrpo.kernels.checks import check_values, values_are_checked

CPU = torch.device("cpu")


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "extension", lambda: None)
    dispatch._warn.cache_clear()
    yield
    dispatch._warn.cache_clear()


def tiny_loss(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    one = torch.ones(2, dtype=dtype)
    return policy_loss(torch.zeros(2, 3, dtype=dtype), torch.tensor([0, 2]), advantages=one, weights=one).loss


def test_the_table_chooses_by_device_and_dtype() -> None:
    assert dispatch.extension() is not None
    assert dispatch.implementation_of("policy_loss", CPU, torch.float32) == "cpp"
    assert dispatch.implementation_of("policy_loss", CPU, torch.bfloat16) == "cpp"
    assert dispatch.implementation_of("policy_loss", CPU, torch.float64) == "reference"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dispatch.implementation_of("policy_loss", torch.device("cuda", 1), dtype) == "triton"
    assert dispatch.implementation_of("policy_loss", torch.device("cuda"), torch.float64) == "reference"
    assert dispatch.implementation_of("step_advantages", CPU, torch.float32) == "reference"
    assert dispatch.implementation_of("step_advantages", torch.device("cuda"), torch.float64) == "triton"


def test_use_overrides_the_table_and_ends_with_its_block() -> None:
    with dispatch.use("reference"):
        assert dispatch.implementation_of("policy_loss", CPU, torch.float32) == "reference"
    assert dispatch.implementation_of("policy_loss", CPU, torch.float32) == "cpp"


def test_the_backward_pass_runs_as_the_forward_pass_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever thread: on GPUs autograd runs it in one of its own."""
    asked: list[str] = []

    def tell(*arguments: Any) -> str:
        asked.append(dispatch.implementation_of(*arguments))
        return asked[-1]

    monkeypatch.setattr(rows, "implementation_of", tell)
    hidden = torch.ones(2, 4, requires_grad=True)
    with dispatch.use("reference"):
        logprobs, _ = linear_logprobs(hidden, torch.ones(3, 4), torch.tensor([0, 2]))
    thread = threading.Thread(target=logprobs.sum().backward)
    thread.start()
    thread.join()
    assert hidden.grad is not None
    assert asked == ["reference"] * 2


def test_a_forced_implementation_that_does_not_fit_raises() -> None:
    with dispatch.use("cpp"), pytest.raises(RuntimeError, match=r"'cpp' does not serve torch\.float64"):
        tiny_loss(torch.float64)
    with dispatch.use("quantum"), pytest.raises(RuntimeError, match="'quantum'"):
        tiny_loss()


@pytest.mark.usefixtures("without_extension")
def test_without_the_extension_the_reference_runs_and_warns_once() -> None:
    with pytest.warns(RuntimeWarning, match=r"mrpo\._C is not built") as caught:
        assert tiny_loss().item() == -2.0
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiny_loss().item() == -2.0


@pytest.mark.usefixtures("without_extension")
def test_without_the_extension_it_cannot_be_forced() -> None:
    with dispatch.use("cpp"), pytest.raises(RuntimeError, match="not built"):
        tiny_loss()


@pytest.mark.usefixtures("without_extension")
def test_the_fallback_can_be_forbidden() -> None:
    with dispatch.forbid_fallback(), pytest.raises(RuntimeError, match=r"policy_loss: mrpo\._C is not built"):
        tiny_loss()


def test_a_device_that_the_table_does_not_list_gets_the_reference_and_a_warning() -> None:
    dispatch._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"no kernel serves torch\.float32 on meta: policy_loss runs in plain"):
        assert dispatch.implementation_of("policy_loss", torch.device("meta"), torch.float32) == "reference"
    with dispatch.forbid_fallback(), pytest.raises(RuntimeError, match="on meta"):
        dispatch.implementation_of("policy_loss", torch.device("meta"), torch.float32)


def test_an_operator_without_the_forced_implementation_runs_as_usual() -> None:
    with dispatch.use("cpp"):
        assert dispatch.implementation_of("step_advantages", CPU, torch.float32) == "reference"


@pytest.mark.parametrize("interpreted", [True, False])
def test_triton_runs_on_the_cpu_under_its_interpreter_only(interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    with dispatch.use("triton"):
        if interpreted:
            assert dispatch.implementation_of("policy_loss", CPU, torch.float32) == "triton"
        else:
            with pytest.raises(RuntimeError, match="'triton' does not serve"):
                dispatch.implementation_of("policy_loss", CPU, torch.float32)


def test_without_triton_the_reference_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda _: None)
    dispatch._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match="triton is not installed"):
        assert dispatch.implementation_of("policy_loss", torch.device("cuda"), torch.bfloat16) == "reference"


def machine_with(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architectures: tuple[str, ...]) -> None:
    """A GPU and a compiled module, as far as the table looks."""
    monkeypatch.setattr(dispatch, "extension", lambda: SimpleNamespace(cuda_architectures=architectures))
    monkeypatch.setattr(dispatch, "_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((8, 0), ("sm_80", "sm_90a"), "triton"),
        ((9, 0), ("sm_80", "sm_90a"), "cuda"),
        ((12, 0), ("sm_80", "sm_90a"), "cuda"),
        ((9, 0), (), "triton"),
    ],
)
def test_the_cuda_kernel_is_preferred_where_there_are_clusters(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architectures: tuple[str, ...], expected: str
) -> None:
    machine_with(monkeypatch, capability, architectures)
    with warnings.catch_warnings(), dispatch.forbid_fallback():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert dispatch.implementation_of("policy_loss", torch.device("cuda", 0), dtype) == expected
    with dispatch.use("triton"):
        assert dispatch.implementation_of("policy_loss", torch.device("cuda", 0), torch.bfloat16) == "triton"


def test_the_cuda_kernel_can_be_forced_on_older_gpus_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    machine_with(monkeypatch, (8, 0), ("sm_80",))
    with dispatch.use("cuda"):
        assert dispatch.implementation_of("policy_loss", device, torch.bfloat16) == "cuda"
        assert dispatch.implementation_of("step_advantages", device, torch.float32) == "triton"
        with pytest.raises(RuntimeError, match=r"'cuda' does not serve torch\.float64 on cuda"):
            dispatch.implementation_of("policy_loss", device, torch.float64)
        with pytest.raises(RuntimeError, match=r"'cuda' does not serve torch\.float32 on cpu"):
            dispatch.implementation_of("policy_loss", CPU, torch.float32)
    machine_with(monkeypatch, (9, 0), ())
    with dispatch.use("cuda"), pytest.raises(RuntimeError, match="no CUDA part"):
        dispatch.implementation_of("policy_loss", device, torch.bfloat16)


def test_values_on_a_device_are_checked_only_on_request() -> None:
    cuda = torch.device("cuda")
    assert values_are_checked(CPU)
    assert not values_are_checked(cuda)
    with check_values():
        assert values_are_checked(cuda)
    assert not values_are_checked(cuda)


def test_the_folder_imports_on_its_own_and_only_torch() -> None:
    """From the repository's root the folder is importable as `kernels` too; it must not drag in the trainer's stack."""
    program = (
        "import sys, kernels; kernels.policy_loss; assert not hasattr(kernels, '__version__');"
        "print([name for name in ('mrpo', 'transformers', 'deepspeed', 'pydantic', 'triton') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
