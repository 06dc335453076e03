"""Captions as the recipe wants them: their wording, what is drawn of them, what the network reads and what is cut."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import CLIPTokenizer

from latentgen.data.captions import CachedWords, LiveWords, TagDraws, Words, first_captions
from latentgen.data.sources.base import Source
from latentgen.data.sources.worded import Wording
from latentgen.formats.model import Model
from latentgen.models.chunks import MAX_CHUNKS
from latentgen.models.text import chunks_needed, cut_tokens, shown
from latentgen.recipe.schema import Recipe
from latentgen.recipe.schema_data import Data
from latentgen.tasks.caching import Share, cache_text
from latentgen.tasks.token_ids import TokenIds

logger = logging.getLogger(__name__)

LOOKED_AT = 100_000
"""Examples, spread evenly, whose captions are looked at for what would be cut."""


def wording(data: Data) -> Wording:
    """What is put round the captions of a source."""
    separator = "" if data.tags is None else data.tags.separator
    return Wording(data.prefix, data.suffix, data.trigger or "", separator)


def tag_draws(data: Data, examples: int | None = None) -> TagDraws | None:
    """What is drawn anew each time a caption is shown; None where captions are always alike.

    Args:
        examples: the first so many examples have tags; those after them, pictures of a class, keep their words.
    """
    tags = data.tags
    if tags is None:
        return None
    draws = TagDraws(tags.separator, tags.shuffle, tags.keep, tags.dropout, examples)
    return draws if draws else None


def words_of(
    recipe: Recipe, model: Model, source: Source, cache: Path, share: Share, *, live: bool, tags: TagDraws | None
) -> Words:
    """What the U-Net's batches have of captions.

    Args:
        cache: folder of all caches.
        live: the text encoders run in every step, because they are trained or captions are drawn anew.
    """
    dropout, limit = recipe.diffusion.caption_dropout, recipe.data.captions
    if live:
        read = TokenIds({tower.name: tower.tokenizer for tower in model.towers}, model.chunks)
        return LiveWords(source, read, dropout, limit, tags)
    kept = cache_text(model, source, cache, captions=limit, share=share)
    return CachedWords(kept.parts(), kept.rows, dropout)


def some_captions(source: Source, limit: int | None) -> list[str]:
    """The different captions of at most `LOOKED_AT` examples."""
    numbers = range(0, len(source), -(-len(source) // LOOKED_AT))
    return list(dict.fromkeys(caption for index in numbers for caption in first_captions(source, index, limit)))


def warn_of_cuts(captions: Sequence[str], tokenizer: CLIPTokenizer, chunks: int, *, key: str) -> None:
    """Say how many captions are cut, what of the longest, and what would read all.

    Args:
        key: "text_encoder.chunks", or "text_encoder.context_length" where captions are read in one piece.
    """
    cuts = cut_tokens(tokenizer, captions, chunks)
    count = sum(map(bool, cuts))
    if not count:
        return
    worst = max(range(len(cuts)), key=lambda number: len(cuts[number]))
    if key == "text_encoder.chunks":
        needed = chunks_needed(tokenizer, captions[worst])
        remedy = (
            f"{key}: {needed} reads all" if needed <= MAX_CHUNKS else f"{MAX_CHUNKS} {key} are the most; shorten them"
        )
    else:
        remedy = f"{key}: {tokenizer.model_max_length + len(cuts[worst])} reads all"
    logger.warning(
        '%d of %d captions are too long: %d tokens are cut, of the longest the last %d ("%s"); %s',
        *(count, len(captions), sum(map(len, cuts)), len(cuts[worst]), shown(tokenizer, cuts[worst]), remedy),
    )
