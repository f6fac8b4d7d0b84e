"""Measure a report of a large run: 1,000 tools with 20 runs before, 10,000 items; and what looking
for what is unusual costs a run.

usage: python tests/benchmarks/bench_report.py
"""
import contextlib
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
TOOLS, ITEMS, RUNS = 1000, 10_000, 21
SOURCE = (TOP / "orchestrator.py").read_text(encoding="utf-8")
HEAD = f"""'''Many tools, one of which has many items, and one that fails.'''
TOOL_MAP = {{f"tool_{{i:04d}}": {{
    "module": "items_of" if i == 10 else "m:bad" if i == 900 else "m",
    "needs": [f"tool_{{j:04d}}" for j in (i - 7, i - 13) if j >= 0]}} for i in range({TOOLS})}}
STAGES = {{}}
NAME = "many"


def get_connection():
    return None


"""


def make_history(folder):
    """Write a pipeline, run it once, and tell its history of many such runs before that."""
    (folder / "m.py").write_text(
        "def run(context): return 1000 + int(context.tool[5:])\n"
        "def bad(): raise ValueError('no')\n", encoding="utf-8")
    (folder / "items_of.py").write_text(
        f"def items(): return [f'item {{i}}' for i in range({ITEMS})]\n"
        "def run(item):\n    if item.endswith('7'): raise ValueError(item)\n", encoding="utf-8")
    (folder / "orchestrator.py").write_text(HEAD + SOURCE[SOURCE.index("# === ENGINE"):],
                                            encoding="utf-8")
    call(folder, "-q")
    path = folder / ".orchestrator" / "many" / "history.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        columns = ", ".join(row[1] for row in db.execute("PRAGMA table_info(attempts)")
                            if row[1] not in ("attempt_id", "run_id", "status"))
        count, = db.execute("SELECT max(attempt_id) FROM attempts").fetchone()
        for run in range(2, RUNS + 1):
            db.execute("INSERT INTO runs SELECT ?, status, resumes, targets, exclude, start_from, "
                       "item, arguments, words, planned, started_at, duration_s, pid, ?, version, "
                       "git_commit, tables, sources, edges FROM runs WHERE run_id = 1",
                       (run, 1 + count * (run - 1)))
            status = "status" if run == RUNS else "'success'"
            db.execute(f"INSERT INTO attempts (run_id, status, {columns}) "
                       f"SELECT ?, {status}, {columns} FROM attempts WHERE run_id = 1", (run,))
        db.commit()


def call(folder, *words):
    """Call the pipeline and return the seconds that it took."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    started_s = time.perf_counter()
    ended = subprocess.run([sys.executable, "-m", "orchestrator", *words], cwd=folder,
                           env=environment, capture_output=True, text=True)
    took_s = time.perf_counter() - started_s
    assert ended.returncode in (0, 1), ended.stderr[-2000:]
    return took_s


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_history(folder)
        start_s = statistics.median(call(folder, "--version") for _ in range(5))
        print(f"start                {start_s:6.2f} s")
        for form in ("html", "md", "json"):
            took_s = statistics.median(call(folder, "--report", f"r.{form}") for _ in range(5))
            size = (folder / f"r.{form}").stat().st_size
            print(f"report as {form:4}       {took_s:6.2f} s  {size / 1e6:6.2f} MB")
        sys.path.insert(0, name)
        import orchestrator
        history = orchestrator.History(str(folder / ".orchestrator" / "many"))
        for run, what in (("1", "none before"), (str(RUNS), "20 before")):
            history.find_unusual(run)
            started_s = time.perf_counter()
            history.find_unusual(run)
            took_s = (time.perf_counter() - started_s) / TOOLS
            print(f"unusual, {what:11} {1e6 * took_s:6.1f} us for each tool with rows")
        history.close()


if __name__ == "__main__":
    main()
