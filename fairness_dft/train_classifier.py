"""Train an attribute classifier: `python -m fairness_dft.train_classifier`.

One network, any image classifier of Hugging Face, has a head for each attribute (`gender/man`, `gender/woman`, …). The
best step of the validation is kept, calibrated and tested, and saved in Hugging Face's layout with a model card.

References:
    On Calibration of Modern Neural Networks (Guo et al., 2017), https://arxiv.org/abs/1706.04599
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix
from typing_extensions import override

from fairness_dft.cli import OneLineCLI, run_main
from fairness_dft.labelled_faces import SPLITS, UNKNOWN, LabelledFaces
from fairness_dft.loading import on_hub, quiet, resolve
from fairness_dft.preprocessing import Preprocessing

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
BEST = {"monitor": "validation/balanced_accuracy", "mode": "max", "filename": "best", "save_weights_only": True}
Batch = tuple[Tensor, dict[str, Tensor]]


class ClassifierTraining(LightningModule):
    """Trains a classifier with one head for each attribute.

    Args:
        backbone: hub id or folder of an `AutoModelForImageClassification`; from a folder that holds a config.json
            alone, or where `pretrained` is false, it starts with random weights.
        pretrained: whether to start from the backbone's weights.
        learning_rate: of AdamW; it rises over the first 3 % of the steps and then falls to zero as a cosine.
        weight_decay: of AdamW.
        balance: weigh each class by its rarity, so that all classes of a head count alike.
        smoothing: of the labels, in [0, 1).
        noise: largest standard deviation of the noise that is added to pictures, which are in [0, 1]. Under noise a
            classifier's gradient follows what is seen rather than single pixels (Santurkar et al., 2019,
            https://arxiv.org/abs/1906.09453), and finetuning learns from that gradient.
    """

    def __init__(
        self,
        backbone: str = "microsoft/resnet-50",
        pretrained: bool = True,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.05,
        balance: bool = True,
        smoothing: float = 0.0,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= smoothing < 1 or noise < 0:
            raise ValueError(f"`smoothing` must be in [0, 1) and `noise` not negative, but got {smoothing} and {noise}")
        self.backbone, self.pretrained = backbone, pretrained
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.balance, self.smoothing, self.noise = balance, smoothing, noise

    def load(self, data: LabelledFaces) -> None:
        """Load the backbone with new heads for a data set, and tell the data set at which size it sees pictures.

        Raises:
            ValueError: if the backbone cannot be loaded.
        """
        import kornia.augmentation as K
        from transformers import AutoConfig, AutoModelForImageClassification

        self.heads = data.heads
        labels = [f"{head}/{name}" for head, classes in self.heads.items() for name in classes]
        folder = resolve(self.backbone)
        source = str(folder) if folder.is_dir() else self.backbone
        options: dict[str, Any] = {"local_files_only": folder.is_dir() or not on_hub(self.backbone)}
        bare = folder.is_dir() and not any(folder.glob("*.safetensors"))
        settings = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        try:
            with quiet():
                config = AutoConfig.from_pretrained(source, **options, **settings)
                if bare or not self.pretrained:
                    self.network = AutoModelForImageClassification.from_config(config)
                else:
                    self.network = AutoModelForImageClassification.from_pretrained(
                        source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, **options
                    )
        except Exception as error:  # each file format raises its own
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise ValueError(
                f"--model.backbone: {self.backbone!r} could not be loaded ({reason}): give an image classifier of the "
                "Hugging Face hub where the network can be reached, or a local folder"
            ) from error
        self.network.train()  # loaded networks are in evaluation mode
        self.preparation = preparation(source, config, options)
        side = self.preparation["size"]["height"]
        data.size = side
        self.prepare = Preprocessing((side, side), self.preparation["image_mean"], self.preparation["image_std"])
        self.augment = K.AugmentationSequential(
            K.RandomHorizontalFlip(p=0.5),
            K.RandomAffine(degrees=10, translate=(0.05, 0.05), scale=(0.9, 1.1), padding_mode="border", p=1.0),
            K.ColorJiggle(0.2, 0.2, 0.2, 0.02, p=1.0),
        )
        self.weights = nn.ParameterDict(
            {head: nn.Parameter(w, requires_grad=False) for head, w in self.class_weights(data).items()}
        )
        self.confusion = nn.ModuleDict(
            {
                head: MulticlassConfusionMatrix(len(classes), ignore_index=UNKNOWN)
                for head, classes in self.heads.items()
            }
        )
        self.calibration = nn.ModuleDict(
            {head: MulticlassCalibrationError(len(c), 15, ignore_index=UNKNOWN) for head, c in self.heads.items()}
        )

    def class_weights(self, data: LabelledFaces) -> dict[str, Tensor]:
        """For each head the weights of its classes: mean one over the training pictures if balanced, all one if not."""
        weights = {}
        for head, classes in self.heads.items():
            counts = Counter(picture.labels[head] for picture in data.pictures["train"])
            counts.pop(UNKNOWN, None)
            if lacking := [classes[i] for i in range(len(classes)) if not counts[i]]:
                raise ValueError(f"--data: the split train has no picture of {head} {lacking[0]!r}")
            total = sum(counts.values())
            rarity = [total / (len(classes) * counts[i]) if self.balance else 1.0 for i in range(len(classes))]
            weights[head] = torch.tensor(rarity)
        return weights

    def logits(self, pixels: Tensor) -> dict[str, Tensor]:
        """Logits of each head, for pictures as floats in [0, 1]."""
        parts = self.network(self.prepare(pixels)).logits.split([len(classes) for classes in self.heads.values()], 1)
        return dict(zip(self.heads, parts, strict=True))

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        pixels, labels = self.augment(batch[0].float() / 255), batch[1]
        if self.noise:
            spread = self.noise * torch.rand(len(pixels), 1, 1, 1, device=pixels.device)
            pixels = pixels + spread * torch.randn_like(pixels)
        losses = [
            head_loss(logits, labels[head], self.weights[head], self.smoothing)
            for head, logits in self.logits(pixels).items()
        ]
        loss = sum(losses)
        self.log("loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.watch(batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.watch(batch)

    def watch(self, batch: Batch) -> None:
        """Count what the classifier says of a batch."""
        for head, logits in self.logits(batch[0].float() / 255).items():
            self.confusion[head].update(logits, batch[1][head])
            self.calibration[head].update(logits.softmax(1), batch[1][head])

    @override
    def on_validation_epoch_end(self) -> None:
        figures = self.figures()
        for head, values in figures.items():
            self.log(f"validation/{head}", values["balanced_accuracy"], prog_bar=True, sync_dist=True)
        mean = sum(values["balanced_accuracy"] for values in figures.values()) / len(figures)
        self.log("validation/balanced_accuracy", mean, sync_dist=True)

    @override
    def on_test_epoch_end(self) -> None:
        self.tested = self.figures()

    def figures(self) -> dict[str, dict[str, Any]]:
        """What was counted, which then starts anew; for each head:

        Returns:
            `confusion` (rows: labels, columns: verdicts), `recall` of each class and their mean `balanced_accuracy`,
            `accuracy`, and `calibration_error` (expected calibration error, 15 bins), in [0, 1].
        """
        figures = {}
        for head, classes in self.heads.items():
            counts = self.confusion[head].compute().double()
            seen = counts.sum(1)
            recall = (counts.diagonal() / seen.clamp(min=1)).tolist()
            named = {name: value for name, value, n in zip(classes, recall, seen.tolist(), strict=True) if n}
            figures[head] = {
                "confusion": counts.long().tolist(),
                "recall": named,
                "balanced_accuracy": sum(named.values()) / max(len(named), 1),
                "accuracy": float(counts.diagonal().sum() / counts.sum().clamp(min=1)),
                "calibration_error": float(self.calibration[head].compute()),
            }
            self.confusion[head].reset()
            self.calibration[head].reset()
        return figures

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, steps, pct_start=0.03)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def calibrate(self, data: LabelledFaces) -> dict[str, float]:
        """Divide each head's logits by the temperature that suits the validation pictures best.

        The temperatures become part of the last layer, so that whoever loads the classifier has them.

        Returns:
            The temperature of each head.
        """
        self.eval()
        collected: dict[str, list[Tensor]] = {head: [] for head in self.heads}
        labels: dict[str, list[Tensor]] = {head: [] for head in self.heads}
        for pictures, truth in data.val_dataloader():
            for head, logits in self.logits(pictures.to(self.device).float() / 255).items():
                collected[head].append(logits.cpu())
                labels[head].append(truth[head])
        temperatures = {head: temperature(torch.cat(collected[head]), torch.cat(labels[head])) for head in self.heads}
        layer = last_linear(self.network)
        rows = [temperatures[head] for head, classes in self.heads.items() for _ in classes]
        scale = torch.tensor(rows, device=layer.weight.device)
        layer.weight.div_(scale[:, None])
        if layer.bias is not None:
            layer.bias.div_(scale)
        return temperatures


def head_loss(logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of one head over the pictures whose label is known, each times the weight of its class.

    Args:
        logits: with shape (B, K).
        labels: class indices or `UNKNOWN`, int64 with shape (B,).
        weights: of the classes, with shape (K,).
        smoothing: of the labels, in [0, 1).

    Returns:
        A scalar; a zero that still carries a graph where no label is known.
    """
    known = labels != UNKNOWN
    if not known.any():
        return logits.sum() * 0
    losses = cross_entropy(logits[known], labels[known], label_smoothing=smoothing, reduction="none")
    return (losses * weights[labels[known]]).mean()


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T > 0 for which the mean cross-entropy of logits / T is least (Guo et al., 2017).

    Args:
        logits: with shape (n, K).
        labels: class indices or `UNKNOWN`, int64 with shape (n,).

    Returns:
        T, between 0.05 and 20; 1 where no label is known.
    """
    from scipy.optimize import minimize_scalar

    known = labels != UNKNOWN
    if not known.any():
        return 1.0
    logits, labels = logits[known].double(), labels[known]
    found = minimize_scalar(
        lambda log: cross_entropy(logits / math.exp(log), labels).item(),
        bounds=(math.log(0.05), math.log(20)),
        method="bounded",
    )
    return math.exp(found.x)


def last_linear(network: nn.Module) -> nn.Linear:
    """The layer that gives a classifier's logits.

    Raises:
        ValueError: if the network ends in no linear layer.
    """
    count = network.config.num_labels
    layers = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == count]
    if not layers:
        raise ValueError(
            f"--model.backbone: {type(network).__name__} does not end in a linear layer: choose another one"
        )
    return layers[-1]


def preparation(source: str, config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What preprocessor_config.json says: the backbone's, or ImageNet's colors at its size, or at 224 px."""
    from transformers.utils import cached_file

    side, colors = getattr(config, "image_size", None) or 224, dict(IMAGENET)
    try:
        with quiet():
            given = Preprocessing.from_file(cached_file(source, "preprocessor_config.json", **options))
        side = given.size[0]
        colors = {"image_mean": given.mean.flatten().tolist(), "image_std": given.deviation.flatten().tolist()}
    except (OSError, ValueError):
        pass  # a backbone without one, such as a bare configuration
    scaling = {
        "do_resize": True,
        "size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
    }
    return {**scaling, "do_normalize": True, **colors}


