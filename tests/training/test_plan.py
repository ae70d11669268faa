"""What a run will take, beside counting by hand."""

import re
from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import refused, small
from lightning import Trainer
from miniature import finetuning

from fairness_dft import evaluate
from fairness_dft.fit import main
from fairness_dft.prompts.datamodule import MixedPrompts
from fairness_dft.sampling.sampler import Sampler
from fairness_dft.training.fairness_loss import FairnessLoss
from fairness_dft.training.plan import MEASURED, Plan, Stopwatch, duration, plan, show, size, unchanged


def trainer(**settings) -> SimpleNamespace:
    usual = dict(max_steps=-1, max_epochs=-1, accumulate_grad_batches=1, val_check_interval=1.0)
    usual |= dict(check_val_every_n_epoch=1, limit_val_batches=1.0, limit_test_batches=1.0, limit_train_batches=1.0)
    return SimpleNamespace(**usual | settings)


class Loader(list):
    """Prompts by number, each as often as it comes in an epoch."""

    @property
    def slots(self) -> np.ndarray:
        return np.array(self)


def prompts(noise_pool: int | None = None, slots: Iterable[int] = range(10)) -> SimpleNamespace:
    of_split = {"validation": ["a", "b"], "test": ["a", "b", "c"]}
    return SimpleNamespace(
        train_dataloader=lambda: Loader(slots), prompts=of_split.get, noise_pool=noise_pool, images_per_prompt=8,
        validation_images_per_prompt=4, test_images_per_prompt=16,
    )  # fmt: skip


def test_a_run_in_steps_with_fresh_noise() -> None:
    found = plan(trainer(max_steps=25, val_check_interval=10, check_val_every_n_epoch=None), prompts())
    assert found == Plan(steps=25, batches=25, images=8, sets=25, validation=2 * 2 * 4 * 3, test=3 * 16 * 2)


def test_a_run_in_epochs_with_noise_that_recurs() -> None:
    found = plan(trainer(max_epochs=4, accumulate_grad_batches=2, limit_test_batches=0), prompts(noise_pool=1))
    assert found == Plan(steps=20, batches=40, images=8, sets=10, validation=4 * 2 * 4 * 3, test=0)
    # Two sets, two visits: the second visit meets the other set half of the time.
    assert plan(trainer(max_steps=20), prompts(noise_pool=2)).sets == 15


def test_a_prompt_that_comes_more_often_has_no_more_sets() -> None:
    found = plan(trainer(max_steps=3000), prompts(noise_pool=3, slots=[0, *[1] * 6, *[2] * 3]))
    assert found.sets == 9
    # Two visits of the first prompt and four of the second, each with one of two sets: 3/4 and 15/16 of them are met.
    assert plan(trainer(max_steps=6), prompts(noise_pool=2, slots=[0, 1, 1])).sets == 3


def test_the_loader_tells_how_often_each_prompt_comes() -> None:
    files = ["data/prompts/occupations.json", "data/prompts/descriptors.json"]
    data = MixedPrompts(files=files, weights=[1, 4], noise_pool=2, train_prompts=5)
    met = {(batch.index, batch.noise_set) for _ in range(40) for batch in data.train_dataloader()}
    found = plan(trainer(max_steps=2000), data).sets
    assert found == 2 * 10 and len(met) <= found


def test_epochs_may_be_cut_short() -> None:
    assert plan(trainer(max_epochs=2, limit_train_batches=4), prompts()).steps == 8
    assert plan(trainer(max_epochs=2, limit_train_batches=0.5), prompts()).steps == 10
    assert plan(trainer(max_epochs=2, limit_train_batches=0), prompts()) == Plan(0, 0, 8, 0, 0, 96)


def test_validation_and_test_may_be_cut_short() -> None:
    found = plan(trainer(max_epochs=1, limit_val_batches=1, limit_test_batches=0.67), prompts())
    assert (found.validation, found.test) == (1 * 4 * 3, 2 * 16 * 2)


def test_an_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="--trainer.val_check_interval must be above 0"):
        plan(trainer(max_steps=20, val_check_interval=0), prompts())


