"""What is whose fault: outages, the place, lost connections, and what is given up in the end.

A run may never be green over items that are missing, and nobody may be charged with what is the
fault of all: a disk that is full, a server that is gone.
"""
import json
import re
import shlex
import sys
import textwrap

import pytest
from conftest import summary
from test_items import open_world

LETTERS = list("abcdef")
jobs = pytest.mark.parametrize("jobs", [1, 2])
batches = pytest.mark.parametrize("batch", [1, 4])

CONNECT = """
def get_connection():
    import sqlite3
    here = Path(__file__).parent
    if (here / "no-connection").exists():
        raise ConnectionRefusedError("no server there")
    conn = sqlite3.connect(here / "data.db", timeout=20)
    conn.execute("CREATE TABLE IF NOT EXISTS done (item, attempt)")
    return conn
"""
TOOL = """
    import errno, json, os, pathlib, signal, sqlite3, sys
    HERE = pathlib.Path(__file__).parent
    os.chdir(HERE)

    class DatabaseError(Exception):
        pass

    class OperationalError(DatabaseError):
        sqlstate = None

    def items():
        return json.loads((HERE / "items").read_text())

    def run(conn, item, context):
        with open(HERE / "calls", "a") as file:
            file.write(item + str(context.attempt) + " ")
        conn.execute("INSERT INTO done VALUES (?, ?)", (item, context.attempt))
        if item in json.loads((HERE / "bad").read_text()):
            fault(conn, item)

    def check(conn, item):
        if item in json.loads((HERE / "bad").read_text()):
            fault_of_check(conn, item)

    def fault(conn, item):
        pass

    def fault_of_check(conn, item):
        pass
"""


