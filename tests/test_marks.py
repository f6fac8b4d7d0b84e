"""Which successes `context.last_success` and `fresh_for` look at: those that say something of all
the data, with the same arguments. What loads only what is new must never skip a row.
"""
import contextlib
import shutil
import sqlite3
from pathlib import Path

import pytest

from orchestrator import find_pipeline_folder, run_pipeline

FIXTURE = Path(__file__).parent / "data" / "history-1.db"
MODES = pytest.mark.parametrize("mode", [(), ("-j", "2")], ids=["here", "in a worker"])
HEAD = """
TOOL_MAP = {tools!r}

def get_connection():
    import sqlite3
    return sqlite3.connect(Path(__file__).with_name("data.db"))

def add_arguments(parser):
    parser.add_argument("--region", default="eu")
"""
# Each call writes down what it saw; a tool that is named in the file `broken` fails.
TOOL = """
    import pathlib
    here = pathlib.Path(__file__).parent
    def run(context, region="eu", shift=None, period_start=None):
        with open(here / "seen", "a") as file:
            last = context.last_success
            file.write(f"{context.tool} {last and last.timestamp()}\\n")
        if context.tool in (here / "broken").read_text().split():
            raise ValueError("broken")
"""
ITEMS = """
    def items(region="eu", period_start=None):
        return [tuple(line.split()) for line in (here / "list").read_text().splitlines()]
"""
ONE = {"a": "m"}
THREE = {"a": {"module": "m", "needs": []}, "b": {"module": "m", "needs": ["a"]},
         "c": {"module": "m", "needs": ["b"]}}
ITEM_TOOL = TOOL.replace("def run(context", "def run(item, context").replace(
    "if context.tool in", "if item in") + ITEMS
JANUARY = ("--backfill", "2013-01-01..2013-01-01")


class Line:
    """A pipeline whose tools write down their last success."""

    def __init__(self, sandbox):
        self.sandbox, self.folder = sandbox, sandbox.folder
        self.set(ONE)
        (self.folder / "list").write_text("")

    def set(self, tools, module=TOOL):
        self.sandbox.pipeline(HEAD.replace("{tools!r}", repr(tools))).tool("m", module)

    def connect(self):
        file, = self.folder.glob("**/history.db")
        return contextlib.closing(sqlite3.connect(file))

    def ask(self, sql, *values):
        """Return the rows of a query on the history; what it changes is kept."""
        with self.connect() as conn, conn:
            return conn.execute(sql, values).fetchall()

    def run(self, *words, broken="", code=None):
        """Run the pipeline, and return what each call saw: (tool, the first run an attempt of
        which began at the moment that it was told, or None).
        """
        (self.folder / "broken").write_text(broken)
        (self.folder / "seen").write_text("")
        self.ended = self.sandbox.run(*words)
        assert self.ended.code == ((1 if broken else 0) if code is None else code), self.ended
        return self.seen()

    def seen(self):
        return [(tool, self.whose(mark)) for tool, mark in map(
            str.split, (self.folder / "seen").read_text().splitlines())]

    def whose(self, mark):
        if mark == "None":
            return None
        runs = self.ask("SELECT min(run_id) FROM attempts WHERE abs(started_at - ?) < 1e-5",
                        float(mark))
        assert runs[0][0], "no attempt began at that moment"
        return runs[0][0]

    def python(self, **keywords):
        """Run the tools from Python, with a history of their own."""
        (self.folder / "seen").write_text("")
        result = run_pipeline([], {"a": "m"}, home=str(self.folder / "home"), **keywords)
        return result, self.seen()


@pytest.fixture
def line(quick):
    return Line(quick)


@pytest.fixture
def python(modules, sandbox):
    """The same for run_pipeline."""
    line = Line(sandbox)
    (line.folder / "broken").write_text("")
    modules(m=TOOL)
    return line


# --- last_success ---

@MODES
def test_each_set_of_arguments_has_a_last_success_of_its_own(line, mode):
    seen = [line.run("--region", region, *mode) for region in ("eu", "us", "eu", "us")]
    assert seen == [[("a", None)], [("a", None)], [("a", 1)], [("a", 2)]]
    assert line.run(*mode) == [("a", 3)]  # the default is an argument like another


