"""The memory estimate against sums worked out by hand, and what `mrpo doctor` concludes from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mrpo.config import Config
from mrpo.doctor.fit import CPU_RUNTIME, CUDA_RUNTIME, check_memory
from mrpo.doctor.machine import Gpu, Machine
from mrpo.doctor.memory import ModelSize, PromptSize, Tower, estimate, least_engine, loading, total
from mrpo.settings import load_config

GIB = 2**30
# 1 G parameters, of which 0.1 G are a vision tower.
MODEL = ModelSize(
    parameters=10**9,
    trainable=10**9,
    text=Tower(layers=10, hidden=1000, intermediate=4000),
    vision=Tower(layers=5, hidden=100, intermediate=200),
    kv_width=256,
    vocab=1000,
)
PROMPT = PromptSize(tokens=100, patches=40, source="by hand")
BATCH = ["rollout.batch_size=16", "rollout.max_tokens=50", "optim.micro_batch_size=2", "update.packing=dense"]


def config(*settings: str) -> Config:
    return load_config(None, [*BATCH, *settings])


def sizes(terms: Any) -> dict[str, int]:
    return {term.name: term.size for term in terms}


def test_fp32_without_zero() -> None:
    need = estimate(config(), MODEL, PROMPT, 4)
    assert sizes(need.standing) == {
        "parameters": 4_000_000_000,
        "gradients": 4_000_000_000,
        "AdamW": 8_000_000_000,  # two moments; the weights are float32 already
    }
    # 16 rows x 150 tokens x (keys and values) 2 x 10 layers x 256 x 4 bytes
    assert sizes(need.rollout) == {"KV cache": 16 * 150 * 20_480}
    assert sizes(need.update) == {
        "activations": 300 * 300_000 * 4,  # 2 rows x 150 tokens, 10 layers x (18 x 1000 + 3 x 4000)
        "vision activations": 80 * 7_500 * 4,  # 2 rows x 40 patches, 5 layers x (10 x 100 + 2.5 x 200)
        "logits": 100 * 1000 * 4,
        "head gradient": 1000 * 1000 * 4,
    }
    assert need.peak == 16_000_000_000 + 360_000_000 + 2_400_000 + 400_000 + 4_000_000
    assert need.fixed == 16_000_000_000


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "states", "step"),
    [
        # the 2, 2 and 12 bytes of mixed precision (ZeRO, section 3.1) over 4 processes, and the step's fp32 gradients
        (0, 2_000_000_000, 2_000_000_000, 12_000_000_000, 4_000_000_000),
        (1, 2_000_000_000, 2_000_000_000, 3_000_000_000, 1_000_000_000),
        (2, 2_000_000_000, 500_000_000, 3_000_000_000, 1_000_000_000),
        (3, 500_000_000, 500_000_000, 3_000_000_000, 1_000_000_000),
    ],
)
def test_bf16_by_zero_stage(stage: int, parameters: int, gradients: int, states: int, step: int) -> None:
    need = estimate(config("model.dtype=bfloat16", f"deepspeed.zero_stage={stage}"), MODEL, PROMPT, 4)
    found = sizes(need.standing)
    assert found == {"parameters": parameters, "gradients": gradients, "AdamW": states, "fp32 gradients": step}


def test_zero_3_gathers_the_whole_weights_for_rollouts() -> None:
    need = estimate(config("model.dtype=bfloat16", "deepspeed.zero_stage=3"), MODEL, PROMPT, 4)
    assert sizes(need.rollout)["whole weights"] == sizes(need.export)["whole weights"] == 2_000_000_000
    assert need.fixed == total(need.standing) + 2_000_000_000


SERVED = ("rollout.engine=vllm_server", "rollout.servers=[http://localhost:8000]")


@pytest.mark.parametrize(("export", "whole"), [("true", 2_000_000_000), ("false", 0)])
def test_servers_take_no_memory_here_and_no_whole_weights(export: str, whole: int) -> None:
    run = config("model.dtype=bfloat16", "deepspeed.zero_stage=3", f"checkpoint.export={export}", *SERVED)
    need = estimate(run, MODEL, PROMPT, 4, on_gpu=True, card=80 * GIB)
    assert need.rollout == ()
    assert total(need.export) == whole
    assert need.fixed == total(need.standing) + whole


def test_an_engine_beside_the_trainer_takes_its_share_of_the_gpu_when_it_is_awake() -> None:
    asleep, awake = (config("rollout.engine=vllm", f"rollout.sleep_level={level}") for level in (2, 0))
    need = estimate(asleep, MODEL, PROMPT, 1, on_gpu=True, card=80 * GIB)
    assert sizes(need.rollout) == {"vLLM engine": 32 * GIB}
    assert need.fixed == total(need.standing) + 32 * GIB
    always = estimate(awake, MODEL, PROMPT, 1, on_gpu=True, card=80 * GIB)
    assert sizes(always.standing)["vLLM engine"] == 32 * GIB
    assert always.rollout == ()
    assert always.peak == total(need.standing) + 32 * GIB + total(need.update)
    own = config("rollout.engine=vllm", "rollout.engine_options={gpu_memory_utilization: 0.25}")
    assert sizes(estimate(own, MODEL, PROMPT, 1, on_gpu=True, card=80 * GIB).rollout) == {"vLLM engine": 20 * GIB}
    # On a CPU it never sleeps: its own weights, and a GiB of keys and values.
    assert sizes(estimate(asleep, MODEL, PROMPT, 1).standing)["vLLM engine"] == 4_000_000_000 + GIB


def test_sft_without_an_evaluation_holds_no_engine() -> None:
    run = ("algorithm=sft", "rollout.engine=vllm", "eval.at_start=false", "eval.at_end=false")
    for overrides, engine in ((run, {}), ((*run, "eval.every=5"), {"vLLM engine": 32 * GIB})):
        need = estimate(config(*overrides), MODEL, PROMPT, 1, on_gpu=True, card=80 * GIB)
        assert sizes(need.rollout) == engine
        assert (least_engine(config(*overrides), MODEL) > 0) == bool(engine)


def test_a_kl_term_needs_a_reference_and_sft_does_not() -> None:
    with_reference = config("loss.beta=0.04")
    assert sizes(estimate(with_reference, MODEL, PROMPT, 1).standing)["reference"] == 4_000_000_000
    assert loading(with_reference, MODEL) == 8_000_000_000
    assert "reference" not in sizes(estimate(config("loss.beta=0.04", "algorithm=sft"), MODEL, PROMPT, 1).standing)
    assert loading(config(), MODEL) == 4_000_000_000
    elsewhere = estimate(config("loss.beta=0.04", "loss.reference_offload=true"), MODEL, PROMPT, 1)
    assert sizes(elsewhere.host) == {"reference": 4_000_000_000}
    adapted = config("loss.beta=0.04", "model.lora_rank=8")  # its reference is the model without adapters
    assert "reference" not in sizes(estimate(adapted, MODEL, PROMPT, 1).standing)
    assert loading(adapted, MODEL) == 4_000_000_000


def test_offloading_moves_states_to_main_memory() -> None:
    offloaded = config(
        "deepspeed.zero_stage=3", "deepspeed.offload_optimizer=true", "deepspeed.offload_parameters=true"
    )
    need = estimate(offloaded, MODEL, PROMPT, 2)
    assert sizes(need.standing) == {"gradients": 2_000_000_000}
    # float32 weights are copied for the optimizer when it lives elsewhere
    assert sizes(need.host) == {"parameters": 2_000_000_000, "AdamW": 6_000_000_000}


def test_gradient_checkpointing_keeps_the_inputs_of_layers_and_one_layer() -> None:
    need = estimate(config("update.checkpointing=all"), MODEL, PROMPT, 1)
    assert sizes(need.update)["activations"] == 300 * (10 * 1000 + 30_000) * 4
    assert sizes(need.update)["vision activations"] == 80 * (5 * 100 + 1_500) * 4


@pytest.mark.parametrize(("setting", "count"), [("none", 0), ("4", 4), ("0.35", 4), ("99", 10), ("auto", 0)])
def test_some_layers_can_be_checkpointed(setting: str, count: int) -> None:
    need = estimate(config(f"update.checkpointing={setting}"), MODEL, PROMPT, 1)
    values = count * 1000 + max(10 - count, 1) * 30_000
    assert sizes(need.update)["activations"] == 300 * values * 4
    assert sizes(need.update)["vision activations"] == 80 * 7_500 * 4


def test_auto_can_do_on_a_gpu_what_all_does_and_layers_are_compiled_there() -> None:
    auto, every = (
        estimate(config(f"update.checkpointing={setting}"), MODEL, PROMPT, 1, on_gpu=True)
        for setting in ("auto", "all")
    )
    assert auto.update == every.update
    assert sizes(auto.update)["activations"] == 300 * (10 * 1000 + 20_000) * 4  # 8 x 1000 + 3 x 4000


def test_without_the_compiler_layers_keep_more_unless_liger_joins_their_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def activations(*settings: str) -> int:
        run = config("update.checkpointing=none", *settings)
        return sizes(estimate(run, MODEL, PROMPT, 1, on_gpu=True).update)["activations"]

    for installed, kept in ((False, 300_000), (True, 200_000)):
        monkeypatch.setattr("mrpo.doctor.memory.liger_is_installed", lambda installed=installed: installed)
        assert activations() == 300 * 200_000 * 4
        assert activations("deepspeed.zero_stage=3") == 300 * kept * 4  # where layers are not compiled
        assert activations("deepspeed.zero_stage=3", "model.liger=off") == 300 * 300_000 * 4


def test_gated_vision_towers_keep_more() -> None:
    gated = replace(MODEL, vision=Tower(layers=5, hidden=100, intermediate=200, gated=True))
    run = config(
        "update.checkpointing=none", "update.packing=shared_prefix", "optim.batch_size=8", "rollout.group_size=8"
    )
    for on_gpu, kept in ((False, 16 * 100 + 4 * 200), (True, 11 * 100 + 3 * 200)):  # there it is compiled
        update = estimate(run, gated, PROMPT, 1, on_gpu=on_gpu).update
        assert sizes(update)["vision activations"] == 40 * 5 * kept * 4


def test_adapters_need_no_gradient_of_the_head() -> None:
    assert "head gradient" not in sizes(estimate(config("model.lora_rank=8"), MODEL, PROMPT, 1).update)


def test_a_packed_row_is_as_long_as_its_budget_or_as_the_prompts_of_a_process() -> None:
    def packed(*settings: str) -> dict[str, int]:
        options = ["update.packing=shared_prefix", "optim.batch_size=64", "rollout.group_size=8", *settings]
        return sizes(estimate(config(*options), MODEL, PROMPT, 2).update)

    # 4 prompts a process, each 100 tokens with 8 completions of 50
    assert packed("update.token_budget=100000")["activations"] == 4 * 500 * 300_000 * 4
    assert packed("update.token_budget=100000")["vision activations"] == 4 * 40 * 7_500 * 4
    assert packed("update.token_budget=1200")["activations"] == 1200 * 300_000 * 4
    assert packed("update.token_budget=1200")["vision activations"] == 2 * 40 * 7_500 * 4
    assert packed("update.token_budget=1200")["logits"] == 1000 * 1000 * 4
    assert packed("update.token_budget=200")["vision activations"] == 40 * 7_500 * 4


@pytest.mark.parametrize(
    ("prompts", "settings", "measured"),
    [
        (1, ["update.checkpointing=none", "update.compile=off"], 59),
        (2, ["update.checkpointing=none", "update.compile=off"], 81),
        (4, ["update.checkpointing=none", "update.compile=off"], 125),
        (2, ["update.checkpointing=none", "update.compile=on"], 68),
        (2, ["update.checkpointing=all", "update.compile=off"], 40),
    ],
)
def test_activations_of_eight_billion_parameters_are_as_measured(
    prompts: int, settings: list[str], measured: float
) -> None:
    """Peaks in GiB of a prototype on an H200, of which weights, gradients and the head's own gradient took 37."""
    size = ModelSize(8_767_123_696, 8_767_123_696, Tower(36, 4096, 12288), Tower(27, 1152, 4304), 1024, 151_936)
    run = load_config(
        None,
        [
            "model.dtype=bfloat16",
            "update.packing=shared_prefix",
            f"update.token_budget={2560 * prompts}",
            f"optim.batch_size={8 * prompts}",
            "rollout.max_tokens=200",
            "model.liger=off",
            *settings,
        ],
    )
    need = estimate(run, size, PromptSize(846, 3136, "by hand"), 1, on_gpu=True)
    activations = sum(term.size for term in need.update if "activations" in term.name)
    assert 37 + activations / GIB == pytest.approx(measured, rel=0.02)


