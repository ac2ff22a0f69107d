"""The length of a run: fixed in steps, or fitted to a wall-clock budget from measured times."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from bestiary.train.experiment import Experiment

_UNKNOWN = 1 << 30  # steps: until something is measured the schedule stands at its start
_WINDOW = 2048  # newest steps whose time is averaged
_FINISH = 2.0  # seconds for the last writes


class Clock:
    """Times the steps, evaluations and saves of this process, and says how many steps there are.

    Attributes:
      total: length of the run in steps.
      compile_seconds: what the first step took longer than a step.
    """

    def __init__(self, experiment: Experiment, started: float, used: float, total: int | None):
        """
        Args:
          started: when this process began (`time.monotonic`).
          used: seconds that earlier processes spent on the run.
          total: their last estimate.
        """
        self._experiment = experiment
        self._origin = started - used
        self.total = experiment.steps or total or _UNKNOWN
        self.compile_seconds = 0.0
        self.step_seconds: float | None = None
        self._pauses: dict[str, float] = {}
        self._paused = 0.0
        self._laps = deque([(0, 0.0)], _WINDOW)

    @property
    def used(self) -> float:
        """Seconds spent on the run, all processes together."""
        return time.monotonic() - self._origin

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """What happens inside is no step: an "evaluation" or a "save"."""
        before = time.monotonic()
        yield
        seconds = time.monotonic() - before
        self._paused += seconds
        self._pauses[kind] = seconds

    def compiled(self, seconds: float, step: int) -> None:
        """The first step of this process, number `step`, took `seconds`; laps begin after it."""
        self.compile_seconds = seconds
        self._laps = deque([(step, time.monotonic() - self._paused)], _WINDOW)

    def lap(self, step: int) -> None:
        """`step` steps are known to be finished."""
        now = time.monotonic() - self._paused
        first, then = self._laps[0]
        if step > self._laps[-1][0]:
            self._laps.append((step, now))
            self.step_seconds = (now - then) / (step - first)

    @property
    def measured(self) -> bool:
        """Whether a length is known, or enough steps were timed to tell it."""
        (first, then), (last, now) = self._laps[0], self._laps[-1]
        return self.total != _UNKNOWN or last - first >= 20 or now - then >= 1

    def left(self, step: int) -> float:
        """Seconds until the end, if `total` holds."""
        if self.step_seconds is None:
            return 0.0
        return (self.total - step) * self.step_seconds + self._overhead(step)

    def fit(self, issued: int) -> None:
        """Fits `total` to the time that is left, where `issued` steps are under way or finished.

        A quarter of a change is taken at once, all of it close to the end.
        """
        if self._experiment.minutes is None or self.step_seconds is None or not self.measured:
            return
        step, left = self._laps[-1][0], self._experiment.minutes * 60 - self.used
        if self.total == _UNKNOWN:
            self.total = issued + round(max(left, 0) / self.step_seconds)
        wish = step + (left - self._overhead(step)) / self.step_seconds
        close = wish - issued < 0.1 * wish
        change = (wish - self.total) * (1 if close else 0.25)
        self.total = max(issued + 1, round(self.total + change))

    def _overhead(self, step: int) -> float:
        """Seconds of the evaluations and saves to come."""
        evaluations, saves = self._experiment.evaluation, self._experiment.checkpoints
        rest = _FINISH
        for kind, every in (("evaluation", evaluations.every), ("save", saves.every)):
            if kind in self._pauses:
                count = 1 if not every else max(1, -(-self.total // every) - step // every)
                rest += self._pauses[kind] * count
            elif kind == "evaluation":
                rest += self.compile_seconds  # it is compiled first, in less time than the step
        return rest