@MODES
def test_a_backfill_moves_no_last_success_and_has_none(line, mode):
    line.run()
    assert line.run(*JANUARY, *mode) == [("a", None)]
    assert line.run(*JANUARY, "--reprocess", "all", *mode) == [("a", None)]  # all of it, again
    assert line.run(*mode) == [("a", 1)]


def test_a_backfill_is_no_first_success(line):
    line.run(*JANUARY)
    assert line.run() == [("a", None)]


@pytest.mark.parametrize("resume", [("--resume",), (*JANUARY, "--reprocess", "failed")])
def test_a_resume_of_a_period_is_a_backfill(line, resume):
    line.run()
    line.run(*JANUARY, broken="a")
    assert line.run(*resume) == [("a", None)]
    assert line.run() == [("a", 1)]


@MODES
def test_a_single_item_moves_no_last_success(line, mode):
    line.set(ONE, ITEM_TOOL)
    (line.folder / "list").write_text("x 1\ny 1")
    assert line.run("a", "--item", "x", *mode) == [("a", None)]
    assert line.run(*mode) == [("a", None)]
    (line.folder / "list").write_text("x 2\ny 2")
    assert line.run("a", "--item", "x", *mode) == [("a", 2)]
    assert line.run(*mode) == [("a", 2)]


def test_a_resume_of_a_single_item_moves_none_either(line):
    line.set(ONE, ITEM_TOOL)
    (line.folder / "list").write_text("x 1\ny 1")
    line.run("a", "--item=x", broken="x")
    assert line.run("--resume", "--retry-items", "a") == [("a", None)]
    assert line.run() == [("a", None)]


def test_marking_a_single_item_as_done_moves_none_either(line):
    line.set(ONE, ITEM_TOOL)
    (line.folder / "list").write_text("x 1\ny 1")
    line.run("a", "--item", "x", broken="x")
    line.run("--mark-done", "a")
    (line.folder / "list").write_text("x 2\ny 2")
    assert line.run() == [("a", None)] * 2


def test_a_run_in_which_some_items_failed_moves_none(line):
    line.set(ONE, ITEM_TOOL)
    (line.folder / "list").write_text("x 1")
    line.run()
    (line.folder / "list").write_text("x 2\ny 1")
    line.run(broken="y")
    (line.folder / "list").write_text("x 3")
    assert line.run() == [("a", 1)]


@MODES
def test_what_is_marked_as_done_keeps_the_start_of_the_attempt_that_failed(line, mode):
    line.run()
    line.run(broken="a")
    line.run("--mark-done", "a")
    assert line.run(*mode) == [("a", 2)]


def test_of_several_attempts_the_last_one_counts_that_failed_before_the_mark(line):
    line.set({"a": {"module": "m", "retries": 1, "retry_delay": 0}})
    line.run(broken="a")
    line.run("--resume", broken="a")
    line.run("--mark-done", "a")
    at = line.ask("SELECT started_at FROM attempts WHERE run_id = 2 AND attempt = 2")[0][0]
    line.run()
    assert float(line.sandbox.read("seen").split()[1]) == pytest.approx(at, abs=1e-5)


def test_a_tool_that_was_never_tried_is_marked_with_the_start_of_the_run(line):
    line.set(THREE)
    line.run(broken="b")
    line.ask("UPDATE runs SET started_at = started_at - 1000")
    line.run("--resume", broken="b")  # in which c is not tried either
    line.run("--mark-done", "b")
    line.run("--mark-done", "c")
    assert line.run()[1] == ("b", 2)
    mark, = (row.split()[1] for row in line.sandbox.read("seen").splitlines() if row[0] == "c")
    began = line.ask("SELECT started_at FROM runs WHERE run_id = 1")[0][0]
    assert float(mark) == pytest.approx(began, abs=1e-5)


def test_a_tool_marked_twice_or_that_succeeded_by_itself_since_keeps_that_start(line):
    line.set(THREE)
    line.run(broken="b")
    assert line.run("b") == [("b", None)]
    line.run("--mark-done", "b")
    line.run("--mark-done", "b")
    assert line.run("b") == [("b", 2)]


