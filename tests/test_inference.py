"""`mrpo infer`: what it writes, that it goes on where it was stopped, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mrpo.backbones import Processor, load_model, load_processor, read_prompt_style, write_prompt_style
from mrpo.backbones.fingerprint import fingerprint
from mrpo.cli import main
from mrpo.config import Config
from mrpo.data.phantom import PhantomDataset
from mrpo.data.prepared import read_prepared, write_prepared
from mrpo.errors import UserError
from mrpo.inference import CompletionFile, Sampling, check_prompts, infer, make_header, read_completions
from mrpo.records import Example
from mrpo.rollout.hf import HFEngine

NUM_QUESTIONS = 7
SAMPLED = Sampling(samples=2, temperature=1.0, max_tokens=6)


@dataclass(frozen=True)
class Model:
    path: str
    processor: Processor
    engine: HFEngine

    def run(
        self,
        examples: Sequence[Example],
        out: Path,
        sampling: Sampling = SAMPLED,
        *,
        batch_size: int = 4,
        overwrite: bool = False,
        **header: Any,
    ) -> bytes:
        """Runs to the end; the content of the file."""
        values = make_header(self.path, self.processor, sampling) | header
        with CompletionFile(out, values, examples, overwrite=overwrite) as file:
            infer(
                examples,
                file,
                processor=self.processor,
                engine=self.engine,
                sampling=sampling,
                batch_size=batch_size,
            )
        return out.read_bytes()


@pytest.fixture(scope="module")
def model(tiny_policy: Path) -> Model:
    config = Config.model_validate({"model": {"path": str(tiny_policy)}})
    processor = load_processor(config)
    engine = HFEngine(load_model(config.model), processor, batch_size=64, weights=nullcontext)
    return Model(str(tiny_policy), processor, engine)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "phantom.jsonl"
    write_prepared(PhantomDataset("test", size=NUM_QUESTIONS), file, dataset="phantom", root=None)
    return file


@pytest.fixture(scope="module")
def examples(data: Path) -> tuple[Example, ...]:
    return read_prepared(data)


@pytest.fixture(scope="module")
def whole(model: Model, examples: Sequence[Example], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of an uninterrupted run."""
    return model.run(examples, tmp_path_factory.mktemp("whole") / "out.jsonl")


def test_the_shipped_policys_answers_and_steps_are_read_from_its_text(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.jsonl"
    assert main(["infer", "--model", "phantom", "--data", str(data), "--out", str(out), "--limit", "5"]) == 0
    questions = read_completions(out)
    assert [q.example for q in questions] == list(read_prepared(data))[:5]
    assert {(q.model, q.think_tag) for q in questions} == {("phantom", "thinking")}
    for question in questions:
        (item,) = question.completions
        form = re.fullmatch(r"<thinking>(.*)</thinking><answer>(.*)</answer>", item.completion.text)
        assert form
        assert " ".join(step.text for step in item.steps) == form[1]
        assert item.answer == form[2]
        assert len(item.steps) >= 3
        spans = [(step.start, step.end) for step in item.steps]
        assert spans == sorted(spans)
        assert spans[-1][1] < len(item.completion.token_ids)
        assert item.completion.finish_reason == "stop"


def test_every_row_says_how_it_was_made(whole: bytes, model: Model, examples: Sequence[Example]) -> None:
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["id"] for row in rows] == [example.id for example in examples]
    assert {row["model"] for row in rows} == {model.path}
    for row in rows:
        assert row["dataset"] == "phantom"
        assert row["sampling"].items() >= {
            "samples": 2, "temperature": 1.0, "max_tokens": 6, "seed": 0, "engine": "hf"
        }.items()  # fmt: skip
        assert all(Path(image).is_absolute() and Path(image).is_file() for image in row["images"])
        assert len(row["completions"]) == 2
        for completion in row["completions"]:
            assert completion["text"] == model.processor.decode(completion["token_ids"])
            assert len(completion["token_ids"]) == 6 or completion["finish_reason"] == "stop"


def _cuts(content: bytes) -> list[int]:
    """Places where a kill may have left the file: between rows, inside rows, inside batches."""
    ends = [match.end() for match in re.finditer(rb"\n", content)]
    return [0, 3, ends[0] - 1, ends[0], ends[1] + 1, ends[2], ends[3] + 200, ends[-1] - 1, ends[-1]]


