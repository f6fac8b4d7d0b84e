"""context.outcomes: a tool is told how the others ended, in any process and after any end."""
import signal
import sys

import pytest
from conftest import MODES, SQLITE, Sandbox, wait_until

from orchestrator import Outcome, run_pipeline

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
ASK = """
    def run(context):
        return {tool: (each.status, each.rows, each.error, each.reason, each.result, each.kept)
                for tool, each in context.outcomes.items()}
"""
FAILS = "def run(): raise ValueError('no such file')"
JOBS = pytest.mark.parametrize("jobs", [1, 2])

# The table of runs that people keep in their own database, for a page or a monitor of theirs.
RUNS = '''
    """Write down how each tool ended."""
    def setup(conn):
        conn.execute("CREATE TABLE IF NOT EXISTS runs (run INTEGER, tool TEXT, status TEXT, "
                     "rows INTEGER, seconds REAL, says TEXT, PRIMARY KEY (run, tool))")

    def run(conn, context):
        conn.executemany("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?)", [
            (context.run_id, tool, each.status, each.rows, each.duration_s,
             each.error or each.reason) for tool, each in context.outcomes.items()])
'''
TABLE = SQLITE + """
TOOL_MAP = {
    "load":   {"module": "load", "needs": []},
    "parse":  {"module": "parse", "needs": ["load"]},
    "report": {"module": "load", "needs": ["parse"]},
    "runs":   {"module": "runs", "when": "always"},
}
"""
LOAD = "def run(): return 7"
PARSE = """
    import pathlib
    def run():
        if pathlib.Path("broken").exists():
            raise ValueError("no such file")
        return 7
"""


@JOBS
def test_a_tool_is_told_how_those_ended_that_have(modules, jobs):
    modules(works="def run(): return 3", fails=FAILS, ask=ASK)
    result = run_pipeline([], {
        "good": {"module": "works", "needs": []}, "bad": {"module": "fails", "needs": []},
        "after_bad": {"module": "works", "needs": ["bad"]},
        "ask": {"module": "ask", "needs": ["good", "after_bad"], "when": "always"},
        "later": {"module": "works", "needs": ["ask"]},
    }, jobs=jobs)
    assert result.results["ask"] == {
        "good": ("success", 3, "", "", None, None),
        "bad": ("failed", None, "ValueError: no such file", "", None, None),
        "after_bad": ("skipped", None, "", "needs bad, which failed", None, None),
    }


@JOBS
def test_outcomes_have_what_is_known_and_can_only_be_read(modules, jobs):
    modules(fails=FAILS, lists="def items(): return ['a', 'b']\ndef run(item): return 2", ask="""
        def run(context):
            try:
                context.outcomes["bad"] = None
            except TypeError:
                return dict(context.outcomes)
    """)
    result = run_pipeline([], {"items": {"module": "lists", "needs": []},
                               "bad": {"module": "fails", "needs": ["items"]},
                               "ask": {"module": "ask", "when": "always"}}, jobs=jobs)
    seen = result.results["ask"]
    assert seen == {tool: result.outcomes[tool]._replace(result=None, kept=None)
                    for tool in ("items", "bad")}
    assert all(type(each) is Outcome for each in seen.values())
    assert seen["bad"].traceback.rstrip().endswith("ValueError: no such file")
    assert (seen["items"].rows, seen["items"].items["passed"]) == (4, 2)
    assert all(each.duration_s > 0 and each.attempts == 1 for each in seen.values())


@JOBS
def test_a_result_is_not_to_be_had_by_its_outcome_and_an_outcome_by_no_name_of_a_result(
        modules, jobs):
    modules(make="def run(): return lambda: 1", ask="""
        from orchestrator import Outcome
        def run(context):
            return [context.results.get(each, "none") for each in (None, Outcome, "", 1, [])], [
                context.outcomes["make"].status, context.outcomes["make"].result]
    """)
    result = run_pipeline([], {"make": "make", "ask": "ask"}, jobs=jobs)
    assert result.results["ask"] == (["none"] * 5, ["success", None]), result.errors


