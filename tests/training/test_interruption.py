"""Steps that are not finite are skipped, counted, and end a run where they do not end; precisions that round."""

import math

import pytest
import torch
from lightning import Callback
from miniature import finetuning, prompts, trainer

from fairness_dft.adapters.combined import Combined
from fairness_dft.adapters.lora import TextEncoderLoRA, UNetLoRA
from fairness_dft.adapters.prompt_prefix import PromptPrefix
from fairness_dft.cli.commands import resumable
from fairness_dft.sampling.sampler import Sampler
from fairness_dft.training.callbacks import AdapterAverage
from fairness_dft.training.interruption import SkipNonFiniteSteps


class Poison(Callback):
    """Spoils the loss, or only a gradient, of some batches, and remembers the adapter after every batch."""

    def __init__(self, what, batches):
        self.what, self.batches, self.states = what, batches, []

    def setup(self, trainer, module, stage):
        step = module.training_step

        def poisoned(batch, batch_idx):
            loss = step(batch, batch_idx)
            if trainer.fit_loop.total_batch_idx not in self.batches:
                return loss
            if self.what == "loss":
                return loss * math.nan
            loss.register_hook(lambda gradient: gradient * math.inf)
            return loss

        module.training_step = poisoned

    def on_train_start(self, trainer, module):
        self.states.append(module.adapter.state_dict("trained"))

    def on_train_batch_end(self, trainer, module, *_):
        self.states.append(module.adapter.state_dict("trained"))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, what):
    module, guard, poison = finetuning(weight_decay=0.5), SkipNonFiniteSteps(), Poison(what, {1, 2, 4})
    fit = trainer(tmp_path, max_steps=6, gradient_clip_val=1.0, callbacks=[poison, guard])
    fit.fit(module, prompts(images_per_prompt=4))
    same = [
        all(torch.equal(before[key], after[key]) for key in before)
        for before, after in zip(poison.states, poison.states[1:], strict=False)
    ]
    assert same == [False, True, True, False, True, False]
    assert guard.skipped == 3 and fit.callback_metrics["skipped/steps"] == 3
    assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
    moments = [state["step"] for state in fit.optimizers[0].state.values()]
    assert {int(steps) for steps in moments} == {3}


def test_accumulated_batches_are_skipped_together(tmp_path):
    module, guard, poison = finetuning(), SkipNonFiniteSteps(), Poison("loss", {0})
    fit = trainer(tmp_path, max_steps=2, accumulate_grad_batches=2, callbacks=[poison, guard])
    fit.fit(module, prompts(images_per_prompt=4))
    assert guard.skipped == 1
    first, *_, last = poison.states
    assert all(torch.equal(first[key], poison.states[2][key]) for key in first)
    assert not all(torch.equal(first[key], last[key]) for key in first)


def test_many_in_a_row_end_the_run_with_what_was_good(tmp_path):
    module, poison = finetuning(), Poison("loss", set(range(1, 9)))
    fit = trainer(tmp_path, max_steps=9, callbacks=[poison, SkipNonFiniteSteps(patience=3)])
    with pytest.raises(ValueError, match="not finite in 3 steps in a row.*--ckpt_path.*--model.learning_rate") as stop:
        fit.fit(module, prompts(images_per_prompt=4))
    file = tmp_path / "checkpoints" / "stopped-step=4.ckpt"
    assert str(file) in str(stop.value)
    resumable(file)
    state = torch.load(file, weights_only=True)["state_dict"]
    for key, tensor in poison.states[0].items():  # before the one update that there was, which may have done it
        torch.testing.assert_close(state[f"trained.{key}"], tensor, rtol=0, atol=0)


def test_a_run_that_diverged_goes_on_from_before_it_did(tmp_path):
    fit = trainer(tmp_path, max_steps=9, callbacks=[AdapterAverage(0.5), SkipNonFiniteSteps(patience=2)])
    with pytest.raises(ValueError, match="not finite in 2 steps in a row"):
        fit.fit(finetuning(learning_rate=1e30), prompts(images_per_prompt=4))
    [file] = (tmp_path / "checkpoints").iterdir()
    kept = torch.load(file, weights_only=True)
    assert all(tensor.abs().max() < 10 for tensor in kept["state_dict"].values())
    step, module, guard = kept["global_step"], finetuning(learning_rate=1e-3), SkipNonFiniteSteps()
    again = trainer(tmp_path / "again", max_steps=step + 2, callbacks=[AdapterAverage(0.5), guard])
    again.fit(module, prompts(images_per_prompt=4), ckpt_path=file)
    assert guard.in_a_row == 0 and all(tensor.isfinite().all() for tensor in module.state_dict().values())
    assert any((module.state_dict()[key] - value).abs().max() > 1e-4 for key, value in kept["state_dict"].items())


def test_the_count_is_resumed():
    guard = SkipNonFiniteSteps()
    guard.load_state_dict({"skipped": 7})
    assert guard.state_dict() == {"skipped": 7}
    with pytest.raises(ValueError, match="skip_non_finite_steps.patience must be at least 1, but got 0"):
        SkipNonFiniteSteps(patience=0)


ADAPTERS = {
    "text_encoder": lambda: TextEncoderLoRA(rank=2),
    "unet": lambda: UNetLoRA(rank=2),
    "both": lambda: Combined([TextEncoderLoRA(rank=2), UNetLoRA(rank=2)]),
    "prefix": lambda: PromptPrefix(length=2),
}


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.values.append(float(outputs["loss"]))


def losses(folder, adapter, precision, **settings):
    sampler = Sampler(steps=2, guidance_scale=2.0)
    module, seen, guard = finetuning(adapter=adapter, sampler=sampler), Losses(), SkipNonFiniteSteps()
    fit = trainer(folder, max_steps=2, precision=precision, callbacks=[seen, guard], **settings)
    fit.fit(module, prompts(images_per_prompt=4))
    assert {parameter.dtype for parameter in module.adapter.parameters()} == {torch.float32}
    for key, tensor in module.adapter.state_dict("trained").items():
        # Each step of AdamW moves by the learning rate, 1e-3, what has a gradient; the factor B starts at zero.
        assert tensor.isfinite().all() and ("up" not in key and "lora_B" not in key or tensor.abs().max() > 5e-4)
    return seen.values, guard.skipped


@pytest.mark.parametrize("kind", ["both", "prefix"])
def test_mixed_precision_trains(tmp_path, kind):
    values, skipped = losses(tmp_path, ADAPTERS[kind](), "bf16-mixed")
    assert skipped == 0 and all(map(math.isfinite, values))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_mixed_precision_on_a_gpu(tmp_path, kind, precision):
    values, skipped = losses(tmp_path, ADAPTERS[kind](), precision, accelerator="gpu")
    assert all(map(math.isfinite, values)) and skipped <= 1
