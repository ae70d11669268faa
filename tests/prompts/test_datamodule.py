"""Check the noise seeds, the prompts of a run, and the order of the batches with ranks and resumes."""

from types import SimpleNamespace

import jsonargparse
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from prompt_samples import VALID, write
from torch.testing import assert_close

from fairness_dft.prompts.batches import PromptBatch, PromptLoader, TrainingPromptLoader, noise_seeds
from fairness_dft.prompts.datamodule import (
    PAPER_FILES,
    PAPER_WEIGHTS,
    DescriptorPrompts,
    MixedPrompts,
    OccupationPrompts,
    PromptModule,
    SportPrompts,
)
from fairness_dft.prompts.files import SPLITS, Prompt, PromptList

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's own, with torch 2.13
]


def test_the_mix_of_the_paper_has_equally_frequent_concepts():
    totals = [
        weight * len(PromptList.from_file(path).split("train"))
        for path, weight in zip(PAPER_FILES, PAPER_WEIGHTS, strict=True)
    ]
    assert PAPER_WEIGHTS == [1, 6, 20, 4]
    assert max(totals) < 1.1 * min(totals)


def test_seeds_differ_between_seeds_splits_epochs_and_positions():
    seeds = [
        noise_seeds(seed, split, epoch, position, 5)
        for seed in (0, 1)
        for split in SPLITS
        for epoch in range(4)
        for position in range(50)
    ]
    flat = torch.stack(seeds).flatten()
    assert flat.dtype == torch.int64 and flat.min() >= 0
    assert flat.unique().numel() == flat.numel()
    bits = (flat[:, None] >> torch.arange(63)) & 1
    assert_close(bits.double().mean(0), torch.full((63,), 0.5, dtype=torch.double), atol=0.05, rtol=0)


@pytest.mark.parametrize("count", [0, 1, 7, 24])
def test_seeds_do_not_depend_on_their_number(count):
    assert_close(noise_seeds(3, "test", 0, 8, 60)[:count], noise_seeds(3, "test", 0, 8, count), rtol=0, atol=0)


def test_seeds_stay_the_published_ones():
    """Published figures depend on these seeds; numpy guarantees that the stream of `SeedSequence` never changes."""
    published = [8832112248389967788, 5282727908911029382, 6766658395792649399]
    assert noise_seeds(0, "validation", 0, 2, 3).tolist() == published


def jobs(count):
    return [Prompt(f"a {number}", str(number), "job") for number in range(count)]


def content(batch):
    return batch.prompt.text, batch.index, batch.seeds.tolist()


def contents(loader):
    return [content(batch) for batch in loader]


def training(count=5, repeats=None, start=0, seed=0, images_per_prompt=4, **ranks):
    repeats = repeats or [1] * count
    return TrainingPromptLoader(repeats, start, jobs(count), seed=seed, images_per_prompt=images_per_prompt, **ranks)


@pytest.mark.parametrize("repeats", [[1], [1, 1], [1, 1, 1, 1, 1], [3, 1, 2], [20]])
def test_every_epoch_is_a_new_permutation_with_fresh_seeds(repeats):
    loader = training(len(repeats), repeats)
    epochs = [contents(loader) for _ in range(6)]
    for epoch in epochs:
        assert len(epoch) == len(loader) == sum(repeats)
        indices = [index for _, index, _ in epoch]
        assert [indices.count(index) for index in range(len(repeats))] == repeats
        assert all(text == f"a {index}" for text, index, _ in epoch)
    seeds = [seed for epoch in epochs for _, _, seeds in epoch for seed in seeds]
    assert len(set(seeds)) == len(seeds) == 6 * 4 * sum(repeats)
    if len(repeats) == 5:
        assert len({tuple(index for _, index, _ in epoch) for epoch in epochs}) > 3


def test_only_the_same_seed_gives_the_same_batches():
    assert contents(training()) == contents(training())
    assert contents(training()) != contents(training(seed=1))


@pytest.mark.parametrize("start", [0, 3, 5, 7, 10])
def test_a_later_start_is_the_rest_of_the_stream(start):
    whole = training()
    stream = [batch for _ in range(4) for batch in contents(whole)]
    assert contents(training(start=start)) == stream[start : start + 5]


def test_the_stream_continues_after_an_epoch_that_ends_early():
    loader = training()
    first = [content(batch) for batch, _ in zip(loader, range(2), strict=False)]
    expected = contents(training())
    # zip takes a third batch before the range ends
    assert first == expected[:2] and contents(loader)[:2] == expected[3:]


