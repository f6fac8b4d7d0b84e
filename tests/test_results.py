"""A parameter that is named like a tool which this one waits for gets what that returned."""
import json
import sys

import pytest
from conftest import SQLITE

from orchestrator import UserError, run_pipeline

ETL = """
    def extract():
        return ["a", "b"]
    def transform(extract):
        return [each.upper() for each in extract]
    def load(transform, extract=None):
        print("loaded", transform, extract)
        return {"rows": len(transform)}
"""
TABLE = 'TOOL_MAP = {"extract": "etl:extract", "transform": "etl:transform", "load": "etl:load"}\n'
NEEDS = """
TOOL_MAP = {"extract": "etl:extract",
            "transform": {"module": "etl:transform", "needs": ["extract"]},
            "load": {"module": "etl:load", "needs": ["transform"]}}
"""
WAYS = {"here": [], "workers": ["--jobs", "2"], "no history": ["--no-history"]}


@pytest.fixture(params=[pytest.param(words, id=way) for way, words in WAYS.items()])
def words(request):
    return request.param


def refusal(call, *args, **keywords):
    """Return the sentence with which a run is refused."""
    with pytest.raises(UserError) as caught:
        call(*args, **keywords)
    return str(caught.value)


def test_three_functions_of_one_module_are_three_tools_in_a_table_and_no_more_code(quick, words):
    quick.pipeline(TABLE).tool("etl", ETL)
    assert quick.run("--check").code == 0
    ended = quick.run(*words)
    assert ended.code == 0 and ended.out == "loaded ['A', 'B'] ['a', 'b']\n", ended


def test_only_a_tool_that_is_waited_for_is_meant(quick, words):
    """So load, which needs transform alone, has the default of its parameter extract."""
    quick.pipeline(NEEDS).tool("etl", ETL)
    ended = quick.run(*words)
    assert ended.code == 0 and ended.out == "loaded ['A', 'B'] None\n", ended


def test_in_this_process_it_is_the_very_object(modules):
    modules(m="class Frame: pass\nframe = Frame()\ndef a(): return frame\n"
              "def b(a): return a is frame, a is not None\n")
    result = run_pipeline([], {"a": "m:a", "b": "m:b"})
    assert result.results["b"] == (True, True)


@pytest.mark.parametrize("arguments, own, seen", [
    ({}, {}, "result"), ({"a": "flag"}, {}, "flag"), ({}, {"a": "own"}, "own"),
    ({"a": "flag"}, {"a": "own"}, "own")], ids=str)
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_flag_and_an_argument_of_the_tool_go_before_the_result(
        modules, arguments, own, seen, jobs):
    modules(m="def a(): return 'result'\ndef b(a='default'): return a\ndef c(a=1): pass")
    tools = {"a": "m:a", "b": {"module": "m:b", "arguments": own}, "c": "m:c"}
    assert run_pipeline([], tools, arguments=arguments, jobs=jobs).results["b"] == seen


def test_the_names_of_the_engine_stay_its_own(modules):
    tools = dict.fromkeys(["conn", "context", "item", "period_start", "period_end"], "m:a")
    modules(m="""
        def a(): return "result"
        def z(conn, context, item=1, period_start=2, period_end=3):
            return conn, context.tool, item, period_start, period_end
    """)
    result = run_pipeline([], {**tools, "z": "m:z"})
    assert result.results["z"] == (None, "z", 1, 2, 3)


