"""What counts as a change of a tool itself: for `cache`, and for the tries of items."""
import ast
import contextlib
import hashlib
import importlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT

from orchestrator import run_pipeline

NO_DATABASE = """
def get_connection():
    return None

"""
SQLITE = """
def get_connection():
    import sqlite3
    return sqlite3.connect(Path(__file__).with_name("data.db"))

"""
CONV = """
def daily():
    print("daily")
def weekly():
    print("weekly")
def run():
    print("run")
"""


class Bench:
    """A pipeline of one tool `t` among others, whose row and module a test changes."""

    def __init__(self, sandbox, head=NO_DATABASE):
        self.sandbox, self.folder, self.head = sandbox, sandbox.folder, head

    def set(self, row, **others):
        self.sandbox.pipeline(self.head + "LIMITS = {'db': 2}\n"
                              f"TOOL_MAP = {{**{others!r}, 't': {row!r}}}\n")
        return self

    def run(self, *words, code=0):
        """Return what the tools printed."""
        ended = self.ended = self.sandbox.run(*words)
        assert ended.code == code and "Traceback" not in ended.err * (not code), ended
        return ended.out.split()

    def plan(self, *words):
        """Return (action, reason) of `t`."""
        ended = self.sandbox.run("--plan", "--json", *words)
        assert ended.code == 0, ended
        steps = {step["tool"]: step for step in json.loads(ended.out)["steps"]}
        return steps["t"]["action"], steps["t"]["reason"]


@pytest.fixture
def bench(quick):
    """`t` has run once, is cached, and calls conv:daily."""
    bench = Bench(quick)
    quick.tool("conv", CONV).tool("other", CONV)
    bench.set({"module": "conv:daily", "needs": [], "cache": True})
    assert bench.run() == ["daily"] and bench.run() == []
    return bench


# --- what a cached tool is ---

@pytest.mark.parametrize("calls, printed", [
    ("conv:weekly", "weekly"), ("conv", "run"), ("other:daily", "daily")])
def test_a_cached_tool_that_calls_another_function_runs_again(bench, calls, printed):
    bench.set({"module": calls, "needs": [], "cache": True})
    whole = calls if ":" in calls else calls + ":run"
    assert bench.plan() == (
        "run", f"in TOOL_MAP; it calls another function, {whole}, since run 1")
    assert bench.run() == [printed]
    assert bench.run() == []  # and now that counts


def test_a_function_that_was_called_long_ago_is_not_what_was_called_last(bench):
    for calls, printed in [("conv:weekly", "weekly"), ("conv:daily", "daily")]:
        bench.set({"module": calls, "needs": [], "cache": True})
        assert bench.run() == [printed]


@pytest.mark.parametrize("option, value", [
    ("commits", True), ("reads", ["table"]), ("writes", ["table"])])
def test_an_option_that_changes_what_runs_makes_a_cached_tool_run_again(bench, option, value):
    row = {"module": "conv:daily", "needs": [], "cache": True}
    bench.set({**row, option: value})
    assert bench.plan() == ("run", f"in TOOL_MAP; its options changed ({option}) since run 1")
    assert bench.run() == ["daily"] and bench.run() == []
    bench.set(row)
    assert bench.plan() == ("run", f"in TOOL_MAP; its options changed ({option}) since run 3")


def test_two_options_that_changed_are_both_named(bench):
    bench.set({"module": "conv:daily", "needs": [], "cache": True, "writes": "x", "commits": True})
    assert bench.plan()[1].endswith("; its options changed (commits, writes) since run 1")


def test_needs_that_changed_are_named_as_that_and_not_as_something_that_ran(quick):
    quick.tool("conv", CONV)
    bench = Bench(quick)
    a, b = {"module": "conv", "needs": []}, {"module": "conv", "needs": []}
    row = {"module": "conv:daily", "cache": True}
    bench.set({**row, "needs": ["a"]}, a=a, b=b)
    bench.run()
    assert bench.plan("t") == ("cached", "unchanged since run 1")
    for needs in (["b"], ["a", "b"], []):
        bench.set({**row, "needs": needs}, a=a, b=b)
        assert bench.plan("t") == ("run", "named; its needs changed since run 1")
    bench.set(row, a=a, b=b)  # waits for all before it
    assert bench.plan("t") == ("run", "named; its needs changed since run 1")
    bench.set({**row, "needs": ["a"]}, a=a, b={**b, "writes": ["x"]})  # no need of it
    assert bench.plan("t") == ("cached", "unchanged since run 1")


@pytest.mark.parametrize("more", [
    {"retries": 3, "retry_delay": "1s", "retry_factor": 3, "retry_max_delay": "2s",
     "retry_jitter": 1}, {"timeout": "1m"}, {"memory": "9GB"}, {"isolate": True},
    {"on_failure": "stop"}, {"when": "always"}, {"uses": {"db": 1}}, {"estimate": 5},
    {"fresh_for": "1d"}, {"cache": "1h"}, {"commits": False}, {"reads": [], "writes": []},
], ids=lambda more: " ".join(more))
def test_an_option_that_says_only_when_how_often_or_where_leaves_it_cached(bench, more):
    bench.set({"module": "conv:weekly", "needs": [], "cache": True})
    assert bench.run() == ["weekly"]
    bench.set({"module": "conv:weekly", "needs": [], "cache": True, **more})
    assert bench.plan() == ("cached", "unchanged since run 3")


