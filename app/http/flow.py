"""Flow control of one connection: whether its client may send, and how fast it reads."""

import asyncio

from app.http.traffic import Traffic

HIGH_WATER = 64 * 1024  # bytes in the transport; beyond that `drain` waits until all of them have left


class Flow:
    """Pauses and resumes a transport.

    Attributes:
        write_paused: whether the transport holds more than it should.
        eof: whether the client has ended its sending half; then nothing is read any more.
    """

    def __init__(self, transport: asyncio.Transport, traffic: Traffic) -> None:
        transport.set_write_buffer_limits(high=HIGH_WATER, low=0)
        self.write_paused = self.read_paused = self.eof = False
        self._transport = transport
        self._traffic = traffic
        self._drained: asyncio.Event | None = None
        self._buffered = self._progress_tick = 0  # bytes in the transport, and when they last became fewer

    def pause_writing(self) -> None:
        """The transport holds too much."""
        self.write_paused = True
        self._buffered, self._progress_tick = self._transport.get_write_buffer_size(), self._traffic.tick

    def resume_writing(self) -> None:
        """All of it has been sent, or never will be."""
        self.write_paused = False
        if self._drained is not None:
            self._drained.set()

    async def drain(self) -> None:
        """Return when all that was written has been sent, or never will be."""
        if self.write_paused:
            self._drained = asyncio.Event()
            await self._drained.wait()

    def note_progress(self) -> None:
        """See whether the client has read something since the last tick."""
        buffered = self._transport.get_write_buffer_size()
        if buffered != self._buffered:
            self._buffered, self._progress_tick = buffered, self._traffic.tick

    def stalled_ticks(self) -> int:
        """How long the client has read nothing of what is written."""
        return self._traffic.tick - self._progress_tick

    def pause_reading(self) -> None:
        """Let the client wait."""
        if not self.read_paused and not self._transport.is_closing():
            self.read_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on after `pause_reading`."""
        if self.read_paused and not self.eof and not self._transport.is_closing():
            self.read_paused = False
            self._transport.resume_reading()
