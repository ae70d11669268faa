"""The model card of an exported adapter: what it does to which model, its figures, and its limits.

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
    """Facts of a run for its model card, without figures.

    Attributes:
        base: Folder or hub id of the base model.
        attributes: The aligned attributes.
        adapter: The adapter, attached.
        learned_from: Folders or hub ids of the networks that finetuning learned from.
        compares_faces: Whether finetuning compared faces by a face-recognition network.
        uses_insightface: Whether insightface ran the face detector.
    """

    base: str
    attributes: Sequence[str]
    adapter: Adapter
    learned_from: Sequence[str]
    compares_faces: bool
    uses_insightface: bool


def adapter_card(facts: CardFacts, results: Results | None, adapter: Path, scale: float, merged: bool) -> str:
    """Return a model card in Markdown.

    Args:
        facts: Facts of the run.
        results: Results of the run's test; None if it was not tested.
        adapter: Folder of the run's adapter.
        scale: Exported strength, as a factor of the tested one.
        merged: Whether the folder also holds the whole pipeline.
    """
    base, attributes = facts.base, ", ".join(facts.attributes)
    kind = "lora" if any(isinstance(part, LoRA) for part in facts.adapter.parts) else "textual_inversion"
    front = ["library_name: diffusers", "pipeline_tag: text-to-image", f"tags: [fairness, {kind}]"]
    front += ["license: other", "license_name: of-its-parts"]
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
        "## Licenses\n\n" + licenses(facts),
    ]
    return "\n\n".join(parts) + "\n"


def usage(adapter: Adapter, base: str, merged: bool) -> str:
    """Return how other programs load the adapter."""
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
    paragraphs = ["```python\n" + "\n".join(lines) + "\n```"]
    if lora:
        paragraphs.append("ComfyUI and AUTOMATIC1111 read `kohya.safetensors`.")
    if prefixes:
        paragraphs.append(f"Every prompt except the negative one starts with `{prefixes[0].token}`.")
    if merged:
        paragraphs.append("`merged/` is the whole pipeline with the adapter merged into its weights.")
    return "\n\n".join(paragraphs)


def figures(results: Results | None, adapter: Path, scale: float) -> str:
    """Return the run's figures in tables, with a note if they are not those of this adapter."""
    if results is None:
        return "The run was not tested: its bias is unknown."
    target = "; ".join(
        f"{name} " + ", ".join(f"{label} {share:.2f}" for label, share in results.target[name].items())
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
            "| attribute | classifier | base model | finetuned model | 95 % interval | floor |",
            "|---|---|---|---|---|---|",
        ]
        rows += ["", "Distance of a prompt from its unequal target (total variation):", "", *head, *far]
    kept = ["| kept | base model | finetuned model |", "|---|---|---|"]
    for measure, models in results.kept.items():
        kept.append(f"| {measure} | {number(models.get('original'), 3)} | {number(models.get('ema'), 3)} |")
    step = int(adapter.parent.name[5:])
    other = [f"after {step} steps"] * (step != results.run.steps) + ["not averaged"] * (adapter.name != "ema")
    other += [f"at scale {scale:g}"] * (scale != 1)
    note = f"\n\n**These are not the figures of this adapter, which is {' and '.join(other)}.**" if other else ""
    return (
        f"On {len(results.run.test_prompts)} test prompts with {images} images each, of the averaged adapter "
        f"after {results.run.steps} steps; "
        f"target: {target}.{note}\n\n"
        + "\n".join(rows)
        + "\n\nBias is the mean absolute difference between the frequencies of two classes, averaged over prompts (± "
        "over prompts), against equal shares. "
        "The floor is what a perfectly fair model would score with as many images, the maximum what one scores that "
        "shows one class alone. *Training* is the classifier that the adapter learned from, *independent* one that it "
        "never saw.\n\n" + "\n".join(kept)
    )


def distance_rows(results: Results) -> list[str]:
    """Return how far prompts are from unequal targets, one row for each attribute and classifier."""
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
    """Return what the figures do not say."""
    shares = [
        f"{number(models['original'].share)} before and {number(models['ema'].share)} after "
        f"({name}, {classifier} classifier)"
        for classifier, seen in (results.prompt_adherence if results else {}).items()
        for name, models in seen.items()
    ]
    followed = f"a share of the images did: {'; '.join(shares)}" if shares else "this was not measured here"
    return f"""\
- Attributes are *perceived*: classifiers read them from images, in few classes. They say nothing about any person.
- Figures hold for the run's prompts, sampler and classifiers. Other prompts and other classifiers may differ.
- Images should keep following prompts that name an attribute; {followed}.
- Balanced images do not make a use of images fair."""


def licenses(facts: CardFacts) -> str:
    """Return which licenses apply."""
    sentences = [f"The license of the base model, `{facts.base}`, applies to this adapter."]
    if named := ", ".join(f"`{path}`" for path in facts.learned_from):
        sentences.append(f"Finetuning learned from {named}, whose own licenses apply.")
    if facts.compares_faces:
        sentences.append(
            "Finetuning compared faces by a face-recognition network, whose license may be non-commercial."
        )
    if facts.uses_insightface:
        sentences.append(
            "A detector that insightface runs found the faces; the weights that insightface distributes are for "
            "non-commercial research only."
        )
    return " ".join(sentences)
