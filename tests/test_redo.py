"""--redo: what is done is done again, because somebody says so."""
import json
import re
import signal

import pytest
from conftest import SQLITE

from orchestrator import Unlisted, UserError, run_pipeline

ITEMS = """
    import os, pathlib
    def items():
        return ["a", ("b", "1"), "c"]
    def run(conn, item, context):
        conn.execute("CREATE TABLE IF NOT EXISTS done (item, attempt)")
        conn.execute("INSERT INTO done VALUES (?, ?)", (item, context.attempt))
        broken = pathlib.Path("broken")
        if broken.exists() and item in broken.read_text().split():
            raise ValueError("broken " + item)
"""
PLAIN = """
    import pathlib
    def run(context):
        print(context.tool)
        broken = pathlib.Path("broken")
        if broken.exists() and context.tool in broken.read_text().split():
            raise ValueError("broken " + context.tool)
"""
TOOLS = {"t": {"module": "t", "needs": []}, "p": {"module": "p", "needs": []},
         "q": {"module": "p", "needs": ["p"]}}
PARALLEL = pytest.mark.parametrize("words", [(), ("-j", "2")], ids=["one", "side by side"])


class Line:
    """A pipeline with a tool `t` that has items, and others; items and tools can be broken."""

    def __init__(self, sandbox):
        self.sandbox, self.folder = sandbox, sandbox.folder
        sandbox.tool("t", ITEMS).tool("p", PLAIN)
        self.set(TOOLS)

    def set(self, tools, database=SQLITE):
        self.sandbox.pipeline(f"TOOL_MAP = {tools!r}\nSTAGES = {{}}\n{database}")

    def run(self, *words, broken="", code=None):
        """Return what was done: the items of `t`, and the tools that ran."""
        count = len(self.items())
        (self.folder / "broken").write_text(broken)
        self.ended = self.sandbox.run(*words)
        assert self.ended.code == (bool(broken) if code is None else code), self.ended
        return sorted(self.items()[count:]), self.ended.out.split()

    def items(self):
        """Return the items that were done, in order."""
        there = (self.folder / "data.db").exists() and self.sandbox.query(
            "SELECT 1 FROM sqlite_master WHERE name = 'done'")
        return [item for item, in self.sandbox.query("SELECT item FROM done ORDER BY rowid")] \
            if there else []

    def next(self):
        """Return the words that the last run proposes to type next."""
        return re.search(r"^Next: \S+ \S+orchestrator.py (.*)$", self.ended.err, re.M)[1].split()


@pytest.fixture
def line(quick):
    return Line(quick)


ALL = ["a", "b", "c"]


# --- items ---

@PARALLEL
def test_items_that_are_done_are_done_again_all_or_those_named(line, words):
    assert line.run("t", *words)[0] == ALL
    assert line.run("t", *words)[0] == []
    assert line.run("t", *words, "--redo", "t")[0] == ALL
    assert line.run("t", *words, "--redo", "t", "b", "a")[0] == ["a", "b"]
    assert line.run("t", *words, "--redo", "t", "c", "--redo", "t", "a")[0] == ["a", "c"]
    assert line.run("t", *words)[0] == []
    assert {attempt for attempt, in line.sandbox.query("SELECT attempt FROM done")} == {1}


def test_a_plan_says_that_a_tool_is_run_again_and_undoes_nothing(line):
    line.run("t")
    plan = json.loads(line.sandbox.run("t", "--plan", "--json", "--redo", "t").out)
    assert "named; again, as --redo says; each item" in plan["steps"][0]["reason"]
    assert line.run("t")[0] == []


@pytest.mark.parametrize("words, says", [
    (["--redo", "t", "a", "bb"], "--redo: bb can not be done again: not among the 3 items of t.\n"
                                 "  Did you mean 'b'?\n"),
    (["--redo", "t", "dd", "cc"], "--redo: dd, cc can not be done again"),
    (["--redo", "tt"], "--redo: 'tt' is no tool in this plan.\n  Did you mean 't'?\n"),
    (["--redo", "q", "a"], "--redo: 'q' is no tool with items in this plan.\n  Known: t\n"),
    (["t", "--redo", "q"], "--redo: 'q' is no tool in this plan.\n  Known: t\n"),
    (["--backfill", "2013-01-01..2013-01-02", "--redo", "t"], "it does not go with --redo.\n"),
])
@pytest.mark.parametrize("database", [SQLITE, ""], ids=["SQLite", "without"])
def test_what_is_not_there_is_refused_and_nothing_is_done_again(line, words, says, database):
    line.set(TOOLS, database)
    if not database:
        line.sandbox.tool("t", "def items(): return ['a', 'b', 'c']\ndef run(item): print(item)")
    line.run()
    before = json.loads(line.sandbox.run("--history", "--json").out)
    ended = line.sandbox.run(*words)
    assert ended.code == 2 and says in ended.err and ended.out == ""
    assert json.loads(line.sandbox.run("--history", "--json").out) == before
    assert line.run("t") == ([], [])


