"""The diagnosis of gradients, against plain automatic differentiation and by hand."""

import copy
import csv
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lora import EXPORTED, load, randomize
from miniature import PORTRAITS
from PIL import Image
from tiny import build_tiny_pipeline
from torch.testing import assert_close

from fairness_dft.diagnose import Diagnosis, chosen_prompt, main, steps_table
from fairness_dft.prompts.files import Prompt
from fairness_dft.sampling.diagnosis import PATHS, GradientStatistics, clipped, flatten, passes, step_gradients
from fairness_dft.sampling.gradients import GradientPath
from fairness_dft.sampling.sampler import Sampler

ROOT = PORTRAITS.parents[1]
MINIATURE = [
    f"--config={ROOT / 'experiments' / 'gender.yaml'}",
    f"--config={ROOT / 'experiments/parts/portraits.yaml'}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


def final_latents(model, noise: torch.Tensor, steps: int, coupled: bool) -> torch.Tensor:
    """z_0 with the whole graph, or with one in which the steps are detached from each other."""
    embeddings = model.encode(["a chef", ""])
    conditioning, empty = (row[None].expand(len(noise), -1, -1) for row in embeddings)
    scheduler = copy.deepcopy(model.scheduler)
    scheduler.set_timesteps(steps)
    latents = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep)
        prediction = model.guided(seen if coupled else seen.detach(), timestep, conditioning, empty, 3.0)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("kind", ["text_encoder", "unet"])
def test_the_parts_of_all_steps_are_the_whole_gradient(folder: Path, kind: str) -> None:
    model, adapter = load(folder), EXPORTED[kind]()
    adapter.attach(model)
    randomize(adapter)
    adapter.switch("trained")
    torch.manual_seed(0)
    noise, direction = torch.randn(2, 2, 4, 8, 8)
    found = list(step_gradients(model, adapter, "a chef", noise, direction, 4, 3.0))
    parameters = adapter.parameters()
    for coupled, parts in ((True, [s.exact for s in found]), (False, [s.coefficient * s.bare for s in found])):
        expected = torch.autograd.grad(
            final_latents(model, noise, 4, coupled), parameters, direction, allow_unused=True
        )
        whole = flatten(expected, parameters)
        assert (sum(parts) - whole).norm() < 1e-4 * whole.norm()
    last = found[-1]
    assert (last.exact - last.coefficient * last.bare).norm() < 1e-4 * last.exact.norm()  # no later step
    assert (found[0].exact - found[0].coefficient * found[0].bare).norm() > 1e-3 * found[0].exact.norm()
    exact, detached, bare = found[0].norms()
    assert exact == pytest.approx(float(found[0].exact.norm())) and bare == pytest.approx(float(found[0].bare.norm()))
    assert detached == pytest.approx(abs(found[0].coefficient) * bare)
    assert [step.timestep for step in found] == sorted((step.timestep for step in found), reverse=True)


@pytest.mark.parametrize("name", [name for name in PATHS if name != "AlignProp"])
def test_a_gradient_costs_the_passes_that_are_told(folder: Path, name: str) -> None:
    model, adapter = load(folder), EXPORTED["text_encoder"]()
    adapter.attach(model)
    randomize(adapter)
    adapter.switch("trained")
    counted, guided = [0, 0], model.guided

    def count(*inputs):
        prediction = guided(*inputs)
        counted[0] += 1
        if prediction.requires_grad:
            prediction.register_hook(lambda gradient: counted.__setitem__(1, counted[1] + 1))
        return prediction

    model.guided = count
    sampler = Sampler(steps=5, guidance_scale=3.0, gradient=PATHS[name], checkpoint=False)
    sampler(model, "a chef", torch.randn(2, 4, 8, 8)).sum().backward()
    assert sum(counted) == passes(PATHS[name], 5)


def test_alignprop_costs_as_much_on_average() -> None:
    random = torch.Generator().manual_seed(0)
    carrying = [int(GradientPath.alignprop().select(5, random).sum()) for _ in range(2000)]
    assert 5 + np.mean(carrying) == pytest.approx(passes(GradientPath.alignprop(), 5), abs=0.15)


