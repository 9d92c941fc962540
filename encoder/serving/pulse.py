"""Whether the model thread moves, as seen by whoever watches it."""

from collections.abc import Callable


class Pulse:
    """Steps of the model thread. The thread writes, the event loop reads; neither needs a lock.

    Attributes:
        steps: begun so far.
        step: what the latest one does.
        rests: whether the thread waits for work instead.
        patience_s: how long one step of the batch that runs may take, judged by those before.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.step = "start"
        self.rests = True
        self.patience_s = 0.0

    def begin(self, step: str) -> None:
        """Note that a step begins, and that the one before has ended."""
        self.steps += 1
        self.step = step
        self.rests = False

    def rest(self) -> None:
        """Note that the thread waits for work."""
        self.rests = True


class StallCount:
    """Counts ticks of the watcher during which a thread did not move although it had work.

    Ticks are counted, not seconds: while the process or the whole machine is suspended, neither of the two moves.

    Args:
        pulse: of the thread.
        has_work: whether there is work that the thread has not begun.
    Attributes:
        ticks: so far.
    """

    def __init__(self, pulse: Pulse, has_work: Callable[[], bool] = lambda: False) -> None:
        self._pulse = pulse
        self._has_work = has_work
        self._seen = pulse.steps
        self.ticks = 0

    def tick(self) -> int:
        """Note that a tick has passed. Returns how many have since the thread last moved, or had nothing to do."""
        idle = self._pulse.rests and not self._has_work()
        if not idle and self._pulse.steps == self._seen:
            self.ticks += 1
        else:
            self._seen, self.ticks = self._pulse.steps, 0
        return self.ticks