def test_the_order_of_names_and_a_function_by_its_full_name_are_no_change(bench):
    one = {"module": "conv", "needs": [], "cache": True, "reads": ["a", "b"], "writes": "c"}
    bench.set(one).run()
    bench.set({**one, "module": "conv:run", "reads": ["b", "a", "b"], "writes": ["c"]})
    assert bench.plan() == ("cached", "unchanged since run 3")


# --- its source ---

def test_a_comment_is_a_change_and_the_ends_of_lines_are_none(bench):
    path = bench.folder / "conv.py"
    before = path.read_bytes()
    path.write_bytes(before.replace(b"\n", b"\r\n"))  # a checkout on another system
    assert bench.plan() == ("cached", "unchanged since run 1")
    path.write_bytes(before + b"# a word\n")
    assert bench.plan() == ("run", "in TOOL_MAP; its source changed since run 1")
    path.write_bytes(before)
    assert bench.plan() == ("cached", "unchanged since run 1")


def find_pythons():
    """Return the oldest and the newest Python that the engine runs on, of those that are here."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = {path.parts[-3]: str(path) for path in root.glob("versions/3.*/bin/python")}
    versions = sorted((tuple(map(int, name.split(".")[:2])), path) for name, path in found.items()
                      if name.split(".")[1].isdecimal())
    good = [path for version, path in versions if version >= (3, 9)]
    return [good[0], good[-1]] if len(good) > 1 else []


@pytest.fixture
def pythons():
    found = find_pythons()
    if not found:
        pytest.skip("there are no two Pythons here")
    return found


def run_by(python, folder, *words):
    """Run the pipeline by one Python and return (exit code, stdout, stderr)."""
    ended = subprocess.run([python, "-B", str(folder / "orchestrator.py"), *words], cwd=folder,
                           capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    return ended.returncode, ended.stdout, ended.stderr


def test_another_version_of_python_is_no_change_of_a_tool(sandbox, pythons):
    old, new = pythons
    sandbox.tool("m", "def run(day=None, *, x=(1, 2)):\n    print(f'{x[0]!r}', [i for i in x])\n")
    Bench(sandbox).set({"module": "m", "needs": [], "cache": True})
    assert run_by(old, sandbox.folder)[:2] == (0, "1 [1, 2]\n")
    for python in (new, old):
        code, out, err = run_by(python, sandbox.folder)
        assert (code, out) == (0, "") and "unchanged since run 1" in err


def test_a_module_that_is_changed_while_the_run_goes_on_was_not_what_ran(quick):
    """It was imported before the run began, and so the next run must call what stands there now."""
    quick.tool("first", """
        import pathlib
        def run():
            pathlib.Path("conv.py").write_text("def run():\\n    print('after')\\n")
    """).tool("conv", "def run():\n    print('before')\n")
    bench = Bench(quick).set({"module": "conv", "needs": ["a"], "cache": True},
                             a={"module": "first", "needs": []})
    assert bench.run() == ["before"]
    assert bench.plan("t") == ("run", "named; its source changed since run 1")
    assert bench.run("t") == ["after"] and bench.run("t") == []


def test_a_module_that_is_changed_after_this_process_has_imported_it_is_not_taken_for_run(modules):
    def run():
        return run_pipeline([], {"t": {"module": "m", "needs": [], "cache": True}},
                            home=str(folder / "home")).results["t"], list(sys.modules)

    folder = modules(m="def run(): return 'before'")
    assert run()[0] == "before"
    modules(m="def run():\n    return 'after'")
    assert run()[0] == "before"  # what this process has imported
    del sys.modules["m"]  # as in the next process
    importlib.invalidate_caches()
    assert run()[0] == "after"


def test_a_module_that_is_loaded_again_is_what_runs_from_then_on(modules):
    def run():
        result = run_pipeline([], {"t": {"module": "m", "needs": [], "cache": True}},
                              home=str(folder / "home"))
        return result.results["t"], result.cached

    folder = modules(m="def run(): return 'before'")
    assert run() == ("before", []) and run() == ("before", ["t"])
    modules(m="def run():\n    return 'after'")
    importlib.reload(sys.modules["m"])
    assert run() == ("after", []) and run() == ("after", ["t"])


def test_a_module_in_an_archive_is_cached_until_it_changes(bench):
    import zipfile
    top = "import sys\nsys.path.insert(0, str(Path(__file__).with_name('lib.zip')))\n"
    bench.head = top + NO_DATABASE
    with zipfile.ZipFile(bench.folder / "lib.zip", "w") as file:
        file.writestr("packed.py", CONV)
    bench.set({"module": "packed:daily", "needs": [], "cache": True})
    assert bench.run() == ["daily"] and bench.run() == []
    with zipfile.ZipFile(bench.folder / "lib.zip", "w") as file:
        file.writestr("packed.py", CONV + "# changed\n")
    assert bench.plan()[1].endswith("its source changed since run 3")


def test_a_module_of_many_tools_is_read_once_for_all_of_them(modules):
    opened = []
    is_counting = [True]
    folder = modules(shared="def run(): return 1")
    path = str(folder / "shared.py")

    def audit(event, args):
        if is_counting and event == "open" and args[0] == path:
            opened.append(path)

    sys.addaudithook(audit)  # for good
    tools = {f"t{i}": {"module": "shared", "needs": [], "cache": True} for i in range(40)}
    for _ in range(2):
        run_pipeline([], tools, home=str(folder / "home"))
    is_counting.clear()
    assert 0 < len(opened) < 10


# --- what is not known ---

def test_a_success_from_before_the_cache_is_not_said_to_have_changed(quick):
    quick.tool("conv", CONV)
    bench = Bench(quick).set({"module": "conv", "needs": ["a"]}, a={"module": "conv", "needs": []})
    bench.run()
    bench.set({"module": "conv", "needs": ["a"], "cache": True}, a={"module": "conv", "needs": []})
    assert bench.plan("t") == ("run", "named; what it was in run 1 is not recorded")
    assert bench.run("t") == ["run"] and bench.run("t") == []


def test_a_success_of_a_former_engine_that_did_not_note_the_function_is_not_relied_on(bench):
    tree = ast.dump(ast.parse((bench.folder / "conv.py").read_bytes()))
    path = next(bench.folder.glob(".orchestrator/*/history.db"))
    with contextlib.closing(sqlite3.connect(path)) as conn, conn:
        conn.execute("UPDATE attempts SET source = ? WHERE source IS NOT NULL",
                     (hashlib.sha256(tree.encode()).hexdigest(),))
    assert bench.plan() == ("run", "in TOOL_MAP; what it was in run 1 is not recorded")
    assert bench.run() == ["daily"] and bench.run() == []


# --- items ---

ITEMS = """
def items(conn):
    return ["a", "b"]
