"""The length of a run: fixed in steps, or fitted to a wall-clock budget from measured times."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from bestiary.train.experiment import Experiment

_UNKNOWN = 1 << 30  # steps: until something is measured the schedule stands at its start
_WINDOW = 2048  # newest steps whose time is averaged
_FORWARD = 0.4  # an evaluation, as part of a step
_FINISH = 2.0  # seconds for the last writes


class Clock:
    """Times the steps, evaluations and saves of this process, and says how many steps there are.

    Attributes:
      total: length of the run in steps.
      compile_seconds: what the first step took longer than a step.
    """

    def __init__(
        self,
        experiment: Experiment,
        started: float,
        used: float = 0.0,
        total: int | None = None,
        batches: int = 0,
    ):
        """
        Args:
          started: when this process began (`time.monotonic`).
          used: seconds that earlier processes spent on the run.
          total: their last estimate.
          batches: how many an evaluation takes.
        """
        self._batches = batches
        self._experiment = experiment
        self._origin = started - used
        self.total = experiment.steps or total or _UNKNOWN
        self.compile_seconds = 0.0
        self.step_seconds: float | None = None
        self._pauses: dict[str, list[float]] = {}
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
        self._pauses.setdefault(kind, []).append(seconds)

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
    def open(self) -> bool:
        """Whether the length is still unknown."""
        return self.total == _UNKNOWN

    def left(self, step: int) -> float:
        """Seconds until the end, if `total` holds."""
        if self.step_seconds is None:
            return 0.0
        return (self.total - step) * self.step_seconds + self._overhead(step)

    def fit(self, issued: int) -> None:
        """Fits `total` to the time that is left, where `issued` steps are under way or finished.

        A quarter of a change is taken at once, all of it close to the end.
        """
        (first, then), (step, now) = self._laps[0], self._laps[-1]
        few = step - first < 20 and now - then < 1
        if self._experiment.minutes is None or self.step_seconds is None or (self.open and few):
            return
        left = self._experiment.minutes * 60 - self.used
        if self.open:
            self.total = issued + round(max(left, 0) / self.step_seconds)
        wish = step + (left - self._overhead(step)) / self.step_seconds
        close = wish - issued < 0.1 * wish
        change = (wish - self.total) * (1 if close else 0.25)
        self.total = max(issued + 1, round(self.total + change))

    def _overhead(self, step: int) -> float:
        """Seconds of the evaluations and saves to come."""
        evaluations, saves = self._experiment.evaluation, self._experiment.checkpoints
        unseen = "evaluation" not in self._pauses
        rest = _FINISH + (_FORWARD * self.compile_seconds if unseen else 0.0)
        # before there is a measurement, and instead of the first one, which compiles
        forward = self._batches * (self.step_seconds or 0.0) * _FORWARD
        for kind, every, guess in (
            ("evaluation", evaluations.every, forward),
            ("save", saves.every, 0.0),
        ):
            times = self._pauses.get(kind, [guess])
            count = 1 if not every else max(1, -(-self.total // every) - step // every)
            rest += count * (min(times[0], guess) if len(times) == 1 else times[-1])
        return rest
