"""Several processes that train together, started from one that has the libraries loaded already."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

LOADED = ["pytest", "lightning.pytorch", "lightly.transforms", "lightly.loss", "cp_plugin.loop"]
SECONDS = 60
"""After so long a collective that the others do not take part in is an error."""


def in_processes(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in several processes that know of each other by gloo.

    Args:
        count: processes.
        function: of a module; it gets its process's rank and the arguments.
        arguments: the same for all.
    """
    multiprocessing.set_forkserver_preload(LOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = (count, port, function, arguments)
    torch.multiprocessing.start_processes(_run, own, count, start_method="forkserver")


def _run(rank: int, count: int, port: int, function: Callable[..., None], arguments: Any) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    os.environ.update({**address, "NODE_RANK": "0", "RANK": str(rank), "LOCAL_RANK": str(rank)})
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    function(rank, *arguments)
    dist.destroy_process_group()


def of_rank(folder: Path, rank: int) -> Path:
    """Return the file that a process leaves its result in."""
    return folder / f"{rank}.pt"
