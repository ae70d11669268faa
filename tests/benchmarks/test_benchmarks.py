"""The measurements in benchmarks/: the authors' step and ours have the same gradient, and the counts are those of a
step by hand."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multinomial

from fairness_dft.alignment.counts import enumerate_counts
from fairness_dft.alignment.transport import mean_assignment, transport_cost
from fairness_dft.metrics.bias import summarize_bias
from fairness_dft.prompts.files import Prompt
from fairness_dft.reports.build import Measured, build_results

WAYS = ("authors", "exact, cold", "exact, warm", "exact, activations kept, warm", "1 of 2 steps, warm")


@pytest.fixture(scope="module")
def profiled():
    """What took a step in each way, under the profiler; the last one is 1 of 2 steps, warm."""
    from benchmarks import profile, step

    scale = step.Scale("miniature", 64, images=4, micro_batch=2, sampling_batch=4, steps=2, guidance_scale=1.75)
    ways = {name: way for name, way in step.ways(scale).items() if name in WAYS}
    torch.manual_seed(0)
    options = dict(only=None, rounds=1, no_count=False, weights="float32", precision="32", compile=False)
    return step.measure(scale, ways, argparse.Namespace(**options), kind=profile.Profiled)


@pytest.fixture
def compared(profiled):
    return profiled.compared


@pytest.mark.slow
def test_the_exact_step_has_the_authors_gradient(compared) -> None:
    assert compared["authors"].gradient.norm() > 0
    for name in WAYS[1:4]:
        assert compared[name].cosine > 0.9999 and compared[name].difference < 1e-4
    assert compared["1 of 2 steps, warm"].difference > 1e-2


@pytest.mark.slow
def test_operations_saved_are_a_sampling_pass_and_half_of_the_decoder(compared) -> None:
    operations = {name: way.operations for name, way in compared.items()}
    others = {name: way.operations - way.passes for name, way in compared.items()}
    # Decoder and feature networks are counted too, so that a pass costs more than the denoising network's 1.
    a_pass = operations["exact, cold"] - operations["exact, warm"]
    assert 1 < a_pass < 2.5
    # Of four images' activations the decoder keeps those of the last two, feature networks none.
    again = others["exact, warm"] - others["exact, activations kept, warm"]
    forward = others["exact, cold"] - others["exact, warm"]
    assert forward / 2 < again < 0.95 * forward
    assert operations["authors"] > operations["exact, cold"] + 1


@pytest.mark.slow
def test_passes_of_the_denoising_network_are_those_counted_by_hand(compared) -> None:
    """Sampling, once or twice; calls again; the way back, which stops at the first layer that the prompt reaches."""
    passes = {name: way.passes for name, way in compared.items()}
    sampling = passes["exact, cold"] - passes["exact, warm"]
    assert 0.9 < sampling < 1  # as images share the keys of their prompt
    back = passes["exact, activations kept, warm"] - sampling
    assert 0.7 * sampling < back < sampling
    assert passes["exact, warm"] == pytest.approx(2 * sampling + back, rel=0.01)
    assert passes["1 of 2 steps, warm"] == pytest.approx(sampling + (sampling + back) / 2, rel=0.01)
    # The authors sample three times and go back; of their third pass they make the blocks again.
    assert 3.5 + back < passes["authors"] < 4 + back


@pytest.mark.slow
def test_a_step_put_together_from_its_calls_is_the_step_that_was_counted(compared, profiled) -> None:
    from benchmarks.calls import calls

    generator = profiled.generator
    found = calls(generator.unet, 4, generator.latent_shape[-1], generator.encode([""]).shape[1])
    for name in WAYS[1:4]:
        assert found[name] == pytest.approx(compared[name].passes, rel=0.01)
    # Half of the steps, not a quarter; and the authors' micro-batches take as many operations as all images at once.
    back = found["exact, warm"] - found["a quarter of the steps, warm"]
    assert compared["1 of 2 steps, warm"].passes == pytest.approx(found["exact, warm"] - 2 / 3 * back, rel=0.01)
    assert found["authors"] == pytest.approx(compared["authors"].passes, rel=0.01)


@pytest.mark.slow
def test_the_parts_of_a_profiled_step_are_all_there(profiled) -> None:
    from benchmarks.profile import inside

    forward = {"text encoder", "U-Net, sampling", "VAE", "features", "faces", "classifier", "targets"}
    back = {"features and classifier, back", "VAE, again and back", "U-Net, again and back", "text encoder, back"}
    assert profiled.shares.keys() == forward | back and min(profiled.shares.values()) > 0
    # No range lies within another one, so together they are no more than the step.
    assert sum(profiled.shares.values()) < profiled.seconds
    assert 0 < inside(profiled.shares, profiled.seconds) < 1


def test_the_cost_model_is_found_again() -> None:
    from benchmarks.networks import SCALES
    from benchmarks.scaling import GROWTH, Row, Setting, fit, settings

    assert Setting(8, 20, 5, 64).calls(cold=False) == 2 * 8 * 20 + 2 * (2 * 8 * 5)  # sampling; again, and back
    assert Setting(8, 20, 5, 64).calls(cold=True) - Setting(8, 20, 5, 64).calls(cold=False) == 2 * 8 * 20
    rows = []
    for setting in settings(SCALES["miniature"], GROWTH["miniature"]):
        slower = (setting.resolution / 64) ** 2 * setting.processes  # is not fitted
        cost = {
            name: (2e-3 * setting.calls(cold) + 5e-3 * setting.images * (1 + cold) + 0.1) * slower
            for name, cold in (("warm", False), ("cold", True))
        }
        rows.append(Row(setting, cost, 0))
    found, predicted = fit(rows, rows[0].setting)
    np.testing.assert_allclose(found, [2e-3, 5e-3, 0.1], rtol=1e-6)
    np.testing.assert_allclose(predicted[0], rows[0].seconds["warm"])
    assert {row.setting.processes for row in rows} == {1, 2} and len({row.setting for row in rows}) == len(rows)


def test_a_curve_of_bias_counts_the_seconds_of_training_alone(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    from benchmarks.stochastic import read

    with SummaryWriter(tmp_path) as writer:
        for step in range(40):  # of 8 images at 16 images a second: half a second
            writer.add_scalar("speed/images_per_second", 16.0, step)
        for step, bias in ((19, 0.5), (39, 0.25)):
            writer.add_scalar("bias_gender/ema", bias, step)
            writer.add_scalar("bias_gender/floor", 0.125, step)
    assert read(tmp_path) == ([(19, 10.0, 0.5), (39, 20.0, 0.25)], 0.125)


def test_the_authors_targets_are_ours_but_for_what_they_leave_out() -> None:
    from benchmarks.transport import authors_assignment

    probabilities = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).softmax(1).double().numpy()
    cost, shares = transport_cost(probabilities), np.full(4, 0.25)
    counts = enumerate_counts(6, 4)
    exact = mean_assignment(cost, counts, multinomial.pmf(counts, 6, shares))
    found = authors_assignment(cost, shares, seed=0)
    assert 0 < np.abs(found - exact).max() < 0.05


def test_the_table_of_experiments_is_what_the_runs_say(tmp_path: Path, capsys, monkeypatch) -> None:
    from benchmarks import table

    classes = {"gender": ("man", "woman"), "age": ("young", "old")}
    sides = {
        (judge, name, model): summarize_bias(torch.tensor(counts), torch.tensor([0]), classes[name])
        for judge in ("training", "independent")
        for name in classes
        for model, counts in (("original", [[9, 1]]), ("ema", [[6, 4]]))
    }
    target = {"gender": {"man": 0.5, "woman": 0.5}, "age": {"young": 0.75, "old": 0.25}}
    measured = Measured(sides, {("clip_t", "original"): 0.31, ("clip_t", "ema"): 0.3, ("subject_kept", "ema"): 0.99})
    for names in (["age"], ["gender"]):
        found = build_results(names, target, [Prompt("a chef", "chef", "work")], measured)
        found.write(tmp_path / names[0] / "results.json")
        (tmp_path / names[0] / "config.yaml").write_text(f"name: {names[0]}\nseed_everything: 7\n")
    monkeypatch.setattr("sys.argv", ["table", f"mine={tmp_path / 'age'}", str(tmp_path / "gender")])
    table.main()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    low, high = (sides["training", "age", "ema"].low, sides["training", "age", "ema"].high)
    figures = ["0.80 → 0.20", f"{low:.2f} – {high:.2f}"] * 2 + ["0.25", "0.310 → 0.300", "0.990"]
    shares = ["old 0.10 → 0.40, wanted 0.25", "", "old 0.10 → 0.40, wanted 0.25", "", "", "", ""]
    assert lines[2:] == [
        ["mine", "7", "age", *figures],
        ["mine", "7", "frequency of age", *shares],
        ["gender", "7", "gender", *figures],
    ]
    assert {len(cells) for cells in lines} == {len(table.HEAD)}
