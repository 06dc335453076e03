"""Words look for their places: the similarity written out, and the same gradients from two processes as from one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from spawned import in_two_processes
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
        self.late = LateInteraction(P, 7, 9, D)

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
    in_two_processes(_two, str(tmp_path))
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


def learned(late: LateInteraction, things: Tensor, names: Tensor, whereabouts: Tensor) -> None:
    """Train on pictures of two things in two places; their captions name both, in either order, and say where."""
    optimizer = torch.optim.AdamW(late.parameters(), lr=1e-2)
    for _ in range(200):
        which = torch.stack([torch.randperm(len(things))[:2] for _ in range(16)])
        said = names[which]
        true, false = (said + whereabouts).flip(1), (said + whereabouts.flip(0)).flip(1)
        places, words = late(things[which], torch.cat([true, false]))
        loss = late_loss(places, words, torch.ones(32, 2), late.logit_scale.exp(), 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_it_learns_what_a_word_means_and_where_it_is() -> None:
    torch.manual_seed(0)
    late, things, names, whereabouts = (
        LateInteraction(2, 8, 8, 8),
        torch.randn(6, 8),
        torch.randn(6, 8),
        0.5 * unit(2, 8),
    )
    learned(late, things, names, whereabouts)
    both = torch.ones(6, 2)
    with torch.no_grad():
        # Each picture shows one thing in both places; each caption names one thing twice.
        places, words = late(things[:, None].expand(6, 2, 8), names[:, None] + whereabouts)
        assert late_similarity(places, words, both).argmax(dim=1).tolist() == list(range(6))
        pairs = torch.tensor([(i, j) for i in range(6) for j in range(6) if i != j])
        right = late(things[pairs], names[pairs] + whereabouts)
        wrong = late(things[pairs], names[pairs] + whereabouts.flip(0))
        mask = torch.ones(len(pairs), 1, 2)
        better = late_similarity(right[0], right[1][:, None], mask) > late_similarity(wrong[0], wrong[1][:, None], mask)
    assert float(better.float().mean()) > 0.9, "which of the two is where"
