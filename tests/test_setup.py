"""The user's tables: what is accepted, and the sentence for each mistake in them."""
import copy
import math

import pytest

from orchestrator import UserError, load_pipeline

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
    assert pipeline.stages["all"].members == ("parse", "late", "early")


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
                                  " fetch", "fetch ", "fe\ntch", "\x1b[31m"])
@pytest.mark.parametrize("table", ["TOOL_MAP", "STAGES"])
def test_a_name_that_the_command_line_could_not_tell_from_a_flag_is_refused(table, name):
    tools = {**TOOLS, name: "tools.x"} if table == "TOOL_MAP" else TOOLS
    stages = {name: ["fetch"]} if table == "STAGES" else {}

    assert has_one_sentence(refusal(tools, stages), table, repr(name), "command line")


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
                                  ".fetch", "tools.", "", "tools fetch", "tools-fetch",
                                  "tools.fetch:", "tools.fetch:a:b", "tools.fetch:a.b", ":run",
                                  "2tools"])
@pytest.mark.parametrize("make", [lambda path: path, lambda path: {"module": path}])
def test_a_module_path_without_dots_between_names_is_refused(make, path):
    assert has_one_sentence(refusal({"fetch": make(path)}), "TOOL_MAP['fetch']",
                            "a module path with dots", repr(path), '"folder.module"')


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


# --- the same at the command line ---

@pytest.mark.parametrize("above, words, problem, fix", [
    ('TOOL_MAP["fetch"] = {"module": "fetch", "comits": True}', [],
     "TOOL_MAP['fetch']: there is no option 'comits'.", "Did you mean 'commits'?"),
    ('STAGES["ingest"].append("ingest")', ["fetch"],
     "STAGES: a stage contains itself: ingest -> ingest.", "Take one of them out of the other."),
    ('TOOL_MAP["parse"] = "pasre"', [],
     "TOOL_MAP['parse']: there is no module 'pasre'.", "Did you mean 'parse'"),
    ("", ["fetc"], "There is no tool or stage 'fetc'.", "Did you mean 'fetch'?"),
    ("", ["--exlude", "fetch"], "There is no flag '--exlude'.", "Did you mean '--exclude'?"),
    ("", ["nothing"], "Nothing is left to run.", "--list"),
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
