"""The guard: a step whose loss or gradient is not finite, or whose loss is a spike (`engine.spikes`), changes nothing,
is counted, and its examples are named.

Whether a step is good is decided on the device before the optimizer moves. On the CPU reading the verdict costs
nothing and the update is left out; on a GPU nobody waits for it: torch's fused optimizers and Muon take it as a tensor,
as they do from a gradient scaler, and leave weights and moments as they are. It is read on logging and saving steps.
Optimizers that know no such thing (8-bit ones), and float16's scaler, cost one reading a step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latentgen.core.tensors import not_finite
from latentgen.engine import sharding
from latentgen.engine.agreement import anywhere
from latentgen.engine.spikes import IN_ROW, Compared, Spikes
from latentgen.engine.task import MicroBatches

logger = logging.getLogger(__name__)

SHOWN = 16
"""Examples named in one line of the log; `metrics.jsonl` has all."""

PART = 1 << 28
"""Bytes of weights whose averages are moved at once, for which as many more are needed."""

HELD = 16
"""Verdicts, one for each phase of a step, whose batches are held until they are read; of earlier ones nobody looks into
the data any more."""


@dataclass(frozen=True)
class _Verdict:
    """What is known of one phase of a step; the tensors wait on the device until they are read."""

    step: int
    phase: str
    names: tuple[str, ...]
    skip: Tensor
    loss: Tensor
    norm: Tensor
    parts: Tensor
    compared: Compared
    batches: MicroBatches


class Guard:
    """Judges every step of one stage.

    A step has one verdict for all processes. Phases that come after a bad one in the same step are left out with it;
    one that came before has been applied and stays.

    Args:
        limit: so many steps in a row that are not finite end the run. Spikes among them do not count.
        spikes: what losses have been.

    Attributes:
        in_row, total: steps up to the last reading, those in a row that were not finite, and all bad ones; part of a
            checkpoint.
        hopeless: `limit` was reached.
    """

    def __init__(self, accelerator: Accelerator, limit: int, spikes: Spikes | None = None) -> None:
        self.accelerator, self.limit = accelerator, limit
        self.spikes = Spikes(None, accelerator.device) if spikes is None else spikes
        self.in_row = self.total = 0
        self.hopeless = False
        self._pending: list[_Verdict] = []
        self._step_skip = torch.zeros((), device=accelerator.device)
        self.host = accelerator.device.type == "cpu"

    def begin(self) -> None:
        """Before the first phase of a step."""
        self._step_skip = torch.zeros((), device=self.accelerator.device)

    def end(self) -> None:
        """After the last phase of a step."""
        self.spikes.end(self._step_skip)

    def judge(
        self, step: int, phase: str, names: Iterable[str], losses: Sequence[Tensor], norm: Tensor, batches: MicroBatches
    ) -> Tensor:
        """1 where the update must be left out, else 0, as a 0-d tensor on the device. All processes must ask.

        Args:
            names: of the measurements that a bad step takes no part in.
            losses: one of each micro-batch.
            norm: of the gradient, over all processes. In float16 gradients overflow by design: its scaler sees to that.
        """
        parts = torch.stack([loss.detach().float() for loss in losses])
        loss = parts.mean()
        if self.accelerator.num_processes > 1:  # the mean of all is not finite where one is not
            reduced = self.accelerator.reduce(loss, "mean")
            assert isinstance(reduced, Tensor)
            loss = reduced
        good = loss.isfinite()
        if self.accelerator.scaler is None:
            good = good & norm.isfinite()
        compared = self.spikes.judge(phase, loss, good & (self._step_skip == 0))
        self._step_skip = torch.maximum(self._step_skip, torch.maximum((~good).float(), compared.spike))
        verdict = _Verdict(step, phase, tuple(names), self._step_skip, loss, norm, parts, compared, batches)
        self._pending.append(verdict)
        if len(self._pending) > HELD:
            old = self._pending[-HELD - 1]
            self._pending[-HELD - 1] = replace(old, batches=[(draw, None) for draw, _ in old.batches])
        return verdict.skip

    @property
    def skip(self) -> Tensor:
        """The verdict on the present step so far."""
        return self._step_skip

    def apply(self, optimizer: Any) -> None:
        """The step of accelerate's `optimizer`, unless the verdict is against it."""
        inner, scaler = optimizer.optimizer, self.accelerator.scaler
        if self.host or scaler is not None or not isinstance(inner, torch.optim.AdamW):
            if not self.skip:
                optimizer.step()
            elif scaler is not None:  # it has looked at these gradients, and must be told that they are done with
                scaler.update()
            return
        inner.grad_scale, inner.found_inf = None, self.skip  # type: ignore[attr-defined]
        optimizer.step()
        del inner.grad_scale, inner.found_inf  # type: ignore[attr-defined]

    def read(self) -> list[dict[str, Any]]:
        """What was bad since the last reading, one entry a step, named in the log; waits for the device.

        All processes must ask together. Call `raise_if_hopeless` when the entries are written down.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return []
        skips = torch.stack([verdict.skip for verdict in pending]).tolist()
        found: list[dict[str, Any]] = []
        for step in sorted({verdict.step for verdict in pending}):
            bad = [v for v, skip in zip(pending, skips, strict=True) if v.step == step and skip]
            if not bad:
                self.in_row = 0
                continue
            self.total += 1
            found.append(self._entry(bad))
            self.in_row += found[-1]["what"] != "spike"
            self.hopeless = self.hopeless or self.in_row >= self.limit
        return found

    def raise_if_hopeless(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Raise `FloatingPointError` when `limit` steps in a row were bad, naming what and which examples."""
        if self.hopeless:
            last = next((entry for entry in reversed(entries) if entry["what"] != "spike"), {})
            raise FloatingPointError(
                f"{self.limit} steps in a row were skipped, up to step {last.get('step')}: {last.get('what')} not "
                f"finite (examples {_few(last.get('examples', []))}); nothing of them was saved; "
                "lower the learning rate, or look at those examples"
            )

    def _entry(self, bad: Sequence[_Verdict]) -> dict[str, Any]:
        first = bad[0]
        loss, norm = float(first.loss), float(first.norm)
        limit, anew = float(first.compared.limit), bool(first.compared.anew)
        what = "spike" if first.compared.spike else "gradient" if math.isfinite(loss) else "loss"
        examples, in_data = self._examples(first)
        entry = {
            "step": first.step + 1, "phase": first.phase, "what": what, "loss": str(loss), "grad_norm": str(norm),
            "examples": examples, "not_finite_in_data": in_data, "skipped": self.total,
            "names": [name for verdict in bad for name in verdict.names],
        }  # fmt: skip
        wrong = f"{what} not finite"
        if what == "spike":
            entry |= {"limit": limit, "anew": anew}
            wrong = f"loss {loss:.4g} is a spike (limit {limit:.4g})"
        if self.accelerator.is_main_process:
            inside = f"; not finite in the data: {_few(in_data)}" if in_data else ""
            after = f"; {IN_ROW} bad steps in a row: from now on this is the loss's level" if anew else ""
            logger.warning(
                "step %d: %s in phase %s, the step was skipped; examples %s%s%s",
                first.step + 1, wrong, first.phase, _few(examples), inside, after,
            )  # fmt: skip
        return entry

    def _examples(self, verdict: _Verdict) -> tuple[list[int], list[int]]:
        """Numbers of the examples whose micro-batches had a bad loss, not finite or above the limit, all of the step's
        if none; and of bad inputs.

        Of all processes, whose shares of a batch are of one size.
        """
        rows, limit = [], float(verdict.compared.limit)
        for (draw, batch), loss in zip(verdict.batches, verdict.parts.tolist(), strict=True):
            wrong, bad = _wrong_rows(batch, len(draw.indices)), not math.isfinite(loss) or loss > limit
            rows += [[index, bad, row in wrong] for row, index in enumerate(draw.indices)]
        table = torch.tensor(rows, dtype=torch.int64, device=self.accelerator.device).reshape(-1, 3)
        if self.accelerator.num_processes > 1:
            gathered = self.accelerator.gather(table)
            assert isinstance(gathered, Tensor)
            table = gathered
        listed = table.tolist()
        suspects = [index for index, bad, _ in listed if bad] or [index for index, _, _ in listed]
        return suspects, [index for index, _, wrong in listed if wrong]

    def state_dict(self) -> dict[str, int]:
        return {"in_row": self.in_row, "total": self.total}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.in_row, self.total = state["in_row"], state["total"]


