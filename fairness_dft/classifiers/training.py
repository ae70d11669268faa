"""The training of an attribute classifier as a LightningModule."""

from collections import Counter
from typing import cast

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from fairness_dft.classifiers.backbone import backbone, last_linear
from fairness_dft.classifiers.calibration import head_figures, temperature
from fairness_dft.datasets.base import UNKNOWN, LabelledFaces
from fairness_dft.networks.preprocessing import Preprocessing

Batch = tuple[Tensor, dict[str, Tensor]]


class Verdicts(Metric):
    """Collect all logits and labels of an epoch, over all ranks."""

    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    @override
    def update(self, logits: Tensor, labels: Tensor) -> None:
        self.logits.append(logits.float())
        self.labels.append(labels)

    @override
    def compute(self) -> tuple[Tensor, Tensor]:
        return dim_zero_cat(self.logits), dim_zero_cat(self.labels)


class ClassifierTraining(LightningModule):
    """Train a classifier with one head for each attribute.

    Args:
        backbone: Hub id or folder of an `AutoModelForImageClassification`; from a folder that holds a config.json
            alone, or where `pretrained` is false, it starts with random weights.
        pretrained: Whether to start from the backbone's weights.
        learning_rate: Peak learning rate of AdamW; it rises over the first 3 % of the steps, then falls
            to zero as a cosine.
        weight_decay: Weight decay of AdamW.
        balance: Weigh each class by its rarity, so that all classes of a head count alike.
        smoothing: Label smoothing, in [0, 1).
        noise: Largest standard deviation of the noise added to images in [0, 1]. Training under noise aligns a
            classifier's gradient with visible content rather than single pixels (Santurkar et al., 2019,
            https://arxiv.org/abs/1906.09453), and finetuning learns from that gradient.
        calibrated: Divide the logits by temperatures. Calibration makes a classifier trained with label smoothing more
            confident; without it, its soft predictions rank the images to which finetuning assigns targets.

    Attributes:
        verdicts: After an evaluation, all logits and labels of each head.
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
        calibrated: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= smoothing < 1 or not noise >= 0:
            raise ValueError(f"`smoothing` must be in [0, 1) and `noise` not negative, but got {smoothing} and {noise}")
        self.backbone, self.pretrained = backbone, pretrained
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.balance, self.smoothing, self.noise, self.calibrated = balance, smoothing, noise, calibrated
        self.verdicts: dict[str, tuple[Tensor, Tensor]] = {}

    def load(self, data: LabelledFaces) -> None:
        """Load the backbone with new heads for a data set, and set the size of the data set's images.

        Raises:
            ValueError: If the backbone cannot be loaded, or its logits do not come from one linear layer.
        """
        import kornia.augmentation as K

        self.heads = data.heads
        self.network, self.preparation = backbone(self.backbone, self.pretrained, self.heads)
        side = self.preparation["size"]["height"]
        data.size = side
        self.prepare = Preprocessing((side, side), self.preparation["image_mean"], self.preparation["image_std"])
        self.last = last_linear(self.network, side)
        self.network.train()  # loaded networks are in evaluation mode
        self.augment = K.AugmentationSequential(
            K.RandomHorizontalFlip(p=0.5),
            K.RandomAffine(degrees=10, translate=(0.05, 0.05), scale=(0.9, 1.1), padding_mode="border", p=1.0),
            K.ColorJiggle(0.2, 0.2, 0.2, 0.02, p=1.0),
        )
        # In the order of the heads, since not every column is a valid name of a module or buffer.
        self.collected = nn.ModuleList(Verdicts() for _ in self.heads)
        self.weights = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in self.class_weights(data))

    def class_weights(self, data: LabelledFaces) -> list[Tensor]:
        """Return each head's class weights: with mean one over the training images if balanced, else all one."""
        weights = []
        for head, classes in self.heads.items():
            counts = Counter(picture.labels[head] for picture in data.pictures["train"])
            total = sum(counts.values()) - counts[UNKNOWN]
            rarity = [total / (len(classes) * counts[i]) if self.balance else 1.0 for i in range(len(classes))]
            weights.append(torch.tensor(rarity))
        return weights

    def logits(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of each head, for images as floats in [0, 1]."""
        logits = self.network(self.prepare(pixels)).logits
        return cast(tuple[Tensor, ...], logits.split([len(classes) for classes in self.heads.values()], 1))

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        pixels = self.augment(batch[0].float() / 255)
        if self.noise:
            spread = self.noise * torch.rand(len(pixels), 1, 1, 1, device=pixels.device)
            pixels = pixels + spread * torch.randn_like(pixels)
        loss = sum(
            head_loss(logits, batch[1][head], weights, self.smoothing)
            for head, logits, weights in zip(self.heads, self.logits(pixels), self.weights, strict=True)
        )
        self.log("loss", loss, prog_bar=True)
        return cast(Tensor, loss)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self.logits(batch[0].float() / 255)
        for head, values, collected in zip(self.heads, logits, self.collected, strict=True):
            cast(Verdicts, collected).update(values, batch[1][head])

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def gather_verdicts(self) -> None:
        """Move the collected logits and labels to `verdicts`, and clear the collection."""
        for head, collected in zip(self.heads, self.collected, strict=True):
            verdicts = cast(Verdicts, collected)
            self.verdicts[head] = verdicts.compute()
            verdicts.reset()

    @override
    def on_validation_epoch_end(self) -> None:
        self.gather_verdicts()
        figures = {head: head_figures(*self.verdicts[head], classes) for head, classes in self.heads.items()}
        accuracies = {head: f["balanced_accuracy"] for head, f in figures.items() if f["balanced_accuracy"] is not None}
        for head, value in accuracies.items():
            self.log(f"validation/{head}", value, prog_bar=True, sync_dist=True)
        self.log("validation/balanced_accuracy", sum(accuracies.values()) / max(len(accuracies), 1), sync_dist=True)

    @override
    def on_test_epoch_end(self) -> None:
        self.gather_verdicts()

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        from transformers import get_scheduler

        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=round(0.03 * steps), num_training_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def calibrate(self) -> dict[str, float]:
        """Divide the logits of each head by the temperature that fits the last evaluation best.

        The temperatures become part of the last layer, so that the saved classifier includes them.

        Returns:
            The temperature of each head.
        """
        temperatures = {head: temperature(*self.verdicts[head]) if self.calibrated else 1.0 for head in self.heads}
        rows = [temperatures[head] for head, classes in self.heads.items() for _ in classes]
        scale = torch.tensor(rows, device=self.last.weight.device)
        self.last.weight.div_(scale[:, None])
        if self.last.bias is not None:
            self.last.bias.div_(scale)
        return temperatures


def head_loss(logits: Tensor, labels: Tensor, weights: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the weighted mean cross-entropy of one head over the images with a known label.

    Args:
        logits: With shape (B, K).
        labels: Class indices or `UNKNOWN`, int64 with shape (B,).
        weights: Weights of the classes, with shape (K,).
        smoothing: Label smoothing, in [0, 1).

    Returns:
        A scalar; a zero that still has a graph if no label is known.
    """
    known = labels != UNKNOWN
    if not known.any():
        return logits.sum() * 0
    losses = cross_entropy(logits[known], labels[known], label_smoothing=smoothing, reduction="none")
    return (losses * weights[labels[known]]).mean()
