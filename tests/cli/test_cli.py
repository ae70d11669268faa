"""The command line: what a user types, and the one line that each mistake gives."""

import json
import os
import re
import subprocess
import sys
from runpy import run_module

import pytest
import torch
import yaml
from command_line import EXPERIMENTS, MINIATURE, PORTRAITS, ROOT, SMALL, refused, small
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fairness_dft.cli.commands import run_main
from fairness_dft.cli.lightning_cli import FairnessCLI
from fairness_dft.fit import main
from fairness_dft.prompts.files import SPLITS
from fairness_dft.training.callbacks import AdapterAverage
from fairness_dft.training.interruption import GracefulStop
from fairness_dft.training.module import FairFinetuning


def test_fit_writes_results_picture_adapters_and_config(tmp_path, capsys):
    main(small(tmp_path, "--name=trial"))
    folder = tmp_path / "trial" / "version_0"
    content = json.loads((folder / "results.json").read_text())
    assert content["attributes"] == ["gender"] and content["target"] == {"gender": {"man": 0.5, "woman": 0.5}}
    assert content["run"]["steps"] == 2
    assert content["run"]["test_prompts_trained_on"] == []
    assert content["bias"].keys() == {"training", "independent"}
    assert (folder / "before_after.png").is_file()
    assert (folder / "adapters" / "step_000002" / "ema" / "pytorch_lora_weights.safetensors").is_file()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 2 and config["model"]["attribute"]["name"] == "gender"
    printed, errors = capsys.readouterr()
    assert "warning" not in errors
    assert "gender" in printed and "independent" in printed and "perceived" in printed


def test_saved_config_reproduces_the_run(tmp_path):
    main(small(tmp_path, "--name=first"))
    config = tmp_path / "first" / "version_0" / "config.yaml"
    main(["--config", str(config), "--name=second"])
    first, second = (json.loads((tmp_path / n / "version_0" / "results.json").read_text()) for n in ("first", "second"))
    assert first["bias"] == second["bias"] and first["kept"] == second["kept"]


def test_nothing_on_disk_is_overwritten(tmp_path):
    main(small(tmp_path, "--name=same"))
    main(small(tmp_path, "--name=same", "--trainer.limit_test_batches=0"))
    assert sorted(path.name for path in (tmp_path / "same").iterdir()) == ["version_0", "version_1"]
    assert not (tmp_path / "same" / "version_1" / "results.json").exists()  # it was asked to measure nothing


def test_runs_without_a_logger_go_to_folders_of_their_own(tmp_path, monkeypatch, capsys):
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    for _ in range(2):
        main(small(tmp_path, "--name=quiet", "--trainer.logger=false"))
    assert not list(working.iterdir())
    for version in range(2):
        names = {path.name for path in (tmp_path / "quiet" / f"version_{version}").iterdir()}
        assert names == {"adapters", "before_after.png", "checkpoints", "config.yaml", "per_image.csv", "results.json"}
    assert "tensorboard" not in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(p.stem for p in EXPERIMENTS.glob("*.yaml")))
def test_every_experiment_runs_on_the_miniature(name, tmp_path, capsys):
    file = EXPERIMENTS / f"{name}.yaml"
    parts = [] if name == "quickstart" else PORTRAITS
    main(["--config", str(file), *parts, *SMALL, f"--output={tmp_path}", "--trainer.limit_val_batches=0"])
    content = json.loads((tmp_path / name / "version_0" / "results.json").read_text())
    given = FairnessCLI(["--config", str(file), *parts, f"--output={tmp_path}"]).config.model
    attributes = given.attribute.name
    assert content["attributes"] == (attributes if isinstance(attributes, list) else [attributes])
    assert {"×".join(content["attributes"]), *content["attributes"]} == content["target"].keys()
    built = yaml.safe_load((tmp_path / name / "version_0" / "config.yaml").read_text())["model"]
    assert built["adapter"]["class_path"] == given.adapter.class_path
    printed = capsys.readouterr().out
    shares = [share for attribute in content["attributes"] for share in content["target"][attribute].values()]
    assert all(f" {share:.2f} " in printed for share in shares)


