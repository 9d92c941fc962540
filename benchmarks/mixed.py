"""Mixed load: what many frontends at once ask for, and the clients that ask."""

import random
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.service import NO_STORE, Connection, Service

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

    Errors: SystemExit when a request fails.
    """
    left = iter(requests)
    lock = threading.Lock()
    failures: list[BaseException] = []

    def client(connection: Connection) -> None:
        try:
            while not failures:
                with lock:
                    asked = next(left, None)
                if asked is None:
                    return
                connection.post("/encode", asked._asdict(), {} if use_cache else NO_STORE)
        except (OSError, SystemExit) as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=[service.connect()]) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise SystemExit(f"A request failed: {failures[0]}")
    return time.perf_counter() - started
