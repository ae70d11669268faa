"""Audits against the test of a finetuning, against themselves, and of images that others made."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from miniature import PORTRAITS
from PIL import Image
from safetensors.torch import load_file, save_file

from fairness_dft.cli import run_main
from fairness_dft.evaluate import main
from fairness_dft.finished_run import FinishedRun
from fairness_dft.fit import main as fit
from fairness_dft.image_store import directory

ROOT = PORTRAITS.parents[1]
QUICKSTART = f"--config={ROOT / 'experiments' / 'quickstart.yaml'}"
FEW = [QUICKSTART, "--data.init_args.test_prompts=2", "--data.init_args.test_images_per_prompt=4"]


def counts(results: Path) -> dict:
    """The number of images of each class, by judge, attribute and model."""
    bias = json.loads((results / "results.json").read_text())["bias"]
    return {
        (judge, name, model): (models[model]["counts"], models[model]["faceless"])
        for judge, seen in bias.items()
        for name, models in seen.items()
        for model in ("original", "ema")
        if model in models
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter changes pictures, and what its own test says of it."""
    output = tmp_path_factory.mktemp("run")
    short = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.val_check_interval=1"]
    short += ["--trainer.enable_progress_bar=false", "--data.init_args.images_per_prompt=2", f"--output={output}"]
    fit([*FEW, *short, "--model.learning_rate=0.05", "--adapter_average.decay=0"])
    return output / "quickstart" / "version_0"


