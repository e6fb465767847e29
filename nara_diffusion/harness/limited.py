"""Run as a script: lowers this process's limits, then runs a program in it. Imports nothing but the standard library.

python -I limited.py '{"RLIMIT_CPU": 10, …}' PROGRAM.py
"""

import json
import runpy
import sys


def lower(limits: dict[str, int]) -> None:
    """Sets each POSIX limit to its value, or to the system's own if that is lower. Windows has none."""
    try:
        import resource
    except ImportError:
        return
    for name, value in limits.items():
        kind = getattr(resource, name, None)
        if kind is not None:
            _, hard = resource.getrlimit(kind)
            # a second after the signal for spent CPU time: at the same limit the kernel kills without saying why
            wanted = (value, value + 1 if name == "RLIMIT_CPU" else value)
            unlimited = hard == resource.RLIM_INFINITY
            resource.setrlimit(kind, wanted if unlimited else (min(wanted[0], hard), min(wanted[1], hard)))


if __name__ == "__main__":
    lower(json.loads(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
