"""A run that is killed at any moment: the next start tells of it, and a resume loses nothing.

The tests kill a run before statements that go to history.db (before some of each kind, and in the
sweep before every single one), and at random, and look at what the tools themselves wrote down.
Each of them is shown to fail with a naive engine.
"""
import contextlib
import json
import random
import signal
import sqlite3
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, SQLITE, TOP, wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL")

# Starts the same pipeline again and again in forks of itself, and lets each die a statement later
# than the one before; prints what was wrong after a resume, as JSON: [kills, [complaint, ...]].
DRIVER = '''
import json, os, re, signal, sqlite3, sys
from multiprocessing import forkserver
from pathlib import Path
import orchestrator
from orchestrator import History, main

HERE = Path(__file__).parent
WORDS = sys.argv[1:]
TOOLS = {
    "a": {"module": "tools:a", "needs": [], "cache": "1h"},
    "b": {"module": "tools:b", "needs": ["a"], "retries": 1, "retry_delay": 0},
    "c": {"module": "tools:c", "needs": ["a"]},
    "d": {"module": "tools:d", "needs": ["b", "c"]},
}
JOBS = 2 if WORDS else 1
IS_MUTANT = False
connect = sqlite3.connect
complaints = []
folder = HERE


def get_connection():
    conn = connect(Path(os.environ["FOLDER"]) / "data.db", timeout=30)
    conn.execute("CREATE TABLE IF NOT EXISTS did (tool, attempt)")
    return conn


def start(words, die_at=None, met=None):
    """Return the exit code of a run in a fork, killed before a statement of its history.

    `met` is a file for how each of its statements begins.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code, left = 99, die_at

    def count(statement):
        nonlocal left
        left -= 1
        if met:
            is_row = statement.startswith(("INSERT", "UPDATE"))  # then of which table matters
            met.write("-".join(statement.split()[:3 if is_row else 1]) + "\\n")
            met.flush()
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def connect_to_die(path, **options):
        conn = connect(path, **options)
        if str(path).endswith("history.db"):
            conn.set_trace_callback(count)
        return conn

    try:
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        os.environ["FOLDER"] = str(folder)
        # Workers are forked from the fork server of the parent.
        forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None
        if die_at:
            sqlite3.connect = connect_to_die
        code = main(TOOLS, {}, get_connection, argv=words, name="crash", home=str(folder / "home"))
    finally:
        os._exit(code)


def look(sql, name="home/crash/history.db"):
    """Return the rows of a query through a connection of our own, [] if there is no table."""
    conn = connect(folder / name)
    try:
        if not conn.execute("SELECT 1 FROM sqlite_master").fetchone():
            return []
        return conn.execute(sql).fetchall()
    finally:
        conn.close()


def started():
    """Return the tools in the order in which their run() was called."""
    path = folder / "started"
    return path.read_text().split() if path.exists() else []


def check(is_true, text):
    if not is_true:
        complaints.append(text)


def kill_and_resume(die_at):
    """Return whether the run was killed; complain of all that a resume makes worse."""
    code = start(WORDS, die_at)
    if code != -signal.SIGKILL:
        check(code == 0, f"{die_at}: exit {code}")
        return False
    is_there = (folder / "home/crash/history.db").exists()
    whole = look("PRAGMA integrity_check") if is_there else []
    check(whole in ([], [("ok",)]), f"{die_at}: {whole}")
    runs = look("SELECT status FROM runs") if is_there else []
    done = {tool for tool, in look("SELECT tool FROM attempts WHERE status = 'success'")
            } if runs else set()
    before = started()
    code, said = start(["--resume", *WORDS]), (folder / "said").read_text()
    check(code == 0, f"{die_at}: the resume ends with {code}: {said}")
    was_killed = "Run 1 was cut off " in said
    check(was_killed == (runs == [("running",)]), f"{die_at}: {runs}, but {said}")
    if runs:
        check(done | set(before) | {"d"} <= {"a", "b", "c", "d"}, f"{die_at}: {done}, {before}")
    else:
        check("nothing to resume" in said, f"{die_at}: {said}")
        code = start(WORDS)
        check(code == 0, f"{die_at}: the run after it ends with {code}")
    again = started()[len(before):]
    check(not done & set(again), f"{die_at}: done were {done}, and again ran {again}")
    # What had ended before the last tools began was recorded before those began.
    ended = set(before) - set(before[-JOBS:])
    ended -= {"b"} if before.count("b") == 1 else set()  # its first try fails
    check(not ended & set(again), f"{die_at}: {before} began, and again ran {again}")
    did = dict(look("SELECT tool, count(*) FROM did GROUP BY tool", "data.db"))
    check(set(did) == set("abcd"), f"{die_at}: lost {set('abcd') - set(did)}")
    twice = {tool for tool in did if did[tool] > 1}
    check(twice <= set(before[-JOBS:]), f"{die_at}: twice {twice}, and {before} began")
    check(not look("SELECT 1 FROM attempts WHERE status = 'running'"), f"{die_at}: one runs on")
    last = dict(look("SELECT tool, status FROM attempts ORDER BY attempt_id"))
    check(set(last.values()) <= {"success", "cached"}, f"{die_at}: {last}")
    repeated.update(twice)
    return True


def choose_statements(first):
    """Yield before which statements to die: all, or some and one of each kind."""
    if IS_MUTANT or IS_SWEEP:
        yield from range(first, 10_000)
    with open(folder / "met", "w") as met:
        start(["-q", *WORDS], 10**9, met)
    met = (folder / "met").read_text().splitlines()
    kinds = {kind: number for number, kind in enumerate(met, 1)}  # the last of each
    yield from sorted({*range(first, len(met), 12 if WORDS else 6), *kinds.values()})


repeated = set()  # tools that did their work twice, as the kill came between the two commits
MUTANT
if __name__ == "__main__":  # workers import this file, too
    folder = HERE / "warm"  # this process imports all that the runs will need
    folder.mkdir()
    os.environ["FOLDER"] = str(folder)
    main(TOOLS, {}, get_connection, argv=["-q", *WORDS], name="crash", home=str(folder / "home"))
    folder = HERE / "met"
    folder.mkdir()
    kills = 0
    # before the 15th, it makes the tables
    for die_at in choose_statements(15 if IS_MUTANT or WORDS else 1):
        folder = HERE / str(die_at)
        folder.mkdir()
        if not kill_and_resume(die_at) or complaints and IS_MUTANT:
            break
        kills += 1
    print(json.dumps([kills, sorted(repeated), complaints]))
'''

