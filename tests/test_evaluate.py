"""Audits against the test of a finetuning, against themselves, and of images that others made."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from miniature import PORTRAITS
from PIL import Image
from safetensors.torch import load_file, save_file

from fairness_dft.audits.images import directory
from fairness_dft.audits.warnings import warn_of_what_is_not_read
from fairness_dft.cli.commands import run_main
from fairness_dft.evaluate import main
from fairness_dft.fit import main as fit
from fairness_dft.training.finished_run import FinishedRun

ROOT = PORTRAITS.parents[1]
QUICKSTART = f"--config={ROOT / 'experiments' / 'quickstart.yaml'}"
FEW = [QUICKSTART, "--data.init_args.test_prompts=2", "--data.init_args.test_images_per_prompt=4"]


def counts(results: Path) -> dict:
    """The number of images of each class, by judge, attribute and model."""
    bias = json.loads((results / "results.json").read_text())["bias"]
    return {
        (judge, name, model): (models[model]["counts"], models[model]["no_face"])
        for judge, seen in bias.items()
        for name, models in seen.items()
        for model in ("original", "ema")
        if models[model]
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
        found = json.loads((audit / "results.json").read_text())["kept"][measure]
        assert found == pytest.approx(models, abs=0.01, rel=0.01)  # of pictures in whole gray levels


def test_rows_of_the_table_are_the_results(audit: Path) -> None:
    content = json.loads((audit / "results.json").read_text())
    with (audit / "per_prompt.csv").open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    for judge, seen in content["bias"].items():
        for name, models in seen.items():
            for model in ("original", "ema"):
                for i, prompt in enumerate(content["run"]["test_prompts"]):
                    key = {"classifier": judge, "attribute": name, "model": model, "prompt": prompt}
                    found = [row for row in rows if key.items() <= row.items()]
                    assert [row["class"] for row in found] == models["classes"]
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


def test_settings_of_an_audit_do_not_change(run: Path, audit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_adapter = FinishedRun(str(run)).adapter()
    place = [f"--output={audit.parent}", f"--name={audit.name}"]
    same = f"--adapter={run_adapter}"
    changes = [
        ([], "adapter.pytorch_lora_weights.safetensors"),
        ([same, "--seed_everything=3"], "seed_everything 0, not 3"),
    ]
    changes += [([same, "--split=validation"], "split 'test', not 'validation'")]
    changes += [([same, "--model.attribute.target={man: 0.3, woman: 0.7}"], "model.attribute.target")]
    changes += [([same, "--data.init_args.test_images_per_prompt=6"], "test_images_per_prompt 4, not 6")]
    for more, odd in changes:
        assert odd in refused(capsys, [*FEW, *place, *more])
    assert "is not an audit" in refused(capsys, [*FEW, f"--output={audit.parents[1]}", f"--name={audit.parent.name}"])


def test_images_that_others_made_are_judged_alike(audit: Path, tmp_path: Path) -> None:
    content = json.loads((audit / "results.json").read_text())
    for model in ("original", "finetuned"):
        for prompt in content["run"]["test_prompts"]:
            shutil.copytree(audit / "images" / model / directory(prompt), tmp_path / "images" / model / prompt)
            (tmp_path / "images" / model / prompt / "prompt.txt").unlink()
    main([*FEW, f"--output={tmp_path}", "--name=whole", f"--images={audit / 'images'}"])
    main([*FEW, f"--output={tmp_path}", "--name=pair", f"--images={tmp_path / 'images'}"])
    shutil.copytree(tmp_path / "images" / "original", tmp_path / "one")
    for folder in (tmp_path / "one").iterdir():
        folder.rename(folder.with_name(folder.name.replace(" ", "_")))
    main([*FEW, f"--output={tmp_path}", "--name=single", f"--images={tmp_path / 'one'}"])
    order = sorted(range(2), key=lambda i: content["run"]["test_prompts"][i])
    expected = {
        key: ([rows[i] for i in order], [no_face[i] for i in order]) for key, (rows, no_face) in counts(audit).items()
    }
    assert counts(tmp_path / "pair") == counts(tmp_path / "whole") == expected
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
    assert content["bias"]["training"]["gender"]["ema"] is None
    printed = capsys.readouterr()
    assert "finetuned" not in printed.out and "base model" not in printed.out  # there is one model alone
    assert (
        "warning: with 2 images per prompt, even a fair model scores about 0.50 for the 2 classes of gender"
        in printed.err
    )
    assert "for the 2 classes of gender (maximum 1.00); use 48 or more to reduce this to 0.11" in printed.err


def test_a_finished_audit_is_not_overwritten_where_the_prompts_of_its_file_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a photo of a chef\n")
    arguments = [*FEW, f"--output={tmp_path}", "--name=own", f"--data.init_args.file={file}"]
    main(arguments)
    kept = (tmp_path / "own" / "results.json").read_bytes()
    file.write_text("a photo of a nurse\n")
    assert "is an audit with content" in refused(capsys, arguments)
    assert (tmp_path / "own" / "results.json").read_bytes() == kept


def images(folder: Path) -> list[dict[str, str]]:
    """The rows of per_image.csv."""
    with (folder / "per_image.csv").open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def test_images_of_the_table_are_those_that_were_counted(audit: Path) -> None:
    rows, content = images(audit), json.loads((audit / "results.json").read_text())
    assert len(rows) == 2 * 2 * 4 and all((audit / row["file"]).is_file() for row in rows)
    for classifier, seen in content["bias"].items():
        for name, result in seen.items():
            for model in ("original", "ema"):
                for prompt, counts in zip(content["run"]["test_prompts"], result[model]["counts"], strict=True):
                    mine = [row for row in rows if (row["model"], row["prompt"]) == (model, prompt)]
                    read = [", ".join(row[f"{classifier}.{part}"] for part in name.split("×")) for row in mine]
                    assert [read.count(label) for label in result["classes"]] == counts


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
    twice, several = tmp_path / "twice", tmp_path / "several"
    for name in ("a chef", "a_chef"):
        shutil.copytree(pair / "original" / "a chef", twice / name)
    several.mkdir()
    for name in ("a", "b"):
        save_file(state, several / f"{name}.safetensors")
    (tmp_path / "no_face" / "nobody").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (64, 64), (90 * i, 90, 90)).save(tmp_path / "no_face" / "nobody" / f"{i}.png")
    shutil.copytree(tmp_path / "no_face", tmp_path / "lonely")
    for i in range(2):
        (tmp_path / "lonely" / "nobody" / f"{i}.png").unlink()
    for more, said in (
        (
            [f"--images={tmp_path / 'no_face'}", "--name=faceless_audit"],
            "no face was detected in any image",
        ),
        ([f"--images={tmp_path / 'lonely'}"], "1 image per prompt cannot show a bias: give at least 2"),
        (["--adapter=nowhere"], "'nowhere' is not a safetensors file, a folder with safetensors files, or"),
        ([f"--adapter={tmp_path / 'text.safetensors'}"], "could not be read"),
        ([f"--adapter={other}", "--name=fit"], "does not fit the model"),
        (["--images=nowhere"], "--images: there is no folder 'nowhere'"),
        ([f"--images={empty}"], "has no images: it must hold a folder for each prompt"),
        (
            [f"--images={pair}"],
            "must have images of the same names for each prompt, from the same noise, but those of 'a chef'",
        ),
        ([f"--images={tmp_path / 'broken'}", "--name=broken_audit"], "0.png' cannot be read"),
        ([f"--images={tmp_path / 'sizes'}", "--name=sizes_audit"], "must all have the same size"),
        (
            [f"--images={pair}", f"--adapter={other}"],
            "nothing is drawn, so leave out --adapter",
        ),
        (["--split=best"], "--split"),
        ([f"--images={twice}"], "two folders of"),
        ([f"--adapter={several}"], "holds several LoRAs (a.safetensors, b.safetensors): choose one"),
        (["--adapter=owner/repository"], "or owner/repository or"),
        (["--ckpt_path=some.ckpt"], "reads no checkpoint: give --adapter"),
        (["--trainer.limit_test_batches=0"], "use --data.init_args.test_prompts"),
    ):
        assert said in refused(capsys, [*FEW, *place, *more]), said
    assert not (tmp_path / "fit" / "audit.json").exists()  # the name is free for the right adapter
    assert not (tmp_path / "sizes_audit").exists() or not list((tmp_path / "sizes_audit").glob("*.json"))
    assert not (tmp_path / "faceless_audit" / "results.json").exists()


def test_what_is_not_finished_may_be_judged_otherwise(run: Path, audit: Path, tmp_path: Path) -> None:
    shutil.copytree(audit, tmp_path / "mine")
    (tmp_path / "mine" / "results.json").unlink()
    more = [f"--adapter={FinishedRun(str(run)).adapter()}", "--data.init_args.test_images_per_prompt=6"]
    main([*FEW, f"--output={tmp_path}", "--name=mine", *more, "--model.attribute.target={man: 0.3, woman: 0.7}"])
    content = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert content["target"]["gender"] == {"man": 0.3, "woman": 0.7} and content["run"]["images_per_prompt"] == 6
    first = json.loads((audit / "results.json").read_text())["bias"]["training"]["gender"]["original"]["counts"]
    found = content["bias"]["training"]["gender"]["original"]
    assert all(now >= then for a, b in zip(found["counts"], first, strict=True) for now, then in zip(a, b, strict=True))
    assert found["images"] == 12 and found["distance"]
    report = (tmp_path / "mine" / "report.html").read_text(encoding="utf-8")
    assert "data/portraits/classifier_evaluation" in report  # the settings are in it


def test_several_concepts_and_joint_attributes(tmp_path: Path) -> None:
    prompts = {
        "occupation": {"concept": "occupation", "test": [{"subject": "chef", "text": "a chef"}]},
        "sport": {"concept": "sport", "test": [{"subject": "polo", "text": "a person playing polo"}]},
    }
    for name, content in prompts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = [str(tmp_path / f"{name}.json") for name in prompts]
    data = {"class_path": "fairness_dft.prompts.MixedPrompts", "init_args": {"files": files, "weights": [1, 1]}}
    data["init_args"]["test_images_per_prompt"] = 4
    gender_race = f"--config={ROOT / 'experiments' / 'gender_race.yaml'}"
    miniature = f"--config={ROOT / 'experiments' / 'parts' / 'portraits.yaml'}"
    (tmp_path / "data.yaml").write_text(json.dumps({"data": data}))
    own = [f"--config={tmp_path / 'data.yaml'}", f"--output={tmp_path}", "--name=both"]
    main([gender_race, miniature, *own])
    content = json.loads((tmp_path / "both" / "results.json").read_text())
    assert content["concepts"].keys() == {"occupation", "sport"}
    report = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    assert "Bias by concept" in report and "gender × race" in report and "woman, dark" in report


def test_a_model_that_changed_under_its_path_is_not_mixed_in(
    audit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(PORTRAITS / "pipeline", model)
    prompt = "a person " * 90
    (tmp_path / "prompts.txt").write_text(f"a chef\n{prompt}\n")
    few = [QUICKSTART, "--data.init_args.test_images_per_prompt=2", f"--output={tmp_path}", "--name=mine"]
    few += [f"--data.init_args.file={tmp_path / 'prompts.txt'}", f"--model.generator.init_args.path={model}"]
    main(few)
    assert "warning: the text encoder does not read the end of a prompt: 'a person" in capsys.readouterr().err
    content = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert list(content["run"]["truncated_text"]) == [prompt.strip()]
    (tmp_path / "mine" / "results.json").unlink()
    main(few)  # stopped before its end, it goes on
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: 0.9 * tensor for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert "is an audit with networks.generator" in refused(capsys, few)
    index = json.loads((model / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]}
    (model / "model_index.json").write_text(json.dumps(index))
    assert "is a StableDiffusionXLPipeline, but must be a StableDiffusionPipeline" in refused(
        capsys, [*few, "--name=xl"]
    )


def test_what_classifiers_do_not_read_or_call_otherwise_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def judge(**classes: tuple[str, ...]) -> SimpleNamespace:
        return SimpleNamespace(reads=lambda name: name in classes, classes=classes.get)

    others = {"independent": judge(gender=("woman", "man")), "third": judge(gender=("Male", "Female"))}
    bias = SimpleNamespace(attributes=("gender", "hair"), others=others)
    module = SimpleNamespace(judge=judge(gender=("man", "woman")), attribute=SimpleNamespace(names=("gender",)))
    warn_of_what_is_not_read(module, bias)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "warning: no classifier reads hair, so it is left out" and len(told) == 2
    assert "'third' has other classes of gender (Male, Female) than the training one (man, woman)" in told[1]


def test_images_of_prompts_that_name_attributes_tell_obedience(audit: Path, tmp_path: Path) -> None:
    content = json.loads((audit / "results.json").read_text())
    first, second = content["run"]["test_prompts"]
    named = {"concept": "named", "test": [{"subject": "x", "text": first.upper(), "names": {"gender": "woman"}}]}
    (tmp_path / "named.json").write_text(json.dumps(named))
    images = tmp_path / "images"
    shutil.copytree(audit / "images" / "original", images)
    for hidden in (".cache", "@eaDir"):
        (images / hidden).mkdir()
        (images / hidden / "thumbnail.png").write_bytes(b"no picture")
    arguments = [QUICKSTART, f"--output={tmp_path}", "--name=named", f"--images={images}"]
    main([*arguments, f"--data.init_args.file={tmp_path / 'named.json'}"])
    found = json.loads((tmp_path / "named" / "results.json").read_text())
    order = found["run"]["test_prompts"].index(first.upper())
    assert sorted(found["run"]["test_prompts"]) == sorted([first.upper(), second])
    assert found["concepts"].keys() == {"named", "images"}
    classes, gender = (found["bias"]["training"]["gender"][key] for key in ("classes", "original"))
    of = dict(zip(classes, gender["counts"][order], strict=True))
    obeyed = found["prompt_adherence"]["training"]["gender"]["original"]
    assert obeyed["images"] == sum(of.values()) and obeyed["share"] == pytest.approx(of["woman"] / sum(of.values()))
    assert gender["prompts_naming"] == 1 and gender["per_prompt"][order] is None
    assert gender["bias"] == gender["per_prompt"][1 - order]
    report = (tmp_path / "named" / "report.html").read_text(encoding="utf-8")
    assert "Do images show what their prompts name?" in report and "were made by others" in report


@pytest.mark.slow
def test_two_processes_see_what_one_sees(run: Path, audit: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fairness_dft.evaluate", *FEW, f"--output={tmp_path}", "--name=mine"]
    command += [f"--adapter={FinishedRun(str(run)).adapter()}", "--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert counts(tmp_path / "mine") == counts(audit)
    for ours, theirs in zip(*map(images, (tmp_path / "mine", audit)), strict=True):
        for column, value in theirs.items():
            if column.endswith("_probability") or ".box_" in column:
                assert float(ours[column] or -1) == pytest.approx(float(value or -1), abs=0.11), column
            else:
                assert ours[column] == value, column
    kept = [json.loads((folder / "results.json").read_text())["kept"] for folder in (tmp_path / "mine", audit)]
    assert {"clip_t", "clip_i", "fid_clip", "kid_clip"} <= kept[0].keys() == kept[1].keys()
    for measure, models in kept[0].items():
        assert models == pytest.approx(kept[1][measure], rel=1e-3, abs=1e-6)
