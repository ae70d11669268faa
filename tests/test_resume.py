"""A run that was stopped and resumed is the run that was not."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from miniature import finetuning, prompts, trainer

from fairness_dft.callbacks import AdapterAverage
from fairness_dft.sampler import Sampler


def run(folder, steps, ckpt_path=None):
    module = finetuning(sampler=Sampler(steps=2, steps_max=4, guidance_scale=2.0, checkpoint=False))
    checkpoint = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    callbacks = [AdapterAverage(0.5), checkpoint]
    fit = trainer(folder, max_steps=steps, callbacks=callbacks, enable_checkpointing=True)
    fit.fit(module, prompts(images_per_prompt=4), ckpt_path=ckpt_path)
    return module.state_dict()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # on purpose: nothing of the first run is overwritten
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
