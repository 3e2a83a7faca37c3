"""Time and peak memory of one thing, each measured in a process of its own."""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable

__all__ = ["cost", "in_a_process"]


def peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if platform.system() == "Darwin" else peak / 2**10


def cost(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Best time of several runs, and how far they raised the peak memory of this process."""
    before = peak_mib()
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "seconds": min(seconds),
        "cpu_seconds": min(cpu_seconds),  # tells more where the machine is busy with other work
        "extra_mib": peak_mib() - before,
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