def test_a_resumed_run_gives_the_same_file(
    whole: bytes, model: Model, examples: Sequence[Example], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    for cut in _cuts(whole):
        out.write_bytes(whole[:cut])
        assert model.run(examples, out) == whole, cut


def test_a_killed_process_is_resumed(data: Path, tmp_path: Path) -> None:
    def arguments(out: Path) -> list[str]:
        names = ["infer", "--model", "phantom", "--data", str(data), "--out", str(out)]
        return [*names, "--temperature", "1", "--samples", "4", "--batch-size", "4"]

    killed, straight = tmp_path / "killed.jsonl", tmp_path / "straight.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "mrpo.cli", *arguments(killed)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and not (killed.exists() and killed.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    content = killed.read_bytes()
    assert content
    assert main(arguments(killed)) == 0
    assert main(arguments(straight)) == 0
    assert killed.read_bytes() == straight.read_bytes()
    assert killed.read_bytes().startswith(content[: content.rfind(b"\n") + 1])


@pytest.mark.parametrize("batch_size", [1, 6, 100])
def test_completions_do_not_depend_on_the_batch_size(
    batch_size: int, whole: bytes, model: Model, examples: Sequence[Example], tmp_path: Path
) -> None:
    assert model.run(examples, tmp_path / "out.jsonl", batch_size=batch_size) == whole


def _token_ids(content: bytes) -> dict[str, list[list[int]]]:
    rows = [json.loads(line) for line in content.splitlines()]
    return {row["id"]: [completion["token_ids"] for completion in row["completions"]] for row in rows}


def test_samples_follow_the_seed_and_the_question_alone(
    whole: bytes, model: Model, examples: Sequence[Example], tmp_path: Path
) -> None:
    drawn = _token_ids(whole)
    assert all(first != second for first, second in drawn.values())
    reordered = _token_ids(model.run([examples[4], examples[1]], tmp_path / "reordered.jsonl"))
    assert reordered == {examples[i].id: drawn[examples[i].id] for i in (4, 1)}
    reseeded = _token_ids(model.run(examples, tmp_path / "reseeded.jsonl", replace(SAMPLED, seed=1)))
    assert all(reseeded[name] != drawn[name] for name in drawn)


def test_greedy_completions_do_not_depend_on_the_seed(
    model: Model, examples: Sequence[Example], tmp_path: Path
) -> None:
    files = [
        model.run(examples, tmp_path / f"{seed}.jsonl", Sampling(max_tokens=6, seed=seed), batch_size=2 + seed)
        for seed in (0, 1)
    ]
    assert _token_ids(files[0]) == _token_ids(files[1])


def test_impossible_samplings_are_refused() -> None:
    with pytest.raises(UserError, match=r"up to 2, not 2\.5"):
        Sampling(temperature=2.5, engine="vllm")
    with pytest.raises(UserError, match="4 samples at temperature 0"):
        Sampling(samples=4, temperature=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.5}, r"line 1: .*sampling\.temperature=1\.0, not 0\.5"),
        ({"seed": 3}, r"sampling\.seed=0, not 3"),
        ({"max_tokens": 7}, r"sampling\.max_tokens=6, not 7"),
        ({"samples": 3}, r"sampling\.samples=2, not 3"),
        ({"dtype": "bfloat16"}, r"sampling\.dtype=\"float32\", not \"bfloat16\""),
    ],
)
def test_another_sampling_is_refused(
    change: dict[str, Any], message: str, whole: bytes, model: Model, examples: Sequence[Example], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=message):
        model.run(examples, out, replace(SAMPLED, **change))
    assert out.read_bytes() == whole[:-1]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"model": "other"}, r'model="[^"]*", not "other".*--overwrite'),
        ({"fingerprint": "0"}, r"the files of model=.* have changed"),
        ({"think_tag": "think"}, r'think_tag="thinking", not "think"'),
    ],
)
def test_another_model_is_refused(
    header: dict[str, Any], message: str, whole: bytes, model: Model, examples: Sequence[Example], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole)
    with pytest.raises(UserError, match=message):
        model.run(examples, out, **header)


def test_other_questions_are_refused(whole: bytes, model: Model, examples: Sequence[Example], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole)
    corrected = [*examples[:2], replace(examples[2], answer="none"), *examples[3:]]
    with pytest.raises(UserError, match=r'line 3: .*answer=".*", not "none"'):
        model.run(corrected, out)
    with pytest.raises(UserError, match=r"line 1: .*id="):
        model.run(examples[::-1], out)
    with pytest.raises(UserError, match="more rows than the 3 questions"):
        model.run(examples[:3], out)
    assert out.read_bytes() == whole


def test_overwrite_replaces_the_file(whole: bytes, model: Model, examples: Sequence[Example], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"something else\n" * 9)
    assert model.run(examples, out, overwrite=True) == whole


def test_nothing_is_replaced_before_there_is_something_to_write(examples: Sequence[Example], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"old\n")
    with CompletionFile(out, {}, examples, overwrite=True) as file:
        assert file.done == 0
    assert out.read_bytes() == b"old\n"


