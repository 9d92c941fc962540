"""Whether the model thread moves, as seen by whoever watches it."""


class Pulse:
    """Steps of the model thread. The thread writes, the event loop reads; neither needs a lock.

    Attributes:
        steps: begun so far.
        step: what the latest one does, or "" while the thread waits for work.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.step = ""

    def begin(self, step: str) -> None:
        """Note that a step begins, and that the one before has ended."""
        self.steps += 1
        self.step = step

    def rest(self) -> None:
        """Note that the thread waits for work."""
        self.step = ""


class StallCount:
    """Counts ticks of the watcher during which the thread did not move.

    Ticks are counted, not seconds: while the process or the whole machine is suspended, neither of the two moves.
    """

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._seen = pulse.steps
        self.ticks = 0

    def tick(self) -> int:
        """Note that a tick has passed. Returns how many there were since the running step began."""
        if self._pulse.step and self._pulse.steps == self._seen:
            self.ticks += 1
        else:
            self._seen, self.ticks = self._pulse.steps, 0
        return self.ticks