class ClassifierCLI(OneLineCLI):
    """Builds training, data and trainer from YAML files and flags."""

    def __init__(self, args: ArgsType = None) -> None:
        example = "--config experiments/classifiers/training.yaml --output classifiers/training"
        super().__init__("train_classifier", ClassifierTraining, LabelledFaces, args, example)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output", type=str, required=True, help="Folder for the classifier; it must be new.")
        parser.set_defaults({"trainer.max_epochs": 10})

    @override
    def before_instantiate_classes(self) -> None:
        new_folder(Path(self.config.output))
        self.config.trainer.default_root_dir = str(Path(self.config.output) / "training")
        self.trainer_defaults["callbacks"] = [ModelCheckpoint(**BEST)]


def new_folder(folder: Path) -> None:
    """Make a folder for results.

    Raises:
        ValueError: if it holds something already, or cannot be written.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--output: {str(folder)!r} is there already; choose another name, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output: cannot write {str(folder)!r} ({error.strerror}); choose another place") from None


def main(args: ArgsType = None) -> None:
    """Train, keep the best step, calibrate, test and save.

    Raises:
        ValueError: in one line, for what the user can mend.
    """
    cli = ClassifierCLI(args)
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    data.read()
    module.load(data)
    trainer.fit(module, data)
    best = trainer.checkpoint_callback.best_model_path
    if best:
        module.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])
    split = "test" if data.pictures["test"] else "validation"
    loader = data.loader(split)
    trainer.test(module, loader, verbose=False)
    before = module.tested
    temperatures = module.calibrate(data)
    trainer.test(module, loader, verbose=False)
    if trainer.is_global_zero:
        figures = {
            "split": split,
            "pictures": {name: len(data.pictures[name]) for name in SPLITS},
            "temperature": temperatures,
            "calibration_error_before": {head: values["calibration_error"] for head, values in before.items()},
            "heads": module.tested,
        }
        save(module, data, figures, Path(cli.config.output))
        print(card_table(figures))
        print(f"Classifier: {cli.config.output}")


def save(module: ClassifierTraining, data: LabelledFaces, figures: dict[str, Any], folder: Path) -> None:
    """Write the classifier in Hugging Face's layout, its figures and its model card."""
    module.network.save_pretrained(folder, safe_serialization=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(module.preparation, indent=1) + "\n", encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(module, data, figures), encoding="utf-8")


