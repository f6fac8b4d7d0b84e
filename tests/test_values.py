"""What a tool says by what it returns or exits with: done, how many rows, or that it failed."""
import importlib.util
import itertools
import sqlite3
import textwrap
from contextlib import closing

import pytest
from conftest import SQLITE

from orchestrator import run_pipeline

LIKE_NUMPY = """
class bool_:
    shape, dtype = (), "bool"
    def __init__(self, value): self.value = value
    def __bool__(self): return self.value
"""
WAYS = {"here": {}, "in a worker": {"isolate": True}}
ways = pytest.mark.parametrize("way", WAYS)


class Connect:
    """A get_connection that can be sent to a worker, also where that is a fresh interpreter."""

    def __init__(self, file):
        self.file = str(file)

    def __call__(self):
        return sqlite3.connect(self.file)


@pytest.fixture
def outcome(modules, tmp_path):
    """Run one tool with this source over data.db, and return its Outcome; .done() tells what is
    in the table `done`.
    """
    connect = Connect(tmp_path / "data.db")

    def run(source, function="run", **options):
        name = f"m{next(numbers)}"
        modules(**{name: LIKE_NUMPY + textwrap.dedent(source)})
        tools = {"t": {"module": f"{name}:{function}", **options}}
        return run_pipeline([], tools, {}, connect).outcomes["t"]

    def done():
        with closing(connect()) as conn:
            return [item for item, in conn.execute("SELECT item FROM done")]

    numbers = itertools.count()
    with closing(connect()) as conn:
        conn.execute("CREATE TABLE done (item)")
    run.done = done
    return run


# --- False says no ---

NO = {
    "False": "return False", "numpy's": "return bool_(False)",
    "a comparison": "return len(str(1)) > 1",
}
nos = pytest.mark.parametrize("no", NO.values(), ids=NO)


@ways
@nos
@pytest.mark.parametrize("define", ["def", "async def"])
def test_a_run_that_returns_false_has_failed_and_leaves_nothing(outcome, no, way, define):
    ended = outcome(f"""
        {define} run(conn):
            conn.execute("INSERT INTO done VALUES (1)")
            {no}
    """, **WAYS[way])
    assert (ended.status, ended.error) == ("failed", "run() returned False")
    assert ended.rows is None and ended.traceback == ""
    assert outcome.done() == []


@ways
@nos
@pytest.mark.parametrize("define", ["def", "async def"])
def test_what_a_check_that_returns_false_has_seen_is_undone(outcome, no, way, define):
    ended = outcome(f"""
        def run(conn):
            conn.execute("INSERT INTO done VALUES (1)")
            return 1
        {define} check(conn):
            {no}
    """, **WAYS[way])
    assert (ended.status, ended.error) == ("failed", "check() returned False")
    assert outcome.done() == []


def test_false_of_numpy_itself_is_false(sandbox):
    if importlib.util.find_spec("numpy") is None:
        pytest.skip("needs numpy")
    sandbox.pipeline('TOOL_MAP = {"no": "t:no", "yes": "t:yes"}').tool("t", """
        import numpy
        def no(): return numpy.array([True, False]).all()
        def yes(): return numpy.array([True, True]).all()
        def check(context): return numpy.array(context.tool == "no")
    """)
    ended = sandbox.run("no")
    assert ended.code == 1 and "no() returned False" in ended.err
    ended = sandbox.run("yes")
    assert ended.code == 1 and "check() returned False" in ended.err


@pytest.mark.parametrize("check", [
    "check = lambda: False",
    "import functools\ncheck = functools.partial(lambda x: x, False)",
    "class Check:\n    def __call__(self): return False\ncheck = Check()",
    "class Check:\n    def good(self): return False\ncheck = Check().good",
])
def test_any_callable_may_say_no(outcome, check):
    assert outcome("def run(): pass\n" + check).error == "check() returned False"


@pytest.mark.parametrize("value", ["0", "1", "0.0", "7", "__import__('decimal').Decimal(0)"])
def test_a_check_that_returns_a_number_is_told_that_it_says_neither_yes_nor_no(outcome, value):
    ended = outcome(f"""
        def run(): pass
        def check(): return {value}
    """)
    assert ended.status == "failed"
    assert "which may mean yes or no: let it return True or False, or raise" in ended.error


@pytest.mark.parametrize("function", ["load", "run"])
def test_the_function_that_said_no_is_named(outcome, function):
    ended = outcome(f"def {function}(): return False", function)
    assert ended.error == f"{function}() returned False"


def test_a_run_that_says_no_is_not_checked(outcome):
    ended = outcome("def run(): return False\ndef check(): raise ValueError")
    assert ended.error == "run() returned False"


def test_a_run_that_says_no_is_tried_again(outcome):
    ended = outcome("def run(context): return context.attempt > 2", retries=2, retry_delay=0)
    assert (ended.status, ended.attempts) == ("success", 3)


def test_what_says_yes_or_nothing_is_a_success_without_a_count(outcome):
    for yes in ("True", "bool_(True)", "None", "[]", "''", "{}"):
        ended = outcome(f"def run(): return {yes}\ndef check(): return {yes}")
        assert (ended.status, ended.rows) == ("success", None)
    for yes in ("0", "None"):
        ended = outcome(f"def main(): return {yes}", "main")
        assert (ended.status, ended.rows, ended.result) == ("success", None, None)


# --- items ---

