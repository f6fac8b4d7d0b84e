"""The user's tables: what is accepted, and the sentence for each mistake in them."""
import ast
import copy
import math
import random
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import count_steps

from orchestrator import OPTIONS, UserError, load_pipeline

TOOLS = {"fetch": "tools.fetch", "parse": "tools.parse", "render": "tools.render"}

MARKED = '''
TOOL_MAP = {"fetch": "fetch", "parse": "parse"}
STAGES = {"ingest": ["fetch", "parse"], "nothing": []}

def get_connection():
    Path(__file__).with_name("opened").touch()
'''
MARKING = '''
from pathlib import Path
Path(__file__).with_name("imported").touch()

def run(conn, **kwargs):
    Path(__file__).with_name("run").touch()
'''


def refusal(*tables, **more):
    """Return the error that load_pipeline() raises."""
    with pytest.raises(UserError) as caught:
        load_pipeline(*tables, **more)
    return caught.value


def has_one_sentence(error, *parts):
    """Return whether an error is one sentence and one way out, with these words in it."""
    return all(part in str(error) for part in parts) and error.fix.strip() != "" \
        and "\n" not in error.problem and error.problem.endswith(".")


# --- what is accepted ---

def test_a_module_path_is_a_tool_whose_function_is_run():
    tool = load_pipeline({"fetch": "tools.fetch"}).tools["fetch"]

    assert (tool.name, tool.module, tool.function, tool.commits) \
        == ("fetch", "tools.fetch", "run", False)


@pytest.mark.parametrize("value", ["tools.files:load", {"module": "tools.files:load"}])
def test_a_colon_names_another_function_than_run(value):
    tool = load_pipeline({"fetch": value}).tools["fetch"]

    assert (tool.module, tool.function) == ("tools.files", "load")


@pytest.mark.parametrize("commits", [True, False])
def test_the_options_of_a_tool_are_taken_from_its_dict(commits):
    tool = load_pipeline({"fetch": {"module": "tools.fetch", "commits": commits}}).tools["fetch"]

    assert (tool.module, tool.commits) == ("tools.fetch", commits)


@pytest.mark.parametrize("members", [["fetch", "parse"], ("fetch", "parse"),
                                     {"tools": ["fetch", "parse"]}])
def test_a_stage_is_a_list_or_a_dict_with_tools(members):
    assert load_pipeline(TOOLS, {"ingest": members}).stages["ingest"].tools == ("fetch", "parse")


def test_tools_and_stages_keep_the_order_of_the_tables():
    tools = {name: f"tools.{name}" for name in "zebra apple mango".split()}
    pipeline = load_pipeline(tools, {"second": ["first"], "first": ["apple"]})

    assert list(pipeline.tools) == ["zebra", "apple", "mango"]
    assert list(pipeline.stages) == ["second", "first"]


def test_a_stage_comes_to_the_tools_of_its_stages_each_once_at_its_first_place():
    pipeline = load_pipeline(TOOLS, {
        "late": ["render", "early", "parse"],
        "early": ["fetch", "render"],
        "all": ["parse", "late", "early"],
    })

    assert pipeline.stages["late"].tools == ("render", "fetch", "parse")
    assert pipeline.stages["all"].tools == ("parse", "render", "fetch")


def test_a_name_that_is_both_is_the_tool_inside_its_own_stage_and_the_stage_in_others():
    pipeline = load_pipeline(TOOLS, {"render": ["parse", "render"], "all": ["fetch", "render"]})

    assert pipeline.stages["render"].tools == ("parse", "render")
    assert pipeline.stages["all"].tools == ("fetch", "parse", "render")


def test_stages_may_be_nested_deeper_than_python_recurses():
    stages = {f"s{i}": [f"s{i + 1}"] for i in range(3000)}

    pipeline = load_pipeline(TOOLS, {**stages, "s3000": ["parse"]})

    assert pipeline.stages["s0"].tools == ("parse",)


def test_without_get_connection_the_connection_is_none():
    assert load_pipeline(TOOLS).get_connection() is None


def test_get_connection_is_kept_and_not_called_when_the_tables_are_read():
    calls = []

    def get_connection():
        calls.append(1)
        return "conn"

    pipeline = load_pipeline(TOOLS, {}, get_connection)

    assert calls == []
    assert pipeline.get_connection() == "conn"


def test_the_tables_are_not_changed_by_reading_them():
    tools = {"fetch": {"module": "tools.fetch:load", "commits": True}, "parse": "tools.parse"}
    stages = {"ingest": {"tools": ["fetch", "parse"]}}
    before = copy.deepcopy((tools, stages))

    load_pipeline(tools, stages)

    assert (tools, stages) == before


# --- what is refused ---

@pytest.mark.parametrize("table, parts", [
    (["fetch"], ("TOOL_MAP", "a list", "dict")),
    ("fetch", ("TOOL_MAP", "a str", "dict")),
    ({}, ("TOOL_MAP is empty", "Add a tool")),
])
def test_a_tool_map_that_is_no_table_of_tools_is_refused(table, parts):
    assert has_one_sentence(refusal(table), *parts)


def test_a_missing_tool_map_is_refused():
    assert has_one_sentence(refusal(None), "TOOL_MAP")


@pytest.mark.parametrize("stages", [["ingest"], "ingest", 5, {"ingest"}])
def test_stages_that_are_no_dict_are_refused(stages):
    assert has_one_sentence(refusal(TOOLS, stages), "STAGES", "not a dict")


def test_a_connection_in_the_place_of_get_connection_is_refused():
    assert has_one_sentence(refusal(TOOLS, {}, "data.db"), "get_connection", "'data.db'",
                            "def get_connection():")


@pytest.mark.parametrize("name", ["-fetch", "--list", "+fetch", "fetch+", "-", "+", "",
                                  " fetch", "fetch "])
@pytest.mark.parametrize("table", ["TOOL_MAP", "STAGES"])
def test_a_name_that_the_command_line_could_not_tell_from_a_flag_is_refused(table, name):
    tools = {**TOOLS, name: "tools.x"} if table == "TOOL_MAP" else TOOLS
    stages = {name: ["fetch"]} if table == "STAGES" else {}

    assert has_one_sentence(refusal(tools, stages), table, repr(name), "command line")


