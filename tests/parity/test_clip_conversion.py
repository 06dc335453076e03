"""The text tower after conversion to transformers gives what open_clip gave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel

from latentgen.core.errors import UserError
from latentgen.models.clip import Clip, ClipShape, build_clip, to_transformers

VOCAB = 50


def towers(eos_token_id: int = VOCAB - 1) -> Clip:
    torch.manual_seed(0)
    clip = build_clip(
        ClipShape(
            image_size=16,
            vision="vit",
            patch_size=8,
            vision_width=16,
            vision_layers=1,
            vision_heads=2,
            text_width=24,
            text_layers=3,
            text_heads=3,
            context_length=10,
            vocab_size=VOCAB,
            eos_token_id=eos_token_id,
            embed_dim=12,
        )
    )
    with torch.no_grad():
        # Away from the initial values, under which a swapped weight or a lost bias could hide.
        for parameter in clip.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return clip.eval()


def tokens(eos: int) -> torch.Tensor:
    ids = torch.randint(3, VOCAB - 2, (6, 10), generator=torch.Generator().manual_seed(1))
    ids[ids == eos] = 3
    for row, end in enumerate((1, 4, 9, 5, 2, 7)):
        ids[row, end:] = eos
    ids[:, 0] = VOCAB - 2
    return ids


def open_clip_states(clip: Clip, ids: torch.Tensor) -> torch.Tensor:
    x = clip.token_embedding(ids) + clip.positional_embedding
    return clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask))


@pytest.mark.parametrize("eos", [VOCAB - 1, 7])
def test_hidden_pooled_and_projected_states_agree(eos: int) -> None:
    clip = towers(eos)
    ids = tokens(eos)
    model = to_transformers(clip, bos_token_id=VOCAB - 2, pad_token_id=eos)
    with torch.no_grad():
        out = model(ids)
        hidden = open_clip_states(clip, ids)
        torch.testing.assert_close(out.last_hidden_state, hidden, atol=1e-5, rtol=1e-5)
        first_end = (ids == eos).int().argmax(dim=1)
        torch.testing.assert_close(out.pooler_output, hidden[torch.arange(6), first_end], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            out.pooler_output @ clip.text_projection, clip.encode_text(ids), atol=1e-5, rtol=1e-5
        )


def test_attention_is_causal_after_conversion() -> None:
    clip = towers()
    ids = tokens(VOCAB - 1)
    changed = ids.clone()
    changed[:, -1] = 5
    model = to_transformers(clip, bos_token_id=VOCAB - 2, pad_token_id=VOCAB - 1)
    with torch.no_grad():
        before, after = model(ids).last_hidden_state, model(changed).last_hidden_state
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_configuration_and_a_round_trip_through_a_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = to_transformers(towers(), bos_token_id=VOCAB - 2, pad_token_id=VOCAB - 1)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (VOCAB - 2, VOCAB - 1)
    assert model.config.hidden_act == "gelu"
    assert model.config.projection_dim == 12
    model.save_pretrained(tmp_path)
    again, report = CLIPTextModel.from_pretrained(tmp_path, local_files_only=True, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = tokens(VOCAB - 1)
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)


def test_the_old_pooling_rule_is_refused() -> None:
    with pytest.raises(UserError, match="id 2"):
        to_transformers(towers(eos_token_id=2), bos_token_id=0, pad_token_id=2)


def test_conversion_copies() -> None:
    clip = towers()
    model = to_transformers(clip, bos_token_id=VOCAB - 2, pad_token_id=VOCAB - 1)
    before = clip.token_embedding.weight.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(clip.token_embedding.weight, before)
