"""Loading a configuration: values, messages for every kind of mistake, and the round trip through YAML."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrpo import yaml12
from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.help import describe_fields
from mrpo.settings import load_config, nearest_keys, to_yaml


def message(*overrides: str, file: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_given_is_the_defaults() -> None:
    assert load_config() == Config()


def test_command_line_wins_over_file_and_later_wins_over_earlier(tmp_path: Path) -> None:
    file = write(tmp_path, "seed: 1\noptim:\n  lr: 1e-5\n  steps: null\n")
    config = load_config(file, ["optim.lr=3e-6", "optim.lr=2e-6"])
    assert (config.seed, config.optim.lr, config.optim.steps) == (1, 2e-6, None)


def test_empty_file_and_section_without_lines_change_nothing(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == Config()
    assert load_config(write(tmp_path, "optim:\n  # lr: 3\n")) == Config()


def test_dotted_keys_work_in_the_file(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "optim.lr: 1e-5\noptim:\n  steps: 3\n")).optim.lr == 1e-5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-1.5E+3", -1500.0),
        ("7", 7),
        ("0123", 123),
        ("0x1f", 31),
        ("no", "no"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("[1, {a: 1e3}]", [1, {"a": 1000.0}]),
        (".inf", float("inf")),
        ("1_000", "1_000"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    loaded = yaml12.load(text)
    assert loaded == value
    assert type(loaded) is type(value)


def test_a_text_field_takes_a_command_line_value_as_it_stands() -> None:
    config = load_config(None, ["model.path=123", "prompt.instruction=Answer: [yes, no", "output_dir=2020"])
    assert (config.model.path, config.prompt.instruction) == ("123", "Answer: [yes, no")
    assert config.output_dir == Path("2020")
    assert load_config(None, ["prompt.instruction="]).prompt.instruction == ""
    assert load_config(None, ["prompt.instruction=null"]).prompt.instruction is None
    assert load_config(None, ['prompt.instruction="null"']).prompt.instruction == "null"
    assert load_config(None, ["data.root="]).data.root is None


PATHS = [field.key for field in describe_fields() if field.type.startswith("path")]


@pytest.mark.parametrize("key", [*PATHS, "model.path", "reward.bertscore_model"])
def test_a_tilde_is_the_home_folder_in_the_file_and_on_the_command_line(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    common = ["data.name=vqa_rad", *(["data.root=x"] if key != "data.root" else [])]
    file = write(tmp_path, f"{key}: ~/a/b\n")
    for config in (load_config(file, common), load_config(None, [*common, f"{key}=~/a/b"])):
        section, _, name = key.rpartition(".")
        assert str(getattr(getattr(config, section) if section else config, name)) == str(tmp_path / "a" / "b")


def test_a_tilde_elsewhere_or_of_nobody_stays() -> None:
    config = load_config(None, ["model.path=a/~/b", "output_dir=~no-such-user/run"])
    assert (config.model.path, config.output_dir) == ("a/~/b", Path("~no-such-user/run"))


def test_mappings_and_lists_from_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path, "deepspeed:\n  extra: {a: {x: 1, y: 2}}\n")
    config = load_config(file, ["deepspeed.extra.a.y=[1, two]", "deepspeed.extra.b=1e-4"])
    assert config.deepspeed.extra == {"a": {"x": 1, "y": [1, "two"]}, "b": 1e-4}
    assert load_config(file, ["deepspeed.extra={c: 1}"]).deepspeed.extra == {"c": 1}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=abc", 'optim.lr = "abc" (command line): expected number > 0'),
        ("optim.lr=0", "optim.lr = 0 (command line): expected number > 0"),
        ("optim.lr=.nan", "optim.lr = NaN (command line): expected number > 0"),
        ("rollout.group_size=1", "rollout.group_size=1 leaves no group to compare with; use at least 2"),
        ("loss.epsilon_low=1.5", "loss.epsilon_low = 1.5 (command line): expected number > 0 and < 1"),
        ("optim.batch_size=100", "optim.batch_size=100 must be a multiple of rollout.group_size=8"),
        ("model.freeze_vision=maybe", "expected true | false"),
        ("model.freeze_vision=1", "expected true | false"),
        ("update.checkpointing=some", "expected auto | none | all or integer >= 0 or number > 0 and < 1"),
        ("seed=1.5", "seed = 1.5 (command line): expected integer >= 0"),
        ("seed=null", "seed = null (command line): expected integer >= 0"),
        ("algorithm=ppo", "expected mrpo | grpo | gdpo | sft"),
        ("model.think_tag=a b", "expected text matching ^[A-Za-z_]+$ or null"),
        ("deepspeed.extra=3", "deepspeed.extra = 3 (command line): expected mapping"),
        ("deepspeed.extra={a: [1", "deepspeed.extra = {a: [1 (command line): not a YAML value: line 1, column 7"),
        ("deepspeed.extra={a: 1, a: 2}", "'a' is set twice"),
        ("deepspeed.extra=!!python/name:os.system x", "not a YAML value"),
        ("deepspeed.extra=!!timestamp 2020-01-01", "only text, numbers, booleans, lists and mappings"),
        ("optim=3", "optim (command line) is a section: set its keys"),
        ("optim.lr", "'optim.lr' (command line): expected section.key=value"),
        ("reward.min_steps=20", "reward.min_steps=20 must not exceed reward.max_steps=10 (reward.min_steps: command"),
        ("data.name=vqa_rad", "data.root must name the folder of vqa_rad's files"),
        ("lr=1", "lr (command line): unknown key; did you mean optim.lr?"),
        ("zzzz=1", "zzzz (command line): unknown key"),
    ],
)
def test_a_mistake_is_one_line_with_key_source_value_and_what_is_right(override: str, expected: str) -> None:
    text = message(override)
    assert expected in text
    assert "\n" not in text


def test_of_fields_that_do_not_go_together_both_sources_are_named(tmp_path: Path) -> None:
    file = write(tmp_path, "model:\n  lora_vision: true\n")
    text = message("model.freeze_vision=true", file=file)
    assert "model.lora_vision=true would train the vision tower: set model.freeze_vision=false" in text
    assert f"model.lora_vision: {file}, line 2" in text
    assert "model.freeze_vision: command line" in text


def test_a_correction_needs_an_engine_that_tells_log_probabilities() -> None:
    assert "which rollout.engine=hf does not tell" in message("loss.sampler_correction=on")
    assert load_config(None, ["loss.sampler_correction=on", "rollout.engine=vllm"]).rollout.engine == "vllm"


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, "data:\n  name: phantm\nreward:\n  min_steps: 20\noptim:\n  lr: fast\n  lr: 1\n")
    text = message("rollout.group_size=1", "lrr=2", "deepspeed.offload_parameters=true", file=file)
    lines = text.splitlines()
    assert lines[0] == "7 settings are wrong:"
    for part in ("phantm", "reward.min_steps=20", '"fast"', "already set in line 6", "group_size=1", "lrr", "offload"):
        assert sum(part in line for line in lines) == 1, part


def test_a_wrong_value_does_not_raise_a_false_second_alarm() -> None:
    # With the default group size of 8, a batch of 100 would be wrong too; the user's G is unknown.
    assert message("rollout.group_size=ten", "optim.batch_size=100").startswith("rollout.group_size =")


def test_a_file_names_the_line(tmp_path: Path) -> None:
    file = write(tmp_path, "seed: 3\nmodel:\n  dtype: float8\n")
    assert message(file=file) == f'model.dtype = "float8" ({file}, line 3): expected float32 | bfloat16'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2\n", "seed ({file}, line 2): already set in line 1"),
        ("optim:\n  lr: 1\noptim:\n  steps: 2\n", "optim ({file}, line 3): already set in line 1"),
        ("optim:\n  lr: 1\noptim.lr: 2\n", "optim.lr ({file}, line 3): already set in line 2"),
        ("deepspeed:\n  extra:\n    a: 1\n    a: 2\n", "line 4, column 5: 'a' is set twice"),
        ("seed: [1\n", "config file {file}: not valid YAML: line 2, column 1"),
        ("seed:\n\t1\n", "not valid YAML: line 2, column 1"),
        ("- seed\n", "expected `section:` with indented `key: value` lines"),
        ("optim: 3\n", "optim ({file}, line 1) is a section"),
        ("? [a]\n: 1\n", "unknown key"),
        ("deepspeed:\n  extra: &x {a: *x}\n", "recursive"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, expected: str) -> None:
    file = write(tmp_path, text)
    assert expected.format(file=file) in message(file=file)


def test_missing_file_folder_and_binary_file(tmp_path: Path) -> None:
    assert "No such file" in message(file=tmp_path / "none.yaml")
    assert "Is a directory" in message(file=tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml: not valid YAML" in message(file=tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("lr", ["optim.lr"]),
        ("learning.lr", ["optim.lr"]),
        ("optm.lr", ["optim.lr"]),
        ("groupsize", ["rollout.group_size"]),
        ("--rollout.group-size", ["rollout.group_size"]),
        ("every", ["eval.every", "checkpoint.every"]),
        ("max_tokens", ["prompt.max_tokens", "rollout.max_tokens"]),
        ("epsilonlow", ["loss.epsilon_low"]),
        ("algoritm", ["algorithm"]),
        ("qqqq", []),
    ],
)
def test_nearest_keys(key: str, nearest: list[str]) -> None:
    assert nearest_keys(key) == nearest


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([field.key for field in describe_fields()]), st.data())
def test_one_wrong_letter_still_finds_the_key(key: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(key) - 1))
    typo = key[:place] + "q" + key[place + 1 :]
    assert key in nearest_keys(typo)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "no",
        "1e-4",
        "null",
        "~",
        "",
        "0123",
        "0o7",
        "<<",
        "=",
        "- a",
        "# x",
        " a ",
        "a: b",
        "\n\n",
        "\x85",
        "a\u2028b",
        "\ufeff",
        "!a",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=50)
@given(
    path=TEXT,
    instruction=st.none() | TEXT,
    lr=st.floats(min_value=1e-300, max_value=1e300),
    steps=st.none() | st.integers(1, 10**12),
    extra=st.dictionaries(TEXT, JSON, max_size=3),
)
def test_what_is_written_is_read_back_equal(
    path: str, instruction: str | None, lr: float, steps: int | None, extra: dict[str, object]
) -> None:
    config = Config.model_validate(
        {
            "model": {"path": path},
            "prompt": {"instruction": instruction},
            "optim": {"lr": lr, "steps": steps},
            "deepspeed": {"extra": extra},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(to_yaml(config), encoding="utf-8", newline="")
        assert load_config(file) == config