def test_a_tool_is_not_its_own_result(modules):
    modules(m="def a(): return 1\ndef b(b=2): return b\n")
    assert run_pipeline([], {"a": "m:a", "b": "m:b"}).results["b"] == 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_nothing_comes_through_kwargs(modules, jobs):
    modules(m="def a(): return 1\ndef b(**kwargs): return sorted(kwargs)\n"
              "def c(a, **kwargs): return sorted(kwargs)")
    result = run_pipeline([], {"a": "m:a", "b": "m:b", "c": "m:c"}, jobs=jobs)
    assert result.results["b"] == result.results["c"] == ["context"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_function_of_a_tool_with_items_gets_it_and_it_travels_once_for_a_job(
        modules, tmp_path, jobs):
    modules(m="""
        class Counted:
            def __setstate__(self, state):
                with open(__file__ + ".travelled", "a") as file: file.write("x")
            def __getstate__(self): return {"some": "thing"}
        def a(): return Counted()
    """, t="""
        def say(*words):
            with open(__file__ + ".said", "a") as file: print(*words, file=file)
        def setup(a): say("setup", type(a).__name__)
        def items(a): return list("xyz")
        def run(item, a): say("run", type(a).__name__)
        def check(a): say("check", type(a).__name__)
    """)
    result = run_pipeline([], {"a": "m:a", "t": {"module": "t", "needs": ["a"]}}, jobs=jobs)
    assert result.succeeded == ["a", "t"], result
    said = (tmp_path / "t.py.said").read_text().splitlines()
    assert sorted(said) == ["check Counted"] * 3 + ["run Counted"] * 3 + ["setup Counted"]
    travelled = tmp_path / "m.py.travelled"
    assert travelled.exists() == (jobs > 1)  # to the job that lists, and to each that tries
    assert jobs == 1 or len(travelled.read_text()) <= 4


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_resume_has_it_from_the_history(quick, jobs):
    quick.pipeline(NEEDS).tool("etl", ETL.replace("return [each", "1 / 0; return [each"))
    assert quick.run("--jobs", jobs).code == 1
    quick.tool("etl", ETL.replace('return ["a", "b"]', 'return ["not again"]'))
    ended = quick.run("--resume", "--jobs", jobs)
    assert ended.code == 0 and ended.out == "loaded ['A', 'B'] None\n", ended


def test_a_need_that_is_not_in_the_plan_gives_its_last_result(quick, words):
    quick.pipeline(NEEDS).tool("etl", ETL)
    quick.run()
    ended = quick.run("load", *words)
    if words == ["--no-history"]:
        assert ended.code == 2 and "asks for 'transform', but there will be no" in ended.err
    else:
        assert ended.code == 0 and ended.out == "loaded ['A', 'B'] None\n", ended


@pytest.mark.parametrize("default, status", [("", "failed"), ("=None", "success")])
def test_one_that_its_tool_has_not_left_is_its_default_or_fails_the_tool(modules, default, status):
    modules(m=f"def a(): raise ValueError\ndef b(a{default}): return a")
    tools = {"a": {"module": "m:a", "on_failure": "continue"},
             "b": {"module": "m:b", "needs": ["a"]}}
    outcome = run_pipeline([], tools).outcomes["b"]
    assert outcome.status == status
    assert ("there is no result of 'a' here" in outcome.error) == (status == "failed")


@pytest.mark.parametrize("default", ["", "=None"])
def test_one_that_can_not_travel_fails_as_context_results_does(modules, default):
    modules(m=f"def a(): return lambda: 1\ndef b(a{default}): return a")
    tools = {"a": "m:a", "b": {"module": "m:b", "isolate": True}}
    outcome = run_pipeline([], tools).outcomes["b"]
    assert outcome.error.startswith("TypeError: the result of 'a' is a function, which can not")


# --- what can not be, before anything runs ---

SAYS = "run() of load asks for 'parse', but there will be no result of that tool for load."
FIX = '"needs": ["parse"]'


def put(quick, load):
    tools = {"load": load, "parse": {"module": "parse", "needs": []}}
    quick.pipeline(f"TOOL_MAP = {tools!r}")
    quick.tool("load", "def run(parse): print(parse)")
    quick.tool("parse", "def run(): open(__file__ + '.ran', 'w')")


@pytest.mark.parametrize("words", [[], ["--plan"], ["--check"], ["--jobs", "2"]])
def test_one_that_is_not_waited_for_is_refused_with_the_need_to_say(quick, words):
    put(quick, {"module": "load", "needs": []})
    ended = quick.run(*words)
    said = ended.out + ended.err
    assert ended.code == 2 and SAYS in said and FIX in said, ended
    assert not (quick.folder / "parse.py.ran").exists()


@pytest.mark.parametrize("mode", [[], ["--plan"], ["--jobs", "2"]])
def test_one_of_a_tool_that_is_excluded_is_refused(quick, mode):
    quick.pipeline(TABLE).tool("etl", ETL)
    ended = quick.run("--exclude", "extract", *mode)
    assert ended.code == 2, ended
    assert "transform() of etl asks for 'extract', but there will be no result" in ended.err


def test_tools_that_share_a_function_are_each_looked_at(modules):
    modules(m="def a(): pass\ndef b(a): pass")
    tools = {"a": "m:a", "b": {"module": "m:b", "needs": ["a"]},
             "c": {"module": "m:b", "needs": []}}
    text = refusal(run_pipeline, [], tools)
    assert "for c." in text and "for b." not in text
    assert run_pipeline(["a", "b"], tools).succeeded == ["a", "b"]


def test_a_need_that_never_succeeded_gives_none_by_force(quick):
    put(quick, {"module": "load", "needs": ["parse"]})
    ended = quick.run("load", "--force")
    assert ended.code == 2 and SAYS in ended.err, ended
    quick.tool("load", "def run(parse=0): print(parse)")
    assert quick.run("load", "--force").out == "0\n"


def test_a_tool_before_it_in_the_plan_is_seen_though_it_is_behind_it_in_the_table(quick):
    quick.pipeline(TABLE + 'TOOL_MAP = dict(reversed(TOOL_MAP.items()))\n'
                   'STAGES = {"full": ["extract", "transform", "load"]}').tool("etl", ETL)
    assert quick.run("--check").code == 0
    assert quick.run().out == "loaded ['A', 'B'] ['a', 'b']\n"
    assert "'transform', but there will be no result" in quick.run("load", "transform").err


def test_it_is_fetched_only_where_a_function_names_it(modules, tmp_path):
    modules(m="""
        class Heavy:
            def __setstate__(self, state): open(__file__ + ".fetched", "w")
            def __getstate__(self): return {"some": "thing"}
        def a(): return Heavy()
        def b(**kwargs): return 1
        def c(b=0, conn=None): return b
    """)
    tools = {"a": "m:a", "b": "m:b", "c": {"module": "m:c", "needs": ["a"]}}
    result = run_pipeline([], tools, jobs=2)
    assert result.results["c"] == 0 and not (tmp_path / "m.py.fetched").exists()


def test_a_cached_tool_gives_the_result_that_it_had(quick):
    quick.pipeline(SQLITE + 'TOOL_MAP = {"a": {"module": "a", "cache": True}, "b": "b"}')
    quick.tool("a", "def run(): print('again'); return {'n': 1}")
    quick.tool("b", "def run(a): print(a)")
    assert quick.run().out == "again\n{'n': 1}\n"
    assert quick.run().out == "{'n': 1}\n"
    assert json.loads(quick.run("--plan", "--json").out)["steps"][0]["action"] == "cached"


def test_python_in_workers_and_here_agree_on_what_is_asked(modules):
    modules(m="import functools\ndef a(): return 1\n"
              "def wrap(f):\n    @functools.wraps(f)\n    def g(*a, **k): return f(*a, **k)\n"
              "    return g\n@wrap\ndef b(a, *, c=5): return a + c\n")
    for jobs in (1, 2):
        assert run_pipeline([], {"a": "m:a", "b": "m:b"}, jobs=jobs).results["b"] == 6
    assert "m" in sys.modules
