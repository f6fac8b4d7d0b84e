"""What people and programs get to see: --list, --plan, the lines of a run, the closing table."""
import json
import os
import re
import sys

import pytest
from conftest import summary

from orchestrator import (
    Event, Outcome, RunResult, Style, Tool, format_details, format_event, format_needs,
    format_progress, format_summary, format_table, load_pipeline, main, make_list, make_plan,
    make_plan_view, make_style, run_pipeline,
)


@pytest.fixture
def sandbox(quick):
    """Run the pipelines of these tests in forks, which is quicker."""
    return quick

PLAIN, COLOURED = Style(False), Style(True)
ESCAPE = re.compile(r"\x1b\[\d*m")
LIVE = re.compile(r"\x1b\[(\d*A|G|J|\?7[lh])")  # what draws and erases the live area

TOOLS = {"fetch": "fetch_files", "parse": "parse_files", "render": "render_page"}
STAGES = {"ingest": ["fetch", "parse"], "full": ["ingest", "render"]}

LIST = """\
Tools
  fetch   Fetch the files.
  parse   Make rows of them.
  render

Stages
  ingest  fetch parse
  full    fetch parse render
"""
PLAN = """\
wave  tool    action  expected  reason
   1  fetch   run               in stage full
   2  parse   run               in stage full; after all before it
   3  render  run               in stage full; after all before it

Critical path: fetch -> parse -> render
"""


def get_connection():
    raise AssertionError("a connection was opened for looking")


@pytest.fixture
def look(modules, capsys):
    """Return look(*words) -> what main() printed, in a pipeline of three tools."""
    modules(fetch_files='"""Fetch the files.\n\nMore of it."""\nraise Exception("imported")\n'
                        'def run(): pass\n', m="def run(): pass",
            parse_files='def run(conn):\n    """\n    Make rows of them.\n    """\n',
            render_page="def run(conn):\n    pass\n")

    def call(*words, tools=TOOLS, stages=STAGES):
        code = main(tools, stages, get_connection, argv=words)
        printed = capsys.readouterr()
        assert (code, printed.err) == (0, "")
        return printed.out

    return call


# --- --list ---

def test_list_shows_tools_with_their_summaries_and_stages_with_their_tools(look):
    assert look("--list") == LIST


def test_list_as_json_has_the_documented_shape(look):
    assert json.loads(look("--list", "--json")) == {
        "tools": [
            {"name": "fetch", "module": "fetch_files", "summary": "Fetch the files.",
             "needs": "*", "stages": ["ingest", "full"], "last": None},
            {"name": "parse", "module": "parse_files", "summary": "Make rows of them.",
             "needs": "*", "stages": ["ingest", "full"], "last": None},
            {"name": "render", "module": "render_page", "summary": "",
             "needs": "*", "stages": ["full"], "last": None},
        ],
        "stages": [{"name": "ingest", "tools": ["fetch", "parse"]},
                   {"name": "full", "tools": ["fetch", "parse", "render"]}],
    }


def test_list_with_a_target_shows_what_belongs_to_it(look):
    shown = json.loads(look("--list", "--json", "ingest"))

    assert [tool["name"] for tool in shown["tools"]] == ["fetch", "parse"]
    assert [stage["name"] for stage in shown["stages"]] == ["ingest"]


def test_list_without_stages_has_no_heading_for_them(look):
    assert "Stages" not in look("--list", stages={})


def test_list_imports_no_module(look):
    look("--list")

    assert not {"fetch_files", "parse_files", "render_page"} & set(sys.modules)


@pytest.mark.parametrize("source, value, shown", [
    ('"""Of the module."""\ndef run(conn):\n    """Of run."""', "m_sum", "Of the module."),
    ('def run(conn):\n    """Of run."""', "m_sum", "Of run."),
    ('async def run(conn):\n    """Of run."""', "m_sum", "Of run."),
    ('"""Of the module."""\ndef load(conn):\n    """Of load."""', "m_sum:load", "Of load."),
    ('"""Of the module."""\ndef load(conn):\n    pass', "m_sum:load", "Of the module."),
    ('"""\n\n   First line.   \nSecond."""', "m_sum", "First line."),
    ("'''été — ☃'''", "m_sum", "été — ☃"),
    ('f"""No docstring."""', "m_sum", ""),
    ('b"""No docstring."""', "m_sum", ""),
    ("run = 1", "m_sum", ""),
    ("", "m_sum", ""),
])
def test_a_summary_is_the_first_line_of_the_docstring(look, modules, source, value, shown):
    modules(m_sum=source)

    [tool] = json.loads(look("--list", "--json", tools={"t": value}, stages={}))["tools"]
    assert tool["summary"] == shown


