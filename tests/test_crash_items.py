"""Items whose run is killed at any moment: each is done exactly once, its record with its work.

The tests kill runs before and after writes to the pipeline's database, to history.db and to the
slips (some of each kind, and in the sweep every one), and at random, and look at what the items
left in tables that would take it twice. Each of them is shown to fail with a naive engine.
"""
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, TOP, press_ctrl_c_again, wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL")

# Starts the same pipeline again and again in forks of itself, and lets one of its processes die a
# step later than in the start before; then starts it until it has nothing left to do, and looks.
# Prints JSON: {"kills": ..., "where": {kind of process: kills}, "complaints": [...]}.
# `every` is how many steps later; 0: one step of each kind that a run makes, any of them.
DRIVER = '''
import json, mmap, os, random, re, signal, sqlite3, struct, sys, time
from multiprocessing import forkserver
from pathlib import Path
import orchestrator

OPTIONS = json.loads(sys.argv[1])
WORDS, FIRST = OPTIONS["words"], OPTIONS["first"]
TOOLS = {
    "load": {"module": "load", "needs": [], "retries": 1, "retry_delay": 0,
             "batch": OPTIONS["batch"]},
    "publish": {"module": "publish", "each": "load", "batch": OPTIONS["batch"]},
}
TRIES = {("load", "a"): 1, ("load", "flaky"): 2, ("load", "broken"): 2,
         ("publish", "a"): 1, ("publish", "flaky"): 1}
GOOD = sorted(key for key in TRIES if key[1] != "broken")
connect, write_slip, unlink = sqlite3.connect, orchestrator.write_slip, os.unlink
SHARED = Path(__file__).with_name("shared")
if __name__ == "__main__":
    SHARED.write_bytes(bytes(16))
with SHARED.open("r+b") as file:  # steps that all processes of a run have made, and who was killed
    shared = mmap.mmap(file.fileno(), 16)
NEVER = 10**9  # the step at which a run dies that is to note its steps
HARMLESS = "SELECT|PRAGMA|BEGIN|SAVEPOINT|DROP TABLE IF|CREATE TEMP"
complaints, where = [], {}
folder = Path(__file__).parent
die_at = main_pid = 0


def step(kind):
    """Count a step of any process of the run, and die if it is the one."""
    if die_at == NEVER:
        note("step", re.sub(r"\\W+", "-", kind))
    made, killed = struct.unpack("qq", shared[:])
    made += 1
    is_mine = die_at and made >= die_at and not killed
    shared[:] = struct.pack("qq", made, os.getpid() if is_mine else killed)
    if is_mine:
        calls = read_calls(os.getpid(), "began", "ended", "slip")
        slips = [call for call in calls if call[1] == "slip"]
        if slips and slips[-1][4] != "-" and not look(
                "SELECT 1 FROM orchestrator_items "
                f"WHERE item = '{slips[-1][4]}' AND ended_at > {slips[-1][0]}"):
            note("dies", *calls[-1][3:])
        os.kill(os.getpid(), signal.SIGKILL)


def stepping(function):
    """Return a function that makes a step before it."""
    def wrapped(*args):
        step("unlink")
        return function(*args)
    return wrapped


class Unsynced(sqlite3.Connection):
    """Leaves what it writes to the system, which lives on when a process is killed."""

    def execute(self, sql, *values):
        return super().execute(re.sub("^PRAGMA synchronous.*", "PRAGMA synchronous = OFF", sql),
                               *values)


class Cursor(sqlite3.Cursor):
    """Makes a step before everything that writes, and another after what ends a transaction."""

    def execute(self, sql, *values):
        if not re.match(HARMLESS, sql):
            step("before " + " ".join(sql.split()[:3]))
        result = super().execute(sql, *values)
        if re.match("COMMIT|ROLLBACK", sql):
            step("after " + sql)
        return result


class Connection(Unsynced):
    """Makes steps as Cursor does, through which its own execute() goes."""

    def cursor(self):
        return super().cursor(Cursor)

    def executemany(self, *args):
        step("many")
        return super().executemany(*args)

    def commit(self):
        self.end(super().commit)

    def rollback(self):
        self.end(super().rollback)

    def end(self, how):
        had_begun = self.in_transaction
        if had_begun:
            step("before " + how.__name__)
        how()
        if had_begun:
            step("after " + how.__name__)


def write_and_note(fd, job, item):
    """Write a slip, with a step before and after it."""
    step("before slip")
    write_slip(fd, job, item)
    note("slip", job.tool, item.name if item else "-")
    step("after slip")


def note(*words):
    fd = os.open(folder / "calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, f"{time.time()} {words[0]} {os.getpid()} {' '.join(words[1:])}\\n".encode())
    os.close(fd)


def die_at_step(number):
    """Let this process make steps, of the run or of one of its workers, and die at one of them."""
    global die_at
    die_at = number
    sqlite3.connect = lambda *args, **options: connect(
        *args, **{**options, "factory": Connection if die_at else Unsynced})
    if die_at:
        orchestrator.write_slip = write_and_note
        os.unlink = stepping(unlink)


def get_connection():
    global folder
    if __name__ != "__main__" and sqlite3.connect is connect:
        folder = Path(os.environ["FOLDER"])
        die_at_step(int(os.environ["DIE_AT"]))
    conn = sqlite3.connect(folder / "data.db", timeout=30)
    conn.execute("PRAGMA synchronous = OFF")
    return conn


def begin(at_step, words=WORDS):
    """Return the exit code of a run in a fork, one of whose processes is killed at a step."""
    global main_pid
    shared[:] = bytes(16)
    pid = os.fork()
    if pid:
        main_pid = pid
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 99
    try:
        said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        os.environ["FOLDER"] = str(folder)
        os.environ["DIE_AT"] = str(at_step)
        # Workers are forked from the fork server of the parent.
        forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None
        die_at_step(at_step)
        code = orchestrator.main(TOOLS, {}, get_connection, argv=["-q", *words], name="crash",
                                 home=str(folder / "home"))
    finally:
        os._exit(code)


def look(sql, name="data.db"):
    """Return the rows of a query through a connection of our own."""
    conn = connect(folder / name)
    try:
        return conn.execute(sql).fetchall()
    finally:
        conn.close()


def read_calls(pid, *kinds):
    """Return (moment, word, pid, tool, item) of what a process has noted, None for all."""
    path = folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else ()
    return [call for call in map(str.split, lines)
            if call[1] in kinds and call[2] == str(pid or call[2])]


def kill_and_go_on(at):
    """Return whether the run was killed; complain of all that is not as if it had not been."""
    def check(is_true, text):
        if not is_true:
            complaints.append(f"{at}: {text}")

    conn = connect(folder / "data.db")
    conn.executescript("PRAGMA synchronous = OFF; "
                       f"PRAGMA journal_mode = {OPTIONS['journal']}; "
                       "CREATE TABLE work (tool, item); CREATE TABLE more (tool, item)")
    conn.close()
    if FIRST:  # the last run was killed, too
        os.environ["SUICIDE"] = FIRST
        code = begin(0)
        check(code in (-signal.SIGKILL, 1), f"the first run ends with {code}")
    os.environ.pop("SUICIDE", None)
    code = begin(at)
    killed = struct.unpack("qq", shared[:])[1]
    # Two that come to a step at the same moment are both killed.
    is_main = killed == main_pid or code == -signal.SIGKILL
    if killed:
        kind = "orchestrator" if is_main else "worker"
        check(code == -signal.SIGKILL if is_main else code in (0, 1),
              f"the killed run ends with {code}: {(folder / 'said').read_text()}")
        where[kind] = where.get(kind, 0) + 1
    for _ in range(4):
        if code == 0:
            break
        code = begin(0, WORDS if at % 4 == 0 else ())  # which is quicker without workers
    check(code == 0, f"it does not come to its end: {(folder / 'said').read_text()}")
    for table in ("work", "more"):
        rows = sorted(look(f"SELECT tool, item FROM {table}"))
        check(set(rows) >= set(GOOD), f"lost from {table}: {set(GOOD) - set(rows)}")
        check(len(rows) == len(set(rows)), f"twice in {table}: {rows}")
        check(set(rows) <= set(GOOD), f"torn, in {table}: {set(rows) - set(GOOD)}")
    ledger = {(tool, item): rest for tool, item, *rest in look(
        "SELECT tool, item, status, attempts, deaths FROM orchestrator_items")}
    check(set(ledger) == set(TRIES), f"in the ledger: {sorted(ledger)}")
    died = [tuple(call[3:]) for call in read_calls(None, "dies")]
    calls = [tuple(call[3:]) for call in read_calls(None, "began")]
    for key, (status, attempts, deaths) in ledger.items():
        text = f"{key} in the ledger: {status}, {attempts} tries, {deaths} deaths"
        check(status == ("success" if key in GOOD else "failed"), text)
        check(attempts == TRIES.get(key), text)
        # with the orchestrator die its workers, one moment later
        check(deaths == died.count(key) or WORDS and is_main
              and deaths == died.count(key) + 1, f"{text}, and died {died.count(key)} times")
        most = TRIES.get(key, 0) + 1 + bool(FIRST)
        most *= 1 + (OPTIONS["batch"] > 1)  # in a batch that failed, and alone
        check(WORDS or calls.count(key) <= most, f"{key} called {calls.count(key)} times")
    slips = [str(path) for path in (folder / "home/crash/slips").glob("*")]
    check(not slips, f"left: {slips}")
    for name in ("data.db", "home/crash/history.db"):
        check(look("PRAGMA integrity_check", name) == [("ok",)], f"{name} is damaged")
    for tool, status, items in look("SELECT tool, status, items FROM attempts WHERE status IN "
                                    "('success', 'partial')", "home/crash/history.db"):
        count = json.loads(items)
        check(count["passed"] + count["failed"] == count["pending"],
              f"{tool} ended as {status} with {items}")
    return bool(killed)


def choose_steps():
    """Yield the steps at which to die: each `every`th, or one of each kind."""
    if OPTIONS["every"]:
        yield from range(OPTIONS["every"], 10_000, OPTIONS["every"])
    begin(NEVER)
    kinds = {}
    for number, (_, _, _, kind) in enumerate(read_calls(None, "step"), 1):
        kinds.setdefault(kind, []).append(number)
    chance = random.Random(1)  # the same steps each time
    yield from sorted(chance.choice(numbers) for numbers in kinds.values())


if __name__ == "__main__":  # workers import this file, too
    top = folder
    for name in ("warm", "steps"):
        folder = top / name
        folder.mkdir()
        os.environ.update(FOLDER=str(folder), DIE_AT="0")
        conn = get_connection()
        conn.executescript("CREATE TABLE work (tool, item); CREATE TABLE more (tool, item)")
        conn.close()
        if name == "warm":  # this process imports all that the runs will need
            orchestrator.main(TOOLS, {}, get_connection, argv=["-q", *WORDS], name="crash",
                              home=str(folder / "home"))
    for at in choose_steps():
        folder = top / str(at)
        folder.mkdir()
        if not kill_and_go_on(at) or any(OPTIONS["until"] in each for each in complaints):
            break
    print(json.dumps({"kills": sum(where.values()), "where": where, "complaints": complaints}))
'''

