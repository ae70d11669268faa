"""The training step against the paper's algorithm written out, and what a fit may and may not change."""

import hashlib
from dataclasses import replace
from itertools import product
from math import comb
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from faces_world import build_arcface
from lightning import Callback
from miniature import PORTRAITS, finetuning, prompts, trainer
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from fairness_dft.adapters.combined import Combined
from fairness_dft.adapters.lora import TextEncoderLoRA, UNetLoRA
from fairness_dft.adapters.prompt_prefix import PromptPrefix
from fairness_dft.alignment.losses import Alignment
from fairness_dft.alignment.transport import expected_joint_targets, expected_targets
from fairness_dft.attributes import Attribute
from fairness_dft.classifiers.image_classifier import ImageClassifier
from fairness_dft.classifiers.judge import Judge, Verdict
from fairness_dft.faces.detectors import FaceDetector, InsightFace
from fairness_dft.faces.finders import DetectedFaces, WholeFrame
from fairness_dft.faces.realism import NETWORK, FaceEmbedding, FaceRealism
from fairness_dft.features import Clip
from fairness_dft.metrics.bias import class_bias
from fairness_dft.sampling.sampler import Sampler
from fairness_dft.training.module import FairFinetuning
from fairness_dft.training.originals import Original


class OneProcess:
    """What the module asks of a trainer."""

    world_size = 1


@pytest.fixture
def module(monkeypatch):
    made = finetuning(attribute=Attribute("gender", confidence=0.6, semantics_factor=0.3, face_gradient_factor=0.5))
    made.configure_model()
    monkeypatch.setattr(type(made), "trainer", OneProcess())
    return made


def record(monkeypatch, module, logged):
    """Collect what the module logs, outside of a trainer."""
    monkeypatch.setattr(
        module, "log", lambda name, value, **_: logged.update({name: float(torch.as_tensor(value).detach())})
    )
    monkeypatch.setattr(module, "log_dict", lambda values, **_: [module.log(*pair) for pair in values.items()])


def move(module, size):
    """Take the adapter away from its start, where x equals o and every distance is zero."""
    random = torch.Generator().manual_seed(3)
    state = module.adapter.state_dict("trained")
    moved = {key: value + size * torch.randn(value.shape, generator=random) for key, value in state.items()}
    module.adapter.load_state_dict(moved, "trained")


def first_batch(**settings):
    return next(iter(prompts(**settings).train_dataloader()))


@torch.no_grad()
def sample_both(module, batch):
    """Images of the trained and of the original model from the same noise."""
    noise = module.generator.noise(batch.seeds)
    with module.adapter.using("original"):
        original = module.sampler(module.generator, batch.prompt.text, noise)
    return module.sampler(module.generator, batch.prompt.text, noise), original


def test_training_step_is_the_algorithm_written_out(module, monkeypatch):
    move(module, 0.3)
    batch = first_batch(images_per_prompt=12)
    logged = {}
    record(monkeypatch, module, logged)
    monkeypatch.setattr(module, "randomness", lambda: torch.Generator().manual_seed(0))
    loss = module.training_step(batch, 0)

    images, original = sample_both(module, batch)
    with torch.no_grad():
        seen, before = module.judge(images), module.judge(original)
        logits = seen.logits["gender"]
        targets = expected_targets(logits.softmax(-1)[seen.has_face], [0.5, 0.5])
        align, chosen, place = 0.0, 0, 0
        semantics = 0.0
        for i in range(len(images)):
            target = None
            if seen.has_face[i]:
                if targets.confidence[place] >= 0.6:
                    target = targets.classes[place]
                    align += cross_entropy(logits[i], target).item()
                    chosen += 1
                place += 1
            distance = sum(1 - (net(images[i : i + 1]) * net(original[i : i + 1])).sum() for net in module.features)
            no_face = not (seen.has_face[i] and before.has_face[i])
            same = target is not None and target == before.classes("gender")[i]
            semantics += float(distance) * (1.0 if no_face or same else 0.3) / len(images)
    assert chosen > 0
    both = seen.has_face & before.has_face
    assert (seen.classes("gender") != before.classes("gender"))[both].any()  # or the weights would not be tested
    torch.testing.assert_close(logged["loss/alignment"], align / chosen, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logged["loss/semantics"], semantics, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.item(), align / chosen + 8 * semantics, rtol=1e-4, atol=1e-5)
    faces, women = int(seen.has_face.sum()), int(seen.classes("gender")[seen.has_face].sum())
    assert logged["batch/bias"] == pytest.approx(abs(2 * women - faces) / faces)
    chance = sum(abs(2 * heads - faces) * comb(faces, heads) for heads in range(faces + 1)) / 2**faces
    assert logged["batch/floor"] == pytest.approx(chance / faces)