def card_table(figures: dict[str, Any]) -> str:
    """A table in Markdown: for each head its balanced accuracy, the recall of each class, and calibration."""
    lines = [
        f"| head | balanced accuracy ({figures['split']}) | recall of each class | calibration error before → after |",
        "|---|---|---|---|",
    ]
    for head, values in figures["heads"].items():
        recall = ", ".join(f"{name} {value:.3f}" for name, value in values["recall"].items())
        error = f"{figures['calibration_error_before'][head]:.3f} → {values['calibration_error']:.3f}"
        lines.append(f"| {head} | {values['balanced_accuracy']:.3f} | {recall} | {error} |")
    return "\n".join(lines)


def model_card(module: ClassifierTraining, data: LabelledFaces, figures: dict[str, Any]) -> str:
    """What the classifier is, what it was trained on, how well it does, and what it must not be taken for."""
    confusions = []
    for head, values in figures["heads"].items():
        classes = module.heads[head]
        rows = [
            f"| {name} | {' | '.join(map(str, row))} |" for name, row in zip(classes, values["confusion"], strict=True)
        ]
        header = [f"| {head}: label ↓ verdict → | {' | '.join(classes)} |", "|---" * (len(classes) + 1) + "|"]
        confusions.append("\n".join([*header, *rows]))
    counts = ", ".join(f"{figures['pictures'][name]} {name}" for name in SPLITS)
    return f"""---
library_name: transformers
pipeline_tag: image-classification
---

# Attribute classifier: {", ".join(module.heads)}

{type(module.network).__name__} from `{module.backbone}`, trained by fairness_dft on {type(data).__name__} ({counts}
pictures). Labels have the form `head/class`.

It reads **perceived** attributes, as annotators labelled pictures. It says nothing about any person's identity, and its
classes are a simplification. It is meant for measuring and aligning generated images as a whole; it must not be used to
classify people.

## Figures

On the {figures["split"]} split, which training did not see:

{card_table(figures)}

Balanced accuracy is the mean recall over classes. The logits of each head are divided by a temperature fitted on the
validation split ({", ".join(f"{head} {value:.2f}" for head, value in figures["temperature"].items())}); calibration
error is the expected one, in 15 bins.

{(chr(10) * 2).join(confusions)}
"""


if __name__ == "__main__":
    run_main(main)