def test_a_frozen_vision_tower_keeps_nothing_for_a_backward_pass() -> None:
    need = estimate(config("model.freeze_vision=true"), MODEL, PROMPT, 1)
    assert sizes(need.update)["vision activations"] == 80 * 1_500 * 4


def test_a_group_is_never_split() -> None:
    need = estimate(config("rollout.batch_size=1"), MODEL, PROMPT, 1)
    assert sizes(need.rollout)["KV cache"] == 8 * 150 * 20_480


def test_the_arithmetic_is_shown() -> None:
    need = estimate(config("model.dtype=bfloat16", "deepspeed.zero_stage=3"), MODEL, PROMPT, 4)
    shown = [str(term) for term in need.standing]
    assert "AdamW: 1.00 G x 12 B / 4 processes (fp32 weights and two moments) = 2.8 GiB" in shown


def machine(*, gpus: int = 0, gpu_gib: float = 80, free_gib: float = 400) -> Machine:
    size = int(gpu_gib * GIB)
    return Machine((Gpu("a GPU", (9, 0), size, size),) * gpus, 8, int(free_gib * GIB), int(free_gib * GIB))


def test_on_a_cpu_the_processes_share_main_memory() -> None:
    need = estimate(config(), MODEL, PROMPT, 2).peak + CPU_RUNTIME
    (fits,) = check_memory(config(), machine(free_gib=2 * need / GIB + 0.001), MODEL, PROMPT, 2)
    (tight,) = check_memory(config(), machine(free_gib=2 * need / GIB - 0.001), MODEL, PROMPT, 2)
    assert fits.state == "ok"
    assert tight.state == "warning"