class Waiting(FaceDetector):
    """Sees a picture only once the images have been embedded."""

    def __init__(self):
        self.detector, self.embedded = InsightFace(str(PORTRAITS / "detector"), size=(64, 64)), Event()

    def load(self):
        self.detector.load()

    def detect(self, picture):
        assert self.embedded.wait(timeout=60), "the images are embedded after their faces are found"
        return self.detector.detect(picture)


def test_faces_are_detected_while_images_are_embedded(module, monkeypatch):
    """A detector that waits for the embeddings finds what one that does not wait finds, of both models' images."""
    batch, waiting = first_batch(), Waiting()
    record(monkeypatch, module, {})
    monkeypatch.setattr(module, "randomness", lambda: torch.Generator().manual_seed(0))
    wanted = module.training_step(batch, 0)
    module.judge.faces.detectors = [waiting]
    waiting.load()
    module.features[-1].register_forward_hook(lambda *_: waiting.embedded.set())
    looks = []
    monkeypatch.setattr(
        module.judge.faces, "submit", lambda images: (waiting.embedded.clear(), looks.append(len(images)),
                                                     type(module.judge.faces).submit(module.judge.faces, images))[-1],
    )  # fmt: skip
    torch.testing.assert_close(module.training_step(batch, 0), wanted)
    assert looks == [6, 6]


def test_joint_training_step_is_the_algorithm_written_out(monkeypatch):
    """Gender and age at once, with a target, confidences and factors of their own for this prompt."""
    settings = dict(
        confidence={"gender": 0.55, "age": 0.7}, semantics_factor={"gender": 0.3, "age": 0.6}, face_gradient_factor=0.0
    )
    _, batch, *_ = prompts(images_per_prompt=16).train_dataloader()  # of the first, no image is to change in age alone
    targets = {batch.prompt.subject: {"age": {"young": 0.75, "old": 0.25}}, batch.prompt.concept: {"age": [0.0, 1.0]}}
    module = finetuning(attribute=Attribute(["gender", "age"], targets=targets, **settings))
    module.configure_model()
    monkeypatch.setattr(type(module), "trainer", OneProcess())
    move(module, 0.3)
    logged = {}
    record(monkeypatch, module, logged)
    monkeypatch.setattr(module, "randomness", lambda: torch.Generator().manual_seed(0))
    loss = module.training_step(batch, 0)

    images, original = sample_both(module, batch)
    with torch.no_grad():
        seen, before = module.judge(images), module.judge(original)
        pair = [seen.logits[name].softmax(-1)[seen.has_face] for name in ("gender", "age")]
        young = module.judge.classes("age").index("young")
        shares = [0.75, 0.25] if young == 0 else [0.25, 0.75]
        targets = expected_joint_targets(pair, torch.tensor([shares, shares]) / 2)
        align, counts, weights = {}, {}, torch.ones(len(images))
        for name, found in zip(("gender", "age"), targets, strict=True):
            place, losses = 0, []
            for i in range(len(images)):
                if not seen.has_face[i]:
                    continue
                target = None
                if found.confidence[place] >= settings["confidence"][name]:
                    target = found.classes[place]
                    losses.append(cross_entropy(seen.logits[name][i], target).item())
                if before.has_face[i] and (target is None or target != before.classes(name)[i]):
                    weights[i] = min(weights[i], settings["semantics_factor"][name])
                place += 1
            align[name], counts[name] = sum(losses) / len(losses), len(losses)
        distances = sum(1 - (net(images) * net(original)).sum(-1) for net in module.features)
        semantics = float((weights * distances).mean())
    assert min(counts.values()) > 0 and len(weights.unique()) == 3
    for name, value in align.items():
        torch.testing.assert_close(logged[f"loss/alignment_{name}"], value, rtol=1e-4, atol=1e-5)
        assert logged[f"faces/with_target_{name}"] == pytest.approx(counts[name] / len(images))
    torch.testing.assert_close(loss.item(), sum(align.values()) + 8 * semantics, rtol=1e-4, atol=1e-5)
    joint = 2 * seen.classes("gender")[seen.has_face] + seen.classes("age")[seen.has_face]
    frequencies = torch.bincount(joint, minlength=4) / len(joint)
    assert logged["batch/bias"] == pytest.approx(float(class_bias(frequencies)))


