"""Training CLIP: two towers learn which caption belongs to which picture; the text tower then conditions the U-Net."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer

from latentgen.core.files import write_folder
from latentgen.core.rand import Draw
from latentgen.data.fetch import from_bytes
from latentgen.engine.task import Phase
from latentgen.models.clip import Clip, ClipFeatures, ClipForTraining, contrastive_loss, save_clip, to_transformers
from latentgen.models.late_interaction import late_loss
from latentgen.models.text import tokenize


class ClipTask:
    """Contrastive training (arXiv 2103.00020).

    Args:
        clip: the two towers.
        tokenizer: of the text tower.
        held_out: pictures, uint8 `[n, 3, h, w]`, and their n captions, on which retrieval is measured.
        late: weight of the loss that matches single words with places of the picture; 0 leaves it out.
    """

    name = "clip"

    def __init__(
        self, clip: Clip, tokenizer: CLIPTokenizer, held_out: tuple[Tensor, list[str]], late: float = 0.0
    ) -> None:
        self.tokenizer, self.held_out, self.late = tokenizer, held_out, late
        self.modules: dict[str, nn.Module] = {"clip": ClipForTraining(clip, late=late > 0)}
        self.averaged: tuple[str, ...] = ("clip",)
        self._device_of = clip.logit_scale

    def phases(self) -> tuple[Phase, ...]:
        """One optimizer for both towers."""
        return (Phase("clip", ("clip",)),)

    def losses(self, phase: str, batch: Any, draw: Draw) -> dict[str, Tensor]:
        """`loss` over the pairs of the whole global batch, and the share of pictures matched to their own caption."""
        count, false = len(batch["caption"]), [caption for row in batch["contrast"] for caption in row]
        found = self._features(self.modules["clip"], batch["image"], batch["caption"] + false)
        image, text, scale = found.image, found.text[:count], found.logit_scale
        contrast = found.text[count:].unflatten(0, (count, -1)) if false else None
        loss = contrastive_loss(image, text, scale, contrast)
        accuracy = ((scale * image @ text.T).argmax(dim=1) == torch.arange(count, device=image.device)).float()
        if found.late is None:
            return {"loss": loss, "accuracy": accuracy.mean()}
        late = late_loss(*found.late, len(false) // count)
        return {"loss": loss + self.late * late, "accuracy": accuracy.mean(), "late": late}

    @torch.no_grad()
    def measure(self, averaged: Mapping[str, nn.Module], batch: Any, draw: Draw) -> dict[str, Tensor]:
        """The contrastive `loss` of each pair `[b]` among those of the batch, in nats: no false captions, no words."""
        clip = copy.deepcopy(averaged["clip"])  # its scale may be put back below 100 on the way, the average's not
        found = self._features(clip, batch["image"], batch["caption"])
        logits = found.logit_scale * found.image @ found.text.T
        own = torch.arange(len(logits), device=logits.device)
        both = [functional.cross_entropy(side, own, reduction="none") for side in (logits, logits.T)]
        return {"loss": (both[0] + both[1]) / 2}

    def _features(self, clip: nn.Module, image: Tensor, captions: list[str]) -> ClipFeatures:
        device = self._device_of.device
        return clip(from_bytes(image.to(device)), tokenize(self.tokenizer, captions).to(device))

    @torch.no_grad()
    def preview(self, averaged: Mapping[str, nn.Module], step: int, folder: Path) -> dict[str, float]:
        """Share of held-out pictures whose own caption ranks first among all held-out captions."""
        found = self._features(averaged["clip"], *self.held_out)
        best = (found.image @ found.text.T).argmax(dim=1)
        captions = self.held_out[1]
        right = [captions[int(found)] == caption for found, caption in zip(best, captions, strict=True)]
        return {"retrieval": sum(right) / len(right)}


def finish_clip(averaged: nn.Module, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the text tower as transformers knows it, the tokenizer, and both towers as they are."""
    assert isinstance(averaged, ClipForTraining)
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    assert isinstance(bos, int)
    assert isinstance(pad, int)
    text = to_transformers(averaged.clip, bos_token_id=bos, pad_token_id=pad)

    def fill(aside: Path) -> None:
        text.save_pretrained(aside / "text_encoder")
        tokenizer.save_pretrained(aside / "tokenizer")
        save_clip(averaged.clip, aside / "clip")

    write_folder(folder, fill)