def test_print_config_prints_yaml_and_stops():
    command = [sys.executable, "-m", "fairness_dft.fit", *MINIATURE, "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["trainer"]["max_steps"] > 0


def test_missing_weights_earn_one_line_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "fairness_dft.fit", "--config", "experiments/race.yaml", f"--output={tmp_path}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 2
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "Traceback" not in done.stderr + done.stdout
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in error[0]
    assert "hf download" in error[0] and "local folder" in error[0] and "experiments/parts/portraits.yaml" in error[0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.learning_rat=1"], "learning_rat"),
        (["--model.learning_rate=fast"], "learning_rate"),
        (["--model.attribute.confidence=2"], "between 0 and 1"),
        (["--data.init_args.file=nowhere.json"], "nowhere.json: there is no such file"),
        (["--data.init_args.images_per_prompt=0"], "images_per_prompt must be at least 1"),
        (["--model.attribute.name=height"], "does not read 'height'"),
        (["--model.attribute.name=[gender, gender]"], "one attribute or several different ones"),
        (
            ["--model.attribute.semantics_factor={race: 0.2}"],
            "semantics_factor must be one number, or one for each of gender",
        ),
        (["--model.attribute.targets={spots: uniform}"], "'spots' is not a prompt, subject or concept of the prompts"),
        (["--model.attribute.targets={occupation: [1]}"], "attribute.targets of 'occupation' must be 2 numbers"),
        (["--model.learning_rate=-1"], "--model.learning_rate must be finite and not negative, but is -1"),
        (["--model.semantics_weight=.nan"], "--model.semantics_weight must be finite and not negative"),
        (["--model.weight_decay=-0.1"], "--model.weight_decay must be finite and not negative"),
        (["--model.betas=[0.9, 1]"], "--model.betas must be at least 0 and below 1"),
        (["--model.draws=0"], "--model.draws must be at least 1, but is 0"),
        (
            ["--trainer.max_steps=-1", "--trainer.max_epochs=-1", "--model.schedule=linear"],
            "--model.schedule=linear ends with the run: give --trainer.max_steps too",
        ),
        (["--ckpt_path=nowhere.ckpt"], "no file 'nowhere.ckpt'"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_earn_one_line(tmp_path, capsys, more, message):
    assert message in refused(capsys, small(tmp_path, *more))


PROMPTS = {"concept": "job", "templates": ["a {job}"], "train": ["chef"], "validation": ["judge"], "test": ["nurse"]}


@pytest.fixture
def unloaded(monkeypatch):
    """Fails where a model is loaded, for what must be refused before."""
    monkeypatch.setattr(FairFinetuning, "configure_model", lambda module: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("split", SPLITS)
def test_missing_split_is_refused_before_a_model_is_loaded(tmp_path, capsys, unloaded, split):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({key: value for key, value in PROMPTS.items() if key != split}))
    mine = [f"--data.init_args.file={file}", "--data.init_args.train_subjects=null"]
    assert f'mine.json: there is no "{split}" split' in refused(capsys, small(tmp_path, *mine))
    if split == "validation":
        with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
            main(small(tmp_path, *mine, "--trainer.limit_val_batches=0"))


def test_own_prompts_on_the_miniature_get_the_way_out(tmp_path, capsys, unloaded):
    file = tmp_path / "mine.txt"
    file.write_text("a chef\n")
    arguments = small(tmp_path, f"--data.init_args.file={file}")
    line = refused(capsys, arguments)
    assert f"training_subjects.txt: names no training subject of {file}" in line
    way_out = "--data.init_args.train_subjects null"
    assert way_out in line and way_out in (ROOT / "docs" / "troubleshooting.md").read_text()
    cli = FairnessCLI([*arguments, *way_out.split()])
    assert [prompt.text for prompt in cli.datamodule.prompts("train")] == ["a chef"]


def test_prompts_that_are_trained_on_and_tested_get_a_warning(tmp_path, capsys):
    file = tmp_path / "mine.txt"
    file.write_text("A chef\na judge\na nurse\n")
    mine = ["--data.init_args.train_subjects=null", "--data.init_args.test_prompts=2", "--name=mine"]
    mine += ["--trainer.log_every_n_steps=1"]
    main(small(tmp_path, f"--data.init_args.file={file}", *mine))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "2 test prompts are also trained on, such as 'A chef'" in warnings[0]
    assert "does not measure unseen prompts" in warnings[0] and "JSON" in warnings[0]
    run = json.loads((tmp_path / "mine" / "version_0" / "results.json").read_text())["run"]
    assert run["test_prompts_trained_on"] == run["test_prompts"] == ["A chef", "a judge"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"gender": "lady"}, "names gender 'lady', but the classifier's classes are"),
        ({"age": "old", "gender": None}, "names gender None, but the classifier's classes are"),
    ],
)
def test_training_prompts_must_name_classes(tmp_path, capsys, unloaded, names, message):
    named = {"concept": "named", "train": [{"subject": "chef", "text": "A lady, a chef", "names": names}]}
    (tmp_path / "named.json").write_text(
        json.dumps(named | {"validation": ["a"], "test": ["b"], "templates": ["{named}"]})
    )
    mine = [f"--data.init_args.file={tmp_path / 'named.json'}", "--data.init_args.train_subjects=null"]
    line = refused(capsys, small(tmp_path, *mine))
    assert "'A lady, a chef'" in line and message in line