TOOLS = """
    import os
    def did(conn, context):
        with open(os.path.join(os.environ["FOLDER"], "started"), "a") as file:
            file.write(context.tool + "\\n")
        conn.execute("INSERT INTO did VALUES (?, ?)", (context.tool, context.attempt))
        return context.attempt
    def a(conn, context):
        print("a speaks")
        return did(conn, context)
    def b(conn, context):
        tries = did(conn, context)
        if tries == 1:
            raise ValueError("not yet")
    def c(conn, context):
        assert context.results["a"] == 1
        return did(conn, context)
    def d(conn, context):
        assert context.results["c"] == 1
        return did(conn, context)
"""


def kill_at_statements(sandbox, words=(), mutant="", is_sweep=False):
    """Return [kills, tools that worked twice, complaints]."""
    sandbox.tool("tools", TOOLS)
    (sandbox.folder / "driver.py").write_text(
        DRIVER.replace("\nMUTANT", f"\nIS_MUTANT, IS_SWEEP = {bool(mutant)}, {is_sweep}\n{mutant}"))
    ended = subprocess.run(
        [sys.executable, "driver.py", *words], cwd=sandbox.folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, timeout=120,
        env={**ENVIRONMENT, "PYTHONPATH": str(TOP), "PYTHONDONTWRITEBYTECODE": "1"})
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("words", [(), ("--jobs", "2")], ids=["one", "two"])
@pytest.mark.parametrize("is_sweep", [
    pytest.param(False, id="some"), pytest.param(True, id="all", marks=pytest.mark.sweep)])
def test_a_run_killed_before_any_statement_of_its_history_is_resumed_without_loss(
        sandbox, words, is_sweep):
    """
        a (cached) - b (second try) - d
                 \\- c ------------/

    Only what ran at the kill works twice, and that once for each tool: at least once is what is
    promised where a kill comes between the tool's own commit and that of history.
    """
    kills, twice, complaints = kill_at_statements(sandbox, words, is_sweep=is_sweep)
    assert complaints == []
    assert kills > (40 if is_sweep else 10)
    assert twice == ["a", "b", "c", "d"] or words or twice and not is_sweep


@pytest.mark.parametrize("mutant, complaint", [
    ("History.commit = lambda self: None", "began, and again ran"),
    ("History.find_done = lambda self, run_id: {}", "done were"),
    ("History.close_killed = lambda self: ('', [])", "but "),
], ids=["commits late", "forgets what is done", "says nothing"])
def test_an_engine_that_is_careless_at_its_statements_is_caught(sandbox, mutant, complaint):
    _, _, complaints = kill_at_statements(sandbox, mutant=mutant)
    assert any(complaint in each for each in complaints)


# --- killed at random, and in the middle of a tool ---

STEP = """
    import time
    def run(conn, context):
        conn.execute("CREATE TABLE IF NOT EXISTS did (tool)")
        with open("started", "a") as file:
            file.write(context.tool + "\\n")
        conn.execute("INSERT INTO did VALUES (?)", (context.tool,))
        time.sleep(0.01)  # a chance to be killed
        return context.tool
"""
STEPS = [f"t{i}" for i in range(6)]


def look(sandbox, sql):
    """Return the rows of a query on the history; [] as long as there is none."""
    path = next(sandbox.folder.glob(".orchestrator/*/history.db"), None)
    if path is None:
        return []
    with contextlib.closing(sqlite3.connect(path)) as conn:
        if not conn.execute("SELECT 1 FROM sqlite_master").fetchone():
            return []
        return conn.execute(sql).fetchall()