class Line:
    """A sandbox with a tool `t` that has items, some of them bad, and `after`, which needs it."""

    def __init__(self, sandbox):
        self.sandbox, self.folder = sandbox, sandbox.folder
        self.run = sandbox.run
        sandbox.tool("after", "def run(): pass")
        self.write()
        self.set(LETTERS)

    def write(self, name="t", **options):
        """Write the pipeline; retries wait for nothing."""
        tools = {name: {"module": "t", "retry_delay": 0, **options}, "after": "after"}
        self.sandbox.pipeline(f"TOOL_MAP = {tools!r}\nSTAGES = {{}}\n{CONNECT}")
        return self

    def fault(self, body, where="fault"):
        """Write the tool, with what happens at a bad item."""
        self.sandbox.tool("t", textwrap.dedent(TOOL) + f"\ndef {where}(conn, item):\n"
                          + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ") + "\n")
        return self

    def set(self, items, bad=()):
        (self.folder / "items").write_text(json.dumps([*items]))
        (self.folder / "bad").write_text(json.dumps([*bad]))

    def heal(self):
        (self.folder / "bad").write_text("[]")

    def calls(self):
        """Return the calls of items since the last time, each with its attempt."""
        path = self.folder / "calls"
        calls = path.read_text().split() if path.exists() else []
        path.write_text("")
        return calls

    def done(self):
        return [item for item, in self.sandbox.query("SELECT item FROM done ORDER BY rowid")]

    def ledger(self):
        """Return status, tries and deaths of each item that has a row."""
        return {item: tuple(rest) for item, *rest in self.sandbox.query(
            "SELECT item, status, attempts, deaths FROM orchestrator_items WHERE tool <> 'after'")}

    def slips(self):
        return [path for path in self.folder.rglob("slips/*")]


@pytest.fixture
def line(quick):
    return Line(quick)


@pytest.fixture
def world(tmp_path, monkeypatch):
    yield from open_world(tmp_path, monkeypatch)


def next_of(ended, before="Next: "):
    """Return the words behind the file in the command that a run proposes."""
    proposed = re.search(rf"^\s*{before}\S+ \S+orchestrator.py (.*)$", ended.err, re.M)
    assert proposed, ended
    return shlex.split(proposed[1])


def status_of(ended, tool="t"):
    return summary(ended.err)[tool].split()[1]


# --- outages ---

OUTAGES = {
    "refused": "raise ConnectionRefusedError('the service is down')",
    "timeout": "raise TimeoutError('it does not answer')",
    "urllib": "import urllib.error\nraise urllib.error.URLError('unreachable')",
    "exit": "sys.exit('503')",
    "a bug": "return {}['k']",
}


@jobs
@batches
@pytest.mark.parametrize("outage", OUTAGES)
def test_the_run_after_an_outage_does_all_that_failed(line, outage, batch, jobs):
    line.write(batch=batch).fault(OUTAGES[outage])
    line.set(LETTERS, bad=LETTERS)
    ended = line.run("--jobs", str(jobs))
    assert (ended.code, status_of(ended)) == (1, "failed"), ended
    # None twice in one run, but for the first of a batch.
    calls = line.calls()
    assert sorted({*calls}) == [f"{item}1" for item in LETTERS] and (batch > 1 or len(calls) == 6)
    assert line.ledger() == dict.fromkeys(LETTERS, ("failed", 1, 0))

    ended = line.run("--jobs", str(jobs))  # it lasts
    assert (ended.code, status_of(ended)) == (1, "failed"), ended
    assert sorted({*line.calls()}) == [f"{item}2" for item in LETTERS]
    assert "given up" not in ended.err

    line.heal()
    ended = line.run("--jobs", str(jobs))
    assert ended.code == 0, ended
    assert sorted(line.done()) == LETTERS
    assert line.ledger() == dict.fromkeys(LETTERS, ("success", 3, 0))
    line.calls()
    assert "none of 6 items is pending" in line.run().err
    assert line.calls() == []


@jobs
@batches
@pytest.mark.parametrize("words", [(), ("--resume",), ("t",)])
def test_an_outage_in_the_middle_costs_nothing_in_the_end(line, words, batch, jobs):
    line.write(batch=batch).fault(OUTAGES["refused"])
    line.set(LETTERS, bad="cdef")
    ended = line.run("--jobs", str(jobs))
    assert (ended.code, status_of(ended)) == (1, "partial")
    line.heal()
    ended = line.run(*words, "--jobs", str(jobs))
    assert ended.code == 0, ended
    assert sorted(line.done()) == LETTERS


def test_a_thousand_items_are_not_lost_to_a_minute_without_a_service(line):
    names = [f"{i:04d}" for i in range(1000)]
    line.write(batch=100).fault(OUTAGES["refused"])
    line.set(names, bad=names)
    assert line.run().code == 1
    line.heal()
    ended = line.run()
    assert ended.code == 0 and "given up" not in ended.err
    assert line.done() == names


@jobs
@batches
def test_with_retries_items_are_given_up_and_a_tool_that_has_nothing_else_has_failed(line, batch,
                                                                                     jobs):
    line.write(retries=1, batch=batch).fault(OUTAGES["refused"])
    line.set(LETTERS, bad=LETTERS)
    ended = line.run("--jobs", str(jobs))
    assert (ended.code, status_of(ended)) == (1, "failed")
    assert sorted({*line.calls()}) == sorted(f"{item}{i}" for item in LETTERS for i in (1, 2))

    line.heal()
    for words in ((), ("--resume",)):
        ended = line.run(*words, "--jobs", str(jobs))
        assert (ended.code, status_of(ended), status_of(ended, "after")) == (
            1, "failed", "skipped"), ended
        assert "all that was tried is given up, and none ever passed" in ended.err
        assert "6 items given up before: a, b, c, ...; --retry-items t tries again" in ended.err
        assert (line.calls(), line.done()) == ([], [])
    ended = line.run(*next_of(ended))
    assert ended.code == 0, ended
    assert sorted(line.done()) == LETTERS
    assert line.ledger() == dict.fromkeys(LETTERS, ("success", 1, 0))


def test_a_resume_that_comes_too_late_names_the_command_that_tries_again(line):
    """A later run has done the rest by then, so there is nothing to resume; the items are not."""
    line.write(retries=1).fault(OUTAGES["refused"])
    line.set("ab", bad="b")
    late = next_of(line.run())
    line.heal()
    assert line.run().code == 0
    ended = line.run(*late)
    assert ended.code == 2 and "There is nothing to resume" in ended.err, ended
    assert line.run(*next_of(ended, "To do that without --resume: ")).code == 0
    assert sorted(line.done()) == ["a", "b"]


@pytest.mark.parametrize("new, status", [(["x"], "success"), (["x", "y"], "partial"),
                                         (["y"], "failed")])
def test_a_tool_is_hopeless_only_if_none_passes_of_what_is_new(line, new, status):
    line.write(retries=1).fault("raise ValueError(item)")
    line.set("ab", bad="ab")
    line.run()
    line.set(["a", "b", *new], bad="aby")
    ended = line.run()
    assert status_of(ended) == status, ended
    assert "2 items given up before: a, b; --retry-items t tries again" in ended.err
    assert "none ever passed" not in ended.err


def test_a_tool_of_which_any_item_ever_passed_is_not_hopeless(line):
    line.write(retries=1).fault("raise ValueError(item)")
    line.set("a")
    assert line.run().code == 0
    line.set("b", bad="b")  # a is not even listed any more
    assert line.run().code == 1
    ended = line.run()
    assert ended.code == 0, ended
    assert "1 item given up before: b; --retry-items t tries again" in ended.err


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_tool_all_of_whose_items_are_quarantined_is_hopeless_too(line):
    line.write(isolate=True).fault("os.kill(os.getpid(), signal.SIGKILL)")
    line.set("ab", bad="ab")
    assert line.run().code == 1
    assert line.ledger() == dict.fromkeys("ab", ("quarantined", 0, 3))
    ended = line.run()
    assert (ended.code, status_of(ended)) == (1, "failed"), ended
    assert "2 items given up before: a, b; --retry-items t tries again" in ended.err
    line.heal()
    assert line.run(*next_of(ended)).code == 0
    assert line.done() == ["a", "b"]


@pytest.mark.parametrize("first, then", [(1, 3), (1, 0), (3, 0)])
def test_what_was_given_up_comes_again_when_the_tool_allows_more_tries(line, first, then):
    line.write(retries=first).fault("raise ValueError(item)")
    line.set("ab", bad="b")
    line.run()
    assert line.ledger()["b"] == ("failed", first + 1, 0)
    line.heal()
    assert line.run().code == 0
    assert line.done() == ["a"]
    assert line.write(retries=then).run().code == 0
    assert line.done() == ["a", "b"]


def test_the_result_of_a_tool_that_is_hopeless_says_so(world):
    tools = {"t": {"module": "t", "retries": 1, "retry_delay": 0}}
    world.set("broken", "a", "b")
    world.run("a", "b", tools=tools)
    result = world.run(tools=tools)
    assert (result.status, result.failed) == ("failed", ["t"])
    assert result.errors == {"t": "all that was tried is given up, and none ever passed"}
    assert result.outcomes["t"].reason == ("none of 2 items is pending; 2 items given up before: "
                                           "a, b; --retry-items t tries again")


# --- the command that goes on ---

RETRY = ("--retry-items", "t")
SITUATIONS = {  # options of the tool, and words of two runs, after which some items still fail
    "given up, and nothing else": ({"retries": 1}, (), ()),
    "named, and one of them passes": ({}, (), (*RETRY, "a", "b")),
    "named, and all of them fail": ({}, (), (*RETRY, "b")),
    "named, and others fail": ({"retries": 1}, ("--item", "b"), (*RETRY, "b")),
    "without history": ({"retries": 1}, ("--no-history",), ("--no-history",)),
    "without history, and named": ({"retries": 1}, ("--no-history",),
                                   ("--no-history", *RETRY, "a", "b")),
    "side by side": ({"retries": 1, "batch": 4}, ("--jobs", "2"), ("--jobs", "2")),
    "a name with a blank": ({"retries": 1, "name": "my tool"}, (), ()),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_next_command_does_what_is_left_whatever_was_asked_for(line, situation):
    options, first, second = SITUATIONS[situation]
    line.write(**options).fault("raise ValueError(item)")
    line.set("abc", bad="abc")
    if "--item" in first:
        line.run(*first, "--exclude", "after")
    else:
        line.run(*first)
    if "named, and one of them passes" in situation or "and named" in situation:
        line.set("abc", bad="bc")
    ended = line.run(*second)
    assert ended.code == 1, ended
    line.heal()
    again = line.run(*next_of(ended))
    assert again.code == 0, (ended, again)
    assert sorted(line.done()) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["t", "my tool"])
def test_what_is_said_of_those_given_up_can_be_typed(line, name):
    line.write(name, retries=1).fault("raise ValueError(item)")
    line.set("abc", bad="b")
    line.run()
    ended = line.run()
    assert ended.code == 0
    words = shlex.split(re.search("1 item given up before: b; (.*) tries again", ended.err)[1])
    line.heal()
    assert line.run(*words).code == 0
    assert line.done() == ["a", "c", "b"]


# --- faults of the place ---

PLACES = {
    **{name: f"raise OSError(errno.{name}, os.strerror(errno.{name}))"
       for name in ("ENOSPC", "EIO", "EROFS", "EMFILE", "ENFILE", "EDQUOT")},
    "behind another": """
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("could not write the report") from error
    """,
    "met while another was handled": """
        try:
            raise OSError(errno.EIO, "Input/output error")
        except OSError:
            {}["k"]
    """,
    "hidden behind another": """
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("could not write the report") from None
    """,
    "a real full device": """
        with open("/dev/full", "w") as file:
            file.write(item)
    """,
    "a real full database": """
        conn.execute("CREATE TABLE IF NOT EXISTS big (x)")
        conn.execute("PRAGMA max_page_count = 20")
        try:
            conn.execute("INSERT INTO big VALUES (zeroblob(1000000))")
        finally:
            conn.execute("PRAGMA max_page_count = 1000000")
    """,
    "another database that is full": """
        other = sqlite3.connect(":memory:")
        other.execute("PRAGMA max_page_count = 2")
        other.execute("CREATE TABLE big (x)")
        other.execute("INSERT INTO big VALUES (zeroblob(1000000))")
    """,
    "another database that is read-only": """
        sqlite3.connect("out.db").execute("CREATE TABLE IF NOT EXISTS x (x)")
        sqlite3.connect("file:out.db?mode=ro", uri=True).execute("INSERT INTO x VALUES (1)")
    """,
    **{f"SQLSTATE {state}": f"""
        error = OperationalError("the server says so")
        error.sqlstate = {state!r}
        raise error
    """ for state in ("08001", "08006", "53000", "53100", "53300", "57P01", "57P03", "58030",
                      "25006")},
    "SQLSTATE of psycopg2, behind that of a library": """
        error = OperationalError("disk full")
        error.pgcode = "53100"
        raise ValueError("could not save") from error
    """,
    **{f"number {number}": f"raise OperationalError({number}, 'the server says so')"
       for number in (1021, 1040, 1114, 1203, 1290, 1836, 2002, 2003)},
    "DuckDB": "raise OperationalError('IO Error: Could not write file \"d.db\": No space left on "
              "device')",
}


WAYS = ((1, 1, 0), (4, 1, 0), (1, 2, 1), (4, 2, 0))


@pytest.mark.parametrize("place, batch, jobs, retries", [  # each place in one way, in the sweep all
    pytest.param(place, *way, marks=[pytest.mark.sweep] * ((i + j) % len(WAYS) > 0))
    for i, place in enumerate(PLACES) for j, way in enumerate(WAYS)])
def test_a_fault_of_the_place_fails_the_tool_and_is_charged_to_no_item(line, place, batch, jobs,
                                                                       retries):
    if "device" in PLACES[place] and not sys.platform.startswith("linux"):
        pytest.skip("/dev/full")
    if "EDQUOT" in place and sys.platform == "win32":
        pytest.skip("no quota of that name")
    line.write(batch=batch, retries=retries).fault(PLACES[place])
    line.set(LETTERS, bad="cdef")
    ended = line.run("--jobs", str(jobs))
    assert (ended.code, status_of(ended), status_of(ended, "after")) == (
        1, "failed", "skipped"), ended
    assert re.search("t +failed .*at [c-f]: ", ended.err), ended
    assert set(line.ledger().values()) <= {("success", 1, 0)}
    assert not set("cdef") & set(line.ledger())
    assert jobs > 1 or line.done() == ["a", "b"] * (batch == 1)
    assert {call[1] for call in line.calls()} == {"1"}  # no try was counted

    ended = line.run("--jobs", str(jobs))  # it lasts, and nothing is given up
    assert (ended.code, status_of(ended)) == (1, "failed")
    line.heal()
    ended = line.run(*next_of(ended))
    assert ended.code == 0, ended
    assert sorted(line.done()) == LETTERS
    assert line.ledger() == dict.fromkeys(LETTERS, ("success", 1, 0))


@batches
def test_a_check_that_meets_a_fault_of_the_place_charges_no_item_either(line, batch):
    line.write(batch=batch).fault(PLACES["ENOSPC"], "fault_of_check")
    line.set(LETTERS, bad="b")
    ended = line.run()
    assert (ended.code, status_of(ended)) == (1, "failed")
    assert "b" not in line.ledger()
    line.heal()
    assert line.run(*next_of(ended)).code == 0
    assert sorted(line.done()) == LETTERS


@batches
def test_a_database_that_can_only_be_read_fails_the_tool_and_says_at_which_item(line, batch):
    line.write(batch=batch).fault("pass")
    line.set("a")
    assert line.run().code == 0
    ledger = line.ledger()
    line.set(LETTERS)
    writing = line.sandbox.read("orchestrator.py")
    (line.folder / "orchestrator.py").write_text(writing.replace(
        'connect(here / "data.db", ', 'connect(f"file:{here}/data.db?mode=ro", uri=True, ', 1),
        encoding="utf-8")
    ended = line.run("--verbose")
    assert (ended.code, status_of(ended)) == (1, "failed")
    assert "at b: OperationalError: attempt to write a readonly database" in ended.err, ended
    assert line.ledger() == ledger
    (line.folder / "orchestrator.py").write_text(writing, encoding="utf-8")
    assert line.run(*next_of(ended)).code == 0
    assert line.done() == LETTERS


def test_a_tool_with_retries_goes_on_when_the_place_is_well_again(line):
    line.write(retries=1).fault("""
        if not (HERE / "was-full").exists():
            (HERE / "was-full").touch()
            raise OSError(errno.ENOSPC, "No space left on device")
    """)
    line.set(LETTERS, bad="c")
    ended = line.run()
    assert ended.code == 0, ended
    assert line.done() == LETTERS
    assert line.ledger() == dict.fromkeys(LETTERS, ("success", 1, 0))
    assert line.calls() == ["a1", "b1", "c1", "c1", "d1", "e1", "f1"]


OWN = {
    "a file that is not there": "open(HERE / 'nowhere' / item)",
    "a folder that may not be entered": "raise PermissionError(errno.EACCES, 'Permission denied')",
    "a database that is not there": "sqlite3.connect(HERE / 'nowhere' / item).execute('SELECT 1')",
    "words about a disk": "raise ValueError('database or disk is full')",
    "too much memory": "raise MemoryError",
    **{f"SQLSTATE {state}": f"""
        error = OperationalError("the server says so")
        error.sqlstate = {state!r}
        raise error
    """ for state in ("22P02", "23505", "42P01", "53200", "53400", "58P01", "XX000")},
    **{f"number {number}": f"raise OperationalError({number}, 'the server says so')"
       for number in (1062, 1064, 1146, 1366)},
}


@batches
@pytest.mark.parametrize("own", OWN)
def test_what_may_be_an_items_own_fault_fails_that_alone_and_is_tried_in_the_next_run(line, own,
                                                                                      batch):
    line.write(batch=batch).fault(OWN[own])
    line.set(LETTERS, bad="b")
    ended = line.run()
    assert (ended.code, status_of(ended)) == (1, "partial"), ended
    assert line.ledger() == {**dict.fromkeys("acdef", ("success", 1, 0)), "b": ("failed", 1, 0)}
    line.heal()
    assert line.run().code == 0
    assert line.done() == [*"acdef", "b"]


# --- lost connections ---

LOSSES = {
    "at the end": "conn.close()",
    "seen": "conn.close()\nconn.execute('SELECT 1')",
    "not seen": "conn.close()\nraise ValueError(item)",
    "swallowed": "conn.close()\ntry:\n    conn.execute('SELECT 1')\nexcept Exception:\n    pass",
    "in a check": "conn.close()",
}


@jobs
@batches
@pytest.mark.parametrize("loss", LOSSES)
def test_an_item_that_always_loses_its_connection_is_quarantined_and_the_others_are_done(
        line, loss, batch, jobs):
    line.write(batch=batch).fault(LOSSES[loss],
                                  "fault_of_check" if loss == "in a check" else "fault")
    line.set(LETTERS, bad="b")
    ended = line.run("--jobs", str(jobs))
    assert (ended.code, status_of(ended)) == (1, "partial"), ended
    assert sorted(line.done()) == [*"acdef"]
    assert line.ledger() == {**dict.fromkeys("acdef", ("success", 1, 0)),
                             "b": ("quarantined", 0, 3)}
    assert line.calls().count("b1") == 3
    assert line.slips() == []
    assert "b: the connection is gone: " in ended.err
    assert "it took its connection down 3 of 3 times; quarantined" in ended.err

    line.heal()
    assert line.run("--jobs", str(jobs)).code == 0
    assert "b" not in line.done()
    assert line.run(*RETRY).code == 0
    assert sorted(line.done()) == LETTERS


@jobs
@batches
def test_several_items_that_lose_it_are_each_charged_with_their_own(line, batch, jobs):
    line.write(batch=batch).fault("conn.close()")
    line.set(LETTERS, bad="abef")
    ended = line.run("--jobs", str(jobs))
    assert (ended.code, status_of(ended)) == (1, "partial"), ended
    assert sorted(line.done()) == ["c", "d"]
    assert line.ledger() == {**dict.fromkeys("cd", ("success", 1, 0)),
                             **dict.fromkeys("abef", ("quarantined", 0, 3))}
    assert line.slips() == []


@jobs
@batches
def test_a_connection_that_does_not_come_back_fails_the_tool_and_the_next_start_counts(line, batch,
                                                                                       jobs):
    line.write(batch=batch).fault("(HERE / 'no-connection').touch()\nconn.close()")
    line.set("bac", bad="b")
    for times in (1, 2, 3):
        ended = line.run("--jobs", str(jobs))
        assert (ended.code, status_of(ended)) == (1, "failed"), ended
        lost = r"at b: the connection is gone: ProgrammingError: .*; " * (jobs == 1)  # or another's
        assert re.search(lost + r"in get_connection\(\): ConnectionRefusedError: no server there",
                         ended.err)
        assert len(line.slips()) == 1
        if times > 1:
            assert line.ledger()["b"] == ("pending", 0, times - 1)
        (line.folder / "no-connection").unlink()
    ended = line.run("--jobs", str(jobs))
    assert ended.code == 1, ended  # the others were done before
    assert line.ledger() == {**dict.fromkeys("ac", ("success", 1, 0)), "b": ("quarantined", 0, 3)}
    assert sorted(line.done()) == ["a", "c"]
    assert line.slips() == []


def test_a_tool_with_retries_waits_for_the_connection_to_come_back(line):
    line.write(retries=1).fault("(HERE / 'no-connection').touch()\nconn.close()")
    head = line.sandbox.read("orchestrator.py").replace(
        "        raise ConnectionRefusedError", "        (here / 'no-connection').unlink()\n"
        "        (here / 'bad').write_text('[]')\n        raise ConnectionRefusedError", 1)
    (line.folder / "orchestrator.py").write_text(head, encoding="utf-8")
    line.set("abc", bad="b")
    ended = line.run()
    assert ended.code == 0, ended
    assert sorted(line.done()) == ["a", "b", "c"]
    assert line.ledger() == {**dict.fromkeys("ac", ("success", 1, 0)), "b": ("success", 1, 1)}
    assert line.slips() == []


def test_a_plain_tool_after_items_that_lost_it_has_a_connection(line):
    line.fault("conn.close()")
    line.sandbox.tool("after", "def run(conn): conn.execute(\"INSERT INTO done VALUES ('z', 1)\")")
    line.set("ab", bad="b")
    assert status_of(line.run(), "after") == "success"
    assert line.done() == ["a", "z"]


@pytest.mark.parametrize("commits", [True, False])
def test_a_tool_that_commits_by_itself_may_lose_it_too(line, commits):
    line.write(commits=commits).fault("conn.close()")
    line.set("abc", bad="b")
    ended = line.run()
    assert status_of(ended) == "partial", ended
    assert line.ledger()["b"] == ("quarantined", 0, 3)
    assert line.done() == ["a", "c"]


# --- what is not done again unasked ---


@pytest.mark.parametrize("how", ["RELEASE orchestrator_item", "COMMIT", "ROLLBACK"])
def test_on_sqlite_no_item_ends_its_transaction_and_one_that_tries_has_failed(line, how):
    line.write(batch=4).fault(f"conn.execute({how!r})")
    line.set(LETTERS, bad="b")
    ended = line.run()
    assert (ended.code, status_of(ended)) == (1, "partial"), ended
    assert line.ledger() == {**dict.fromkeys("acdef", ("success", 1, 0)), "b": ("failed", 1, 0)}
    assert sorted(line.done()) == sorted({*LETTERS} - {"b"})


# --- wherever the ledger is ---


@jobs
def test_without_a_database_the_run_after_an_outage_does_what_failed_too(world, jobs):
    world.has_database = False
    world.tool("t", """
        import pathlib
        def items(): return ["a", "b", "c"]
        def run(item):
            if item != "a" and not pathlib.Path("up").exists():
                raise ConnectionRefusedError(item)
            with open("calls", "a") as file:
                file.write(item)
    """)
    assert world.run(jobs=jobs).partial == ["t"]
    (world.folder / "up").touch()
    result = world.run(jobs=jobs)
    assert (result.status, result.results["t"]["items"]) == ("success", 2)
    assert sorted((world.folder / "calls").read_text()) == ["a", "b", "c"]


def test_an_item_that_fails_in_a_tool_after_another_is_tried_again_there(world):
    tools = {"t": "t", "load": {"module": "load", "each": "t"}}
    world.tool("load", """
        import pathlib
        def run(conn, item):
            conn.execute("INSERT INTO done VALUES ('load', ?, 0, 0)", (item,))
            if item == "b" and not pathlib.Path("up").exists():
                raise TimeoutError(item)
    """)
    assert world.run("a", "b", tools=tools).partial == ["load"]
    (world.folder / "up").touch()
    assert world.run(tools=tools).status == "success"
    assert (world.done(), world.done("load")) == (["a", "b"], ["a", "b"])


def test_a_death_that_could_not_be_recorded_is_not_forgotten_by_the_next_attempt(quick):
    """The worker after it gets no connection, which fails the tool, and that is tried again."""
    quick.pipeline("""
TOOL_MAP = {"t": {"module": "t", "isolate": True, "retries": 2, "retry_delay": 0}}
def get_connection():
    import os, sqlite3
    here = Path(__file__).parent
    with open(here / "opened", "a") as file:
        file.write("x")
    if (here / "opened").read_text() == "xx":
        raise OSError(28, os.strerror(28))
    return sqlite3.connect(here / "data.db")
""").tool("t", """
    import os, pathlib
    def items(): return ["x", "y"]
    def run(item, context):
        if item == "x" and not pathlib.Path("died").exists():
            pathlib.Path("died").touch()
            os._exit(3)
    """)
    ended = quick.run()
    assert ended.code == 0, ended
    assert quick.query("SELECT item, status, attempts, deaths FROM orchestrator_items "
                       "ORDER BY item") == [("x", "success", 1, 1), ("y", "success", 1, 0)]