@pytest.mark.parametrize("name", ["fe\ntch", "\x1b[31m", "\u202etef", "nul\0", "\ud800"])
def test_a_name_that_can_not_be_shown_is_refused_as_such(name):
    assert has_one_sentence(refusal({**TOOLS, name: "tools.x"}), "TOOL_MAP", repr(name),
                            "has letters that can not be shown")


@pytest.mark.parametrize("name", ["fetch-all", "a+b", "fetch all", "été", "2013", "a.b", "x"])
def test_a_name_with_such_signs_inside_is_accepted(name):
    assert list(load_pipeline({name: "tools.x"}, {"stage " + name: [name]}).tools) == [name]


@pytest.mark.parametrize("name", [1, None, ("a",)])
@pytest.mark.parametrize("table", ["TOOL_MAP", "STAGES"])
def test_a_name_that_is_not_text_is_refused(table, name):
    tools = {**TOOLS, name: "tools.x"} if table == "TOOL_MAP" else TOOLS
    stages = {name: ["fetch"]} if table == "STAGES" else {}

    assert has_one_sentence(refusal(tools, stages), table, repr(name), "not text")


@pytest.mark.parametrize("value, kind", [(None, "a NoneType"), (5, "an int"), (["x"], "a list"),
                                         (math, "a module"), (len, "a builtin_function")])
def test_a_tool_that_is_neither_a_path_nor_options_is_refused(value, kind):
    assert has_one_sentence(refusal({"fetch": value}), "TOOL_MAP['fetch']", kind,
                            '"fetch": "folder.module"')


@pytest.mark.parametrize("path", ["tools/fetch", "tools/fetch.py", "tools\\fetch", "tools..fetch",
                                  ".fetch", "tools.", "", "tools fetch", "python a.py",
                                  "tools.fetch:", "tools.fetch:a:b", "tools.fetch:a.b", ":run",
                                  "tools.fetch:2a", "a.b\n", "a\0.b", "C:\\a"])
@pytest.mark.parametrize("make", [lambda path: path, lambda path: {"module": path}])
def test_a_module_path_without_dots_between_names_is_refused(make, path):
    assert has_one_sentence(refusal({"fetch": make(path)}), "TOOL_MAP['fetch']",
                            "a module path with dots", repr(path), '"folder.module"')


@pytest.mark.parametrize("path", ["pipeline.02_build", "my-scripts.go", "2024.load", "a.é",
                                  "a.class", "2024.my-scripts:go"])
def test_any_name_that_python_can_import_is_a_module(path):
    tool = load_pipeline({"a": path}).tools["a"]
    assert (tool.module, tool.function) == (path.partition(":")[0], path.partition(":")[2] or "run")


@pytest.mark.parametrize("option, value", [("module", 5), ("module", None), ("commits", "yes"),
                                           ("commits", 1), ("commits", None)])
def test_an_option_of_the_wrong_type_is_refused_with_what_it_must_be(option, value):
    options = {"module": "tools.fetch", option: value}

    assert has_one_sentence(refusal({"fetch": options}), f"TOOL_MAP['fetch']: {option!r} must be",
                            f"not {value!r}", f'Write "{option}":')


@pytest.mark.parametrize("key, fix", [("comits", "Did you mean 'commits'?"),
                                      ("modul", "Did you mean 'module'?"), ("zzz", "Known: "),
                                      (7, "Known: ")])
def test_an_unknown_option_of_a_tool_is_answered_with_the_nearest(key, fix):
    error = refusal({"fetch": {"module": "tools.fetch", key: 1}})

    assert has_one_sentence(error, f"TOOL_MAP['fetch']: there is no option {key!r}", fix)


def test_options_without_a_module_are_refused():
    assert has_one_sentence(refusal({"fetch": {"commits": True}}), "TOOL_MAP['fetch']",
                            "no module", '"module"')


@pytest.mark.parametrize("members", ["fetch", 5, None, {"fetch"}, [1], ["fetch", None], [["fetch"]],
                                     {"tools": "fetch"}, {"tools": None}])
def test_a_stage_that_is_no_list_of_names_is_refused(members):
    assert has_one_sentence(refusal(TOOLS, {"ingest": members}), "STAGES['ingest']",
                            "not a list of names", '"ingest": [')


def test_an_unknown_option_of_a_stage_is_answered_with_the_nearest():
    assert has_one_sentence(refusal(TOOLS, {"ingest": {"tols": ["fetch"]}}),
                            "STAGES['ingest']", "'tols'", "Did you mean 'tools'?")


@pytest.mark.parametrize("member, fix", [("fetc", "Did you mean 'fetch'?"),
                                         ("ingset", "Did you mean 'ingest'?")])
def test_an_unknown_name_in_a_stage_is_answered_with_the_nearest_tool_or_stage(member, fix):
    error = refusal(TOOLS, {"ingest": ["fetch"], "full": ["parse", member]})

    assert has_one_sentence(error, "STAGES['full']", repr(member), fix)


@pytest.mark.parametrize("stages, paths", [
    ({"a": ["fetch", "a"]}, ["a -> a"]),
    ({"a": ["b"], "b": ["fetch", "a"]}, ["a -> b -> a", "b -> a -> b"]),
    ({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]},
     ["a -> b -> c -> a", "b -> c -> a -> b", "c -> a -> b -> c"]),
    ({"render": ["x"], "x": ["render"]}, ["render -> x -> render", "x -> render -> x"]),
])
def test_a_stage_that_contains_itself_is_reported_as_a_path(stages, paths):
    error = refusal(TOOLS, stages)

    assert has_one_sentence(error, "STAGES")
    assert any(f": {path}." in error.problem for path in paths)


@pytest.mark.parametrize("members", [["parse"], ["ingest"], []])
def test_a_stage_with_the_name_of_a_tool_that_is_not_in_it_is_refused(members):
    error = refusal(TOOLS, {"ingest": ["fetch"], "render": members, "full": ["render"]})

    assert has_one_sentence(error, "STAGES['render']: a tool has this name too", "Rename")
    error = refusal(TOOLS, {"render": ["rendr"]})
    assert has_one_sentence(error, "no tool or stage 'rendr'")


