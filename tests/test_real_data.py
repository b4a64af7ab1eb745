"""The documented way through real data: VQA-RAD prepared, trained on, answered, evaluated and reported."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from launching import train

from mrpo.cli import main
from mrpo.config import DataConfig
from mrpo.data import load_dataset
from mrpo.errors import UserError

REPOSITORY = Path(__file__).parents[1]
REAL = Path(os.environ.get("MRPO_VQA_RAD", REPOSITORY / ".." / "shared" / "data" / "vqa-rad"))


@pytest.mark.skipif(not REAL.is_dir(), reason="VQA-RAD is not there: name its folder in MRPO_VQA_RAD")
def test_prepare_train_infer_evaluate_report(tmp_path: Path) -> None:
    prepared, run, answers = tmp_path / "vqa_rad.jsonl", tmp_path / "run", tmp_path / "tiny.jsonl"
    assert main(["data", "prepare", "vqa_rad", "--root", str(REAL), "--out", str(prepared)]) == 0
    assert main(["data", "check", str(prepared)]) == 0
    train(
        "--config",
        str(REPOSITORY / "configs" / "vqa_rad_tiny.yaml"),
        "data.name=prepared",
        f"data.file={prepared}",
        f"output_dir={run}",
        "optim.steps=2",
        "data.eval_size=8",
        "rollout.max_tokens=24",
    )
    test = tmp_path / "test.jsonl"
    assert main(["data", "prepare", "vqa_rad", "--root", str(REAL), "--split", "test", "--out", str(test)]) == 0
    infer = ["infer", "--model", str(run / "policy"), "--data", str(test), "--out", str(answers), "--max-tokens", "24"]
    assert main(infer) == 0
    assert len(answers.read_text().splitlines()) == 200
    assert main(["eval", str(answers), "--out", str(tmp_path / "evaluation")]) == 0
    figures = json.loads((tmp_path / "evaluation" / "eval.json").read_text())
    assert figures["models"]["tiny"]["datasets"]["vqa_rad"]["accuracy"]["n"] == 200
    assert main(["report", str(run), str(tmp_path / "evaluation"), "--out", str(tmp_path / "site")]) == 0
    assert (tmp_path / "site" / "index.html").stat().st_size > 10_000


def test_questions_without_an_answer_do_not_reach_training(tmp_path: Path) -> None:
    rows = [{"question": "Where?", "answer": answer, "split": "train", "id": f"q{i}"} for i, answer in enumerate("L ")]
    file = tmp_path / "rows.jsonl"
    common = {"dataset": "mine", "images": [], "root": None, "rationale": None, "metadata": {}}
    file.write_text("".join(json.dumps(row | common | {"answer": row["answer"].strip()}) + "\n" for row in rows))
    config = DataConfig(name="prepared", file=file)
    with pytest.raises(UserError, match=r"1 questions have no answer \(q1\)"):
        load_dataset(config, "train")
    kept = load_dataset(config.model_copy(update={"on_error": "skip"}), "train")
    assert [example.id for example in kept] == ["q0"]