def test_a_name_like_a_flag_is_no_flag(line):
    line.sandbox.tool("t", ITEMS.replace('"c"]', '"-c"]'))
    line.run("t")
    assert line.run("t", "--redo", "t", "--", "-c", "a")[0] == ["-c", "a"]
    line.run("t", "--redo", "t", "--", "-c", broken="-c")
    assert line.run(*line.next())[0] == ["-c"]


def test_what_was_given_up_is_done_again_too(line):
    line.set({"t": {"module": "t", "retries": 1, "retry_delay": 0}})
    line.run(broken="b")
    assert line.run("--redo", "t")[0] == ALL


def test_a_single_item_is_done_again(line):
    line.run("t")
    assert line.run("t", "--item", "b")[0] == []
    assert line.run("t", "--item", "b", "--redo", "t")[0] == ["b"]
    assert line.run("t")[0] == []


def test_what_takes_each_item_that_passed_waits_until_it_passes_again(line):
    line.set({"t": "t", "u": {"module": "u", "each": "t"}})
    line.sandbox.tool("u", "def run(item): print(item)")
    assert line.run(broken="b c")[1] == ["a"]
    assert line.run("--redo", "t", "a", broken="a b")[1] == ["c"]
    assert line.run()[1] == ["b"]
    assert sorted(line.run("--redo", "u")[1]) == ALL


@PARALLEL
def test_a_run_killed_between_reopening_and_doing_leaves_items_pending(line, words):
    line.run("t")
    process = start_killing(line, words)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert sorted(line.sandbox.query("SELECT item FROM orchestrator_items WHERE passed IS NULL "
                                     "AND status = 'pending'")) == [("a",), ("c",)]
    line.sandbox.tool("t", ITEMS)
    line.set(TOOLS)
    assert line.run("t", *words)[0] == ["a", "c"]


def test_a_row_that_another_holds_is_waited_for(line):
    line.set(TOOLS, SQLITE.replace('"data.db")', '"data.db"), timeout=0'))
    line.run("t")
    line.sandbox.tool("t", ITEMS.replace("    def items():\n", """
    import sqlite3
    others = []
    def items():
        if others:
            others.pop().rollback()
        elif not pathlib.Path("was-held").exists():
            pathlib.Path("was-held").touch()
            others.append(sqlite3.connect("data.db"))
            others[0].execute("BEGIN IMMEDIATE")
"""))
    assert line.run("t", "--redo", "t", "a")[0] == ["a"]
    assert (line.folder / "was-held").exists()


def start_killing(line, words):
    """Start a run that redoes `a` and `c` and whose first item kills the orchestrator."""
    (line.folder / "pid").unlink(missing_ok=True)
    line.sandbox.tool("t", ITEMS.replace(
        "    def run(conn, item, context):\n",
        "    def run(conn, item, context):\n"
        "        os.kill(int(pathlib.Path('pid').read_text()), 9)\n"
        "        import time; time.sleep(20)\n"))
    head = ("import os\nif __name__ == '__main__':\n"
            "    Path(__file__).with_name('pid').write_text(str(os.getpid()))\n")
    line.sandbox.pipeline(f"{head}TOOL_MAP = {TOOLS!r}\nSTAGES = {{}}\n{SQLITE}")
    return line.sandbox.start("t", *words, "--redo", "t", "a", "c")


# --- tools without items ---

def test_a_cached_tool_is_run_and_what_needs_it_too(line):
    line.set({"p": {**TOOLS["p"], "cache": True}, "q": {**TOOLS["q"], "cache": True},
              "r": {"module": "p", "needs": [], "cache": True}})
    assert line.run()[1] == ["p", "q", "r"]
    assert line.run()[1] == []
    assert line.run("--redo", "p")[1] == ["p", "q"]
    assert line.run("--redo", "q", "--redo", "r")[1] == ["q", "r"]
    assert line.run()[1] == []