def test_prompts_that_name_attributes_join_the_training_and_the_test(tmp_path):
    files = "[data/prompts/occupations.json, data/prompts/named_skin.json]"
    adherence = ["--config", str(EXPERIMENTS / "parts" / "prompt_adherence.yaml"), f"--data.init_args.files={files}"]
    main(small(tmp_path, *adherence, "--data.init_args.test_prompts=1", "--name=adherence"))
    content = json.loads((tmp_path / "adherence" / "version_0" / "results.json").read_text())
    assert content["concepts"].keys() == {"occupation", "named skin tone"}
    assert content["prompt_adherence"]["training"].keys() == {"gender", "race", "age"}
    assert content["own_targets"] == {}


@pytest.mark.parametrize("kind", ["", "validation_", "test_"])
def test_images_that_do_not_divide_are_refused_before_a_model_is_loaded(tmp_path, capsys, unloaded, kind):
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", f"--data.init_args.{kind}images_per_prompt=5"]
    line = refused(capsys, small(tmp_path, *two))
    assert f"error: {kind}images_per_prompt" in line and "must be a multiple of 2, but is 5" in line


@pytest.mark.parametrize("name", sorted({p.stem for p in EXPERIMENTS.glob("*.yaml")} - {"quickstart"}))
def test_experiments_fit_the_numbers_of_gpus_that_they_name(name, tmp_path):
    file = EXPERIMENTS / f"{name}.yaml"
    named = re.search(r"the sizes here fit ([\d, or]+) GPUs", file.read_text())[1]
    fitting = {int(count) for count in re.findall(r"\d+", named)}
    assert {1, 2, 4} <= fitting
    data = FairnessCLI(["--config", str(file), f"--output={tmp_path}", "--trainer.accelerator=cpu"]).datamodule
    for gpus in range(1, 13):
        if gpus in fitting:
            data.check(SPLITS, gpus)
        else:
            with pytest.raises(ValueError, match=f"must be a multiple of {gpus}"):
                data.check(SPLITS, gpus)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("--data.init_args.file=nowhere.json", "--data: nowhere.json: there is no such file; give a path relative"),
        ("--data.init_args.file={bad}", "--data: {bad}: not JSON at line 1, column 12"),
        ("--model.sampler.steps=0", "--model.sampler: `steps` must be at least 1, but got 0"),
        ("--model.evaluation_sampler.steps=0", "--model.evaluation_sampler: `steps` must be at least 1"),
        ("--model.adapter.init_args.rank=0", "--model.adapter: `rank` must be at least 1, but got 0"),
        ("--model.sampler.gradient=nonsense", "--model.sampler.gradient: must be values in braces or a class"),
        (
            "--model.sampler.gradient={{coupled: maybe}}",
            "--model.sampler.gradient.coupled: must be bool, but got maybe",
        ),
        ("--model.sampler.gradient={{steps: last, count: 0}}", "--model.sampler.gradient: `count` must be at least 1"),
        (
            "--model.sampler.gradient={{weights: much}}",
            "--model.sampler.gradient.weights: must be one of 'solver', 'uniform', 'authors', but got much",
        ),
        ("--model.sampler.stepz=3", "--model.sampler: Option 'stepz' is not accepted"),
        ("--config={nested}", "--data: Option 'fil' is not accepted"),
        ("--data.init_args.images_per_prompt=many", "--data.images_per_prompt: must be int, but got many"),
        ("--model.attribute.target=[much]", "--model.attribute.target: must be float, but got much"),
        ("--trainer.gradient_clip_val=much", "--trainer.gradient_clip_val: must be float or int, but got much"),
        ("--model.betas=3", "--model.betas: must be tuple, but got 3"),
    ],
)
def test_mistakes_name_their_key_without_the_search_of_the_parser(tmp_path, capsys, more, line):
    files = {"bad": tmp_path / "bad.json", "nested": tmp_path / "nested.yaml"}
    files["bad"].write_text('{"concept" "job"}')
    files["nested"].write_text("data:\n  init_args:\n    fil: mine.json\n")
    told = refused(capsys, small(tmp_path, more.format(**files)))
    assert told.startswith("error: " + line.format(**files)) and len(told) < 300
    assert not any(word in told for word in ("Union", "Namespace", "NoneType", "class '", "Given value"))


