"""Words look for their places: the similarity written out, and the same gradients from two processes as from one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from latentgen.models.late_interaction import LateInteraction, late_loss, late_similarity, spoken

B, K, P, T, D = 4, 2, 5, 6, 3


def unit(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def heard(count: int) -> Tensor:
    """Captions of two to five words."""
    return (torch.arange(T)[None] < 2 + torch.arange(count)[:, None] % 4).float()


def test_what_is_spoken_lies_between_the_markers() -> None:
    tokens = torch.tensor([[7, 1, 2, 9, 9, 9], [7, 9, 9, 9, 9, 9], [7, 1, 2, 3, 4, 9]])
    assert spoken(tokens, 9).tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]]


def test_similarity_is_the_mean_of_each_words_best_place() -> None:
    places, words, mask = unit(B, P, D), unit(3, T, D), heard(3)
    found = late_similarity(places, words, mask)
    assert found.shape == (B, 3)
    for i in range(B):
        for j in range(3):
            best = [max(float(p @ w) for p in places[i]) for w, m in zip(words[j], mask[j], strict=True) if m]
            assert float(found[i, j]) == pytest.approx(sum(best) / len(best), abs=1e-6)


def test_a_pictures_own_captions() -> None:
    places, words, mask = unit(B, P, D), unit(B, K, T, D), heard(B * K).view(B, K, T)
    found = late_similarity(places, words, mask)
    for i in range(B):
        torch.testing.assert_close(found[i], late_similarity(places[i : i + 1], words[i], mask[i])[0])


def test_words_that_do_not_count_change_nothing() -> None:
    places, words, mask = unit(B, P, D), unit(B, T, D), heard(B)
    other = torch.where(mask[..., None] > 0, words, -words)
    torch.testing.assert_close(late_similarity(places, other, mask), late_similarity(places, words, mask))


@pytest.mark.parametrize("false_captions", [0, K])
def test_loss_is_the_symmetric_cross_entropy(false_captions: int) -> None:
    places, scale = unit(B, P, D), torch.tensor(3.0)
    words, mask = unit(B * (1 + false_captions), T, D), heard(B * (1 + false_captions))
    logits = 3.0 * late_similarity(places, words[:B], mask[:B])
    rows = []
    for i in range(B):
        own = slice(B + i * false_captions, B + (i + 1) * false_captions)
        wrong = 3.0 * late_similarity(places[i : i + 1], words[own], mask[own])[0] if false_captions else logits[i, :0]
        rows.append(torch.cat([logits[i], wrong]))
    expected = (functional.cross_entropy(torch.stack(rows), torch.arange(B)) + _columns(logits)) / 2
    torch.testing.assert_close(late_loss(places, words, mask, scale, false_captions), expected)


def _columns(logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits.T, torch.arange(len(logits)))


class Whole(nn.Module):
    """Projections and loss behind one forward, as the towers are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.late = LateInteraction(7, 9, D)

    def forward(self, rows: slice) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        seen, said = torch.randn(B, P, 7, generator=generator), torch.randn(B, 1 + K, T, 9, generator=generator)
        said, mask = said[rows], heard(B * (1 + K)).view(B, 1 + K, T)[rows]
        # The order of a batch: all true captions, then each picture's false ones.
        said, mask = (torch.cat([x[:, 0], x[:, 1:].flatten(0, 1)]) for x in (said, mask))
        places, words = self.late(seen[rows], said)
        return late_loss(places, words, mask, self.late.logit_scale.exp(), K)


def _two(folder: str) -> None:
    torch.set_num_threads(1)
    rank = distributed.get_rank()
    model = DistributedDataParallel(Whole())
    loss = model(slice(rank * B // 2, (rank + 1) * B // 2))
    loss.backward()
    gradients = {name: p.grad for name, p in model.module.named_parameters()}
    torch.save({"loss": loss.detach(), **gradients}, Path(folder, f"{rank}.pt"))


def test_two_processes_give_the_loss_and_the_gradients_of_one(tmp_path: Path) -> None:
    debug_launcher(_two, args=(str(tmp_path),), num_processes=2)
    model = Whole()
    loss = model(slice(None))
    loss.backward()
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close((parts[0].pop("loss") + parts[1].pop("loss")) / 2, loss.detach())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        for part in parts:
            torch.testing.assert_close(part[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_it_learns_which_word_belongs_where() -> None:
    """Pictures of two things in two places, captions that name them in either order."""
    torch.manual_seed(0)
    late, things = LateInteraction(8, 8, 8), torch.randn(6, 8)
    optimizer = torch.optim.AdamW(late.parameters(), lr=1e-2)
    mask, names = torch.ones(16, 2), torch.randn(6, 8)
    for _ in range(150):
        which = torch.stack([torch.randperm(6)[:2] for _ in range(16)])
        places, words = late(things[which], names[which.flip(1)])
        loss = late_loss(places, words, mask, late.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        places, words = late(things[None], names[None])
    assert (words[0] @ places[0].T).argmax(dim=1).tolist() == list(range(6))
