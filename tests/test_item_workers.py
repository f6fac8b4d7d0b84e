"""Items over several workers, and what happens to them when processes die or locks are held."""
import os
import re
import signal
import sqlite3
import sys
import time
from contextlib import closing

import pytest
from conftest import SQLITE, wait_until
from test_items import open_world

import orchestrator
from orchestrator import Doer, run_pipeline

RUN = """
    import os, pathlib, signal, time
    def items():
        return {items!r}
    def run(conn, item, context):
        before(conn, item)
        conn.execute("INSERT INTO done VALUES ('t', ?, ?, ?)",
                     (item, context.attempt, os.getpid()))
        return after(conn, item)
    def before(conn, item):
        pass
    def after(conn, item):
        pass
"""
LETTERS = list("abcdefgh")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signals and forks")


@pytest.fixture
def world(tmp_path, monkeypatch):
    yield from open_world(tmp_path, monkeypatch)


def tool(world, body, items=LETTERS, where="after"):
    """Write a tool that does some items, and some lines after it has written, or before."""
    world.tool("t", make_source(body, items, where))


def make_source(body, items, where="after"):
    return RUN.format(items=items) + f"    def {where}(conn, item):\n        pass\n" + "".join(
        f"        {line}\n" for line in body.splitlines())


def slips(world):
    """Return the slips that are left."""
    return [file for _, _, files in os.walk(os.path.join(world.home, "p", "slips"))
            for file in files]


def deaths(world):
    return dict(world.query("SELECT item, deaths FROM orchestrator_items WHERE deaths > 0"))


# --- fewer connections than workers ---

LIMITED = """
NAME = "p"
TOOL_MAP = {{"t": {{"module": "t", "retries": 0}}}}
def get_connection():
    import os, sqlite3
    for slot in range({limit}):
        path = Path(__file__).with_name(f"slot{{slot}}")
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            if path.read_text() != str(os.getpid()):
                continue
        else:
            os.write(fd, str(os.getpid()).encode())
        return sqlite3.connect(Path(__file__).with_name("data.db"), timeout=20)
    raise sqlite3.OperationalError("sorry, too many clients already")
"""
COUNTED = """
    import os, time
    def setup(conn):
        conn.execute("CREATE TABLE IF NOT EXISTS done (item, pid)")
    def items():
        return [str(i) for i in range(40)]
    def run(conn, item):
        conn.execute("INSERT INTO done VALUES (?, ?)", (item, os.getpid()))
"""


@pytest.mark.parametrize("limit", [1, 2])
def test_items_go_on_with_the_workers_that_have_a_connection(quick, limit):
    quick.pipeline(LIMITED.format(limit=limit)).tool("t", COUNTED)
    ended = quick.run("--jobs", "4")
    assert ended.code == 0, ended
    assert len(quick.query("SELECT DISTINCT item FROM done")) == 40
    assert 1 <= len(quick.query("SELECT DISTINCT pid FROM done")) <= limit
    assert quick.query("SELECT DISTINCT status, attempts, deaths FROM orchestrator_items") == [
        ("success", 1, 0)]
    assert ended.err.count("others do its items: in get_connection(): OperationalError: sorry, ") \
        == 1
    assert "a smaller --jobs" in ended.err and "LIMITS" in ended.err


def test_a_worker_without_a_connection_goes_and_leaves_the_items_to_one_that_has_it(quick):
    """It was there before the other, and would be asked first again and again."""
    quick.pipeline(LIMITED.format(limit=1).replace(
        '{"t": {"module": "t", "retries": 0}}',
        '{"plain": {"module": "plain", "needs": []}, "t": {"module": "t", "needs": []}}'))
    quick.tool("t", COUNTED + "        open('done' + item, 'w').close()\n"
               "        while item == '5' and not os.path.exists('over'):\n"
               "            time.sleep(0.001)\n")
    quick.tool("plain", """
        import os, time
        def run():
            while not os.path.exists("done3"): time.sleep(0.001)
            open("over", "w").close()
    """)
    ended = quick.run("--jobs", "2")
    assert ended.code == 0, ended
    assert len(quick.query("SELECT DISTINCT item FROM done")) == 40
    assert len(quick.query("SELECT DISTINCT pid FROM done")) == 1