def test_a_step_on_a_prompt_that_names_pushes_every_face_there(module, monkeypatch):
    move(module, 0.3)
    batch = first_batch(images_per_prompt=8)
    batch = replace(batch, prompt=batch.prompt._replace(names=(("gender", "man"), ("age", "old"))))
    logged = {}
    record(monkeypatch, module, logged)
    monkeypatch.setattr(module, "randomness", lambda: torch.Generator().manual_seed(0))
    module.training_step(batch, 0)

    images, _ = sample_both(module, batch)
    with torch.no_grad():
        seen = module.judge(images)
    man = torch.full((8,), module.judge.classes("gender").index("man"))
    assert (seen.classes("gender") != man)[seen.has_face].any()  # or there would be nothing to push
    expected = cross_entropy(seen.logits["gender"][seen.has_face], man[seen.has_face])
    assert logged["loss/alignment"] == pytest.approx(float(expected), rel=1e-4)
    assert logged["faces/with_target"] == logged["faces/with_face"] > 0
    assert "batch/bias" not in logged


def test_a_broken_image_has_no_target_and_the_loss_tells_of_it(module, monkeypatch):
    logged = {}
    record(monkeypatch, module, logged)
    monkeypatch.setattr(module, "randomness", lambda: torch.Generator().manual_seed(0))
    module.judge.faces = WholeFrame()
    decode = module.generator.decode

    def broken(latents):
        images = decode(latents)
        images[0] = float("nan")
        return images

    monkeypatch.setattr(module.generator, "decode", broken)
    loss = module.training_step(first_batch(images_per_prompt=6), 0)
    assert loss.isnan() and logged["loss/alignment"] > 0 and logged["faces/with_target"] <= 5 / 6


def test_originals_are_remembered_where_their_noise_recurs_and_change_nothing(module, monkeypatch):
    record(monkeypatch, module, {})
    move(module, 0.3)
    monkeypatch.setattr(module, "randomness", lambda: torch.Generator().manual_seed(0))
    looked, look = [], module.look_at_original
    monkeypatch.setattr(module, "look_at_original", lambda *inputs: looked.append(1) or look(*inputs))
    first, second = list(prompts(noise_pool=1).train_dataloader())[:2]
    assert first.is_repeated and first.prompt != second.prompt
    losses = [module.training_step(batch, 0).item() for batch in (first, second, first)]
    assert losses[0] == losses[2] != losses[1] and len(looked) == 2
    module.training_step(replace(first, noise_set=None, seeds=first.seeds + 1), 0)
    module.training_step(replace(first, noise_set=None, seeds=first.seeds + 1), 0)
    assert len(looked) == 4 and len(module.originals.cached) == 2


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("adapter", [TextEncoderLoRA, UNetLoRA, PromptPrefix, Combined])
def test_originals_share_calls_without_a_graph_if_the_network_is_the_same(adapter, checkpoint, monkeypatch):
    """A step that samples them and one that remembers them have the same gradient."""
    monkeypatch.setattr(FairFinetuning, "trainer", OneProcess())
    module = finetuning(adapter=adapter(), sampler=Sampler(steps=3, guidance_scale=2.0, checkpoint=checkpoint))
    module.configure_model()
    record(monkeypatch, module, {})
    move(module, 0.1)
    monkeypatch.setattr(module, "randomness", lambda: torch.Generator().manual_seed(0))
    rows, denoise = [], module.generator.denoise
    monkeypatch.setattr(module.generator, "denoise", lambda z, *rest: rows.append(len(z)) or denoise(z, *rest))
    batch, gradients, sampled = next(iter(prompts(noise_pool=1).train_dataloader())), [], []
    for _ in range(2):
        rows.clear()
        loss = module.training_step(batch, 0)
        sampled.append(list(rows))
        gradients.append(torch.autograd.grad(loss, module.adapter.parameters()))
    images = len(batch.seeds)
    assert sampled[1] == [2 * images] * 3
    if adapter in (UNetLoRA, Combined):
        assert sampled[0] == [2 * images] * 6
    elif checkpoint:
        assert sampled[0] == [4 * images] * 3
    else:
        assert sampled[0] == [2 * images] * 6  # of the two, one call has a graph
    [together] = module.originals.cached.values()
    module.originals.cached.clear()
    noise, steps = module.generator.noise(batch.seeds), module.draw_steps(batch, module.randomness())
    apart = module.original(batch, noise, steps)
    for name, values in apart.tensors().items():
        torch.testing.assert_close(together.tensors()[name], values, rtol=1e-3, atol=1e-4)
    for cold, warm in zip(*gradients, strict=True):
        assert warm.any()
        torch.testing.assert_close(cold, warm, rtol=1e-4, atol=1e-6)


