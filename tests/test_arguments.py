"""What is given to a run and would reach nobody is refused, before anything has run."""
import sys

import pytest

from orchestrator import Settled, UserError, run_pipeline

TOUCH = """
    from pathlib import Path
    Path(__file__).with_name("ran").touch()
"""
SINCE = "def run(conn=None, since=None):" + TOUCH
NAMES = "def run(day=None, style=None):" + TOUCH
ALL = "def run(**kwargs):" + TOUCH
ITEMS = "def items(): return ['x', 'y']\ndef run(item):" + TOUCH


@pytest.fixture
def call(modules):
    """Run tools given by their sources: call(["a"], a="source"); what is refused runs nothing."""
    def call(targets, tools=None, get_connection=None, keywords=None, **sources):
        folder = modules(**sources)
        try:
            return run_pipeline(targets, tools or {name: name for name in sources}, {},
                                get_connection, **(keywords or {}))
        except UserError as error:
            assert not (folder / "ran").exists()
            text = str(error)
            raise UserError(text) from None
    return call


def refusal(call, *args, **kwargs):
    """Return the sentence with which a call is refused."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# --- arguments from Python ---

@pytest.mark.parametrize("name, fix", [
    ("sinse", "Did you mean 'since'?"), ("Since", "Did you mean 'since'?"),
    ("nope", "Known: since, day, style")])
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_argument_that_no_tool_takes_is_refused_with_the_nearest(call, name, fix, jobs):
    text = refusal(call, ["a"], a=SINCE, b=NAMES,
                   keywords={"arguments": {name: 1}, "jobs": jobs})
    assert text == f"arguments: no tool takes {name!r}.\n  {fix}"


def test_all_that_no_tool_takes_is_told_at_once_and_what_one_takes_is_not(call):
    text = refusal(call, [], a=SINCE, keywords={"arguments": {"x1": 1, "since": 2, "y2": None}})
    assert "'x1'" in text and "'y2'" in text and "takes 'since'" not in text


def test_where_tools_take_nothing_at_all_there_is_nothing_to_mean(call):
    text = refusal(call, [], a="def run(conn, context): pass",
                   keywords={"arguments": {"conn_": 1}})
    assert text == "arguments: no tool takes 'conn_'.\n  Known: none"


@pytest.mark.parametrize("sources", [
    {"a": SINCE, "b": ALL},  # of another tool than the one that runs
    {"a": ALL},
    {"a": "def run(): pass\ndef check(nope): pass"},
    {"a": "def items(nope): return []\ndef run(item): pass"},
    {"a": SINCE, "b": "def items(): return []\ndef run(item, nope=1): pass"},
    {"a": SINCE, "b": "def run(): pass\nasync def check(*, nope=1): pass"},
    {"a": SINCE, "b": "run = print"},  # which does not tell
    {"a": SINCE, "b": "from a import *"},
    {"a": SINCE, "b": "def run(:"},  # nothing to do with this run
], ids=range(9))
def test_an_argument_that_some_tool_may_take_is_none_to_refuse(call, sources):
    result = call(["a"], keywords={"arguments": {"nope": 1}}, **sources)
    assert result.status == "success"


def test_a_tool_that_does_not_run_is_read_and_not_imported(call):
    text = refusal(call, ["a"], a=SINCE, b="raise SystemExit('imported')\n" + NAMES,
                   keywords={"arguments": {"stile": 1}})
    assert text.endswith("Did you mean 'style' or 'since'?") and "b" not in sys.modules


def test_the_other_function_of_a_module_takes_nothing_for_a_tool(call):
    source = SINCE + "\ndef other(day): pass"
    text = refusal(call, [], {"t": "a"}, a=source, keywords={"arguments": {"day": 1}})
    assert "no tool takes 'day'" in text
    assert call([], {"t": "a:other"}, a=source, keywords={"arguments": {"day": 1}}).succeeded


def test_the_two_ends_of_a_period_go_together(call):
    period = {"period_start": "2013-01-01", "period_end": "2013-01-02"}
    assert call([], a="def run(period_start): pass", keywords={"arguments": period}).succeeded
    assert "'period_end'" in refusal(call, [], b=SINCE, keywords={"arguments": period})


def test_a_resume_refuses_only_what_is_said_anew(call, tmp_path):
    home = str(tmp_path / "home")
    fails = "def run(since=0):\n    raise ValueError(since)"
    keywords = {"home": home, "arguments": {"since": 1}}
    assert call([], a=fails, keywords=keywords).failed == ["a"]
    again = {"home": home, "resume": True}
    assert "no tool takes 'sinse'" in refusal(
        call, [], a=fails, keywords={**again, "arguments": {"sinse": 1}})
    sys.modules.pop("a")
    assert call([], a="def run(): pass", keywords=again).succeeded == ["a"]  # it takes none now
    with pytest.raises(Settled):
        run_pipeline([], {"a": "a"}, {}, **again)


def test_a_tool_that_is_cached_still_takes_its_arguments(call, tmp_path):
    tools = {"a": {"module": "a", "needs": [], "cache": True}}
    keywords = {"home": str(tmp_path / "home"), "arguments": {"since": 1}}
    assert call([], tools, a=SINCE, keywords=keywords).succeeded == ["a"]
    assert call([], tools, a=SINCE, keywords=keywords).cached == ["a"]


# --- arguments from the command line ---

FLAGS = """
def get_connection():
    return None

def add_arguments(parser):
    import argparse, os
    class Set(argparse.Action):
        def __call__(self, parser, namespace, value, option=None):
            os.environ["PLACE"] = value
            setattr(namespace, self.dest, value)
    parser.add_argument("--since", default="ever")
    parser.add_argument("--stile")
    parser.add_argument("--deep", action="store_true")
    parser.add_argument("--place", action=Set)
    parser.set_defaults(extra=5)

