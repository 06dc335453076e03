"""CLIP's tokenizer and text towers are open_clip's."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from latentgen.core.errors import UserError
from latentgen.formats.folder_parts import write_folder_from
from latentgen.formats.open_clip_files import read_open_clip
from latentgen.formats.single_file.vocabulary import clip_tokenizer, is_usual, tokenizer_files

CAPTIONS = [
    "a photo of a cat",
    "",
    "An ASTRONAUT riding a horse, 1234 times, don't",
    "漢字 und Größe — naïve café 🙂",
    "word " * 100,
    "  spaces\tand\nlines ",
]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_ids_are_open_clips(pad: str) -> None:
    """But for exclamation marks where these fill up: transformers then takes each for a token that is special."""
    theirs = open_clip.SimpleTokenizer()(CAPTIONS)
    tokenizer = clip_tokenizer(pad)
    ours = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ours.shape == (len(CAPTIONS), 77)
    assert tokenizer.pad_token_id == {"!": 0, "<|endoftext|>": 49407}[pad]
    for mine, other in zip(ours, theirs, strict=True):
        end = int((other == 49407).int().argmax())
        assert torch.equal(mine[: end + 1], other[: end + 1])
        assert bool((mine[end + 1 :] == tokenizer.pad_token_id).all())


@pytest.mark.parametrize(
    ("family", "name", "pad"),
    [("sd1", "tokenizer", 49407), ("sd2", "tokenizer", 0), ("sdxl", "tokenizer", 49407), ("sdxl", "tokenizer_2", 0)],
)
def test_tokenizers_as_the_families_have_them(family: str, name: str, pad: int, tmp_path: Path) -> None:
    files = tokenizer_files(family, name)
    for file, text in files.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    opened = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert (opened.pad_token_id, opened.model_max_length, len(opened)) == (pad, 77, 49408)
    assert is_usual(files, family, name)
    assert not is_usual(tokenizer_files("sd2" if pad else "sd1", "tokenizer"), family, name)


@pytest.fixture
def tower(monkeypatch, tmp_path: Path) -> Path:
    """A tiny open_clip model under a name of its own, and its weights in a file."""
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    config = {"embed_dim": 32, "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-test", {**config, "text_cfg": text})
    model = open_clip.create_model("tiny-test").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "laion.safetensors")
    torch.save(model, tmp_path / "object.pt")
    ids = open_clip.SimpleTokenizer()(CAPTIONS)
    with torch.no_grad():
        torch.save(model.encode_text(ids), tmp_path / "expected.pt")
    return tmp_path


def test_an_open_clip_tower_gives_the_same_text_features(tower: Path) -> None:
    parts = read_open_clip(tower / "laion.safetensors", "tiny-test")
    write_folder_from(parts, tower / "out")
    model = CLIPTextModelWithProjection.from_pretrained(tower / "out", local_files_only=True).eval()
    assert model.config.num_attention_heads == 2
    assert model.config.hidden_act == "gelu"
    tokenizer = CLIPTokenizer.from_pretrained(tower / "out", local_files_only=True)
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        features = model(ids).text_embeds
    torch.testing.assert_close(features, torch.load(tower / "expected.pt"), atol=1e-5, rtol=1e-5)


def test_other_towers_are_refused(tower: Path) -> None:
    with pytest.raises(UserError, match="open_clip has no model ViT-Z"):
        read_open_clip(tower / "laion.safetensors", "ViT-Z-99")
    with pytest.raises(UserError, match="is not ViT-B-32: its hidden_size is 64, that model's is 512"):
        read_open_clip(tower / "laion.safetensors", "ViT-B-32")
    with pytest.raises(UserError, match="another kind of text tower"):
        read_open_clip(tower / "laion.safetensors", "xlm-roberta-base-ViT-B-32")
    save_file({"a": torch.ones(2)}, tower / "other.safetensors")
    with pytest.raises(UserError, match="no text tower of open_clip"):
        read_open_clip(tower / "other.safetensors", "tiny-test")