def test_a_batch_without_any_face_trains_on_semantics_alone(module, monkeypatch):
    logged = {}
    record(monkeypatch, module, logged)
    monkeypatch.setattr(module, "randomness", lambda: torch.Generator().manual_seed(0))
    judge = type(module.judge)
    submit = judge.submit

    def no_face(self, images):
        verdict = submit(self, images)()
        return lambda: Verdict(verdict.logits, torch.zeros_like(verdict.has_face), verdict.boxes)

    monkeypatch.setattr(judge, "submit", no_face)
    loss = module.training_step(first_batch(), 0)
    loss.backward()
    assert not {"loss/alignment", "batch/bias", "batch/floor"} & logged.keys()  # an average over nothing is not zero
    torch.testing.assert_close(loss.item(), 8 * logged["loss/semantics"])
    assert all(torch.isfinite(p.grad).all() for p in module.adapter.parameters())


@pytest.fixture(scope="module")
def realism_files(tmp_path_factory):
    """A random face network and a bank of 20 of its embeddings."""
    folder = tmp_path_factory.mktemp("realism")
    bank = torch.nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    network = build_arcface(folder / "arcface.onnx")
    digest = hashlib.sha256(network.read_bytes()).hexdigest()
    save_file({"embeddings": bank}, folder / "bank.safetensors", metadata={NETWORK: digest})
    return str(network), str(folder / "bank.safetensors")


def detecting(realism_files, **settings):
    """A module that crops the faces that a detector finds, and compares them with a bank."""
    network, bank = realism_files
    finder = DetectedFaces([InsightFace(str(PORTRAITS / "detector"), size=(64, 64))], size=64)
    judge = Judge(ImageClassifier(str(PORTRAITS / "classifier_training")), finder)
    realism = FaceRealism(bank, FaceEmbedding(network), weight=2.0, confidence=0.6)
    return finetuning(judge=judge, face_realism=realism, **settings)


