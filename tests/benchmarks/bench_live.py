"""Measure what the live area costs, against a terminal that knows no codes, where lines are all
that is written: in whole runs, and of what listens to one alone, which a busy machine blurs less.

usage: python tests/benchmarks/bench_live.py
"""
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(TOP))
import orchestrator  # noqa: E402

TABLE = """
TOOL_MAP = {{f"t{{i:04d}}": {{"module": "m:{function}", "needs": []}} for i in range({tools})}}
def get_connection(): pass
"""
TOOLS = """
import time
def nothing(): pass
def brief(): time.sleep(0.01)
def loop(context):
    for _ in context.progress(range(100_000)): pass
"""


def open_terminal(written):
    """Return a terminal whose bytes are counted in a list, and the thread that does so."""
    ours, theirs = pty.openpty()

    def read():
        try:
            while True:
                written.append(len(os.read(ours, 65536)))
        except OSError:  # EIO is the end of a terminal
            os.close(ours)

    reader = threading.Thread(target=read)
    reader.start()
    return theirs, reader


def run(folder, term, *words):
    """Return the seconds and the processor time of a run on a terminal, workers not included, and
    how many bytes it wrote.
    """
    written = []
    theirs, reader = open_terminal(written)
    began_s = time.perf_counter()
    process = subprocess.Popen([sys.executable, "orchestrator.py", *words], cwd=folder,
                               stdout=theirs, stderr=theirs,
                               env={**os.environ, "TERM": term, "NO_COLOR": "1"})
    os.close(theirs)
    _, status, used = os.wait4(process.pid, 0)
    took_s = time.perf_counter() - began_s
    reader.join()
    assert status == 0, status
    return took_s, used.ru_utime + used.ru_stime, sum(written)


def listen(term, jobs, took_s, tools=1000):
    """Return the processor time of what listens to a run of tools that take so long each."""
    os.environ.update(TERM=term, NO_COLOR="1")
    theirs, reader = open_terminal([])
    with open(theirs, "w") as stream:
        screen, at, events = orchestrator.Screen(stream, False, False), 1000.0, []
        done = orchestrator.Outcome("success", attempts=1, duration_s=took_s)
        for number in range(tools + jobs):
            if number >= jobs:
                events.append(orchestrator.Event("tool_ended", at, "1", f"t{number - jobs:04d}",
                                                 outcome=done))
            if number < tools:
                events.append(orchestrator.Event("tool_started", at, "1", f"t{number:04d}",
                                                 output="none"))
            at += took_s / jobs
            for tick in range(int(took_s / jobs / 0.1)):
                events.append(orchestrator.Event("tick", at - took_s / jobs + tick * 0.1, "1"))
        began_s = time.thread_time()
        for event in events:
            screen.on_event(event)
        spent_s = time.thread_time() - began_s
    reader.join()
    return spent_s, at - 1000.0


def bench_alone(jobs, took_s, rounds=5):
    """Compare what listens to a run, in turn."""
    pairs = [[listen(term, jobs, took_s)[0] for term in ("dumb", "xterm")] for _ in range(rounds)]
    more_s = statistics.median(xterm - dumb for dumb, xterm in pairs)
    run_s = listen("dumb", jobs, took_s)[1]
    print(f"1,000 tools of {took_s * 1000:g} ms, -j {jobs}: {more_s * 1000:+.1f} ms for the area, "
          f"{more_s / run_s:+.2%} of the run")


def bench(name, tools, function, *words, rounds=9):
    """Compare runs with and without a live area, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        source = (TOP / "orchestrator.py").read_text(encoding="utf-8")
        Path(folder, "orchestrator.py").write_text(
            TABLE.format(tools=tools, function=function)
            + source[source.index("# === ENGINE"):], encoding="utf-8")
        Path(folder, "m.py").write_text(TOOLS, encoding="utf-8")
        words = ("--force", *words)
        pairs = [[run(folder, term, *words) for term in ("dumb", "xterm")]
                 for _ in range(rounds)]
    shown = []
    for at in (0, 1):
        (without, having) = (statistics.median(side) for side in zip(
            *[(dumb[at], xterm[at]) for dumb, xterm in pairs]))
        ratio = statistics.median(xterm[at] / dumb[at] for dumb, xterm in pairs)
        shown.append(f"{without:.3f} s without, {having:.3f} s with, ratio {ratio:.3f}")
    print(f"{name}: {shown[0]}; of its processor: {shown[1]}; "
          f"{pairs[-1][1][2] / 1000:.0f} kB written")


if __name__ == "__main__":
    for jobs, took_s in [(2, 0.002), (4, 0.01), (4, 0.2), (30, 0.2), (30, 2.0)]:
        bench_alone(jobs, took_s)
    bench("1,000 tools in this process", 1000, "nothing")
    bench("1,000 tools, -j 4", 1000, "nothing", "-j", "4")
    bench("1,000 tools of 10 ms, -j 4", 1000, "brief", "-j", "4", rounds=5)
    bench("a loop of 100,000", 1, "loop")
