"""What is given to a run and would reach nobody is refused, before anything has run."""
import json
import sys
from hashlib import sha256

import pytest
from conftest import SQLITE

from orchestrator import (
    Settled, Tool, UserError, describe_source, hash_imported, hash_item_source, run_pipeline,
)

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


@pytest.mark.parametrize("words", [[], ["--jobs", "2"], ["--plan"], ["--check"]])
@pytest.mark.parametrize("asks, fix", [
    ("sinse", "Did you mean 'since' or 'stile'?"), ("zzz", "declare --zzz in add_arguments()")])
def test_a_get_connection_that_asks_for_what_no_flag_is_is_refused(quick, words, asks, fix):
    quick.pipeline(FLAGS.replace("get_connection()", f"get_connection({asks}, deep=None)"))
    quick.tool("a", SINCE).tool("b", NAMES)
    ended = quick.run(*words)
    said = ended.out + ended.err
    assert ended.code == 2 and f"get_connection() asks for '{asks}', which nothing gives." in said
    assert fix in said and not (quick.folder / "ran").exists(), ended


ENVS = """
def add_arguments(parser):
    parser.add_argument("--env", default="dev")
    parser.add_argument("--other", default=1)

def get_connection(env, timeout=5, *rest, **others):
    import sqlite3
    assert (timeout, rest, others) == (5, (), {})
    return sqlite3.connect(Path(__file__).with_name(f"{env}.db"))

TOOL_MAP = {"a": {"module": "a", "arguments": {"env": "of the tool"}}, "b": "b"}
"""
WHERE = """
    def run(conn):
        print(conn.execute("PRAGMA database_list").fetchone()[2].rpartition("/")[2])
"""


@pytest.mark.parametrize("mode", [[], ["--jobs", "2"], ["--no-history"]])
@pytest.mark.parametrize("words, file", [([], "dev.db"), (["--env", "prod"], "prod.db")])
def test_get_connection_gets_the_flags_that_it_names(quick, mode, words, file):
    """Which are taken then; the arguments of a tool do not reach it: there is one for all."""
    quick.pipeline(ENVS).tool("a", WHERE.replace("(conn)", "(conn, env)")).tool("b", WHERE)
    assert quick.run("--check").code == 0
    assert quick.run("--plan", *words).code == 0
    ended = quick.run(*words, *mode)
    assert ended.code == 0 and ended.out == 2 * f"{file}\n", ended


def test_the_items_that_are_shown_are_those_of_the_connection_of_the_flags(quick):
    quick.pipeline(ENVS.replace('"arguments": {"env": "of the tool"}', '"needs": []'))
    quick.tool("a", "def items(): return ['x']\ndef run(item, conn): pass")
    quick.tool("b", "def run(other): pass")
    assert quick.run("--env", "prod").code == 0
    assert "success" in quick.run("--items", "a", "--env", "prod").out
    assert "No item of a has been tried." in quick.run("--items", "a").err
    statuses = [quick.run("--status", "--json", *words).out for words in ([], ["--env", "prod"])]
    assert statuses[0] != statuses[1]


def test_a_resume_over_another_connection_does_all_again(quick):
    quick.pipeline(ENVS.replace('"arguments": {"env": "of the tool"}', '"needs": []'))
    quick.tool("a", WHERE).tool("b", WHERE + "        if not __import__('os').path.exists("
                                             "'ready'): raise ValueError")
    assert quick.run().code == 1
    (quick.folder / "ready").touch()
    ended = quick.run("--resume", "--env", "prod")
    assert ended.code == 0 and ended.out == "prod.db\nprod.db\n", ended


def connect_by(env, kind="memory"):
    """Return what tells what it got."""
    class Told:
        got = env, kind
    return Told()


@pytest.mark.parametrize("jobs", [1, 2])
def test_get_connection_gets_arguments_from_python_that_it_names(call, jobs):
    keywords = {"arguments": {"env": "prod", "kind": "file"}, "jobs": jobs}
    result = call([], None, connect_by, keywords, a="def run(conn): return list(conn.got)")
    assert result.results["a"] == ["prod", "file"]
    text = refusal(call, [], None, connect_by, {"arguments": {"evn": 1}}, a=SINCE)
    assert text == "get_connection() asks for 'env', which nothing gives.\n  Did you mean 'evn'?"


def test_a_flag_that_neither_a_tool_nor_get_connection_takes_is_refused_with_the_nearest(call):
    text = refusal(call, [], None, connect_by, {"arguments": {"env": 1, "kidn": 1}}, a=SINCE)
    assert text == "arguments: no tool takes 'kidn'.\n  Did you mean 'kind'?"


@pytest.mark.parametrize("get_connection", [
    lambda path=None, *args, **kwargs: None, type(None), "".strip], ids=range(3))
