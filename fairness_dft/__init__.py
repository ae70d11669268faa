"""Finetune text-to-image diffusion models for fairness, and measure how fair they are.

The rooms in the method's order: `prompts` become images by `diffusion`, whose `adapters` are all that is trained;
`sampling` draws the images and carries the gradient back. `faces` finds the face, `attributes` names what is to be
fair, `classifiers` read it from the face, and `features` embed images. `alignment` assigns targets by optimal transport
and forms the losses, `training` is the algorithm and what watches it, `metrics` and `reports` say how fair the result
is. The commands are modules beside the rooms, such as `fairness_dft.fit`.
"""

__version__ = "0.2.0"