def test_states_that_do_not_fit_are_missing_and_a_large_batch_is_a_warning() -> None:
    need = estimate(config(), MODEL, PROMPT, 1, on_gpu=True)
    between = (need.fixed + need.peak) / 2 + CUDA_RUNTIME
    checks = check_memory(config(), machine(gpus=1, gpu_gib=between / GIB), MODEL, PROMPT, 1)
    assert [check.state for check in checks] == ["warning", "ok"]
    below = need.fixed + CUDA_RUNTIME - 2**20
    assert check_memory(config(), machine(gpus=1, gpu_gib=below / GIB), MODEL, PROMPT, 1)[0].state == "missing"


@pytest.mark.parametrize(
    ("gpus", "gpu_gib", "settings"),
    [
        (1, 16.1, ["optim.micro_batch_size=64"]),  # activations of 64 rows
        (2, 14.0, []),  # 16 GB of states
        (1, 12.0, []),
        (1, 9.0, ["loss.beta=0.04"]),
        (1, 20.0, ["rollout.engine=vllm", "rollout.gpu_memory=0.6"]),
        (1, 26.0, ["rollout.engine=vllm", "rollout.sleep_level=0"]),
    ],
)
def test_the_remedy_is_settings_that_fit(gpus: int, gpu_gib: float, settings: list[str]) -> None:
    here = machine(gpus=gpus, gpu_gib=gpu_gib)
    check = check_memory(config(*settings), here, MODEL, PROMPT, gpus)[0]
    assert check.state != "ok"
    assert check.remedy is not None
    mended = config(*settings, *check.remedy.split())
    assert {check.state for check in check_memory(mended, here, MODEL, PROMPT, gpus)} == {"ok"}


