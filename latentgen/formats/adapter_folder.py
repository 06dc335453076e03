"""An adapter folder: what fine-tuning learned, beside the model that it belongs to.

* adapter.json: which model, and which of the files are what
* NAME.safetensors, NAME-kohya.safetensors, NAME-comfyui.safetensors: the same small matrices, in the names of each tool
* WORD.safetensors: a learned word
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from torch import Tensor

from latentgen import __version__
from latentgen.core.errors import UserError
from latentgen.core.files import file_sha256, write_folder, write_json
from latentgen.core.runfolder import ADAPTER_INDEX
from latentgen.formats.embeddings import Embedding, write_embedding
from latentgen.formats.folder_check import read_json, weight_files
from latentgen.formats.lora.file import LoraFile
from latentgen.formats.lora.writing import write_lora
from latentgen.formats.model import Model, stated_chunks


@dataclass(frozen=True)
class AdapterFolder:
    """What there is.

    Attributes:
        base: the model that it belongs to, as it was called in training.
        unet_sha256: of the file of that model's U-Net.
        lora: the file of small matrices, or None.
        embeddings: learned word -> file.
        metadata: JSON values; what trained it.
        chunks: pieces that every text was read in when it was trained.
    """

    base: str
    unet_sha256: str
    lora: Path | None
    embeddings: Mapping[str, Path]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    chunks: int = 1


def unet_hash(folder: Path) -> str:
    """SHA-256 of the (first) file of a model folder's U-Net."""
    return file_sha256(weight_files(folder / "unet").files[0])


def write_adapter(
    folder: Path,
    name: str,
    model: Model,
    lora: LoraFile | None,
    words: Mapping[str, Mapping[str, Tensor]],
    *,
    layouts: Sequence[str],
    base: str,
    unet_sha256: str,
    metadata: Mapping[str, Any],
) -> None:
    """Write an adapter folder, complete or not at all.

    Args:
        name: of the files.
        model: what it belongs to; its modules' names decide the files' keys.
        lora: the small matrices; None where there are none.
        words: learned word -> text encoder's name -> `[v, d]`.
        layouts: of the files, the first of which is read back here.
    """
    networks = {key: network for key, network in model.networks().items() if key not in ("vae", "control", "tokens")}
    names = [name, *(f"{name}-{layout}" for layout in layouts[1:])]
    files = {} if lora is None else {layout: f"{file}.safetensors" for layout, file in zip(layouts, names, strict=True)}
    spelled = _word_files(words, list(files.values()))

    def fill(target: Path) -> None:
        for layout, file in files.items():
            assert lora is not None
            write_lora(lora, target / file, layout, networks)
        for word, file in spelled.items():
            layout = "diffusers" if words[word].keys() == {"text_encoder"} else "a1111"
            write_embedding(Embedding(word, words[word]), target / file, layout)
        write_json(
            target / ADAPTER_INDEX,
            {
                "latentgen": __version__,
                "base": base,
                "unet_sha256": unet_sha256,
                "lora": files,
                "embeddings": spelled,
                "chunks": model.chunks,
                "metadata": dict(metadata),
            },
        )

    write_folder(folder, fill)


def _word_files(words: Iterable[str], taken: Collection[str]) -> dict[str, str]:
    """A file for each word, called as the word is; no two alike and none of `taken`, upper or lower case aside."""
    used, found = {file.lower() for file in taken}, {}
    for word in words:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "", word) or "word"
        stems = chain((stem, f"{stem}-word"), (f"{stem}-word-{n}" for n in count(2)))
        found[word] = next(file for file in (f"{s}.safetensors" for s in stems) if file.lower() not in used)
        used.add(found[word].lower())
    return found


def read_adapter(folder: Path) -> AdapterFolder:
    """Raise UserError where the folder is not complete."""
    index = read_json(Path(folder) / ADAPTER_INDEX)
    try:
        lora, embeddings = list(index["lora"].values()), dict(index["embeddings"])
        found = AdapterFolder(
            str(index["base"]),
            str(index["unet_sha256"]),
            Path(folder) / lora[0] if lora else None,
            {word: Path(folder) / file for word, file in embeddings.items()},
            index.get("metadata", {}),
            stated_chunks(index, str(folder)),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/{ADAPTER_INDEX}: {error} is missing or broken; copy or download it again") from error
    for file in (*([] if found.lora is None else [found.lora]), *found.embeddings.values()):
        if not file.is_file():
            raise UserError(f"{folder} is not complete: {file.name} is missing; copy or download it again")
    return found