def test_a_missing_module_is_listed_as_missing(look):
    listed = look("--list", tools={**TOOLS, "gone": "m_gone"})

    assert "  gone    (no module m_gone)\n" in listed
    assert "  fetch   Fetch the files.\n" in listed


def test_a_module_with_a_syntax_error_is_listed_with_its_line(look, modules):
    modules(m_broken="x = 1\ndef run(:\n")

    listed = look("--list", tools={"broken": "m_broken", **TOOLS})

    assert re.search(r"^  broken  \(.*m_broken\.py:2: SyntaxError: ", listed, re.M)
    assert "Fetch the files." in listed


def test_list_on_a_screen_without_the_letters_is_not_a_bug(sandbox):
    sandbox.pipeline('TOOL_MAP = {"fetch": "fetch"}').tool("fetch", '"""Straße — ☃"""\n')

    ended = sandbox.run("--list", env={"PYTHONIOENCODING": "ascii"})

    assert ended.code == 0, ended
    assert "Stra" in ended.out


# --- --plan ---

@pytest.mark.parametrize("flag", ["--plan", "-n", "--dry-run"])
def test_plan_shows_every_step_with_its_reason(look, flag):
    assert look(flag) == PLAN


def test_plan_as_json_has_the_documented_shape(look):
    assert json.loads(look("-n", "--json", "ingest", "render")) == {
        "steps": [
            {"tool": "fetch", "wave": 1, "action": "run", "reason": "in stage ingest",
             "needs": "*", "expected_s": None, "arguments": {}},
            {"tool": "parse", "wave": 2, "action": "run", "reason": "in stage ingest",
             "needs": "*", "expected_s": None, "arguments": {}},
            {"tool": "render", "wave": 3, "action": "run", "reason": "named",
             "needs": "*", "expected_s": None, "arguments": {}},
        ],
        "critical_path": ["fetch", "parse", "render"],
        "expected_s": None,
    }


def test_the_plan_that_is_shown_is_the_plan_that_a_run_tells_of(modules, capsys):
    modules(m_told="def run(conn):\n    pass\n")
    tools, stages = {"one": "m_told", "two": "m_told"}, {"both": ["two", "one"]}
    told = []

    run_pipeline(["both"], tools, stages, on_event=told.append)

    assert main(tools, stages, argv=["--plan", "--json", "both"]) == 0
    assert json.loads(capsys.readouterr().out) == make_plan_view(told[0].plan)


def test_json_is_refused_where_there_is_nothing_to_print_as_json(capsys):
    assert main(TOOLS, STAGES, argv=["--json"]) == 2
    assert "--json goes with --list" in capsys.readouterr().err


@pytest.mark.parametrize("needs, wave, said", [
    ("*", 1, ""), ("*", 2, "; after all before it"), ([], 1, ""),
    (["fetch"], 2, "; needs fetch"), (["fetch", "parse"], 3, "; needs fetch, parse"),
    (["fetch", "gone"], 2, "; needs fetch, gone (not in this plan)"),
])
def test_a_plan_says_what_a_step_waits_for(needs, wave, said):
    step = {"tool": "t", "wave": wave, "action": "run", "reason": "named", "needs": needs}

    assert format_needs(step, {"fetch", "parse", "t"}) == said


GRAPH = {
    "a": {"module": "m", "needs": [], "estimate": "30s"},
    "b": {"module": "m", "needs": ["a"], "estimate": 10},
    "c": {"module": "m", "reads": "x", "estimate": "2m"},
    "d": {"module": "m", "needs": ["b", "c"], "estimate": 5},
}
GRAPH_PLAN = """\
wave  tool  action  expected  reason
   1  a     run       30.0 s  in TOOL_MAP
   1  c     run       2m 00s  in TOOL_MAP
   2  b     run       10.0 s  in TOOL_MAP; needs a
   3  d     run       5.00 s  in TOOL_MAP; needs b, c

Critical path: c -> d
"""


