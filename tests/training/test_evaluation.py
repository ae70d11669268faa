"""Evaluation: what it samples, how a finished run is opened, and that it only looks."""

import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from miniature import PORTRAITS, finetuning, judge
from torch.testing import assert_close

from fairness_dft.adapters.lora import TextEncoderLoRA
from fairness_dft.diffusion.stable_diffusion import StableDiffusion
from fairness_dft.fit import main as fit
from fairness_dft.sampling.sampler import Sampler
from fairness_dft.training import Evaluation, FairFinetuning
from fairness_dft.training.evaluation import settings_for
from fairness_dft.training.finished_run import FinishedRun, class_paths

QUICKSTART = PORTRAITS.parents[1] / "experiments" / "quickstart.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one large step, so that its adapter changes images."""
    output = tmp_path_factory.mktemp("runs")
    short = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.limit_test_batches=0"]
    short += ["--trainer.val_check_interval=1", "--data.init_args.images_per_prompt=2", "--seed_everything=3"]
    short += ["--trainer.enable_progress_bar=false", "--model.learning_rate=0.05", "--adapter_average.decay=0.5"]
    fit([f"--config={QUICKSTART}", f"--output={output}", *short])
    return output / "quickstart" / "version_0"


@pytest.fixture(scope="module")
def evaluation(run: Path) -> Evaluation:
    return Evaluation.from_run(run)


def copied(run: Path, folder: Path, **changes: object) -> Path:
    """Copy a run's settings and adapters, with other settings of its model."""
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    settings["model"] |= changes
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (folder / "adapters").symlink_to(run / "adapters")
    return folder


def test_an_evaluation_only_looks(evaluation: Evaluation) -> None:
    assert evaluation.configure_optimizers.__func__.__module__.startswith("lightning")
    assert evaluation.training_step.__func__.__module__.startswith("lightning")
    before = {name: values.clone() for name, values in evaluation.adapter.tensors("trained").items()}
    images = evaluation.sample_models("a chef", count=2, names=("original", "trained", "ema"))
    assert not any(pictures.requires_grad for pictures in images.values())
    assert_close(dict(evaluation.adapter.tensors("trained")), before, rtol=0, atol=0, check_dtype=False)


def test_a_finished_run_is_opened_with_its_settings_and_adapters(run: Path, evaluation: Evaluation) -> None:
    assert type(evaluation) is Evaluation and evaluation.seed == 3
    assert (evaluation.evaluation_sampler.steps, evaluation.evaluation_sampler.guidance_scale) == (6, 1.75)
    assert [type(network).__name__ for network in evaluation.features] == ["Clip", "Dino"]
    for name in ("trained", "ema"):
        saved = TextEncoderLoRA(rank=8)
        generator = StableDiffusion(str(PORTRAITS / "pipeline"))
        generator.load()
        saved.attach(generator)
        saved.load(FinishedRun(run).adapter(name=name), name)
        assert_close(evaluation.adapter.state_dict(name), saved.state_dict(name), rtol=0, atol=0)


def test_models_are_sampled_from_the_same_noise(evaluation: Evaluation) -> None:
    images = evaluation.sample_models("a chef", count=3)
    assert list(images) == ["original", "ema"] and images["ema"].shape == (3, 3, 64, 64)
    assert not torch.allclose(images["original"], images["ema"], atol=0.01)
    noise = evaluation.generator.noise(torch.arange(3))
    with torch.no_grad(), evaluation.adapter.using("original"):
        expected = evaluation.evaluation_sampler(evaluation.generator, "a chef", noise, 6)
    assert_close(images["original"], expected)
    later = evaluation.sample_models("a chef", count=2, first_seed=1, names=("original",))["original"]
    assert_close(later, expected[1:], atol=1e-4, rtol=1e-4)


def test_the_example_runs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [lines] = re.findall(r"```python\n(.*?)```", inspect.getdoc(Evaluation), re.DOTALL)
    lines = textwrap.dedent(lines)
    assert '"runs/quickstart/version_0"' in lines
    exec(lines.replace('"runs/quickstart/version_0"', repr(str(run))), {})
    printed = capsys.readouterr().out
    assert re.fullmatch(r"original: bias [01]\.\d\d\nema: bias [01]\.\d\d\n", printed), printed


def test_a_run_of_an_older_version_opens(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampler = {"class_path": "fairness_dft.sampler.Sampler", "init_args": {"steps": 2}}
    attribute = {"name": "gender", "factor1": 0.25}
    folder = copied(run, tmp_path / "run", evaluation_sampler=sampler, attribute=attribute)
    settings = FinishedRun(folder).module_settings()
    assert settings["evaluation_sampler"]["class_path"] == "fairness_dft.sampling.Sampler"
    assert settings["attribute"] == {"name": "gender", "semantics_factor": 0.25}
    assert "factor1 is now called model.attribute.semantics_factor" in capsys.readouterr().err


def test_classes_from_outside_need_consent(run: Path, tmp_path: Path) -> None:
    adapter = {"class_path": "elsewhere.Adapter", "init_args": {}}
    folder = copied(run, tmp_path / "run", adapter=adapter)
    with pytest.raises(ValueError, match="'elsewhere.Adapter', which is not a class of fairness_dft; set `other_cl"):
        Evaluation.from_run(folder)
    with pytest.raises(ValueError, match="cannot be opened.*elsewhere"):
        Evaluation.from_run(folder, other_classes=True)


def test_a_class_named_without_the_key_class_path_needs_consent_too(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path / "run", adapter="torch.nn.Identity")
    with pytest.raises(ValueError, match="cannot be opened|not a class of fairness_dft"):
        Evaluation.from_run(folder)


def test_class_paths_are_found_in_nested_settings() -> None:
    settings = {"a": [{"class_path": "x.Y", "init_args": {"b": {"class_path": "z.W"}}}], "c": "text", "class_path": 3}
    assert sorted(class_paths(settings)) == ["x.Y", "z.W"]


def test_a_run_that_exported_nothing_and_a_step_that_does_not_exist(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--step must be one of 1, but got 7"):
        Evaluation.from_run(run, step=7)
    (tmp_path / "config.yaml").write_text("model: {}")
    with pytest.raises(ValueError, match="has no adapters/step_…/trained: the run stopped before it exported any"):
        Evaluation.from_run(tmp_path)
    (tmp_path / "config.yaml").write_text("model: [}")
    with pytest.raises(ValueError, match="config.yaml' is not valid"):
        FinishedRun(tmp_path).settings()
    with pytest.raises(ValueError, match="is not a run, which has a config.yaml; runs are in runs/NAME/version_N"):
        Evaluation.from_run(tmp_path / "nowhere")


def test_a_child_takes_its_own_settings_and_the_training_sampler_in_place_of_a_missing_one() -> None:
    sampler, other = Sampler(steps=2), Sampler(steps=3)
    settings = {"generator": 1, "judge": 2, "sampler": sampler, "learning_rate": 0.1, "seed": 5}
    assert settings_for(Evaluation, settings) == {
        "generator": 1,
        "judge": 2,
        "evaluation_sampler": sampler,
        "seed": 5,
    }
    assert settings_for(Evaluation, settings | {"evaluation_sampler": other})["evaluation_sampler"] is other
    assert settings_for(FairFinetuning, settings) == settings | {"evaluation_sampler": sampler}


def test_a_finetuning_is_validated_with_three_models_and_tested_with_two() -> None:
    module = finetuning(judge=judge())
    module.compare = lambda batch, names: names
    assert module.validation_step(None, 0) == ("original", "trained", "ema")
    assert module.test_step(None, 0) == ("original", "ema")