@pytest.mark.parametrize(
    ("gpus", "settings", "remedy"),
    [
        (1, ["rollout.gpu_memory=0.04"], "rollout.gpu_memory=0.05"),  # 4 GB of weights: 0.0466 of 80 GiB
        (1, ["rollout.engine_options={gpu_memory_utilization: 0.04}"], None),
        (2, ["rollout.engine_options={gpu_memory_utilization: 0.04}"], "rollout.tensor_parallel=2"),
        (2, ["rollout.gpu_memory=0.02", "rollout.tensor_parallel=2"], "rollout.gpu_memory=0.05"),
    ],
)
def test_the_share_of_an_engine_must_hold_its_weights(gpus: int, settings: list[str], remedy: str | None) -> None:
    *_, check = check_memory(config("rollout.engine=vllm", *settings), machine(gpus=gpus), MODEL, PROMPT, gpus)
    assert (check.name, check.state, check.remedy) == ("vLLM engine", "missing", remedy)
    enough = config("rollout.engine=vllm", "rollout.gpu_memory=0.05")
    assert check_memory(enough, machine(gpus=1), MODEL, PROMPT, 1)[-1].state == "ok"


def test_where_no_setting_helps_the_remedy_is_the_least_number_of_gpus() -> None:
    here = machine(gpus=1, gpu_gib=7.5, free_gib=12)  # too little main memory to offload to
    check = check_memory(config("model.dtype=bfloat16"), here, MODEL, PROMPT, 1)[0]
    assert check.remedy is not None
    count = int(check.remedy.split()[3])
    assert check.remedy.endswith("deepspeed.zero_stage=3")
    sharded = config("model.dtype=bfloat16", "deepspeed.zero_stage=3")
    assert 16 % count == 0  # prompts of a step
    assert check_memory(sharded, machine(gpus=count, gpu_gib=7.5), MODEL, PROMPT, count)[0].state == "ok"
    assert check_memory(sharded, machine(gpus=count // 2, gpu_gib=7.5), MODEL, PROMPT, count // 2)[0].state != "ok"


def test_main_memory_must_hold_the_model_of_every_process_while_it_loads() -> None:
    # 4 processes x (policy and reference, 4 GB each, and the interpreter)
    need = 4 * (8_000_000_000 + CPU_RUNTIME)
    settings = config("loss.beta=0.04", "deepspeed.zero_stage=3")
    below = check_memory(settings, machine(gpus=4, free_gib=need / GIB - 0.01), MODEL, PROMPT, 4)[1]
    above = check_memory(settings, machine(gpus=4, free_gib=need / GIB + 0.01), MODEL, PROMPT, 4)[1]
    assert (below.name, below.state, above.state) == ("main memory", "missing", "ok")
