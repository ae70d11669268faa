"""`--help` is read from the source: what it says is what the code accepts, and it answers without heavy imports."""

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from command_line import MINIATURE, ROOT

from fairness_dft.__main__ import main
from fairness_dft.cli.help import (
    CHOICES,
    CLASSIFIER_CHOICES,
    COMMON,
    PACKAGE,
    TRAINER,
    answer_help,
    choosable,
    command_help,
    commands,
    overview,
    program,
)
from fairness_dft.cli.lightning_cli import FairnessCLI

ROOMS = ("adapters", "classifiers", "datasets", "diffusion", "faces", "features", "prompts")


def exported() -> dict[str, type]:
    """Every public class of the rooms whose classes may be chosen."""
    rooms = [import_module(f"fairness_dft.{room}") for room in ROOMS]
    names = {name: getattr(room, name) for room in rooms for name in getattr(room, "__all__", vars(room))}
    return {
        name: cls
        for name, cls in names.items()
        if inspect.isclass(cls) and cls.__module__.startswith("fairness_dft") and name == cls.__name__
    }


@pytest.mark.parametrize("base", sorted({*CHOICES.values(), *CLASSIFIER_CHOICES.values()}))
def test_every_class_that_may_be_chosen_is_listed(base: str) -> None:
    classes = exported()
    expected = {name for name, cls in classes.items() if issubclass(cls, classes[base]) and cls is not classes[base]}
    assert expected and {name for name in expected if not inspect.isabstract(classes[name])} == set(choosable(base))


def test_the_common_settings_exist_and_are_described(tmp_path: Path) -> None:
    known = list(FairnessCLI([*MINIATURE, f"--output={tmp_path}"]).config.keys(branches=True))
    for key in (*COMMON, *TRAINER, *CHOICES):
        assert key in known, key
    text = command_help("fit")
    for key in COMMON:
        after = text.partition(f"--{key}")[2].strip().partition("--")[0]
        assert len(after) > 10, key


@pytest.mark.parametrize("command", ["fit", "evaluate", "diagnose"])
def test_help_of_a_command_with_experiments(command: str) -> None:
    text = command_help(command)
    documented = import_module(f"fairness_dft.{command}").__doc__
    assert text.startswith(f"usage: python -m fairness_dft.{command} ") and documented.splitlines()[0] in text
    for part in ("--config", "gender_race_age", "UNetLoRA", "StableDiffusion", "--help=all", "--name", "--output"):
        assert part in text
    assert text.index("Settings of this command") < text.index("Settings that are changed most")
    assert max(len(line) for line in text.splitlines()) <= 125


def test_help_of_the_other_commands() -> None:
    assert "--data\n    CelebA" in command_help("train_classifier") and "--output" in command_help("train_classifier")
    assert "--prompts" in command_help("generate") and "--config" not in command_help("generate")
    assert "--merge" in command_help("export") and "--images" in command_help("face_bank")


def test_the_overview_lists_every_command() -> None:
    text = overview()
    assert {"fit", "evaluate", "generate", "export", "diagnose", "train_classifier", "face_bank"} <= commands().keys()
    assert all(f"  {command.replace('_', '-')} " in text for command in commands()) and "quickstart" in text


def test_help_is_answered_before_anything_is_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        FairnessCLI(["--nonsense", "--help"])
    assert stopped.value.code == 0 and "changed most" in capsys.readouterr().out
    assert answer_help("fit", ["--help=all", "--name=x"]) == ["--help", "--name=x"]


def test_all_of_the_help_is_the_parsers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        FairnessCLI(["--help=all"])
    assert stopped.value.code == 0 and "--trainer.accumulate_grad_batches" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(commands()))
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_module('fairness_dft.{command}', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "heavy = {'torch', 'lightning', 'jsonargparse', 'numpy', 'diffusers'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


@pytest.mark.parametrize("name", ["UNetLoRA", "PromptPrefix", "Combined"])
def test_short_class_names_work_in_yaml_and_on_the_command_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"model:\n  adapter: {name}\n")
    for more in ([f"--model.adapter={name}"], [f"--config={tmp_path / 'mine.yaml'}"]):
        cli = FairnessCLI([*MINIATURE, *more, f"--output={tmp_path}"])
        assert type(cli.model.adapter).__name__ == name


def test_the_name_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    assert program("face_bank") == "python -m fairness_dft.face_bank"
    for script in ("/usr/bin/fairness-dft", "fairness-dft.exe", str(PACKAGE / "__main__.py")):
        monkeypatch.setattr(sys, "argv", [script])
        assert program("face_bank") == "fairness-dft face-bank"


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [([], "usage: fairness-dft COMMAND"), (["--help"], "train-classifier"), (["--version"], "fairness_dft 0.2.0")],
)
def test_the_console_command(arguments: list[str], printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments)
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize("command", ["face-bank", "train_classifier", "quickstart"])
def test_the_console_command_finds_the_help_of_each(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0 and capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize(("word", "hint"), [("fitt", "did you mean fit?"), ("zzz", "fairness-dft --help lists them")])
def test_an_unknown_command(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([word])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: there is no command {word!r}; {hint}\n"


def test_the_console_command_runs_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", f"--run={tmp_path}", f"--output={tmp_path / 'new'}"])
    assert stopped.value.code == 2 and "is not a run" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["quickstart", "--model.learning_rat=1", f"--output={tmp_path}"])
    assert stopped.value.code == 2 and "did you mean --model.learning_rate?" in capsys.readouterr().err
