"""The room CALLING: what run() gets, what its result means, how an attempt ends."""
import logging

import pytest

from orchestrator import Event, UserError, run_pipeline


@pytest.fixture
def sandbox(quick):
    """Run the pipelines of these tests in forks, which is quicker."""
    return quick


def run_one(modules, source, get_connection=None, tool="m", **keywords):
    """Run one tool with this source and return its Outcome. Another takes all arguments."""
    modules(m=source, all="def run(**kwargs): pass")
    return run_pipeline(["t"], {"t": tool, "all": "all"}, {}, get_connection,
                        **keywords).outcomes["t"]


@pytest.mark.parametrize("signature, given", [
    ("conn, **kwargs", "conn context day limit"),
    ("conn", "conn"),
    ("*, limit, conn=None", "conn limit"),
    ("**kwargs", "conn context day limit"),
    ("", ""),
    ("context, day='x', other=7", "context day"),
])
def test_run_gets_the_arguments_that_it_names_or_all(modules, signature, given):
    outcome = run_one(modules, f"""
        def run({signature}):
            mine = dict(locals())
            mine.update(mine.pop("kwargs", {{}}))
            return sorted(n for n, v in mine.items() if n != "other")
    """, lambda: object(), arguments={"day": "d", "limit": 3})
    assert outcome.result == sorted(given.split())


@pytest.mark.parametrize("signature, gets_conn", [("**kwargs", False), ("conn, **kwargs", True)])
def test_without_a_database_conn_goes_only_to_a_run_that_names_it(modules, signature, gets_conn):
    outcome = run_one(modules, f"""
        def run({signature}):
            return ["conn" in dict(locals(), **locals()["kwargs"])]
    """)
    assert outcome.result == [gets_conn]


def test_a_decorated_run_gets_what_the_function_inside_names(modules):
    outcome = run_one(modules, """
        import functools
        def decorate(function):
            @functools.wraps(function)
            def wrapper(*args, **kwargs):
                return function(*args, **kwargs)
            return wrapper
        @decorate
        def run(day):
            return day
    """, arguments={"day": "monday", "unwanted": 1})
    assert outcome.result == "monday"


@pytest.mark.parametrize("definition", [
    "import functools\ndef f(a, day): return day\nrun = functools.partial(f, 1)",
    "class C:\n    def go(self, day): return day\nrun = C().go",
    "class C:\n    def __call__(self, day): return day\nrun = C()",
])
def test_run_may_be_any_callable(modules, definition):
    modules(m="", all="def run(**kwargs): pass")
    (modules() / "m.py").write_text(definition)
    result = run_pipeline(["t"], {"t": "m", "all": "all"},
                          arguments={"day": "monday", "unwanted": 1})
    assert result.results == {"t": "monday"}


@pytest.mark.parametrize("signature, word", [
    ("conn, sinse", "asks for 'sinse', which nothing gives"),
    ("conn, /", "takes 'conn' by position only"),
])
def test_a_run_that_can_not_be_called_is_refused_before_anything_runs(modules, signature, word):
    modules(first="ran = []\ndef run(): ran.append(1)", second=f"def run({signature}): pass")
    with pytest.raises(UserError, match=word):
        run_pipeline([], {"a": "first", "b": "second"})
    import first
    assert first.ran == []


def test_async_run_is_awaited_also_inside_a_running_loop(modules):
    import asyncio
    modules(m="""
        import asyncio
        async def run(day):
            await asyncio.sleep(0)
            return day
    """)

    async def cell_of_a_notebook():
        return run_pipeline([], {"t": "m"}, arguments={"day": 5})

    assert run_pipeline([], {"t": "m"}, arguments={"day": 4}).results == {"t": 4}
    assert asyncio.run(cell_of_a_notebook()).results == {"t": 5}


def test_a_module_path_may_name_another_function_than_run(modules):
    outcome = run_one(modules, "def load(): return 'loaded'", tool="m:load")
    assert outcome.result == "loaded"


