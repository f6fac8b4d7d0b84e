"""Measure what items cost: against a loop by hand, in batches, and when nearly all are done.

usage: python tests/benchmarks/bench_items.py
"""
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
ITEMS = 20_000
DONE = 1_000_000
COMMON = """
import resource, sqlite3, sys, time
sys.path[:0] = [{top!r}, "."]
import orchestrator

def connect():
    conn = sqlite3.connect("data.db")
    conn.execute("PRAGMA journal_mode = WAL")
    conn.execute("PRAGMA synchronous = {sync}")
    return conn

def run(tool, **options):
    started_s = time.perf_counter()
    result = orchestrator.run_pipeline([], {{tool: {{"module": tool, **options}}}},
                                       get_connection=connect, name="bench", home="home")
    assert result.status == "success", result.errors
    return time.perf_counter() - started_s, result.results[tool]["items"]

def fill(conn, tool, count):
    conn.executemany(orchestrator._INSERT, (
        ("bench", tool, f"item-{{i:07d}}", "", "", "success", 1, 0, "0123456789abcdef", "1",
         1.7e9, 1e-4, None, None) for i in range(count)))
"""
BY_HAND = COMMON + """
conn = connect()
conn.isolation_level = None
conn.execute("CREATE TABLE work (item)")
orchestrator.Ledger(conn, "", "bench", "work", "1", "").create()
conn.set_authorizer(lambda *_: 0)
started_s = time.perf_counter()
for i in range({items}):
    item = f"item-{{i:07d}}"
    began_s = time.monotonic()
    conn.execute("BEGIN")
    conn.execute("INSERT INTO work VALUES (?)", (item,))
    conn.execute(orchestrator._INSERT, (
        "bench", "work", item, "", "", "success", 1, 0, "0123456789abcdef", "1", time.time(),
        time.monotonic() - began_s, None, None))
    conn.execute("COMMIT")
print((time.perf_counter() - started_s) / {items} * 1e6)
"""
OURS = COMMON + """
took_s, count = run("work", batch={batch})
assert count == {items}
print(took_s / {items} * 1e6)
"""
MOSTLY_DONE = COMMON + """
conn = connect()
conn.execute("CREATE TABLE names AS SELECT item FROM orchestrator_items LIMIT 0")
conn.executemany("INSERT INTO names VALUES (?)",
                 ((f"item-{{i:07d}}",) for i in range({done} + 10)))
fill(conn, "{tool}", {done})
conn.commit()
conn.close()
took_s, count = run("{tool}")
assert count == 10
print(took_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
"""
EMPTY = COMMON + """
run("none")
conn = connect()
fill(conn, "some", 10_000)
conn.commit()
conn.close()
empty_s, full_s = [], []
for _ in range(7):
    empty_s.append(run("none")[0])
    full_s.append(run("some")[0])
print(sorted(empty_s)[3], sorted(full_s)[3])
"""
TOOLS = {
    "work": f"""
        def items(conn):
            conn.execute("CREATE TABLE IF NOT EXISTS work (item)")
            return (f"item-{{i:07d}}" for i in range({ITEMS}))
        def run(conn, item):
            conn.execute("INSERT INTO work VALUES (?)", (item,))""",
    "noop": f"""
        def items():
            return (f"item-{{i:07d}}" for i in range({ITEMS}))
        def run(item):
            pass""",
    "yielded": f"""
        def items():
            return (f"item-{{i:07d}}" for i in range({DONE} + 10))
        def run(item):
            pass""",
    "selected": """
        def items():
            return "SELECT item FROM names"
        def run(item):
            pass""",
    "some": """
        def items():
            return (f"item-{i:07d}" for i in range(10_000))
        def run(item):
            pass""",
    "none": """
        def items():
            return []
        def run(item):
            pass""",
}


def measure(source, **values):
    """Return the numbers that a script prints, run in an empty folder with the tools."""
    import textwrap
    with tempfile.TemporaryDirectory() as folder:
        for name, text in TOOLS.items():
            Path(folder, f"{name}.py").write_text(textwrap.dedent(text), encoding="utf-8")
        script = source.format(**{"top": str(TOP), "items": ITEMS, "done": DONE, "sync": "NORMAL",
                                  **values})
        ended = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True,
                               text=True)
        assert ended.returncode == 0, ended.stderr[-2000:]
        return [float(number) for number in ended.stdout.split()]


def main():
    """Print each figure beside what it is to be measured by."""
    started_s = time.perf_counter()
    for sync in ("FULL", "NORMAL"):
        hand, ours = [], []
        for _ in range(5):
            hand += measure(BY_HAND, sync=sync)
            ours += measure(OURS, sync=sync, batch=1)
        hand_us, ours_us = statistics.median(hand), statistics.median(ours)
        print(f"an item, synchronous {sync}: {ours_us:.1f} us, by hand {hand_us:.1f} us: "
              f"{ours_us / hand_us:.2f} times")
    batch_us = statistics.median(
        number for _ in range(5)
        for number in measure(OURS.replace('run("work"', 'run("noop"'), batch=500))
    print(f"batch 500, items that do nothing: {1e6 / batch_us:,.0f} a second")
    for tool in ("selected", "yielded"):
        create = MOSTLY_DONE.replace("conn = connect()\n", "conn = connect()\n"
                                     "orchestrator.Ledger(conn, '', 'b', 't', '1', '').create()\n"
                                     "conn.set_authorizer(lambda *_: 0)\n", 1)
        took_s, peak_mb = measure(create, tool=tool)
        print(f"{DONE:,} done, 10 pending, {tool}: {took_s:.2f} s, {peak_mb:.0f} MB")
    empty_s, full_s = measure(EMPTY)
    print(f"10,000 done: {(full_s - empty_s) * 1000:.1f} ms more than an empty run")
    print(f"measured in {time.perf_counter() - started_s:.0f} s")


if __name__ == "__main__":
    main()