@pytest.mark.parametrize("words", [(), ("--jobs", "2")])
def test_a_tool_that_gets_no_connection_at_all_fails_with_a_way_out(quick, words):
    quick.pipeline(LIMITED.format(limit=0)).tool("t", COUNTED)
    ended = quick.run(*words)
    assert ended.code == 1 and "too many clients already" in ended.err
    assert "a smaller --jobs" in ended.err and "LIMITS" in ended.err


def test_items_that_nobody_has_a_connection_for_any_more_fail_the_tool_untouched(quick):
    """It is the first to get one that gives it away."""
    quick.pipeline(LIMITED.format(limit=1)).tool("t", COUNTED.replace(
        "    def run(conn, item):\n", """    def run(conn, item):
        if item == "3" and not os.path.exists("well"):
            open("slot0", "w").close()  # it is another's now
            conn.close()
            raise OSError(5, "the disk is gone")
"""))
    ended = quick.run("--jobs", "2")
    assert ended.code == 1, ended
    os.unlink(quick.folder / "slot0")
    quick.folder.joinpath("well").touch()
    assert quick.run("--resume").code == 0
    assert len(quick.query("SELECT item FROM done")) == 40


# --- side by side ---


def test_items_are_done_at_the_same_time_by_as_many_workers_as_there_are_jobs(world):
    """Each waits for two others."""
    tool(world, """
open("at." + item, "w").close()
end_s = time.monotonic() + 20
while len(list(pathlib.Path().glob("at.*"))) < 3:
    assert time.monotonic() < end_s
    time.sleep(0.002)
""", LETTERS[:3], "before")
    assert world.run(jobs=3).status == "success"
    pids = {pid for pid, in world.query("SELECT pid FROM done")}
    assert len(pids) == 3 and os.getpid() not in pids


@pytest.mark.parametrize("limit", [1, 2])
def test_items_use_as_much_as_the_limits_allow_and_no_more(world, limit):
    tool(world, f"""
here = pathlib.Path("at." + item)
here.touch()
pathlib.Path("was." + item).touch()
end_s = time.monotonic() + 20
while len(list(pathlib.Path().glob("was.*"))) < {limit}:
    assert time.monotonic() < end_s
    time.sleep(0.002)
assert len(list(pathlib.Path().glob("at.*"))) <= {limit}
here.unlink()
""", LETTERS, "before")
    result = world.run(tools={"t": {"module": "t", "uses": {"api": 1}}}, jobs=4,
                       limits={"api": limit})
    assert result.status == "success", result


def test_two_tools_share_the_workers_and_each_item_is_done_once(world):
    tool(world, "pass", [str(i) for i in range(200)])
    tools = {name: {"module": "t", "needs": []} for name in ("t", "u")}
    result = world.run(tools=tools, jobs=3)
    assert result.status == "success"
    assert {name: each["items"] for name, each in result.results.items()} == {"t": 200, "u": 200}
    assert len(world.query("SELECT * FROM done")) == 400
    assert world.query("SELECT tool, count(*) FROM orchestrator_items GROUP BY tool") == [
        ("t", 200), ("u", 200)]


@linux
@pytest.mark.parametrize("options", [{"isolate": True}, {"memory": "4GB"}, {"timeout": "1h"}])
def test_items_of_an_isolated_tool_are_done_in_another_process_in_their_order(world, options):
    tool(world, "pass")
    assert world.run(tools={"t": {"module": "t", **options}}).status == "success"
    assert world.done() == LETTERS
    pids = {pid for pid, in world.query("SELECT pid FROM done")}
    assert len(pids) == 1 and os.getpid() not in pids
    assert slips(world) == []


@linux
@pytest.mark.parametrize("batch", [1, 3])
def test_an_item_that_takes_too_much_memory_fails_alone(world, batch):
    tool(world, "if item == 'c': bytearray(3 << 30)")
    options = {"module": "t", "memory": "1GB", "batch": batch}
    result = world.run(tools={"t": options})
    assert result.partial == ["t"] and "c: MemoryError" in result.errors["t"]
    assert world.done() == [each for each in LETTERS if each != "c"]


