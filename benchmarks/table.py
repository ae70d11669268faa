"""README's table of experiments, from the runs themselves.

    python -m benchmarks.table runs/gender_race/version_0 runs/gender_race_age/version_0 …

A row for each run, aligned attribute and concept, in Markdown; of two classes with an unequal target also frequencies.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from fairness_dft.reports.results import AttributeResult, Results
from fairness_dft.reports.tables import number

HEAD = (
    "run",
    "seed",
    "bias of",
    "training",
    "95 % interval",
    "independent",
    "95 % interval",
    "floor",
    "CLIP-T",
    "kept",
)


def rows(folder: Path, name: str | None = None) -> Iterator[list[str]]:
    """The rows of a run.

    Args:
        folder: of the run, with results.json and config.yaml.
        name: what to call it; its experiment's name by default.
    """
    results = Results.read(folder / "results.json")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    run, clip, kept = [name or config["name"], str(config["seed_everything"])], *kept_figures(results.kept)
    for concept, classifiers in {"": results.bias, **results.concepts}.items():
        for attribute in results.aligned:
            both = [classifiers[classifier][attribute] for classifier in ("training", "independent")]
            label = f"{concept}: {attribute}" if concept else attribute
            floor = number(both[0].last.floor)
            yield [*run, label, *biases(both[0]), *biases(both[1]), floor, clip, kept]
            if not concept and (shares := unequal(results.target[attribute], both)):
                yield [*run, f"frequency of {attribute}", shares[0], "", shares[1], "", "", "", ""]


def biases(result: AttributeResult) -> tuple[str, str]:
    """Return the bias before and after, and the interval of the latter."""
    before, after = result.original, result.last
    return f"{number(before.bias)} → {number(after.bias)}", f"{number(after.low)} – {number(after.high)}"


def unequal(target: Mapping[str, float], both: Sequence[AttributeResult]) -> list[str]:
    """Return how often each classifier sees the rarer wanted one of two classes; empty for equal shares or more."""
    if len(target) != 2 or len(set(target.values())) == 1:
        return []
    wanted = min(target, key=lambda label: target[label])
    cells = []
    for result in both:
        index = result.classes.index(wanted)
        shares = [side.frequencies[index] for side in (result.original, result.last)]
        cells.append(f"{wanted} {number(shares[0])} → {number(shares[1])}, wanted {number(target[wanted])}")
    return cells


def kept_figures(kept: Mapping[str, Mapping[str, float | None]]) -> tuple[str, str]:
    """Return CLIP-T before and after, and the share of images with the same subject."""
    clip = " → ".join(number(kept["clip_t"].get(model), 3) for model in ("original", "ema"))
    return clip, number(kept.get("subject_kept", {}).get("ema"), 3)


def line(cells: list[str] | tuple[str, ...]) -> str:
    """A row in Markdown."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table of the runs that the command line names, each as FOLDER or NAME=FOLDER."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, each alone or as NAME=FOLDER")
    print(line(HEAD), line(["---"] * len(HEAD)), sep="\n")
    for run in parser.parse_args().runs:
        name, _, folder = run.rpartition("=")
        for row in rows(Path(folder), name or None):
            print(line(row))


if __name__ == "__main__":
    main()