def test_a_noise_pool_gives_each_prompt_a_few_sets_of_seeds():
    loader = training(repeats=[1, 3, 1, 1, 2], noise_pool=3)
    batches = [batch for _ in range(30) for batch in loader]
    sets = {index: {tuple(b.seeds.tolist()) for b in batches if b.index == index} for index in range(5)}
    assert all(len(pool) == 3 for pool in sets.values()) and all(batch.is_repeated for batch in batches)
    assert len({seed for pool in sets.values() for seeds in pool for seed in seeds}) == 5 * 3 * 4
    assert {batch.index for batch in batches[:8]} == set(range(5))  # the order does not depend on the pool
    resumed = training(repeats=[1, 3, 1, 1, 2], noise_pool=3, start=11)
    assert contents(resumed) == [content(batch) for batch in batches[11:19]]
    assert not any(batch.is_repeated for batch in training())


def test_evaluation_has_one_order_and_its_own_seeds():
    loader = PromptLoader(jobs(5), "validation", 0, 4)
    assert contents(loader) == contents(loader)
    assert [index for _, index, _ in contents(loader)] == list(range(5))
    shorter = PromptLoader(jobs(5)[:2], "validation", 0, 4)
    assert contents(shorter) == contents(loader)[:2]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("split", ["train", "test"])