@pytest.mark.parametrize("words, expected", [
    ([], "2m 45s with --jobs 1"),
    (["--jobs", "1"], "2m 45s with --jobs 1"),
    (["--jobs", "2"], "2m 05s with --jobs 2, 2m 45s one after another"),
    (["-j4"], "2m 05s with --jobs 4, 2m 45s one after another"),
])
def test_a_plan_shows_the_tools_by_waves_the_critical_path_and_what_is_expected(
        look, words, expected):
    """a - b - d
           c /
    """
    assert look("--plan", *words, tools=GRAPH, stages={}) == GRAPH_PLAN + f"Expected: {expected}\n"


def test_a_plan_with_an_unknown_duration_expects_nothing_of_the_whole(look):
    tools = {**GRAPH, "b": {"module": "m", "needs": ["a"]}}

    shown = look("--plan", tools=tools, stages={})

    assert "Expected" not in shown
    assert "   1  a     run       30.0 s  " in shown
    assert "   2  b     run               " in shown


def test_a_plan_of_a_graph_as_json_has_all_that_the_text_has(look):
    shown = json.loads(look("--plan", "--json", "-j2", "d", "+b", "c", tools=GRAPH, stages={}))

    assert [(step["tool"], step["wave"], step["needs"], step["expected_s"])
            for step in shown["steps"]] == [
        ("a", 1, [], 30.0), ("b", 2, ["a"], 10.0), ("c", 1, [], 120.0), ("d", 3, ["b", "c"], 5.0)]
    assert (shown["critical_path"], shown["expected_s"]) == (["c", "d"], 125.0)


def test_list_shows_needs_that_are_declared_and_those_that_are_inferred(look):
    tools = {"a": {"module": "m", "writes": "x"}, "b": {"module": "m", "reads": ["x", "y"]},
             "c": {"module": "m", "needs": ["a"], "reads": "x"}, "d": "m"}

    listed = json.loads(look("--list", "--json", tools=tools, stages={}))["tools"]
    assert [tool["needs"] for tool in listed] == [[], ["a"], ["a"], "*"]


def test_needs_that_are_declared_are_a_list_in_json():
    plan = make_plan(load_pipeline(TOOLS), ["fetch"])
    plan = plan._replace(steps=(plan.steps[0]._replace(needs=("parse",)),))

    assert make_plan_view(plan)["steps"][0]["needs"] == ["parse"]


def test_a_list_asks_for_each_summary_through_its_argument():
    asked = []

    def find_summary(tool):
        asked.append(tool)
        return tool.module.upper()

    shown = make_list(load_pipeline(TOOLS), ["parse"], find_summary, lambda tool: None)

    assert asked == [Tool("parse", "parse_files")]
    assert shown["tools"][0]["summary"] == "PARSE_FILES"


# --- tables, rows and durations ---

def make_rows(columns, *rows):
    """Return rows as mappings."""
    return [dict(zip(columns, row)) for row in rows]


def test_columns_are_aligned_and_no_line_ends_in_blanks():
    rows = make_rows(("tool", "rows", "note"), ("a", 1, ""), ("longer", 1000, "x"), ("b", 0, None))

    assert format_table("tool >rows note", rows) == ["tool     rows",
                                                     "a           1",
                                                     "longer  1,000  x",
                                                     "b           0"]


def test_a_column_that_may_be_missing_is_shown_where_anything_is_in_it():
    rows = make_rows(("tool", "items", "note"), ("a", "", "x"), ("b", "7", ""))

    assert format_table("tool ?items note", rows[:1]) == ["tool", "a     x"]
    assert format_table("tool ?items note", rows) == [
        "tool  items", "a            x", "b     7"]


def test_the_name_of_a_column_says_how_its_values_are_shown():
    rows = make_rows(("run_id", "age_s", "at", "tools"), ("7", 75.0, "x", ["a", "b"]))

    assert format_table("run_id age_s at tools", rows) == [
        "run  age     at  tools", "7    1m 15s  x   a b"]


def test_the_last_column_is_not_padded_to_its_longest_cell():
    rows = make_rows(("tool", "reason"), *[("a", "x")] * 100, ("b", "x" * 10_000))

    assert sum(map(len, format_table("tool reason", rows))) < 11_000