def test_a_tool_that_is_done_is_run_again_by_a_resume(line):
    line.set({**TOOLS, "z": {"module": "p", "needs": ["q"]}})
    assert line.run(broken="z") == (ALL, ["p", "q", "z"])
    assert line.run("--resume", "--redo", "q", broken="z") == ([], ["q", "z"])
    assert line.run("--resume", "--redo", "t", "b") == (["b"], ["z"])


def test_without_a_history_all_is_as_it_is_with_one(line):
    line.run("--no-history")
    assert line.run("t", "--no-history", "--redo", "t", "a")[0] == ["a"]
    assert line.run("--no-history", "--redo", "t", "a", "--redo", "t", "b", broken="b q") == (
        ["a"], ["p", "q"])
    assert line.next() == ["--no-history", "--retry-items", "t", "--from", "t"]
    line.run("--redo", "t", "--no-history", "--redo=q", "-q", broken="a")
    assert line.next() == ["--no-history", "-q", "--retry-items", "t", "--from", "t"]


# --- what to type next ---

def test_the_next_command_does_not_do_again_what_is_done(line):
    line.run()
    assert line.run("--redo", "t", broken="b q")[0] == ["a", "c"]
    assert line.next() == ["--resume", "--retry-items", "t"]
    assert line.run(*line.next()) == (["b"], ["q"])


def test_the_next_command_does_again_what_has_not_been_begun(line):
    line.set({"x": {"module": "p", "needs": []}, "t": {"module": "t", "needs": ["x"]},
              "p": {"module": "p", "needs": [], "cache": True}})
    line.run()
    assert line.run("-x", "--redo", "t", "--", "a", "c", "--redo", "p", "--redo", "x",
                    broken="x") == ([], ["x"])
    assert line.next() == ["--resume", "--redo", "x", "--redo", "t", "a", "c", "--redo", "p"]
    assert line.run(*line.next()) == (["a", "c"], ["x", "p"])


def test_a_failed_run_that_did_a_cached_tool_again_is_not_resumed_to_its_former_success(line):
    line.set({"p": {**TOOLS["p"], "cache": True}})
    line.run()
    line.run("--redo", "p", broken="p")
    assert line.run(*line.next())[1] == ["p"]


def test_with_nothing_to_resume_the_way_to_do_it_again_is_told(line):
    line.run()
    ended = line.sandbox.run("--resume", "--redo", "t", "a", "--redo", "p")
    assert ended.code == 2
    command = re.search(r"To do that without --resume: \S+ \S+orchestrator.py (.*)$", ended.err)[1]
    assert command == "t p --redo t a --redo p"
    assert line.run(*command.split()) == (["a"], ["p"])


# --- from Python ---

@pytest.mark.parametrize("redo, wanted", [
    ("t", "abc"), (["t"], "abc"), ({"t": ["b"]}, "b"), ({"t": "b"}, "b"), ({"t": ()}, "abc"),
    ((), ""),
])
def test_run_pipeline_takes_what_is_to_be_done_again(modules, redo, wanted):
    import sqlite3
    folder = modules(redone="""
        def items(): return ["a", "b", "c"]
        def run(conn, item):
            conn.execute("CREATE TABLE IF NOT EXISTS done (item)")
            conn.execute("INSERT INTO done VALUES (?)", (item,))
    """)

    def connect():
        return sqlite3.connect(folder / "data.db")

    for how in ({}, {"redo": redo}):
        result = run_pipeline([], {"t": "redone"}, None, connect, **how)
        assert result.status == "success"
    assert result.results["t"]["items"] == len(wanted)
    with pytest.raises(Unlisted, match="--redo: x can not be done again"):
        run_pipeline([], {"t": "redone"}, None, connect, redo={"t": ["x"]})
    with pytest.raises(UserError, match=r"redo is 5, not a list of names"):
        run_pipeline([], {"t": "redone"}, None, connect, redo=5)


def test_an_item_that_is_not_there_is_not_asked_for_again_in_the_next_command(quick):
    quick.pipeline('TOOL_MAP = {"first": "first", "a": "a"}')
    quick.tool("first", "def run(): pass")
    quick.tool("a", "def items(): return ['x']\ndef run(item): pass")
    assert quick.run().code == 0

    ended = quick.run("--redo", "a", "y")

    assert ended.code == 1 and "--redo: y can not be done again" in ended.err
    assert ended.err.endswith("orchestrator.py --resume\n"), ended
