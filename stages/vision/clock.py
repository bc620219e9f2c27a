"""How far a training run is, when passes over the examples may differ in length.

A policy may drop examples, and how many steps a pass takes is then known when it begins and not before. So schedules
(learning rate, warm-up, the share on whole images, the progress bar) are told in steps of a nominal pass, all of which
are equally long: `epochs: E` is E passes, and all schedules end with the last step that is really taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Clock:
    """nominal: steps of a nominal pass. total: nominal steps of the run. epoch, position: passes done, and real steps
    done of the present one, which has `steps` of them.
    """

    nominal: int
    total: int
    epoch: int = 0
    position: int = 0
    steps: int = 1

    def begin(self, examples: int, batch: int) -> None:
        """The present pass has this many examples, `batch` a step. The last one of a run may be a part of a pass."""
        self.steps = max(1, round(self._span / self.nominal * math.ceil(examples / batch)))

    @property
    def now(self) -> float:
        """Nominal steps gone, `total` at the end; exactly the real steps where every pass is a nominal one."""
        return min(self.total, self.epoch * self.nominal + self.position * self._span / self.steps)

    @property
    def within(self) -> bool:
        """Whether steps of the present pass are left."""
        return self.position < self.steps

    @property
    def done(self) -> bool:
        return self.epoch * self.nominal >= self.total

    def end_epoch(self) -> None:
        self.epoch, self.position = self.epoch + 1, 0

    @property
    def _span(self) -> int:
        """Nominal steps of the present pass."""
        return min(self.nominal, max(0, self.total - self.epoch * self.nominal))