def test_a_mark_has_the_arguments_of_the_run_that_failed(line):
    line.run("--region", "us", broken="a")
    line.run("--mark-done", "a")
    assert line.run("--region", "eu") == [("a", None)]
    assert line.run("--region", "us") == [("a", 1)]


def test_a_resume_has_the_arguments_of_its_run(line):
    line.run("--region", "us", broken="a")
    line.run("--resume")
    assert line.run("--region", "eu") == [("a", None)]
    assert line.run("--region", "us") == [("a", 2)]


def test_while_a_tool_is_cached_the_success_that_stands_keeps_its_start(line):
    line.set({"a": {"module": "m", "cache": True}})
    line.run()
    assert line.run() == [] and line.run() == []
    assert line.run("--force") == [("a", 1)]


def test_a_failure_and_a_run_that_left_it_out_move_no_last_success(line):
    line.set(THREE)
    line.run()
    line.run(broken="a")
    line.run("--exclude", "a")
    assert line.run("a") == [("a", 1)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_runs_from_python_are_told_apart_by_their_arguments(python, jobs):
    eu, us = {"region": "eu"}, {"region": "us", "shift": {1, 2}}  # which JSON can not say
    seen = [python.python(arguments=each, jobs=jobs)[1] for each in (eu, us, None, eu, us, None)]
    assert seen == [[("a", each)] for each in (None, None, None, 1, 2, 3)]
    python.python(arguments={**eu, "period_start": "2013-01-01"}, jobs=jobs)
    assert python.python(arguments={**eu, "period_start": "2013-01-01"})[1] == [("a", None)]
    assert python.python(arguments=eu, jobs=jobs)[1] == [("a", 4)]


def test_a_single_item_from_python_is_none_and_its_resume_keeps_to_it(python, modules):
    modules(m=ITEM_TOOL)
    (python.folder / "list").write_text("x 1\ny 1")
    (python.folder / "broken").write_text("x")
    python.python(item="x")
    (python.folder / "broken").write_text("")
    result, seen = python.python(resume=True, retry_items=["a"])
    assert seen == [("a", None)] and result.results["a"]["items"] == 1  # y was not asked for
    assert python.python()[1] == [("a", None)]


# --- what else takes a single item for all ---

def test_a_single_item_that_is_done_leaves_the_run_that_failed_to_be_resumed(line):
    line.set(ONE, ITEM_TOOL)
    (line.folder / "list").write_text("x 1\ny 1")
    line.run("a", broken="x y")
    line.run("a", "--item", "x", "--retry-items", "a")
    line.run("--resume", "--retry-items", "a")
    assert "nothing to resume" not in line.ended.err
    assert line.sandbox.query("SELECT item, status FROM orchestrator_items ORDER BY item") \
        == [("x", "success"), ("y", "success")]


def test_a_period_of_which_one_item_is_done_is_not_done(line):
    line.set(ONE, ITEM_TOOL)
    (line.folder / "list").write_text("x 1\ny 1")
    line.run(*JANUARY, "--item", "x")
    assert line.run(*JANUARY) == [("a", None)]
    assert len(line.sandbox.query("SELECT * FROM orchestrator_items")) == 2


# --- what is kept of it ---

def test_prune_keeps_the_last_success_also_where_others_came_after_it(line):
    line.set(ONE, ITEM_TOOL)
    (line.folder / "list").write_text("x 1\ny 1")
    line.run()
    (line.folder / "list").write_text("x 2\ny 1")
    line.run(*JANUARY)
    (line.folder / "list").write_text("x 3\ny 1")
    line.run("a", "--item", "x")
    (line.folder / "list").write_text("x 4\ny 1\nz 1")
    line.run("a", broken="z")
    line.run("a", "--item", "nosuch", code=2)
    line.run("--prune", "0s")
    assert line.ask("SELECT min(run_id) FROM runs") == [(1,)]
    (line.folder / "list").write_text("x 5")
    assert line.run() == [("a", 1)]


def test_single_items_of_an_older_history_are_told_by_their_words(line):
    folder = Path(find_pipeline_folder(str(line.folder / ".orchestrator"), line.folder.name))
    folder.mkdir(parents=True)
    shutil.copy(FIXTURE, folder / "history.db")
    for run_id, words in enumerate(
            ['["a"]', '["a", "--item", "x"]', '["a", "--item=x"]', '["a", "--items"]'], 11):
        line.ask("INSERT INTO runs SELECT ?, 'success', NULL, '[\"a\"]', '[]', NULL, "
                 "'{\"region\": \"eu\"}', ?, 1, ?, 1, 1, ?, version, NULL, tables, sources "
                 "FROM runs WHERE run_id = 1", run_id, words, run_id * 100.0, run_id)
        if run_id < 14:
            line.ask("INSERT INTO attempts (attempt_id, run_id, tool, attempt, status, "
                     "started_at, work) VALUES (?1, ?2, 'a', 1, 'success', ?3, ?1)",
                     1000 + run_id, run_id, run_id * 100.0)
    assert line.run() == [("a", 11)]


# --- fresh_for ---

FRESH = {"a": {"module": "m", "needs": [], "fresh_for": "1h"},
         "b": {"module": "m2", "needs": ["a"]}}


@pytest.fixture
def fresh(line):
    """A pipeline of a, with items, and b that needs it."""
    line.set(FRESH, ITEM_TOOL)
    line.sandbox.tool("m2", TOOL)
    (line.folder / "list").write_text("x 1\ny 1")
    return line


@pytest.mark.parametrize("words, broken", [
    (JANUARY, ""), (["--region", "us"], ""), (["--item", "x"], ""), ([], "y")],
    ids=["backfill", "other arguments", "single item", "partial"])
def test_a_need_is_fresh_by_a_success_of_all_of_it_with_these_arguments_alone(
        fresh, words, broken):
    fresh.run("a", *words, broken=broken)
    for look in ([], ["--plan"]):
        assert fresh.run("b", *look, code=2) == []
        assert "a, which has no success to be fresh for 1h 00m" in fresh.ended.err
        assert "--force" in fresh.ended.err
    assert fresh.run("b", "--force") == [("b", None)]
    fresh.run("a")
    assert [tool for tool, _ in fresh.run("b")] == ["b"]
    (fresh.folder / "list").write_text("x 2\ny 2")
    fresh.run("a", *words, broken=broken)  # and then they hide it not
    assert [tool for tool, _ in fresh.run("b")] == ["b"]


def test_an_old_success_is_not_made_fresh_by_a_younger_one_of_something_else(fresh):
    fresh.run("a")
    fresh.ask("UPDATE attempts SET started_at = started_at - 7200")
    fresh.run("a", *JANUARY)
    fresh.run("b", code=2)
    assert "a, which succeeded 2h 00m ago, in run 1, and is fresh for" in fresh.ended.err


def test_in_a_backfill_a_need_is_fresh_by_the_same_period_or_a_run_of_all(fresh):
    fresh.run("a", *JANUARY)
    assert fresh.run("b", *JANUARY) == [("b", None)]
    day = ("--backfill", "2013-01-02..2013-01-02")
    assert fresh.run("b", *day, code=2) == []
    fresh.run("a")
    assert fresh.run("b", *day) == [("b", None)]


def test_a_need_that_was_marked_as_done_is_as_old_as_the_attempt_that_failed(fresh):
    fresh.run("a", broken="x y")
    fresh.ask("UPDATE attempts SET started_at = started_at - 7200")
    fresh.run("--mark-done", "a")
    fresh.run("b", code=2)
    assert "a, which succeeded 2h 00m ago" in fresh.ended.err


def test_a_need_that_is_cached_is_as_old_as_the_success_that_stands(line):
    line.set({"a": {**FRESH["a"], "cache": True}, "b": {"module": "m", "needs": ["a"]}})
    line.run("a")
    line.ask("UPDATE attempts SET started_at = started_at - 7200")
    line.run("a")
    line.run("b", code=2)
    assert "a, which succeeded 2h 00m ago, in run 1" in line.ended.err


def test_a_need_without_fresh_for_is_met_by_any_success(fresh):
    fresh.set({**FRESH, "a": {"module": "m", "needs": []}}, ITEM_TOOL)
    fresh.run("a", *JANUARY)
    assert [tool for tool, _ in fresh.run("b")] == ["b"]
