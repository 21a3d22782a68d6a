"""Steps in processes of their own, on a GPU in one: their memory's peak is their own, and may be more than there is.

On the CPU memory is what Linux counts as resident, on a GPU what PyTorch's allocator has handed out.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed_steps import Run, make, times

GIB = 2**30
TINY = {"nodes": 200, "edges": 1000, "triples": 64, "dim": 64, "layers": 2}
MEASURABLE = Path("/proc/self/clear_refs").exists()
"""Whether the system tells a process its memory on the CPU."""


class Meter:
    """The memory of this process on a device, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.init()  # its counters can't be reset before

    def _status(self, key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    def now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return self._status("VmRSS")

    def peak(self) -> int:
        """The most there was since this was last called.

        Not ``getrusage``: that starts with what the parent had at its peak.
        """
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        peak = self._status("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")
        return peak


def available(device: torch.device) -> int:
    """The memory that is free on a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")  # of a container
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def brake(limit: int | None, device: torch.device) -> None:
    """Make an allocation far beyond the limit fail, rather than have the system kill what it likes.

    On a GPU nothing beyond the limit can be allocated at all; on the CPU what counts is what is measured, and this
    is for what comes in between.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total) if limit else 1.0, device)
        return
    if not limit:
        return
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    most = now + 2 * limit + GIB
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def trim() -> None:
    """Have glibc give back what is free in its heap, or the step would use that before it grows."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def memory(request: dict[str, Any], done: Callable[[Any], Any]) -> dict[str, Any]:
    """The memory of one step in one way.

    Args:
        request: ``step``, ``sizes``, ``way``, ``device``, and ``limit``, beyond which it may fail.
        done: called at the end.

    Returns:
        ``retained_bytes``: what the forward left beyond what was there before it; ``peak_bytes``: the most there was
        in the step beyond that; ``total_bytes``: the most beyond the libraries, graph and parameters included.
    """
    device = torch.device(request["device"])
    meter = Meter(device)
    step, graph = make(request["step"], TINY, device)
    Run.of(request["way"], request["step"], step, graph).gradient()  # what is loaded at the first use is not the step's
    del step, graph
    gc.collect()
    brake(request.get("limit"), device)
    meter.peak()
    empty = meter.now()
    step, graph = make(request["step"], request["sizes"], device)
    run = Run.of(request["way"], request["step"], step, graph)
    run.prepare()
    trim()
    before, making = meter.now(), meter.peak()
    loss = run.forward()
    retained = meter.now() - before
    loss.backward()
    peak = meter.peak()
    done(request["way"])
    return {"retained_bytes": retained, "peak_bytes": peak - before, "total_bytes": max(peak, making) - empty}


def largest_within(memory: int, step: Callable[[int], dict[str, Any]], start: int) -> dict[str, Any]:
    """The largest size whose step stays within the memory, by bisection.

    Args:
        memory: bytes.
        step: from a size to what :func:`memory` gives, or to why it failed.
        start: the first size to try.

    Returns:
        ``largest``: a size that fits, and one 5 % larger does not; 0 if nothing does. ``memory``; ``probes``: all
        that was measured.
    """
    low, high, size = 0, 0, start
    probes: list[dict[str, Any]] = []
    points = [(0, 0), (0, 0)]
    while not high or 100 < high > 1.05 * low:
        probes.append({"size": size} | step(size))
        nbytes = probes[-1].get("total_bytes")
        if nbytes is not None:
            points.append((size, nbytes))
        if nbytes is not None and nbytes <= memory:
            low = size
        else:
            high = size
        # memory grows about linearly: to just below where the line through the last two leads, if within the bracket
        (one, less), (two, more) = points[-2:]
        size = two + (memory * 49 // 50 - more) * (two - one) // (more - less) if more != less else 0
        size = max(size, int(1.04 * low) + 1)
        if high and not max(low, high // 8) < size < 0.99 * high:
            size = int((max(low, high // 8) * high) ** 0.5)
    return {"largest": low, "memory": memory, "probes": probes}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what is requested."""

    def done(_: Any) -> None:
        print(json.dumps({"done": 1}), flush=True)

    torch.set_num_threads(request["threads"])
    try:
        if request["task"] == "memory":
            return memory(request, done)
        meter = Meter(torch.device(request["device"]))
        return times(request, meter.peak if MEASURABLE or request["device"] != "cpu" else lambda: 0, done)
    except (RuntimeError, MemoryError) as error:
        # PyTorch's allocator on the CPU has no error type of its own
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
            return {"failed": "out of memory"}
        raise


def serve() -> None:
    """Answer requests from stdin, on the CPU each in a fork of this process: the libraries are imported once."""
    gc.collect()
    gc.freeze()  # or each step's collection would look through all that was imported
    for line in sys.stdin:
        request = json.loads(line)
        if request["device"] != "cpu":  # which forks can't use; its allocator counts what each request has, alone
            print(json.dumps({"result": answer(request)}), flush=True)
            gc.collect()
            torch.cuda.empty_cache()
            continue
        child = os.fork()
        if child == 0:
            status = 1
            try:
                print(json.dumps({"result": answer(request)}), flush=True)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == -signal.SIGKILL:  # what Linux does when memory runs out
            print(json.dumps({"result": {"failed": "out of memory"}}), flush=True)
        elif code:
            print(json.dumps({"error": code}), flush=True)


class Server:
    """A process that answers requests in forks of itself; started when it is first asked.

    Args:
        **environment: variables that are set before it starts, for the C library.
    """

    def __init__(self, **environment: str) -> None:
        self._environment = os.environ | environment
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any], done: Callable[[Any], Any] = lambda _: None) -> dict[str, Any]:
        """The answer to a request.

        Args:
            request: what to do.
            done: called after each run.

        Raises:
            RuntimeError: if it failed, but for want of memory: that is an answer, ``{"failed": "out of memory"}``.
        """
        if self._process is None:
            command, pipe = [sys.executable, __file__], subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=self._environment)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            message = json.loads(line)
            if "result" in message:
                result: dict[str, Any] = message["result"]
                return result
            if "error" in message:
                break
            done(message)
        raise RuntimeError(f"the process that measures has failed (see above) at {request}")

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


if __name__ == "__main__":
    serve()