def test_face_realism_is_the_loss_written_out(realism_files, monkeypatch):
    module = detecting(realism_files, attribute=Attribute("gender", confidence=0.55))
    module.configure_model()
    monkeypatch.setattr(type(module), "trainer", OneProcess())
    move(module, 0.3)
    batch, logged = first_batch(images_per_prompt=12), {}
    with torch.no_grad():  # half of the originals are not sure enough
        sure = module.judge(sample_both(module, batch)[1]).probabilities("gender").max(1).values
    module.face_realism.confidence = float(sure.median())
    record(monkeypatch, module, logged)
    monkeypatch.setattr(module, "randomness", lambda: torch.Generator().manual_seed(0))
    loss = module.training_step(batch, 0)
    expected = logged["loss/alignment"] + 8 * logged["loss/semantics"] + 2 * logged["loss/face"]
    torch.testing.assert_close(loss.item(), expected, rtol=1e-4, atol=1e-5)

    images, original = sample_both(module, batch)
    with torch.no_grad():
        seen, before = module.judge(images), module.judge(original)
        probabilities = seen.probabilities("gender")[seen.has_face]
        targets, place = expected_targets(probabilities, [0.5, 0.5]), 0
        bank, embedding = module.face_realism.bank, module.face_realism.embedding
        distances, kept, unsure = [], 0, 0
        for i in range(12):
            if not seen.has_face[i]:
                continue
            face = embedding(embedding.align(images[i : i + 1], seen.landmarks[i : i + 1]))[0]
            sure, former = before.probabilities("gender")[i].max(0)
            stays = before.has_face[i] and targets.confidence[place] >= 0.55 and targets.classes[place] == former
            unsure += bool(stays and sure < module.face_realism.confidence)
            if stays and sure >= module.face_realism.confidence:
                reference = embedding(embedding.align(original[i : i + 1], before.landmarks[i : i + 1]))[0]
                kept += 1
            else:
                reference = max(bank, key=lambda real, face=face: float(real @ face))
            distances.append(1 - float(face @ reference))
            place += 1
    assert 0 < kept < len(distances) - unsure and unsure  # all kinds of reference occur
    torch.testing.assert_close(logged["loss/face"], sum(distances) / len(distances), rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.adapter.parameters())


def test_an_original_without_a_face_is_no_reference(realism_files, monkeypatch):
    module = detecting(realism_files)
    module.configure_model()
    monkeypatch.setattr(type(module), "trainer", OneProcess())
    record(monkeypatch, module, {})
    batch = first_batch(images_per_prompt=2)
    images = sample_both(module, batch)[1]
    with torch.no_grad():
        verdict = module.judge(images)
        faces = module.embed_faces(images, verdict)
    assert verdict.has_face.all()
    classes = verdict.classes("gender")
    alignments = {"gender": Alignment(classes, torch.ones(2, dtype=torch.bool), 2)}  # both may stay as they are
    sure = verdict.probabilities("gender").amax(1)
    module.face_realism.confidence = float(sure.min())  # as sure as asked for is sure enough
    assert module.realism(images, verdict, Original(verdict, [], faces), alignments).item() == pytest.approx(
        0, abs=1e-5
    )
    blind = replace(verdict, has_face=torch.tensor([False, True]))
    nearest = float((faces[0] @ module.face_realism.bank.T).max())
    loss = module.realism(images, verdict, Original(blind, [], faces), alignments)
    assert loss.item() == pytest.approx((1 - nearest) / 2, abs=1e-5) and loss.item() > 1e-3


def test_a_fit_through_the_detector_moves_the_adapter(realism_files, tmp_path):
    module = detecting(realism_files, sampler=Sampler(steps=2, guidance_scale=2.0, decode_chunk=4))
    module.configure_model()
    start = module.adapter.state_dict("trained")
    trainer(tmp_path).fit(module, prompts())
    assert all(not torch.equal(value, start[key]) for key, value in module.adapter.state_dict("trained").items())


def test_no_face_for_the_detector_trains_on_semantics_alone(realism_files, monkeypatch):
    module = detecting(realism_files)
    module.configure_model()
    monkeypatch.setattr(type(module), "trainer", OneProcess())
    monkeypatch.setattr(DetectedFaces, "find", lambda self, picture: [])
    monkeypatch.setattr(module, "randomness", lambda: torch.Generator().manual_seed(0))
    logged = {}
    record(monkeypatch, module, logged)
    move(module, 0.1)
    loss = module.training_step(first_batch(), 0)
    loss.backward()
    assert not {"loss/alignment", "loss/face"} & logged.keys()
    torch.testing.assert_close(loss.item(), 8 * logged["loss/semantics"])
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in module.adapter.parameters())