def test_statistics_tell_signal_from_noise() -> None:
    """Against what they stand for: the cosine of the means of independent sets, drawn many times."""
    torch.manual_seed(0)
    signal = torch.randn(40, dtype=torch.float64)
    signal *= 2 / signal.norm()
    draw = torch.randn(6000, 40, dtype=torch.float64) * 0.8 + signal  # |signal|² = 4, variance 40 · 0.64
    found = GradientStatistics.of(draw[:2000])
    assert found.shared == pytest.approx(4, rel=0.05) and found.square == pytest.approx(4 + 25.6, rel=0.05)
    assert found.relative_variance == pytest.approx(25.6 / 4, rel=0.1)
    assert found.norm == pytest.approx(draw.norm(dim=1).mean().item(), rel=0.02)
    assert found.deviation == pytest.approx(draw.norm(dim=1).std().item(), rel=0.1)
    for batches in (1, 4, 20):
        means = draw[: 6000 // (2 * batches) * 2 * batches].unflatten(0, (-1, 2, batches)).mean(2)
        products = (means[:, 0] * means[:, 1]).sum(1).mean() / means.square().sum(2).mean()
        assert found.alignment(batches) == pytest.approx(products.item(), abs=0.04)


def test_statistics_of_gradients_that_agree_and_that_do_not() -> None:
    same = GradientStatistics.of(torch.tensor([[300.0, 400.0]] * 3).half())  # whose products half precision lacks
    assert (same.norm, same.deviation, same.relative_variance, same.alignment()) == (500, 0, 0, 1)
    apart = GradientStatistics.of(torch.eye(3))
    assert apart.alignment(100) == 0 and apart.relative_variance == float("inf")
    assert GradientStatistics.of(torch.zeros(2, 3)).alignment() == 0


def test_clipped_gradients_keep_their_direction() -> None:
    gradients = torch.tensor([[0.0, 0.0], [3.0, 4.0], [30.0, 40.0]])
    assert_close(clipped(gradients), torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]]))


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("diagnoses")
    quick = ["--noises=2", "--batches=3", "--data.init_args.images_per_prompt=4", "--model.sampler.steps=2"]
    quick += ["--model.sampler.steps_max=2", "--trainer.enable_progress_bar=false"]
    main([*MINIATURE, f"--output={output}", *quick])
    return output / "gender"


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def test_batches_are_of_one_prompt_with_noise_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def see(trainer, module, batches):
        assert len(batches) == 5 and {batch.prompt.subject for batch in batches} == {"financial manager"}
        assert len({tuple(batch.seeds.tolist()) for batch in batches}) == 5
        raise Seen

    monkeypatch.setattr("fairness_dft.diagnose.compare_paths", see)
    with pytest.raises(Seen):
        main([*MINIATURE, f"--output={tmp_path}", "--batches=5", "--prompt=financial manager"])


def test_every_seed_and_batch_draws_by_itself() -> None:
    weight, drawn = torch.zeros(1, requires_grad=True), []

    def loss(batch: object, random: torch.Generator) -> torch.Tensor:
        drawn.append(tuple(torch.rand(2, generator=random).tolist()))
        return weight.sum()

    adapter = SimpleNamespace(parameters=lambda: [weight])
    for seed, batch in product(range(4), range(4)):
        Diagnosis.test_step(SimpleNamespace(seed=seed, loss=loss, adapter=adapter, gradients=[]), None, batch)
    assert len(set(drawn)) == 4**2


def test_every_seed_and_noise_has_its_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    directions = []
    monkeypatch.setattr("fairness_dft.diagnose.step_gradients", lambda *inputs: directions.append(inputs[4]) or [])
    generator = SimpleNamespace(noise=lambda seeds: torch.zeros(1, 4, 2, 2))
    adapter = SimpleNamespace(using=lambda name: nullcontext())
    for seed in range(4):
        module = SimpleNamespace(seed=seed, sampler=Sampler(steps=2), generator=generator, adapter=adapter)
        steps_table(module, "a chef", noises=4)
    assert len({tuple(direction.flatten().tolist()) for direction in directions}) == 4**2


def test_a_diagnosis_leaves_tables_and_pictures(diagnosed: Path) -> None:
    steps, paths = read(diagnosed / "steps.csv"), read(diagnosed / "paths.csv")
    assert [row["noise"] for row in steps] == ["0", "0", "1", "1"]
    for row in steps:
        assert float(row["detached"]) == pytest.approx(abs(float(row["coefficient"])) * float(row["bare"]))
    assert float(steps[1]["exact"]) == pytest.approx(float(steps[1]["detached"]), rel=1e-4)
    assert {row["path"] for row in paths} == {*PATHS, "naive, clipped"}
    by_path = {row["path"]: row for row in paths}
    assert float(by_path["DRaFT-2"]["norm"]) == pytest.approx(float(by_path["naive"]["norm"]), rel=1e-3)  # T is 2
    assert float(by_path["ReFL"]["norm"]) == pytest.approx(float(by_path["DRaFT-1"]["norm"]), rel=1e-3)
    for name in ("steps.png", "paths.png"):
        with Image.open(diagnosed / name) as picture:
            assert picture.size == (1050, 675) and np.asarray(picture.convert("L")).std() > 10


def test_the_prompt_is_the_first_or_one_by_text_or_subject_or_new() -> None:
    known = [Prompt("A photo of a chef", "chef", "occupation"), Prompt("A photo of a nurse", "nurse", "occupation")]
    assert chosen_prompt(known, None) == known[0]
    assert chosen_prompt(known, "nurse") == chosen_prompt(known, "A photo of a nurse") == known[1]
    assert chosen_prompt(known, "a wizard").text == "a wizard"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noises=1"], "--noises must be at least 2, but is 1"),
        (["--batches=0"], "--batches must be at least 2, but is 0"),
        (["--ckpt_path=x.ckpt"], "reads no checkpoint"),
        (["--trainer.devices=2"], "a diagnosis takes one device, but got 2"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        main([*MINIATURE, f"--output={tmp_path}", *arguments])
    assert "\n" not in str(raised.value)


def test_what_is_there_is_kept(diagnosed: Path) -> None:
    with pytest.raises(ValueError, match="already exists"):
        main([*MINIATURE, f"--output={diagnosed.parent}"])
