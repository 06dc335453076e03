"""A batch is a pure function of its draw."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from latentgen.core.rand import Draw
from latentgen.data.captions import CachedWords
from latentgen.data.controls import Controls
from latentgen.data.fetch import CachedBatches, PictureBatches, from_bytes, to_bytes, to_tensor
from latentgen.data.latents import of_one_shape
from latentgen.data.masks import draw_masks

DrawOf = Callable[..., Draw]


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        k: torch.cat([p[k] for p in parts])
        if isinstance(parts[0][k], torch.Tensor)
        else [x for p in parts for x in p[k]]
        for k in parts[0]
    }


def cached(variants: int = 1, dropout: float = 0.0, examples: int = 8) -> CachedBatches:
    """Row r of `moments` holds mean r and deviation r + 0.5; row r of `states` holds r."""
    moments = np.zeros((variants * examples, 2, 1, 2, 2), dtype=np.float16)
    moments[:, 0] = np.arange(len(moments)).reshape(-1, 1, 1, 1)
    moments[:, 1] = moments[:, 0] + 0.5
    states = np.broadcast_to(np.arange(2 * examples + 1, dtype=np.float16).reshape(-1, 1, 1), (2 * examples + 1, 3, 2))
    rows = [(2 * i + 1, 2 * i + 2) for i in range(examples)]
    return CachedBatches(of_one_shape(moments, mirrors=variants > 1), CachedWords({"context": states}, rows, dropout))


def test_to_tensor_maps_bytes_to_one() -> None:
    picture = np.array([[[0, 51, 255]]], dtype=np.uint8)
    tensor = to_tensor([picture, picture])
    assert torch.equal(tensor, from_bytes(to_bytes([picture, picture])))
    assert tensor.shape == (2, 3, 1, 1)
    torch.testing.assert_close(tensor[0].flatten(), torch.tensor([-1.0, -0.6, 1.0]))


def test_pictures_are_those_of_the_indices(few: Callable, draw: DrawOf) -> None:
    source = few(6)
    batch = PictureBatches(source)(draw(indices=(3, 1, 5, 0, 2, 4, 3, 1)))
    assert batch["image"].dtype == torch.uint8
    assert torch.equal(batch["image"], to_bytes([source.image(i) for i in (3, 1, 5, 0, 2, 4, 3, 1)]))
    for index, caption in zip((3, 1, 5, 0, 2, 4, 3, 1), batch["caption"], strict=True):
        assert caption in source.captions(index)


def test_flip_mirrors_about_half(few: Callable, draw: DrawOf) -> None:
    d = draw(range(64), global_batch=64, indices=tuple(i % 6 for i in range(64)))
    plain = PictureBatches(few(6))(d)["image"]
    shown = PictureBatches(few(6), flip=True)(d)["image"]
    same = [torch.equal(a, b) for a, b in zip(plain, shown, strict=True)]
    mirrored = [
        torch.equal(a, torch.from_numpy(b.numpy()[..., ::-1].copy())) for a, b in zip(plain, shown, strict=True)
    ]
    assert all(a != b for a, b in zip(same, mirrored, strict=True)), "each picture is one or the other"
    assert 16 < sum(mirrored) < 48


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_captions_up_to_the_limit_all_occur(limit: int | None, few: Callable, draw: DrawOf) -> None:
    source, seen = few(3), {0: set(), 1: set(), 2: set()}
    for step in range(12):
        d = draw(step=step, indices=tuple(i % 3 for i in range(8)))
        for index, caption in zip(d.indices, PictureBatches(source, captions=limit)(d)["caption"], strict=True):
            seen[index].add(caption)
    assert seen == {i: set(source.captions(i)[:limit]) for i in range(3)}


def test_contrasts_belong_to_the_caption_drawn(few: Callable, draw: DrawOf) -> None:
    source, d = few(6), draw(range(64), global_batch=64, indices=tuple(i % 6 for i in range(64)))
    batch = PictureBatches(source, contrasts=3)(d)
    plain = PictureBatches(source)(d)
    assert batch["caption"] == plain["caption"], "they change no other draw"
    assert plain["contrast"] == [()] * 64
    found = set()
    for index, caption, false in zip(d.indices, batch["caption"], batch["contrast"], strict=True):
        respects = source.contrasts(index, caption)
        assert len(false) == 3
        found |= {
            (n, way) for text in false for n, ways in enumerate(respects) for way, w in enumerate(ways) if w == text
        }
    assert found == {(0, 0), (0, 1), (0, 2), (1, 0)}, "all respects and ways occur, and nothing else"
    negated = sum(text.startswith("no") for false in batch["contrast"] for text in false)
    assert 0.35 < negated / 192 < 0.65, "each respect as often as the other"


def test_captions_can_be_left_out(few: Callable, draw: DrawOf) -> None:
    assert PictureBatches(few(), captions=0)(draw(indices=(0,) * 8)).keys() == {"image"}


def places(whole: torch.Tensor, part: torch.Tensor) -> list[tuple[int, int]]:
    side = part.shape[-1]
    return [
        (t, e)
        for t in range(whole.shape[-2] - side + 1)
        for e in range(whole.shape[-1] - side + 1)
        if torch.equal(whole[:, t : t + side, e : e + side], part)
    ]


def test_a_patch_is_a_part_of_its_picture(few: Callable, draw: DrawOf) -> None:
    d = draw(indices=tuple(i % 6 for i in range(8)))
    whole, cut = PictureBatches(few())(d)["image"], PictureBatches(few(), patch=6)(d)["image"]
    assert cut.shape == (8, 3, 6, 6)
    found = [places(a, b) for a, b in zip(whole, cut, strict=True)]
    assert all(found)
    assert len({spot for spots in found for spot in spots}) > 3, "not always the same corner"


def test_a_patch_of_the_whole_side_is_the_picture(few: Callable, draw: DrawOf) -> None:
    d = draw(indices=(0, 1, 2, 3, 4, 5, 0, 1))
    assert torch.equal(PictureBatches(few(), patch=16)(d)["image"], PictureBatches(few())(d)["image"])


def test_more_tries_find_more_contrast(few: Callable, draw: DrawOf) -> None:
    """With more tries the first ones are still among those drawn, so contrast cannot fall."""

    def contrast(tries: int) -> torch.Tensor:
        d = draw(indices=tuple(i % 6 for i in range(8)))
        return (
            from_bytes(PictureBatches(few(), patch=5, patch_tries=tries)(d)["image"]).flatten(2).std(dim=2).sum(dim=1)
        )

    one, four, many = contrast(1), contrast(4), contrast(60)
    assert bool((four >= one - 1e-6).all())
    assert bool((many >= four - 1e-6).all())
    assert float(four.sum()) > float(one.sum())


def shown(source: Any, variants: int = 2) -> CachedBatches:
    """Batches that also bring pictures, masks and what is to be followed."""
    return dataclasses.replace(cached(variants), pictures=source, masks=True, controls=Controls(source, "picture"))


@pytest.mark.parametrize("kind", ["whole", "flipped patches", "contrasts", "cached", "shown"])
def test_batches_do_not_depend_on_the_cut(kind: str, few: Callable, draw: DrawOf) -> None:
    fetch = {
        "whole": PictureBatches(few(8)),
        "flipped patches": PictureBatches(few(8), flip=True, patch=8, patch_tries=2),
        "contrasts": PictureBatches(few(8), contrasts=2),
        "cached": cached(variants=2, dropout=0.5),
        "shown": shown(few(8)),
    }[kind]
    order = (7, 2, 5, 0, 1, 3, 6, 4)
    whole = fetch(draw(indices=order))
    parts = [fetch(draw(range(a, a + 2), indices=order[a : a + 2])) for a in range(0, 8, 2)]
    assert equal(joined(parts), whole)
    torch.rand(3)
    assert equal(fetch(draw(indices=order)), whole)
    assert not equal(fetch(draw(indices=order, step=1)), whole)


def test_cached_rows_belong_to_their_example(draw: DrawOf) -> None:
    order = (7, 2, 5, 0, 1, 3, 6, 4)
    batch = cached()(draw(indices=order))
    assert batch["mean"][:, 0, 0, 0].tolist() == list(order)
    assert torch.equal(batch["std"], batch["mean"] + 0.5)
    assert batch["context"].shape == (8, 3, 2)
    assert batch["context"].dtype == batch["mean"].dtype == torch.float32
    for index, row in zip(order, batch["context"][:, 0, 0].tolist(), strict=True):
        assert row in (2 * index + 1, 2 * index + 2)


def test_cached_mirrored_variants_are_taken_half_of_the_time(draw: DrawOf) -> None:
    d = draw(range(400), global_batch=400, indices=(3,) * 400)
    values = cached(variants=2)(d)["mean"][:, 0, 0, 0]
    assert values.unique().tolist() == [3, 11]
    assert 150 < int((values == 11).sum()) < 250  # five standard errors


def test_all_that_is_shown_of_an_example_is_mirrored_with_it(few: Callable, draw: DrawOf) -> None:
    source, d = few(8), draw(range(16), global_batch=16, indices=tuple(range(8)) * 2)
    batch = shown(source)(d)
    mirrored = batch["mean"][:, 0, 0, 0] >= 8
    assert 0 < int(mirrored.sum()) < 16
    for row, index in enumerate(d.indices):
        image = to_bytes([source.image(index)])[0]
        image = image.flip(-1) if mirrored[row] else image
        assert torch.equal(batch["image"][row], image)
        torch.testing.assert_close(batch["control"][row], 1 - image / 255)
    assert torch.equal(batch["mask"], draw_masks(d, 16, 16))
    plain = cached(2)(d)
    assert all(torch.equal(batch[key], value) for key, value in plain.items()), "nothing else changes"


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_share_of_captions_left_out(share: float, draw: DrawOf) -> None:
    d = draw(range(4000), global_batch=4000, indices=tuple(i % 8 for i in range(4000)))
    empty = (cached(dropout=share)(d)["context"][:, 0, 0] == 0).float().mean()
    assert abs(float(empty) - share) <= 5 * (share * (1 - share) / 4000) ** 0.5


def test_leaving_captions_out_changes_nothing_else(draw: DrawOf) -> None:
    d = draw()
    kept, dropped = cached(variants=2)(d), cached(variants=2, dropout=0.5)(d)
    assert torch.equal(kept["mean"], dropped["mean"])
    stays = dropped["context"][:, 0, 0] != 0
    assert 0 < int(stays.sum()) < 8
    assert torch.equal(kept["context"][stays], dropped["context"][stays])


def test_patches_end_at_their_step(few: Callable, draw: DrawOf) -> None:
    fetch = PictureBatches(few(8), patch=8, patch_steps=3)
    assert [fetch(draw(step=step))["image"].shape[-1] for step in (0, 2, 3, 9)] == [8, 8, 16, 16]


class Places:
    """Pictures that show where they are cut: red how far down, green how far to the right; masks show it too."""

    def __len__(self) -> int:
        return 8

    def shape(self, index: int) -> tuple[int, int]:
        return 4, 6

    def image(self, index: int, at: Any = (0.5, 0.5)) -> np.ndarray:
        picture = np.zeros((4, 6, 3), dtype=np.uint8)
        picture[..., 0], picture[..., 1] = round(255 * at[0]), round(255 * at[1])
        picture[..., 2] = np.arange(6)
        return picture

    def mask(self, index: int, at: Any = (0.5, 0.5)) -> np.ndarray | None:
        return None if index == 7 else self.image(index, at)[..., 1] + np.arange(6, dtype=np.uint8)

    def control(self, index: int, at: Any = (0.5, 0.5)) -> np.ndarray:
        return self.image(index, at)


def sizes_at(index: int, at: tuple[float, float]) -> list[float]:
    return [index, *at]


def test_all_of_an_example_is_cut_at_one_place_of_its_own(draw: DrawOf) -> None:
    source: Any = Places()
    more: dict[str, Any] = {"pictures": source, "weighing": source, "controls": Controls(source, "picture")}
    fetch = dataclasses.replace(cached(), latents=None, flip=True, crop=True, sizes=sizes_at, **more)
    d = draw(range(16), global_batch=16, indices=tuple(range(8)) * 2)
    batch = fetch(d)
    assert "mean" not in batch
    at = d.uniform("crop", (2,))
    mirrored = batch["image"][:, 2, 0, 0] == 5
    assert 0 < int(mirrored.sum()) < 16
    assert torch.equal(batch["image"][:, 0, 0, 0], (255 * at[:, 0]).round().byte())
    assert torch.equal(batch["image"][:, 1, 0, 0], (255 * at[:, 1]).round().byte())
    torch.testing.assert_close(batch["control"], batch["image"] / 255)
    for row, index in enumerate(d.indices):
        expected = torch.full((4, 6), 255) if index == 7 else batch["image"][row, 1] + batch["image"][row, 2]
        assert torch.equal(batch["loss_mask"][row, 0], expected.byte())
    left = torch.where(mirrored, 1 - at[:, 1], at[:, 1])
    torch.testing.assert_close(batch["sizes"], torch.stack([torch.tensor(d.indices).float(), at[:, 0], left], dim=1))
    again = PictureBatches(source, flip=True, crop=True, captions=0)(d)
    assert torch.equal(again["image"], batch["image"]), "the stages before cut at the same places by the same draws"


def test_whole_pictures_become_squares(few: Callable, draw: DrawOf) -> None:
    source = few(6, shapes=((16, 16), (12, 24), (24, 8)))
    batch = PictureBatches(source, captions=0, square=16)(draw(indices=(0, 1, 2, 3, 4, 5, 0, 1)))
    assert batch["image"].shape == (8, 3, 16, 16)
    assert torch.equal(batch["image"][0], to_bytes([source.image(0)])[0]), "a square stays as it is"
    corners = [source.image(1)[y, x] for y in (0, -1) for x in (0, -1)]
    found = [batch["image"][1, :, y, x].numpy() for y in (0, -1) for x in (0, -1)]
    assert np.abs(np.subtract(corners, found, dtype=int)).max() <= 20, "nothing is cut off"