def test_colours_do_not_move_a_column():
    columns = "tool status note"
    rows = make_rows(columns.split(), ("a", "success", "1"), ("bb", "failed", "2"),
                     ("c", "pending", "3"))

    coloured = format_table(columns, rows, COLOURED)

    assert [ESCAPE.sub("", line) for line in coloured] == format_table(columns, rows)
    assert [bool(ESCAPE.search(line)) for line in coloured[1:]] == [True, True, False]


@pytest.mark.parametrize("count", [100, 1000])
def test_the_text_of_a_plan_grows_as_its_tools_do(look, count):
    """A chain, and one that needs them all: its needs once were as wide as the table."""
    tools = {"t0": {"module": "m", "needs": []}}
    tools.update((f"t{i}", {"module": "m", "needs": [f"t{i - 1}"]}) for i in range(1, count))
    tools["all"] = {"module": "m", "needs": list(tools)}

    shown = look("--plan", tools=tools, stages={"full": list(tools)})

    assert len(shown) < 80 * count
    assert re.search(rf"; needs t0, .*, t29, \.\.\. \({count:,} in all\)\n", shown)
    assert f" -> t29 -> ... ({count + 1:,} in all)" in shown


@pytest.mark.parametrize("outcome, said", [
    (Outcome("success", attempts=1, duration_s=0.5), "0.50 s"),
    (Outcome("success", rows=0, attempts=1, duration_s=65), "0 rows, 1m 05s"),
    (Outcome("success", rows=1234567, attempts=1), "1,234,567 rows, 0.00 s"),
    (Outcome("skipped", "needs fetch, which failed"), "needs fetch, which failed"),
    (Outcome("failed", error="ValueError: x", attempts=1, duration_s=2), "2.00 s, ValueError: x"),
])
def test_the_details_of_an_outcome_are_rows_duration_and_error_or_reason(outcome, said):
    assert format_details(outcome) == said


@pytest.mark.parametrize("more, said", [
    ({}, "parse   running"),
    ({"text": "4 files"}, "parse   4 files"),
    ({"outcome": Outcome("success", rows=7, attempts=1, duration_s=1)},
     "parse   success      7 rows, 1.00 s"),
    ({"outcome": Outcome("skipped", "not started")}, "parse   skipped      not started"),
    ({"kind": "tool_retried", "outcome": Outcome("failed", "try 1 of 3; again in 30.0 s",
                                                 error="E: x", attempts=1, duration_s=1)},
     "parse   retry        1.00 s, E: x, try 1 of 3; again in 30.0 s"),
    ({"text": "4 left", "level": 30}, "parse   warning: 4 left"),
])
def test_the_line_of_an_event_has_time_tool_status_and_details(more, said):
    line = format_event(Event(**{"kind": "k", "at": 1_357_000_000.0, "run_id": "id",
                                  "tool": "parse", **more}), 6, PLAIN)

    assert re.match(r"\d\d:\d\d:\d\d  ", line)
    assert line[10:] == said


def test_colours_change_no_letter_of_an_event():
    event = Event("tool_ended", 0.0, "id", "parse", outcome=Outcome("failed", error="E: x"))

    coloured = format_event(event, 6, COLOURED)

    assert "\x1b[31mfailed" in coloured
    assert ESCAPE.sub("", coloured) == format_event(event, 6, PLAIN)


@pytest.mark.parametrize("done, total, elapsed_s, said", [
    (0, None, 0.0, "0"),
    (1500, None, 3.0, "1,500, 500/s"),
    (5, None, 2.0, "5, 2.5/s"),
    (50, 250, 5.0, "50 of 250, 10/s, 20.0 s left"),
    (250, 250, 5.0, "250 of 250, 50/s"),
    (0, 250, 5.0, "0 of 250"),
    (3, 5, 180.0, "3 of 5, 0.017/s, 2m 00s left"),
])
def test_progress_is_count_rate_and_time_left(done, total, elapsed_s, said):
    event = Event("progress", 100.0 + elapsed_s, "id", "parse", done=done, total=total)

    assert format_progress(event, 100.0, event.at) == said