def test_all_mistakes_are_reported_at_once_each_with_its_way_out():
    error = str(refusal(
        {"fetch": "tools/fetch", "parse": {"modul": "tools.parse"}, "-x": "tools.x",
         "good": "tools.good"},
        {"ingest": "fetch", "+y": ["good"]}))

    for part in ("TOOL_MAP['fetch']", "TOOL_MAP['parse']", "'-x'", "STAGES['ingest']", "'+y'"):
        assert part in error
    assert len([line for line in error.splitlines() if line.startswith("  ")]) == 5


def test_unknown_names_in_stages_are_reported_together_with_mistakes_in_tools():
    error = str(refusal({"fetch": "tools/fetch", "parse": "tools.parse"},
                        {"ingest": ["fetch", "pars"], "full": ["ingst"]}))

    assert "TOOL_MAP['fetch']" in error
    assert "'pars'" in error
    assert "'ingst'" in error
    # A tool whose row is wrong is known all the same.
    assert "no tool or stage 'fetch'" not in error


def test_all_unknown_names_of_all_stages_are_reported():
    error = str(refusal(TOOLS, {"a": ["fetc", "parse", "pars"], "b": ["rendr"]}))

    assert error.count("Did you mean") == 3


# --- options of a tool ---

def read(**options):
    """Return a tool with some options, as it was read."""
    limits = {"db": 4, "gpu": 1}
    return load_pipeline({"fetch": {"module": "tools.fetch", **options}, "a": "m", "b": "m"},
                         limits=limits).tools["fetch"]


def refused(key, value, **more):
    """Return the error for an option with a wrong value."""
    return refusal({"fetch": {"module": "tools.fetch", key: value}, "a": "m", "b": "m"}, **more)


@pytest.mark.parametrize("field, value", [
    ("needs", None), ("reads", ()), ("writes", ()), ("retries", 0), ("retry_delay_s", 30),
    ("retry_factor", 2), ("retry_max_delay_s", 3600), ("retry_jitter", 0), ("timeout_s", None),
    ("memory_bytes", None), ("isolate", False), ("on_failure", "skip"), ("when", "ready"),
    ("uses", ()), ("estimate_s", None), ("commits", False),
])
@pytest.mark.parametrize("row", ["tools.fetch", {"module": "tools.fetch"}])
def test_an_option_that_is_not_given_has_its_default(row, field, value):
    assert getattr(load_pipeline({"fetch": row}).tools["fetch"], field) == value


PLAIN = {"text": "a b", "café": 1, "x": 0.5, "on": True, "off": False, "none": None,
         "list": [1, [2, {"deep": None}]], "table": {"any key": {}}, "_": -1}


@pytest.mark.parametrize("key, given, field, value", [
    ("needs", [], "needs", ()),
    ("needs", ["a", "b"], "needs", ("a", "b")),
    ("needs", ("b", "a"), "needs", ("b", "a")),
    ("needs", "a", "needs", ("a",)),
    ("needs", ["a", "b", "a"], "needs", ("a", "b")),
    ("reads", ["x"], "reads", ("x",)),
    ("reads", [], "reads", ()),
    ("reads", "a table.csv", "reads", ("a table.csv",)),
    ("writes", ["x", "y"], "writes", ("x", "y")),
    ("writes", ["x", "a/{item}", "{stem}.b", "{}"], "outputs", ("a/{item}", "{stem}.b")),
    ("retries", 0, "retries", 0),
    ("retries", 9999, "retries", 9999),
    ("retry_delay", "10m", "retry_delay_s", 600),
    ("retry_delay", 0, "retry_delay_s", 0),
    ("retry_factor", 1, "retry_factor", 1),
    ("retry_factor", 1.5, "retry_factor", 1.5),
    ("retry_max_delay", "24h", "retry_max_delay_s", 86_400),
    ("retry_jitter", 0, "retry_jitter", 0),
    ("retry_jitter", 0.5, "retry_jitter", 0.5),
    ("retry_jitter", 1, "retry_jitter", 1),
    ("timeout", "1h30m", "timeout_s", 5400),
    ("timeout", 0.5, "timeout_s", 0.5),
    ("memory", "512MB", "memory_bytes", 512 * 2**20),
    ("memory", 10**9, "memory_bytes", 10**9),
    ("isolate", True, "isolate", True),
    ("isolate", False, "isolate", False),
    ("on_failure", "skip", "on_failure", "skip"),
    ("on_failure", "stop", "on_failure", "stop"),
    ("on_failure", "continue", "on_failure", "continue"),
    ("when", "always", "when", "always"),
    ("when", "ready", "when", "ready"),
    ("uses", {}, "uses", ()),
    ("uses", {"gpu": 1, "db": 4}, "uses", (("db", 4), ("gpu", 1))),
    ("estimate", "7d", "estimate_s", 604_800),
    ("estimate", 0, "estimate_s", 0),
    ("cache", True, "cache_s", math.inf),
    ("cache", False, "cache_s", None),
    ("cache", "24h", "cache_s", 86_400),
    ("fresh_for", "2d", "fresh_for_s", 172_800),
    ("items", "raw/**/*.[ct]sv", "items", "raw/**/*.[ct]sv"),
    ("arguments", {}, "arguments", {}),
    ("arguments", PLAIN, "arguments", PLAIN),
])
def test_an_option_is_read_as_what_it_says(key, given, field, value):
    assert getattr(read(**{key: given}), field) == value


NO_NAMES = [None, 5, True, "", [""], ["a", ""], [None], [["a"]], [1], {"a"}, {"a": 1}, b"a"]
NO_DURATION = ["90", "soon", "-5s", "", "1:30", -1, math.nan, math.inf, -math.inf, True, False,
               None, ["90s"], "1.2.3s", "nan", 10**400]
