"""What this machine can run: checks of the machine, of what is installed, and of what a configuration names."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from mrpo.config import Config
from mrpo.doctor import inputs, judge, machine, software
from mrpo.doctor import model as models
from mrpo.doctor.check import Check, attempt, guarded
from mrpo.doctor.fit import check_memory
from mrpo.doctor.machine import Machine
from mrpo.doctor.memory import PromptSize

__all__ = ["Check", "Diagnosis", "can_run", "diagnose", "to_json"]

Diagnosis = dict[str, list[Check]]


def diagnose(config: Config, num_processes: int | None = None) -> Diagnosis:
    """All checks by topic, for a run of `config` by `num_processes` processes (None: one per GPU, at least one)."""
    here = Machine.read()
    processes = num_processes or max(1, len(here.gpus))
    return {
        "machine": [
            guarded("Python", machine.check_python),
            guarded("CPU and memory", partial(machine.check_processor, here)),
            guarded("GPU", partial(machine.check_gpus, here, config, processes)),
        ],
        "software": _check_software(config, here),
        "configuration": _check_configuration(config, here, processes),
    }


def can_run(diagnosis: Diagnosis) -> bool:
    """Nothing that the configuration needs is missing."""
    return all(check.state != "missing" for checks in diagnosis.values() for check in checks)


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """`{"can_run": bool, "checks": [{"topic", "name", "state", "fact", "remedy", "details"}]}`."""
    checks = [{"topic": topic, **asdict(check)} for topic, checks in diagnosis.items() for check in checks]
    return {"can_run": can_run(diagnosis), "checks": checks}


def _check_software(config: Config, here: Machine) -> list[Check]:
    named = ("torch", "transformers", "deepspeed")
    extension = guarded("mrpo._C", software.check_extension)
    needs_vllm = config.generates and config.rollout.engine == "vllm"
    return [
        guarded("torch", partial(software.check_torch, here)),
        guarded("transformers", partial(software.check_package, "transformers")),
        guarded("deepspeed", partial(software.check_deepspeed, here)),
        guarded("other packages", partial(software.check_other_packages, named)),
        extension,
        guarded("C++ compiler", partial(software.check_compiler, needed=extension.state != "ok")),
        guarded("nvcc", software.check_nvcc),
        guarded("triton", partial(software.check_triton, here)),
        guarded("flash-attn", partial(software.check_flash_attention, config)),
        guarded("vLLM", partial(software.check_optional, "vLLM", "vllm", "vllm", needed=needs_vllm)),
        guarded(
            "liger-kernel", partial(software.check_optional, "liger-kernel", "liger_kernel", "liger", needed=False)
        ),
    ]


def _check_configuration(config: Config, here: Machine, processes: int) -> list[Check]:
    """Checks that build on each other: prompts need the tokenizer and the data, memory and disk the model's size."""
    data, no_data = attempt("data", partial(inputs.read_data, config))
    model, no_model = attempt("model", partial(models.read_model, config), models.get_model(config.model.path))
    checks = [
        guarded("model", partial(models.check_model, config, model)) if model else no_model,
        guarded("data", partial(inputs.check_data, config, data)) if data else no_data,
        guarded("batch", partial(inputs.check_batch, config, processes)),
        guarded("judge", partial(judge.check_judge, config)),
        guarded("output_dir", partial(inputs.check_output, config)),
        guarded("disk", partial(machine.check_disk, config, model.size if model else None)),
    ]
    if encoder := config.reward.bertscore_model:
        checks.append(guarded("BERTScore", partial(models.check_bertscore, config), models.get_model(encoder)))
    if model:
        prompt = PromptSize(config.prompt.max_tokens, 0, "prompt.max_tokens; image patches not counted")
        if data:
            read, no_prompts = attempt("prompts", partial(inputs.read_prompts, model.processor, data.train_set))
            checks.append(inputs.check_prompts(config, read) if read else no_prompts)
            prompt = read or prompt
        checks += check_memory(config, here, model.size, prompt, processes)
    return [check for check in checks if check is not None]
