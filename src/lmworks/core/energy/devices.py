"""Thermal design powers of processors and GPUs by the name that they give themselves (figures/devices.toml)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lmworks.core.energy.footprint import Range
from lmworks.core.energy.grid import figures

CPU_INFO = Path("/proc/cpuinfo")
MOST_THREADS = 384
"""Of one socket (AMD EPYC 9965): a virtual machine has at least its threads' share of one."""


def named(name: str, kind: str) -> tuple[str, float] | None:
    """Entry and watts of a device in the table of 'cpus' or 'gpus'; None when it is not there."""
    table: dict[str, float] = figures("devices")[kind]["watts"]
    found = longest(name, table)
    return None if found is None else (found, float(table[found]))


def longest(name: str, entries: Iterable[str]) -> str | None:
    """The longest entry that is part of the name which a device gives itself; None where none is."""
    plain = " ".join(re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b", " ", name).split())
    found = [entry for entry in entries if re.search(rf"(?<![\w+]){re.escape(entry)}(?![\w+])", plain)]
    return max(found, key=len, default=None)


def cpu_tdp(name: str, *, sockets: int = 1, threads: int | None = None) -> tuple[Range, str]:
    """Thermal design power of all sockets of a machine, and a sentence that says where it is from.

    `threads`: of a virtual machine, which may be a small part of its socket; None on real hardware.
    """
    found = named(name, "cpus")
    assumed = figures("assumed")["processor"]
    if found is None:
        watts = Range(assumed["low"], assumed["watts"], assumed["high"])
        ends = f"{watts.low:.0f} to {watts.high:.0f}"
        text = f"'{name or 'nameless'}' is not in the table: {watts.central:.0f} W a socket ({ends})"
    else:
        watts, text = Range.exact(found[1]), f"{found[0]}, {found[1]:.0f} W a socket"
    watts = watts.times(float(sockets))
    if threads is not None:
        watts = Range(min(watts.low, watts.high * threads / MOST_THREADS), watts.central, watts.high)
        text += f"; a virtual machine of {threads} threads, which may be a small part of it"
    return watts, text


def gpu_watts(name: str) -> tuple[Range, str] | None:
    """Power of a GPU that cannot be read, from its thermal design power; None when it is not in the table."""
    found = named(name, "gpus")
    if found is None:
        return None
    assumed = figures("assumed")["gpu"]
    tdp = found[1]
    watts = Range(assumed["low"] * tdp, assumed["share"] * tdp, assumed["high"] * tdp)
    return watts, f"{found[0]}, {tdp:.0f} W by design, of which {assumed['share']:.0%} are taken to be used"


def this_cpu(info: Path = CPU_INFO) -> tuple[str, int, int | None]:
    """Name, sockets, and the threads of a virtual machine (None on real hardware), as Linux tells them."""
    if not info.is_file():
        return "", 1, None
    lines = [line.partition(":") for line in info.read_text(encoding="utf-8").splitlines()]
    facts = [(key.strip(), value.strip()) for key, _, value in lines]
    names = [value for key, value in facts if key == "model name"]
    sockets = {value for key, value in facts if key == "physical id"}
    virtual = any(key == "flags" and "hypervisor" in value.split() for key, value in facts)
    return names[0] if names else "", max(1, len(sockets)), max(1, len(names)) if virtual else None
