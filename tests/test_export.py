"""Exported folders, read by plain diffusers and compared with the finetuned model itself."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from fixed_counts import fixed_results
from miniature import PORTRAITS
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from fairness_dft.cli.commands import run_main
from fairness_dft.cli.finished_run import build
from fairness_dft.export import KOHYA_FILE, main
from fairness_dft.fit import main as fit
from fairness_dft.reports.adapter_card import distance_rows, limits
from fairness_dft.training.finished_run import FinishedRun

ROOT = PORTRAITS.parents[1]
KINDS = {
    "text_encoder": ("fairness_dft.adapters.TextEncoderLoRA", {"rank": 3, "alpha": 2.0, "strength": 2.5}),
    "both": ("fairness_dft.adapters.Combined", {}),
    "prefix": ("fairness_dft.adapters.PromptPrefix", {"length": 2}),
}
SCALE = {"text_encoder": 0.5, "both": 1.0, "prefix": 1.0}
PROMPT = "a portrait of a chef"


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run of no length, whose averaged adapter is then made to change pictures."""
    kind, output = request.param, tmp_path_factory.mktemp(request.param)
    path, settings = KINDS[kind]
    short = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.val_check_interval=1"]
    short += ["--trainer.enable_progress_bar=false", "--data.init_args.images_per_prompt=2"]
    short += ["--data.init_args.test_prompts=1", "--data.init_args.test_images_per_prompt=2"]
    short += [f"--model.adapter={json.dumps({'class_path': path, 'init_args': settings})}"]
    fit([f"--config={ROOT / 'experiments' / 'quickstart.yaml'}", f"--output={output}", *short])
    folder = output / "quickstart" / "version_0"
    torch.manual_seed(0)
    for file in FinishedRun(str(folder)).adapter().iterdir():
        state = {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
    return kind, folder


@pytest.fixture(scope="module")
def exported(run: tuple[str, Path]) -> tuple[str, Path, Path]:
    kind, folder = run
    output = folder.parent / "exported"
    main([f"--run={folder}", f"--output={output}", "--merge=true", f"--scale={SCALE[kind]}"])
    return kind, folder, output


def ours(kind: str, folder: Path, seed: int = 3) -> np.ndarray:
    """The finetuned model's own picture."""
    run = FinishedRun(str(folder))
    module = build(run, str(folder.parent)).model
    module.configure_model()
    module.adapter.load(run.adapter())
    module.adapter.rescale(SCALE[kind])
    with torch.no_grad(), module.adapter.using("ema"):
        image = module.evaluation_sampler(module.generator, PROMPT, module.generator.noise(torch.tensor([seed])))[0]
    return (image * 255).round().permute(1, 2, 0).numpy()


def theirs(pipeline: StableDiffusionPipeline, prompt: str, seed: int = 3) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    shape = (1, pipeline.unet.config.in_channels, 8, 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    image = pipeline(prompt, num_inference_steps=6, guidance_scale=1.75, latents=noise).images[0]
    return np.asarray(image).astype(float)


def test_plain_diffusers_draws_the_same(exported: tuple[str, Path, Path]) -> None:
    kind, folder, output = exported
    expected = ours(kind, folder)
    prompt = f"<fair> {PROMPT}" if kind == "prefix" else PROMPT
    base = theirs(StableDiffusionPipeline.from_pretrained(PORTRAITS / "pipeline"), PROMPT)
    assert np.abs(expected - base).mean() > 1
    ways = {"merged": StableDiffusionPipeline.from_pretrained(output / "merged")}
    for file in ("pytorch_lora_weights.safetensors", KOHYA_FILE) if kind != "prefix" else ():
        ways[file] = StableDiffusionPipeline.from_pretrained(PORTRAITS / "pipeline")
        ways[file].load_lora_weights(output, weight_name=file)
    if kind == "prefix":
        assert not (output / KOHYA_FILE).exists()
        ways["embeds"] = StableDiffusionPipeline.from_pretrained(PORTRAITS / "pipeline")
        ways["embeds"].load_textual_inversion(str(output), weight_name="learned_embeds.safetensors")
    for way, pipeline in ways.items():
        found = theirs(pipeline, prompt)
        assert np.abs(found - expected).max() <= 1, way


def test_merged_weights_are_the_base_and_the_product(exported: tuple[str, Path, Path]) -> None:
    kind, _, output = exported
    if kind == "prefix":
        return
    before = load_file(PORTRAITS / "pipeline" / "text_encoder" / "model.safetensors")
    after = load_file(output / "merged" / "text_encoder" / "model.safetensors")
    state = load_file(output / KOHYA_FILE)
    layers = {key.split(".")[0] for key in state if key.startswith("lora_te_")}
    assert len(layers) == 12
    names = {f"lora_te_{key.removesuffix('.weight').replace('.', '_')}": key for key in before}
    names |= {f"lora_te_text_model_{name.removeprefix('lora_te_')}": key for name, key in names.items()}
    for layer in layers:
        up, down, alpha = (state[f"{layer}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
        expected = before[names[layer]] + alpha / len(down) * up @ down
        assert_close(after[names[layer]], expected, rtol=1e-4, atol=1e-5)


def test_card_says_what_it_is_and_what_was_measured(exported: tuple[str, Path, Path]) -> None:
    kind, folder, output = exported
    card, results = (output / "README.md").read_text(encoding="utf-8"), FinishedRun(str(folder)).results()
    result = results.bias["independent"]["gender"]
    row = next(line for line in card.splitlines() if line.startswith("| gender | independent |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2].startswith(f"{result.original.bias:.2f} ±") and cells[5] == f"{result.ema.floor:.2f}"
    assert "perceived" in card and "2311.07604" in card and "man 0.50, woman 0.50" in card
    assert ("which is at scale 0.5" in card) == (kind == "text_encoder")
    assert ("load_textual_inversion" in card) == (kind == "prefix")
    assert ("kohya" in card) == (kind != "prefix")


def test_mistakes_are_one_line(
    run: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, folder = run
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    output = tmp_path / "new"
    mistakes = [
        ([f"--run={folder}"], "--output"),
        ([f"--run={folder}", f"--output={output}", "--push=me/fair"], "there is no Hugging Face token"),
        ([f"--run={folder}", f"--output={folder}"], "already exists"),
        ([f"--run={folder}", f"--output={output}", "--step=9"], "--step must be one of 1"),
    ]
    assert not output.exists()
    if kind == "prefix":
        mistakes.append(([f"--run={folder}", f"--output={output}", "--scale=0.5"], "no strength to change"))
    for arguments, said in mistakes:
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda arguments=arguments: main(arguments))
        told = [line for line in capsys.readouterr().err.splitlines() if line]
        assert stopped.value.code == 2 and len(told) == 1 and told[0].startswith("error: ") and said in told[0], told


def test_pushing_uploads_the_folder(run: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a hub that only takes notes."""
    uploaded = {}

    class Hub:
        def create_repo(self, name: str, private: bool) -> str:
            assert private
            if name in uploaded:
                raise OSError("409: it already exists")
            return f"https://hub/{name}"

        def upload_folder(self, folder_path: Path, repo_id: str) -> None:
            uploaded[repo_id] = sorted(file.name for file in folder_path.iterdir())

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "secret")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    kind, folder = run
    main([f"--run={folder}", f"--output={tmp_path / 'new'}", "--push=me/fair"])
    weights = ["learned_embeds.safetensors"] if kind == "prefix" else [KOHYA_FILE, "pytorch_lora_weights.safetensors"]
    assert uploaded == {"me/fair": sorted(["README.md", *weights])}
    with pytest.raises(ValueError, match="could not be uploaded .409: it already exists.*is complete"):
        main([f"--run={folder}", f"--output={tmp_path / 'again'}", "--push=me/fair"])
    assert (tmp_path / "again" / "README.md").is_file()


def test_a_card_says_whose_figures_it_shows(run: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = run
    copied = tmp_path / "run"
    shutil.copytree(folder, copied)
    (copied / "adapters" / "step_000001").rename(copied / "adapters" / "step_000007")
    (copied / "adapters" / "step_final").mkdir()  # is no step
    main([f"--run={copied}", f"--output={tmp_path / 'other'}", "--adapter=trained"])
    card = (tmp_path / "other" / "README.md").read_text(encoding="utf-8")
    assert "These are not the figures of this adapter, which is after 7 steps and not averaged" in card
    (copied / "results.json").unlink()
    main([f"--run={copied}", f"--output={tmp_path / 'untested'}"])
    assert "The run was not tested" in (tmp_path / "untested" / "README.md").read_text(encoding="utf-8")
    (copied / "results.json").write_text('{"version": 1}')
    with pytest.raises(
        ValueError, match="--run: .* is of version 1, but must be of version 4: measure the model again"
    ):
        main([f"--run={copied}", f"--output={tmp_path / 'old'}"])
    assert not (tmp_path / "old").exists()


def test_a_run_leaves_the_machine_and_the_prompts_that_it_was_made_with(run: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = run
    copied = tmp_path / "run"
    shutil.copytree(folder, copied)
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["trainer"] |= {"accelerator": "gpu", "devices": 8, "num_nodes": 2, "strategy": "ddp"}
    config["data"]["init_args"] |= {"file": "nowhere.txt", "train_subjects": "nowhere.txt"}
    config["output"] = "/no/such/place"
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    main([f"--run={copied}", f"--output={tmp_path / 'taken'}"])
    assert (tmp_path / "taken" / "README.md").is_file()


def test_a_card_says_whether_prompts_that_name_attributes_are_followed() -> None:
    adherence = fixed_results().prompt_adherence["independent"]["age"]
    shares = f"{adherence['original'].share:.2f} before and {adherence['ema'].share:.2f} after (age, independent"
    assert shares in limits(fixed_results())
    nameless = replace(fixed_results(), prompt_adherence={})
    assert "this was not measured here" in limits(None) and limits(nameless) == limits(None)


def test_a_card_tells_the_distance_from_unequal_targets() -> None:
    results = fixed_results()
    results.bias["training"].pop("gender×age"), results.bias.pop("independent")
    age = results.bias["training"]["age"]
    before, after = age.original.distance, age.ema.distance
    after = replace(
        after,
        total_variation_by_prompt=0.25,
        total_variation_by_prompt_low=0.2,
        total_variation_by_prompt_high=0.4,
        total_variation_by_prompt_floor=0.1,
    )
    before = replace(before, total_variation_by_prompt=0.3)
    results.bias["training"] = {
        "age": replace(age, original=replace(age.original, distance=before), ema=replace(age.ema, distance=after)),
        "gender": replace(results.bias["training"]["gender"], measure="bias"),
    }
    assert distance_rows(results) == ["| age | training | 0.30 | 0.25 | 0.20 – 0.40 | 0.10 |"]