def test_the_time_left_goes_on_between_two_items_until_one_is_slower():
    event = Event("progress", 180.0, "id", "parse", done=3, total=5)

    assert format_progress(event, 0.0, 210.0) == "3 of 5, 0.017/s, 1m 30s left"
    assert format_progress(event, 0.0, 400.0) == "3 of 5, 0.01/s, 1m 40s left"


def make_result(**outcomes):
    """Return a run's result for some outcomes."""
    def having(status):
        return [tool for tool, outcome in outcomes.items() if outcome.status == status]

    status = "failed" if having("failed") else "success"
    return RunResult("RUN1", status, having("success"), [], [], having("failed"),
                     having("skipped"), {}, {}, 61.0, outcomes)


def test_the_closing_table_has_every_tool_with_status_rows_and_duration():
    result = make_result(
        fetch=Outcome("success", rows=12345, attempts=1, duration_s=65.0),
        parse=Outcome("failed", error="ValueError: x", attempts=1, duration_s=0.25),
        render=Outcome("skipped", "needs parse, which failed"))

    assert format_summary(result, "python orchestrator.py --from parse", PLAIN, {}) == """
tool    status     rows  duration
fetch   success  12,345    1m 05s
parse   failed             0.25 s  ValueError: x
render  skipped                    needs parse, which failed

failed: 1 of 3 tools done in 1m 01s (run RUN1)
Next: python orchestrator.py --from parse"""


def test_the_verdict_on_one_tool_is_in_the_singular_and_a_success_has_no_next_command():
    result = make_result(fetch=Outcome("success", attempts=1))

    assert format_summary(result, "", PLAIN, {}).splitlines()[-1] \
        == "success: 1 of 1 tool done in 1m 01s (run RUN1)"


def test_a_result_of_no_rows_is_told_from_a_result_without_rows():
    result = make_result(none=Outcome("success", attempts=1),
                         zero=Outcome("success", rows=0, attempts=1))

    none, zero = format_summary(result, "", PLAIN, {}).splitlines()[2:4]
    assert none.split() == ["none", "success", "0.00", "s"]
    assert zero.split() == ["zero", "success", "0", "0.00", "s"]


def test_colours_change_no_letter_of_the_closing_table():
    result = make_result(a=Outcome("success", attempts=1), bb=Outcome("failed", error="E: x"))

    coloured = format_summary(result, "next", COLOURED, {})

    assert ESCAPE.sub("", coloured) == format_summary(result, "next", PLAIN, {})
    assert coloured.count("\x1b[31m") == 2  # the tool, and the verdict


# --- when there are colours ---

class Screen:
    """A stream that is a terminal, or is not."""

    def __init__(self, is_terminal):
        self.isatty = lambda: is_terminal


