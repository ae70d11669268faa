"""What a run leaves behind: the before/after picture, results.json, and a table in the terminal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fairness_dft.attributes import TIMES
from fairness_dft.results import rows_of, without_face

# Okabe and Ito's palette, which colour-blind readers can tell apart, and grey for "no face".
PALETTE = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
NO_FACE = "#9A9A9A"
TITLES = {"original": "before", "ema": "after", "trained": "after (not averaged)"}
TILE, BAR, GAP, MARGIN = 72, 8, 2, 24


@dataclass(frozen=True)
class GridSide:
    """One model's images of a prompt, and what a judge sees in them.

    Attributes:
        images: with shape (n, 3, H, W), in [0, 1].
        classes: the class of each image by each of the A attributes, int64 with shape (n, A); any value where there
            is no `face`.
        face: whether an image shows a face, bool with shape (n,).
    """

    images: Tensor
    classes: Tensor
    face: Tensor


@dataclass
class GridRow:
    """One prompt of a before/after picture.

    Attributes:
        prompt: the text.
        sides: what each model made of it, by the model's name.
    """

    prompt: str
    sides: dict[str, GridSide] = field(default_factory=dict)


def comparison_grid(rows: Sequence[GridRow], classes: Mapping[str, Sequence[str]]) -> Image.Image:
    """Draw prompts in rows, one block of images a model, ordered by class, each class with its coloured bar.

    Args:
        rows: the prompts, all with the same models and numbers of images.
        classes: the class names of each attribute, which has a bar and a line of the legend each.
    """
    models = list(rows[0].sides)
    count = len(rows[0].sides[models[0]].face)
    columns = (count + 1) // 2
    block = columns * (TILE + GAP)
    row_height = 22 + 2 * (TILE + BAR * len(classes) + GAP) + 10
    head = 62 + 22 * len(classes)
    width = max(MARGIN * (len(models) + 1) + block * len(models), *_text_widths(rows, classes))
    size = (width, head + 12 + row_height * len(rows))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for side, model in enumerate(models):
        left = MARGIN + side * (block + MARGIN)
        if len(models) > 1:  # one alone is neither before nor after
            pen.text((left, 14), TITLES.get(model, model), fill="black", font=_font(22))
        for number, row in enumerate(rows):
            top = head + number * row_height
            if side == 0:
                pen.text((left, top), row.prompt, fill="#333333", font=_font(14))
            _paste_block(canvas, pen, row.sides[model], left, top + 22, columns)
    for line, (attribute, names) in enumerate(classes.items()):
        _legend(pen, attribute, names, (MARGIN, 50 + 22 * line))
    return canvas


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
    if content["obedience"]:
        console.print(obedience_table(content))
    kept = Table(title="What was kept")
    for column in ("measure", "before", "after"):
        kept.add_column(column, justify="left" if column == "measure" else "right")
    for measure, models in content["kept"].items():
        kept.add_row(measure, number(models.get("original"), 3), number(models.get("ema"), 3))
    faces = next(iter(next(iter(content["bias"].values())).values()))
    without = (without_face(faces[model]) if model in faces else None for model in ("original", "ema"))
    kept.add_row("without a face", *(number(share, 3) for share in without))
    console.print(kept)


def obedience_table(content: dict) -> Table:
    """Whether images show what their prompts name."""
    table = Table(title="Images that show what their prompt names")
    for column in ("attribute", "judge", "before", "after", "images"):
        left = column in ("attribute", "judge")
        table.add_column(column, justify="left" if left else "right")
    for judge, seen in content["obedience"].items():
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


def _paste_block(
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    side: GridSide,
    left: int,
    top: int,
    columns: int,
) -> None:
    classes = [row.tolist() if face else [None] * len(row) for row, face in zip(side.classes, side.face, strict=True)]
    order = sorted(range(len(classes)), key=lambda i: (not side.face[i], classes[i] if side.face[i] else [], i))
    bars = BAR * side.classes.shape[1]
    for place, i in enumerate(order):
        x = left + place % columns * (TILE + GAP)
        y = top + place // columns * (TILE + bars + GAP)
        pixels = (side.images[i].permute(1, 2, 0) * 255).round().byte().numpy()
        canvas.paste(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC), (x, y))
        for bar, index in enumerate(classes[i]):
            y_bar = y + TILE + bar * BAR
            pen.rectangle((x, y_bar, x + TILE + GAP - 1, y_bar + BAR - 3), fill=_colour(index))


def _legend(pen: ImageDraw.ImageDraw, attribute: str, classes: Sequence[str], place: tuple[int, int]) -> None:
    x, y = place
    pen.text((x, y), f"perceived {attribute}:", fill="#333333", font=_font(15))
    x += 20 + round(pen.textlength(f"perceived {attribute}:", font=_font(15)))
    for index, name in [*enumerate(classes), (None, "no face")]:
        pen.rectangle((x, y + 2, x + 14, y + 16), fill=_colour(index))
        pen.text((x + 20, y), name, fill="#333333", font=_font(15))
        x += 44 + round(pen.textlength(name, font=_font(15)))


def _text_widths(rows: Sequence[GridRow], classes: Mapping[str, Sequence[str]]) -> list[int]:
    """How wide a picture must be for its legends and prompts."""
    prompts = [2 * MARGIN + math.ceil(_font(14).getlength(row.prompt)) for row in rows]
    legends = [
        MARGIN
        + 20
        + sum(44 + math.ceil(_font(15).getlength(text)) for text in (f"perceived {name}:", *names, "no face"))
        for name, names in classes.items()
    ]
    return [*prompts, *legends]


def _colour(index: int | None) -> str:
    return NO_FACE if index is None else PALETTE[index % len(PALETTE)]


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
