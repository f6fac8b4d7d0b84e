"""Measure what remembering costs: per tool, at the start, in memory, in --status and --resume.

usage: python tests/benchmarks/bench_history.py
"""
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
TOOLS = 10_000
FORMS = (("orchestrator.py",), ("-m", "orchestrator"))  # the second is compiled only once
HEAD = """'''Tools that do nothing.'''
TOOL_MAP = {{f"t{{i}}": "noop" for i in range({count})}}
STAGES = {{}}


def get_connection():
    return None


"""
SOURCE = (TOP / "orchestrator.py").read_text(encoding="utf-8")
ENGINE = SOURCE[SOURCE.index("# === ENGINE"):]


def make_pipeline(folder, count):
    """Write a pipeline of tools that do nothing."""
    Path(folder, "noop.py").write_text("def run(**kwargs):\n    pass\n", encoding="utf-8")
    Path(folder, "orchestrator.py").write_text(HEAD.format(count=count) + ENGINE, encoding="utf-8")


def environment():
    """Return an environment in which Python keeps what it compiles, as it does by default."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def run(folder, *words, form=("orchestrator.py",)):
    """Return the seconds that a call of the pipeline takes."""
    started_s = time.perf_counter()
    ended = subprocess.run([sys.executable, *form, *words], cwd=folder, env=environment(),
                           capture_output=True, text=True)
    took_s = time.perf_counter() - started_s
    assert ended.returncode == 0, ended.stderr[-2000:]
    return took_s


BARE = """
import sqlite3, sys, time
sys.path.insert(0, "."); import noop
db = sqlite3.connect("bare.db", isolation_level=None)
db.execute("PRAGMA journal_mode = WAL"); db.execute("PRAGMA synchronous = NORMAL")
db.execute("CREATE TABLE attempts (id INTEGER PRIMARY KEY, tool TEXT, status TEXT)")
started_s = time.perf_counter()
for i in range({count}):
    row = db.execute("INSERT INTO attempts (tool, status) VALUES (?, 'running')",
                     (f"t{{i}}",)).lastrowid
    noop.run()
    db.execute("UPDATE attempts SET status = 'success' WHERE id = ?", (row,))
print((time.perf_counter() - started_s) / {count} * 1e6)
"""
OURS = """
import resource, sys, time
sys.path.insert(0, "."); import orchestrator
table = {{f"t{{i}}": "noop" for i in range({count})}}
orchestrator.run_pipeline(["t0"], table, home=".bench")
started_s = time.perf_counter()
result = orchestrator.run_pipeline([], table, home=".bench")
print((time.perf_counter() - started_s) / {count} * 1e6)
assert len(result.succeeded) == {count}
"""


def bench_loop(folder, rounds=7):
    """Compare a recorded run with a loop of one call and two commits, in turn."""
    pairs = []
    for _ in range(rounds):
        sides = []
        for source in (BARE, OURS):
            for name in ("bare.db", "bare.db-wal", "bare.db-shm"):
                Path(folder, name).unlink(missing_ok=True)
            ended = subprocess.run([sys.executable, "-c", source.format(count=TOOLS)], cwd=folder,
                                   capture_output=True, text=True, check=True)
            sides.append(float(ended.stdout))
        pairs.append(sides)
        subprocess.run(["rm", "-rf", os.path.join(folder, ".bench")], check=True)
    bare_us, ours_us = (statistics.median(side) for side in zip(*pairs))
    ratio = statistics.median(ours / bare for bare, ours in pairs)
    print(f"per tool: {ours_us:.1f} us, bare loop with two commits {bare_us:.1f} us, "
          f"ratio {ratio:.2f}")


def bench_resume(folder, rounds=5):
    """Resume a run of 10,000 tools that was killed when all of them were done."""
    make_pipeline(folder, TOOLS)
    for form in FORMS:
        run(folder, "--version", form=form)  # which compiles what is compiled once
        process = subprocess.Popen([sys.executable, *form, "-q"], cwd=folder, env=environment())
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0
        print(f"{' '.join(form)} with {TOOLS:,} tools: peak {used.ru_maxrss / 1024:.0f} MB")
    database = next(Path(folder, ".orchestrator").glob("*/history.db"))
    for form in FORMS:
        times = []
        for _ in range(rounds):
            db = sqlite3.connect(database)
            db.execute("UPDATE runs SET status = 'interrupted'")
            db.commit()
            db.close()
            times.append(run(folder, "--resume", "-q", form=form))
        print(f"{' '.join(form)} --resume with {TOOLS:,} tools done: "
              f"{statistics.median(times):.3f} s")


def bench_status(folder, rounds=11):
    """Look at ten tools after 10,000 runs."""
    make_pipeline(folder, 10)
    run(folder, "-q")
    database = next(Path(folder, ".orchestrator").glob("*/history.db"))
    db = sqlite3.connect(database)
    columns = [row[1] for row in db.execute("PRAGMA table_info(runs)")]
    rest = ", ".join(columns[1:]).replace("first_attempt", "first_attempt + 10 * {i}")
    for i in range(1, 10_000):
        run_id = db.execute(f"INSERT INTO runs ({', '.join(columns[1:])}) "
                            f"SELECT {rest.format(i=i)} FROM runs WHERE run_id = 1").lastrowid
        db.execute("INSERT INTO attempts (run_id, tool, attempt, status, started_at, duration_s, "
                   "work) SELECT ?, tool, attempt, status, started_at, duration_s, work "
                   "FROM attempts WHERE run_id = 1", (run_id,))
    db.commit()
    db.close()
    for form in FORMS:
        status_s = statistics.median(run(folder, "--status", form=form) for _ in range(rounds))
        print(f"{' '.join(form)} --status after 10,000 runs: {status_s * 1000:.0f} ms")


def bench_ten(folder, rounds=9):
    """Run ten tools that do nothing, cold; and doit's ten tasks, where doit is installed."""
    make_pipeline(folder, 10)
    for form in FORMS:
        ours_s = statistics.median(run(folder, "-q", form=form) for _ in range(rounds))
        print(f"{' '.join(form)} with ten tools: {ours_s * 1000:.0f} ms")
    Path(folder, "dodo.py").write_text(
        "def task_all():\n    for i in range(10):\n"
        "        yield {'name': str(i), 'actions': [lambda: True]}\n", encoding="utf-8")
    try:
        doit_s = statistics.median(run(folder, form=("-m", "doit")) for _ in range(rounds))
        print(f"doit with ten tasks: {doit_s * 1000:.0f} ms")
    except AssertionError:
        print("doit is not here")


if __name__ == "__main__":
    for bench in (bench_loop, bench_ten, bench_resume, bench_status):
        with tempfile.TemporaryDirectory() as place:
            make_pipeline(place, 10) if bench is not bench_loop else None
            if bench is bench_loop:
                Path(place, "noop.py").write_text("def run(**kwargs):\n    pass\n")
                Path(place, "orchestrator.py").write_text(SOURCE, encoding="utf-8")
            bench(place)
