"""A run that was stopped and resumed is the run that was not."""

import signal

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from miniature import finetuning, prompts, trainer

from fairness_dft.cli.commands import resumable, run_main
from fairness_dft.sampling.sampler import Sampler
from fairness_dft.training.callbacks import AdapterAverage
from fairness_dft.training.interruption import GracefulStop


def run(folder, steps, ckpt_path=None, more=(), **settings):
    module = finetuning(sampler=Sampler(steps=2, steps_max=4, guidance_scale=2.0, checkpoint=False))
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    callbacks = [AdapterAverage(0.5), *more, checkpoint]
    fit = trainer(folder, max_steps=steps, callbacks=callbacks, enable_checkpointing=True, **settings)
    fit.fit(module, prompts(images_per_prompt=4), ckpt_path=ckpt_path)
    return module.state_dict()


class Interrupt(Callback):
    """Sends signals, as a user or a scheduler does, in the middle of a batch."""

    def __init__(self, *signals, batch=2):
        self.signals, self.batch = signals, batch

    def on_before_backward(self, trainer, module, loss):
        if trainer.fit_loop.total_batch_idx == self.batch:
            for number in self.signals:
                signal.raise_signal(number)


MOVED = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # on purpose: the first run is not overwritten


@MOVED
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_says_how_to_go_on_and_goes_on_as_if_it_had_not_been(tmp_path, capsys, number):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    whole = run(tmp_path / "whole", 3, accumulate_grad_batches=2)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "half", 3, more=[GracefulStop(), Interrupt(number)], accumulate_grad_batches=2)
    assert stopped.value.code == 128 + number
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    file = tmp_path / "half" / "checkpoints" / "stopped-step=2.ckpt"  # batch 2 of 0 to 5 is half of the second step
    assert f"stopped after step 2; to continue, add --ckpt_path {file}\n" in capsys.readouterr().err
    resumable(file)
    resumed = run(tmp_path / "rest", 3, ckpt_path=file, more=[GracefulStop()], accumulate_grad_batches=2)
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0)


@MOVED
def test_a_resumed_run_learns_at_the_rate_that_it_is_given(tmp_path):
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    for folder, steps, checkpoint in (("first", 2, None), ("second", 4, tmp_path / "first" / "step=2.ckpt")):
        module = finetuning(learning_rate=2e-3 if rates else 1e-3, schedule="linear")
        saved = ModelCheckpoint(tmp_path / folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        fit = trainer(tmp_path / folder, max_steps=steps, callbacks=[Watch(), saved], enable_checkpointing=True)
        fit.fit(module, prompts(images_per_prompt=2), ckpt_path=checkpoint)
    assert rates == pytest.approx([1e-3, 0.5e-3, 1e-3, 0.5e-3])  # of 2e-3, a half and a quarter of four steps are left


def test_a_signal_in_the_last_validation_ends_the_run_too(tmp_path, capsys):
    class InValidation(Callback):
        def on_validation_end(self, trainer, module):
            signal.raise_signal(signal.SIGTERM)

    settings = dict(limit_val_batches=1, val_check_interval=1, check_val_every_n_epoch=None)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, 1, more=[GracefulStop(), InValidation()], **settings)
    assert stopped.value.code == 128 + signal.SIGTERM
    file = tmp_path / "checkpoints" / "stopped-step=1.ckpt"
    assert f"stopped after step 1; to continue, add --ckpt_path {file}\n" in capsys.readouterr().err
    resumable(file)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_second_signal_stops_at_once(tmp_path, capsys, number, code):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    with pytest.raises(SystemExit) as stopped:
        more = [GracefulStop(), Interrupt(number, number, batch=0)]
        run_main(lambda: run(tmp_path, 3, more=more, accumulate_grad_batches=2))
    assert stopped.value.code == code
    assert "stopped at once, without another checkpoint\n" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


@MOVED
def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "half", 2)
    resumed = run(tmp_path / "rest", 4, ckpt_path=tmp_path / "half" / "step=2.ckpt")
    assert whole.keys() == resumed.keys() and any(key.startswith("ema.") for key in whole)
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0)


def test_checkpoint_is_small_and_holds_no_frozen_weight(tmp_path):
    run(tmp_path, 2)
    file = tmp_path / "step=2.ckpt"
    state = torch.load(file, weights_only=True)
    assert all(key.startswith(("trained.", "ema.")) for key in state["state_dict"])
    assert file.stat().st_size < 1e6
