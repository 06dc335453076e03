"""Everything that turns text into pictures, in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn

from latentgen.core.errors import UserError
from latentgen.diffusion.parameterization import Parameterization
from latentgen.formats.scheduler import parameterization
from latentgen.models.autoencoder import Vae
from latentgen.models.chunks import MAX_CHUNKS
from latentgen.models.context import Context, size_count, zero
from latentgen.models.emphasis import encode_prompts, plain
from latentgen.models.text import Tower, encode_text, pooled_width, projects, prompt_length, states_width
from latentgen.models.tokens import LearnedTokens, put

MIXED = "they are of different models, take all parts from one"


@dataclass(frozen=True, kw_only=True)
class Model:
    """Stable Diffusion of any kind, or one of ours.

    Attributes:
        vae: between pictures and latents.
        towers: text to what the U-Net reads: one; in SDXL two.
        unet: the denoising network.
        prediction: what the U-Net predicts: "eps", "v", "x0", "flow", "edm" or "ve".
        schedule: the numbers of the process, plain data, as `formats.scheduler` describes them.
        zero_empty: no text is zeros, not the text encoder's states of nothing (SDXL was trained so).
        metadata: JSON values; kept in latentgen.json.
        control: a network beside the U-Net that is shown a picture (ControlNet, arXiv 2302.05543); it has a folder of
            its own, not one in the model's.
        tokens: words that the text encoders are learning; in a finished model they are rows like all others.
        chunks: pieces that every text was read in when the U-Net was trained.
    """

    vae: Vae
    towers: tuple[Tower, ...]
    unet: UNet2DConditionModel
    prediction: str
    schedule: Mapping[str, Any]
    zero_empty: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)
    control: ControlNetModel | None = None
    tokens: LearnedTokens | None = None
    chunks: int = 1

    def parameterization(self) -> Parameterization:
        """What `prediction` and `schedule` mean.

        Raises:
            UserError: an unknown prediction or noise table.
        """
        return parameterization(self.prediction, self.schedule)

    def networks(self) -> dict[str, nn.Module]:
        """Every network, by the name that other tools know it by."""
        own: dict[str, nn.Module] = {"unet": self.unet, "vae": self.vae}
        own |= {tower.name: tower.encoder for tower in self.towers}
        beside: dict[str, nn.Module | None] = {"control": self.control, "tokens": self.tokens}
        return own | {name: network for name, network in beside.items() if network is not None}

    def with_networks(self, networks: Mapping[str, nn.Module]) -> Model:
        """The model with these in place of its own, by the names of `networks`."""
        towers = tuple(replace(t, encoder=networks.get(t.name, t.encoder)) for t in self.towers)  # type: ignore[arg-type]
        own: dict[str, Any] = {
            name: networks[name] for name in ("unet", "vae", "control", "tokens") if name in networks
        }
        return replace(self, towers=towers, **own)

    @property
    def latent_channels(self) -> int:
        return int(self.vae.config["latent_channels"])

    @property
    def learned_variance(self) -> bool:
        """Whether the second half of the U-Net's channels speaks of the variance (arXiv 2102.09672, eq. 15)."""
        return self.unet.config["out_channels"] == 2 * self.latent_channels

    @property
    def inpaints(self) -> bool:
        """Whether the U-Net is also shown a mask and the picture outside of it, as 1 + c more channels."""
        return self.unet.config["in_channels"] == 2 * self.latent_channels + 1

    @property
    def sizes(self) -> int:
        """How many numbers of micro-conditioning the U-Net reads: 0, 5 or 6."""
        return size_count(self.unet, pooled_width(self.towers))

    def encode(self, captions: Sequence[str], chunks: int | None = None, *, emphasis: bool = False) -> Context:
        """What the U-Net reads of captions, without sizes; empty ones are zeros where `zero_empty`.

        Args:
            chunks: pieces that each is read in; None: as many as in training.
            emphasis: brackets say how much words count (`models.emphasis`); else they are signs like others.
        """
        if self.tokens is not None:
            put(self.tokens(), {tower.name: tower.encoder for tower in self.towers})
        context = (encode_prompts if emphasis else encode_text)(self.towers, captions, chunks or self.chunks)
        if not self.zero_empty:
            return context
        texts = [plain(caption) for caption in captions] if emphasis else captions
        return zero(context, torch.tensor([text == "" for text in texts], device=context.states.device))

    def require_fit(self, where: str) -> None:
        """Raise UserError where parts of different models were put together."""
        unet, latents = self.unet.config, self.latent_channels
        width, made = unet["cross_attention_dim"], states_width(self.towers)
        if isinstance(width, int) and width != made:
            raise UserError(
                f"{where}: the U-Net reads text states of width {width}, the text encoder makes {made}; {MIXED}"
            )
        if unet["out_channels"] not in (latents, 2 * latents):
            raise UserError(
                f"{where}: the U-Net has {unet['out_channels']} latent channels, the autoencoder {latents}; {MIXED}"
            )
        if unet["in_channels"] not in (latents, 2 * latents + 1):
            raise UserError(
                f"{where}: the U-Net takes {unet['in_channels']} channels, the autoencoder has {latents}; "
                f"{latents} (text to picture) and {2 * latents + 1} (inpainting) are supported: "
                "take a model of such a kind, and all parts from one"
            )
        if projects(self.towers) != (unet["addition_embed_type"] == "text_time"):
            raise UserError(
                f"{where}: the text encoders {'make' if projects(self.towers) else 'lack'} the pooled text that the "
                f"U-Net {'does not read' if projects(self.towers) else 'reads'}; {MIXED}"
            )
        if projects(self.towers) and self.sizes not in (5, 6):
            raise UserError(
                f"{where}: the U-Net's added embedding of width {unet['projection_class_embeddings_input_dim']} does "
                f"not go with a pooled text of width {pooled_width(self.towers)}; {MIXED}"
            )
        for tower in self.towers:
            _require_words(tower, prompt_length(self.towers), where)


def stated_chunks(content: Mapping[str, Any], where: str) -> int:
    """What latentgen.json or adapter.json says of `Model.chunks`; 1 where it says nothing.

    Raises:
        UserError: it says something impossible.
    """
    chunks = content.get("chunks", 1)
    if not isinstance(chunks, int) or not 1 <= chunks <= MAX_CHUNKS:
        raise UserError(f"{where}: chunks is {chunks}, which must be a number from 1 to {MAX_CHUNKS}; correct it")
    return chunks


def _require_words(tower: Tower, length: int, where: str) -> None:
    text, tokenizer = tower.encoder.config, tower.tokenizer
    if len(tokenizer) > text.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, the text encoder knows {text.vocab_size}; {MIXED}"
        )
    if tokenizer.model_max_length > text.max_position_embeddings:
        raise UserError(
            f"{where}: captions of {tokenizer.model_max_length} tokens, the text encoder takes "
            f"{text.max_position_embeddings}; set model_max_length in {tower.tokenizer_name}/tokenizer_config.json"
        )
    if tokenizer.model_max_length != length:
        raise UserError(
            f"{where}: captions of {tokenizer.model_max_length} tokens in {tower.tokenizer_name}, of {length} in the "
            "other one; set model_max_length alike in both tokenizer_config.json"
        )
