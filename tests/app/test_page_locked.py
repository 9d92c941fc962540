"""Replies that are sent from memory which is used again: a GPU's way, on any machine."""

import ctypes
import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from app import wire
from encoder.pipeline.selection import select
from encoder.qwen3.cuda.blocks import MIN_BLOCK_BYTES, Blocks
from encoder.qwen3.cuda.to_host import HostCopy
from tests.conftest import RunningServer, Start

LAYERS = [*range(0, 36, 3)]  # 0.8 MB: more than a Unix socket holds, so a reply waits in its block for its client
CLIENTS, TIMES = 8, 6


class Recycled:
    """Stands for page-locked memory: few blocks, whose bytes are spoilt as soon as they come back."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.blocks = Blocks(self.allocate, self.free, 6 * MIN_BLOCK_BYTES)
        self.copied = {"in a block": 0, "by MLX": 0}

    def allocate(self, nbytes: int) -> int:
        memory = ctypes.create_string_buffer(nbytes)
        self.memory[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def free(self, address: int) -> None:
        ctypes.memset(address, 0xFF, len(self.memory[address]))

    def copy_to_host(self, x: mx.array) -> HostCopy:
        host = self.blocks.take(x.size)
        self.copied["by MLX" if host is None else "in a block"] += 1
        if host is None:
            return HostCopy(x, host=None)
        for block in self.blocks._idle:
            ctypes.memset(block.address, 0xFF, block.nbytes)
        host[:] = np.array(x)
        return HostCopy(mx.array([1], mx.uint8), host)


def numbers(server: RunningServer, prompts: list[str], slow: bool) -> list[np.ndarray[Any, Any]]:
    """What one client gets, one reply after the other."""
    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX if isinstance(server.address, str) else socket.AF_INET)
    connection.sock.connect(server.address)
    headers = {"content-type": wire.JSON, "cache-control": "no-store"}
    found = []
    for prompt in prompts:
        fields = {"prompt": prompt, "preset": "flux2-klein", "layers": LAYERS, "dtype": "float32"}
        connection.request("POST", "/encode_layers", json.dumps(fields), headers)
        if slow:
            time.sleep(0.2)
        reply = connection.getresponse()
        assert reply.status == 200
        found.append(wire.unpack(reply.read())["hidden_states"].array)
    connection.close()
    return found


def test_replies_stay_what_they_are_while_their_memory_is_used_again(
    start_server: Start, server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some clients read late: their replies lie in their blocks while others are computed into the rest."""
    prompts = [[f"a cat {client} {number}" for number in range(TIMES)] for client in range(CLIENTS)]
    expected = [numbers(server, asked, slow=False) for asked in prompts]
    recycled = Recycled()
    monkeypatch.setattr("encoder.text_encoder.select", partial(select, grouped=True))
    monkeypatch.setattr("encoder.pipeline.selection.copy_to_host", recycled.copy_to_host)
    with start_server(uds=tmp_path / "socket") as running, ThreadPoolExecutor(CLIENTS) as clients:
        while not running.app.state.service.lifecycle.loading.done():
            time.sleep(0.02)
        found = list(clients.map(partial(numbers, running), prompts, [client % 3 == 0 for client in range(CLIENTS)]))

    assert recycled.copied["in a block"] > 0  # and while slow clients hold all of them, the other way
    for ours, theirs in zip(found, expected, strict=True):
        for reply, alone in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(reply, alone, rtol=1e-4, atol=1e-4)