@pytest.mark.parametrize("content", [b"a line\n", b"no line end", b'{"id": "x", "dataset": "d"}\n', b"[]\n"])
def test_a_file_of_something_else_is_left_alone(
    content: bytes, model: Model, examples: Sequence[Example], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    with pytest.raises(UserError, match=r"out\.jsonl"):
        model.run(examples, out)
    assert out.read_bytes() == content


def test_two_writers_are_refused(examples: Sequence[Example], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with (
        CompletionFile(out, {}, examples),
        pytest.raises(UserError, match="another process is writing"),
    ):
        CompletionFile(out, {}, examples)
    CompletionFile(out, {}, examples).__exit__(None, None, None)


def test_bad_examples_are_named_before_generation(model: Model, examples: Sequence[Example], tmp_path: Path) -> None:
    long = replace(examples[3], question="How many? " * 1000)
    with pytest.raises(UserError, match=rf"{long.id}: its prompt takes \d{{4}} tokens, above prompt.max_tokens=1024"):
        check_prompts([*examples[:3], long], model.processor)
    with pytest.raises(UserError, match=rf"{examples[1].id}: its id stands twice"):
        check_prompts([*examples, examples[1]], model.processor)
    missing = replace(examples[2], images=(tmp_path / "gone.png",))
    with pytest.raises(UserError, match=rf"{missing.id}: its image cannot be read.*gone\.png"):
        check_prompts([missing], model.processor)
    Image.new("L", (1, 3000)).save(tmp_path / "rule.png")
    thin = replace(examples[2], images=(tmp_path / "rule.png",))
    with pytest.raises(UserError, match=rf"{thin.id}: its image of 1 x 3000 pixels is too long and thin"):
        check_prompts([thin], model.processor)


def test_a_broken_image_stops_after_the_batches_before_it(
    whole: bytes, model: Model, examples: Sequence[Example], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    content = examples[5].images[0].read_bytes()  # type: ignore[union-attr]
    broken.write_bytes(content[: len(content) // 2])
    spoilt = [*examples[:5], replace(examples[5], images=(broken,)), examples[6]]
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=f"{examples[5].id}: its image cannot be read"):
        model.run(spoilt, out)
    assert out.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    assert model.run(examples, out) == whole


def test_the_command_refuses_a_long_prompt_with_status_2(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["infer", "--model", "phantom", "--data", str(data), "--out", str(out), "--max-prompt-tokens", "20"]
    assert main(arguments) == 2
    assert "phantom/0/test/0: its prompt takes" in capsys.readouterr().err
    assert not out.exists()


def test_a_policy_is_asked_as_its_run_asked_it_unless_told_otherwise(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "policy", tmp_path / "out.jsonl"
    shutil.copytree(files("mrpo") / "assets" / "phantom", folder)  # type: ignore[call-overload]
    config = {"model": {"path": str(folder)}, "prompt": {"max_tokens": 20}, "data": {"max_image_pixels": 1024}}
    write_prompt_style(folder, load_processor(Config.model_validate(config)))

    def pixels(*options: str, status: int = 0) -> int:
        arguments = ["infer", "--model", str(folder), "--data", str(data), "--out", str(out), "--overwrite"]
        assert main([*arguments, "--limit", "1", "--max-tokens", "4", *options]) == status
        return json.loads(out.read_text())["sampling"]["max_image_pixels"] if out.is_file() else 0

    assert pixels(status=2) == 0
    assert "above prompt.max_tokens=20" in capsys.readouterr().err
    assert pixels("--max-prompt-tokens", "300") == 1024
    assert pixels("--max-prompt-tokens", "300", "--max-image-pixels", "2048") == 2048
    style = json.loads((folder / "mrpo_prompt.json").read_text())
    (folder / "mrpo_prompt.json").write_text(json.dumps(style | {"max_image_pixels": "many"}))
    with pytest.raises(UserError, match=r"mrpo_prompt\.json must say .*max_image_pixels 'many'"):
        read_prompt_style(str(folder))


@pytest.mark.parametrize(
    ("option", "value"), [("--samples", "0"), ("--temperature", "-1"), ("--temperature", "nan"), ("--limit", "x")]
)
def test_impossible_options_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["infer", "--model", "m", "--data", "d", "--out", "o", option, value])
    assert caught.value.code == 2
    assert option in capsys.readouterr().err


def test_reading_leaves_a_torn_row_out_and_names_a_broken_one(whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(whole[:-5])
    assert len(read_completions(out)) == NUM_QUESTIONS - 1
    lines = whole.splitlines(keepends=True)
    row = json.loads(lines[1])
    row["completions"][1]["token_ids"][2] = "7"
    out.write_bytes(lines[0] + json.dumps(row).encode() + b"\n")
    with pytest.raises(UserError, match=r"line 2: .*completions\.1\.token_ids\.2"):
        read_completions(out)
    with pytest.raises(UserError, match=r"none\.jsonl: No such file"):
        read_completions(tmp_path / "none.jsonl")


def test_fingerprint_changes_with_the_weights_alone(tiny_policy: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_policy, copy)
    (copy / "notes.txt").write_text("not read")
    assert fingerprint(str(copy), None) == fingerprint(str(tiny_policy), None)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert fingerprint(str(copy), None) != fingerprint(str(tiny_policy), None)
