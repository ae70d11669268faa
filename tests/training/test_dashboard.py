"""TensorBoard's page of a run: every chart finds its curves."""

import re
from dataclasses import replace

import pytest
import torch
from fixed_counts import fixed_results
from lightning.pytorch.loggers import TensorBoardLogger
from miniature import finetuning, judge, prompts, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from fairness_dft.attributes import Attribute
from fairness_dft.training.bias_monitor import BiasMonitor
from fairness_dft.training.callbacks import AdapterAverage, Throughput
from fairness_dft.training.dashboard import Dashboard, final_metrics, layout
from fairness_dft.training.quality_monitor import QualityMonitor


@pytest.mark.parametrize("names", [["gender"], ["gender", "race"]])
def test_every_chart_finds_its_curves(names, tmp_path):
    monitors = [Dashboard(), AdapterAverage(0.5), BiasMonitor(independent_judge=judge("independent")), QualityMonitor()]
    fit = trainer(
        tmp_path, logger=TensorBoardLogger(tmp_path, name="x"), callbacks=[*monitors, Throughput()],
        limit_val_batches=1.0, val_check_interval=1, check_val_every_n_epoch=None, max_steps=1, log_every_n_steps=1,
    )  # fmt: skip
    fit.fit(finetuning(attribute=Attribute(names, confidence=0.5)), prompts())
    events = EventAccumulator(str(tmp_path / "x" / "version_0")).Reload()
    scalars = events.Tags()["scalars"]
    [written] = events.Tensors("custom_scalars__config__")
    parsed = layout_pb2.Layout.FromString(written.tensor_proto.string_val[0])
    assert [category.title for category in parsed.category] == list(layout(names))
    for category in parsed.category:
        for chart in category.chart:
            [pattern] = chart.multiline.tag
            assert any(re.search(pattern, name) for name in scalars), (category.title, chart.title)
    found = {name for name in scalars if re.search(r"^frequency_gender/.*_(ema|target)$", name)}
    assert found == {f"frequency_gender/{kind}_{side}" for kind in ("man", "woman") for side in ("ema", "target")}
    assert [event.value for event in events.Scalars("frequency_gender/woman_target")] == [0.5]


def test_gradient_norm_is_before_clipping(tmp_path):
    seen = []

    class Watch(Dashboard):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            gradients = [parameter.grad.flatten() for parameter in pl_module.adapter.parameters()]
            seen.append(torch.cat(gradients).norm().item())

    fit = trainer(tmp_path, callbacks=[Watch()], max_steps=1, gradient_clip_val=1e-6)
    fit.fit(finetuning(), prompts(images_per_prompt=4))
    assert fit.callback_metrics["gradient/norm"].item() == pytest.approx(seen[0], rel=1e-5) and seen[0] > 1e-4


def test_what_runs_are_compared_by():
    results = fixed_results()
    figures = final_metrics(results)
    for classifier in ("training", "independent"):
        for name in ("gender", "age", "gender×age"):
            side = results.bias[classifier][name].ema
            assert figures.pop(f"test/bias_{name}_{classifier}") == side.bias
            assert figures.pop(f"test/floor_{name}_{classifier}") == side.floor
            assert figures.pop(f"test/distance_{name}_{classifier}") == side.distance.total_variation_by_prompt
    assert figures == {"test/clip_t": 0.3}  # what is not known is left out
    even = replace(results.bias["training"]["gender"], measure="bias")
    alone = replace(results, attributes=("gender",), bias={"training": {"gender": even, "age": even}}, kept={})
    assert final_metrics(alone) == {
        "test/bias_gender_training": even.ema.bias, "test/floor_gender_training": even.ema.floor,
    }  # fmt: skip
