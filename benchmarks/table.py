"""README's table of experiments, from the runs themselves.

    python -m benchmarks.table runs/gender_race/version_0 runs/gender_race_age/version_0 …

A row for each run, aligned attribute and concept, in Markdown; of two classes with an unequal target also frequencies.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fairness_dft.attributes import TIMES
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
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    run, clip, kept = [name or config["name"], str(config["seed_everything"])], *kept_figures(content["kept"])
    aligned = dict.fromkeys((TIMES.join(content["attributes"]), *content["attributes"]))
    for concept, judges in {"": content["bias"], **content["concepts"]}.items():
        for attribute in aligned:
            models = [judges[judge][attribute] for judge in ("training", "independent")]
            what = f"{concept}: {attribute}" if concept else attribute
            last = models[0]["ema"]
            yield [*run, what, *biases(models[0]), *biases(models[1]), number(last["floor"]), clip, kept]
            if not concept and (shares := unequal(content["target"][attribute], models)):
                yield [*run, f"frequency of {attribute}", shares[0], "", shares[1], "", "", "", ""]


def biases(models: Mapping[str, Any]) -> tuple[str, str]:
    """Bias before and after, and the interval of the latter."""
    before, after = models["original"], models["ema"]
    return f"{number(before['bias'])} → {number(after['bias'])}", f"{number(after['low'])} – {number(after['high'])}"


def unequal(target: Mapping[str, float], models: list[Mapping[str, Any]]) -> list[str]:
    """How often the rarer wanted one of two classes was seen, by both judges; nothing of equal ones, or of more."""
    if len(target) != 2 or len(set(target.values())) == 1:
        return []
    wanted = min(target, key=target.get)
    told = []
    for of in models:
        shares = [side["frequencies"][side["classes"].index(wanted)] for side in (of["original"], of["ema"])]
        told.append(f"{wanted} {number(shares[0])} → {number(shares[1])}, wanted {number(target[wanted])}")
    return told


def kept_figures(kept: Mapping[str, Any]) -> tuple[str, str]:
    """CLIP-T before and after, and the share of images with the same subject."""
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
