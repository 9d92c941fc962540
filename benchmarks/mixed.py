"""Mixed load: the requests of many frontends at once, and the clients that send them."""

import random
import selectors
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.service import NO_STORE, Service, post_request, reply_headers

CLIENTS = 64
PRESETS = {"z-image": 24, "last-hidden-state": 7, "flux2-klein": 1}  # how often each preset is asked for, relatively
STYLES = ("oil", "ink", "film", "pastel", "chalk", "collage", "gouache", "charcoal")


class Asked(NamedTuple):
    """One request."""

    prompt: str
    preset: str


def mixed_requests(prompts: Sequence[str], count: int, seed: int = 0) -> list[Asked]:
    """`count` requests, all different; equal seeds give equal requests."""
    dice = random.Random(seed)
    presets = dice.choices(list(PRESETS), list(PRESETS.values()), k=count)
    return [
        Asked(f"{dice.choice(prompts)}, {dice.choice(STYLES)} {number}", preset)
        for number, preset in enumerate(presets)
    ]


def send_all(service: Service, requests: Sequence[Asked], clients: int = CLIENTS, use_cache: bool = False) -> float:
    """Send all requests and return the seconds from the first request to the last reply.

    Each client sends its next request when it has a reply. One thread runs all clients: with a thread each, they would
    wait for each other more than for the service.

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
