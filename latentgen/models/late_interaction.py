"""Late interaction: every word looks for its own place in the picture (FILIP, arXiv 2111.07783).

One vector for a whole caption teaches only the end token: the states of the words before it, which a U-Net attends to,
are left as they fall. Here each word is compared with every place and scores its best match, so that "circle" in "a red
circle above a blue square" has to come to mean the red circle, and not the square.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentgen.core.processes import rank_and_world
from latentgen.models.gathering import gather_rows


class LateFeatures(NamedTuple):
    """`places` [b, p, d], `words` [n, t, d], of length 1; `spoken` [n, t], 1 for words that count; scalar `scale`."""

    places: Tensor
    words: Tensor
    spoken: Tensor
    scale: Tensor


class LateInteraction(nn.Module):
    """Projects places and words to a shared space of `embed_dim`; used in training only, no part of the towers.

    A place also says where it is: "square" in "a circle above a square" can so come to mean a square that is low,
    and it is the best match, content and place together, that counts. The towers' pooled vectors alone learn that two
    things lie one above the other, but not which is the upper one.
    """

    def __init__(self, places: int, place_width: int, word_width: int, embed_dim: int) -> None:
        super().__init__()
        self.places = nn.Linear(place_width, embed_dim, bias=False)
        self.where = nn.Parameter(embed_dim**-0.5 * torch.randn(places, embed_dim))
        self.words = nn.Linear(word_width, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # where CLIP's begins

    def forward(self, places: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Places [b, p, place_width] and words [n, t, word_width] as vectors of length 1."""
        # Each of length 1: what is there, which is learned first, would otherwise leave no room for where it is.
        found = functional.normalize(self.places(places), dim=-1) + functional.normalize(self.where, dim=-1)
        return functional.normalize(found, dim=-1), functional.normalize(self.words(words), dim=-1)


def spoken(tokens: Tensor, eos_token_id: int) -> Tensor:
    """1 for the tokens that say something: those after the start up to the first end token. [n, t] -> [n, t]."""
    end = (tokens == eos_token_id).int().argmax(dim=1, keepdim=True)
    at = torch.arange(tokens.shape[1], device=tokens.device)
    return ((at > 0) & (at <= end)).float()


def late_similarity(places: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """Mean over a caption's words of the cosine with the best place (eq. 4 to 6, the direction from text to picture).

    Args:
        places: [b, p, d] of length 1.
        words: [n, t, d] of length 1, compared with every picture; or [b, k, t, d], k captions a picture, with that one.
        mask: 1 for the words that count, [n, t] or [b, k, t].

    Returns:
        [b, n] or [b, k], in [-1, 1].
    """
    pattern = "bpd,ntd->bntp" if words.ndim == 3 else "bpd,bktd->bktp"
    best = torch.einsum(pattern, places, words).amax(dim=-1)
    return (best * mask).sum(dim=-1) / mask.sum(dim=-1)


def late_loss(places: Tensor, words: Tensor, mask: Tensor, scale: Tensor, false_captions: int = 0) -> Tensor:
    """Symmetric cross entropy over all pairs of the batch, of all processes; each process does its share of the rows.

    The mean over processes, which DDP takes, is the loss of one process that holds the whole batch.

    Args:
        places: [b, p, d] of length 1; b equal on all processes.
        words, mask: [b * (1 + false_captions), t, d] and [..., t]: the b true captions, then each picture's false ones.
        scale: scalar that the similarities are multiplied by.
        false_captions: captions of each picture that it is also told from.

    Returns:
        A scalar in nats.
    """
    count = len(places)
    rank, _ = rank_and_world()
    right = torch.arange(rank * count, (rank + 1) * count, device=places.device)
    pictures = scale * late_similarity(places, gather_rows(words[:count]), gather_rows(mask[:count]))
    captions = gather_rows(pictures)[:, right].T  # numbers, not places: nothing is compared twice
    if false_captions:
        parts = (count, false_captions)
        false = late_similarity(places, words[count:].unflatten(0, parts), mask[count:].unflatten(0, parts))
        pictures = torch.cat([pictures, scale * false], dim=1)
    return (functional.cross_entropy(pictures, right) + functional.cross_entropy(captions, right)) / 2
