"""What a run refuses before it starts, and what two processes make of the run of one."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import Mock

import pytest
import torch
from launching import TRAIN, launch, read_metrics, train
from PIL import Image
from safetensors.torch import load_file, save_file

from mrpo.backbones import load_model
from mrpo.config import ModelConfig
from mrpo.data.phantom import PhantomDataset
from mrpo.data.targets import explained
from mrpo.data.vqa_rad import IMAGES, QUESTIONS
from mrpo.errors import UserError
from mrpo.run import load_inputs, main, parse
from mrpo.run_folder import remove_run
from mrpo.runtime import Runtime
from mrpo.settings import load_config, to_yaml


def inputs_error(tiny_policy: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_inputs(load_config(None, [f"model.path={tiny_policy}", *overrides]))
    return str(caught.value)


def test_overrides_may_stand_anywhere_among_options() -> None:
    options = parse(["--local_rank=1", "seed=1", "--config", "a.yaml", "optim.lr=2", "--resume"])
    assert options.overrides == ["seed=1", "optim.lr=2"]
    assert options.resume


def test_a_second_configuration_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--config", "a.yaml", "seed=1", "--config", "b.yaml"])
    assert caught.value.code == 2
    assert "--config: given twice, as a.yaml and b.yaml; name one file" in capsys.readouterr().err


def test_prompts_that_processes_cannot_share(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = inputs_error(tiny_policy, "optim.batch_size=128")
    assert "optim.batch_size=128" in message
    assert "multiple of 24" in message


@pytest.mark.parametrize(
    ("removed", "word"),
    [
        ("config.json", "config"),
        ("tokenizer*", "tokenizer"),
        ("preprocessor_config.json", "image processor"),
        ("chat_template.jinja", "chat template"),
        ("model.safetensors", "model.safetensors.index.json"),
    ],
)
def test_a_model_folder_that_lacks_a_file(tiny_policy: Path, tmp_path: Path, removed: str, word: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_policy, folder)
    found = list(folder.glob(removed))
    assert found
    for path in found:
        path.unlink()
    message = inputs_error(folder)
    assert str(folder) in message
    assert word in message


def test_weights_that_are_cut_off(tiny_policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_policy, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=f"the weights of model.path={folder} cannot be loaded"):
        load_model(ModelConfig(path=str(folder)))


@pytest.mark.parametrize(
    ("setting", "missing", "told"),
    [
        ("rollout.engine=vllm", "vllm", r"pip install mrpo\[vllm\]"),
        ("model.lora_rank=8", "peft", r"model.lora_rank=8 needs the peft package"),
        ("model.liger=on", "liger_kernel", r"model.liger=on needs the liger-kernel package"),
        ("reward.bertscore_model=./nowhere", "", r"reward.bertscore_model='./nowhere' cannot be loaded"),
    ],
)
def test_what_is_not_there_is_told_before_weights_are_read(
    tiny_policy: Path, monkeypatch: pytest.MonkeyPatch, setting: str, missing: str, told: str
) -> None:
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> Any:
        return None if name == missing else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setattr("mrpo.backbones.lora.find_spec", found)
    monkeypatch.setattr("mrpo.backbones.liger.find_spec", found)
    assert re.search(told, inputs_error(tiny_policy, setting))


def test_engines_that_processes_cannot_share(tiny_policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = inputs_error(tiny_policy, "rollout.engine=vllm", "rollout.tensor_parallel=4")
    assert "rollout.tensor_parallel=4 must divide the number of processes, 2" in message


def test_a_missing_model_folder_and_an_unknown_family(tiny_policy: Path, tmp_path: Path) -> None:
    assert "no such folder" in inputs_error(tmp_path / "nothing")
    folder = tmp_path / "model"
    shutil.copytree(tiny_policy, folder)
    config = folder / "config.json"
    config.write_text('{"model_type": "bert"}')
    message = inputs_error(folder)
    assert "'bert'" in message
    assert "internvl, qwen2_5_vl, qwen3_vl" in message


def test_a_prompt_that_is_too_long_names_its_example(tiny_policy: Path) -> None:
    message = inputs_error(tiny_policy, "prompt.max_tokens=20")
    assert "phantom/0/train/0" in message
    assert "prompt.max_tokens=20" in message


def test_a_later_prompt_that_is_too_long_is_refused_before_the_run(tiny_policy: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg")
    rows = [
        {"image": "a.jpg", "question": "Where? " * times, "answer": "lung", "id": name, "split": split}
        for name, times, split in (("short", 1, "train"), ("long", 100, "train"), ("held", 1, "test"))
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = ("data.name=generic", f"data.file={tmp_path / 'rows.json'}", f"data.root={tmp_path}", "optim.steps=1")
    assert "long: its prompt takes" in inputs_error(tiny_policy, *settings, "prompt.max_tokens=200")


def test_sft_needs_rationales(tiny_policy: Path, tmp_path: Path) -> None:
    (tmp_path / IMAGES).mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / IMAGES / "a.jpg")
    row = {
        "image_name": "a.jpg",
        "image_organ": "CHEST",
        "question": "Where?",
        "question_type": "POS",
        "answer": "Lung",
    }
    rows = [{"qid": i, "phrase_type": kind, **row} for i, kind in enumerate(("freeform", "test_freeform"))]
    (tmp_path / QUESTIONS).write_text(json.dumps(rows))
    message = inputs_error(tiny_policy, "algorithm=sft", "data.name=vqa_rad", f"data.root={tmp_path}")
    assert "data.name=vqa_rad has none in its 1 training questions" in message


def write_questions(folder: Path, *rows: dict[str, object]) -> list[str]:
    """Settings of a run on generic `rows`, each with a picture."""
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    common = {"image": "a.png", "question": "Where?", "answer": "lung"}
    (folder / "rows.json").write_text(json.dumps([{**common, "id": str(i), **row} for i, row in enumerate(rows)]))
    return ["data.name=generic", f"data.file={folder / 'rows.json'}", f"data.root={folder}", "optim.steps=1"]


def test_sft_trains_on_the_questions_that_have_a_rationale(tiny_policy: Path, tmp_path: Path) -> None:
    rows = [{"split": "train", "rationale": text} for text in (None, "A lung.", None, "The lung is left.")]
    settings = [f"model.path={tiny_policy}", *write_questions(tmp_path, *rows, {"split": "test"})]
    inputs = load_inputs(load_config(None, [*settings, "algorithm=sft"]))
    assert [example.id for example in inputs.train_set] == ["1", "3"]
    assert inputs.unexplained == 2
    inputs = load_inputs(load_config(None, settings))
    assert (len(inputs.train_set), inputs.unexplained) == (4, 0)


def test_sft_without_an_evaluation_needs_neither_judge_nor_engine(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr("mrpo.rollout.vllm_engine.require_vllm", Mock(side_effect=UserError("no vLLM")))
    settings = ["algorithm=sft", "judge.kind=openai", "rollout.engine=vllm", f"output_dir={tmp_path / 'run'}"]
    assert "no vLLM" in inputs_error(tiny_policy, *settings)
    assert "OPENAI_API_KEY" in inputs_error(tiny_policy, *settings, "rollout.engine=hf")
    train(*settings, f"model.path={tiny_policy}", "eval.at_start=false", "eval.at_end=false", "optim.steps=1")
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()


def test_phantoms_are_not_drawn_to_see_that_they_are_explained() -> None:
    examples = PhantomDataset("train", size=3)
    assert explained(examples) is examples


def test_test_questions_are_needed_only_where_an_evaluation_asks_for_them(tiny_policy: Path, tmp_path: Path) -> None:
    settings = write_questions(tmp_path, {"split": "train"})
    for last in ("eval.at_start=true", "eval.at_end=true", "eval.every=1"):
        message = inputs_error(tiny_policy, *settings, "eval.at_start=false", "eval.at_end=false", last)
        assert "no questions of the test or validation split" in message
    off = [f"model.path={tiny_policy}", *settings, "eval.at_start=false", "eval.at_end=false"]
    inputs = load_inputs(load_config(None, off))
    assert (len(inputs.train_set), inputs.eval_set, inputs.validation_set) == (1, (), ())


def test_a_run_is_not_continued_as_a_shorter_one_or_by_other_processes(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"output_dir={tmp_path}", f"model.path={tiny_policy}", "data.train_size=16"]
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(None, arguments)))
    for step in (2, 4):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"step": step, "score": 0.0, "world_size": 1}))

    def end(status: int) -> NoReturn:
        raise SystemExit(status)

    def start(seed: int) -> NoReturn:
        raise UserError("it starts")

    monkeypatch.setattr("os._exit", end)
    monkeypatch.setattr(Runtime, "start", start)
    for overrides, processes, told in (
        (["optim.steps=3"], "1", "optim.steps=3 is below the 4 steps that are done"),
        (["optim.steps=null", "optim.epochs=3"], "1", "optim.epochs=3 makes 3 steps, which is below the 4 steps"),
        (["optim.steps=4"], "2", "step-000004 was written by 1 processes and cannot be continued by 2; start the same"),
        (["optim.steps=4"], "1", "it starts"),
    ):
        monkeypatch.setenv("WORLD_SIZE", processes)
        with pytest.raises(SystemExit, match="2"):
            main([*arguments, *overrides, "--resume"])
        assert told in capsys.readouterr().err


def test_bad_input_ends_the_launcher_with_a_message(tmp_path: Path) -> None:
    done = launch(TRAIN, [f"output_dir={tmp_path / 'run'}", "optim.lrr=1"])
    assert done.returncode == 2
    assert "optim.lr" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("ranks", "seconds", "told"),
    [
        ("0 1", "120", "error: no.such_key (command line): unknown key"),
        ("1", "1", "error (process 1): no.such_key (command line): unknown key"),
    ],
)
def test_an_error_is_told_once_and_names_its_process_if_it_is_not_the_main_one(
    tmp_path: Path, ranks: str, seconds: str, told: str
) -> None:
    """What all processes meet is told by the main one, after which the launcher ends the others while they wait."""
    worker = Path(__file__).parent / "distributed" / "failing_ranks.py"
    done = launch(worker, [ranks, seconds, f"output_dir={tmp_path / 'run'}"], num_processes=2)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "error" in line] == [told]
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


def test_processes_and_zero_stages_train_as_one(tiny_policy: Path, tmp_path: Path) -> None:
    common = [
        f"model.path={tiny_policy}",
        "optim.steps=2",
        "optim.batch_size=16",
        "rollout.group_size=4",
        "rollout.max_tokens=20",
        "prompt.instruction=",
        "loss.beta=0.04",
        "data.eval_size=5",
        "checkpoint.every=1",
        "eval.every=1",
    ]
    runs = {"alone": (1, 0), "two": (2, 0), "sharded": (2, 3)}
    for name, (count, stage) in runs.items():
        folders = [f"output_dir={tmp_path / name}", f"log.plots={'true' if name == 'alone' else 'false'}"]
        train(*common, *folders, f"deepspeed.zero_stage={stage}", num_processes=count)
    metrics = {name: read_metrics(tmp_path / name) for name in runs}
    before = {name: (tmp_path / name / "evaluation-before.json").read_text() for name in runs}
    for name in ("two", "sharded"):
        assert before[name] == before["alone"]
        assert metrics[name][0].keys() == metrics["alone"][0].keys()
        for key, value in metrics["alone"][0].items():
            if key.startswith("update/"):  # of each process
                continue
            assert metrics[name][0][key] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), (name, key)
        assert (tmp_path / name / "policy" / "model.safetensors").is_file()
    for record in metrics["alone"]:  # the validation questions after every step
        assert {"validation/accuracy", "validation/early", "validation/fully_valid"} <= record.keys()
    assert {"curves.png", "failures.png", "timeline.png"} <= {path.name for path in (tmp_path / "alone").iterdir()}
    for name in runs:  # nothing that a run writes is unknown to whoever removes it
        remove_run(tmp_path / name)
        assert {path.name for path in (tmp_path / name).iterdir()} == {"config.yaml", ".lock"}


def test_bfloat16_with_offloaded_optimizer_trains(tiny_policy: Path, tmp_path: Path) -> None:
    train(
        f"model.path={tiny_policy}",
        f"output_dir={tmp_path / 'run'}",
        "model.dtype=bfloat16",
        "update.checkpointing=all",
        "model.freeze_vision=true",
        "deepspeed.zero_stage=2",
        "deepspeed.offload_optimizer=true",
        "optim.steps=2",
        "optim.batch_size=8",
        "rollout.max_tokens=12",
        "eval.at_start=false",
        "eval.at_end=false",
    )
    start, end = (load_file(folder / "model.safetensors") for folder in (tiny_policy, tmp_path / "run" / "policy"))
    moved = {name for name in start if not torch.equal(start[name].bfloat16(), end[name])}
    assert "model.language_model.layers.0.mlp.up_proj.weight" in moved
    assert not [name for name in moved if ".visual." in name]


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_its_inputs(tiny_policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_policy, folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][:, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "run"
    overrides = ["optim.steps=3", "rollout.max_tokens=8", "optim.batch_size=8", "eval.at_start=false"]
    done = launch(TRAIN, [f"model.path={folder}", f"output_dir={out}", "algorithm=sft", *overrides])
    assert done.returncode == 2
    assert "step 1: the loss is not finite" in done.stderr
    saved = torch.load(out / "nonfinite-step1-rank0.pt", weights_only=True)
    assert len(saved) == 8
    assert saved[0]["token_ids"].dtype == torch.int64
    assert saved[0]["weights"].shape == saved[0]["token_ids"].shape
    assert "pixel_values" in saved[0]