@pytest.fixture(scope="module")
def audit(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("audit")
    main([*FEW, f"--output={output}", "--name=mine", f"--adapter={FinishedRun(str(run)).adapter()}"])
    return output / "mine"


def test_an_audit_says_what_the_test_of_a_finetuning_says(run: Path, audit: Path) -> None:
    ours, theirs = counts(audit), counts(run)
    assert ours.keys() == theirs.keys() and len(ours) >= 12
    assert ours == theirs
    assert (
        ours["training", "gender", "original"] != ours["training", "gender", "ema"]
        or ours["training", "race", "original"] != ours["training", "race", "ema"]
    )
    for measure, models in json.loads((run / "results.json").read_text())["kept"].items():
        assert json.loads((audit / "results.json").read_text())["kept"][measure] == pytest.approx(models, abs=0.01)


def test_rows_of_the_table_are_the_results(audit: Path) -> None:
    content = json.loads((audit / "results.json").read_text())
    with (audit / "per_prompt.csv").open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    for judge, seen in content["bias"].items():
        for name, models in seen.items():
            for model in ("original", "ema"):
                for i, prompt in enumerate(content["run"]["test_prompts"]):
                    key = {"judge": judge, "attribute": name, "model": model, "prompt": prompt}
                    found = [row for row in rows if key.items() <= row.items()]
                    assert [row["class"] for row in found] == models[model]["classes"]
                    assert [int(row["images"]) for row in found] == models[model]["counts"][i]
                    assert {float(row["bias"]) for row in found} == {models[model]["per_prompt"][i]}
                    assert sum(float(row["frequency"]) for row in found) == pytest.approx(1)
    assert {row["concept"] for row in rows} == {"occupation"}


def test_what_was_drawn_is_not_drawn_again(run: Path, audit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(audit, folder)
    pictures = sorted((folder / "images").rglob("*.png"))
    assert len(pictures) == 2 * 2 * 4
    before = {file: file.read_bytes() for file in pictures}
    Image.new("RGB", (64, 64)).save(pictures[0])  # what is there is believed
    for file in pictures[1::3]:
        file.unlink()
    (folder / "results.json").unlink()
    main([*FEW, f"--output={tmp_path}", "--name=mine", f"--adapter={FinishedRun(str(run)).adapter()}"])
    assert sorted((folder / "images").rglob("*.png")) == pictures
    assert [file for file in pictures if file.read_bytes() != before[file]] == pictures[:1]
    assert (folder / "results.json").is_file()


def test_settings_of_an_audit_do_not_change(audit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = [f"--output={audit.parent}", f"--name={audit.name}"]
    adapter = json.loads((audit / "audit.json").read_text())["adapter"]
    assert list(adapter) == ["pytorch_lora_weights.safetensors"]
    for more, odd in (([], "adapter"), (["--seed_everything=3"], "seed_everything"), (["--split=validation"], "split")):
        line = refused(capsys, [*FEW, *place, *more])
        assert "is an audit with another setting of" in line and (odd in line or not more)
    assert "no audit" in refused(capsys, [*FEW, f"--output={audit.parents[1]}", f"--name={audit.parent.name}"])


def test_images_that_others_made_are_judged_alike(audit: Path, tmp_path: Path) -> None:
    content = json.loads((audit / "results.json").read_text())
    for model in ("original", "finetuned"):
        for prompt in content["run"]["test_prompts"]:
            shutil.copytree(audit / "images" / model / directory(prompt), tmp_path / "images" / model / prompt)
    main([*FEW, f"--output={tmp_path}", "--name=pair", f"--images={tmp_path / 'images'}"])
    shutil.copytree(tmp_path / "images" / "original", tmp_path / "one")
    for folder in (tmp_path / "one").iterdir():
        folder.rename(folder.with_name(folder.name.replace(" ", "_")))
    main([*FEW, f"--output={tmp_path}", "--name=single", f"--images={tmp_path / 'one'}"])
    order = sorted(range(2), key=lambda i: content["run"]["test_prompts"][i])
    expected = {
        key: ([rows[i] for i in order], [faceless[i] for i in order]) for key, (rows, faceless) in counts(audit).items()
    }
    assert counts(tmp_path / "pair") == expected
    single = counts(tmp_path / "single")
    assert single == {key: value for key, value in expected.items() if key[2] == "original"}
    assert not (tmp_path / "single" / "images").exists()
    found = json.loads((tmp_path / "single" / "results.json").read_text())
    assert sorted(found["run"]["test_prompts"]) == sorted(content["run"]["test_prompts"])


def test_other_prompts_without_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [QUICKSTART, "--data.init_args.validation_prompts=3", "--data.init_args.test_images_per_prompt=2"]
    main([*few, f"--output={tmp_path}", "--name=v", "--split=validation", "--keep_images=false"])
    content = json.loads((tmp_path / "v" / "results.json").read_text())
    prompts = json.loads((ROOT / "data" / "prompts" / "occupations.json").read_text())["validation"][:3]
    assert [f"A photo of the face of a {name}, a person" for name in prompts] == [
        text.replace(" an ", " a ") for text in content["run"]["test_prompts"]
    ]
    assert not (tmp_path / "v" / "images").exists()
    assert "ema" not in content["bias"]["training"]["gender"]
    printed = capsys.readouterr()
    assert (
        "–" in printed.out and "warning: of 2 images a prompt, a perfectly fair model would score 0.50" in printed.err
    )


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: main(arguments))
    told = [
        line for line in capsys.readouterr().err.splitlines() if line and not line.startswith(("Seed set", "warning"))
    ]
    assert stopped.value.code == 2 and len(told) == 1 and told[0].startswith("error: "), told
    return told[0]


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, empty = [f"--output={tmp_path}", "--name=new"], tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "text.safetensors").write_text("no tensors")
    other = tmp_path / "other"
    other.mkdir()
    state = load_file(FinishedRun(str(run)).adapter() / "pytorch_lora_weights.safetensors")
    save_file({key: torch.zeros(3, 7) for key in state}, other / "pytorch_lora_weights.safetensors")
    pair = tmp_path / "pair"
    for model, count in (("original", 2), ("finetuned", 1)):
        (pair / model / "a chef").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (64, 64)).save(pair / model / "a chef" / f"{i}.png")
    for name in ("broken", "sizes"):
        (tmp_path / name / "a chef").mkdir(parents=True)
        for i, size in enumerate((64, 32)):
            Image.new("RGB", (size, size)).save(tmp_path / name / "a chef" / f"{i}.png")
    (tmp_path / "broken" / "a chef" / "0.png").write_bytes(b"no picture")
    for more, said in (
        (["--adapter=nowhere"], "'nowhere' is no safetensors file, nor a folder with any"),
        ([f"--adapter={tmp_path / 'text.safetensors'}"], "could not be read"),
        ([f"--adapter={other}", "--name=fit"], "does not fit the model"),
        (["--images=nowhere"], "--images: there is no folder 'nowhere'"),
        ([f"--images={empty}"], "has no pictures: it must hold a folder for each prompt"),
        ([f"--images={pair}"], "before and after must have as many pictures of each prompt, but 'a chef' has 2 and 1"),
        ([f"--images={tmp_path / 'broken'}", "--name=broken_audit"], "0.png' cannot be read"),
        ([f"--images={tmp_path / 'sizes'}", "--name=sizes_audit"], "must all have the same size"),
        ([f"--images={pair}", f"--adapter={other}"], "goes with one process and without --adapter"),
        (["--split=best"], "--split"),
    ):
        assert said in refused(capsys, [*FEW, *place, *more]), said


@pytest.mark.slow
def test_two_processes_see_what_one_sees(run: Path, audit: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fairness_dft.evaluate", *FEW, f"--output={tmp_path}", "--name=mine"]
    command += [f"--adapter={FinishedRun(str(run)).adapter()}", "--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert counts(tmp_path / "mine") == counts(audit)
