"""Mixed load: what many frontends at once ask for, and the clients that ask."""

import random
import selectors
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.service import NO_STORE, Service, post_request, reply_headers

CLIENTS = 64
PRESETS = {"z-image": 24, "last-hidden-state": 7, "flux2-klein": 1}  # and how often each is asked for
STYLES = ("oil", "ink", "film", "pastel", "chalk", "collage", "gouache", "charcoal")


class Asked(NamedTuple):
    """One request."""

    prompt: str
    preset: str


def mixed_requests(prompts: Sequence[str], count: int, seed: int = 0) -> list[Asked]:
    """Requests of which no two are alike."""
    dice = random.Random(seed)
    presets = dice.choices(list(PRESETS), list(PRESETS.values()), k=count)
    return [
        Asked(f"{dice.choice(prompts)}, {dice.choice(STYLES)} {number}", preset)
        for number, preset in enumerate(presets)
    ]


def send_all(service: Service, requests: Sequence[Asked], clients: int = CLIENTS, use_cache: bool = False) -> float:
    """Seconds from the first request to the last reply, with as many clients as that, each asking again when answered.

    One thread is all clients: as many threads would wait more for each other than for the service.

    Errors: SystemExit when a request fails.
    """
    left = (post_request("/encode", asked._asdict(), {} if use_cache else NO_STORE) for asked in requests)
    waiting = selectors.DefaultSelector()
    for _ in range(clients):
        waiting.register(service.connect(keeps_bodies=False), selectors.EVENT_READ)
    started = time.perf_counter()
    for key in list(waiting.get_map().values()):
        _ask_next(key.fileobj, left, waiting)
    while waiting.get_map():
        for key, _ in waiting.select():
            connection: Any = key.fileobj
            if reply := connection.receive():
                reply_headers("POST /encode", *reply)
                _ask_next(connection, left, waiting)
    return time.perf_counter() - started


def _ask_next(connection: Any, left: Iterator[bytes], waiting: selectors.BaseSelector) -> None:
    request = next(left, None)
    if request is None:
        waiting.unregister(connection)
        connection.close()
    else:
        connection.send(request)
