"""Configurations on their way to the parser: names of files, bases, and the names of older versions."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from command_line import EXPERIMENTS, MINIATURE, ROOT

from fairness_dft.cli.configuration import located, prepared, shipped_names
from fairness_dft.cli.lightning_cli import FairnessCLI
from fairness_dft.moved_names import CLASSES, FILES, KEYS, current_class, current_flag, current_key, rename

OLD_RUN = Path(__file__).parent / "old_layout.yaml"  # config.yaml of a quickstart of version 0.1


def text_of(argument: str) -> dict:
    """The settings that a prepared `--config` holds."""
    value = argument.removeprefix("--config=")
    return yaml.safe_load(Path(value).read_text(encoding="utf-8") if "\n" not in value else value)


def test_a_base_comes_before_the_first_configuration() -> None:
    arguments = prepared(["--name=trial", "--config", str(EXPERIMENTS / "race.yaml"), "--config=portraits", "--plan"])
    assert [argument.partition("=")[0] for argument in arguments] == ["--name", *["--config"] * 3, "--plan"]
    base, race, portraits = (text_of(argument) for argument in arguments[1:4])
    assert base == yaml.safe_load((EXPERIMENTS / "parts" / "base.yaml").read_text(encoding="utf-8"))
    assert race == {k: v for k, v in yaml.safe_load((EXPERIMENTS / "race.yaml").read_text()).items() if k != "base"}
    assert portraits == yaml.safe_load((EXPERIMENTS / "parts" / "portraits.yaml").read_text(encoding="utf-8"))


def test_a_base_of_a_base_comes_first_and_each_base_comes_once() -> None:
    arguments = prepared(["--config=multi_concept", "--config=race"])
    names = [text_of(argument).get("name", "base") for argument in arguments]
    assert names == ["base", "gender_race", "multi_concept", "race"]


def test_bases_that_name_each_other_come_once(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("base: two.yaml\nname: one\n")
    (tmp_path / "two.yaml").write_text("base: one.yaml\nname: two\n")
    names = [text_of(argument)["name"] for argument in prepared([f"--config={tmp_path / 'one.yaml'}"])]
    assert names == ["two", "one"]


def test_a_configuration_without_a_base_is_read_as_it_is(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: mine  # as it is\n")
    assert prepared([f"--config={mine}"]) == [f"--config={mine}"]
    mine.write_text("")
    assert prepared(["--config", str(mine)]) == [f"--config={mine}"]


def test_a_copy_of_an_experiment_finds_its_base_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        (EXPERIMENTS / "race.yaml").read_text(encoding="utf-8").replace("name: race", "name: me")
    )
    assert len(prepared(["--config=mine.yaml"])) == 2
    Path("parts").mkdir()
    Path("parts/base.yaml").write_text("name: my own base")
    assert text_of(prepared(["--config=mine.yaml"])[0]) == {"name": "my own base"}  # one beside it comes first


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("race", "race.yaml"),
        ("race.yaml", "race.yaml"),
        ("experiments/race.yaml", "race.yaml"),
        ("portraits", "parts/portraits.yaml"),
        ("parts/portraits.yaml", "parts/portraits.yaml"),
        ("experiments/parts/obedient.yaml", "parts/prompt_adherence.yaml"),
        ("obedient", "parts/prompt_adherence.yaml"),
        ("classifiers/training", "classifiers/training.yaml"),
    ],
)
def test_shipped_files_are_found_by_name(name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = located(name)
    assert found is not None and found.samefile(EXPERIMENTS / file)


def test_a_file_of_the_user_comes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("race.yaml").write_text("name: mine")
    assert located("race.yaml") == Path("race.yaml")
    Path("race").mkdir()  # a folder is no configuration
    found = located("race")
    assert found is not None and found.samefile(EXPERIMENTS / "race.yaml")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("rase", r"--config: there is no file 'rase'; did you mean race\?"),
        ("zzz.yaml", r"--config: there is no file 'zzz.yaml'; the package ships gender, gender_prefix"),
        ("{base: nowhere}", r"--config: '{base: nowhere}' has the base 'nowhere', which does not exist"),
        ("{name: [}", r"--config: '{name: \[}' is not YAML: "),
    ],
)
def test_what_is_no_configuration_is_refused(config: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared([f"--config={config}"])


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="image.yaml' is not YAML"):
        prepared([f"--config={tmp_path / 'image.yaml'}"])


def test_numbers_keep_their_spelling() -> None:
    (argument,) = prepared(["--config={finite_steps: {patience: 1e-2}, name: '007', x: null}"])
    assert argument.startswith("--config=") and "1e-2" in argument and "'007'" in argument


def test_every_moved_class_is_where_the_table_says() -> None:
    for old, new in CLASSES.items():
        module, _, name = f"fairness_dft.{new}".rpartition(".")
        assert isinstance(getattr(import_module(module), name), type), new
        assert old != new and current_class(f"x fairness_dft.{old}, y") == f"x fairness_dft.{new}, y"
    assert current_class("fairness_dft.detectors.YuNet.more") == "fairness_dft.detectors.YuNet.more"
    assert current_class("fairness_dft.diffusion.StableDiffusion") == "fairness_dft.diffusion.StableDiffusion"


def test_every_moved_file_is_shipped() -> None:
    for new in FILES.values():
        assert located(new) is not None


def test_old_keys_get_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    for old, new in KEYS.items():
        assert current_key(old) == new and current_key(f"{old}.more") == f"{new}.more"
        assert capsys.readouterr().err == f"notice: {old} is now called {new}; the old name still works\n" * 2
    assert current_key("model.attribute.factor10") == "model.attribute.factor10"
    assert current_flag("--model.attribute.factor1=0.2") == "--model.attribute.semantics_factor=0.2"
    assert current_flag("--model.adapter=fairness_dft.prompt_prefix.PromptPrefix").endswith("adapters.PromptPrefix")
    assert current_flag("fairness_dft.prompt_prefix.PromptPrefix") == "fairness_dft.adapters.PromptPrefix"


def test_names_in_yaml_are_replaced_by_their_whole_key() -> None:
    text = (
        "{model: {attribute: {factor1: 1}, factor1: 2}, finite_steps: {patience: 3}, 4: fairness_dft.stop.FiniteSteps}"
    )
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert rename(node)
    assert yaml.safe_load(yaml.serialize(node)) == {
        "model": {"attribute": {"semantics_factor": 1}, "factor1": 2},
        "skip_non_finite_steps": {"patience": 3},
        4: "fairness_dft.training.interruption.SkipNonFiniteSteps",
    }
    assert not rename(yaml.compose("{model: [1, {}]}", Loader=yaml.SafeLoader))


def test_a_configuration_of_the_old_layout_still_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = FairnessCLI([f"--config={OLD_RUN}", f"--output={tmp_path}"])
    old = yaml.safe_load(OLD_RUN.read_text(encoding="utf-8"))
    assert cli.model.attribute.semantics_factor == old["model"]["attribute"]["factor1"]
    assert type(cli.model.judge.faces.detectors[0]).__module__ == "fairness_dft.faces.detectors"
    assert cli.config.skip_non_finite_steps.patience == old["finite_steps"]["patience"]
    errors = capsys.readouterr().err
    assert len(re.findall("^notice: ", errors, re.MULTILINE)) == 3


def test_an_old_name_on_the_command_line_still_works(tmp_path: Path) -> None:
    old = ["--model.adapter=fairness_dft.prompt_prefix.PromptPrefix", "--model.attribute.factor2=0.7"]
    cli = FairnessCLI([*MINIATURE, *old, f"--output={tmp_path}"])
    assert type(cli.model.adapter).__name__ == "PromptPrefix" and cli.model.attribute.face_gradient_factor == 0.7


def test_the_shipped_experiments_are_listed() -> None:
    assert {"quickstart", "race", "gender"} <= set(shipped_names())
    assert (ROOT / "experiments").samefile(EXPERIMENTS)
