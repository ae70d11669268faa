"""What the portrait networks are trained to say: several heads side by side in one linear layer.

The parts of a look (background, clothes, headwear and their colours) are learnt as heads of a few classes each. Which
subject a picture shows follows from them: hundreds of classes with a handful of pictures each need not be learnt.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from fairness_dft.networks.preprocessing import Preprocessing
from fairness_dft.portraits.draw import AGES, GENDERS, SIZE, SKINS
from fairness_dft.portraits.training import LOOK
from fairness_dft.portraits.world import subjects

Heads = dict[str, tuple[str, ...]]

ATTRIBUTES: Heads = {"gender": GENDERS, "race": SKINS, "age": AGES, "face": ("absent", "present")}
OF_A_FACE = ("gender", "race", "age")  # say nothing where no face is seen
OF_A_PERSON = ("clothes", "clothes_colour", "headwear", "headwear_colour")  # nor do these where nobody is


def id2label(heads: Heads) -> dict[int, str]:
    """Hugging Face's flat label list for several heads: "gender/woman", "race/dark", ..."""
    return dict(enumerate(f"{head}/{name}" for head, classes in heads.items() for name in classes))


def columns(heads: Heads) -> dict[str, slice]:
    """Where in the logits each head lies."""
    found, start = {}, 0
    for head, classes in heads.items():
        found[head] = slice(start, start + len(classes))
        start += len(classes)
    return found


def head_losses(logits: Tensor, labels: dict[str, Tensor], heads: Heads) -> Tensor:
    """Sum of the heads' cross-entropies; what only a face tells counts only where there is one.

    Args:
        logits: With shape (n, classes of all heads).
        labels: For each head the true classes, with shape (n,).
        heads: The heads, in the order of the logits.
    """
    total = logits.new_zeros(())
    for head, where in columns(heads).items():
        seen = labels["face"] == 1 if head in OF_A_FACE + OF_A_PERSON else slice(None)
        total = total + cross_entropy(logits[seen, where], labels[head][seen])
    return total


@torch.no_grad()
def accuracies(
    model: PreTrainedModel, images: Tensor, labels: dict[str, Tensor], heads: Heads, size: int = SIZE
) -> dict[str, float]:
    """Accuracy of each head, in [0, 1]: of "face" over all pictures, of the others over those with a face."""
    prepare = Preprocessing((size, size), [0.5] * 3, [0.5] * 3)
    logits = torch.cat([model(prepare(chunk)).logits for chunk in images.split(256)])  # type: ignore[no-untyped-call]
    face = labels["face"] == 1
    right = {head: logits[:, where].argmax(1) == labels[head] for head, where in columns(heads).items()}
    return {head: round((ok if head == "face" else ok[face]).float().mean().item(), 4) for head, ok in right.items()}


@torch.no_grad()
def subjects_for_looks(layer: nn.Linear) -> tuple[nn.Linear, Heads]:
    """Return a last layer for the heads `ATTRIBUTES | LOOK`, with the parts of a look replaced by the subject.

    A subject's logit is the sum of the logits of the parts of its look, so that among the subjects those are ordered by
    the probability of their looks, the parts taken as independent.

    Returns:
        The new layer, and its heads: the attributes and "subject".
    """
    where = columns(ATTRIBUTES | LOOK)
    rows = torch.tensor(
        [
            [where[part].start + kinds.index(getattr(subject.look, part)) for part, kinds in LOOK.items()]
            for subject in subjects()
        ]
    )
    kept = where["face"].stop
    changed = nn.Linear(layer.in_features, kept + len(rows))
    changed.weight.copy_(torch.cat([layer.weight[:kept], layer.weight[rows].sum(1)]))
    changed.bias.copy_(torch.cat([layer.bias[:kept], layer.bias[rows].sum(1)]))
    return changed, ATTRIBUTES | {"subject": tuple(subject.name for subject in subjects())}
