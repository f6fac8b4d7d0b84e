"""Kill a pipeline ten times, each time at a random moment, then count what it has done.

    python example/pull_the_plug.py [--naive]

The pipeline is made in a temporary folder: a copy of orchestrator.py, a table, a tool of 500 items,
each of which adds a row to a SQLite table that would take it twice. If an item is lost or done
twice, the exit code is 1. With --naive the tool commits by itself, as many scripts do: see then.
"""
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

ITEMS = 500
IS_NAIVE = "--naive" in sys.argv

PIPELINE = """
import sqlite3, sys
from orchestrator import main

TOOL_MAP = {"work": {"module": "work", "commits": IS_NAIVE}}

def get_connection():
    conn = sqlite3.connect("work.db")
    conn.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL")
    return conn

if __name__ == "__main__":
    sys.exit(main(TOOL_MAP, {}, get_connection))
"""
TOOL = """
import time

def items():
    return range(ITEMS)

def run(conn, item):
    conn.execute("INSERT INTO done VALUES (?)", (item,))
    if IS_NAIVE:
        conn.commit()
    time.sleep(0.01)  # when it is killed, mostly
"""


def count_rows(folder):
    """Return how often each item is in the table: {item: rows}."""
    with closing(sqlite3.connect(folder / "work.db")) as conn:
        conn.execute("CREATE TABLE IF NOT EXISTS done (item TEXT)")
        return dict(conn.execute("SELECT item, count(*) FROM done GROUP BY item"))


with tempfile.TemporaryDirectory() as name:
    folder, command = Path(name), [sys.executable, "pipeline.py"]
    shutil.copy(Path(__file__).resolve().parents[1] / "orchestrator.py", folder)
    for file, text in [("pipeline.py", PIPELINE), ("work.py", TOOL)]:
        (folder / file).write_text(f"ITEMS, IS_NAIVE = {ITEMS}, {IS_NAIVE}\n{text}")
    count_rows(folder)  # makes the table
    began = time.monotonic()
    subprocess.run([*command, "--check"], cwd=folder, check=True)  # compiles the engine, once
    longest_s = 0.3 + time.monotonic() - began  # a start takes less, also on a slow machine
    for _ in range(10):
        process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=random.uniform(0.1, longest_s))
        except subprocess.TimeoutExpired as moment:
            process.kill()  # SIGKILL, or TerminateProcess on Windows: no moment to tidy up
            process.wait()
            print(f"killed after {moment.timeout:.2f} s: {len(count_rows(folder))} of {ITEMS} "
                  "items done", flush=True)
    code = subprocess.call(command, cwd=folder)
    rows = count_rows(folder)
lost, twice = ITEMS - len(rows), sum(count > 1 for count in rows.values())
print(f"{ITEMS} items:", f"{lost} lost, {twice} done twice" if lost or twice else "each done once")
sys.exit(1 if code or lost or twice else 0)