@pytest.mark.parametrize("is_terminal, env, has_colours", [
    (True, {"TERM": "xterm"}, True),
    (True, {"TERM": "xterm", "NO_COLOR": ""}, True),  # no-color.org: "and not an empty string"
    (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
    (True, {"TERM": "dumb"}, False),
    (True, {}, False),
    (True, {"WT_SESSION": "x"}, True),  # the terminal of Windows sets no TERM
    (False, {"TERM": "xterm"}, False),
])
def test_colours_are_for_terminals_that_have_them_and_people_who_want_them(
        monkeypatch, is_terminal, env, has_colours):
    for name in ("TERM", "NO_COLOR", "WT_SESSION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    assert make_style(Screen(is_terminal)).colour is has_colours


def test_a_program_without_a_screen_has_no_colours(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")

    assert make_style(None).colour is False


PIPELINE = 'TOOL_MAP = {"good": "good", "bad": "bad"}'


@pytest.mark.parametrize("words", [[], ["--list"], ["--plan"], ["--check"]])
def test_there_are_no_escape_codes_in_a_file_or_a_pipe(sandbox, words):
    sandbox.pipeline(PIPELINE).tool("good", "def run(conn): return 5")
    sandbox.tool("bad", "def run(conn): raise ValueError('no')")

    ended = sandbox.run(*words, env={"TERM": "xterm-256color"})

    assert "good" in ended.out + ended.err or words == ["--check"]
    assert "\x1b" not in ended.out + ended.err


def run_on_terminal(sandbox, *words, env):
    """Return what a person sees on a terminal of 80 columns."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    process = sandbox.start(*words, env={"TERM": "xterm-256color", **env},
                            stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""
    try:
        while True:
            part = os.read(master, 65536)
            if not part:
                break
            seen += part
    except OSError:  # Linux says so when the other side is closed
        pass
    finally:
        os.close(master)
        process.wait(30)
    return seen.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("env, has_colours", [({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False)])
def test_a_terminal_shows_colours_unless_no_color_is_set(sandbox, env, has_colours):
    sandbox.pipeline(PIPELINE).tool("good", "def run(conn): return 5")
    sandbox.tool("bad", "def run(conn): raise ValueError('no')")

    seen = run_on_terminal(sandbox, env=env)

    assert "ValueError: no" in seen
    assert ("\x1b[31mfailed" in seen) is has_colours
    assert bool(ESCAPE.search(seen)) is has_colours


# --- what others wrote into what the engine says ---

GRIP = "\x1b[2J\x1b]0;title\x07\x1b(0\x9b31m\x08\x7f\r\u202egpj\u2066\u200b\u2028\U000e0041"
GRIPS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069"
                   "\U000e0000-\U000e007f]")
SPEAKING = f"""
TOOL_MAP = {{"good": "good", "bad": "bad", "odd": {{"module": "odd", "needs": []}}}}

def get_connection():
    import sqlite3
    return sqlite3.connect(Path(__file__).with_name("data.db"))

def add_arguments(parser):
    parser.add_argument("--title", default={GRIP!r})
"""


@pytest.fixture
def speaking(sandbox):
    """A pipeline whose tools, items and arguments hold what takes hold of a terminal."""
    sandbox.pipeline(SPEAKING)
    sandbox.tool("good", f'"""Good {GRIP!a}."""\ndef run(context): context.log.warning({GRIP!r})')
    sandbox.tool("bad", f"def run(): raise ValueError({GRIP!r} + 'seen')")
    return sandbox.tool("odd", f"""
        def items(): return ["a{GRIP!a}"[1:-1]]
        def run(item): raise ValueError(item)
    """)


@pytest.mark.parametrize("words", [
    (), ("-v",), ("-j", "2"), ("--list",), ("--plan",), ("--status",), ("--history",),
    ("--history", "1"), ("--items", "odd"), ("--logs",), ("nobody" + GRIP,), ("--check",)])
def test_nothing_that_the_engine_says_takes_hold_of_a_terminal(speaking, words):
    speaking.run()

    ended = speaking.run(*words)
    seen = LIVE.sub("", ESCAPE.sub("", run_on_terminal(speaking, *words, env={})))

    assert ended.code in (0, 1, 2) and not GRIPS.findall(ended.out + ended.err)
    assert not GRIPS.findall(seen.replace("\r", ""))


def test_a_colour_of_a_tool_is_none_of_the_engine(speaking):
    speaking.tool("bad", "def run(): raise ValueError('x\\n\x1b[31myours')")

    seen = run_on_terminal(speaking, "bad", env={})

    assert "\nyours" in seen and "\x1b[31mfailed" in seen


def test_what_tools_print_themselves_goes_through_as_it_is(speaking):
    speaking.tool("bad", f"def run(): print({GRIP!r})")

    for words in ((), ("-j", "2")):
        assert GRIP in run_on_terminal(speaking, "bad", *words, env={})


@pytest.mark.parametrize("words", ["--history 1", "--status", "--items odd", "--list", "--logs"])
def test_json_is_true_to_the_data_and_hides_no_letter_of_it(speaking, words):
    speaking.run()

    ended = speaking.run(*words.split(), "--json")

    assert not GRIPS.findall(ended.out)
    if words == "--history 1":
        run, = json.loads(ended.out)["runs"]
        assert run["arguments"]["title"] == GRIP
        assert any(GRIP in tool["traceback"] for tool in run["tools"] if tool["traceback"])


# --- what is told once ---

@pytest.mark.parametrize("words", [(), ("-j", "2")])
def test_an_error_is_told_at_its_event_and_in_the_closing_table(sandbox, words):
    sandbox.pipeline(PIPELINE).tool("good", "def run(conn): pass")
    sandbox.pipeline(PIPELINE.replace('"bad": "bad"', '"bad": {"module": "bad", "retries": 2, '
                                                      '"retry_delay": 0}'))
    sandbox.tool("bad", "def run(conn): raise ValueError('no way.')")

    err = sandbox.run(*words).err

    assert err.count("Traceback") == 1  # the tries that failed the same way have a line each
    assert len([line for line in err.splitlines() if "ValueError: no way" in line]) == 4
    assert ".," not in err and "ValueError: no way, try 3 of 3" in summary(err)["bad"]


@pytest.mark.parametrize("words", [(), ("-j", "2")])
@pytest.mark.parametrize("failing", ["b", "bc", "abc"])
@pytest.mark.parametrize("retries", [0, 1])
def test_an_error_of_an_item_is_told_at_its_event_and_in_the_closing_table(
        sandbox, words, failing, retries):
    options = {"module": "t", "retries": retries, "retry_delay": 0}
    sandbox.pipeline(f'TOOL_MAP = {{"t": {options}}}').tool("t", f"""
        def items(): return ["a", "b", "c"]
        def run(item):
            print("at", item)
            if item in {failing!r}: raise ValueError("no " + item + ".")
    """)

    err = sandbox.run(*words).err

    first = summary(err)["t"].split("ValueError: no ")[1][0]
    lines = [line for line in err.splitlines() if f"ValueError: no {first}" in line]
    assert len(lines) == 2 + retries and err.count("Traceback") == 1 and "Last lines" not in err
    ends = [line for line in err.splitlines() if " items failed" in line]
    assert len(ends) == 2 and "ValueError" not in ends[0] and "ValueError" in ends[1]
    assert all(f" {len(failing)} of 3 items failed" in line for line in ends)
    assert ".;" not in err and ".," not in err


def test_the_log_that_takes_both_streams_has_the_last_lines_of_a_tool_once(sandbox):
    sandbox.pipeline(PIPELINE)
    sandbox.tool("bad", "def run():\n    print('half')\n    raise ValueError('no')")
    with open(sandbox.folder / "both", "w") as both:
        assert sandbox.run("bad", stdout=both, stderr=both).code == 1
    assert sandbox.read("both").count("half") == 1


def test_another_traceback_of_a_try_is_told_too(sandbox):
    sandbox.pipeline(PIPELINE.replace('"bad": "bad"', '"bad": {"module": "bad", "retries": 1, '
                                                      '"retry_delay": 0}'))
    sandbox.tool("good", "def run(conn): pass")
    sandbox.tool("bad", "def run(conn, context): raise ValueError(context.attempt)")
    assert sandbox.run().err.count("Traceback") == 2


@pytest.mark.parametrize("words", [(), ("-j", "2")])
def test_a_line_without_an_end_swallows_none_of_the_engine(sandbox, words):
    sandbox.pipeline(PIPELINE).tool("good", "def run(conn): print('half', end='')")
    sandbox.tool("bad", """
        def run(conn, context):
            print('way', end='')
            for _ in context.progress(range(3)): pass
            raise ValueError('no')
    """)

    seen = ESCAPE.sub("", run_on_terminal(sandbox, *words, env={}))

    lines = seen.replace("\r", "\n").splitlines()
    assert "half" in lines and "way" in lines
    assert [line for line in lines if re.match(r"\d\d:\d\d:\d\d  good +success", line)]
    assert "Last lines of bad" not in seen  # they stand right above


def test_quiet_says_no_warning(sandbox):
    sandbox.pipeline(PIPELINE)
    sandbox.tool("good", "def run(conn, context):\n    context.log.warning('mind')\n"
                         "    context.log.error('alas')")
    err = sandbox.run("-q", "good").err
    assert "mind" not in err and "alas" in err


# --- a whole run ---

def test_a_run_tells_on_stderr_and_leaves_stdout_to_the_tools(sandbox):
    sandbox.pipeline(PIPELINE).tool("good", "def run(conn):\n    print('mine')\n    return 1500")
    sandbox.tool("bad", "def run(conn): raise ValueError('no')")

    ended = sandbox.run()

    assert ended.out == "mine\n"
    rows = summary(ended.err)
    assert re.fullmatch(r"good  success  1,500    \d\.\d\d s", rows["good"])
    assert re.fullmatch(r"bad   failed            \d\.\d\d s  ValueError: no", rows["bad"])
    assert re.search(r"^failed: 1 of 2 tools done in \d\.\d\d s \(run \S+\)$", ended.err, re.M)
