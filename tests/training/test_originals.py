"""What is remembered of the frozen model's images, from one run to the next."""

import os
from multiprocessing import get_context
from pathlib import Path

import onnx
import pytest
import torch
from miniature import PORTRAITS, finetuning, judge, prompts, trainer
from torch.testing import assert_close

from fairness_dft.classifiers.judge import Verdict
from fairness_dft.faces.detectors import FaceDetector, InsightFace
from fairness_dft.faces.finders import DetectedFaces
from fairness_dft.features import Clip
from fairness_dft.networks.preprocessing import Preprocessing
from fairness_dft.training.originals import Original, OriginalStore, content_of

SEEDS, STEPS, CPU = [3, 1, 2**60], 4, torch.device("cpu")


def original(images: int = 3, seed: int = 0, faces: bool = False) -> Original:
    random = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(images, *shape, generator=random)

    logits = {"gender": values(2), "race": values(4)}
    verdict = Verdict(logits, values() > 0, values(4), values(5, 2) if faces else None)
    return Original(verdict, [values(8), values(6)], values(7) if faces else None)


def assert_same(found: Original | None, expected: Original) -> None:
    assert found is not None
    for (name, values), (other, wanted) in zip(found.tensors().items(), expected.tensors().items(), strict=True):
        assert name == other
        assert_close(values, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("faces", [False, True])
def test_what_is_written_is_read(tmp_path: Path, faces: bool) -> None:
    store, written = OriginalStore(tmp_path / "deep" / "er", "model"), original(faces=faces)
    assert store.read("a chef", SEEDS, STEPS, CPU) is None
    store.write("a chef", SEEDS, STEPS, written)
    assert_same(store.read("a chef", SEEDS, STEPS, CPU), written)
    # Image by image: in another order, beside others, on another number of processes.
    one = store.read("a chef", SEEDS[::-1][:1], STEPS, CPU)
    assert_close(one.features[0], written.features[0][2:])
    assert_close(one.verdict.boxes, written.verdict.boxes[2:])


def test_another_prompt_seed_number_of_steps_or_model_is_another_original(tmp_path: Path) -> None:
    store = OriginalStore(tmp_path, "model")
    store.write("a chef", SEEDS, STEPS, original())
    assert store.read("a nurse", SEEDS, STEPS, CPU) is None
    assert store.read("a chef", [*SEEDS, 4], STEPS, CPU) is None
    assert store.read("a chef", SEEDS, STEPS + 1, CPU) is None
    assert OriginalStore(tmp_path, "other model").read("a chef", SEEDS, STEPS, CPU) is None


@pytest.mark.parametrize("size", [0, 7, 100])
def test_a_broken_file_is_as_none_and_is_written_again(tmp_path: Path, size: int) -> None:
    store = OriginalStore(tmp_path, "model")
    store.write("a chef", SEEDS, STEPS, original())
    file = store.files("a chef", SEEDS, STEPS)[1]
    file.write_bytes(file.read_bytes()[:size])
    assert store.read("a chef", SEEDS, STEPS, CPU) is None
    store.write("a chef", SEEDS, STEPS, original(seed=1))
    assert_same(store.read("a chef", SEEDS, STEPS, CPU), original(seed=1))


def keep_writing(folder: Path) -> None:
    store = OriginalStore(folder, "model")
    for _ in range(40):
        store.write("a chef", SEEDS, STEPS, original())


def test_processes_that_write_the_same_do_not_disturb_each_other(tmp_path: Path) -> None:
    store = OriginalStore(tmp_path, "model")
    store.write("a chef", SEEDS, STEPS, original())
    writers = [get_context("fork").Process(target=keep_writing, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert_same(store.read("a chef", SEEDS, STEPS, CPU), original())  # never half a file
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("blocked", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path: Path, blocked: str) -> None:
    (tmp_path / "file").touch()
    module = finetuning(originals_folder=str(tmp_path / blocked))
    with pytest.raises(ValueError, match="--model.originals_folder: cannot write .*file") as raised:
        module.configure_model()
    assert "\n" not in str(raised.value)
    assert not hasattr(module.generator, "unet")


def test_content_is_that_of_weights_and_settings() -> None:
    def network() -> Clip:
        clip = Clip(str(PORTRAITS / "clip"))
        clip.load()
        return clip

    first, second = network(), network()
    assert content_of(first) == content_of(second)
    with torch.no_grad():
        next(second.network.vision_model.parameters()).view(-1)[5] += 1e-3
    changed = {content_of(first), content_of(second)}
    first.preprocessing = Preprocessing(first.preprocessing.size, [0.4] * 3, [0.5] * 3)
    changed.add(content_of(first))
    first.preprocessing.mode = "bicubic"
    assert len(changed | {content_of(first)}) == 4


def test_content_is_that_of_the_judge_and_its_detector(tmp_path: Path) -> None:
    def content(margin: float | None = None, folder: Path | None = None) -> str:
        looking = judge()
        if margin is not None:
            looking.faces.margin = margin
        if folder is not None:
            looking.faces.detectors = [InsightFace(str(folder), (64, 64))]
        looking.load()
        return content_of(looking)

    assert content() == content() != content(margin=0.25)
    [file] = (PORTRAITS / "detector").glob("*.onnx")
    (tmp_path / file.name).write_bytes(file.read_bytes())
    before = content(folder=tmp_path)
    network = onnx.load(file)
    network.doc_string = "another one"
    onnx.save(network, tmp_path / file.name)
    assert content(folder=tmp_path) != before


class UsersFaces(DetectedFaces):
    """A finder that a user derived, which keeps a setting to itself."""

    def __init__(self, *arguments, threshold: float = 0.1, **settings) -> None:
        super().__init__(*arguments, **settings)
        self._threshold = threshold


class UsersDetector(FaceDetector):
    """A detector of a user's own."""

    def __init__(self, least: int) -> None:
        self.least = least

    def load(self) -> None:
        pass

    def detect(self, picture):
        raise NotImplementedError


def test_content_is_that_of_what_users_derived() -> None:
    def finder(least: int = 1, kind=UsersFaces, **settings) -> DetectedFaces:
        return kind([UsersDetector(least)], size=32, **settings)

    same, others = finder(), [finder(threshold=0.9), finder(margin=0.7), finder(2), finder(kind=DetectedFaces)]
    contents = [content_of(each) for each in (same, *others)]
    assert content_of(finder()) == contents[0] and len(set(contents)) == 5


def test_prepare_removes_temporary_files_of_dead_writers(tmp_path: Path) -> None:
    store = OriginalStore(tmp_path, "model")
    store.write("a chef", SEEDS, STEPS, original())
    old, new = (tmp_path / "ab" / f".{name}.safetensors" for name in ("old", "new"))
    old.parent.mkdir(exist_ok=True)
    for draft in (old, new):
        draft.touch()
    os.utime(old, (0, 0))
    store.check()
    assert old.exists() and new.exists()  # a check only looks
    store.prepare()
    assert not old.exists() and new.exists()
    assert_same(store.read("a chef", SEEDS, STEPS, CPU), original())


def test_check_leaves_no_folder_behind(tmp_path: Path) -> None:
    OriginalStore(tmp_path / "new" / "folder", "model").check()
    assert not list(tmp_path.iterdir())
    OriginalStore(tmp_path / "new" / "folder", "model").prepare()
    assert (tmp_path / "new" / "folder").is_dir()


@pytest.mark.slow
def test_a_second_run_samples_no_original_and_trains_the_same(tmp_path: Path, monkeypatch) -> None:
    def train(folder: str) -> tuple[dict[str, torch.Tensor], int]:
        looked: list[int] = []
        module = finetuning(originals_folder=str(tmp_path / folder))
        look = module.look_at_original
        monkeypatch.setattr(module, "look_at_original", lambda *inputs: looked.append(1) or look(*inputs))
        trainer(tmp_path, max_steps=2).fit(module, prompts(noise_pool=2, images_per_prompt=4))
        return module.adapter.state_dict("trained"), len(looked)

    first, again = train("kept"), train("kept")
    assert first[1] == 2 and again[1] == 0
    for name, values in first[0].items():
        assert_close(again[0][name], values, rtol=0, atol=0)
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == 8
    assert max(file.stat().st_size for file in (tmp_path / "kept").rglob("*.safetensors")) < 8192
