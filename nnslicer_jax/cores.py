"""How many cores this process may use."""

import os


def cores() -> int:
    """Cores given to the process: containers often have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
