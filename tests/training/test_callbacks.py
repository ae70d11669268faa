"""Monitors against what they claim to measure."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from miniature import finetuning, judge, prompts, trainer
from PIL import Image

from fairness_dft.attributes import Attribute
from fairness_dft.classifiers.judge import Judge, Verdict
from fairness_dft.features import Clip
from fairness_dft.prompts.batches import PromptBatch
from fairness_dft.prompts.files import Prompt
from fairness_dft.training.bias_monitor import BiasMonitor
from fairness_dft.training.callbacks import AdapterAverage, AdapterCheckpoint, StepBar, Throughput
from fairness_dft.training.image_grid import ImageGrid
from fairness_dft.training.quality_monitor import QualityMonitor


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps, a validation and a test with every monitor."""
    folder = tmp_path_factory.mktemp("run")
    module, data = finetuning(learning_rate=3e-3), prompts()
    monitors = [
        AdapterAverage(0.5),
        BiasMonitor(independent_judge=judge("independent")),
        QualityMonitor(judge("independent")),
        ImageGrid(prompts=2, images=4),
        AdapterCheckpoint(),
        Throughput(),
    ]
    logger = TensorBoardLogger(folder, name="x")
    fit = trainer(
        folder, logger=logger, callbacks=monitors, limit_val_batches=1.0, val_check_interval=2,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    fit.fit(module, data)
    validation = dict(monitors[1].summaries)
    fit.test(module, data, verbose=False)
    return folder / "x" / "version_0", fit, module, data, monitors, validation


def test_ema_follows_by_its_recursion(tmp_path):
    module, decay = finetuning(), 0.7
    seen = []

    class Record(AdapterAverage):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            seen.append({name: pl_module.adapter.state_dict(name) for name in ("trained", "ema")})

    module.configure_model()
    expected = module.adapter.state_dict("trained")
    trainer(tmp_path, max_steps=3, callbacks=[Record(decay)]).fit(module, prompts(images_per_prompt=2))
    for states in seen:
        expected = {k: decay * v + (1 - decay) * states["trained"][k] for k, v in expected.items()}
        for key, value in expected.items():
            torch.testing.assert_close(states["ema"][key], value)


def test_ema_waits_for_the_optimizer_step(tmp_path):
    average = AdapterAverage(0.5)
    module = finetuning()
    fit = trainer(tmp_path, max_steps=1, accumulate_grad_batches=3, callbacks=[average])
    fit.fit(module, prompts(images_per_prompt=2))
    assert average.averaged_steps == 1


@pytest.mark.parametrize(("share", "start"), [(0.0, 0), (0.4, 3), (0.45, 3)])
def test_average_since_a_share_of_the_run_is_the_plain_mean_of_the_adapters_since(share, start):
    average, steps = AdapterAverage(0.9, share), np.random.default_rng(0).normal(size=8)
    value = 5.0
    for step, trained in enumerate(steps, start=1):
        kept = average.decay_at(step, max_steps=8)
        value = kept * value + (1 - kept) * trained
        assert value == pytest.approx(steps[start * (step > start) : step].mean())
    longer = AdapterAverage(0.9, share)  # ten steps is as far as 0.9 remembers
    assert longer.decay_at(start * 125 + 10, 1000) == longer.decay_at(start * 125 + 500, 1000) == 0.9


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_shares_out_of_range(share):
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        AdapterAverage(share)
    with pytest.raises(ValueError, match=f"start must be at least 0 and below 1, but got {share}"):
        AdapterAverage(start=share)
    AdapterAverage(start=0.5).check(10)
    AdapterAverage().check(-1)
    with pytest.raises(ValueError, match="start is a share of trainer.max_steps: give that too"):
        AdapterAverage(start=0.5).check(-1)


def test_bias_counts_what_the_judges_say(run):
    _, _, module, data, monitors, _ = run
    summaries = monitors[1].summaries
    assert {key[0] for key in summaries} == {"training", "independent"}
    assert {key[1] for key in summaries} == {"gender", "race", "age", "gender×race"}
    for name, other in (("training", module.judge), ("independent", monitors[1].others["independent"])):
        counts = np.zeros((2, 2))
        for batch in data.test_dataloader():
            images = module.compare(batch, ("ema",))["ema"]
            seen = other(images)
            for face, kind in zip(seen.has_face.tolist(), seen.classes("gender").tolist(), strict=True):
                counts[batch.index, kind] += face
        bias = np.mean([abs(a - b) / (a + b) for a, b in counts if a + b])
        summary = summaries[name, "gender", "ema"]
        assert summary.bias == pytest.approx(bias)
        assert summary.images == 8 and summary.no_face_images == 8 - counts.sum()


def test_quality_is_the_mean_cosine(run):
    _, _, module, data, monitors, _ = run
    clip, dino = module.features
    text, to_original, class_token, same = [], [], [], []
    for batch in data.test_dataloader():
        with torch.no_grad():
            images = module.compare(batch, ("original", "ema"))
            after, before = clip(images["ema"]), clip(images["original"])
            text += (after @ clip.embed_text([batch.prompt.text])[0]).tolist()
            to_original += (after * before).sum(-1).tolist()
            class_token += (dino(images["ema"]) * dino(images["original"])).sum(-1).tolist()
            read = [monitors[2].judge(images[model]).classes("subject") for model in ("ema", "original")]
            same += (read[0] == read[1]).tolist()
    values = monitors[2].values
    assert values["clip_t", "ema"] == pytest.approx(np.mean(text), abs=1e-5)
    assert values["clip_i", "ema"] == pytest.approx(np.mean(to_original), abs=1e-5)
    assert values["dino", "ema"] == pytest.approx(np.mean(class_token), abs=1e-5)
    assert values["subject_kept", "ema"] == pytest.approx(np.mean(same))


def test_two_networks_of_a_class_are_measured_apart():
    """One that is turned round must not cancel the other."""

    networks = [Clip("data/portraits/clip") for _ in range(2)]
    for network in networks:
        network.load()
    networks[1].register_forward_hook(lambda _, __, embeddings: -embeddings)
    monitor, images = QualityMonitor(), torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    module = SimpleNamespace(features=networks, device=torch.device("cpu"), log=lambda *_, **__: None)
    batch = SimpleNamespace(prompt=Prompt("a chef", "chef", "occupation"))
    monitor.start(None, module, "validation")
    monitor.see(module, {"original": images}, batch)
    monitor.finish(None, module, "validation")
    values = {measure: value for (measure, _), value in monitor.values.items()}
    assert values.keys() == {"clip_t", "clip_2_t"}
    assert values["clip_2_t"] == pytest.approx(-values["clip_t"]) and abs(values["clip_t"]) > 0.01


def test_adapters_are_saved_as_safetensors_that_match(run):
    from safetensors.torch import load_file

    folder, _, module, *_ = run
    for name in ("trained", "ema"):
        file = folder / "adapters" / "step_000002" / name / "pytorch_lora_weights.safetensors"
        for key, tensor in module.adapter.state_dict(name).items():
            torch.testing.assert_close(load_file(file)[key], tensor)


def test_grid_is_a_picture_and_tensorboard_has_the_curves(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, *_ = run
    with Image.open(folder / "before_after.png") as picture:
        assert picture.width > 300
    events = EventAccumulator(str(folder)).Reload()
    scalars = events.Tags()["scalars"]
    wanted = {"loss/total", "bias_gender/ema", "bias_gender/original", "bias_gender/floor", "kept/clip_t_ema",
              "bias_gender/ema_independent", "frequency_race/dark_ema", "speed/images_per_second",
              "batch/bias", "batch/floor"}  # fmt: skip
    assert wanted <= set(scalars)
    assert {name for name in scalars if "/" not in name} <= {"learning_rate", "epoch"}  # the rest is in groups
    assert {"before_after/validation", "before_after/test"} <= set(events.Tags()["images"])


def test_validation_sees_three_models_and_test_two(run):
    *_, monitors, validation = run
    assert {key[2] for key in validation} == {"original", "trained", "ema"}
    assert {key[2] for key in monitors[1].summaries} == {"original", "ema"}


def test_results_are_json(run):
    from fairness_dft.reports.build import Measured, build_results

    *_, monitors, _ = run
    target, measured = {"gender": {"man": 0.5, "woman": 0.5}}, Measured(monitors[1].summaries, monitors[2].values)
    counts = next(iter(monitors[1].summaries.values())).counts
    tested = [Prompt(f"{i}", f"{i}", "occupation") for i in range(len(counts))]
    content = build_results(["gender"], target, tested, measured)
    again = json.loads(json.dumps(content.as_dict(), allow_nan=False))
    assert again["bias"]["independent"]["gender"]["ema"]["floor"] > 0
    assert 0 <= again["bias"]["training"]["race"]["drift"] <= 1


def test_the_aligned_attribute_is_always_watched():
    reader = judge()
    reader.load()
    age, both = Attribute("age"), Attribute(["age", "gender"])
    assert BiasMonitor(attributes=()).read_by(reader, age) == ["age"]
    assert BiasMonitor(attributes=("gender", "smile", "age")).read_by(reader, age) == ["age", "gender"]
    watched = BiasMonitor(attributes=("smile×age", "race")).read_by(reader, both)
    assert watched == ["age×gender", "age", "gender", "race"]


def test_a_product_of_attributes_is_counted_by_its_pairs_of_classes(run):
    *_, monitors, _ = run
    for side in ("original", "ema"):
        summary = monitors[1].summaries["training", "gender×race", side]
        gender, race = (monitors[1].summaries["training", name, side] for name in ("gender", "race"))
        assert summary.classes[:2] == (
            f"{gender.classes[0]}, {race.classes[0]}",
            f"{gender.classes[0]}, {race.classes[1]}",
        )
        joint = np.array(summary.frequencies).reshape(2, 4)
        np.testing.assert_allclose(joint.sum(1), gender.frequencies)
        np.testing.assert_allclose(joint.sum(0), race.frequencies)


def test_a_lost_face_does_not_excuse_a_lost_subject(monkeypatch):
    def verdict(faces, subjects):
        logits = torch.nn.functional.one_hot(torch.tensor(subjects), 3).float()
        return Verdict({"subject": logits}, torch.tensor(faces), torch.zeros(4, 4))

    seen = {0.0: verdict([True] * 4, [0, 1, 2, 0]), 1.0: verdict([True, True, False, False], [0, 1, 1, 0])}
    monitor, module = QualityMonitor(judge()), finetuning(features=())
    monkeypatch.setattr(Judge, "forward", lambda self, images: seen[images.mean().item()])
    images = {"original": torch.zeros(4, 3, 8, 8), "ema": torch.ones(4, 3, 8, 8)}
    monitor.see(module, images, next(iter(prompts().test_dataloader())))
    assert monitor.metrics["subject_kept", "ema"].compute() == 3 / 4  # of two with a face both, of all four three


def test_judges_that_read_alike_are_counted_by_the_names_of_classes(monkeypatch):
    """Three judges, one of them with its classes in another order, one without the attribute."""
    module = finetuning(features=())
    module.configure_model()
    monkeypatch.setattr(module, "log", lambda *args, **settings: None)
    third, fourth = judge("independent"), judge("independent")
    monitor = BiasMonitor(attributes=(), independent_judge=judge("independent"), other_judges={"a": third, "b": fourth})
    monitor.load()
    seen = {
        "training": (("man", "woman"), [0, 0, 1, 1], [True, True, True, False]),
        "independent": (("man", "woman"), [0, 1, 1, 0], [True] * 4),
        "a": (("woman", "man"), [1, 1, 0, 0], [True] * 4),
        "b": (("young", "old"), [0, 0, 0, 0], [True] * 4),
    }
    for name, reader in monitor.judges(module):
        classes, verdicts, faces = seen[name]
        logits = {"gender": torch.nn.functional.one_hot(torch.tensor(verdicts), 2).float()}
        verdict = Verdict(logits, torch.tensor(faces), torch.zeros(4, 4))
        monkeypatch.setattr(reader, "forward", lambda images, verdict=verdict: verdict)
        monkeypatch.setattr(reader, "classes", lambda attribute, classes=classes: classes)
    monitor.start(SimpleNamespace(test_dataloaders=range(1)), module, "test")
    batch = PromptBatch(prompt=Prompt("a chef", "chef", "occupation"), index=0, seeds=torch.arange(4))
    monitor.see(module, {"original": torch.zeros(4, 3, 8, 8)}, batch)
    monitor.finish(None, module, "test")
    assert monitor.agreement == {
        ("training", "independent", "gender", "original"): pytest.approx(2 / 3),
        ("training", "a", "gender", "original"): 1,
        ("independent", "a", "gender", "original"): 0.5,
    }
    with pytest.raises(ValueError, match="must have names of their own, but got 'training'"):
        BiasMonitor(other_judges={"training": third})


def test_one_bar_counts_the_steps_of_the_whole_run_and_shows_the_bias(tmp_path, capsys):
    """Epochs of two batches, two batches a step, and a run that was resumed after its first step."""
    settings = dict(accumulate_grad_batches=2, enable_progress_bar=True)
    data = dict(train_prompts=2, images_per_prompt=2)
    first = trainer(tmp_path, max_steps=1, callbacks=[StepBar()], **settings)
    first.fit(finetuning(), prompts(**data))
    first.save_checkpoint(tmp_path / "first.ckpt")
    capsys.readouterr()
    bar = StepBar()
    rest = trainer(tmp_path, max_steps=3, callbacks=[bar, Throughput()], **settings)
    rest.fit(finetuning(), prompts(**data), ckpt_path=tmp_path / "first.ckpt")
    last = capsys.readouterr().out.rstrip().splitlines()[-1].split("\r")[-1]
    assert "Finetuning: 100%" in last and "3/3" in last
    assert (bar.train_progress_bar.initial, bar.train_progress_bar.n) == (1, 3)
    assert all(f" {name}=" in last for name in ("loss", "bias", "floor", "images/s")) and "v_num" not in last


def test_a_run_measured_in_epochs_keeps_lightnings_bar(tmp_path, capsys):
    epochs = dict(max_steps=-1, max_epochs=2, enable_progress_bar=True)
    trainer(tmp_path, callbacks=[StepBar()], **epochs).fit(finetuning(), prompts(train_prompts=2, images_per_prompt=2))
    last = capsys.readouterr().out.rstrip().splitlines()[-1].split("\r")[-1]
    assert "Epoch 1: 100%" in last and "2/2" in last


def test_what_prompts_name_is_watched_and_must_be_known():
    monitor, module = BiasMonitor(attributes=()), finetuning(features=())
    module.configure_model()
    named = Prompt("a", "a", "named", (("gender", "woman"), ("age", "old"), ("race", None)))
    monitor.watch_named([named])
    monitor.check_names([named], module.judge)
    assert monitor.attributes == ("gender", "age", "race")
    lady = Prompt("a lady", "a", "named", (("gender", "lady"),))
    with pytest.raises(ValueError, match="names gender 'lady', but a classifier knows only man, woman"):
        monitor.check_names([lady], module.judge)


def test_pairs_are_counted_by_class_before_and_after(monkeypatch):
    def verdict(genders, faces):
        logits = {"gender": torch.nn.functional.one_hot(torch.tensor(genders), 2).float()}
        return Verdict(logits, torch.tensor(faces), torch.zeros(4, 4))

    seen = {0.0: verdict([0, 1, 1, 1], [True, True, True, False]), 1.0: verdict([1, 1, 0, 0], [True] * 4)}
    monitor, module = BiasMonitor(attributes=()), finetuning(features=())
    module.configure_model()
    monkeypatch.setattr(Judge, "forward", lambda self, images: seen[images.mean().item()])
    monitor.count = 2
    images = {"original": torch.zeros(4, 3, 8, 8), "ema": torch.ones(4, 3, 8, 8)}
    monitor.see(module, images, PromptBatch(prompt=Prompt("a", "a", "b"), index=1, seeds=torch.arange(4)))
    pairs = monitor.paired["training", "gender"].compute()
    assert pairs[0].sum() == 0
    assert pairs[1].tolist() == [[0, 1, 0], [1, 1, 0], [1, 0, 0]]  # man, woman, no face


def test_each_of_several_faces_counts_where_that_is_asked_for(monkeypatch):
    def verdict(genders, faces):
        logits = {"gender": torch.nn.functional.one_hot(torch.tensor(genders), 2).float()}
        return Verdict(logits, torch.tensor(faces), torch.zeros(len(genders), 4))

    batch = PromptBatch(prompt=Prompt("two chefs", "chef", "occupation"), index=0, seeds=torch.arange(2))
    module = finetuning(features=())
    module.configure_model()
    monkeypatch.setattr(Judge, "forward", lambda self, images: verdict([0, 1], [True, True]))
    monkeypatch.setattr(Judge, "every", lambda self, images: verdict([0, 1, 1, 0], [True, True, True, False]))
    for every, counts, no_face in ((False, [1, 1], 0), (True, [1, 2], 1)):
        monitor = BiasMonitor(attributes=(), independent_judge=judge("independent"), every_face=every)
        monitor.load()
        monitor.count = 1
        monitor.see(module, {"original": torch.zeros(2, 3, 8, 8)}, batch)
        summary = monitor.metrics["independent", "gender", "original"].compute()
        assert [list(seen) for seen in summary.counts] == [counts] and summary.no_face_images == no_face
        assert bool(monitor.same) is not every