def test_ranks_have_the_same_prompt_and_share_the_seeds(world_size, split):
    def loader(**ranks):
        if split == "train":
            return training(images_per_prompt=12, **ranks)
        return PromptLoader(jobs(5), "test", 0, 12, **ranks)

    per_rank = zip(*(loader(rank=rank, world_size=world_size) for rank in range(world_size)), strict=True)
    for whole, shares in zip(loader(), per_rank, strict=True):
        assert {(share.prompt, share.index) for share in shares} == {(whole.prompt, whole.index)}
        assert all(share.seeds.shape == (12 // world_size,) for share in shares)
        assert_close(torch.cat([share.seeds for share in shares]), whole.seeds, rtol=0, atol=0)


def trainer_stub(rank, world_size, processed=0):
    progress = SimpleNamespace(total=SimpleNamespace(processed=processed))
    fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(global_rank=rank, world_size=world_size, fit_loop=fit_loop)


def test_the_module_takes_its_rank_from_the_trainer():
    data = OccupationPrompts(images_per_prompt=6, test_images_per_prompt=4, test_prompts=3)
    alone = [next(iter(data.train_dataloader())), *data.test_dataloader()]
    shares = []
    for rank in range(2):
        data.trainer = trainer_stub(rank, 2)
        data.setup("fit")
        shares.append([next(iter(data.train_dataloader())), *data.test_dataloader()])
    for whole, first, second in zip(alone, *shares, strict=True):
        assert first.prompt == second.prompt == whole.prompt
        assert_close(torch.cat((first.seeds, second.seeds)), whole.seeds, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("images", "world_size", "nearest"), [(24, 5, "20 or 25"), (3, 4, "4"), (7, 2, "6 or 8"), (1, 8, "8")]
)
def test_images_that_do_not_divide_are_rejected_with_the_nearest_numbers(images, world_size, nearest):
    for stage, name in (("fit", ""), ("validate", "validation_"), ("test", "test_")):
        data = OccupationPrompts(**{f"{name}images_per_prompt": images})
        data.trainer = trainer_stub(0, world_size)
        with pytest.raises(ValueError, match=f"^{name}images_per_prompt .* but is {images}; the nearest: {nearest}$"):
            data.setup(stage)
    with pytest.raises(ValueError, match=f"must be a multiple of {world_size}"):
        training(images_per_prompt=images, world_size=world_size)


@pytest.mark.parametrize("prompts", [OccupationPrompts, SportPrompts, DescriptorPrompts, MixedPrompts])
def test_defaults_work_from_any_directory(prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = prompts()
    for loader, images in (
        (data.train_dataloader(), 24),
        (data.val_dataloader(), 24),
        (data.test_dataloader(), 60),
    ):
        batch = next(iter(loader))
        assert isinstance(batch, PromptBatch) and batch.seeds.shape == (images,)
        assert batch.prompt == data.prompts(loader.split)[batch.index]


def test_mixed_prompts_repeat_only_the_training_prompts(tmp_path):
    files = [write(tmp_path, VALID, "a.json"), write(tmp_path, VALID | {"train": ["x", "y"]}, "b.json")]
    data = MixedPrompts(files=files, weights=[3, 2])
    epoch = [batch.prompt.subject for batch in data.train_dataloader()]
    assert sorted(epoch) == ["chef"] * 3 + ["x"] * 2 + ["y"] * 2
    assert [prompt.subject for prompt in data.prompts("train")] == ["chef", "x", "y"]
    assert len(data.val_dataloader()) == len(data.test_dataloader()) == 2


def test_a_split_may_be_missing_in_some_files(tmp_path):
    train_only = {key: value for key, value in VALID.items() if key not in ("validation", "test")}
    files = [write(tmp_path, train_only, "a.json"), write(tmp_path, VALID, "b.json")]
    data = MixedPrompts(files=files, weights=[1, 1])
    assert (
        data.prompts("validation") == PromptModule(files[1:]).prompts("validation") and len(data.prompts("train")) == 2
    )
    with pytest.raises(ValueError, match='a.json: there is no "test" split, only "train"'):
        PromptModule(files[:1]).prompts("test")
    files.append(write(tmp_path, {key: value for key, value in VALID.items() if key != "train"}, "c.json"))
    with pytest.raises(
        ValueError, match='c.json: there is no "train" split'
    ):  # the weight of the file would have no effect
        PromptModule(files).prompts("train")


def test_limits_keep_the_first_prompts_of_each_file():
    data = MixedPrompts(train_prompts=2, validation_prompts=3, test_prompts=1)
    assert [len(data.prompts(split)) for split in SPLITS] == [8, 12, 4]
    assert len(data.train_dataloader()) == 2 * (1 + 6 + 20 + 4)
    assert data.prompts("validation")[:3] == OccupationPrompts().prompts("validation")[:3]


def test_train_subjects_filter_training_only(tmp_path):
    subjects = write(tmp_path, "# the small world\nWelder\n  chef \nsenator\nno such job\n", "subjects.txt")
    data = OccupationPrompts(train_subjects=subjects)
    assert [prompt.subject for prompt in data.prompts("train")] == ["chef", "welder"]
    assert [
        prompt.subject for prompt in OccupationPrompts(train_subjects=subjects, train_prompts=1).prompts("train")
    ] == ["chef"]
    assert data.prompts("test") == OccupationPrompts().prompts("test")
    assert {prompt.subject for prompt in MixedPrompts(train_subjects=subjects).prompts("train")} == {
        "chef",
        "welder",
    }


def test_train_subjects_that_leave_no_prompt_are_rejected(tmp_path):
    data = OccupationPrompts(train_subjects=write(tmp_path, "no such job\n", "subjects.txt"))
    with pytest.raises(ValueError, match=r"subjects.txt: names no training subject of .*occupations.json"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="missing.txt: there is no such file"):
        OccupationPrompts(train_subjects=str(tmp_path / "missing.txt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_per_prompt": 0}, "^images_per_prompt must be at least 1, but is 0"),
        ({"test_images_per_prompt": -1}, "test_images_per_prompt must be at least 1"),
        ({"validation_prompts": 0}, "validation_prompts must be at least 1"),
        ({"noise_pool": 0}, "noise_pool must be at least 1, but is 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"weights": [1, 2]}, "weights must be one number per file, but 4 files have 2"),
        ({"weights": [1, 6, 0, 4]}, "weights must be at least 1, but is 0"),
        ({"files": [], "weights": []}, "files must be at least 1, but is 0"),
    ],
)
def test_numbers_out_of_range_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixedPrompts(**arguments)


def test_every_argument_can_be_configured(tmp_path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PromptModule, "data")
    config = parser.parse_object({"data": {"class_path": "fairness_dft.prompts.OccupationPrompts"}})
    assert config.data.init_args.file == "data/prompts/occupations.json"
    assert config.data.init_args.images_per_prompt == 24 and config.data.init_args.seed == 0
    mixed = {
        "class_path": "fairness_dft.prompts.MixedPrompts",
        "init_args": {"seed": 3, "weights": [1, 1, 1, 2]},
    }
    data = parser.instantiate_classes(parser.parse_object({"data": mixed})).data
    assert isinstance(data, MixedPrompts) and data.seed == 3 and data.weights == [1, 1, 1, 2]
    assert data.images_per_prompt == 24 and data.test_images_per_prompt == 60
    mixed["init_args"]["sede"] = 3
    with pytest.raises(jsonargparse.ArgumentError, match="sede"):
        parser.parse_object({"data": mixed})


class Recorder(LightningModule):
    """Train one number, and record the batches."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated, self.fail_at = [], [], fail_at

    def training_step(self, batch, batch_index):
        if self.fail_at is not None and len(self.seen) == self.fail_at:
            raise RuntimeError("out of luck")
        self.seen.append(content(batch))
        loss = (self.weight - batch.index) ** 2
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_index):
        self.validated.append(content(batch))
        self.log("validation", self.weight)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["batches"] = len(self.seen)
        checkpoint["callbacks"] = {}  # otherwise Lightning requires the same callbacks when it resumes

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data_module(tmp_path):
    subjects = {split: [f"{split} {number}" for number in range(count)] for split, count in (("train", 5), ("test", 2))}
    path = write(tmp_path, {"concept": "job", "templates": ["a {job}"], "validation": ["v", "w"], **subjects})
    return OccupationPrompts(file=path, images_per_prompt=4, validation_images_per_prompt=2)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def fit(tmp_path, recorder, callbacks=(), checkpoint=None, **settings):
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    settings = QUIET | {"max_epochs": 3, "enable_checkpointing": saves, "callbacks": list(callbacks)} | settings
    trainer = Trainer(default_root_dir=tmp_path, **settings)
    trainer.fit(recorder, data_module(tmp_path), ckpt_path=checkpoint, weights_only=False)
    return recorder


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_lightning_fits_without_a_warning(tmp_path, precision):
    recorder = fit(tmp_path, Recorder(), precision=precision)
    expected = training()
    assert [(index, seeds) for _, index, seeds in recorder.seen] == [
        (index, seeds) for _ in range(3) for _, index, seeds in contents(expected)
    ]
    # two prompts in the sanity check and in each of the three epochs
    assert recorder.validated == contents(data_module(tmp_path).val_dataloader()) * 4


RESUMES = {
    "after every batch": ({"every_n_train_steps": 1}, {}),
    "after every batch, counted in steps": ({"every_n_train_steps": 1}, {"max_epochs": -1, "max_steps": 15}),
    "after every third": ({"every_n_train_steps": 3}, {}),
    "after every epoch": ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {}),
    "after every epoch, counted in steps": ({"every_n_epochs": 1}, {"max_epochs": -1, "max_steps": 15}),
    "after every validation": ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, {}),
    "accumulating": ({"every_n_train_steps": 1}, {"accumulate_grad_batches": 2}),
    "accumulating, after every epoch": ({"every_n_epochs": 1}, {"accumulate_grad_batches": 2}),
    "validating in mid-epoch": ({"every_n_train_steps": 1}, {"val_check_interval": 2}),
    "shortened epochs": ({"every_n_train_steps": 1}, {"limit_train_batches": 3, "max_epochs": 5}),
    "reloading": ({"every_n_train_steps": 1}, {"reload_dataloaders_every_n_epochs": 1}),
}


@pytest.mark.parametrize("case", RESUMES)
def test_a_resumed_run_has_the_batches_of_an_uninterrupted_one(tmp_path, case):
    when, trainer = RESUMES[case]
    folder = tmp_path / "checkpoints"
    whole = fit(tmp_path, Recorder(), [ModelCheckpoint(folder, "{step}", save_top_k=-1, **when)], **trainer)
    assert len(whole.seen) == 15
    checkpoints = sorted(folder.iterdir())
    assert len(checkpoints) >= 3
    for checkpoint in checkpoints:
        batches = torch.load(checkpoint, weights_only=False)["batches"]
        resumed = fit(tmp_path, Recorder(), checkpoint=checkpoint, **trainer)
        assert resumed.seen == whole.seen[batches:], f"after {batches} batches"
        assert_close(resumed.weight, whole.weight)


def test_a_run_that_fails_in_mid_batch_repeats_that_batch(tmp_path):
    class SaveOnException(Callback):
        def on_exception(self, trainer, module, error):
            trainer.save_checkpoint(tmp_path / "failed.ckpt")

    whole = fit(tmp_path, Recorder())
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, Recorder(fail_at=8), [SaveOnException()])
    assert fit(tmp_path, Recorder(), checkpoint=tmp_path / "failed.ckpt").seen == whole.seen[8:]


def test_a_second_fit_of_the_same_trainer_continues_the_stream(tmp_path):
    recorder, data = Recorder(), data_module(tmp_path)
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    trainer.fit(recorder, data)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(recorder, data)
    assert recorder.seen == fit(tmp_path, Recorder()).seen
