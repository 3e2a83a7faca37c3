"""Time and peak memory of one thing, each measured in a process of its own."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

__all__ = ["cost", "in_a_process"]


def memory_mib() -> tuple[float, float]:
    """Resident memory of this process, and the most it was since :func:`forget_peak`."""
    if platform.system() == "Darwin":  # which knows the highest ever only
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return peak, peak
    status = Path("/proc/self/status").read_text()
    now, peak = (re.search(rf"{name}:\s+(\d+) kB", status) for name in ("VmRSS", "VmHWM"))
    assert now is not None
    assert peak is not None
    return int(now[1]) / 2**10, int(peak[1]) / 2**10


def forget_peak() -> None:
    """What imports and loading once took must not hide what a run takes."""
    gc.collect()
    if platform.system() == "Linux":
        with suppress(OSError):  # where that may not be written
            Path("/proc/self/clear_refs").write_text("5")


def cost(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Best time of several runs, and how far above its resident memory the process was in them."""
    forget_peak()
    before, _ = memory_mib()
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "seconds": min(seconds),
        "cpu_seconds": min(cpu_seconds),  # tells more where the machine is busy with other work
        "extra_mib": max(0.0, memory_mib()[1] - before),
    }


def in_a_process(script: str, options: argparse.Namespace, **changes: object) -> dict[str, float]:
    """The JSON object that a script prints, run afresh with these options changed."""
    settings = vars(options) | changes
    arguments = [
        f"--{name}={value}"
        for name, values in settings.items()
        for value in (values if isinstance(values, list) else [values])
        if value is not None
    ]
    command = [sys.executable, script, *arguments]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(answer.stdout)
