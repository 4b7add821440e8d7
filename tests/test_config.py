"""The configuration: what a command line and files give, what is refused and how, and goldens of configs/."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vstar_jax import settings
from vstar_jax.config import Config, SftConfig, check, load, parse, resolve, save, start_run
from vstar_jax.errors import UserError
from vstar_jax.pages import write_part

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests" / "goldens" / "configs"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that `parse` prints before it exits with code 2."""
    with pytest.raises(SystemExit) as exit_info:
        parse(argv)
    captured = capsys.readouterr()
    assert exit_info.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_shipped_default_is_the_default_of_the_code():
    assert load(ROOT / "configs" / "default.yaml") == Config()


def test_flags_win_over_later_files_and_those_over_earlier_ones(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("seed: 1\nsft: {steps: 1, batch_size: 8, learning_rate: 1e-4}\n")
    (tmp_path / "b.yaml").write_text("sft:\n  steps: 2\ndata:\n  tokens: [8, 16]\n")
    config = parse(["--sft.steps=3", f"--config={tmp_path / 'a.yaml'}", "--config", str(tmp_path / "b.yaml")])
    assert (config.seed, config.sft.steps, config.sft.batch_size, config.sft.learning_rate) == (1, 3, 8, 1e-4)
    assert config.data.tokens == (8, 16)
    assert config.evaluation == Config().evaluation
    assert parse([f"--config={tmp_path / 'a.yaml'}", f"--config={tmp_path / 'b.yaml'}"]).sft.steps == 2


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--run-dir", "runs/7"], "run_dir", "runs/7"),
        (["--run_dir=7"], "run_dir", "7"),
        (["--mesh=8x1"], "mesh", "8x1"),
        (["--data.pack"], "data.pack", True),
        (["--data.pack=false"], "data.pack", False),
        (["--data.patches=64,128"], "data.patches", (64, 128)),
        (["--data.patches=[64]"], "data.patches", (64,)),
        (["--sft.learning_rate=1"], "sft.learning_rate", 1.0),
        (["--sft.learning_rate=1e-5"], "sft.learning_rate", 1e-5),
        (["--policy.lora.rank=4"], "policy.lora.rank", 4),
    ],
)
def test_a_flag_sets_its_setting_and_no_other(flags: list[str], key: str, value: object):
    expected = {s.key: s.value for s in settings.settings(Config())} | {key: value}
    assert {s.key: s.value for s in settings.settings(parse(flags))} == expected


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--sft.stps=1", "there is no setting sft.stps; did you mean sft.steps?"),
        ("--policy.rank=1", "there is no setting policy.rank; did you mean policy.lora.rank?"),
        ("--sft=1", "there is no setting sft with a value of its own, it is a group: set sft.steps"),
        ("--xyzzy=1", "there is no setting xyzzy: --help lists all."),
        ("--sft.steps=many", "sft.steps is 'many', but must be an integer."),
        ("--sft.steps=1.5", "sft.steps is 1.5, but must be an integer."),
        ("--sft.steps=true", "sft.steps is True, but must be an integer."),
        ("--sft.learning_rate=fast", "sft.learning_rate is 'fast', but must be a number."),
        ("--sft.learning_rate=true", "sft.learning_rate is True, but must be a number."),
        ("--data.pack=2", "data.pack is 2, but must be true or false."),
        ("--data.tokens=[8,a]", "data.tokens is [8, 'a'], but must be a list of integers."),
        ("--policy.dtype=int8", "policy.dtype is 'int8', but must be float32 or bfloat16."),
        ("--sft.steps", "--sft.steps needs a value: write --sft.steps=value."),
        ("steps=3", "'steps=3' is not a flag"),
        ("--config=nowhere.yaml", "there is no configuration file nowhere.yaml"),
        ("--sft.batch_size=0", "sft.batch_size is 0, but must be greater than 0."),
        ("--seed=-1", "seed is -1, but must be"),
        ("--sft.weight_decay=inf", "sft.weight_decay is inf, but must be a finite number"),
        ("--sft.accumulate=3", "sft.accumulate is 3, but must divide sft.batch_size (32)."),
        ("--data.tokens=512,384", "data.tokens is [512, 384], but must be positive and ascending"),
        ("--data.patches=[]", "data.patches is [], but must be positive and ascending"),
        ("--mesh=8", "mesh is '8', but must be DATAxMODEL"),
        ("--mesh=0x1", "mesh is '0x1', but must be DATAxMODEL"),
        ("--video.min_pixels=999999", "video.min_pixels is 999999, but must not exceed video.max_pixels"),
        ("--video.frames=1", "video.frames is 1, but must be at least 2"),
        ("--data.labels=1", "data.labels is 1, but must be at least 2"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_sentence_with_its_key(flag: str, sentence: str, capsys: pytest.CaptureFixture[str]):
    assert sentence in refusal([flag], capsys)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("sft:\n  stps: 3\n", "there is no setting sft.stps; did you mean sft.steps?"),
        ("sft:\n  steps: null\n", "sft.steps is None, but must be an integer."),
        ("sft: 3\n", "there is no setting sft with a value of its own"),
        ("run_dir: 3\n", "run_dir is 3, but must be text."),
        ("seed:\n  seed: 3\n", "there is no setting seed.seed; did you mean seed?"),
        ("sft: [1\n", "is not valid YAML (line 2)"),
        ("3\n", "must hold settings such as `seed: 0`, not 3."),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence_with_file_and_key(
    content: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    message = refusal([f"--config={path}"], capsys)
    assert sentence in message
    assert str(path) in message
    with pytest.raises(UserError, match=r"wrong\.yaml"):
        load(path)


def test_help_names_every_setting_with_its_meaning(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        parse(["--help"], about="Trains.")
    out = " ".join(capsys.readouterr().out.split())
    assert exit_info.value.code == 0
    assert out.startswith("Trains.")
    for setting in settings.settings(Config()):
        assert f"--{setting.key}=" in out
        assert setting.help in out


def test_a_saved_configuration_loads_as_it_was(tmp_path: Path):
    config = parse(["--sft.learning_rate=1e-5", "--data.tokens=64", "--data.pack", "--policy.lora.rank=4"])
    save(config, tmp_path / "run" / "config.yaml")
    assert load(tmp_path / "run" / "config.yaml") == config
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "config.yaml"
    save(Config(), path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        save(Config(seed=1), path)
    assert load(path) == Config()


def test_a_run_directory_with_checkpoints_refuses_other_settings(tmp_path: Path):
    config = Config(run_dir=str(tmp_path))
    other = replace(config, sft=SftConfig(steps=7))
    start_run(config)
    start_run(other)
    assert load(tmp_path / "config.yaml") == other
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"holds a run with sft\.steps=7, but now it is {config.sft.steps}"):
        start_run(config)
    start_run(replace(other, mesh="4x2"))


def test_shipped_paths_resolve_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("configs/default.yaml") == ROOT / "configs" / "default.yaml"
    assert resolve("nowhere") == Path("nowhere")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "default.yaml").write_text("seed: 5\n")
    assert parse(["--config=configs/default.yaml"]).seed == 5


def test_importing_the_configuration_imports_nothing_heavy():
    program = "import sys, vstar_jax.config; print(*{'jax', 'numpy', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_the_resolved_configuration_equals_its_golden(path: Path, tmp_path: Path):
    golden = GOLDENS / path.name
    if os.environ.get("UPDATE_GOLDENS") == "1":
        save(load(path), golden)
    save(load(path), tmp_path / path.name)
    assert golden.exists(), f"{golden.name} is new: record it with UPDATE_GOLDENS=1 python -m pytest tests/test_config.py"
    assert (tmp_path / path.name).read_text() == golden.read_text(), (
        "a resolved configuration changed: if that is meant, run UPDATE_GOLDENS=1 python -m pytest tests/test_config.py"
    )


def test_every_golden_belongs_to_a_configuration():
    assert [p.name for p in sorted(GOLDENS.glob("*.yaml"))] == [p.name for p in CONFIGS]


def test_the_readme_lists_every_setting_as_the_code_has_it():
    readme, expected = ROOT / "README.md", settings.table(Config())
    if os.environ.get("UPDATE_GOLDENS") == "1":
        write_part(readme, "settings", expected)
    told = f"<!-- settings -->\n{expected}\n<!-- end of settings -->"
    assert told in readme.read_text(), "the settings changed: run UPDATE_GOLDENS=1 python -m pytest tests/test_config.py"


def test_every_setting_has_a_help_line_and_the_defaults_make_sense():
    check(Config())
    assert all(setting.help for setting in settings.settings(Config()))
