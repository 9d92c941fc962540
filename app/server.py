"""Runs the app under uvicorn: watches the model load, drains at a signal, decides the exit code."""

import asyncio
import contextlib
import contextvars
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from types import FrameType
from typing import Any, NoReturn, cast

import uvicorn
from fastapi import FastAPI

from app import open_files, shutdown
from app.http.connection import Connection
from app.listen import curl_line, listening_socket
from app.main import create_app
from app.process import log_uncaught_exceptions, share_heaps, tune_process
from app.service import service_of
from app.settings import Settings, is_loopback
from app.watchdog import Watchdog

logger = logging.getLogger(__name__)

OPEN = (
    "%s: whoever reaches this address can use the service, since it asks for no key. Set --api-key-file, or see to it "
    "that only you reach it, as by publishing a container's port to 127.0.0.1."
)

# Exit codes; 0 after a drain. A supervisor should start the service again after any other.
NOT_LOADED = 1
FAILED = 3  # 2 is a wrong setting


class Server(uvicorn.Server):
    """uvicorn that drains at the first signal and exits at once at the second.

    While it drains the socket stays open, so that new requests get their 503.

    Args:
        app: from `create_app`.
        sock: bound to the address of the settings.
        when_loaded: called once the model is loaded.
        when_ending: called when the end begins, with the longest time in seconds that it takes.
    """

    def __init__(
        self,
        app: FastAPI,
        sock: socket.socket,
        when_loaded: Callable[[], None] = lambda: None,
        when_ending: Callable[[float], None] = lambda _: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Connection, service_of(app).traffic),  # type: ignore[arg-type]  # what it calls to make one
                access_log=False,
                log_config=None,
                proxy_headers=False,
                ws="none",
                server_header=False,
            )
        )
        self.service = service_of(app)
        self.curl = curl_line(self.service.settings, sock)
        self.exit_code = 0
        self._when_loaded = when_loaded
        self._when_ending = when_ending
        self._draining = False
        self._has_terminal = sys.stderr.isatty()
        self._loop: asyncio.AbstractEventLoop | None = None  # set once it accepts requests
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept requests, then watch the model load."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_on_loop_error)
        if threading.current_thread() is threading.main_thread():
            self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        self._begin(self._watch_model())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside the requests; if that fails, the service ends: nobody else would do it."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._on_end)
        self._tasks.append(task)

    def _on_end(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("the service failed; it ends with exit code %d", FAILED, exc_info=error)
            self.exit_code = FAILED
            self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  # the signature of a signal handler
        """Called for SIGINT and SIGTERM."""
        if self._draining:
            os._exit(128 + sig)
        self._draining = True
        self._when_ending(self.service.settings.drain_timeout_s + shutdown.LIMIT_S)  # here: the event loop may hang
        if self._loop is None:
            self.should_exit = True
            return
        # In a context of its own: that of the request which the signal interrupts would put its id on what is logged.
        self._loop.call_soon_threadsafe(lambda: self._begin(self._drain()), context=contextvars.Context())

    def _on_hangup(self) -> None:
        """Called for SIGHUP: read the keys again. Where the terminal that the service ran in is gone, end with it."""
        if self._has_terminal and not sys.stderr.isatty():
            self.handle_exit(signal.SIGHUP, None)
        elif self.service.keys is None:
            logger.info("SIGHUP: there is no key file to read again; set --api-key-file")
        else:  # on a thread that nobody waits for, since the file's disk may hang
            threading.Thread(target=self.service.keys.reload, daemon=True, name="keys").start()

    async def _watch_model(self) -> None:
        loaded = await self.service.lifecycle.loaded()
        if loaded and not self._draining:
            self._when_loaded()
            logger.info("ready; try:\n  %s", self.curl)
        await self.service.lifecycle.failed()
        self.exit_code = FAILED if loaded else NOT_LOADED
        self.should_exit = True

    async def _drain(self) -> None:
        """Answer what has been accepted, for as long as that may take."""
        logger.info("draining: accepted requests are answered, new ones get 503; a second signal exits at once")
        timeout_s = self.service.settings.drain_timeout_s
        accepted = set(self.server_state.tasks)
        self._stop_accepting()
        if accepted:
            await asyncio.wait(accepted, timeout=timeout_s)
        self.should_exit = True

    def _stop_accepting(self) -> None:
        self.service.admission.draining = self.service.traffic.draining = True

    @property
    def _connections(self) -> set[Connection]:
        return cast(set[Connection], self.server_state.connections)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the connections, then the app and its engine."""
        if not self._draining:
            self._when_ending(shutdown.LIMIT_S)
            self._stop_accepting()
        if unanswered := self.service.admission.end():
            logger.warning("%d requests are not answered in time and get 503", unanswered)
        await shutdown.empty_backlog(sockets or ())
        for server in self.servers:
            server.close()
        await shutdown.close_connections(self._connections)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.lifespan.shutdown(), shutdown.CLOSE_S)


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error of the event loop; that no file can be opened in one line."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        open_files.warn("connection not accepted")
    else:
        loop.default_exception_handler(context)


def serve(settings: Settings) -> NoReturn:
    """Serve until a signal arrives, then end the process.

    Errors: SettingsError if the address is taken.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server can handle it
    open_files.raise_limit()
    share_heaps()
    log_uncaught_exceptions()
    with listening_socket(settings) as sock:
        app = create_app(settings)
        engine = service_of(app).engine
        server = Server(app, sock, lambda: tune_process(engine.info.device), shutdown.exit_within)
        if server.service.keys is None and settings.uds is None and not is_loopback(address := sock.getsockname()[0]):
            logger.warning(OPEN, address)
        # Not asyncio.run: at its end it waits for threads and tasks, however long they take.
        loop = (server.config.get_loop_factory() or asyncio.new_event_loop)()
        Watchdog(loop, settings.stall_s, FAILED).start()
        try:
            loop.run_until_complete(server.serve([sock]))
        except BaseException:  # a SystemExit in any callback ends the loop, and its code may be 0
            logger.critical("the event loop ended; so does the process, with exit code %d", FAILED, exc_info=True)
            server.exit_code = FAILED
        finally:
            for sig in (signal.SIGINT, signal.SIGTERM):
                signal.signal(sig, signal.SIG_IGN)  # it ends now
    shutdown.leave(server.exit_code)