NO_FLAG = [1, 0, "yes", "True", None, []]
NO_COUNT = [-1, 1.0, 1.5, "3", None, True, False, math.inf, math.nan, []]
WRONG = {
    "command": ("a text that is not empty, or a list of texts",
                ["", " ", 3, None, True, {}, [], [""], ["a", 1], {"a"}]),
    "needs": ("a list of names", NO_NAMES),
    "reads": ("a list of names", NO_NAMES),
    "writes": ("a list of names, with no braces but {item} and {stem}", [
        *NO_NAMES, "{a}", ["out/{stem}.{x}"], ["x", "{items}"]]),
    "retries": ("a whole number from 0 on", NO_COUNT),
    "retry_delay": ("a number of seconds or a text", NO_DURATION),
    "retry_max_delay": ("a number of seconds or a text", NO_DURATION),
    "retry_factor": ("a number from 1 on", [0, 0.99, -2, "2", None, True, math.nan, math.inf]),
    "retry_jitter": ("a number from 0 to 1", [-0.1, 1.01, "0.5", "50%", None, True, math.nan]),
    "timeout": ("a number of seconds or a text", [*NO_DURATION, 0, 0.0, "0s", "0m"]),
    "memory": ("a number of bytes or a text", ["512", "2 gigs", "-2GB", "", 0, -1, 1.5, math.nan,
                                               math.inf, True, None, [], "0MB", 10**30,
                                               "99999999TB"]),
    "isolate": ("True or False", NO_FLAG),
    "commits": ("True or False", NO_FLAG),
    "on_failure": ('"skip", "stop" or "continue"', ["Skip", "ignore", "", None, True, ["skip"]]),
    "when": ('"ready" or "always"', ["never", "Always", "", None, True, ["always"]]),
    "uses": ("a dict of whole numbers from 1 on", [
        "db", ["db"], 1, None, True, {"db"}, {"db": 0}, {"db": -1}, {"db": 1.0}, {"db": "1"},
        {"db": True}, {"db": None}, {1: 1}, {None: 1}]),
    "estimate": ("a number of seconds or a text", NO_DURATION),
    "cache": ("True, False or a duration", ["24", "ever", "", 0, "0s", -1, None, [], math.inf]),
    "fresh_for": ("a number of seconds or a text", [*NO_DURATION, 0, "0s"]),
    "each": ("the name of a tool with items", ["", None, True, 1, ["fetch"], {"fetch"}]),
    "items": ("a pattern of files, without braces", [
        "", None, True, 1, ["*.csv"], "raw/{item}.csv", "{", "}"]),
    "arguments": ("a dict of plain data", [
        None, [], "year=1", 5, [("year", 1)], {"year": (1, 2)}, {"year": {1: 2}}, {"year": b"1"},
        {"year": {1}}, {"year": math.nan}, {"year": math.inf}, {"year": object()}, {"year": len},
        {"year": [Path("a")]}, {1: 1}, {"": 1}, {"a b": 1}, {"a-b": 1}, {"2a": 1}, {"a.b": 1},
        {"conn": 1}, {"context": 1}, {"item": 1}]),
    "batch": ("a whole number from 1 on", [0, -1, 1.0, "500", None, True, math.inf]),
}


@pytest.mark.parametrize("key, value", [
    pytest.param(key, value, id=f"{key}-{str(value)[:12]!r}")
    for key, (_, values) in WRONG.items() for value in values])
def test_a_wrong_value_of_an_option_is_refused_with_what_it_must_be_and_an_example(key, value):
    error = refused(key, value, limits={"db": 4})

    assert has_one_sentence(error, f"TOOL_MAP['fetch']: {key!r} must be {WRONG[key][0]}",
                            f'Write "{key}": ')
    assert str(value)[:50] in error.problem


def test_arguments_of_a_tool_are_a_copy_that_nobody_changes():
    row = {"module": "m", "arguments": {"years": [1]}}
    pipeline = load_pipeline({"a": row})
    row["arguments"]["years"].append(2)
    assert pipeline.tools["a"].arguments == {"years": [1]}


def test_every_option_has_values_that_are_refused():
    assert {*WRONG, "module"} == set(OPTIONS)


@pytest.mark.parametrize("key", sorted(WRONG))
def test_the_example_that_a_refusal_gives_is_itself_accepted(key):
    error = refused(key, WRONG[key][1][0] if key != "retry_factor" else 0, limits={"db": 1})
    example = ast.literal_eval("{" + error.fix.partition("Write ")[2].rstrip(".") + "}")

    row = {**({} if key == "command" else {"module": "tools.fetch"}), **example}
    tools = {"fetch": "m", "validate": "m", "x": row} if key in ("needs", "each") else {"x": row}

    load_pipeline(tools, limits={"db": 1})


@pytest.mark.parametrize("typed, fix", [
    ("need", "'needs'"), ("retry", "'retries'"), ("timout", "'timeout'"), ("use", "'uses'"),
    ("onfailure", "'on_failure'"), ("retry_max", "'retry_max_delay'"), ("isolated", "'isolate'"),
    ("estimated", "'estimate'"), ("write", "'writes'"), ("read", "'reads'"), ("wen", "'when'"),
])
def test_a_mistyped_option_is_answered_with_the_one_that_was_meant(typed, fix):
    error = refused(typed, 1)

    assert has_one_sentence(error, f"there is no option {typed!r}", "Did you mean", fix)


# --- LIMITS and uses ---

def test_limits_are_taken_as_they_are_and_may_be_missing():
    assert load_pipeline(TOOLS, limits={"db": 2, "gpu": 1}).limits == {"db": 2, "gpu": 1}
    assert load_pipeline(TOOLS).limits == load_pipeline(TOOLS, limits={}).limits == {}


@pytest.mark.parametrize("limits", [["db"], "db", 5, {"db"}])
def test_limits_that_are_no_dict_are_refused(limits):
    assert has_one_sentence(refusal(TOOLS, limits=limits), "LIMITS", "not a dict")


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, "2", None, True, [], math.inf, math.nan])
def test_a_limit_that_is_no_whole_number_from_one_on_is_refused(value):
    assert has_one_sentence(refusal(TOOLS, limits={"db": value}), f"LIMITS['db'] is {value!r}",
                            '"db": 2')


@pytest.mark.parametrize("name", ["", "-db", "+db", "db+", " db", 5, None])
def test_a_limit_has_a_name_as_tools_have(name):
    assert has_one_sentence(refusal(TOOLS, limits={name: 1}), "LIMITS")


