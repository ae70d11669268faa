"""Results as tables in the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from fairness_dft.attributes import TIMES
from fairness_dft.reports.results import no_face_share, rows_of

TITLES = {"original": "before", "ema": "after", "trained": "after (not averaged)"}


def print_results(content: dict, console: Console | None = None) -> None:
    """Print the results as short tables: bias before and after, by concept too, frequencies, and what was kept."""
    console = console or Console()
    table = Table(
        title=f"Bias on the test prompts (perceived attributes; aligned: {', '.join(content['attributes'])})",
        caption="bias is against equal shares, whatever the target",
    )
    for column in ("attribute", "judge", "before", "after", "95 % int.", "floor", "drift"):
        left = column in ("attribute", "judge")
        table.add_column(column, no_wrap=column != "attribute", justify="left" if left else "right")
    for judge, name, models in rows_of(content):
        before, after = models["original"], models.get("ema")
        last = after or before
        table.add_row(
            name.replace(TIMES, f" {TIMES} "),  # where it may be broken
            judge,
            *map(_with_spread, (before, after)),
            f"{number(last['low'])}–{number(last['high'])}",
            number(last["floor"]),
            number(models.get("drift")),
        )
    if table.row_count:
        console.print(table)
    if content["concepts"]:
        console.print(concept_table(content))
    if any(models["measure"] != "bias" for seen in content["bias"].values() for models in seen.values()):
        console.print(distance_table(content))
    if table.row_count:
        console.print(frequency_table(content))
    if content["prompt_adherence"]:
        console.print(adherence_table(content))
    kept = Table(title="What was kept")
    for column in ("measure", "before", "after"):
        kept.add_column(column, justify="left" if column == "measure" else "right")
    for measure, models in content["kept"].items():
        kept.add_row(measure, number(models.get("original"), 3), number(models.get("ema"), 3))
    faces = next(iter(next(iter(content["bias"].values())).values()))
    without = (no_face_share(faces[model]) if model in faces else None for model in ("original", "ema"))
    kept.add_row("without a face", *(number(share, 3) for share in without))
    console.print(kept)


def adherence_table(content: dict) -> Table:
    """Whether images show what their prompts name."""
    table = Table(title="Images that show what their prompt names")
    for column in ("attribute", "judge", "before", "after", "images"):
        left = column in ("attribute", "judge")
        table.add_column(column, justify="left" if left else "right")
    for judge, seen in content["prompt_adherence"].items():
        for name, models in seen.items():
            shares = (number(models.get(model, {}).get("share"), 3) for model in ("original", "ema"))
            table.add_row(name, judge, *shares, str(models["original"]["images"]))
            for kind in models["original"]["classes"] if len(models["original"]["classes"]) > 1 else ():
                of = [models[model]["classes"][kind] for model in ("original", "ema") if model in models]
                shares = [number(side["share"], 3) for side in of] + ["–"] * (2 - len(of))
                table.add_row(f"  {kind}", judge, *shares, str(of[0]["images"]))
    return table


def concept_table(content: dict) -> Table:
    """The bias of the aligned attributes, and of their product, on the prompts of each concept."""
    table = Table(title="Bias by concept", caption="bias is against equal shares, whatever the target; ± over prompts")
    aligned = dict.fromkeys((TIMES.join(content["attributes"]), *content["attributes"]))
    for column in ("concept", "attribute", "judge", "before", "after", "95 % int.", "floor"):
        left = column in ("concept", "attribute", "judge")
        table.add_column(column, no_wrap=not left, justify="left" if left else "right")
    for concept, judges in content["concepts"].items():
        for name in aligned:
            for judge, seen in judges.items():
                if name in seen:
                    before, after = seen[name]["original"], seen[name].get("ema")
                    last = after or before
                    interval = f"{number(last['low'])}–{number(last['high'])}"
                    biases = map(_with_spread, (before, after))
                    label = name.replace(TIMES, f" {TIMES} ")
                    table.add_row(concept, label, judge, *biases, interval, number(last["floor"]))
    return table


def distance_table(content: dict) -> Table:
    """How far prompts are from targets of unequal shares."""
    table = Table(title="Distance of a prompt from its target", caption="total variation, averaged over prompts")
    for column in ("aligned", "judge", "before", "after", "floor"):
        table.add_column(column, justify="left" if column in ("aligned", "judge") else "right")
    for judge, seen in content["bias"].items():
        for name, models in seen.items():
            if models["measure"] != "bias":
                found = [models.get(model, {}).get("distance", {}) for model in ("original", "ema")]
                shown = [number(side.get("total_variation_by_prompt")) for side in found]
                floor = (found[1] or found[0])["total_variation_by_prompt_floor"]
                table.add_row(name.replace(TIMES, f" {TIMES} "), judge, *shown, number(floor))
    return table


def frequency_table(content: dict) -> Table:
    """How often each class of the aligned attributes was seen, beside its target."""
    others = len(content["own_targets"])
    caption = f"prompts with targets of their own: {others}" if others else None
    table = Table(title="Frequencies on the test prompts, each attribute by itself", caption=caption)
    for column in ("aligned", "class", "judge", "target", "before", "after"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("aligned", "class", "judge") else "right")
    for name in content["attributes"]:
        for judge, seen in content["bias"].items():
            if name in seen:
                # By name: another judge may have its classes in another order.
                before, after = (
                    dict(zip(side["classes"], side["frequencies"], strict=True)) if side else {}
                    for side in (seen[name]["original"], seen[name].get("ema"))
                )
                for shown, share in content["target"][name].items():
                    table.add_row(name, shown, judge, *map(number, (share, before.get(shown), after.get(shown))))
    return table


def _with_spread(side: Mapping[str, Any] | None) -> str:
    return f"{number(side['bias'])}±{number(side['spread'])}" if side else "–"


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"
