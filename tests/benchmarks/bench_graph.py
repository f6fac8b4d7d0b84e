"""Measure planning of large graphs, and tools side by side against the bare pool of the library.

usage: python tests/benchmarks/bench_graph.py
"""
import concurrent.futures
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP))

PLAN = """
import random, resource, sys, time
sys.path.insert(0, {top!r})
import orchestrator
random.seed(1)
table = {{f"t{{i}}": {{"module": "m",
                     "needs": [f"t{{random.randrange(i)}}" for _ in range(5 if i else 0)]}}
         for i in range(10_000)}}
started_s = time.perf_counter()
plan = orchestrator.make_plan(orchestrator.load_pipeline(table), jobs=8)
print(time.perf_counter() - started_s,
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

TOOLS = """
import time
def sleep():
    time.sleep(0.05)
def burn(until_s=0.1):
    end_s = time.process_time() + until_s
    while time.process_time() < end_s:
        pass
def nothing():
    pass
"""


def bench_plan(rounds=5):
    """Plan 10,000 tools with 50,000 needs."""
    runs = [subprocess.run([sys.executable, "-c", PLAN.format(top=str(TOP))], text=True,
                           capture_output=True, check=True).stdout.split() for _ in range(rounds)]
    seconds, megabytes = (statistics.median(map(float, side)) for side in zip(*runs))
    print(f"plan of 10,000 tools with 50,000 needs: {seconds:.2f} s, peak {megabytes:.0f} MB")


def run_ours(function, count, jobs):
    """Return the seconds of a run of `count` tools side by side, start-up included."""
    import orchestrator
    table = {f"t{i}": {"module": f"work:{function}", "needs": []} for i in range(count)}
    started_s = time.perf_counter()
    result = orchestrator.run_pipeline([], table, jobs=jobs)
    assert len(result.succeeded) == count, result.errors
    return time.perf_counter() - started_s


def run_pool(function, count, jobs):
    """Return the seconds that a bare forked pool takes for the same calls."""
    import work
    started_s = time.perf_counter()
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for future in [pool.submit(getattr(work, function)) for _ in range(count)]:
            future.result()
    return time.perf_counter() - started_s


def compare(function, count, jobs, ideal_s=None, rounds=7):
    """Compare in turn, and print medians."""
    pairs = [(run_ours(function, count, jobs), run_pool(function, count, jobs))
             for _ in range(rounds)]
    ours_s, pool_s = (statistics.median(side) for side in zip(*pairs))
    ratio = statistics.median(ours / pool for ours, pool in pairs)
    ideal = f", {ours_s / ideal_s:.2f} times the ideal" if ideal_s else ""
    print(f"{count} x {function}, {jobs} jobs: {ours_s:.3f} s{ideal}; "
          f"bare pool {pool_s:.3f} s, ratio {ratio:.2f}")
    return ours_s


if __name__ == "__main__":
    bench_plan()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "work.py").write_text(TOOLS)
        sys.path.insert(0, folder)
        compare("sleep", 64, 8, ideal_s=0.4)
        compare("burn", 32, 2)
        many_s, few_s = run_ours("nothing", 2000, 2), run_ours("nothing", 2, 2)
        print(f"hand-over: {(many_s - few_s) / 1998 * 1000:.2f} ms per tool")