@pytest.mark.parametrize("limits, fix", [({"dbs": 2}, "Did you mean 'dbs'?"), ({"z": 1}, "Known"),
                                         ({}, 'Write LIMITS = {"db": 1}'),
                                         (None, 'Write LIMITS = {"db": 1}')])
def test_a_use_of_what_limits_do_not_have_is_refused(limits, fix):
    error = refused("uses", {"db": 1}, limits=limits)

    assert has_one_sentence(error, "TOOL_MAP['fetch']: uses 'db'", "LIMITS does not have", fix)


def test_a_use_of_more_than_there_is_is_refused_because_it_could_never_start():
    error = refused("uses", {"db": 3}, limits={"db": 2})

    assert has_one_sentence(error, "TOOL_MAP['fetch']: uses 'db' 3 times", "only 2")


def test_all_wrong_uses_are_reported():
    error = refusal({"a": {"module": "m", "uses": {"db": 3, "disk": 1}},
                     "b": {"module": "m", "uses": {"gpu": 1}}}, limits={"db": 2})

    assert [line for line in str(error).splitlines() if line[0] != " "] == [
        "TOOL_MAP['a']: uses 'db' 3 times, but LIMITS has only 2.",
        "TOOL_MAP['a']: uses 'disk', which LIMITS does not have.",
        "TOOL_MAP['b']: uses 'gpu', which LIMITS does not have."]


def test_a_limit_with_a_wrong_value_is_known_all_the_same():
    error = str(refused("uses", {"db": 1}, limits={"db": 0}))

    assert "LIMITS['db'] is 0" in error
    assert "which LIMITS does not have" not in error


# --- needs ---

def needs(**rows):
    """Return the needs of tools, each given by its options."""
    return load_pipeline({name: {"module": "m", **row} for name, row in rows.items()}).needs


def needs_refusal(**rows):
    """Return the error for tools, each given by its options."""
    return refusal({name: {"module": "m", **row} for name, row in rows.items()})


def test_needs_are_those_that_are_declared():
    assert needs(a={"needs": []}, b={"needs": ["a"]}, c={"needs": ["b", "a"]}) == {
        "a": (), "b": ("a",), "c": ("b", "a")}


@pytest.mark.parametrize("row, waits_for", [
    ({}, "*"), ({"retries": 2, "estimate": 5, "uses": {}, "when": "always"}, "*"),
    ({"needs": []}, ()), ({"reads": []}, ()), ({"writes": []}, ()),
    ({"reads": ["outside"]}, ()), ({"writes": ["x"]}, ()),
])
def test_only_a_tool_that_declares_nothing_waits_for_all_before_it(row, waits_for):
    assert needs(first={}, t=row)["t"] == waits_for


def test_who_reads_a_name_needs_who_writes_it_whatever_their_order_in_the_table():
    assert needs(r={"reads": ["x", "y"]}, w={"writes": "x"}, v={"writes": ["y", "z"]}) == {
        "r": ("w", "v"), "w": (), "v": ()}


def test_declared_and_inferred_needs_come_together_each_once():
    assert needs(w={"writes": "x"}, v={"writes": "y"}, n={"needs": []},
                 t={"needs": ["n", "w"], "reads": ["x", "y"]})["t"] == ("n", "w", "v")


def test_what_nobody_writes_is_an_outside_source_and_no_need():
    assert needs(a={"reads": "orders.csv"}, b={"reads": "orders.csv", "writes": "x"}) == {
        "a": (), "b": ()}


def test_an_outside_source_that_has_the_name_of_a_tool_is_no_need():
    assert needs(a={"reads": "b"}, b={"reads": "a"}) == {"a": (), "b": ()}


def test_a_tool_that_reads_what_it_writes_does_not_need_itself():
    """t updates x in place; r reads it.   t - r"""
    assert needs(t={"reads": "x", "writes": "x"}, r={"reads": "x"}) == {"t": (), "r": ("t",)}


def test_a_tool_may_need_one_that_declares_nothing():
    assert needs(a={}, b={"needs": ["a"]}) == {"a": "*", "b": ("a",)}


def test_a_need_may_stand_further_down_in_the_table():
    assert needs(a={"needs": ["b"]}, b={}) == {"a": ("b",), "b": "*"}


@pytest.mark.parametrize("need, fix", [("fetc", "Did you mean 'fetch'?"), ("zzz", "Known: fetch"),
                                       ("ingest", "Known: fetch"), ("*", "Known: fetch"),
                                       ("+fetch", "Did you mean 'fetch'?")])
def test_an_unknown_need_is_answered_with_the_nearest_tool(need, fix):
    error = refusal({"fetch": "m", "parse": {"module": "m", "needs": ["fetch", need]}},
                    {"ingest": ["fetch"]})

    assert has_one_sentence(error, f"TOOL_MAP['parse']: no tool {need!r} to need", fix)


def test_all_unknown_needs_are_reported_and_a_tool_whose_row_is_wrong_is_known():
    error = str(refusal({"fetch": {"module": "m", "retries": -1},
                         "parse": {"module": "m", "needs": ["fetch", "fetc"]},
                         "render": {"module": "m", "needs": ["prase"]}}))

    assert "'retries'" in error and "'fetc'" in error and "'prase'" in error
    assert "no tool 'fetch' to need" not in error


# --- circles ---

def rotations(path):
    """Return the ways in which a circle may be told: `a -> b -> a` and `b -> a -> b`."""
    names = path.split()
    return {" -> ".join([*names[i:], *names[:i], names[i]]) for i in range(len(names))}