def run(conn, item):
    print("run", item)
    if item == "b":
        raise ValueError("no")
def other(conn, item):
    print("other", item)
"""
GIVEN_UP = {"module": "t", "retries": 1, "retry_delay": 0}


@pytest.fixture
def given_up(quick):
    """Item `a` is done, and `b` is given up after its two tries."""
    quick.tool("t", ITEMS)
    bench = Bench(quick, SQLITE).set(GIVEN_UP)
    assert bench.run(code=1) == ["run", "a", "run", "b", "run", "b"]
    assert bench.run() == [] and "1 item given up before" in bench.ended.err
    return bench


@pytest.mark.parametrize("row, printed", [
    ({"module": "t:other"}, ["other", "b"]), ({"commits": True}, ["run", "b", "run", "b"])])
def test_an_item_that_was_given_up_comes_again_for_another_function(given_up, row, printed):
    given_up.set({**GIVEN_UP, **row})
    assert given_up.run(code=int("commits" in row)) == printed
    assert given_up.run() == []


@pytest.mark.parametrize("row", [
    {"timeout": "1m"}, {"batch": 10}, {"reads": ["x"]}, {"retry_delay": 1}, {"isolate": True}])
def test_an_item_that_was_given_up_stays_so_for_an_option_that_does_not_change_what_runs(
        given_up, row):
    given_up.sandbox.tool("t", ITEMS + "# mended, it was thought\n")
    assert given_up.run(code=1) == ["run", "b", "run", "b"]
    given_up.set({**GIVEN_UP, **row})
    assert given_up.run() == [] and "1 item given up before" in given_up.ended.err


def test_an_item_that_was_given_up_stays_so_with_other_ends_of_lines_or_another_python(
        sandbox, pythons):
    old, new = pythons
    sandbox.tool("t", ITEMS)
    Bench(sandbox, SQLITE).set(GIVEN_UP)
    assert run_by(old, sandbox.folder)[0] == 1
    path = sandbox.folder / "t.py"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    for python in (old, new):
        code, out, err = run_by(python, sandbox.folder)
        assert (code, out) == (0, "") and "1 item given up before" in err


def test_an_upgrade_does_no_item_anew_and_gives_their_tries_back_to_those_given_up(given_up):
    """Rows of former engines have the fingerprint of a syntax tree."""
    tree = ast.dump(ast.parse(ITEMS))
    with contextlib.closing(sqlite3.connect(given_up.folder / "data.db")) as conn, conn:
        conn.execute("UPDATE orchestrator_items SET source = ?",
                     (hashlib.sha256(tree.encode()).hexdigest()[:16],))
    assert given_up.run(code=1) == ["run", "b", "run", "b"]  # and `a`, which is done, is not
    assert given_up.run() == [] and "1 item given up before" in given_up.ended.err