@pytest.mark.parametrize("returned, rows", [
    ("7", 7), ("{'rows': 7, 'x': 1}", 7), ("None", None), ("True", None), ("'7'", None),
    ("{'rows': 'many'}", None), ("[1, 2]", None), ("0", 0),
])
def test_rows_come_from_an_int_or_from_rows_in_a_dict(modules, returned, rows):
    assert run_one(modules, f"def run(): return {returned}").rows == rows


@pytest.mark.parametrize("code, status", [
    ("", "success"), ("0", "success"), ("None", "success"), ("3", "failed"), ("'no'", "failed"),
])
def test_sys_exit_in_run_ends_only_that_tool(modules, code, status):
    outcome = run_one(modules, f"import sys\ndef run(): sys.exit({code})")
    assert outcome.status == status
    assert outcome.error == ("" if status == "success" else f"sys.exit({code})")


def test_sys_exit_in_check_is_a_failure_whatever_its_code(modules):
    assert run_one(modules, """
        import sys
        def run(): pass
        def check(): sys.exit(0)
    """).status == "failed"


def test_sys_exit_with_zero_in_run_does_not_leave_out_the_check(modules):
    assert run_one(modules, """
        import sys
        def run(): sys.exit(0)
        def check(): raise ValueError("not good enough")
    """).error == "ValueError: not good enough"


def test_context_tells_the_run_and_the_results_of_the_tools_before(modules):
    modules(a="def run(): return {'rows': 2}",
            b="def run(context): return (context.run_id, context.tool, context.attempt,"
              " dict(context.results))")
    result = run_pipeline([], {"a": "a", "b": "b"})
    assert result.results["b"] == (result.run_id, "b", 1, {"a": {"rows": 2}})


def test_results_of_others_can_not_be_changed(modules):
    modules(a="def run(): return 1", b="def run(context): context.results['a'] = 2")
    result = run_pipeline([], {"a": "a", "b": "b"})
    assert "does not support item assignment" in result.errors["b"]


def test_progress_reports_each_item_with_the_length_if_there_is_one(modules):
    events = []
    modules(m="""
        def run(context):
            list(context.progress("ab"))
            list(context.progress(iter("ab"), total=9))
            list(context.progress(c for c in "ab"))
    """)
    run_pipeline([], {"t": "m"}, on_event=events.append)
    assert [(e.done, e.total) for e in events if e.kind == "progress"] == [
        (1, 2), (2, 2), (1, 9), (2, 9), (1, None), (2, None)]