def test_a_get_connection_that_can_be_called_is_none_to_refuse(call, get_connection):
    assert call([], {"t": "a"}, get_connection, a="def run(): pass").succeeded == ["t"]


# --- the arguments of a tool ---

OWN = """
    def run(conn=None, year=0, style=None, **kwargs):
        print("ran", year, style, *sorted(kwargs))
        return {"year": year, "style": style}
"""
FULL = """
TOOL_MAP = {"a": {"module": "a", "arguments": {"year": 2013, "style": {"wide": [1, None]}}},
            "b": "a"}
def add_arguments(parser):
    parser.add_argument("--year", type=int, default=1)
    parser.add_argument("--other")
"""


@pytest.mark.parametrize("words", [[], ["--jobs", "2"], ["--no-history"]])
def test_the_arguments_of_a_tool_win_over_flags_and_reach_it_alone(quick, words):
    quick.pipeline(FULL).tool("a", OWN)
    ended = quick.run("--year", "7", *words)
    assert ended.code == 0, ended
    assert sorted(line for line in ended.out.splitlines() if line.startswith("ran")) == [
        "ran 2013 {'wide': [1, None]} context other", "ran 7 None context other"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_they_reach_every_function_of_a_tool(call, tmp_path, jobs):
    source = """
        from pathlib import Path
        def say(*words): print(*words, file=open(Path(__file__).with_name("said"), "a"))
        def setup(year): say("setup", year)
        def items(year): say("items", year); return ["x"]
        def run(item, year): say("run", year)
        def check(year, item): say("check", year)
    """
    result = call([], {"t": {"module": "t", "arguments": {"year": 5}}}, t=source,
                  keywords={"jobs": jobs, "home": tmp_path / "home"})
    assert result.succeeded == ["t"], result
    assert {*(tmp_path / "said").read_text().splitlines()} \
        == {"setup 5", "items 5", "run 5", "check 5"}


def test_a_tool_that_changes_its_arguments_has_them_again_in_its_next_try(call):
    source = """
        def run(years):
            if years.pop() and not hasattr(run, "again"):
                run.again = True
                raise ValueError
            return list(years)
    """
    tools = {"t": {"module": "t", "retries": 1, "retry_delay": 0, "arguments": {"years": [1, 2]}}}
    assert call([], tools, t=source).results["t"] == [1]


def test_a_sweep_is_a_comprehension_and_imports_its_module_once(call, tmp_path):
    source = """
        open(__file__ + ".imported", "a").write("x")
        def run(seed, data): return seed, data
    """
    tools = {f"train_{data}_{seed}": {"module": "train", "arguments": {"seed": seed, "data": data}}
             for seed in range(50) for data in ("small", "large")}
    result = call([], tools, train=source)
    assert len(result.succeeded) == 100 and result.results["train_large_49"] == (49, "large")
    assert (tmp_path / "train.py.imported").read_text() == "x"


REFUSED = ("TOOL_MAP['t']: 'arguments' has 'yaer', which no function of a takes.\n"
           "  Did you mean 'year'?")


@pytest.mark.parametrize("words", [[], ["--plan"], ["--check"], ["--jobs", "2"]])
def test_an_argument_that_no_function_of_its_tool_takes_is_refused_with_the_nearest(quick, words):
    quick.pipeline("TOOL_MAP = {'b': 'b', 't': {'module': 'a', 'arguments': {'yaer': 1}}}")
    quick.tool("a", "def run(conn, year=0): pass").tool("b", "def run(yaer=1):" + TOUCH)
    ended = quick.run(*words)
    said = ended.out + ended.err
    assert ended.code == 2 and not (quick.folder / "ran").exists()
    assert REFUSED.partition("\n")[0] in said and REFUSED.partition("\n")[2] in said, ended


@pytest.mark.parametrize("source", [
    "def run(**kwargs): pass", "def run(): pass\ndef check(yaer): pass",
    "def run(): pass\ndef setup(*, yaer=1): pass", "from b import *"])
def test_one_that_some_function_of_its_tool_may_take_is_none_to_refuse(call, source):
    tools = {"t": {"module": "a", "arguments": {"yaer": 1}}}
    assert call([], tools, a=source, b="def run(yaer): pass").succeeded


def test_tools_that_share_a_function_are_each_checked_with_their_own(call):
    tools = {"t": {"module": "a", "arguments": {"year": 1}}, "u": "a",
             "v": {"module": "a", "arguments": {"yea": 1}}}
    text = refusal(call, [], tools, a="def run(year):" + TOUCH)
    assert "run() of a asks for 'year', which nothing gives." in text
    assert "TOOL_MAP['v']: 'arguments' has 'yea'" in text or "TOOL_MAP['v']: run()" in text


def test_a_flag_that_all_tools_have_of_their_own_is_taken_by_none(quick):
    quick.pipeline(FULL.replace('"b": "a"', '"b": "b"'))
    quick.tool("a", "def run(year, style):" + TOUCH).tool("b", "def run(other=1): pass")
    ended = quick.run("--year", "3")
    assert ended.code == 2 and "--year: no tool takes 'year'." in ended.err
    assert not (quick.folder / "ran").exists()


def test_a_resume_with_another_flag_leaves_a_tool_done_that_has_it_of_its_own(quick):
    quick.pipeline(FULL.replace('"b": "a"', '"b": "b", "c": "c"'))
    quick.tool("a", OWN.replace(", **kwargs", "").replace("*sorted(kwargs)", "")).tool("b", OWN)
    quick.tool("c", "def run(year):\n    if year == 1: raise ValueError")
    assert quick.run().code == 1
    ended = quick.run("--resume", "--year", "2")
    assert ended.code == 0 and ended.out.splitlines() == ["ran 2 None context other"], ended


# --- what they change, and where they are told ---

CACHED = """
TOOL_MAP = {"a": {"module": "a", "cache": True, "arguments": ARGUMENTS}, "b": "a"}
"""


def test_other_arguments_of_a_tool_are_a_change_of_it_and_of_nobody_else(quick):
    quick.tool("a", "def run(x=0, y=0): pass")
    for arguments, status in [('{"x": 1, "y": 2}', "success"), ('{"y": 2, "x": 1}', "cached"),
                              ('{"x": 2, "y": 2}', "success"), ("{}", "success"), ("{}", "cached")]:
        quick.pipeline(CACHED.replace("ARGUMENTS", arguments))
        plan = quick.run("--plan").out
        assert ("its options changed (arguments) since run" in plan) \
            == (status == "success" and quick.run("--status").code == 0), (arguments, plan)
        ended = quick.run("a")
        assert f"a  {status}" in ended.err, (arguments, ended)


def test_a_tool_without_arguments_has_the_fingerprints_that_it_had_before_there_were_any():
    tool = Tool("t", "json")
    assert describe_source(tool, "f")["options"] == {}
    other = tool._replace(arguments={"x": 1})
    assert hash_item_source(tool, "") != hash_item_source(other, "")
    what = "json", "run", False, hash_imported("json")
    assert hash_item_source(tool, "") == sha256(repr(what).encode()).hexdigest()[:16]


def test_items_that_were_given_up_come_back_when_the_arguments_change(quick):
    quick.tool("a", """
        def items(): return ["x"]
        def run(item, limit):
            if limit < 2: raise ValueError("too low")
    """)

    def run(limit):
        quick.pipeline(SQLITE + f"TOOL_MAP = {{'a': {{'module': 'a', 'retries': 1, "
                       f"'retry_delay': 0, 'arguments': {{'limit': {limit}}}}}}}")
        return quick.run()

    assert run(1).code == 1
    assert "given up before" in run(1).err
    ended = run(2)
    assert ended.code == 0 and "1 item done" in ended.err, ended


def test_plan_and_history_tell_the_arguments_of_each_tool(quick):
    quick.pipeline(FULL).tool("a", OWN)
    own = {"year": 2013, "style": {"wide": [1, None]}}
    steps = json.loads(quick.run("--plan", "--json").out)["steps"]
    assert [step["arguments"] for step in steps] == [own, {}]
    quick.run()
    quick.pipeline(FULL.replace("2013", "2014"))  # what was so then is told
    run, = json.loads(quick.run("--history", "1", "--json").out)["runs"]
    assert [tool["arguments"] for tool in run["tools"]] == [own, {}]
    assert run["arguments"] == {"year": 1, "other": None}
    text = quick.run("--history", "1").out
    assert '{"style": {"wide": [1, null]}, "year": 2013}' in text
    quick.run("b")
    assert "arguments  note" not in quick.run("--history", "2").out


def test_the_arguments_of_a_tool_that_failed_are_told_too(quick):
    quick.pipeline("TOOL_MAP = {'a': {'module': 'a', 'arguments': {'day': 'monday'}}}")
    quick.tool("a", "def run(day): raise ValueError")
    assert quick.run().code == 1
    run, = json.loads(quick.run("--history", "1", "--json").out)["runs"]
    assert run["tools"][0]["arguments"] == {"day": "monday"}


def test_last_success_of_a_tool_is_found_whatever_its_own_arguments(quick):
    source = "def run(context, x): print('last', context.last_success)"
    for x in (1, 2):
        quick.pipeline(f"TOOL_MAP = {{'a': {{'module': 'a', 'arguments': {{'x': {x}}}}}}}")
        ended = quick.tool("a", source).run()
        assert ended.out.startswith("last None") == (x == 1), ended
