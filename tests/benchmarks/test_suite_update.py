"""The suite `update`: all ways compute the same gradient for every family, and its FLOPs are counted right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TINY = '''"""The suite `update` at a tiny size."""

from suite_update import *
from suite_update import SOURCES, TARGETS
from update_ways import Shape


def cases(quick):
    shape = Shape(prompts=1, group=2, image_tokens=4, text_tokens=4, length=3)
    return [
        update_case("main", SMALL, shape, seconds=0.1, variants=("ours, 10,240 tokens a pass",)),
        *(update_case(f"G = {n}", SMALL, replace(shape, group=n), sweep="group", seconds=0.1) for n in (1, 2)),
    ]
'''


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def tiny_ways(backbone: str) -> Any:
    """The real config of a backbone, cut down to two narrow layers, few words and small tiles."""
    from random_models import CONFIGS, build
    from update_ways import Ways

    config = CONFIGS[backbone]()
    text, vision = config.text_config, config.vision_config
    for name, value in {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}.items():
        setattr(text, name, value)
    text.num_attention_heads, text.num_key_value_heads = 4, 2
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    if "mrope_section" in text.rope_parameters:
        text.rope_parameters["mrope_section"] = [4, 2, 2]
    small = {"depth": 2, "num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 3}
    small |= {"num_heads": 3, "out_hidden_size": 64}
    for name, value in small.items():
        if hasattr(vision, name):
            setattr(vision, name, value)
    text.vocab_size = 512
    for number, name in enumerate(("image", "video", "vision_start", "vision_end")):
        if hasattr(config, f"{name}_token_id"):
            setattr(config, f"{name}_token_id", 500 + number)
    if config.model_type == "internvl":
        vision.image_size, config.image_seq_length = [112, 112], 16
    if hasattr(vision, "deepstack_visual_indexes"):
        vision.deepstack_visual_indexes = [0]
    return Ways(build(config, torch.device("cpu"), torch.float32), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("backbone", ["Qwen3-VL-8B", "Qwen2.5-VL-7B", "InternVL3-8B"])
def test_all_ways_compute_the_same_gradients(backbone: str) -> None:
    import harness
    from update_ways import Shape, make_rows

    ways = tiny_ways(backbone)
    rows = make_rows(ways.plain.config, Shape(prompts=2, group=3, image_tokens=16, text_tokens=6, length=5))
    truth = [tensor.clone() for tensor in ways.gradients(ways.truth, rows)]
    tried = [partial(ways.ours, packing=packing) for packing in ("shared_prefix", "dense", "auto")]
    tried += [partial(ways.ours, packing="shared_prefix", token_budget=40, attention="sdpa"), ways.reference]
    if find_spec("trl") is not None:
        tried += [ways.trl, partial(ways.trl, checkpointed=False)]
    for way in tried:
        found = ways.gradients(way, rows)
        assert len(found) == len(truth) > 4
        for value, true in zip(found, truth, strict=True):
            assert harness.relative_error(value, true) < 1e-5
    assert any("shared_prefix" in message for message in ways.messages)
    assert ways.gradients(lambda _: ways.truth(rows[:-1]), rows)[1].sub(truth[1]).norm() > 1e-3 * truth[1].norm()


def test_weights_come_back_from_fp32_as_they_were() -> None:
    ways = tiny_ways("Qwen3-VL-8B")
    ways._turn_into(torch.bfloat16)
    before = [parameter.clone() for parameter in ways.plain.parameters()]
    with ways.in_fp32():
        assert {parameter.dtype for parameter in ways.plain.parameters()} == {torch.float32}
        assert ways.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(before, ways.plain.parameters(), strict=True))


def test_flops_are_those_that_pytorch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    from update_ways import Shape, make_rows

    ways = tiny_ways("Qwen3-VL-8B")
    shape = Shape(prompts=2, group=3, image_tokens=16, text_tokens=6, length=5)
    rows = make_rows(ways.plain.config, shape)
    # The plain form of attention has products that can be counted: of all pairs, not only of those that meet.
    length = len(rows[0].prompt.input_ids) + shape.length
    more_pairs = shape.samples * (length**2 - length * (length + 1) / 2)

    def count(run: Callable[[], object]) -> float:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    def see() -> None:
        found = ways.processor.family.image_features(ways.plain.model, rows[0].prompt.images, {})
        sum((tensor.sum() for tensor in (found.embeddings, *found.deepstack)), torch.zeros(())).backward()

    image = ways._image_flops(rows[0])
    # The patches themselves need no gradient, and the embedding of patches is much of a tower this small.
    assert 0.6 * image < count(see) <= image
    dense = ways.flops(shape, rows, packed=False) - shape.samples * image + 12 * more_pairs * 64 * 2
    assert count(lambda: ways.truth(rows)) - shape.samples * count(see) == pytest.approx(dense, rel=1e-3)
    logits_of_prompts = 6 * 512 * 64 * shape.samples * (length - shape.length)
    full = ways.flops(shape, rows, packed=False, full_logits=True)
    assert full - ways.flops(shape, rows, packed=False) == logits_of_prompts
    shared = ways.flops(shape, rows, packed=True)
    prompt = len(rows[0].prompt.input_ids)
    layer_weights = sum(p.numel() for p in ways.plain.model.language_model.layers.parameters() if p.ndim == 2)
    saved = 4 * (6 * layer_weights * prompt + 12 * 64 * 2 * prompt * (prompt + 1) / 2 + image)
    assert ways.flops(shape, rows, packed=False) - shared == pytest.approx(saved)


def test_figures_follow_from_seconds() -> None:
    from results import Measured, Result
    from suite_update import OUR_DENSE, OURS, PRODUCT, TRL, figures

    settings = {"kind": "update", "prompts": 8, "group": 8, "length": 200, "sweep": ""}
    measured = [
        Measured(OURS, seconds=2.0, values={"flops": 1e15, "mean |d log p|": 0.033}),
        Measured(OUR_DENSE, seconds=5.0, values={"flops": 4e15, "mean |d log p|": 0.03}),
        Measured(TRL, failure="out of memory"),
        Measured(PRODUCT, seconds=1e-3, values={"flops": 8e11}),
    ]
    found = figures(Result("64 samples, Qwen3-VL-8B", settings, measured))[OURS]
    assert found["completion tokens/s"] == 6400
    assert found["TFLOP/s"] == 500
    assert found["share of ceiling"] == pytest.approx(0.625)
    assert found["faster than ours, dense"] == 2.5
    assert found["log p error of dense"] == pytest.approx(1.1)
    assert f"faster than {TRL}" not in found


def test_a_profile_lists_operators_and_lies_beside_the_results(tmp_path: Path) -> None:
    from results import Measured, Result, write_csv
    from suite_update import OURS, plots, profile_of

    def raises() -> list[torch.Tensor]:
        raise RuntimeError("no counters here")

    assert profile_of(raises) == "RuntimeError: no counters here"
    text = profile_of(lambda: [torch.ones(64, 64) @ torch.ones(64, 64)])
    assert "aten::mm" in text
    settings = {"kind": "agreement", "sweep": ""}
    one = Measured(OURS, failure="computes something else", values={"profile": text, "said": "compiled"})
    result = Result("64 samples, X", settings, [one])
    plots([result], tmp_path)
    assert (tmp_path / "update-profile-64-samples--X.txt").read_text() == text
    import suite_update

    write_csv(tmp_path / "update.csv", suite_update, [result])  # type: ignore[arg-type]
    assert len((tmp_path / "update.csv").read_text().splitlines()) == 2


def test_the_suite_runs_beside_a_peer_that_raises(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "benchmarks" / "suite_tiny.py").write_text(TINY, encoding="utf-8")
    (tmp_path / "peers" / "trl").mkdir(parents=True)
    (tmp_path / "peers" / "trl" / "__init__.py").write_text("raise RuntimeError('built for another torch')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "peers"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "benchmarks" / "run.py"), "tiny", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    main = json.loads((tmp_path / "out" / "tiny.json").read_text())["cases"][0]
    found = {one["name"]: one for one in main["measured"]}
    assert found["TRL's way"]["failure"] == "RuntimeError: built for another torch"
    assert found["ours"]["error"] < 1e-5
    assert found["reference's way"]["runs"] >= 1
    other = found["ours, 10,240 tokens a pass"]
    assert other["error"] < 1e-5
    assert other["values"]["flops"] == found["ours"]["values"]["flops"]
    assert "layers recompute their activations" in found["ours"]["values"]["said"]
    assert {"update-ways.png", "update-sweeps.png"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "**The gradient of an optimizer step**" in (tmp_path / "out" / "tiny.md").read_text()