@pytest.mark.parametrize("rows, circle", [
    # declared
    ({"a": {"needs": ["a"]}}, "a"),
    ({"a": {"needs": ["b"]}, "b": {"needs": ["a"]}}, "a b"),
    ({"a": {"needs": ["b"]}, "b": {"needs": ["c"]}, "c": {"needs": ["a"]}}, "a b c"),
    # inferred: a reads what b writes, and so on
    ({"a": {"reads": "x", "writes": "y"}, "b": {"reads": "y", "writes": "x"}}, "a b"),
    ({"a": {"reads": "x", "writes": "z"}, "b": {"reads": "y", "writes": "x"},
      "c": {"reads": "z", "writes": "y"}}, "a b c"),
    # mixed
    ({"a": {"needs": ["b"], "writes": "x"}, "b": {"reads": "x"}}, "a b"),
    ({"a": {"reads": "x"}, "b": {"needs": ["c"], "writes": "x"}, "c": {"needs": ["a"]}}, "a b c"),
    # with others around that are in no circle
    ({"s": {"needs": []}, "a": {"needs": ["s", "b"]}, "b": {"needs": ["a"]},
      "t": {"needs": ["a", "s"]}, "u": {}}, "a b"),
    # through a tool that declares nothing but is needed
    ({"u": {}, "a": {"needs": ["u", "b"]}, "b": {"needs": ["u", "a"]}}, "a b"),
])
def test_a_circle_of_needs_is_printed_as_a_path(rows, circle):
    error = needs_refusal(**rows)

    assert has_one_sentence(error, "TOOL_MAP", "circle", "Take one")
    assert error.problem.rpartition(": ")[2].rstrip(".") in rotations(circle)


def test_each_arrow_of_a_circle_leads_from_a_tool_to_one_that_it_needs():
    rows = {"a": {"needs": ["b"]}, "b": {"needs": ["c"]}, "c": {"needs": ["d"]},
            "d": {"needs": ["a"]}}
    path = needs_refusal(**rows).problem.rpartition(": ")[2].rstrip(".").split(" -> ")

    assert path[0] == path[-1] and len(path) == 5
    assert all(needed in rows[tool]["needs"] for tool, needed in zip(path, path[1:]))


def test_each_circle_apart_is_printed_once_and_together_with_other_mistakes():
    error = str(refusal({
        "a": {"module": "m", "needs": ["b", "c"]}, "b": {"module": "m", "needs": ["a"]},
        "c": {"module": "m", "needs": ["d"]}, "d": {"module": "m", "needs": ["c"]},
        "e": {"module": "m", "needs": ["a", "nobody"]}, "f": {"module": "m", "retries": -1},
    }, {"s": ["t"], "t": ["s"], "u": ["u"], "v": ["nobody"]}))

    problems = [line for line in error.splitlines() if line[0] != " "]
    circles = [line.rpartition(": ")[2].rstrip(".") for line in problems if " -> " in line]
    assert len(problems) == 7 and len(circles) == 4, error
    assert all(any(circle in rotations(path) for circle in circles)
               for path in ("a b", "c d", "s t", "u"))


def test_a_circle_through_the_readers_of_names_written_twice_is_found():
    """w1 - w2 write x, v1 - v2 write y; v2 reads x, and w2 reads y."""
    error = needs_refusal(
        w1={"writes": "x"}, w2={"needs": ["w1"], "reads": "y", "writes": "x"},
        v1={"writes": "y"}, v2={"needs": ["v1"], "reads": "x", "writes": "y"})

    assert has_one_sentence(error, "TOOL_MAP", "circle")
    assert error.problem.rpartition(": ")[2].rstrip(".") in rotations("w2 v2")


@pytest.mark.parametrize("rows", [
    {"a": {"reads": "x", "writes": "y"}, "b": {"reads": "z", "writes": "x"}},  # z from outside
    {"a": {"reads": ["x", "y"]}, "b": {"reads": ["x", "y"]}},
    {"a": {"reads": "x", "writes": "x"}},  # in place
    {"a": {"reads": "b"}, "b": {"needs": ["a"]}},  # b is a table there, not the tool
])
def test_an_outside_source_is_no_circle(rows):
    assert set(needs(**rows)) == set(rows)


def test_a_circle_of_ten_thousand_tools_is_no_problem():
    rows = {f"t{i}": {"needs": [f"t{(i + 1) % 10_000}"]} for i in range(10_000)}

    assert "in a circle" in needs_refusal(**rows).problem


# --- names that are written twice ---

UNORDERED = [
    {"w1": {"writes": "x"}, "w2": {"writes": "x"}},
    {"w1": {"writes": ["x", "y"]}, "w2": {"writes": ["x", "z"]}},
    # both need something, but neither the other
    {"s": {"needs": []}, "w1": {"needs": ["s"], "writes": "x"}, "w2": {"needs": ["s"],
                                                                       "writes": "x"}},
    # both are needed by something
    {"w1": {"writes": "x"}, "w2": {"writes": "x"}, "t": {"needs": ["w1", "w2"]}},
    # a common reader orders neither
    {"w1": {"writes": "x"}, "w2": {"writes": "x"}, "r": {"reads": "x"}},
    # the order in which they stand in the table says nothing
    {"w2": {"writes": "x"}, "w1": {"writes": "x"}},
]


@pytest.mark.parametrize("rows", UNORDERED)
def test_two_writers_of_a_name_in_no_order_are_refused(rows):
    error = needs_refusal(**rows)

    assert has_one_sentence(error, "TOOL_MAP", "'w1'", "'w2'", "write 'x' in no order")
    assert error.fix in ("Let one need the other: \"needs\": [\"w1\"] in 'w2'.",
                         "Let one need the other: \"needs\": [\"w2\"] in 'w1'.")


def test_of_three_writers_of_a_name_each_two_must_be_ordered():
    """w1 - w2    w3"""
    error = needs_refusal(w1={"writes": "x"}, w2={"needs": ["w1"], "writes": "x"},
                          w3={"writes": "x"})

    assert "'w3'" in error.problem and "in no order" in error.problem


def test_all_pairs_of_writers_in_no_order_are_reported_at_once():
    error = str(needs_refusal(w1={"writes": ["x", "y"]}, w2={"writes": "x"}, w3={"writes": "x"},
                              w4={"writes": "y"}, a={"needs": ["b"]}, b={"needs": ["a"]}))

    assert [line.partition(": ")[2].partition(" in ")[0]
            for line in error.splitlines() if "no order" in line] == [
        "'w1' and 'w2' write 'x'", "'w2' and 'w3' write 'x'", "'w1' and 'w4' write 'y'"]
    assert "a -> b -> a" in error or "b -> a -> b" in error


