"""Tables and figures of the diagnosis of gradients."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairness_dft.sampling.diagnosis import GradientStatistics

PARTS = {
    "exact": "|k_t B_t ∂ε_t/∂θ|, exact",
    "detached": "|k_t ∂ε_t/∂θ|, steps detached",
    "bare": "|∂ε_t/∂θ|, without the solver's weight",
}
BUDGET = 8  # every path gets the cost of this many gradients through all steps


def paths_row(name: str, statistics: GradientStatistics, cost: float, steps: int) -> dict[str, Any]:
    """Return the figures of one gradient path.

    Args:
        name: Name of the path.
        statistics: Its gradients' statistics.
        cost: Network passes of one gradient.
        steps: Number of sampling steps.
    """
    return {
        "path": name,
        "norm": statistics.norm,
        "deviation": statistics.deviation,
        "relative_variance": statistics.relative_variance,
        "alignment": statistics.alignment(),
        "passes": cost,
        "alignment_at_equal_cost": statistics.alignment(BUDGET * 2 * steps / cost),
    }


def print_paths(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of gradient paths."""
    from rich.console import Console
    from rich.table import Table

    table = Table("gradient", "norm ± deviation", "noise / signal", "cosine", "passes", "cosine at equal cost")
    for row in rows:
        table.add_row(
            row["path"],
            f"{row['norm']:.3g} ± {row['deviation']:.2g}",
            f"{row['relative_variance']:.3g}",
            f"{row['alignment']:.2f}",
            f"{row['passes']:g}",
            f"{row['alignment_at_equal_cost']:.2f}",
        )
    console = Console()
    console.print(table)
    console.print(
        "cosine: between the gradients of two independent batches; at equal cost: between means of as many gradients "
        f"as cost the network passes of {BUDGET} gradients through all steps",
        style="dim",
    )


def draw_steps(file: Path, rows: Sequence[Sequence[float]], prompt: str) -> None:
    """Draw the three norms against t, each with the band between the 10th and 90th percentile over noises."""
    figure, axes = canvas()
    table = np.array(rows)
    timesteps = np.unique(table[:, 1])
    for column, label in enumerate(PARTS.values(), start=3):
        values = np.stack([table[table[:, 1] == t, column] for t in timesteps])
        middle, (low, high) = np.median(values, 1), np.percentile(values, (10, 90), axis=1)
        (line,) = axes.plot(timesteps, middle, marker="o", markersize=3, label=label)
        axes.fill_between(timesteps, low, high, color=line.get_color(), alpha=0.2)
    axes.set(xlabel="timestep t (noise on the right)", ylabel="norm of the gradient of θ", yscale="log")
    axes.set_title(f"The part of each sampling step\n{prompt}", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


def draw_paths(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw how well independent gradients of each path agree: of one batch, and at the same cost."""
    figure, axes = canvas()
    places = np.arange(len(rows))
    for shift, key, label in ((-0.2, "alignment", "one batch"), (0.2, "alignment_at_equal_cost", "at equal cost")):
        axes.barh(places + shift, [row[key] for row in rows], 0.4, label=label)
    axes.set_yticks(places, [row["path"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="cosine between gradients of independent batches", xlim=(0, 1))
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


def canvas() -> tuple[Any, Any]:
    """Return a figure with axes, without a screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes
