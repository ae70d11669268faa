"""Finetuning text-to-image diffusion models for fairness, one file for each noun of the method.

The files in the method's order: `prompts` are turned into images by `diffusion`, whose `adapters` are all
that trains; `sampler` draws the images and `gradients` says how the loss flows back through it. `faces` finds
the face, `attributes` names what is to be fair, `classifiers` reads it off the face and `features` embeds
images. `transport` assigns a target to every image, `losses` pulls the images there, `module`
trains, `metrics` and `callbacks` watch. `cli` and `fit` make it a command, `stop` ends it early, and `portraits` is
the miniature Stable Diffusion that ships with the repository, on which all of it runs.
"""

__version__ = "0.1.0"
