"""A run of all three networks, of a few thousand weights each, for benchmarks that stop and kill it."""

from __future__ import annotations

import socket
from pathlib import Path

RECIPE = """\
name: small
data: {{size: {size}, captions: 2, holdout: {holdout}, cache: {cache}}}
autoencoder:
  {{channels: [4, 4, 8, 8], latent_channels: 4, norm_groups: 4, train: {{steps: {steps}, global_batch: 8}}}}
text_encoder: {{width: 16, layers: 1, heads: 2, vocab_size: 514, embed_dim: 16,
  image: {{width: 8, layers: 1, heads: 2}}, train: {{steps: {steps}, global_batch: 8}}}}
unet: {{channels: [16, 16], layers_per_block: 1, heads: 2, norm_groups: 8}}
train: {{steps: {steps}, global_batch: 8, warmup_steps: 2, log_every: 2, save_every: {save_every},
  validate_every: {save_every}, keep_last: 1}}
preview: {{every: {preview_every}, num: 2, num_inference_steps: {preview_steps},
  prompts: ["a red circle", "a blue square"]}}
"""


def write_recipe(
    folder: Path, *, size: int, holdout: int, steps: int, save_every: int, preview_every: int, preview_steps: int
) -> Path:
    """Write `recipe.yaml`, whose cache is beside it, into a new folder."""
    folder.mkdir(parents=True)
    values = {"size": size, "holdout": holdout, "steps": steps, "save_every": save_every}
    previews = {"preview_every": preview_every, "preview_steps": preview_steps}
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(cache=folder / "cache", **values, **previews))
    return recipe


def free_port() -> str:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
