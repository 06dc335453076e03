"""A loss that can be compared between steps: fixed examples, fixed noise and noise levels, the averaged networks.

It is measured on examples that were held out and, with the same noise position by position, on as many that are trained
on; when the two part, the network begins to learn its examples by heart. Draws are functions of the seed alone, and
networks are in evaluation mode: a run with validation ends in the same weights as one without.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from latentgen.core.rand import Draw
from latentgen.engine.parting import Parting, standard_error

logger = logging.getLogger(__name__)

Measure = Callable[[Mapping[str, nn.Module], Any, Draw], dict[str, Tensor]]
"""(averaged networks, batch, draw) -> named losses of each example [b]; "loss" is the one that scores."""


@dataclass(frozen=True)
class FixedExamples:
    """Examples of one source, the same at every validation.

    Args:
        fetch: makes the batch of a `Draw`, whose `indices` name the examples.
        indices: which ones.
        kinds: of each; those of different kinds do not go into one batch, and each kind stands together. () says that
            all are of one.
    """

    fetch: Callable[[Draw], Any]
    indices: tuple[int, ...]
    kinds: tuple[Any, ...] = ()

    def borders(self) -> set[int]:
        """Positions at which another kind begins."""
        return {at for at, (one, next_) in enumerate(itertools.pairwise(self.kinds), 1) if one != next_}


@dataclass(frozen=True)
class Score:
    """The held-out loss after `step` steps, and the standard error of it as a mean over examples."""

    step: int
    loss: float
    error: float


class Validation:
    """Measures a stage.

    Args:
        measure: the loss of each example.
        held_out, seen: as many of the one as of the other, at least 2; position by position they get the same draws.
        seed, stage: what the draws are functions of.
        every: steps between two validations.
        parts: how often each example is measured; `measure` finds the number of the time in `Draw.step`.
        batch: examples of one forward pass.
        together: the loss compares examples with each other: every process measures all of them at once.
    """

    def __init__(
        self,
        measure: Measure,
        held_out: FixedExamples,
        seen: FixedExamples,
        *,
        seed: int,
        stage: str,
        every: int,
        parts: int = 1,
        batch: int = 64,
        together: bool = False,
    ) -> None:
        assert len(held_out.indices) == len(seen.indices) > 1
        self.measure, self.sets = measure, {"held_out": held_out, "seen": seen}
        self.count, self.seed, self.stage, self.every = len(seen.indices), seed, stage, every
        self.parts, self.batch, self.together = parts, batch, together
        self.parting = Parting()
        self.borders = sorted(held_out.borders() | seen.borders())  # of both, so that both are cut alike
        self.score: Score | None = None
        self.best: Score | None = None

    def due(self, step: int, last: int) -> bool:
        """Whether the state after `step` steps of `last` is to be measured and has not been."""
        return (self.score is None or self.score.step != step) and (step == last or step % self.every == 0)

    @torch.no_grad()
    def run(
        self,
        networks: Mapping[str, nn.Module],
        step: int,
        accelerator: Accelerator,
        stopping: Callable[[], bool] = lambda: False,
    ) -> dict[str, float] | None:
        """Measure the averaged `networks` after `step` steps; all processes must ask, and all get the values.

        `stopping` is asked before each batch, by every process as often; None when it ended the measuring.

        Returns:
            For both sets each loss and its standard error, `held_out/loss` and `held_out/loss_se`, where there are
            several parts `held_out/error/1` and so on; `gap`, held-out less seen loss, and `gap_se`; `parting`, for how
            many validations the two have been parting (see `engine.parting`).
        """
        values: dict[str, float] = {}
        losses: dict[str, Tensor] = {}
        for name, examples in self.sets.items():
            each = self._losses(networks, examples, accelerator, stopping)
            if each is None:
                return None
            for key, of_part in each.items():
                values |= _mean(f"{name}/{key}", of_part.mean(dim=0))
                if self.parts > 1 and key != "loss":
                    for part, row in enumerate(of_part):
                        values |= _mean(f"{name}/{key}/{part + 1}", row)
            losses[name] = each["loss"].mean(dim=0)
        values |= _mean("gap", losses["held_out"] - losses["seen"])
        self.score = Score(step, values["held_out/loss"], values["held_out/loss_se"])
        if self.best is None or self.score.loss < self.best.loss:
            self.best = self.score
        values["parting"] = float(self.parting.add(losses["held_out"], losses["seen"]))
        if accelerator.is_main_process:
            self._tell(step, values)
        return values

    def _losses(
        self,
        networks: Mapping[str, nn.Module],
        examples: FixedExamples,
        accelerator: Accelerator,
        stopping: Callable[[], bool],
    ) -> dict[str, Tensor] | None:
        """Every loss of every example, `[parts, count]` float64, the same on all processes."""
        rank, world = accelerator.process_index, accelerator.num_processes
        shares = [[range(self.count)]] if self.together else _batches(self.count, self.batch, world, self.borders)
        batches, rounds = shares[0 if self.together else rank], max(map(len, shares))
        found: dict[str, Tensor] = {}
        for part in range(self.parts):
            for number in range(rounds):
                if stopping():
                    return None
                if number >= len(batches):
                    continue
                rows = batches[number]
                indices = examples.indices[rows.start : rows.stop]
                draw = Draw(self.seed, f"{self.stage} validation", part, self.count, rows, indices)
                with accelerator.autocast():
                    losses = self.measure(networks, examples.fetch(draw), draw)
                for key, value in losses.items():
                    empty = torch.zeros(self.parts, self.count, device=value.device)
                    found.setdefault(key, empty)[part, rows.start : rows.stop] = value.float()
        if world == 1 or self.together:
            return {key: value.cpu().double() for key, value in found.items()}
        return _summed(found, (self.parts, self.count), accelerator)

    def _tell(self, step: int, values: Mapping[str, float]) -> None:
        told = [f"{values[f'{name}/loss']:.5f} ± {values[f'{name}/loss_se']:.5f}" for name in self.sets]
        logger.info("%s, step %d: held-out loss %s; on training examples %s", self.stage, step, *told)
        if self.parting.begins:
            assert self.best is not None
            logger.warning(
                "%s, step %d: the loss falls on training examples but no longer on held-out ones (%s and %s, the best "
                "was %.5f after step %d): it learns its examples by heart; stop here, or train on more pictures",
                *(self.stage, step, told[1], told[0], self.best.loss, self.best.step),
            )

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint: what was measured, and what the next warning depends on."""
        scores = [[s.step, s.loss, s.error] for s in (self.score, self.best) if s is not None]
        return {"scores": torch.tensor(scores, dtype=torch.float64).view(-1, 3), **self.parting.state_dict()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        found = [Score(int(step), loss, error) for step, loss, error in state["scores"].tolist()]
        self.score, self.best = found or (None, None)
        self.parting.load_state_dict(state)


def _batches(count: int, size: int, world: int, borders: Sequence[int] = ()) -> list[list[range]]:
    """Each process's batches, of at most `size` of `count` positions; none reaches over a border."""
    share = math.ceil(count / world)
    result = []
    for rank in range(world):
        start, end = min(count, rank * share), min(count, (rank + 1) * share)
        cuts = [start, *(at for at in borders if start < at < end), end]
        runs = itertools.pairwise(cuts)
        result.append([range(at, min(at + size, stop)) for first, stop in runs for at in range(first, stop, size)])
    return result


def _summed(found: Mapping[str, Tensor], shape: tuple[int, int], accelerator: Accelerator) -> dict[str, Tensor]:
    """Each process filled its positions; one that had none does not know the names, which the first one says."""
    names: list[Any] = [sorted(found)]
    broadcast_object_list(names)
    result = {}
    for name in names[0]:
        mine = found.get(name, torch.zeros(shape, device=accelerator.device))
        total = accelerator.reduce(mine, "sum")
        assert isinstance(total, Tensor)
        result[name] = total.cpu().double()
    return result


def _mean(name: str, each: Tensor) -> dict[str, float]:
    return {name: float(each.mean()), f"{name}_se": standard_error(each)}