LOAD = """
    import os, signal, sys

    def note(word, context):
        sys.modules["__main__"].note(word, context.tool, context.item)

    def items():
        return ["a", "flaky", "broken"]

    def work(conn, item, context):
        note("began", context)
        conn.execute("INSERT INTO work VALUES (?, ?)", (context.tool, item))
        flag = os.path.join(os.environ["FOLDER"], "died")
        if os.environ.get("SUICIDE") == item and not os.path.exists(flag):
            open(flag, "w").close()
            note("dies", context)
            os.kill(os.getpid(), signal.SIGKILL)
        conn.execute("INSERT INTO more VALUES (?, ?)", (context.tool, item))

    def run(conn, item, context):
        work(conn, item, context)
        note("ended", context)
        if item == "broken" or item == "flaky" and context.attempt == 1:
            raise ValueError(item)
"""
PUBLISH = """
    from load import note, work

    def run(conn, item, context):
        work(conn, item, context)
        note("ended", context)
"""


def write_engine(sandbox, mutant=()):
    """Write the engine into the sandbox; `mutant` are pairs: what in its text becomes what."""
    source = (TOP / "orchestrator.py").read_text(encoding="utf-8")
    for text, other in mutant:
        assert source.count(text) == 1, f"not once in the engine: {text}"
        source = source.replace(text, other)
    (sandbox.folder / "orchestrator.py").write_text(source, encoding="utf-8")