# --- time ---


@linux
@pytest.mark.parametrize("jobs, batch", [(1, 1), (1, 3), (3, 1)])
def test_an_item_that_takes_too_long_is_charged_alone(world, jobs, batch):
    tool(world, "if item == 'c': time.sleep(60)", where="before")
    options = {"module": "t", "timeout": 0.3, "batch": batch}
    result = world.run(tools={"t": options}, jobs=jobs)
    assert result.partial == ["t"]
    assert result.errors["t"] == "c: timed out after 0.30 s"
    assert sorted(world.done()) == [each for each in LETTERS if each != "c"]
    assert world.ledger()["c"] == ("failed", 1)
    assert deaths(world) == {} and slips(world) == []


@linux
def test_the_time_is_that_of_each_item_and_not_of_all(world):
    tool(world, "time.sleep(0.4)", LETTERS[:4])
    result = world.run(tools={"t": {"module": "t", "timeout": 1.2}})
    assert (result.status, result.results["t"]["items"]) == ("success", 4)


@linux
def test_an_item_that_will_not_end_is_killed_and_that_is_no_death(world):
    tool(world, """
if item == "c":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)
""")
    options = {"module": "t", "timeout": 0.2, "retries": 1, "retry_delay": 0}
    result = world.run(tools={"t": options}, grace_s=0.1)
    assert result.partial == ["t"]
    assert result.errors["t"] == "c: timed out after 0.20 s"
    assert world.ledger()["c"] == ("failed", 2)
    assert deaths(world) == {} and slips(world) == []


@linux
def test_items_that_takes_too_long_fails_the_tool(world):
    world.tool("t", "import time\ndef items(): time.sleep(60)\ndef run(item): pass")
    result = world.run(tools={"t": {"module": "t", "timeout": 0.2}})
    assert (result.failed, result.errors) == (["t"], {"t": "timed out after 0.20 s"})


# --- processes that die ---


