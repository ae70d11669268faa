"""The model card of an exported adapter: what it does to which model, by which figures, and what not to expect.

References:
    Model Cards for Model Reporting (Mitchell et al., 2019), https://arxiv.org/abs/1810.03993
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fairness_dft.adapters.base import Adapter
from fairness_dft.adapters.lora import LoRA
from fairness_dft.adapters.prompt_prefix import PromptPrefix
from fairness_dft.files import resolve
from fairness_dft.reports.results import Results
from fairness_dft.reports.tables import number

PAPER = "[Finetuning Text-to-Image Diffusion Models for Fairness](https://arxiv.org/abs/2311.07604) (Shen et al., 2024)"


@dataclass(frozen=True)
class CardFacts:
    """What a model card says of a run besides its figures.

    Attributes:
        base: folder or hub id of the base model.
        attributes: what was aligned.
        adapter: the adapter, attached.
        learned_from: folders or hub ids of the networks that finetuning learned from.
        compares_faces: whether finetuning compared faces by a face-recognition network.
        uses_insightface: whether a detector that insightface runs found the faces.
    """

    base: str
    attributes: Sequence[str]
    adapter: Adapter
    learned_from: Sequence[str]
    compares_faces: bool
    uses_insightface: bool


def adapter_card(facts: CardFacts, results: Results | None, adapter: Path, scale: float, merged: bool) -> str:
    """A model card in Markdown.

    Args:
        facts: what was finetuned, and with what.
        results: what the run measured; None if it was not tested.
        adapter: the folder of the run's adapter.
        scale: the strength that was exported, as a factor of what the run tested.
        merged: whether the whole pipeline lies beside the adapter.
    """
    base, attributes = facts.base, ", ".join(facts.attributes)
    kind = "lora" if any(isinstance(part, LoRA) for part in facts.adapter.parts) else "textual_inversion"
    front = ["library_name: diffusers", "pipeline_tag: text-to-image", f"tags: [fairness, {kind}]"]
    front += ["license: other", "license_name: of-its-parts"]  # told below
    if not resolve(base).exists():
        front.append(f"base_model: {base}")
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {base}, aligned in perceived {attributes}",
        f"An adapter for `{base}`, made by fairness_dft with the method of {PAPER}. It changes whom prompts show "
        f"that leave it open, so that the frequencies of perceived {attributes} follow a target. Exported from step "
        f"{int(adapter.parent.name[5:])}, `{adapter.name}`.",
        "## Use\n\n" + usage(facts.adapter, base, merged),
        "## Figures\n\n" + figures(results, adapter, scale),
        "## Limits\n\n" + limits(results),
        "## Licences\n\n" + licences(facts),
    ]
    return "\n\n".join(parts) + "\n"


def usage(adapter: Adapter, base: str, merged: bool) -> str:
    """How other programs load it."""
    lines = [
        "from diffusers import StableDiffusionPipeline",
        "",
        f'pipeline = StableDiffusionPipeline.from_pretrained("{base}")',
    ]
    prefixes = [part for part in adapter.parts if isinstance(part, PromptPrefix)]
    lora = any(isinstance(part, LoRA) for part in adapter.parts)
    if lora:
        lines.append(f'pipeline.load_lora_weights("THIS_FOLDER", weight_name="{LoRA.file}")')
    lines += [f'pipeline.load_textual_inversion("THIS_FOLDER", weight_name="{PromptPrefix.file}")'] * bool(prefixes)
    prompt = f"{prefixes[0].token} a photo of a doctor" if prefixes else "a photo of a doctor"
    lines.append(f'image = pipeline("{prompt}").images[0]')
    told = ["```python\n" + "\n".join(lines) + "\n```"]
    if lora:
        told.append("ComfyUI and AUTOMATIC1111 read `kohya.safetensors`.")
    if prefixes:
        told.append(f"Every prompt but the negative one starts with `{prefixes[0].token}`.")
    if merged:
        told.append("`merged/` is the whole pipeline, the adapter already in it.")
    return "\n\n".join(told)


def figures(results: Results | None, adapter: Path, scale: float) -> str:
    """What the run measured, in tables, and whether it measured this adapter."""
    if results is None:
        return "The run was not tested: nothing is known of its bias."
    target = "; ".join(
        f"{name} " + ", ".join(f"{kind} {share:.2f}" for kind, share in results.target[name].items())
        for name in results.attributes
    )
    if own := len(results.own_targets):
        target += f" ({own} of the prompts have targets of their own)"
    first = next(iter(next(iter(results.bias.values())).values())).original
    images = sum(first.counts[0]) + first.no_face[0]
    rows = ["| attribute | classifier | base model | finetuned model | 95 % interval | floor | maximum |"]
    rows.append("|---|---|---|---|---|---|---|")
    for classifier, seen in results.bias.items():
        for name, result in seen.items():
            after = result.last
            cells = [f"{number(side.bias)} ± {number(side.spread)}" for side in (result.original, after)]
            cells += [f"{number(after.low)} – {number(after.high)}", number(after.floor), number(result.maximum)]
            rows.append(f"| {name} | {classifier} | {' | '.join(cells)} |")
    if far := distance_rows(results):
        head = [
            "| attribute | classifier | distance before | after | 95 % interval | floor |",
            "|---|---|---|---|---|---|",
        ]
        rows += ["", "From unequal targets, the distance of a prompt (total variation):", "", *head, *far]
    kept = ["| kept | before | after |", "|---|---|---|"]
    for measure, models in results.kept.items():
        kept.append(f"| {measure} | {number(models.get('original'), 3)} | {number(models.get('ema'), 3)} |")
    step = int(adapter.parent.name[5:])
    other = [f"after {step} steps"] * (step != results.run.steps) + ["not averaged"] * (adapter.name != "ema")
    other += [f"at scale {scale:g}"] * (scale != 1)
    note = f"\n\n**They are not this adapter's, which is {' and '.join(other)}.**" if other else ""
    return (
        f"On {len(results.run.test_prompts)} test prompts with {images} images each, of the averaged adapter "
        f"after {results.run.steps} steps; "
        f"target: {target}.{note}\n\n"
        + "\n".join(rows)
        + "\n\nBias is the mean absolute difference between the frequencies of two classes, averaged over prompts (± "
        "over prompts), against equal shares. "
        "The floor is what a perfectly fair model would score with as many images. *Training* is the "
        "classifier that the adapter learned from, *independent* one that it never saw.\n\n" + "\n".join(kept)
    )


def distance_rows(results: Results) -> list[str]:
    """How far prompts are from unequal targets, a row for each attribute and classifier."""
    rows = []
    for classifier, seen in results.bias.items():
        for name, result in seen.items():
            before, after = result.original.distance, result.last.distance
            if result.measure == "distance" and before and after:
                low, high = after.total_variation_by_prompt_low, after.total_variation_by_prompt_high
                cells = [number(side.total_variation_by_prompt) for side in (before, after)]
                cells += [f"{number(low)} – {number(high)}", number(after.total_variation_by_prompt_floor)]
                rows.append(f"| {name} | {classifier} | {' | '.join(cells)} |")
    return rows


def limits(results: Results | None) -> str:
    """What the figures do not say."""
    shares = [
        f"{number(models['original'].share)} before and {number(models['ema'].share)} after "
        f"({name}, {classifier} classifier)"
        for classifier, seen in (results.prompt_adherence if results else {}).items()
        for name, models in seen.items()
    ]
    obeyed = f"it was in a share of the pictures of {'; '.join(shares)}" if shares else "this was not measured here"
    return f"""\
- The attributes are *perceived* ones, as classifiers read pictures, in few classes; they say nothing about any person.
- Figures hold for the run's prompts, sampler and classifiers. Other prompts, and other classifiers, may differ.
- A prompt that names an attribute should still be obeyed; {obeyed}.
- Balanced pictures do not make a use of pictures fair."""


def licences(facts: CardFacts) -> str:
    """What holds for the parts that went in."""
    told = [f"The licence of the base model, `{facts.base}`, holds for what is made from it."]
    if named := ", ".join(f"`{path}`" for path in facts.learned_from):
        told.append(f"Finetuning learned from {named}, whose own licences say what may be made with them.")
    if facts.compares_faces:
        told.append("Finetuning compared faces by a face-recognition network, whose licence may be non-commercial.")
    if facts.uses_insightface:
        told.append(
            "Faces were found by a detector that insightface runs; the weights which insightface itself distributes "
            "are for non-commercial research only."
        )
    return " ".join(told)