def kill_at_random(sandbox, kills, mutant="", seed=1):
    """Kill starts of a pipeline after a while; return what history called done and ran again."""
    chance = random.Random(seed)  # noqa: S311 - the same moments each time, nearly
    sandbox.pipeline(f"""
def get_connection():
    import sqlite3
    return sqlite3.connect(Path(__file__).with_name("data.db"), 30, isolation_level="IMMEDIATE")

TOOL_MAP = {{name: {{"module": "step", "needs": []}} for name in {STEPS!r}}}
""").tool("step", STEP)
    program = sandbox.folder / "orchestrator.py"
    program.write_text(program.read_text().replace('\nif __name__ == "__main__"',
                                                   f'\n{mutant}\nif __name__ == "__main__"'))
    again, started = [], sandbox.folder / "started"
    started.write_text("")
    successes = 0
    while (kills > 0 or not successes) and not (mutant and again):
        last = look(sandbox, "SELECT run_id, status FROM runs ORDER BY run_id DESC LIMIT 1")
        is_new = not last or last[0][1] == "success"
        if is_new:
            started.write_text("")
            safe = set()  # what may not run again
        else:
            safe |= {tool for tool, in look(
                sandbox, f"SELECT tool FROM attempts WHERE run_id = {last[0][0]} "
                         "AND status IN ('success', 'cached')")}
        before, jobs = len(started.read_text().split()), str(1 + kills % 2)
        process = sandbox.start(*([] if is_new else ["--resume"]), "-j", jobs)
        newest = last[0][0] if last else 0
        wait_until(lambda than=newest, process=process: process.poll() is not None or look(
            sandbox, f"SELECT 1 FROM runs WHERE run_id > {than}"))
        try:
            _, err = process.communicate(timeout=chance.uniform(0, 0.12) if kills > 0 else 30)
            assert process.returncode == 0, err
            assert set(started.read_text().split()) == set(STEPS)
            assert not look(sandbox, "SELECT 1 FROM runs WHERE status = 'running'")
            successes += 1
        except subprocess.TimeoutExpired:
            process.kill()
            _, err = process.communicate()
            kills -= 1
        assert "Traceback" not in err
        if last and last[0][1] == "running" and "running" in err:
            assert f"Run {last[0][0]} was cut off" in err
        began = started.read_text().split()[before:]
        again += [tool for tool in began if tool in safe]
        # one after another, what began before the last had been recorded when that began
        safe.update(began[:-1] if jobs == "1" else ())
        assert look(sandbox, "PRAGMA integrity_check") in ([("ok",)], [])
    return again


@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.sweep)])
def test_a_pipeline_killed_at_random_does_nothing_twice_that_was_done(sandbox, kills):
    assert kill_at_random(sandbox, kills) == []
    assert {tool for tool, in sandbox.query("SELECT DISTINCT tool FROM did")} == set(STEPS)


def test_an_engine_that_commits_at_the_end_only_is_caught_by_random_kills(sandbox):
    assert kill_at_random(sandbox, kills=60, mutant="""
commit, begin_run, end_run = History.commit, History.begin_run, History.end_run
def begin(self, *rest):
    run_id = begin_run(self, *rest)
    History.commit = lambda self: None
    return run_id
def end(self, *rest):
    History.commit = commit
    end_run(self, *rest)
History.begin_run, History.end_run = begin, end
""")


MIDDLE = """
    import os, pathlib
    def run(conn, context):
        conn.execute("CREATE TABLE IF NOT EXISTS did (tool, attempt)")
        conn.execute("INSERT INTO did VALUES (?, ?)", (context.tool, context.run_id))
        flag = pathlib.Path("flag")
        if context.tool == "b" and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), 9)
"""


def resume_from_the_middle(sandbox, mutant=""):
    """Return the work that was committed, after a kill inside the tool b and a resume."""
    sandbox.pipeline(SQLITE + 'TOOL_MAP = dict.fromkeys("abc", "middle")').tool("middle", MIDDLE)
    program = sandbox.folder / "orchestrator.py"
    program.write_text(program.read_text().replace('\nif __name__ == "__main__"',
                                                   f'\n{mutant}\nif __name__ == "__main__"'))
    assert sandbox.run().code == -signal.SIGKILL
    ended = sandbox.run("--resume")
    assert ended.code == 0, ended
    assert "Run 1 was cut off " in ended.err
    return sandbox.query("SELECT tool, attempt FROM did ORDER BY rowid")


def test_a_tool_killed_in_its_middle_leaves_nothing_behind_and_runs_again(sandbox):
    assert resume_from_the_middle(sandbox) == [("a", "1"), ("b", "2"), ("c", "2")]


def test_an_engine_that_takes_what_has_begun_for_done_is_caught(sandbox):
    assert ("b", "2") not in resume_from_the_middle(sandbox, """
begin = History.begin_attempt
def believe(self, tool, *rest):
    begin(self, tool, *rest)
    self.change("UPDATE attempts SET status = 'success', work = attempt_id, result = 'null' "
                "WHERE attempt_id = ?", (self.open[tool],))
History.begin_attempt = believe
""")
