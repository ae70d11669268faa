"""Pictures of a finished run, against the sampler itself and plain diffusers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from miniature import PORTRAITS
from PIL import Image
from safetensors.torch import load_file, save_file

from fairness_dft.cli.commands import run_main
from fairness_dft.fit import main as fit
from fairness_dft.generate import main, slug
from fairness_dft.training.finished_run import FinishedRun

PROMPTS = ["a portrait of a chef", "A photo of the face of a judge, a person"]
ROOT = PORTRAITS.parents[1]
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of no length, whose averaged adapter is then made to change pictures."""
    output = tmp_path_factory.mktemp("runs")
    short = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.limit_test_batches=0"]
    short += [
        "--trainer.enable_progress_bar=false",
        "--trainer.val_check_interval=1",
        "--data.init_args.images_per_prompt=2",
    ]
    fit([f"--config={ROOT / 'experiments' / 'quickstart.yaml'}", f"--output={output}", *short])
    folder = output / "quickstart" / "version_0"
    file = FinishedRun(str(folder)).adapter() / LORA
    torch.manual_seed(0)
    state = {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    return folder


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


@pytest.fixture(scope="module")
def generated(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("generated") / "new"
    main([f"--run={run}", f"--prompts={json.dumps(PROMPTS)}", "--images=9", "--seed=5", f"--output={output}"])
    return output


def test_every_picture_says_how_it_was_made(run: Path, generated: Path) -> None:
    folders = sorted(folder for folder in generated.iterdir() if folder.is_dir())
    assert [folder.name for folder in folders] == [f"{i + 1:03d}_{slug(prompt)}" for i, prompt in enumerate(PROMPTS)]
    for prompt, folder in zip(PROMPTS, folders, strict=True):
        assert len(list(folder.iterdir())) == 18
        for seed in range(5, 14):
            for model in ("original", "finetuned"):
                with Image.open(folder / f"{seed}_{model}.png") as picture:
                    assert picture.size == (64, 64)
                    facts = json.loads(picture.text["fairness_dft"])
                assert (facts["prompt"], facts["seed"], facts["model"]) == (prompt, seed, model)
                assert facts["steps"] == 6 and facts["guidance_scale"] == 1.75
                if model == "finetuned":
                    assert facts["scale"] == 1 and facts["adapter"] == str(FinishedRun(str(run)).adapter())
    with Image.open(generated / "grid.png") as grid:
        assert grid.width > 64 * 12


def test_pictures_are_those_of_plain_diffusers(run: Path, generated: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(PORTRAITS / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    shape = (1, pipeline.unet.config.in_channels, 8, 8)
    differ = []
    for model in ("original", "finetuned"):
        if model == "finetuned":
            pipeline.load_lora_weights(run / "adapters" / "step_000001" / "ema")
        for seed in (5, 13):
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            theirs = pipeline(PROMPTS[0], num_inference_steps=6, guidance_scale=1.75, latents=noise).images[0]
            ours = pixels(generated / f"001_{slug(PROMPTS[0])}" / f"{seed}_{model}.png")
            assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1
            differ.append(ours)
    assert np.abs(differ[0] - differ[2]).mean() > 1


def test_scale_and_number_of_pictures(run: Path, generated: Path, tmp_path: Path) -> None:
    """Without strength the finetuned model is the original, and a picture does not depend on how many there are."""
    (tmp_path / "prompts.txt").write_text(f"# mine\n{PROMPTS[1]}\n")
    few = [f"--run={run}", f"--file={tmp_path / 'prompts.txt'}", "--images=2", "--seed=12"]
    main([*few, "--scale=0", f"--output={tmp_path / 'none'}"])
    main([*few, f"--output={tmp_path / 'whole'}"])
    folder, before = f"001_{slug(PROMPTS[1])}", generated / f"002_{slug(PROMPTS[1])}"
    for seed in (12, 13):
        original = pixels(before / f"{seed}_original.png")
        assert np.abs(pixels(tmp_path / "none" / folder / f"{seed}_finetuned.png") - original).max() <= 1
        whole = pixels(tmp_path / "whole" / folder / f"{seed}_finetuned.png")
        assert np.abs(whole - pixels(before / f"{seed}_finetuned.png")).max() <= 1
        assert np.abs(whole - original).mean() > 1


def test_the_end_of_a_long_prompt_is_said_to_be_unread(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "a portrait of " + "a chef and " * 10 + "a judge"
    main([f"--run={run}", f"--prompts={json.dumps([prompt])}", "--images=1", f"--output={tmp_path / 'long'}"])
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 2  # it reads 30 words
    for line, model in zip(warned, ("original", "finetuned"), strict=True):
        assert line.endswith(f"of the {model} model does not read the end of a prompt: 'a chef and a judge'")


def test_without_its_judge_a_run_still_draws(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["model"]["judge"]["classifier"]["init_args"]["path"] = "no/such/classifier"
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    main([f"--run={copied}", "--prompts=a chef", "--images=2", f"--output={tmp_path / 'new'}"])
    assert "warning: the overview has no colors" in capsys.readouterr().err
    assert len(list((tmp_path / "new").rglob("*.png"))) == 5


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.png").write_text("precious")
    some, output = ['--prompts=["a chef"]'], [f"--output={tmp_path / 'new'}"]
    empty = tmp_path / "empty"
    (empty / "adapters").mkdir(parents=True)
    (empty / "config.yaml").write_text("name: empty\n")
    for arguments, said in (
        (["--prompts=[a]"], "--run"),
        ([f"--run={run}", *some, *output, "--sede=1"], "did you mean --seed?"),
        ([f"--run={run}", *some, *output, "--qqqqq=1"], "--help shows all settings"),
        ([f"--run={tmp_path}", *some, *output], "is not a run"),
        ([f"--run={empty}", *some, *output], "before it exported any"),
        ([f"--run={run}", *output], "no prompt was given"),
        ([f"--run={run}", *some, *output, "--step=7"], "--step must be one of 1, but got 7"),
        ([f"--run={run}", *some, *output, "--images=0"], "--images must be positive"),
        ([f"--run={run}", *some, *output, "--adapter=best"], "ema"),
        ([f"--run={run}", *some, f"--output={tmp_path / 'full'}"], "already exists"),
        ([f"--run={run}", *output, f"--file={tmp_path / 'none.txt'}"], "there is no such file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda arguments=arguments: main(arguments))
        told = [line for line in capsys.readouterr().err.splitlines() if line]
        assert stopped.value.code == 2 and len(told) == 1 and told[0].startswith("error: ") and said in told[0], told
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["precious.png"] and not (tmp_path / "new").exists()
