"""Measure the start of the program, planning, and the loop's own cost per tool.

usage: python tests/benchmarks/bench_core.py
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP))
TOOLS = 10_000


def cpu_ms(command, cwd):
    """Return the processor time of a process, which a busy machine disturbs less than a clock."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0, command
    return (used.ru_utime + used.ru_stime) * 1000


def bench_start(rounds=25):
    """Compare --list with the imports that it needs, in a clean virtual environment, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        python = os.path.join(folder, "Scripts" if os.name == "nt" else "bin", "python")
        bare = [python, "-c", "import argparse, importlib, json, sqlite3"]
        for form in (["orchestrator.py"], ["-m", "orchestrator"]):  # compiled each time, and once
            ours = [python, *form, "--list"]
            pairs = [(cpu_ms(bare, TOP), cpu_ms(ours, TOP)) for _ in range(rounds)]
            bare_ms, ours_ms = (statistics.median(side) for side in zip(*pairs))
            ratio = statistics.median(ours / bare for bare, ours in pairs)
            print(f"{' '.join(form)} --list: {ours_ms:.1f} ms, bare imports: {bare_ms:.1f} ms, "
                  f"ratio {ratio:.2f}")


PLAN = """
import resource, sys, time
sys.path.insert(0, {top!r})
import orchestrator
table = {{f"tool_{{i}}": "some.module" for i in range({tools})}}
started_s = time.perf_counter()
pipeline = orchestrator.load_pipeline(table, {{"full": list(table)}})
orchestrator.make_plan(pipeline)
took_s = time.perf_counter() - started_s
print(took_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def bench_plan(rounds=7):
    """Plan a list of 10,000 tools."""
    runs = [subprocess.run([sys.executable, "-c", PLAN.format(top=str(TOP), tools=TOOLS)],
                           capture_output=True, text=True, check=True).stdout.split()
            for _ in range(rounds)]
    seconds, megabytes = (statistics.median(map(float, side)) for side in zip(*runs))
    print(f"plan of {TOOLS:,} tools: {seconds:.3f} s, peak {megabytes:.0f} MB")


def bench_loop(rounds=7):
    """Run 10,000 tools that do nothing; subtract what calling them alone costs."""
    import orchestrator
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "noop.py").write_text("def run(): pass\n")
        sys.path.insert(0, folder)
        import noop
        costs = []
        for _ in range(rounds):
            pipeline = orchestrator.load_pipeline({f"t{i}": "noop" for i in range(TOOLS)})
            plan = orchestrator.make_plan(pipeline)
            started_s = time.perf_counter()
            result = orchestrator.run_plan(orchestrator.Session(
                pipeline, plan, {}, orchestrator.History()))
            took_s = time.perf_counter() - started_s
            assert len(result.succeeded) == TOOLS
            started_s = time.perf_counter()
            for _ in range(TOOLS):
                noop.run()
            costs.append((took_s - (time.perf_counter() - started_s)) / TOOLS * 1e6)
    print(f"loop: {statistics.median(costs):.1f} us per tool that does nothing")


if __name__ == "__main__":
    bench_start()
    bench_plan()
    bench_loop()