def kill_at_every_step(sandbox, words=(), batch=1, journal="DELETE", first="", every=1,
                       mutant=(), until=""):
    """Return what the driver says; it stops at the first complaint that holds `until`."""
    write_engine(sandbox, mutant)
    sandbox.tool("load", LOAD).tool("publish", PUBLISH).tool("driver", DRIVER)
    options = {"words": list(words), "batch": batch, "journal": journal, "first": first,
               "every": every, "until": until}
    ended = subprocess.run(
        [sys.executable, "driver.py", json.dumps(options)], cwd=sandbox.folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120,
        env={**ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"})
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


RUNS = {"one": ((), 1, "", "DELETE"), "batch": ((), 3, "", "WAL"),
        "killed before": ((), 1, "flaky", "DELETE"),
        "workers": (("--jobs", "2"), 1, "", "WAL"),
        "batches in workers": (("--jobs", "2"), 3, "", "DELETE")}


@pytest.mark.parametrize("words, batch, first, journal, every", [
    *(pytest.param(*RUNS[name], every, id=name) for name, every in (
        ("one", 0), ("batch", 11), ("killed before", 17), ("workers", 13),
        ("batches in workers", 19))),
    *(pytest.param(*run, 1 + len(run[0]), id=f"{name}, each step", marks=pytest.mark.sweep)
      for name, run in RUNS.items()),
])
def test_items_of_a_run_killed_at_any_step_are_done_exactly_once(sandbox, words, batch, first,
                                                                 journal, every):
    """
        load (a; flaky, at its second try; broken, never) - publish (each that passed)

    The ledger tells tries and deaths as they were, and nobody is called more often than needed.
    """
    said = kill_at_every_step(sandbox, words, batch, journal, first, every)
    assert not said["complaints"], said
    assert said["kills"] > (60 / every if every else 10)
    # chance has a part in it
    assert not words or every > 3 or min(said["where"].values()) > 10 / every


RECORD = """        ledger.record(item._replace(tries=item.tries + 1), "success", time.time(),
                      time.monotonic() - self.started_s, rows)
"""
CALL = "        rows = None\n        if not self.tool.command:\n"
ANEW = "        self.database.commit()\n        self.database.begin()\n"
LEDGER_AFTER = [(RECORD, ANEW + RECORD)]
EARLY = RECORD.replace("rows)", "None)") + ANEW
LEDGER_BEFORE = [(RECORD, ""), (CALL, EARLY + CALL)]
STALE_SLIPS = [("count_tries(at_work) == count_tries(item)", "item")]
NO_UNDO = [("self.had_ended = database.is_open and database.rollback()", "pass")]


@pytest.mark.parametrize("mutant, batch, complaint", [
    (LEDGER_AFTER, 1, "twice in work"),
    (LEDGER_BEFORE, 1, "lost from work"),
    (STALE_SLIPS, 1, "and died 0 times"),
    (NO_UNDO, 3, "torn, in work"),
], ids=["ledger after", "ledger before", "stale slips", "no undo"])
def test_an_engine_that_is_careless_with_items_is_caught(sandbox, mutant, batch, complaint):
    said = kill_at_every_step(sandbox, batch=batch, mutant=mutant, until=complaint)
    assert any(complaint in each for each in said["complaints"]), said


# --- pipelines as people run them ---

PIPELINE = '''
def get_connection():
    import sqlite3
    conn = sqlite3.connect(Path(__file__).with_name("data.db"), timeout=30)
    conn.execute("PRAGMA journal_mode = JOURNAL")
    conn.execute("PRAGMA synchronous = OFF")
    conn.execute("CREATE TABLE IF NOT EXISTS work (item, version)")
    conn.execute("CREATE TABLE IF NOT EXISTS more (item, version)")
    return conn

NAME = "crash"
TOOL_MAP = {"load": {"module": "load", "retries": 1, "retry_delay": 0, "batch": BATCH}}
'''


def write_pipeline(sandbox, tool, journal="DELETE", batch=1, mutant=()):
    """Write a pipeline with the tool `load`."""
    sandbox.pipeline(PIPELINE.replace("JOURNAL", journal).replace("BATCH", str(batch)))
    sandbox.tool("load", tool)
    program = sandbox.folder / "orchestrator.py"
    source = program.read_text(encoding="utf-8")
    for text, other in mutant:
        assert source.count(text) == 1, f"not once in the engine: {text}"
        source = source.replace(text, other)
    program.write_text(source, encoding="utf-8")
    return sandbox


def look(sandbox, sql):
    """Return the rows of a query on data.db; [] as long as there is no such table."""
    try:
        return sandbox.query(sql)
    except sqlite3.OperationalError as error:
        assert "no such table" in str(error)
        return []


def find_wrong(sandbox, wanted):
    """Return what of the work is lost, done twice or torn, or not in the ledger as a success."""
    work, more = (look(sandbox, f"SELECT item FROM {name} ORDER BY item")
                  for name in ("work", "more"))
    wanted = sorted((name,) for name in wanted)
    done = look(sandbox, "SELECT item FROM orchestrator_items WHERE status = 'success' ORDER BY 1")
    return [f"{text}: {rows}" for text, rows in (
        ("lost", sorted(set(wanted) - set(work))), ("torn", sorted(set(work) ^ set(more))),
        ("twice", sorted({row for row in work if work.count(row) > 1})),
        ("ledger", sorted(set(done) ^ set(wanted)))) if rows]


def find_slips(sandbox, home=".orchestrator"):
    return [path.name for path in sandbox.folder.glob(f"{home}/crash/slips/*")]


# --- killed at random ---

MANY = [f"i{number:03}" for number in range(120)]
STEADY = f"""
    import os
    def items():
        return {MANY!r}
    def run(conn, item, context):
        with open("at", "w") as file:
            file.write(str(os.getpid()))
        conn.execute("INSERT INTO work VALUES (?, 1)", (item,))
        for _ in range(20_000):  # a chance to be killed
            pass
        conn.execute("INSERT INTO more VALUES (?, 1)", (item,))
"""


def kill_at_random(sandbox, kills, seed, mutant=(), journal="DELETE"):
    """Kill orchestrators and workers at random moments; return what is wrong in the end."""
    chance = random.Random(seed)  # noqa: S311 - the same moments each time, nearly
    write_pipeline(sandbox, STEADY, journal, mutant=mutant)
    at, left, is_over = sandbox.folder / "at", kills, False
    while left > 0 or not is_over:
        if is_over:  # once more from the beginning
            for name in ("work", "more", "orchestrator_items"):
                with contextlib.closing(sqlite3.connect(sandbox.folder / "data.db")) as conn, conn:
                    conn.execute(f"DELETE FROM {name}")
        at.write_text("")
        process = sandbox.start("-q", "-j", str(1 + left % 3))
        if chance.random() < 0.8:  # else it may not have begun; how long that takes, who knows
            wait_until(lambda run=process: at.read_text() or run.poll() is not None)
        try:
            process.wait(chance.uniform(0.0, 0.2) if left > 0 else 60)
        except subprocess.TimeoutExpired:
            left -= 1
            pid = at.read_text()
            if chance.random() < 0.5 and pid:  # a worker, unless they run one after another
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            else:
                process.kill()
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err and process.returncode not in (2, 3), err
        is_over = process.returncode == 0
        assert sandbox.query("PRAGMA integrity_check") == [("ok",)]
        if is_over and find_wrong(sandbox, MANY):
            break
    return find_wrong(sandbox, MANY)


@pytest.mark.parametrize("journal, kills", [
    ("DELETE", 4), ("WAL", 4),
    *(pytest.param(journal, 30, marks=pytest.mark.sweep) for journal in ("DELETE", "WAL"))])
def test_items_killed_at_random_are_done_exactly_once(sandbox, journal, kills):
    assert kill_at_random(sandbox, kills, seed=1, journal=journal) == []
    assert not find_slips(sandbox)


WITH_CHILD = f"""
    import os, subprocess
    def items():
        return {MANY[:60]!r}
    def run(conn, item, context):
        child = subprocess.Popen(["sleep", "0.02"])
        with open("at", "w") as file:
            file.write(f"{{os.getpid()}} {{child.pid}}")
        conn.execute("INSERT INTO work VALUES (?, 1)", (item,))
        if child.wait():
            raise ValueError("its child was killed")
        conn.execute("INSERT INTO more VALUES (?, 1)", (item,))
"""
KILLS = int(os.environ.get("ORCHESTRATOR_TEST_KILLS", "300"))  # of the sweep


@pytest.mark.parametrize("kills, seed", [(6, 1), pytest.param(KILLS, 2, marks=pytest.mark.sweep)])
def test_items_are_done_once_whoever_is_killed_the_run_a_worker_or_a_child_of_a_tool(
        sandbox, kills, seed):
    chance = random.Random(seed)  # noqa: S311 - the same moments each time, nearly
    write_pipeline(sandbox, WITH_CHILD)
    program = sandbox.folder / "orchestrator.py"
    program.write_text(program.read_text().replace('"retries": 1', '"retries": 9', 1))
    at, killed = sandbox.folder / "at", []
    while len(killed) < kills:
        sandbox.folder.joinpath("data.db").unlink(missing_ok=True)
        code = None
        while code != 0:
            at.write_text("")
            process = sandbox.start("-q", "-j", "3")
            while process.poll() is None:
                if chance.random() < 0.9:  # else it may not have begun
                    wait_until(lambda run=process: at.read_text() or run.poll() is not None)
                try:
                    process.wait(chance.uniform(0.0, 0.3) if len(killed) < kills else 60)
                except subprocess.TimeoutExpired:
                    pids = [process.pid, *map(int, at.read_text().split())]
                    who = chance.choice(range(len(pids)))
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pids[who], signal.SIGKILL)
                        killed.append(("run", "worker", "child")[who])
            code, (_, err) = process.returncode, process.communicate(timeout=60)
            assert "Traceback" not in err.replace("Traceback (most recent call last):\n  File "
                                                  f'"{sandbox.folder}/load.py"', ""), err
            assert code in (0, 1, -signal.SIGKILL), err
            assert sandbox.query("PRAGMA integrity_check") == [("ok",)]
        died = {item for (item,) in look(sandbox, "SELECT item FROM orchestrator_items WHERE "
                                         "status = 'quarantined' AND deaths = 3")}
        assert find_wrong(sandbox, {*MANY[:60]} - died) == []  # three kills may hit one item
    assert not find_slips(sandbox)
    assert kills < 20 or set(killed) == {"run", "worker", "child"}


def test_an_engine_that_records_items_before_their_work_is_caught_by_random_kills(sandbox):
    assert kill_at_random(sandbox, 40, seed=1, mutant=LEDGER_BEFORE)


HASTY = """
    import os, signal
    def items():
        return ["a"]
    def run(conn, item):
        conn.execute("INSERT INTO work VALUES (?, 1)", (item,))
        conn.commit()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_item_can_not_commit_the_first_half_of_its_work_and_be_killed_then(sandbox):
    ended = write_pipeline(sandbox, HASTY).run()
    assert ended.code == 1 and "COMMIT was refused inside an item" in ended.err, ended
    assert sandbox.query("SELECT * FROM work") == []


def test_an_engine_that_refuses_no_commit_is_left_with_half_of_an_item(sandbox):
    write_pipeline(sandbox, HASTY, mutant=[("guard.is_up, guard.tried = True, ",
                                            "guard.is_up, guard.tried = False, ")])
    assert sandbox.run().code == -signal.SIGKILL
    assert find_wrong(sandbox, []) == ["torn: [('a',)]"]


# --- an item that takes its process down ---

POISON = """
    import ctypes, faulthandler, os, signal
    def items():
        return ["a", "b", "poison", "c", "d"]
    def run(conn, item):
        conn.execute("INSERT INTO work VALUES (?, 1)", (item,))
        if item == "poison" and not os.path.exists("cured"):
            DIE
        conn.execute("INSERT INTO more VALUES (?, 1)", (item,))
"""
WAYS = {"exit": "os._exit(0)", "segfault": "faulthandler.disable(), ctypes.string_at(0)",
        "kill": "os.kill(os.getpid(), signal.SIGKILL)"}


def find_poison(sandbox):
    return sandbox.query("SELECT status, deaths FROM orchestrator_items WHERE item = 'poison'")


@pytest.mark.parametrize("way, batch", [("exit", 1), ("segfault", 5), ("kill", 1)])
def test_a_poison_item_is_quarantined_after_three_runs_that_it_took_down(quick, way, batch):
    write_pipeline(quick, POISON.replace("DIE", WAYS[way]), batch=batch)
    codes = [quick.run().code for _ in range(3)]
    assert codes == {"exit": [0] * 3, "segfault": [-signal.SIGSEGV] * 3,
                     "kill": [-signal.SIGKILL] * 3}[way]
    ended = quick.run()
    assert find_poison(quick) == [("quarantined", 3)]
    assert "quarantined" in ended.err and ended.code == 1, ended
    assert find_wrong(quick, "abcd") == []
    assert not find_slips(quick)
    last = quick.run()
    assert last.code == 0 and "1 item given up before: poison" in last.err, last


@pytest.mark.parametrize("way, batch", [("exit", 1), ("segfault", 5), ("kill", 1)])
def test_a_poison_item_in_workers_is_quarantined_within_a_run_and_given_back(quick, way, batch):
    write_pipeline(quick, POISON.replace("DIE", WAYS[way]), batch=batch)
    ended = quick.run("--jobs", "2")
    assert ended.code == 1, ended
    assert "it took its process down 3 of 3 times; quarantined" in ended.err
    assert find_poison(quick) == [("quarantined", 3)]
    assert find_wrong(quick, "abcd") == []
    assert "4 done, 1 quarantined" in quick.run("--status").out
    assert quick.run("--jobs", "2").code == 0
    assert find_poison(quick) == [("quarantined", 3)]
    (quick.folder / "cured").touch()
    assert quick.run("--jobs", "2", "--retry-items", "load", "poison").code == 0
    assert find_poison(quick) == [("success", 0)]
    assert find_wrong(quick, ["a", "b", "c", "d", "poison"]) == []
    assert not find_slips(quick)


def test_an_engine_without_slips_lets_a_poison_item_end_every_run(quick, sandbox):
    write_pipeline(sandbox, POISON.replace("DIE", WAYS["kill"]), mutant=[
        ("            write_slip(self.slip_fd, job, item)\n", "            pass\n")])
    assert {sandbox.run().code for _ in range(4)} == {-signal.SIGKILL}


# --- two orchestrators at once ---

# Half of the items have a row in the ledger, of an older version; both list all of them before
# either does the first.
TOGETHER = f"""
    import os, pathlib, time
    def items():
        return [(name, os.environ["VERSION"] if i % 2 else "2")
                for i, name in enumerate({MANY[:40]!r}) if i % 2 or os.environ["VERSION"] == "2"]
    def run(conn, item):
        pathlib.Path("ready." + os.environ["WHO"]).touch()
        while not all(pathlib.Path("ready." + who).exists() for who in os.environ["ALL"]):
            time.sleep(0.001)
        version = os.environ["VERSION"]
        conn.execute("INSERT INTO work VALUES (?, ?)", (item, version))
        conn.execute("INSERT INTO more VALUES (?, ?)", (item, version))
"""


def run_two(sandbox, jobs, journal="DELETE", mutant=()):
    """Return what is wrong after two orchestrators did the same items at once."""
    write_pipeline(sandbox, TOGETHER, journal, mutant=mutant)

    def start(who, among, version):
        return sandbox.start("-q", "-j", jobs, env={
            "ORCHESTRATOR_HOME": str(sandbox.folder / who), "WHO": who, "ALL": among,
            "VERSION": version})

    first = start("x", "x", "1")
    assert first.communicate(timeout=60) and first.returncode == 0
    assert len(look(sandbox, "SELECT * FROM work")) == 20
    with contextlib.closing(sqlite3.connect(sandbox.folder / "data.db")) as conn, conn:
        for table in ("work", "more"):
            conn.execute(f"DELETE FROM {table}")
    both = [start(who, "yz", "2") for who in "yz"]
    for process in both:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    return find_wrong(sandbox, MANY[:40])


@pytest.mark.parametrize("jobs, journal", [("1", "DELETE"), ("2", "WAL")])
def test_two_orchestrators_on_one_database_do_no_item_twice(sandbox, jobs, journal):
    assert run_two(sandbox, jobs, journal) == []


# DELETE + INSERT shows on SQLite, too: its one writer at a time keeps the two apart, but the
# second then deletes the committed row of the first, which nothing of its own work depends on.
INSERT = '"""\n    INSERT INTO orchestrator_items (pipeline'
DELETE_FIRST = [("        if not item.is_seen:\n            try:\n", """\
        if True:
            try:
                self.do("DELETE FROM orchestrator_items WHERE pipeline = ? AND tool = ? "
                        "AND item = ?", (*self.key, item.name))
""")]
REPLACE = [(INSERT, INSERT.replace("INSERT", "INSERT OR REPLACE"))]
NO_GUARD = [("AND (passed IS NULL OR passed <> ?)\n\"\"\"", "AND ? IS NOT NULL\n\"\"\"")]


@pytest.mark.parametrize("mutant", [DELETE_FIRST, REPLACE, NO_GUARD],
                         ids=["delete and insert", "replace", "no guard"])
def test_an_engine_whose_rows_guard_nothing_lets_two_do_an_item(sandbox, mutant):
    assert [text[:5] for text in run_two(sandbox, "1", mutant=mutant)] == ["twice"]


# --- signals ---

ENDLESS = """
    import os, pathlib, signal
    def items():
        return ["a", "long", "b"]
    def run(conn, item):
        conn.execute("INSERT INTO work VALUES (?, 1)", (item,))
        if item == "long" and not os.path.exists("short"):
            for _ in range(1 + os.path.exists("deaf")):
                try:
                    pathlib.Path("at").touch()
                    while True:
                        signal.pause()
                except KeyboardInterrupt:
                    pathlib.Path("heard").touch()
                    if not os.path.exists("deaf"):
                        raise
        conn.execute("INSERT INTO more VALUES (?, 1)", (item,))
"""


def find_deaths(sandbox):
    return sum(row[0] for row in sandbox.query("SELECT deaths FROM orchestrator_items"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_an_item_at_work_at_a_signal_is_undone_and_charged_with_nothing(sandbox, jobs, number):
    write_pipeline(sandbox, ENDLESS, batch=1)
    process = sandbox.start("-j", jobs)
    wait_until((sandbox.folder / "at").exists)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, err
    assert sandbox.query("SELECT item FROM work WHERE item = 'long'") == []
    assert not find_slips(sandbox)
    (sandbox.folder / "short").touch()
    assert sandbox.run("-j", jobs).code == 0
    assert find_wrong(sandbox, ["a", "b", "long"]) == []
    assert find_deaths(sandbox) == 0


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_second_ctrl_c_ends_an_item_that_did_not_hear_the_first(sandbox, jobs):
    """What is at work then is cut off as by a kill: undone; but that is nobody's death."""
    write_pipeline(sandbox, ENDLESS)
    (sandbox.folder / "deaf").touch()
    process = sandbox.start("-j", jobs)
    wait_until((sandbox.folder / "at").exists)
    process.send_signal(signal.SIGINT)
    wait_until((sandbox.folder / "heard").exists)
    press_ctrl_c_again(process)
    process.communicate(timeout=30)
    assert process.returncode == 130
    (sandbox.folder / "short").touch()
    ended = sandbox.run("-j", jobs)
    assert ended.code == 0, ended
    assert find_wrong(sandbox, ["a", "b", "long"]) == []
    assert find_deaths(sandbox) == 0
    assert not find_slips(sandbox)


def test_an_item_whose_worker_is_killed_after_the_grace_of_ctrl_c_is_charged_with_nothing(sandbox):
    write_pipeline(sandbox, ENDLESS, mutant=[("GRACE_S = 10.0", "GRACE_S = 0.2")])
    (sandbox.folder / "deaf").touch()
    process = sandbox.start("-j", "2")
    wait_until((sandbox.folder / "at").exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert not find_slips(sandbox)
    (sandbox.folder / "short").touch()
    assert sandbox.run().code == 0
    assert find_wrong(sandbox, ["a", "b", "long"]) == []
    assert find_deaths(sandbox) == 0


MEANWHILE = """
    import pathlib, sqlite3
    def items():
        return ["a", "b"]
    def run(conn, item):
        flag = pathlib.Path("other." + item)
        if not flag.exists():  # somebody else is a moment faster
            flag.touch()
            other = sqlite3.connect("data.db")
            other.execute("INSERT INTO work VALUES (?, 1)", (item,))
            other.execute("INSERT INTO more VALUES (?, 1)", (item,))
            other.execute("INSERT INTO orchestrator_items VALUES ('crash', 'load', ?, '', '', "
                          "'success', 1, 0, '', 'other', 0, 0, NULL, NULL)", (item,))
            other.commit()
            other.close()
        conn.execute("INSERT INTO work VALUES (?, 1)", (item,))
        conn.execute("INSERT INTO more VALUES (?, 1)", (item,))
"""


def test_items_that_another_did_meanwhile_are_counted_once(quick):
    write_pipeline(quick, MEANWHILE, "WAL", batch=2)
    ended = quick.run()
    assert ended.code == 0, ended
    assert "2 items done by another run meanwhile" in ended.err
    assert find_wrong(quick, "ab") == []