@pytest.mark.parametrize("seed", range(20))
def test_writers_are_in_order_when_each_pair_that_was_told_is_mended_as_it_says(seed):
    chance = random.Random(seed)
    names = [f"t{i}" for i in range(8)]
    rows = {name: {"needs": chance.sample(names[:i], min(i, chance.randint(0, 1))),
                   "writes": chance.sample("xyz", chance.randint(0, 2))}
            for i, name in enumerate(names)}
    mend = r"""Let one need the other: "needs": \["(\w+)"\] in '(\w+)'."""
    for one, other in re.findall(mend, str(needs_refusal(**rows))):
        rows[other]["needs"].append(one)

    assert set(needs(**rows)) == set(names)


def test_a_mistake_that_may_hide_the_order_of_writers_is_told_alone():
    error = needs_refusal(w1={"writes": "x"}, w2={"needs": ["w"], "writes": "x"})

    assert has_one_sentence(error, "no tool 'w' to need")


def test_writers_whose_order_leads_through_a_circle_are_not_told_to_be_in_none():
    """w1 - a = b - w2"""
    error = needs_refusal(w1={"writes": "x"}, a={"needs": ["b", "w1"]}, b={"needs": ["a"]},
                          w2={"needs": ["b"], "writes": "x"})

    assert has_one_sentence(error, "in a circle: ")


def test_a_common_successor_does_not_order_two_writers():
    """w1 - w2, w3 - w2: all three write x"""
    error = needs_refusal(w1={"writes": "x"}, w2={"needs": ["w1", "w3"], "writes": "x"},
                          w3={"writes": "x"})

    assert has_one_sentence(error, "'w1' and 'w3' write 'x' in no order")


@pytest.mark.parametrize("rows", [
    # directly, either way round
    {"w1": {"writes": "x"}, "w2": {"needs": ["w1"], "writes": "x"}},
    {"w1": {"needs": ["w2"], "writes": "x"}, "w2": {"writes": "x"}},
    # transitively: w1 - m - n - w2
    {"w1": {"writes": "x"}, "m": {"needs": ["w1"]}, "n": {"needs": ["m"]},
     "w2": {"needs": ["n"], "writes": "x"}},
    # because the one reads another name that the other writes
    {"w1": {"writes": ["x", "y"]}, "w2": {"reads": "y", "writes": "x"}},
    # through a third one and other names: w1 -y- m -z- w2
    {"w1": {"writes": ["x", "y"]}, "m": {"reads": "y", "writes": "z"},
     "w2": {"reads": "z", "writes": "x"}},
    # a chain of three
    {"w1": {"writes": "x"}, "w2": {"needs": ["w1"], "writes": "x"},
     "w3": {"needs": ["w2"], "writes": "x"}},
    # the second one updates what the first one wrote
    {"w1": {"writes": "x"}, "w2": {"needs": ["w1"], "reads": "x", "writes": "x"}},
])
def test_two_writers_of_a_name_may_be_if_they_are_ordered(rows):
    found = needs(**rows)

    assert all(set(row.get("needs", ())) <= set(found[name]) for name, row in rows.items())


def test_who_reads_a_name_that_is_written_twice_needs_the_last_writer_which_needs_the_first():
    """w1 - w2 - r"""
    assert needs(w1={"writes": "x"}, w2={"needs": ["w1"], "writes": "x"},
                 r={"reads": "x"}) == {"w1": (), "w2": ("w1",), "r": ("w2",)}


def test_a_writer_needs_the_writer_before_it_also_where_something_in_between_says_so():
    """w1 - m - w2"""
    assert needs(w1={"writes": "x"}, m={"needs": ["w1"]},
                 w2={"needs": ["m"], "writes": "x"})["w2"] == ("m", "w1")


def test_who_reads_a_name_between_its_writers_needs_only_those_before_it():
    """w1 - r - w2"""
    found = needs(w1={"writes": "x"}, r={"reads": "x"}, w2={"needs": ["w1", "r"], "writes": "x"})

    assert found == {"w1": (), "r": ("w1",), "w2": ("w1", "r")}


def test_a_writer_that_also_reads_the_name_needs_the_writers_before_it():
    """w1 - m - w2 - w3, of which w2 reads and writes x as well"""
    found = needs(w1={"writes": "x"}, m={"needs": ["w1"]},
                  w2={"needs": ["m"], "reads": "x", "writes": "x"},
                  w3={"needs": ["w2"], "writes": "x"})

    assert found["w2"] == ("m", "w1")
    assert found["w1"] == ()


@pytest.mark.parametrize("order", [("load", "dedupe", "r"), ("r", "dedupe", "load")])
def test_who_updates_a_name_in_place_needs_who_only_writes_it(order):
    """load - dedupe - r, of which dedupe reads and writes x"""
    rows = {"load": {"writes": "x"}, "dedupe": {"reads": "x", "writes": "x"}, "r": {"reads": "x"}}
    found = needs(**{name: rows[name] for name in order})

    assert found["load"] == () and found["dedupe"] == ("load",)
    assert found["r"] == ("dedupe",)


def test_an_update_in_place_orders_two_writers_of_another_name_too():
    """a - b by x, which b updates; so their writing y is in order as well"""
    assert needs(b={"reads": "x", "writes": ["x", "y"]}, a={"writes": ["x", "y"]}) == {
        "b": ("a",), "a": ()}


def test_two_writers_that_an_update_in_place_follows_are_still_in_no_order():
    error = needs_refusal(w1={"writes": "x"}, w2={"writes": "x"}, u={"reads": "x", "writes": "x"})

    assert has_one_sentence(error, "'w1' and 'w2' write 'x' in no order")


def test_two_tools_that_each_update_what_the_other_writes_are_a_circle():
    error = needs_refusal(a={"reads": "x", "writes": ["x", "y"]},
                          b={"reads": "y", "writes": ["x", "y"]})

    assert has_one_sentence(error, "in a circle: ")


def test_two_tools_that_both_update_a_name_in_place_are_in_no_order():
    error = needs_refusal(w1={"reads": "x", "writes": "x"}, w2={"reads": "x", "writes": "x"})

    assert has_one_sentence(error, "'w1'", "'w2'", "write 'x' in no order")