def test_log_lines_become_events_of_the_run(modules, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    events = []
    modules(m="def run(context): context.log.warning('low on %s', 'fuel')")
    run_pipeline([], {"t": "m"}, on_event=events.append)
    log = [e for e in events if e.kind == "log"]
    assert [(e.tool, e.text, e.level) for e in log] == [("t", "low on fuel", logging.WARNING)]


def test_log_lines_go_to_the_handlers_that_the_user_set_up(modules, caplog):
    events = []
    modules(m="def run(context): context.log.warning('low')")
    run_pipeline([], {"t": "m"}, on_event=events.append)
    assert [(r.name, r.message) for r in caplog.records] == [("orchestrator.t", "low")]
    assert [e.kind for e in events if e.kind == "log"] == []


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_log_line_whose_arguments_do_not_fit_fails_nothing(sandbox, jobs):
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool("t", """
        def run(context):
            context.log.info("%d", "no number")
            context.log.info("goes on")
            return 7
    """)
    ended = sandbox.run("--jobs", jobs)
    assert ended.code == 0 and "7 rows" in ended.err and "goes on" in ended.err
    assert "--- Logging error ---" in ended.err + ended.out


@pytest.mark.parametrize("set_up, takes", [
    ("logging.warning('a library')", "warning"),
    ("logging.basicConfig(level=logging.INFO)", "info warning"),
    ("logging.getLogger('orchestrator').addHandler(logging.StreamHandler())", "warning"),
    ("pass", "debug info warning"),
])
def test_handlers_that_a_tool_sets_up_take_every_line_from_then_on_once(sandbox, set_up, takes):
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool("t", f"""
        import logging
        def run(context):
            for when in ("before", "after"):
                context.log.debug(when + " debug")
                context.log.info(when + " info")
                context.log.warning(when + " warning")
                if when == "before":
                    {set_up}
    """)
    ended = sandbox.run("--verbose")
    assert [ended.err.count("before " + each) for each in ("debug", "info", "warning")] == [1, 1, 1]
    assert [each for each in ("debug", "info", "warning")
            if ended.err.count("after " + each) == 1] == takes.split()
    assert ended.err.count("after") == len(takes.split())


def test_a_traceback_begins_at_the_tool_and_keeps_its_causes(modules):
    outcome = run_one(modules, """
        def inner():
            raise KeyError("inner")
        def run(context):
            for _ in context.progress([1]):
                try:
                    inner()
                except KeyError as error:
                    raise ValueError("outer") from error
    """)
    assert "orchestrator.py" not in outcome.traceback
    assert "KeyError: 'inner'" in outcome.traceback and "ValueError: outer" in outcome.traceback
    assert outcome.traceback.count("m.py") == 3  # inner, its caller, the raise


def test_a_traceback_of_an_async_run_begins_at_the_tool_and_keeps_what_it_called(modules):
    source = """
        import asyncio
        async def inner():
            try:
                await asyncio.wait_for(asyncio.Event().wait(), 0.01)
            except asyncio.TimeoutError as error:
                raise ValueError("late") from error
        async def run():
            await asyncio.gather(inner())
    """
    outcome = run_one(modules, source)
    assert outcome.error == "ValueError: late"
    *_, cause, last = [
        [line.split('"')[1] for line in part.splitlines() if line.startswith("  File")]
        for part in outcome.traceback.split("direct cause")]
    assert cause[0].endswith("m.py") and cause[1].endswith("tasks.py")
    assert [file.endswith("m.py") for file in last] == [True, True]
    whole = run_one(modules, source, verbose=True).traceback
    assert "base_events.py" in whole and "base_events.py" not in outcome.traceback


@pytest.mark.parametrize("error, line", [
    (r"ValueError('a\n  b\tc')", "ValueError: a b c"),
    (r"ValueError('\x1b[31mred\x1b[0m \x1b]0;title\x07bell\x07')", "ValueError: red bell"),
    (r"ValueError('\x9b2J\u202egpj.exe caf\xe9')", "ValueError: 2J gpj.exe caf\xe9"),
    ("ValueError()", "ValueError"),
    ("ValueError('x' * 10**6)", "ValueError: " + "x" * 285 + "..."),
    ("SystemExit('y' * 10**6)", "sys.exit('" + "y" * 287 + "..."),
    ("Mute()", "Mute: (its text can not be read)"),
])
def test_an_error_is_one_line_that_does_nothing_to_a_terminal(modules, error, line):
    outcome = run_one(modules, f"""
        class Mute(Exception):
            def __str__(self):
                raise KeyError
        def run():
            raise {error}
    """)
    assert outcome.error == line and len(line) <= 300
    assert outcome.traceback.count("x") > 60_000 or "'x'" not in error  # it keeps more
    assert len(outcome.traceback) < 70_000


def test_an_import_that_fails_with_a_page_of_text_is_told_in_few_lines(sandbox):
    sandbox.pipeline('TOOL_MAP = {"t": "t", "u": "u"}')
    sandbox.tool("t", "raise ValueError('page\\n' * 999)")
    sandbox.tool("u", "import sys\nsys.exit('page\\n' * 999)")
    ended = sandbox.run()
    assert ended.code == 2 and len(ended.err.splitlines()) < 8 and len(ended.err) < 1000


def test_verbose_keeps_the_frames_of_the_engine(modules):
    outcome = run_one(modules, "def run(): 1 / 0", verbose=True)
    assert "orchestrator.py" in outcome.traceback


@pytest.mark.parametrize("source, says", [
    ("import no_such_thing\ndef run(): pass", "m.py:1:\n  ModuleNotFoundError: No module named"),
    ("def run():\n    pass\n  x", "m.py:3:\n  IndentationError"),
    ("def run(): pass\nimport sys\nsys.exit(4)", r"called sys.exit\(4\), \S*m.py:3"),
    ("def run(): pass\nraise ValueError('at import')", "m.py:2:\n  ValueError: at import"),
    ("def other(): pass", r"has no function run\(\)"),
    ("run = 3", r"run of \S*m.py is an int, not a function.\n  Write `def run"),
    ("def run(): pass\nrun = 3", r"run of \S*m.py is an int, not a function."),
    ("def run(con, **kwargs): pass", "asks for 'con', which nothing gives.\n  There are conn, con"),
    ("def run(weight): pass", r"asks for 'weight', which nothing gives.\n  .* Give it a default"),
])
def test_a_module_that_can_not_be_used_is_told_with_the_line(modules, source, says):
    folder = modules()
    (folder / "m.py").write_text(source)
    with pytest.raises(UserError, match=says):
        run_pipeline([], {"t": "m"})


@pytest.mark.parametrize("helper, says", [
    ("x = 1\nimport no_such_thing", "t.py:2 -> helper.py:2:\n  ModuleNotFoundError: "),
    ("def f():\n    1 / 0\nf()", "t.py:2 -> helper.py:2:\n  ZeroDivisionError: "),
    ("x = (", "t.py:2 -> helper.py:1:\n  SyntaxError: "),
    ("import importlib\nimportlib.import_module('gone')", "t.py:2 -> helper.py:2:\n  Module"),
])
def test_an_import_that_fails_in_a_helper_is_told_with_the_tools_line_and_the_helpers(
        sandbox, helper, says):
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool("helper", helper)
    ended = sandbox.tool("t", "import os\nimport helper\ndef run(): pass").run()
    assert ended.code == 2 and f"importing t failed, {says}" in ended.err


def test_a_module_that_is_gone_when_its_worker_imports_it_is_told_as_such(quick):
    quick.pipeline('TOOL_MAP = {"a": "a", "b": {"module": "b", "isolate": True}}')
    quick.tool("a", "import os\ndef run(): os.unlink('b.py')").tool("b", "def run(): pass")
    ended = quick.run()
    assert ended.code == 1 and "importing b failed, in no line of its own:" in ended.err
    assert "ModuleNotFoundError: No module named 'b'" in ended.err


def test_every_broken_module_of_the_plan_is_told_at_once(modules):
    run = "def run(): pass"
    modules(a=f"import nope_a\n{run}", b=run, c=f"import nope_c\n{run}")
    with pytest.raises(UserError) as caught:
        run_pipeline([], {"a": "a", "b": "b", "c": "c"})
    assert "nope_a" in str(caught.value) and "nope_c" in str(caught.value)


def test_a_missing_module_outside_the_plan_is_no_hindrance(modules):
    modules(a="def run(): return 1")
    assert run_pipeline("a", {"a": "a", "b": "not_written_yet"}).status == "success"


def test_modules_are_imported_before_the_connection_is_opened(modules):
    modules(a="def run(conn): pass", b="import nope")
    opened = []
    with pytest.raises(UserError):
        run_pipeline([], {"a": "a", "b": "b"}, {}, lambda: opened.append(1))
    assert opened == []


def test_events_tell_a_run_in_order(modules):
    events = []
    modules(a="def run(): pass")
    result = run_pipeline([], {"a": "a"}, on_event=events.append)
    assert [(e.kind, e.tool) for e in events] == [
        ("run_started", ""), ("tool_started", "a"), ("tool_ended", "a"), ("run_ended", "")]
    assert all(isinstance(e, Event) and e.run_id == result.run_id for e in events)
    assert events[-1].result == result