@pytest.mark.parametrize(
    ("more", "way_out"),
    [
        (["--model.learning_rat", "1"], "arguments: --model.learning_rat 1; did you mean --model.learning_rate?"),
        (["--data.init_args.fil=x"], "--data: Option 'fil' is not accepted; did you mean file?"),
        (["--data=MixedPrompts", "--data.init_args.weighs=[1]"], "did you mean weights?"),
        (["--config={misspelt}"], "'atribute.name'; did you mean --model.attribute?"),
        (["--quite.another=1"], "--quite.another=1; --print_config shows all settings"),
        (["experiments/race.yaml"], "write --config experiments/race.yaml"),
        (["--trainer.accelerator=gpu"], "leave accelerator and devices to auto"),
        (["--trainer.devices=3.5"], "leave accelerator and devices to auto"),
        (["--ckpt_path={misspelt}"], "misspelt.yaml' is not a checkpoint of a run; checkpoints are in"),
        (["--ckpt_path={weights}"], "model.safetensors' is not a checkpoint of a run"),
    ],
)
def test_mistakes_come_with_the_way_out(tmp_path, capsys, monkeypatch, more, way_out):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    files = {"misspelt": tmp_path / "misspelt.yaml", "weights": ROOT / "data/portraits/dino/model.safetensors"}
    files["misspelt"].write_text("model:\n  atribute:\n    name: gender\n")
    assert way_out in refused(capsys, small(tmp_path, *(text.format(**files) for text in more)))


def test_no_experiment_at_all(tmp_path, capsys):
    line = refused(capsys, [f"--output={tmp_path}"])
    assert "model.generator" in line and line.endswith("for example --config experiments/quickstart.yaml")


def test_what_lightning_finds_misconfigured_later(capsys):
    def command():
        raise MisconfigurationException("no\nway")

    with pytest.raises(SystemExit, match="2"):
        run_main(command)
    assert capsys.readouterr().err == "error: no way\n"


def test_a_stop_outside_lightning_is_no_traceback(capsys):
    def command():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        run_main(command)
    assert capsys.readouterr().err == ""