@pytest.mark.parametrize("batch", [1, 4])
@ways
@pytest.mark.parametrize("run, check, error", [
    ("return item != 'b'", "pass", "b: run() returned False"),
    ("return bool_(item != 'b')", "pass", "b: run() returned False"),
    ("pass", "return item != 'b'", "b: check() returned False"),
    ("pass", "return bool_(item != 'b')", "b: check() returned False"),
])
def test_an_item_that_says_no_fails_alone_and_leaves_nothing(outcome, run, check, error, way,
                                                             batch):
    ended = outcome(f"""
        def items():
            return ["a", "b", "c"]
        def run(conn, item):
            conn.execute("INSERT INTO done VALUES (?)", (item,))
            {run}
        def check(conn, item):
            {check}
    """, batch=batch, **WAYS[way])
    assert (ended.status, ended.error) == ("partial", error)
    assert outcome.done() == ["a", "c"]


@pytest.mark.parametrize("batch", [1, 4])
def test_the_items_of_a_main_end_by_its_exit_code(outcome, batch):
    ended = outcome("""
        def items():
            return ["a", "b", "c", "d"]
        def main(conn, item):
            conn.execute("INSERT INTO done VALUES (?)", (item,))
            return {"a": 0, "b": 2, "c": None, "d": "no file"}[item]
    """, "main", batch=batch)
    assert (ended.status, ended.rows) == ("partial", None)
    assert ended.error.startswith("b: main() returned 2: ")
    assert outcome.done() == ["a", "c"]


# --- main() returns an exit code ---

@ways
@pytest.mark.parametrize("returned, shown", [
    ("1", "1"), ("-1", "-1"), ("256", "256"), ("True", "True"), ("'no data'", "'no data'"),
    ("''", "''"), ("{'rows': 3}", "a dict"), ("[]", "a list"), ("0.0", "a float"),
])
def test_a_main_fails_with_what_would_fail_a_console_script(outcome, returned, shown, way):
    ended = outcome(f"""
        def main(conn):
            conn.execute("INSERT INTO done VALUES (1)")
            return {returned}
    """, "main", **WAYS[way])
    assert (ended.status, ended.rows) == ("failed", None)
    assert ended.error == (f"main() returned {shown}: what it returns is an exit code, of which 0 "
                           "and None say success")
    assert outcome.done() == []


def test_a_main_that_returns_false_has_failed_as_every_function_has(outcome):
    assert outcome("def main(): return False", "main").error == "main() returned False"


def test_a_main_by_another_name_is_a_main(outcome):
    ended = outcome("def main(): return 3\nrun = main")
    assert (ended.status, ended.rows) == ("failed", None)


def test_a_main_may_be_awaited_checked_and_exit(outcome):
    assert outcome("async def main(): return 4", "main").error.startswith("main() returned 4:")
    assert outcome("""
        def main(): return 0
        def check(): return False
    """, "main").error == "check() returned False"
    assert outcome("def main(): raise SystemExit(0)", "main").status == "success"
    assert outcome("def main(): raise SystemExit(5)", "main").error == "sys.exit(5)"


# --- sys.exit() ---

def test_sys_exit_fails_what_it_would_fail_in_a_program_of_its_own(outcome):
    odd = "import sys\nclass Odd:\n    def __eq__(self, other): return True\n"
    for source in ("def run(): sys.exit(%s)",
                   "def items(): return [__name__]\ndef run(item): sys.exit(%s)",
                   "def items(): sys.exit(%s)\ndef run(item): pass",
                   "def items():\n    yield 'a'\n    sys.exit(%s)\ndef run(item): pass"):
        for code in ("", "0", "None", "False"):  # sys.exit(not ok)
            assert outcome(odd + source % code).status == "success"
        for code in ("True", "2", "'no'", "''", "0.0", "[]", "Odd()"):
            assert outcome(odd + source % code).status == "failed"


# --- on the command line ---

PIPELINE = 'TOOL_MAP = {"load": "load", "job": "job:main", "after": "after"}\n' + SQLITE


def test_the_command_line_ends_as_failed_and_says_what_was_returned(quick):
    quick.pipeline(PIPELINE).tool("after", "def run(conn): return 1")
    quick.tool("load", "def run(conn): return 5\ndef check(conn): return False")
    quick.tool("job", "def main(): return 3")
    ended = quick.run()
    assert ended.code == 1 and "check() returned False" in ended.err
    assert "Traceback" not in ended.err
    quick.tool("load", "def run(conn): return 5\ndef check(conn): return True")
    ended = quick.run()
    assert ended.code == 1 and "main() returned 3" in ended.err
    assert "skipped" in ended.err and quick.run("--resume").code == 1
    quick.tool("job", "def main(): return 0")
    assert quick.run("--resume").code == 0


@pytest.mark.parametrize("returned", ["False", "True"])
def test_a_get_connection_that_says_yes_or_no_is_no_pipeline_without_a_database(quick, returned):
    quick.pipeline(f"""
        TOOL_MAP = {{"t": "t"}}
        def get_connection():
            return {returned}
    """)
    quick.tool("t", "def items(): return ['a']\ndef run(item, **kwargs): print('ran')")
    ended = quick.run()
    assert ended.code == 1 and "ran" not in ended.out
    assert "in get_connection(): TypeError: it returned a bool, which is no conn" in ended.err
    assert "None of a pipeline without a database" in ended.err


def test_a_text_in_sys_exit_of_add_arguments_is_said_and_is_no_success(quick):
    quick.pipeline("""
        import sys
        TOOL_MAP = {"t": "t"}
        def add_arguments(parser):
            sys.exit("set SALES_KEY first")
    """).tool("t", "def run(): pass")
    ended = quick.run()
    assert ended.code == 1 and "set SALES_KEY first" in ended.err