TOOL_MAP = {"a": "a", "b": "b"}
"""


@pytest.mark.parametrize("mode", [[], ["--plan"], ["--jobs", "2"], ["--no-history"]])
@pytest.mark.parametrize("words, said", [
    (["--stile", "wide"], "--stile: no tool takes 'stile'.\n  Did you mean 'style' or 'since'?"),
    (["--stile=wide"], "--stile: no tool takes 'stile'.\n  Did you mean 'style' or 'since'?"),
    (["--deep"], "--deep: no tool takes 'deep'.\n  Known: since, day, style"),
])
def test_a_flag_that_reaches_no_tool_is_refused_where_it_is_given(quick, words, said, mode):
    quick.pipeline(FLAGS).tool("a", SINCE).tool("b", NAMES)
    ended = quick.run("a", *words, *mode)
    assert (ended.code, ended.out) == (2, "") and said in ended.err, ended
    assert not (quick.folder / "ran").exists()


@pytest.mark.parametrize("words", [
    [], ["--since", "2013"],  # defaults reach nobody, and nobody asked for them
    ["--place", "here"],  # it does something by itself
])
def test_a_flag_is_no_mistake_where_it_is_taken_or_not_given_or_does_something(quick, words):
    quick.pipeline(FLAGS).tool("a", SINCE).tool("b", NAMES)
    assert quick.run("b", *words).code == 0
    assert quick.run("--plan", *words).code == 0


def test_a_flag_that_some_tool_takes_by_its_kwargs_is_taken(quick):
    quick.pipeline(FLAGS).tool("a", SINCE).tool("b", ALL)
    assert quick.run("a", "--stile", "wide").code == 0


def test_a_flag_that_reaches_no_tool_is_refused_in_a_backfill(quick):
    quick.pipeline(FLAGS).tool("a", SINCE).tool("b", "def run(period_start):" + TOUCH)
    ended = quick.run("--deep", "--backfill", "2013-01-01..2013-01-02")
    assert ended.code == 2 and "--deep: no tool takes 'deep'." in ended.err
    assert not (quick.folder / "ran").exists()


# --- what else is given from Python ---

@pytest.mark.parametrize("keywords, says", [
    ({"item": 5}, "item is 5, not the name of an item"),
    ({"item": ["x"]}, "item is ['x'], not the name of an item"),
    ({"item": ""}, "item is '', not the name of an item"),
    ({"retry_items": {5: ["x"]}}, "retry_items is {5: ['x']}, not a list of names."),
    ({"retry_items": {"tt": ["x"]}}, "Did you mean 't'?"),
    ({"retry_items": "tt"}, "Did you mean 't'?"),
    ({"grace_s": "10s"}, "grace_s is '10s', not a number of seconds."),
    ({"wait_s": "10m"}, "wait_s is '10m', not a number of seconds."),
    ({"wait_s": -1}, "wait_s is -1, not a number of seconds."),
    ({"on_event": "print"}, "on_event is 'print', not a function"),
    ({"jobs": True}, "jobs is True, not a whole number"),
    ({"home": 5}, "home is 5, not a folder."),
    ({"home": ""}, "home is '', not a folder."),
    ({"name": 5}, "name is 5, not a name"),
    ({"resume": "", "home": "here"}, "resume is '', not True or the id of a run."),
    ({"resume": ["1"], "home": "here"}, "resume is ['1'], not True or the id of a run."),
    ({"arguments": [("item", 1)]}, "arguments is a list, not a dict."),
    ({"arguments": {"context": 1}}, "arguments: 'context' is the engine's own."),
    ({"arguments": {"conn": 1}}, "arguments: 'conn' is the engine's own."),
], ids=str)
def test_a_keyword_that_would_fail_late_or_be_passed_over_is_refused(
        call, tmp_path, monkeypatch, keywords, says):
    monkeypatch.chdir(tmp_path)
    assert says in refusal(call, ["t"], t=ITEMS, keywords=keywords)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} <= {"__pycache__"}


def test_a_home_may_be_a_path_and_a_run_a_number(call, tmp_path):
    home = tmp_path / "home"
    assert call(["t"], t="def run():\n    raise ValueError", keywords={"home": home}).failed
    sys.modules.pop("t")
    assert call([], t=ITEMS, keywords={"home": home, "resume": 1}).succeeded == ["t"]


def connect_to(path, *, mode):
    """Stand for a get_connection() that asks for more than it will get."""


@pytest.mark.parametrize("get_connection, asks", [
    (connect_to, "'path', 'mode'"), (lambda args: None, "'args'")])
def test_a_get_connection_that_asks_for_something_is_refused(call, get_connection, asks):
    text = refusal(call, [], None, get_connection, a=SINCE)
    assert text.startswith(f"get_connection() asks for {asks}, which nothing gives.\n")


@pytest.mark.parametrize("words", [[], ["--jobs", "2"]])
def test_a_get_connection_that_asks_for_something_is_refused_on_the_command_line(quick, words):
    quick.pipeline(FLAGS.replace("get_connection()", "get_connection(since)")).tool("a", SINCE)
    quick.tool("b", NAMES)
    ended = quick.run(*words)
    assert ended.code == 2 and "get_connection() asks for 'since'" in ended.err
    assert not (quick.folder / "ran").exists()


@pytest.mark.parametrize("get_connection", [
    lambda path=None, *args, **kwargs: None, type(None), "".strip], ids=range(3))
def test_a_get_connection_that_can_be_called_is_none_to_refuse(call, get_connection):
    assert call([], {"t": "a"}, get_connection, a="def run(): pass").succeeded == ["t"]