def test_a_run_without_an_end_has_no_plan() -> None:
    with pytest.raises(ValueError, match="--plan: this run has no end; give --trainer.max_steps"):
        plan(trainer(), prompts())


def test_the_command_prints_a_plan_and_writes_nothing(tmp_path, capsys) -> None:
    main(small(tmp_path / "runs", "--plan", "--trainer.max_steps=4", "--trainer.val_check_interval=2"))
    printed = capsys.readouterr().out
    for line in ("4 steps, 16 images", "validation *│ *12 images", "test *│ *16 images", "memory of this process"):
        assert re.search(line, printed), printed
    seconds = [float(found) for found in re.findall(r"(\d+\.\d\d) s", printed)]
    step, warm, training, validation, test, everything = seconds
    assert warm > 0 and training == pytest.approx(4 * step, abs=4 * 0.01)  # noise does not recur
    assert everything == pytest.approx(training + validation + test, abs=0.03)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_is_remembered_already_is_neither_read_nor_written(tmp_path, capsys, monkeypatch) -> None:
    """One prompt with one set of noise: after the first step, a run would remember it."""
    store, looked = tmp_path / "originals", []
    look = FairnessLoss.look_at_original
    monkeypatch.setattr(FairnessLoss, "look_at_original", lambda *given: looked.append(1) or look(*given))
    (tmp_path / "one.txt").write_text("a photo of the face of a barber")
    more = (f"--data.init_args.file={tmp_path / 'one.txt'}", "--data.init_args.train_subjects=null")
    more += ("--plan", "--data.init_args.noise_pool=1", f"--model.originals_folder={store}")
    main(small(tmp_path / "runs", *more))
    assert len(looked) == MEASURED + 1  # in every other step
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["one.txt"]
    assert re.search(r"on disk, with .* 0\.0 MiB", capsys.readouterr().out)


def test_a_step_takes_less_where_its_originals_are_remembered(capsys) -> None:
    """Of 10 batches 3 meet their noise for the first time; the first step of either kind only warmed up."""
    stopwatch = Stopwatch(cold=[9.0, 2.0, 3.0, 4.0], warm=[9.0, 1.0, 1.0, 1.0], looks=[0.5] * 4)
    quiet = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    show(Plan(steps=10, batches=10, images=8, sets=3, validation=4, test=2), stopwatch, quiet)
    found = re.findall(r"(\d+\.\d\d) s", capsys.readouterr().out)
    assert list(map(float, found)) == [3, 1, 3 * 3 + 7 * 1, 2, 1, 16 + 3]


def test_all_measured_steps_have_as_many_sampling_steps(monkeypatch, tmp_path) -> None:
    drawn, draw = [], Sampler.draw_steps
    monkeypatch.setattr(Sampler, "draw_steps", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    main(small(tmp_path, "--plan", "--trainer.max_steps=20", "--model.sampler.steps=2", "--model.sampler.steps_max=5"))
    assert sorted(drawn) == [2] * (MEASURED + 1) + [3] * 2 * (MEASURED + 1)  # 2 where a test's image is timed


def test_a_plan_leaves_the_module_as_it_is() -> None:
    module = finetuning()
    module.configure_model()
    before, sampler, originals = module.state_dict(), module.sampler, module.originals
    with pytest.raises(KeyError), unchanged(module):
        module.sampler.steps = 9
        module.originals = None
        module.adapter.load_state_dict(
            {key: value + 1 for key, value in module.adapter.state_dict("ema").items()}, "ema"
        )
        raise KeyError
    assert module.sampler is sampler and sampler.steps == 3 and module.originals is originals
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_only_a_fit_has_a_plan(tmp_path, capsys) -> None:
    with pytest.raises(ValueError, match="--plan belongs to fairness_dft.fit, not to fairness_dft.evaluate: remove it"):
        evaluate.main(small(tmp_path, "--plan"))
    assert "no end" in refused(capsys, small(tmp_path, "--plan", "--trainer.max_steps=-1", "--model.schedule=constant"))


def test_words() -> None:
    assert (duration(3.14159), duration(125), duration(7265)) == ("3.14 s", "2 min", "2 h 01 min")
    assert (size(5 * 2**20), size(3 * 2**30)) == ("5.0 MiB", "3.0 GiB")
