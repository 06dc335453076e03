"""What is cached is what the networks say, under a name that changes with whatever it depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny as families
import torch
from torch import nn

from latentgen.core.errors import UserError
from latentgen.data.fetch import to_tensor
from latentgen.formats.model import Model
from latentgen.formats.model_folder import load_model
from latentgen.models.autoencoder import encode_moments
from latentgen.models.text import encode_text
from latentgen.tasks import caching
from latentgen.tasks.caching import Share, cache_latents, cache_text, weights_key


def kept(folder: Path, kind: str) -> set[str]:
    return {path.name for path in (folder / kind).iterdir()}


def test_latents_are_the_encoders_moments(tiny: Model, few: Callable, tmp_path: Path) -> None:
    source = few(6)
    values = cache_latents(tiny, source, tmp_path, flip=True, share=Share()).arrays[0]
    image = to_tensor([source.image(i) for i in range(6)])
    with torch.no_grad():
        plain, mirrored = encode_moments(tiny.vae, image), encode_moments(tiny.vae, image.flip(-1))
    assert values.shape == (12, 2, 4, 4, 4)
    assert values.dtype == np.float16
    expected = torch.cat([torch.stack(plain, dim=1), torch.stack(mirrored, dim=1)])
    torch.testing.assert_close(torch.from_numpy(np.array(values)).float(), expected, rtol=2e-3, atol=1e-3)
    assert not np.array_equal(values[:6], values[6:])


def test_without_mirroring_there_is_one_variant(tiny: Model, few: Callable, tmp_path: Path) -> None:
    assert len(cache_latents(tiny, few(6), tmp_path, flip=False, share=Share())) == 6


def test_the_name_changes_with_what_the_latents_depend_on(
    tiny: Model, tiny_builder: Callable[..., Model], few: Callable, tmp_path: Path
) -> None:
    def count() -> int:
        return len(kept(tmp_path, "latents"))

    cache_latents(tiny, few(2), tmp_path, flip=False, share=Share())
    cache_latents(tiny_builder(), few(2), tmp_path, flip=False, share=Share())
    assert count() == 1, "equal weights share a cache"
    cache_latents(tiny, few(2), tmp_path, flip=True, share=Share())
    assert count() == 2
    cache_latents(tiny, few(2, seed=1), tmp_path, flip=False, share=Share())
    assert count() == 3
    other = tiny_builder()
    with torch.no_grad():
        other.vae.encoder.conv_in.bias[0] += 1e-6
    cache_latents(other, few(2), tmp_path, flip=False, share=Share())
    assert count() == 4
    other.unet.conv_in.bias.data += 1
    cache_latents(other, few(2), tmp_path, flip=False, share=Share())
    assert count() == 4, "the U-Net plays no part"


def test_a_second_run_does_not_encode_again(
    tiny: Model, few: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = np.array(cache_latents(tiny, few(2), tmp_path, flip=False, share=Share()).arrays[0])

    def fail(*inputs: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(caching, "encode_moments", fail)
    monkeypatch.setattr(Model, "encode", fail)
    assert np.array_equal(cache_latents(tiny, few(2), tmp_path, flip=False, share=Share()).arrays[0], first)
    with pytest.raises(AssertionError, match="encoded again"):
        cache_text(tiny, few(2), tmp_path, captions=None, share=Share())


def test_latents_that_are_not_finite_name_the_picture(
    tiny_builder: Callable[..., Model], few: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(vae: object, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.zeros(len(image), 4, 4, 4)
        mean[1] = 1e6  # does not fit float16
        return mean, torch.ones_like(mean)

    monkeypatch.setattr(caching, "encode_moments", broken)
    with pytest.raises(UserError, match="not finite for picture 1"):
        cache_latents(tiny_builder(), few(3), tmp_path, flip=False, share=Share())


def test_text_states_are_those_of_each_examples_captions(tiny: Model, few: Callable, tmp_path: Path) -> None:
    source = few(5)
    values, pooled, rows = cache_text(tiny, source, tmp_path, captions=2, share=Share())
    assert [len(r) for r in rows] == [1, 2, 2, 1, 2]
    assert pooled is None
    with torch.no_grad():
        for index, mine in enumerate(rows):
            expected = encode_text(tiny.towers, list(source.captions(index)[:2])).states
            torch.testing.assert_close(torch.from_numpy(values[list(mine)]).float(), expected, rtol=2e-3, atol=2e-3)
        empty = encode_text(tiny.towers, [""]).states
    torch.testing.assert_close(torch.from_numpy(np.array(values[:1])).float(), empty, rtol=2e-3, atol=2e-3)
    assert 0 not in {row for mine in rows for row in mine}


def test_the_whole_text_is_kept_beside_its_states(few: Callable, tmp_path: Path) -> None:
    """SDXL's, whose empty caption is zeros."""
    families.saved("sdxl", tmp_path / "model")
    model, source = load_model(tmp_path / "model"), few(5)
    states, pooled, rows = cache_text(model, source, tmp_path, captions=2, share=Share())
    assert pooled is not None
    assert not states[0].any()
    assert not pooled[0].any()
    with torch.no_grad():
        for index, mine in enumerate(rows):
            expected = model.encode(list(source.captions(index)[:2]))
            assert expected.pooled is not None
            assert np.array_equal(states[list(mine)], expected.states.half().numpy())
            # Another batch may round otherwise, by a last bit of float16.
            np.testing.assert_allclose(pooled[list(mine)], expected.pooled.half().numpy(), rtol=2e-3, atol=1e-4)


class Alike:
    """Every example has the same two captions, one of them empty."""

    def __len__(self) -> int:
        return 7

    def captions(self, index: int) -> tuple[str, ...]:
        return ("a red circle", "")


def test_equal_captions_are_encoded_once(tiny: Model, tmp_path: Path) -> None:
    values, _, rows = cache_text(tiny, Alike(), tmp_path, captions=None, share=Share())  # type: ignore[arg-type]
    assert len(values) == 2
    assert rows == [(1, 0)] * 7


def test_the_name_of_text_states(
    tiny: Model, tiny_builder: Callable[..., Model], few: Callable, tmp_path: Path
) -> None:
    for limit in (None, 1, 1):
        cache_text(tiny, few(3), tmp_path, captions=limit, share=Share())
    assert len(kept(tmp_path, "text")) == 2
    other = tiny_builder()
    with torch.no_grad():
        other.towers[0].encoder.get_input_embeddings().weight[0, 0] += 1e-6
    cache_text(other, few(3), tmp_path, captions=None, share=Share())
    assert len(kept(tmp_path, "text")) == 3


def test_weights_key_sees_values_names_types_and_shapes() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 4)
    key = weights_key(net)
    assert weights_key(net.eval()) == key
    twin = nn.Linear(4, 4)
    twin.load_state_dict(net.state_dict())
    assert weights_key(twin) == key
    assert weights_key(nn.Sequential(twin)) != key
    with torch.no_grad():
        twin.weight[3, 3] *= 1 + 2**-20
    assert weights_key(twin) != key
    assert weights_key(net.to(torch.bfloat16)) != key


def test_weights_key_takes_scalars_and_empty_tensors() -> None:
    net = nn.BatchNorm1d(2)  # has a scalar buffer
    net.register_buffer("none", torch.empty(0))
    first = weights_key(net)
    assert net.num_batches_tracked is not None
    net.num_batches_tracked += 1
    assert weights_key(net) != first
