"""Measure what a command costs beside the bare program, alone and in a table of many.

usage: python tests/benchmarks/bench_command.py
"""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP))
COMMANDS = 1_000

PIPELINE = """
import sys, time
sys.path.insert(0, {top!r})
import orchestrator
def note(event):
    if event.kind == "run_started":
        started_s.append(time.perf_counter())
started_s = []
if __name__ == "__main__":
    table = {{f"t{{i}}": {{{what}, "needs": []}} for i in range({tools})}}
    result = orchestrator.run_pipeline([], table, jobs={jobs}, home=sys.argv[1], on_event=note)
    assert len(result.succeeded) == {tools}
    print(time.perf_counter() - started_s[0])
"""


def run_table(folder, what, tools, jobs):
    """Return the seconds from the beginning of a run to its end, its history kept."""
    path = Path(folder, "bench_table.py")
    path.write_text(PIPELINE.format(top=str(TOP), what=what, tools=tools, jobs=jobs))
    with tempfile.TemporaryDirectory() as home:
        return float(subprocess.run([sys.executable, str(path), home], cwd=folder, check=True,
                                    stdout=subprocess.PIPE, text=True).stdout)


def time_s(call):
    """Return the seconds that a call takes."""
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def find_best(rounds, *calls):
    """Return the least that each of some calls returns, called in turn."""
    return [min(side) for side in zip(*([call() for call in calls] for _ in range(rounds)))]


def bench_one(folder, rounds=7, tools=500):
    """Compare a command in this process with subprocess.run() and a tool that does nothing."""
    code = (f"import subprocess, time; run = lambda: [subprocess.run(['true'], "
            f"stdin=subprocess.DEVNULL) for _ in range({tools})]; run(); s = time.perf_counter(); "
            "run(); print(time.perf_counter() - s)")
    costs = find_best(
        rounds, lambda: run_table(folder, '"command": "true"', tools, 1),
        lambda: float(subprocess.run([sys.executable, "-c", code], check=True, text=True,
                                     stdout=subprocess.PIPE).stdout),
        lambda: run_table(folder, '"module": "noop"', tools, 1))
    ours, bare, noop = (1e3 * cost / tools for cost in costs)
    print(f"a command: {ours:.2f} ms, subprocess.run {bare:.2f} ms + a recorded tool "
          f"{noop:.2f} ms, ratio {ours / (bare + noop):.2f}")


def bench_table(folder, rounds=7):
    """Compare a table of commands, two at a time, with xargs."""
    line = f"seq {COMMANDS} | xargs -P 2 -n 1 true"
    costs = find_best(
        rounds, lambda: run_table(folder, '"command": "true"', COMMANDS, 2),
        lambda: time_s(lambda: subprocess.run(["sh", "-c", line], check=True)),
        lambda: run_table(folder, '"module": "noop"', COMMANDS, 2))
    ours, xargs, noop = (1e3 * cost / COMMANDS for cost in costs)
    print(f"{COMMANDS:,} commands, 2 at a time: {ours:.2f} ms each, xargs {xargs:.2f} ms, ratio "
          f"{ours / xargs:.2f}; modules that do nothing: {noop:.2f} ms")


if __name__ == "__main__":
    os.environ.pop("ORCHESTRATOR_HOME", None)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "noop.py").write_text("def run(): pass\n")
        bench_one(folder)
        bench_table(folder)