def test_one_progress_bar_ours_or_the_users(tmp_path):
    def bars(*more):
        trainer = FairnessCLI([*MINIATURE, f"--output={tmp_path}", *more]).trainer
        return [type(each).__name__ for each in trainer.callbacks if isinstance(each, ProgressBar)]

    assert bars() == ["StepBar"]
    assert bars("--trainer.callbacks=RichProgressBar") == ["RichProgressBar"]
    assert bars("--trainer.enable_progress_bar=false") == []


def test_a_file_without_test_prompts_trains_where_no_test_is_wanted(tmp_path, capsys):
    file = tmp_path / "mine.json"
    subjects = {"train": ["barber"], "validation": ["chemist"]}
    file.write_text(json.dumps({"concept": "job", "templates": ["a {job}"], **subjects}))
    arguments = small(tmp_path, f"--data.init_args.file={file}", "--data.init_args.train_subjects=null")
    assert 'there is no "test" split' in refused(capsys, arguments)
    main([*arguments, "--trainer.limit_test_batches=0", "--trainer.log_every_n_steps=1"])
    assert not list(tmp_path.rglob("results.json"))


EVALUATION = ("evaluation_sampler.images_at_once (now 3;", "evaluation_sampler.decode_chunk (now ")


@pytest.mark.parametrize(
    ("where", "checkpoint", "options", "settings"),
    [
        ("training", "true", ["--model.sampler.images_at_once=2"],
         ("model.sampler.images_at_once (now 2;", "model.sampler.decode_chunk (now 64;", "images_per_prompt (now 4;")),
        ("training", "true", ["--model.sampler.decode_chunk=2", "--model.sampler.decode_kept=4"],
         ("model.sampler.images_at_once (now 4;", "model.sampler.decode_kept (now 4;", "images_per_prompt (now 4;")),
        ("training", "false", [], ("checkpoint=true", "images_per_prompt (now 4;", "model.sampler.steps (now 2;")),
        ("validation", "true", ["--model.evaluation_sampler.images_at_once=3"],
         (*EVALUATION, "validation_images_per_prompt (now ")),
        ("test", "true", ["--model.evaluation_sampler.images_at_once=3", "--trainer.limit_val_batches=0"],
         (*EVALUATION, "test_images_per_prompt (now ")),
    ],
)  # fmt: skip
def test_out_of_memory_names_what_saves_it(tmp_path, capsys, monkeypatch, where, checkpoint, options, settings):
    def exhausted(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
        )

    at_work = "training_step" if where == "training" else "compare"
    monkeypatch.setattr(FairFinetuning, at_work, exhausted)
    line = refused(capsys, small(tmp_path, *options, f"--model.sampler.checkpoint={checkpoint}"))
    assert "(CUDA out of memory)" in line and "Traceback" not in line
    for setting in settings:
        assert setting in line
    assert line.count("(now ") == line.count("half of it halves") == len(settings) - ("checkpoint=true" in line)


def test_out_of_memory_of_the_cpu_is_one_line_in_every_command(capsys):
    def exhausted():
        torch.empty(2**60, dtype=torch.uint8)

    with pytest.raises(SystemExit) as stop:
        run_main(exhausted)
    assert stop.value.code == 2
    assert re.fullmatch(r"error: not enough memory \(.*\); let the command .*\n", capsys.readouterr().err)


def test_a_monitor_that_cannot_load_is_refused_before_any_large_network(tmp_path, capsys, monkeypatch):
    def loaded(*_):
        raise AssertionError("too late")

    monkeypatch.setattr(FairFinetuning, "configure_model", loaded)
    wrong = "--bias_monitor.independent_judge.classifier.init_args.path=no/such/folder"
    line = refused(capsys, small(tmp_path, wrong))
    assert "the classifier 'no/such/folder' could not be loaded (there is no folder of this name)" in line


