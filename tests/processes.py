"""Start several processes as torchrun does, on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def start(command, size, *, cwd, code=None):
    """Start ``size`` processes of ``python -m ebm_guard command``, or of a piece of code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = [sys.executable, "-m", "ebm_guard"] if code is None else [sys.executable, "-c", code]
    started = []
    for rank in range(size):
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started.append(
            subprocess.Popen(
                [*begin, *map(str, command)],
                env=env,
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def ended(started, *, limit=240):
    """Wait for all; return (exit code, stdout, stderr) of each, and leave none behind."""
    try:
        found = []
        for process in started:
            out, err = process.communicate(timeout=limit)
            found.append((process.returncode, out, err))
        return found
    finally:
        for process in started:
            process.kill()


def alone(*command, cwd):
    """Run one process without torchrun's variables."""
    return subprocess.run(
        [sys.executable, "-m", "ebm_guard", *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
