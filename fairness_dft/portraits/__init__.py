"""The portrait world: drawn portraits, and a miniature Stable Diffusion trained on them."""