def test_a_tool_that_is_tried_again_has_not_ended(modules):
    modules(m="""
        import pathlib, time
        HERE = pathlib.Path(__file__).parent
        def wait_for(name):
            while not (HERE / name).exists():
                time.sleep(0.005)
        def again(context):
            if context.attempt == 2:
                (HERE / "second").touch()
                wait_for("asked")
            raise ValueError("no")
        def ask(context):
            wait_for("second")
            seen = dict(context.outcomes)
            (HERE / "asked").touch()
            return seen
        def last(context):
            return context.outcomes["again"].attempts, context.outcomes["again"].status
    """)
    result = run_pipeline([], {
        "again": {"module": "m:again", "needs": [], "retries": 1, "retry_delay": "0s"},
        "ask": {"module": "m:ask", "needs": [], "timeout": "30s"},
        "last": {"module": "m:last", "when": "always"}}, jobs=2)
    assert result.results["ask"] == {}
    assert result.results["last"] == (2, "failed")


@JOBS
def test_each_look_tells_what_has_ended_by_then_and_of_a_tool_itself_nothing(modules, jobs):
    modules(m="""
        import pathlib
        def run(context):
            mine = pathlib.Path(__file__).with_name(context.tool)
            with mine.open("a") as file:
                file.write(" ".join(context.outcomes) + ",")
            if context.attempt == 1:
                raise ValueError("not yet")
    """)
    retried = {"retries": 1, "retry_delay": "0s"}
    tools = {"a": {"module": "m", **retried}, "b": {"module": "m", **retried}}
    result = run_pipeline([], tools, jobs=jobs)
    assert result.status == "success"
    folder = modules()
    assert [(folder / tool).read_text() for tool in "ab"] == [",,", "a,a,"]


@POSIX
@JOBS
def test_after_ctrl_c_they_tell_what_was_interrupted(modules, jobs):
    modules(works="def run(): return 1", ask=ASK, stops="def run(): raise KeyboardInterrupt")
    events = []
    with pytest.raises(KeyboardInterrupt):
        run_pipeline([], {"first": "works", "stops": "stops", "never": "works",
                          "ask": {"module": "ask", "when": "always"}},
                     jobs=jobs, on_event=events.append)
    seen = events[-1].result.results["ask"]
    assert {tool: each[0] for tool, each in seen.items()} == {
        "first": "success", "stops": "interrupted"}


def test_they_are_refused_with_a_reason_after_the_tool_has_ended(modules):
    modules(ask="""
        kept = []
        def first(context): kept.append(context)
        def second(context):
            try:
                kept[0].outcomes
            except RuntimeError as error:
                return str(error)
    """)
    result = run_pipeline([], {"first": {"module": "ask:first", "isolate": True},
                               "second": {"module": "ask:second", "isolate": True}})
    assert "read it before, in run() itself" in result.results["second"]


# --- a table of runs, through the command line ---

def make_table(sandbox):
    """Write the pipeline whose last tool keeps a table of runs."""
    return sandbox.pipeline(TABLE).tool("load", LOAD).tool("parse", PARSE).tool("runs", RUNS)


def read_runs(sandbox, run):
    """Return what the table says of a run."""
    return sandbox.query("SELECT tool, status, rows, says FROM runs WHERE run = ? ORDER BY rowid",
                         run)


@pytest.mark.parametrize("words", MODES.values(), ids=MODES)
def test_a_table_of_runs_tells_failures_skips_and_what_a_resume_found_done(quick, words):
    make_table(quick)
    (quick.folder / "broken").touch()
    assert quick.run(*words).code == 1
    assert read_runs(quick, 1) == [
        ("load", "success", 7, ""), ("parse", "failed", None, "ValueError: no such file"),
        ("report", "skipped", None, "needs parse, which failed")]

    (quick.folder / "broken").unlink()
    assert quick.run("--resume", *words).code == 0
    assert read_runs(quick, 2) == [
        ("load", "cached", 7, "succeeded in run 1"), ("parse", "success", 7, ""),
        ("report", "success", 7, "")]
    assert quick.query("SELECT count(*) FROM runs WHERE seconds > 0 AND status = 'success'") \
        == [(3,)]


@POSIX
@pytest.mark.parametrize("words", MODES.values(), ids=MODES)
def test_a_table_of_runs_is_written_after_ctrl_c_too(tmp_path, words):
    sandbox = make_table(Sandbox(tmp_path)).tool("parse", """
        import pathlib, time
        def run():
            pathlib.Path("began").touch()
            time.sleep(60)
    """)
    process = sandbox.start(*words)
    wait_until((tmp_path / "began").exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert read_runs(sandbox, 1) == [
        ("load", "success", 7, ""), ("parse", "interrupted", None, "interrupted by Ctrl-C")]