def _wrong_rows(batch: Any, count: int) -> set[int]:
    """Rows of a batch's tensors that hold something not finite."""
    values = batch.values() if isinstance(batch, Mapping) else ()
    found: set[int] = set()
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim and value.shape[0] == count:
            found.update((~value.isfinite()).flatten(1).any(1).nonzero().flatten().tolist() if value.ndim > 1
                         else (~value.isfinite()).nonzero().flatten().tolist())  # fmt: skip
    return found


def _few(examples: Sequence[int]) -> str:
    text = ", ".join(map(str, examples[:SHOWN]))
    return text if len(examples) <= SHOWN else f"{text} and {len(examples) - SHOWN} more"


def require_finite(groups: Mapping[str, Mapping[str, Tensor]], accelerator: Accelerator, what: str) -> None:
    """Raise `FloatingPointError` in all processes unless every tensor is finite everywhere; waits for the device.

    Args:
        groups: group -> name -> tensor, whole or this process's part.
        what: is refused ("the checkpoint of step 3").
    """
    bad = not_finite(
        {f"{group}/{name}": sharding.here(value) for group, own in groups.items() for name, value in own.items()},
    )
    if anywhere(accelerator, bool(bad)):
        which = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise FloatingPointError(f"{what} is refused: {which or 'a part in another process'} not finite")


@torch.no_grad()
def lerp_unless(skip: Tensor, mine: list[Tensor], theirs: list[Tensor], weight: float) -> None:
    """Move `mine` towards `theirs` by `weight`, in place, unless `skip`; then not a bit changes, whatever `theirs` is.

    On a GPU nobody waits for `skip`: it is a step of plain SGD along the difference, whose kernel takes it.
    """
    if not mine:  # all is frozen, and the kernels take no empty lists
        return
    if skip.device.type != "cpu":
        lerp_on_device(skip, mine, theirs, weight)
    elif not skip:
        torch._foreach_lerp_(mine, theirs, weight)


@torch.no_grad()
def lerp_on_device(skip: Tensor, mine: list[Tensor], theirs: list[Tensor], weight: float) -> None:
    """`lerp_unless` without reading `skip`."""
    for part in parts_of(mine):
        along = torch._foreach_sub(mine[part], theirs[part])
        torch._fused_sgd_(
            mine[part], along, [], weight_decay=0.0, momentum=0.0, lr=weight, dampening=0.0, nesterov=False,
            maximize=False, is_first_step=False, grad_scale=None, found_inf=skip,
        )  # fmt: skip


def parts_of(tensors: Sequence[Tensor]) -> list[slice]:
    """Runs of tensors that are worked on at once: of `PART` bytes at most, or of one tensor."""
    parts, start, size = [], 0, 0
    for number, tensor in enumerate(tensors):
        own = tensor.numel() * tensor.itemsize
        if number > start and size + own > PART:
            parts.append(slice(start, number))
            start, size = number, 0
        size += own
    return [*parts, slice(start, len(tensors))] if tensors else parts
