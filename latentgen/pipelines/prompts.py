"""How long the texts of a request are: the pieces they are read in, and what is cut of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from latentgen.core.errors import UserError
from latentgen.formats.model import Model
from latentgen.models.chunks import MAX_CHUNKS
from latentgen.models.emphasis import prompt_chunks, prompt_cut
from latentgen.models.text import chunks_needed, cut_tokens, shown
from latentgen.pipelines.guiding import split_prompt


class Asked(Protocol):
    """What a request says in words, as `pipelines.generate.Request` does."""

    @property
    def prompt(self) -> str: ...
    @property
    def negative_prompt(self) -> str: ...
    @property
    def guidance(self) -> tuple[str, ...]: ...
    @property
    def chunks(self) -> int | None: ...
    @property
    def emphasis(self) -> bool: ...


def check_chunks(request: Asked) -> None:
    """Raise `UserError` for a number of pieces that there cannot be."""
    if request.chunks is not None and not 1 <= request.chunks <= MAX_CHUNKS:
        raise UserError(f"--chunks {request.chunks}: choose a number from 1 to {MAX_CHUNKS}")


def texts_of(request: Asked) -> tuple[str, ...]:
    """Every text that is read for the picture: the prompts of a composition, and the negative one."""
    return (*split_prompt(request.prompt, request.guidance)[0], request.negative_prompt)


def chunks_of(request: Asked, model: Model) -> int:
    """Pieces that all texts of a request are read in: as many as the longest takes and at least as many as in training,
    but no more than it allows."""
    count = prompt_chunks if request.emphasis else chunks_needed
    needed = (count(tower.tokenizer, text) for tower in model.towers for text in texts_of(request))
    return min(request.chunks or MAX_CHUNKS, max(model.chunks, *needed))


def cut_remarks(request: Asked, model: Model) -> list[str]:
    """For each text of which something is cut, how much and what that is."""
    tokenizer, chunks = model.towers[0].tokenizer, chunks_of(request, model)
    found = []
    for text in texts_of(request):
        cut = prompt_cut(tokenizer, text, chunks) if request.emphasis else cut_tokens(tokenizer, [text], chunks)[0]
        if cut:
            needed = (prompt_chunks if request.emphasis else chunks_needed)(tokenizer, text)
            remedy = f"--chunks {needed} reads them" if needed <= MAX_CHUNKS else "make it shorter"
            found.append(f'prompt too long: its last {len(cut)} tokens are cut ("{shown(tokenizer, cut)}"); {remedy}')
    return found


def longest(requests: Sequence[Asked], model: Model) -> int:
    """Pieces in which the texts of a batch are read: its pictures share the U-Net's passes."""
    return max(chunks_of(request, model) for request in requests)
