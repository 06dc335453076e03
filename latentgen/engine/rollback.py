"""A good state in main memory, to go back to when the weights have gone bad: many steps in a row are spikes.

It is looked at every `every` steps alone, which is also when the device is waited for: what happens then does not
depend on how often anything is logged or saved. A step before was good: its state is copied. `IN_ROW` or more steps
before were bad: that copy is put back, and training goes on with the next batches. It is part of every checkpoint, so
that a resumed run goes back to where an uninterrupted one does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from latentgen.engine import sharding
from latentgen.engine.agreement import mains
from latentgen.engine.checkpoint import Contents, Tensors
from latentgen.engine.guard import require_finite
from latentgen.engine.spikes import IN_ROW, Spikes
from latentgen.engine.staging import Staging

logger = logging.getLogger(__name__)

GOOD = "good-"
"""Before the names of a checkpoint's groups that are of the good state."""


class Rollback:
    """Keeps the good state of one stage. All processes must ask together; each keeps its own rows of what is cut.

    Args:
        every: steps between two looks; None keeps nothing.

    Attributes:
        step: whose state is kept, None before the first.
        used: whether it has been gone back to already.
    """

    def __init__(self, accelerator: Accelerator, spikes: Spikes, every: int | None) -> None:
        self.accelerator, self.spikes, self.every = accelerator, spikes, every
        self.step: int | None = None
        self.used = False
        self._tensors: Mapping[str, Tensors] = {}
        self._staging = Staging()

    def due(self, step: int) -> bool:
        """Whether `look` is due after `step` steps."""
        return self.every is not None and step % self.every == 0

    def look(
        self, step: int, groups: Mapping[str, Tensors], put: Callable[[Mapping[str, Tensors]], None]
    ) -> dict[str, Any] | None:
        """Keep the state after `step` steps if it is good, or go back if it has gone bad; waits for the device.

        Args:
            groups: what training changes, as in a checkpoint.
            put: takes such groups back, of which tensors that are cut hold this process's rows.

        Returns:
            What to write down of a rollback; None where there was none.

        Raises:
            FloatingPointError: it has gone bad a second time since that good state, or a weight is not finite.
        """
        row = mains(self.accelerator, int(self.spikes.row))
        if row == 0:
            self._keep(step, groups)
        if row < IN_ROW or self.step is None:
            return None
        if self.used:
            raise FloatingPointError(
                f"the last {row} steps up to step {step} were bad, and so they were the time before: going back to the "
                f"state of step {self.step} does not help; nothing of them was saved; lower the learning rate"
            )
        put(self._tensors)
        self.used = True
        if self.accelerator.is_main_process:
            logger.warning(
                "step %d: the last %d steps were bad; going back to the state of step %d, on with the next batches",
                step, row, self.step,
            )  # fmt: skip
        return {"what": "rollback", "to": self.step, "bad": row}

    def _keep(self, step: int, groups: Mapping[str, Tensors]) -> None:
        require_finite(groups, self.accelerator, f"the good state of step {step}")
        here = {
            group: {name: sharding.here(value) for name, value in tensors.items()} for group, tensors in groups.items()
        }
        self._tensors = self._staging.copies(here)
        self.step, self.used, self.spikes.patient = step, False, True

    def contents(self, groups: Mapping[str, Tensors]) -> dict[str, Contents]:
        """The good state for a checkpoint: group -> this process's tensors, and which rows they are.

        Args:
            groups: the present state, whose tensors are cut alike.
        """
        found: dict[str, Contents] = {}
        for group, tensors in self._tensors.items():
            cut = {name: sharding.rows(groups[group][name]) for name in tensors}
            rows = {name: (own.start, groups[group][name].shape[0]) for name, own in cut.items() if own is not None}
            found[GOOD + group] = Contents(tensors, rows)
        return found

    def state_dict(self) -> dict[str, Any] | None:
        """What is kept beside the tensors; None without a good state."""
        return None if self.step is None else {"step": self.step, "used": self.used}

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take it from a checkpoint.

        Args:
            tensors: all groups of the checkpoint.
        """
        self.step, self.used = state["step"], state["used"]
        self._tensors = {
            group.removeprefix(GOOD): dict(own) for group, own in tensors.items() if group.startswith(GOOD)
        }
        self.spikes.patient = self.step is not None