def test_remembered_originals_keep_their_faces(realism_files, monkeypatch):
    """The same step with and without a memory of the original: the same losses and gradients."""
    module = detecting(realism_files)
    module.configure_model()
    monkeypatch.setattr(type(module), "trainer", OneProcess())
    monkeypatch.setattr(module, "randomness", lambda: torch.Generator().manual_seed(0))
    move(module, 0.3)
    batch, results = replace(first_batch(images_per_prompt=8), noise_set=0), []
    for _ in range(2):
        logged = {}
        record(monkeypatch, module, logged)
        gradients = torch.autograd.grad(module.training_step(batch, 0), module.adapter.parameters())
        results.append((logged, gradients))
    [original] = module.originals.cached.values()
    assert original.faces.shape == (8, 8) and not original.faces.requires_grad
    assert results[1][0] == pytest.approx(results[0][0]) and results[0][0]["loss/face"] > 0
    for again, first in zip(*(result[1] for result in results), strict=True):
        torch.testing.assert_close(again, first)


def test_face_realism_needs_landmarks(realism_files):
    module = detecting(realism_files)
    module.judge.faces = WholeFrame()
    with pytest.raises(ValueError, match="--model.face_realism needs landmarks: let fairness_dft.faces.DetectedFaces"):
        module.configure_model()


def test_checkpointed_step_has_the_gradient_of_the_plain_one(module, monkeypatch):
    record(monkeypatch, module, {})
    move(module, 0.1)
    gradients = []
    for checkpoint in (False, True):
        module.sampler = Sampler(steps=3, guidance_scale=2.0, checkpoint=checkpoint, decode_chunk=2)
        monkeypatch.setattr(module, "randomness", lambda: torch.Generator().manual_seed(0))
        loss = module.training_step(first_batch(), 0)
        gradients.append(torch.autograd.grad(loss, module.adapter.parameters(), allow_unused=True))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-3, atol=1e-6)


def test_fit_moves_the_adapter_and_nothing_else(tmp_path):
    module = finetuning()
    module.configure_model()
    adapter = {id(p) for name in ("trained", "ema") for p in module.adapter.tensors(name).values()}
    frozen = {name: p.clone() for name, p in module.named_parameters() if id(p) not in adapter}
    start = module.adapter.state_dict("trained")
    trainer(tmp_path).fit(module, prompts())
    for name, parameter in module.named_parameters():
        if name in frozen:
            assert parameter.grad is None and not parameter.requires_grad, name
            torch.testing.assert_close(parameter, frozen[name], rtol=0, atol=0)
    moved = [not torch.equal(v, start[k]) for k, v in module.adapter.state_dict("trained").items()]
    assert all(moved)


def test_two_fits_with_the_same_seed_agree(tmp_path):
    states = []
    for _ in range(2):
        module = finetuning()
        trainer(tmp_path).fit(module, prompts())
        states.append(module.adapter.state_dict("trained"))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=0)


def test_validations_do_not_change_what_is_trained(tmp_path):
    states, drawn = [], []
    for batches in (0, 1):
        module = finetuning()
        compare = module.compare
        module.compare = lambda batch, names, compare=compare: drawn.append(names) or compare(batch, names)
        trainer(tmp_path, limit_val_batches=batches, val_check_interval=1).fit(module, prompts())
        states.append(module.state_dict())
    assert drawn == [("original", "trained", "ema")] * 2  # one after each of two steps
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=0)


def test_every_seed_and_batch_draws_by_itself(module, monkeypatch):
    drawn = set()
    for module.seed, batch in product(range(4), range(4)):
        progress = SimpleNamespace(fit_loop=SimpleNamespace(total_batch_idx=batch))
        monkeypatch.setattr(type(module), "trainer", progress)
        first, again = (tuple(torch.rand(2, generator=module.randomness()).tolist()) for _ in range(2))
        assert first == again
        drawn.add(first)
    assert len(drawn) == 4**2


def test_every_seed_prompt_and_recurring_noise_has_its_number_of_steps(module):
    module.sampler, batch, drawn = Sampler(steps=1, steps_max=10**9), first_batch(noise_pool=1), set()
    for module.seed, index, noise_set in product(range(3), range(3), range(3)):
        recurring = replace(batch, index=index, noise_set=noise_set)
        first, again = (module.draw_steps(recurring, torch.Generator().manual_seed(state)) for state in range(2))
        assert first == again
        drawn.add(first)
    assert len(drawn) == 3**3