def make_users(shape, count):
    """Return the rows of that many tools that read and write one name."""
    chain = {f"t{i}": {"needs": [f"t{i - 1}"] if i else []} for i in range(count)}
    if shape == "updates":
        return {name: {**row, "reads": "x", "writes": "x"} for name, row in chain.items()}
    half = count // 2
    return {f"t{i}": {**chain[f"t{i}"], "writes": "x"} if i < half else {"reads": "x"}
            for i in range(count)}


@pytest.mark.parametrize("shape", ["updates", "writers and readers"])
def test_tools_that_use_one_name_need_about_one_other_each(shape):
    for count in (10, 100, 1_000, 3_000):
        assert sum(map(len, needs(**make_users(shape, count)).values())) < count


@pytest.mark.parametrize("shape", ["updates", "writers and readers"])
def test_ten_times_the_users_of_one_name_are_little_more_than_ten_times_the_steps(shape):
    small, large = (count_steps(lambda count=count: needs(**make_users(shape, count)))
                    for count in (100, 1_000))

    assert large < 11 * small


def test_of_very_many_writers_in_no_order_some_are_told():
    error = needs_refusal(**{f"w{i}": {"writes": "x"} for i in range(1_000)})

    assert 10 <= str(error).count("in no order") <= 30


@pytest.mark.parametrize("seed", range(60))
def test_whatever_the_reads_and_writes_each_reader_comes_after_its_writers_or_before_them(seed):
    chance = random.Random(seed)
    names = [f"t{i}" for i in range(chance.randint(2, 9))]
    rows = {name: {"needs": chance.sample(names[:i], min(i, chance.randint(0, 2))),
                   "reads": chance.sample("uvwxyz", chance.randint(0, 2)),
                   "writes": chance.sample("uvwxyz", chance.randint(0, 1))}
            for i, name in enumerate(names)}
    shuffled = list(rows.items())
    chance.shuffle(shuffled)
    try:
        found = needs(**dict(shuffled))
    except UserError as error:
        assert "in a circle" in str(error) or "in no order" in str(error)
        return
    before = {}
    for name in TopologicalSorter(found).static_order():
        before[name] = {need for each in found[name] for need in (each, *before[each])}
    for name, row in rows.items():
        assert set(row["needs"]) <= set(found[name])
        for other in set(rows) - {name}:
            together = name in before[other] or other in before[name]
            assert together or not set(row["writes"]) & set(rows[other]["writes"])
            assert together or not set(row["reads"]) & set(rows[other]["writes"])


# --- the same at the command line ---

@pytest.mark.parametrize("above, words, problem, fix", [
    ('TOOL_MAP["fetch"] = {"module": "fetch", "comits": True}', [],
     "TOOL_MAP['fetch']: there is no option 'comits'.", "Did you mean 'commits'?"),
    ('STAGES["ingest"].append("ingest")', ["fetch"],
     "STAGES: a stage contains itself: ingest -> ingest.", "Take one of these members out."),
    ('TOOL_MAP["parse"] = "pasre"', [],
     "TOOL_MAP['parse']: there is no module 'pasre'.", "Did you mean 'parse'"),
    ("", ["fetc"], "There is no tool or stage 'fetc'.", "Did you mean 'fetch'?"),
    ('TOOL_MAP["fetch"] = {"module": "fetch", "timeout": "soon"}', [],
     "TOOL_MAP['fetch']: 'timeout' must be a number of seconds or a text", '"timeout": "10m"'),
    ('TOOL_MAP["fetch"] = {"module": "fetch", "needs": ["prase"]}', [],
     "TOOL_MAP['fetch']: no tool 'prase' to need.", "Did you mean 'parse'?"),
    ('TOOL_MAP["fetch"] = {"module": "fetch", "needs": ["fetch"]}', ["parse"],
     "TOOL_MAP: needs go in a circle: fetch -> fetch.", "Take one"),
    ('TOOL_MAP["fetch"] = {"module": "fetch", "uses": {"db": 3}}; LIMITS = {"db": 2}', [],
     "TOOL_MAP['fetch']: uses 'db' 3 times, but LIMITS has only 2.", "Lower the one"),
    ('TOOL_MAP["fetch"] = {"module": "fetch", "uses": ["db"]}; LIMITS = {"db": 2}', [],
     "TOOL_MAP['fetch']: 'uses' must be a dict", '"uses": {"db": 1}'),
    ("LIMITS = []", [], "LIMITS is a list, not a dict.", "LIMITS = {"),
    ("", ["--exlude", "fetch"], "There is no flag '--exlude'.",
     "Did you mean '--exclude' or '--resume'?"),
    ("", ["nothing"], "There is nothing to run: nothing has no tools.", "--list"),
    ('STAGES["fetch"] = ["parse"]', ["parse"],
     "STAGES['fetch']: a tool has this name too and is not in the stage", "Rename"),
    ("def format_table(): pass", [], "format_table", "Rename"),
    ("from time import time", [], "time", "Rename"),
])
def test_bad_input_ends_with_a_sentence_before_anything_is_imported_or_opened(
        sandbox, above, words, problem, fix):
    sandbox.pipeline(MARKED + above).tool("fetch", MARKING).tool("parse", MARKING)

    ended = sandbox.run(*words)

    said = ended.err.splitlines()
    assert ended.code == 2, ended
    assert ended.out == ""
    assert len(said) == 2, ended
    assert problem in said[0]
    assert said[1].startswith("  ") and fix in said[1]
    for mark in ("imported", "opened", "run"):
        assert not (sandbox.folder / mark).exists(), mark


def test_the_marks_of_the_test_above_are_left_by_a_run_without_a_mistake(sandbox):
    sandbox.pipeline(MARKED).tool("fetch", MARKING).tool("parse", MARKING)

    assert sandbox.run().code == 0
    assert all((sandbox.folder / mark).exists() for mark in ("imported", "opened", "run"))


def test_a_file_without_a_tool_map_is_told_so(sandbox):
    ended = sandbox.pipeline("STAGES = {}").run()

    assert ended.code == 2
    assert "TOOL_MAP" in ended.err
    assert "Traceback" not in ended.err