def test_a_stop_is_saved_after_the_adapter_was_averaged(tmp_path):
    callbacks = [type(callback) for callback in FairnessCLI([*MINIATURE, f"--output={tmp_path}"]).trainer.callbacks]
    assert callbacks.index(GracefulStop) > callbacks.index(AdapterAverage)


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--scale=0"], "--scale must be positive"), (["--scale=0.01"], "a trial needs an --output of its own")],
)
def test_a_trial_of_the_portraits_leaves_the_shipped_ones(capsys, monkeypatch, more, message):
    shipped = ROOT / "data" / "portraits" / "training_subjects.txt"
    before = shipped.stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["portraits", *more])
    with pytest.raises(SystemExit, match="2"):
        run_module("fairness_dft.portraits", run_name="__main__")
    assert message in capsys.readouterr().err and shipped.stat().st_mtime_ns == before


def test_portraits_in_a_folder_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("kept")
    monkeypatch.setattr(sys, "argv", ["portraits", f"--output={tmp_path / 'file' / 'x'}"])
    with pytest.raises(SystemExit, match="2"):
        run_module("fairness_dft.portraits", run_name="__main__")
    assert "error: --output: cannot write to" in capsys.readouterr().err.splitlines()[-1]


def test_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    line = refused(capsys, small(tmp_path, f"--output={tmp_path / 'file'}"))
    assert "cannot write to" in line and "choose another folder" in line
    assert (tmp_path / "file").read_text() == "kept"


def test_misspelt_key_in_a_file(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("model:\n  atribute:\n    name: gender\n")
    assert "atribute" in refused(capsys, small(tmp_path, f"--config={file}"))


@pytest.mark.parametrize("adapter", [None, "UNetLoRA", "Combined"])
@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "experiments").glob("*.yaml")))
def test_every_experiment_parses_and_builds(name, adapter, tmp_path):
    other = [f"--model.adapter=fairness_dft.adapters.{adapter}"] if adapter else []
    cli = FairnessCLI(
        ["--config", str(EXPERIMENTS / name), *other, f"--output={tmp_path}", "--trainer.accelerator=cpu"]
    )
    assert cli.model.attribute.names
    assert cli.datamodule.prompts("train")
    assert adapter in (None, type(cli.model.adapter).__name__)


@pytest.mark.parametrize("name", sorted(p.stem for p in EXPERIMENTS.glob("*.yaml")))
def test_an_experiment_lists_only_what_it_is_about(name):
    text = (EXPERIMENTS / f"{name}.yaml").read_text()
    listed = yaml.safe_load(text)
    assert 8 <= len(text.splitlines()) <= 15 and listed["name"] == name
    own = {"attribute", "adapter", "semantics_weight", "face_realism"}
    if name == "quickstart":  # a recipe of its own, tuned for minutes on two cores
        own |= {"sampler", "learning_rate"}
    assert listed.keys() <= {"base", "name", "model", "data", "trainer"} and listed.get("model", {}).keys() <= own
    assert listed.get("trainer", {}).keys() <= {"max_steps", "val_check_interval"}


def test_the_steps_of_experiments_on_stable_diffusion_are_the_papers():
    for file in set(EXPERIMENTS.glob("*.yaml")) - {EXPERIMENTS / "quickstart.yaml"}:
        steps = yaml.safe_load(file.read_text()).get("trainer", {"max_steps": 15_000})["max_steps"]
        assert 10_000 <= steps <= 15_000, file


def test_every_experiment_builds_on_the_miniature(tmp_path):
    for file in sorted(EXPERIMENTS.glob("*.yaml")):
        cli = FairnessCLI(["--config", str(file), *PORTRAITS, f"--output={tmp_path}"])
        assert cli.model.generator.path == "data/portraits/pipeline"
        assert len(cli.datamodule.prompts("train")) >= 100


def test_one_seed_for_everything(tmp_path):
    cli = FairnessCLI([*MINIATURE, f"--output={tmp_path}", "--seed_everything=3"])
    assert cli.model.seed == 3 and cli.datamodule.seed == 3