def test_evaluation_builds_no_graph(module):
    images = module.compare(first_batch(), ("original", "trained", "ema"))
    assert not any(pictures.requires_grad for pictures in images.values())
    torch.testing.assert_close(images["trained"], images["original"])  # B = 0: the adapter starts as nothing
    assert module.adapter.active == "trained"


def test_models_are_compared_at_the_same_number_of_steps(module):
    """A sampler that draws its number of steps must not draw it anew for each model."""
    module.evaluation_sampler = Sampler(steps=2, steps_max=9, guidance_scale=2.0)
    batch = first_batch(images_per_prompt=2)
    for _ in range(3):
        images = module.compare(batch, ("original", "trained", "ema"))
        torch.testing.assert_close(images["trained"], images["original"])  # an adapter at its start changes nothing
        torch.testing.assert_close(images["ema"], images["original"])


def test_state_holds_the_adapter_alone(module):
    state = module.state_dict()
    assert len(state) == 2 * len(module.adapter.parameters())
    changed = {key: torch.full_like(tensor, 0.5) for key, tensor in state.items()}
    module.load_state_dict(changed)
    torch.testing.assert_close(module.state_dict(), changed)


def test_unknown_attribute_is_refused_before_the_generator_loads():
    module = finetuning(attribute=Attribute("height"))
    with pytest.raises(ValueError, match="does not read 'height', only gender, race, age"):
        module.configure_model()
    assert not hasattr(module.generator, "unet")


def test_a_target_is_refused_before_the_generator_loads():
    module = finetuning(attribute=Attribute("race", target=[0.5, 0.5]))
    with pytest.raises(ValueError, match="must be 4 numbers, for light; tan; brown; dark, but got"):
        module.configure_model()
    assert not hasattr(module.generator, "unet")


def test_training_brings_the_batch_nearer_to_its_target(tmp_path):
    """Twelve steps on one prompt move the mean of p towards it: a gradient of the wrong sign would fail here."""
    module = finetuning(learning_rate=3e-3, semantics_weight=0.0)
    skewed = tmp_path / "skewed.txt"
    skewed.write_text("financial manager\n", encoding="utf-8")  # fifteen women in a hundred
    settings = {"images_per_prompt": 16, "train_subjects": str(skewed)}
    batch = first_batch(**settings)

    def towards_target():
        with torch.no_grad():
            noise = module.generator.noise(batch.seeds)
            seen = module.judge(module.sampler(module.generator, batch.prompt.text, noise))
        return seen.probabilities("gender")[seen.has_face].mean(0)

    module.configure_model()
    before = (towards_target() - 0.5).abs().max()
    assert before > 0.2
    trainer(tmp_path, max_steps=12).fit(module, prompts(**settings))
    assert (towards_target() - 0.5).abs().max() < before


@pytest.mark.parametrize(("schedule", "shares"), [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25])])
def test_learning_rate_follows_its_schedule(tmp_path, schedule, shares):
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = finetuning(learning_rate=1e-3, schedule=schedule, features=[])
    trainer(tmp_path, max_steps=4, callbacks=[Watch()]).fit(module, prompts(images_per_prompt=2))
    assert seen == pytest.approx([1e-3 * share for share in shares])


def test_clip_text_and_image_share_a_space(module):
    clip = next(network for network in module.features if isinstance(network, Clip))
    image = torch.rand(2, 3, 64, 64)
    assert clip(image).shape[1] == clip.embed_text(["a chef"]).shape[1]


def test_a_users_own_optimizer_keeps_its_rate(tmp_path):
    module = finetuning()
    module.configure_optimizers = lambda: torch.optim.SGD(module.adapter.parameters(), lr=0.125)
    fit = trainer(tmp_path, max_steps=1)
    fit.fit(module, prompts(images_per_prompt=2))
    assert [group["lr"] for group in fit.optimizers[0].param_groups] == [0.125]