@linux
@pytest.mark.parametrize("jobs, batch", [(1, 1), (1, 3), (3, 1), (3, 4)])
@pytest.mark.parametrize("how", ["os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_an_item_that_takes_its_worker_down_is_quarantined_and_the_others_are_done(
        world, how, jobs, batch):
    tool(world, f"if item == 'c': {how}")
    options = {"module": "t", "isolate": True, "batch": batch}
    result = world.run(tools={"t": options}, jobs=jobs)
    assert result.partial == ["t"]
    assert result.results["t"] == {"items": 7, "failed": 1, "rows": 0}
    assert sorted(world.done()) == [each for each in LETTERS if each != "c"]
    assert world.ledger()["c"] == ("quarantined", 0)
    assert deaths(world) == {"c": 3}
    assert "it took its process down 3 of 3 times; quarantined" in world.said()
    assert slips(world) == []

    result = world.run(tools={"t": options}, jobs=jobs)
    assert result.status == "success" and "1 item given up before: c" in result.outcomes["t"].reason
    tool(world, "mended = True")
    assert world.run(tools={"t": options}, jobs=jobs).results["t"]["items"] == 1
    assert sorted(world.done()) == LETTERS


@linux
def test_an_item_that_took_its_worker_down_once_may_still_pass(world):
    tool(world, """
if item == "c" and not os.path.exists("died"):
    open("died", "w").close()
    os._exit(3)
""")
    result = world.run(tools={"t": {"module": "t", "isolate": True}})
    assert result.status == "success"
    assert sorted(world.done()) == LETTERS
    assert deaths(world) == {"c": 1}


@linux
def test_two_items_that_take_their_workers_down_are_each_charged_with_their_own(world):
    tool(world, "if item in 'cf': os._exit(3)")
    result = world.run(tools={"t": {"module": "t"}}, jobs=3)
    assert result.partial == ["t"]
    assert deaths(world) == {"c": 3, "f": 3}
    assert sorted(world.done()) == [each for each in LETTERS if each not in "cf"]


@linux
def test_a_worker_that_dies_after_its_commit_has_done_the_item(world):
    """The slip still names the item then."""
    tool(world, """
if item == "c" and not os.path.exists("died"):
    import orchestrator
    commit = orchestrator.Database.commit
    def commit_and_die(database):
        commit(database)
        open("died", "w").close()
        os._exit(3)
    orchestrator.Database.commit = commit_and_die
""")
    result = world.run(tools={"t": {"module": "t", "isolate": True}})
    assert result.status == "success"
    assert result.results["t"] == {"items": 8, "failed": 0, "rows": 0}
    assert deaths(world) == {} and sorted(world.done()) == LETTERS


POISON = make_source("if item == 'b': os._exit(9)", ["a", "b", "c"])


def poisoned(sandbox, source=POISON):
    sandbox.pipeline("TOOL_MAP = {'t': 't', 'u': 'u'}\nSTAGES = {}\n" + SQLITE)
    sandbox.tool("t", source).tool("u", "def run(): pass")
    with closing(sqlite3.connect(sandbox.folder / "data.db")) as conn:
        conn.execute("CREATE TABLE IF NOT EXISTS done (tool, item, attempt, pid)")
    return sandbox


def done(sandbox):
    return [item for item, in sandbox.query("SELECT item FROM done ORDER BY rowid")]


def test_an_item_that_takes_the_orchestrator_down_is_left_alone_at_the_fourth_start(sandbox):
    poisoned(sandbox)
    for number in range(3):
        assert sandbox.run().code == 9
        assert done(sandbox) == ["a", "c"][:1 + number]
    ended = sandbox.run()
    assert ended.code == 1  # the first run that can tell of it
    assert "it took its process down 3 of 3 times; quarantined" in ended.err
    assert done(sandbox) == ["a", "c"]
    ended = sandbox.run()
    assert ended.code == 0 and "given up before: b" in ended.err
    ended = sandbox.run("--items", "t", "--failed")
    assert "quarantined" in ended.out and "its process ended while it was at work" in ended.out


def test_an_item_that_was_mended_after_its_third_death_is_tried(sandbox):
    """The third death is found at the next start, by when its source is another."""
    poisoned(sandbox)
    for _ in range(3):
        assert sandbox.run().code == 9
    sandbox.tool("t", POISON.replace("== 'b'", "== 'z'"))
    ended = sandbox.run()
    assert ended.code == 0, ended
    assert sorted(done(sandbox)) == ["a", "b", "c"]


@linux
@pytest.mark.parametrize("flags, number", [((), signal.SIGINT), (("--jobs", "2"), signal.SIGINT),
                                           ((), signal.SIGTERM)])
def test_an_item_that_was_interrupted_is_charged_with_nothing(sandbox, flags, number):
    poisoned(sandbox, make_source("""
if item == "b" and not os.path.exists("at.b"):
    open("at.b", "w").close()
    time.sleep(60)
""", ["a", "b", "c"]))
    process = sandbox.start(*flags)
    wait_until((sandbox.folder / "at.b").exists)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert sandbox.run(*flags).code == 0
    assert sorted(done(sandbox)) == ["a", "b", "c"]
    assert sandbox.query("SELECT item, attempts, deaths FROM orchestrator_items ORDER BY item") \
        == [("a", 1, 0), ("b", 1, 0), ("c", 1, 0)]


# --- locks and lost connections ---


LOCKED = """
    import sqlite3
    calls = []
    other = sqlite3.connect("data.db", isolation_level=None)
    def items():
        return ["b", "a", "c"]
    def run(conn, item, context):
        if item == "b":
            calls.append(context.attempt)
            if len(calls) == 1:
                other.execute("BEGIN IMMEDIATE")
        conn.execute("INSERT INTO done VALUES ('t', ?, ?, 0)", (item, context.attempt))
"""


@pytest.fixture
def wait(monkeypatch):
    """Have at the third wait for a lock wait.unlock() called, and nobody sleep."""
    def call(work, tries):
        if tries == 3:
            call.unlock()

    monkeypatch.setattr(Doer, "_wait", call)
    call.unlock = lambda: sys.modules["t"].other.close()
    return call


@pytest.mark.parametrize("batch", [1, 3])
def test_a_locked_database_charges_no_item_with_a_try(world, wait, batch):
    world.mode = {"timeout": 0}
    world.tool("t", LOCKED)
    result = world.run(tools={"t": {"module": "t", "batch": batch}})
    assert result.status == "success", result
    assert sys.modules["t"].calls == [1, 1, 1]
    assert world.done() == ["b", "a", "c"]
    assert set(world.ledger().values()) == {("success", 1)}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_commit_that_waits_for_a_reader_charges_no_item_with_a_try(world, wait, batch):
    with closing(sqlite3.connect("data.db")) as conn:
        conn.execute("PRAGMA journal_mode=delete")
    world.mode = {"timeout": 0}
    world.tool("t", LOCKED.replace(
        'other.execute("BEGIN IMMEDIATE")',
        'other.execute("BEGIN").execute("SELECT * FROM sqlite_master").fetchone()'))
    result = world.run(tools={"t": {"module": "t", "batch": batch}})
    assert result.status == "success", result
    assert sys.modules["t"].calls == [1, 1, 1, 1]
    assert world.done() == ["b", "a", "c"]
    assert set(world.ledger().values()) == {("success", 1)}


def test_a_tool_that_makes_another_error_of_a_lock_is_not_charged_either(world, wait):
    world.mode = {"timeout": 0}
    world.tool("t", LOCKED.replace("def run(", "def do(") + """
    def run(conn, item, context):
        try:
            do(conn, item, context)
        except sqlite3.OperationalError:
            raise KeyError("mine")
""")
    assert world.run().status == "success"
    assert set(world.ledger().values()) == {("success", 1)}


def test_a_lock_that_is_held_while_the_ledger_is_made_is_waited_for(world, wait):
    world.mode = {"timeout": 0}
    other = sqlite3.connect("data.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    wait.unlock = other.close
    assert world.run("a", "b").status == "success"
    assert world.done() == ["a", "b"]


def test_a_lock_that_nobody_lets_go_fails_the_tool_and_charges_no_item(world, monkeypatch):
    monkeypatch.setattr(orchestrator, "LOCKED_S", 0.05)
    world.run("x")
    world.mode = {"timeout": 0}
    world.tool("t", LOCKED)
    result = world.run()
    sys.modules["t"].other.close()
    assert result.failed == ["t"] and "database is locked" in result.errors["t"]
    assert world.ledger() == {"x": ("success", 1)}


@pytest.mark.parametrize("batch", [1, 5])
def test_workers_that_read_and_then_write_lose_nothing_and_are_charged_with_nothing(world, batch):
    """In WAL mode a read can not become a write once another has written."""
    names = [str(i) for i in range(60)]
    world.tool("t", f"""
        def items(): return {names}
        def run(conn, item):
            count, = conn.execute("SELECT count(*) FROM done").fetchone()
            conn.execute("INSERT INTO done VALUES ('t', ?, ?, 0)", (item, count))
    """)
    result = world.run(tools={"t": {"module": "t", "batch": batch}}, jobs=3)
    assert result.status == "success", result
    assert sorted(world.done()) == sorted(names)
    assert set(world.ledger().values()) == {("success", 1)}
    assert world.query("SELECT attempt FROM done ORDER BY rowid") == [(i,) for i in range(60)]


@pytest.mark.parametrize("retries", [0, 1])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_connection_that_is_lost_is_a_death_of_one_item_and_all_are_done(world, retries, batch,
                                                                           jobs):
    tool(world, """
if item == "c" and not os.path.exists("lost"):
    open("lost", "w").close()
    conn.close()
""")
    options = {"module": "t", "retries": retries, "retry_delay": 0, "batch": batch}
    result = world.run(tools={"t": options}, jobs=jobs)
    assert result.status == "success"
    assert result.results["t"] == {"items": 8, "failed": 0, "rows": 0}
    assert sorted(world.done()) == LETTERS
    assert jobs > 1 or world.done() == [*"abdefgh", "c"]
    assert set(world.ledger().values()) == {("success", 1)}
    assert deaths(world) == {"c": 1}
    assert slips(world) == []
    assert re.search("c: the connection is gone: ProgrammingError: Cannot operate on a closed "
                     "database.*; it took its connection down 1 of 3 times; again", world.said())


def test_a_tool_that_is_tried_again_after_items_failed_is_partial_all_the_same(world):
    tool(world, """
if item == "b":
    raise ValueError("no")
if item == "d" and not os.path.exists("lost"):
    if os.path.exists("tried"):
        open("lost", "w").close()
        conn.close()
    open("tried", "w").close()
    raise ValueError("lost")
""")
    options = {"module": "t", "retries": 1, "retry_delay": 0}
    result = world.run(tools={"t": options})
    assert result.partial == ["t"], result
    assert result.results["t"] == {"items": 7, "failed": 1, "rows": 0}
    assert result.errors["t"] == "b: ValueError: no"
    assert result.outcomes["t"].items == {"listed": 8, "pending": 8, "given_up": 0, "passed": 7,
                                          "failed": 1, "elsewhere": 0, "unfit": 0}


@linux
def test_what_a_batch_has_committed_one_by_one_is_not_done_again_after_a_timeout(world):
    """The commit of all fails, so each is done alone; then one of them takes too long."""
    world.tool("keys", """
import sqlite3
def connect_with_keys():
    conn = sqlite3.connect("data.db", timeout=20)
    conn.execute("PRAGMA foreign_keys = ON")
    return conn
""")
    from keys import connect_with_keys
    world.connect = connect_with_keys
    tool(world, """
pathlib.Path("calls").open("a").write(item)
conn.execute("CREATE TABLE IF NOT EXISTS parent (x PRIMARY KEY)")
conn.execute("CREATE TABLE IF NOT EXISTS child "
             "(x REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
if item == "b":
    conn.execute("INSERT INTO child VALUES (1)")
if item == "c" and pathlib.Path("calls").read_text().count("c") == 2:
    time.sleep(60)
""", ["a", "b", "c", "d"])
    result = world.run(tools={"t": {"module": "t", "batch": 4, "timeout": 0.5}})
    assert result.partial == ["t"]
    assert result.results["t"] == {"items": 2, "failed": 2, "rows": 0}
    assert world.done() == ["a", "d"]
    assert (world.folder / "calls").read_text() == "abcdabcd"


@linux
def test_a_worker_that_is_ended_when_it_just_had_is_given_nothing_more(world, monkeypatch):
    """Its time was up while it said that it is done: what comes next is not interrupted."""
    hear, ended = orchestrator.Workers._hear, []

    def end_and_hear(workers, worker, said):
        if not ended and worker.job.tool == "a":
            ended.append(worker.job.tool)
            workers._end(worker, "its time is up")
        hear(workers, worker, said)

    monkeypatch.setattr(orchestrator.Workers, "_hear", end_and_hear)
    world.tool("a", "def run(): pass")
    tool(world, "pass")
    result = world.run(tools={"a": {"module": "a", "isolate": True},
                              "t": {"module": "t", "isolate": True}})
    assert (ended, result.status, result.succeeded) == (["a"], "success", ["a", "t"])
    assert world.done() == LETTERS


@linux
def test_an_item_that_is_due_and_has_no_room_is_not_asked_for_all_the_time(modules):
    folder = modules(it="""
        def items():
            return ["x"]
        def run(item, context):
            assert context.attempt > 1
    """, slow="""
        import pathlib, time
        def run():
            while not pathlib.Path(__file__).with_name("go").exists():
                time.sleep(0.01)
    """)
    ticks = []

    def on_event(event):
        if event.kind == "tick":
            ticks.append(time.monotonic())
        if len(ticks) == 6:
            (folder / "go").touch()

    result = run_pipeline(
        [], {"it": {"module": "it", "needs": [], "retries": 1, "retry_delay": 0.2,
                    "uses": {"db": 1}},
             "slow": {"module": "slow", "needs": [], "uses": {"db": 1}}},
        jobs=2, limits={"db": 1}, on_event=on_event)
    assert result.status == "success"
    assert ticks[5] - ticks[0] > 0.3  # a beat is 0.1 s; without beats it is some microseconds
