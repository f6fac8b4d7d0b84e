"""--check: reads every module, imports none, and reports all mistakes at once."""
import ast
import importlib.util
import os
import re
import sys

import pytest
from conftest import TOP

from orchestrator import main

RAISES = "raise SystemExit('imported')\n"


@pytest.fixture
def check(sandbox, monkeypatch, capsys):
    """Return check(tool_map) -> (exit code, the lines printed), in the sandbox's folder."""
    monkeypatch.syspath_prepend(str(sandbox.folder))
    monkeypatch.chdir(sandbox.folder)

    def get_connection():
        raise AssertionError("a connection was opened by --check")

    def call(tool_map, **more):
        before = set(sys.modules)
        code = main(tool_map, {}, get_connection, argv=["--check"], **more)
        printed = capsys.readouterr()
        assert printed.err == ""
        assert not [name for name in set(sys.modules) - before if name.startswith("ck_")]
        return code, printed.out.splitlines()

    return call


@pytest.fixture
def check_source(sandbox, check):
    """Return check_source(text of one module) -> (exit code, the lines printed)."""
    def call(source, **more):
        sandbox.tool("ck_tool", source)
        return check({"tool": "ck_tool"}, **more)

    return call


def is_clean(ended):
    """Return whether --check found no mistake in one tool."""
    return ended == (0, ["1 tool read, no mistakes found"])


# --- modules ---

def test_a_pipeline_without_mistakes_ends_with_success(sandbox, check):
    sandbox.tool("ck_a", "def run(conn, **kwargs): pass").tool("ck_b", "def run(): pass")

    assert check({"a": "ck_a", "b": "ck_b"}) == (0, ["2 tools read, no mistakes found"])


def test_mistakes_of_the_tables_and_of_the_modules_are_told_together(sandbox, check):
    sandbox.tool("ck_a", "def run(conn: pass").tool("ck_b", "def run(): pass")

    code, lines = check({"a": "ck_a", "b": {"module": "ck_b", "retry": 1}, "c": "ck_missing",
                         "d": {"module": "ck_b", "needs": ["b", "nobody"]}}, limits={"db": 0})

    assert code == 2
    assert lines[-1] == "3 tools read, 5 mistakes found"
    for part in ("TOOL_MAP['b']: there is no option 'retry'", "no tool 'nobody'", "LIMITS['db']",
                 "ck_a.py:1: ", "TOOL_MAP['c']: there is no module"):
        assert [part in line for line in lines].count(True) == 1, part


def test_the_modules_are_read_also_where_the_graph_has_no_order(sandbox, check):
    sandbox.tool("ck_a", "def walk(): pass")

    code, lines = check({"a": {"module": "ck_a", "needs": ["b"]},
                         "b": {"module": "ck_a", "needs": ["a"]}})

    assert code == 2 and "in a circle" in lines[0] and "ck_a.py:1: " in lines[2]


def test_no_module_is_imported(check_source):
    assert is_clean(check_source(RAISES + "def run(conn): pass"))


def test_a_missing_module_is_a_mistake_with_the_nearest_one_beside_it(sandbox, check):
    sandbox.tool("ck_tools.fetch", "def run(conn): pass")

    code, lines = check({"fetch": "ck_tools.fetc"})

    assert code == 2
    assert lines[0] == "TOOL_MAP['fetch']: there is no module 'ck_tools.fetc'."
    assert lines[1].startswith("  Did you mean 'ck_tools.fetch'?")
    assert str(sandbox.folder) in lines[1]
    assert lines[2:] == ["1 tool read, 1 mistake found"]


@pytest.mark.parametrize("path", ["ck_none", "ck_none.fetch", "ck_a.fetch", "ck_pkg.sub.fetch"])
def test_a_module_is_missing_wherever_its_path_breaks_off(sandbox, check, path):
    sandbox.tool("ck_a", "def run(conn): pass").tool("ck_pkg.__init__", "")

    code, lines = check({"fetch": path})

    assert code == 2
    assert lines[0] == f"TOOL_MAP['fetch']: there is no module {path!r}."
    assert lines[1].startswith("  ")


def test_a_pipeline_that_hides_the_folder_of_its_tools_is_told_as_such(sandbox):
    sandbox.pipeline('TOOL_MAP = {"load": "sales.load"}', "sales.py").tool("sales.load", "")

    for words in ([], ["--check"]):
        ended = sandbox.run(*words, file="sales.py")

        assert ended.code == 2 and (ended.out or ended.err).startswith(
            "TOOL_MAP['load']: there is no module 'sales.load': the file sales.py hides the folder "
            "sales from Python.\n  Rename one of them, or put an empty file __init__.py into ")


def test_a_package_is_not_imported_to_find_a_module_in_it(sandbox, check):
    sandbox.tool("ck_pkg.__init__", RAISES).tool("ck_pkg.sub.__init__", RAISES)
    sandbox.tool("ck_pkg.sub.mod", "def run(conn): pass")

    assert is_clean(check({"tool": "ck_pkg.sub.mod"}))


def test_a_module_in_folders_without_init_is_found(sandbox, check):
    sandbox.tool("ck_one.two.three.four.mod", "def run(conn): pass")
    sandbox.tool("ck_one.two.three.pkg.__init__", RAISES)
    sandbox.tool("ck_one.two.three.pkg.mod", "def run(conn): pass")

    assert check({"deep": "ck_one.two.three.four.mod", "mixed": "ck_one.two.three.pkg.mod"}) \
        == (0, ["2 tools read, no mistakes found"])


def test_a_tool_may_be_a_package(sandbox, check):
    sandbox.tool("ck_good.__init__", RAISES + "def run(conn): pass")
    sandbox.tool("ck_bad.__init__", RAISES)

    code, lines = check({"good": "ck_good", "bad": "ck_bad"})

    assert code == 2
    assert len([line for line in lines if "no function run()" in line]) == 1
    assert "__init__.py" in lines[0] and "TOOL_MAP['bad']" in lines[0]


def test_a_folder_of_modules_is_no_module_with_run(sandbox, check):
    sandbox.tool("ck_folder.fetch", "def run(conn): pass")

    code, lines = check({"fetch": "ck_folder"})

    assert code == 2
    assert "TOOL_MAP['fetch']" in lines[0]


def test_a_module_without_source_is_not_a_mistake(check):
    assert is_clean(check({"tool": "math:gcd"}))


@pytest.mark.parametrize("source, line, said", [
    ("x = 1\n\ndef run(conn)\n    pass\n", 3, "SyntaxError"),
    ("def run(conn):\n    x = (1 +\n", 2, "SyntaxError"),
    ("def run(conn):\n    pass\n  x = 1\n", 3, "IndentationError"),
    # what makes a tree, and no code
    ("def run(conn):\n    pass\nreturn 5\n", 3, "SyntaxError"),
    ("def run(conn, conn): pass\n", 1, "SyntaxError"),
    ("def run(conn):\n    return await conn\n", 2, "SyntaxError"),
    ("from __future__ import braces\ndef run(): pass\n", 1, "SyntaxError"),
])
def test_a_syntax_error_is_a_mistake_with_file_and_line(check_source, source, line, said):
    code, lines = check_source(source)

    assert code == 2
    assert lines[0].startswith(f"ck_tool.py:{line}: {said}: ")
    assert lines[1].startswith("  ")


@pytest.mark.parametrize("content", [b"def run(conn): pass\n\0", b"x = '\xe9'\n",
                                     b"# coding: nonsense\ndef run(conn): pass\n"])
def test_a_file_that_is_no_python_text_is_a_mistake_with_its_name(sandbox, check, content):
    (sandbox.folder / "ck_tool.py").write_bytes(content)

    code, lines = check({"tool": "ck_tool"})

    assert code == 2
    assert lines[0].startswith("ck_tool.py:")
    assert lines[-1] == "1 tool read, 1 mistake found"


def test_a_file_may_declare_another_encoding(sandbox, check):
    (sandbox.folder / "ck_tool.py").write_bytes(
        b"# -*- coding: latin-1 -*-\nNAME = '\xe9'\ndef run(conn): pass\n")

    assert is_clean(check({"tool": "ck_tool"}))


# --- run() and check() ---

@pytest.mark.parametrize("source", [
    "def run(conn): pass",
    "def run(): pass",
    "def run(**kwargs): pass",
    "def run(conn, context): pass",
    "def run(conn, since=None): pass",
    "def run(*, conn, since=None): pass",
    "async def run(conn, **kwargs): pass",
    "@wrap\ndef run(anything, at, all): pass",  # what a decorator makes of it, nobody knows
    "from elsewhere import run",
    "from elsewhere import start as run",
    "from elsewhere import *",
    "from elsewhere import *\ndef run(conn): pass",
    "from functools import partial\nrun = partial(print, 1)",
    "class run:\n    def __init__(self, conn): pass",
    "if True:\n    def run(conn): pass\nelse:\n    def run(conn): pass",
    "try:\n    from fast import run\nexcept ImportError:\n    def run(conn): pass",
    "if True:\n    def run(conn): pass\nelse:\n    run = None",
    "try:\n    from fast import run\nexcept ImportError:\n    run = None",
    "def run(conn): pass\ndef check(conn): pass",
    "def run(conn): pass\ndef helper(a, b): pass",
])
def test_a_run_that_can_take_what_it_is_given_is_accepted(sandbox, check_source, source):
    sandbox.tool("elsewhere", RAISES)
    assert is_clean(check_source(source))


@pytest.mark.parametrize("source, kind", [
    ("run = 3", "an int"), ("import os\n\nrun: list = []", "a list"),
    ("run = other = {}", "a dict"),
])
def test_a_run_that_is_plain_data_is_told_by_its_type(check_source, source, kind):
    code, lines = check_source(source)
    line = len(source.splitlines())
    assert code == 2 and lines[:2] == [
        f"ck_tool.py:{line}: TOOL_MAP['tool']: run of ck_tool.py is {kind}, not a function.",
        "  Write `def run(conn, **kwargs):` in it."]


@pytest.mark.parametrize("source", [
    "run = print", "import functools\nrun = functools.partial(print)", "run = lambda: 1",
    "run = [print][0]",
])
def test_a_run_that_is_made_by_an_expression_is_no_mistake(check_source, source):
    assert is_clean(check_source(source))


@pytest.mark.parametrize("source", [
    "", "x = 1", "def start(conn): pass",
    "def make():\n    def run(conn): pass",
    "class Tool:\n    def run(self, conn): pass",
])
def test_a_module_without_run_is_a_mistake(check_source, source):
    code, lines = check_source(source)

    assert code == 2
    assert lines[0] == "ck_tool.py:1: TOOL_MAP['tool']: ck_tool.py has no function run()."
    assert "def run(conn, **kwargs):" in lines[1]


@pytest.mark.parametrize("source, line, said", [
    ("\ndef run(conn, since): pass", 2, "run() of ck_tool asks for 'since'"),
    ("async def run(conn, since): pass", 1, "run() of ck_tool asks for 'since'"),
    ("def run(conn, *, since): pass", 1, "run() of ck_tool asks for 'since'"),
    ("def run(since, **kwargs): pass", 1, "run() of ck_tool asks for 'since'"),
    ("def run(conn, /, **kwargs): pass", 1, "run() of ck_tool takes 'conn' by position only"),
    ("def run(conn): pass\n\ndef check(conn, since): pass", 3,
     "check() of ck_tool asks for 'since'"),
    ("def run(conn): pass\n\ndef setup(conn, since): pass", 3,
     "setup() of ck_tool asks for 'since'"),
    ("def run(conn): pass\ndef setup(conn, item): pass", 2,
     "setup() of ck_tool asks for 'item', but it is called before there is any"),
    ("setup = ['CREATE TABLE t (x)']\ndef run(conn): pass", 1,
     "setup of ck_tool is a list, not a function"),
])
def test_a_run_that_can_not_take_what_it_is_given_is_a_mistake(check_source, source, line, said):
    code, lines = check_source(source)

    assert code == 2
    assert lines[0].startswith(f"ck_tool.py:{line}: TOOL_MAP['tool']: {said}")
    assert lines[-1] == "1 tool read, 1 mistake found"


@pytest.mark.parametrize("required", [True, False])
def test_the_flags_of_add_arguments_are_what_run_is_given(check_source, required):
    def add_arguments(parser):
        parser.add_argument("--day-from", required=required)

    assert is_clean(check_source("def run(conn, day_from): pass", add_arguments=add_arguments))


def test_the_function_behind_the_colon_is_the_one_that_is_checked(sandbox, check):
    sandbox.tool("ck_tool", """
        def load(conn): pass
        def store(conn, since): pass
    """)

    code, lines = check({"load": "ck_tool:load", "store": "ck_tool:store", "gone": "ck_tool:stor"})

    assert code == 2
    assert lines[0].startswith("ck_tool.py:3: TOOL_MAP['store']: store() of ck_tool asks for")
    assert lines[2] == "ck_tool.py:1: TOOL_MAP['gone']: ck_tool.py has no function stor()."
    assert "def stor(conn, **kwargs):" in lines[3]
    assert lines[4:] == ["3 tools read, 2 mistakes found"]


def test_a_mistake_in_a_module_that_tools_share_is_reported_once(sandbox, check):
    sandbox.tool("ck_tool", """
        def load(conn): pass
        def store(conn: pass
    """)

    code, lines = check({"load": "ck_tool:load", "store": "ck_tool:store"})

    assert code == 2
    assert len([line for line in lines if line.startswith("ck_tool.py:3: ")]) == 1
    assert lines[-1] == "2 tools read, 1 mistake found"


# --- each module once ---

@pytest.mark.parametrize("flag", ["--check", "--list", "--plan"])
def test_a_module_of_many_tools_is_read_once(sandbox, monkeypatch, flag):
    sandbox.tool("ck_many", "\n".join(f"def f{i}(conn): pass" for i in range(100)))
    sandbox.tool("ck_broken", "def f(conn: pass")
    monkeypatch.syspath_prepend(str(sandbox.folder))
    parsed, looked_up = [], []
    parse, find_spec = ast.parse, importlib.util.find_spec
    monkeypatch.setattr(ast, "parse", lambda text, *name: parsed.append(name) or parse(text, *name))
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: looked_up.append(name) or find_spec(name))
    table = {f"t{i}": f"ck_many:f{i}" for i in range(100)}
    table.update((f"b{i}", f"ck_broken:f{i}") for i in range(20))

    main(table, {}, argv=[flag])

    assert sorted(os.path.basename(name) for name, in parsed) == ["ck_broken.py", "ck_many.py"]
    assert sorted(looked_up) == ["ck_broken", "ck_many"]


def test_a_command_reads_a_module_as_it_is_now(check_source):
    assert check_source("def walk(conn): pass")[0] == 2
    assert is_clean(check_source("def run(conn): pass"))


# --- all of it ---

def test_all_mistakes_are_reported_at_once_with_file_and_line(sandbox, check):
    sandbox.tool("ck_tools.syntax", "x = 1\ndef run(:\n")
    sandbox.tool("ck_tools.norun", "def main(): pass\n")
    sandbox.tool("ck_tools.many", '''
        def run(conn, since): pass
        def items(conn, until): pass
        def check(conn, item, until): pass
    ''')
    sandbox.tool("ck_tools.good", "def run(conn): pass\n")

    code, lines = check({"gone": "ck_tools.gone", "syntax": "ck_tools.syntax",
                         "norun": "ck_tools.norun", "many": "ck_tools.many",
                         "good": "ck_tools.good"})

    path = os.path.join("ck_tools", "")
    said = [line for line in lines if not line.startswith("  ")]
    assert code == 2
    for begin in ("TOOL_MAP['gone']: there is no module", f"{path}syntax.py:2: SyntaxError",
                  f"{path}norun.py:1: ", f"{path}many.py:2: ", f"{path}many.py:3: ",
                  f"{path}many.py:4: "):
        assert len([line for line in said if line.startswith(begin)]) == 1, begin
    assert said[-1].startswith("5 tools read, ")
    assert not [line for line in said if "good" in line]


def test_every_argument_that_nothing_supplies_is_reported(check_source):
    _, lines = check_source("def run(conn, since, until): pass")

    assert "'since'" in "".join(lines)
    assert "'until'" in "".join(lines)


def test_an_unknown_target_is_refused_beside_check_too(capsys):
    assert main({"fetch": "ck_gone"}, {}, argv=["--check", "fetc"]) == 2
    assert "'fetc'" in capsys.readouterr().err


MARKED = '''
TOOL_MAP = {"fetch": "tools.fetch", "parse": "tools.parse"}

def get_connection():
    Path(__file__).with_name("opened").touch()
'''
MARKING = '''
from pathlib import Path
Path("imported").touch()

def run(conn):
    Path("run").touch()
'''


@pytest.mark.parametrize("with_mistake", [True, False])
def test_the_command_imports_and_opens_nothing_and_tells_by_its_exit_code(sandbox, with_mistake):
    sandbox.pipeline(MARKED).tool("tools.__init__", MARKING).tool("tools.fetch", MARKING)
    sandbox.tool("tools.parse", MARKING + ("\ndef check(conn, x): pass\n" * with_mistake))

    ended = sandbox.run("--check")

    assert ended.code == (2 if with_mistake else 0), ended
    assert ended.err == ""
    assert ("parse.py:8: " in ended.out) is with_mistake
    for mark in ("imported", "opened", "run"):
        assert not (sandbox.folder / mark).exists(), mark


def test_a_missing_last_module_ends_a_run_before_the_first_is_imported(sandbox):
    sandbox.pipeline(MARKED).tool("tools.fetch", MARKING)

    ended = sandbox.run()

    assert ended.code == 2
    assert "TOOL_MAP['parse']: there is no module 'tools.parse'." in ended.err
    assert not (sandbox.folder / "imported").exists()


# --- what only reading tells ---

def test_a_function_of_the_main_program_is_looked_for_above_the_mark_alone(sandbox):
    sandbox.pipeline('''
        TOOL_MAP = {"a": "__main__:load", "b": "__main__:make_parser"}
        def load(conn, **kwargs): pass
    ''')
    ended = sandbox.run("--check")
    assert ended.code == 2 and "TOOL_MAP['a']" not in ended.out, ended
    assert "orchestrator.py has no function make_parser()" in ended.out, ended


def test_a_key_that_is_twice_in_a_table_is_told_with_both_lines(sandbox):
    sandbox.pipeline('''
        TOOL_MAP = {
            "a": "ck_a",
            "b": {"module": "ck_a", "retries": 1,
                  "retries": 2},
            "a": "ck_a",
        }
        STAGES = {"s": ["a"],
                  "s": ["b"]}
    ''').tool("ck_a", "def run(conn): pass")
    ended = sandbox.run("--check")
    said = [line for line in ended.out.splitlines() if "since line" in line]
    assert ended.code == 2 and len(said) == 3 and "3 mistakes found" in ended.out, ended
    assert "orchestrator.py:9: 'a' is in this dict since line 6" in ended.out
    assert "orchestrator.py:8: 'retries' is in this dict since line 7" in ended.out
    assert "orchestrator.py:12: 's' is in this dict since line 11" in ended.out


@pytest.mark.parametrize("source", ["import numpyy", "import json, numpyy.linalg as x",
                                    "from numpyy.linalg import norm"])
def test_an_import_of_what_is_not_there_is_a_mistake_found_without_importing(check_source, source):
    code, lines = check_source(f"{source}\n{RAISES}def run(conn): pass\n")

    assert code == 2 and lines[-1] == "1 tool read, 1 mistake found"
    assert lines[0] == "ck_tool.py:1: there is no module 'numpyy' to import."


@pytest.mark.parametrize("source", [
    "try:\n    import numpyy\nexcept ImportError:\n    numpyy = None\n",
    "def load():\n    import numpyy\n",
    "import sys\nif sys.platform == 'other':\n    import numpyy\n",
    "from . import numpyy\n",
    "import os.path, xml.dom\nfrom collections import abc\n",
    "import sys\nsys.path.append('lib')\nimport numpyy\n",
])
def test_an_import_that_may_be_there_is_none(check_source, source):
    assert is_clean(check_source(source + RAISES + "def run(conn): pass\n"))


def test_an_import_of_a_module_beside_the_tool_is_none(sandbox, check_source):
    sandbox.tool("ck_helper", RAISES).tool("ck_package.part", RAISES)

    assert is_clean(check_source("import ck_helper, ck_package.part\ndef run(conn): pass\n"))
# --- a copy that nobody has edited yet ---

def copy_unedited(sandbox):
    """Let the sandbox have the file as it is downloaded, without example/."""
    (sandbox.folder / "orchestrator.py").write_text(
        (TOP / "orchestrator.py").read_text(encoding="utf-8"), encoding="utf-8")
    return sandbox


def paste(sandbox, err):
    """Put the tables that were told in the place of the example's, as a person would."""
    text = sandbox.read("orchestrator.py")
    tables = err[err.index("TOOL_MAP = {"):]
    start, end = text.index("TOOL_MAP = {"), text.index("def get_connection")
    (sandbox.folder / "orchestrator.py").write_text(
        text[:start] + tables + "\n\n" + text[end:], encoding="utf-8")


@pytest.mark.parametrize("words", [(), ("--check",), ("--list",), ("--plan",)])
def test_an_unedited_copy_shows_the_tables_for_the_modules_beside_it(sandbox, words):
    copy_unedited(sandbox)
    run = "raise SystemExit('imported')\ndef run(conn, **kwargs): "
    for name in ("load", "sales.load", "sales.report", "tests.test_load"):
        sandbox.tool(name, run + "pass")
    sandbox.tool("helper", "from subprocess import run").tool("broken", "def run(:")

    ended = sandbox.run(*words)

    assert (ended.code, ended.out) == (2, "")
    assert len([line for line in ended.err.splitlines() if "example" in line]) == 1
    assert re.findall(r'^    ("\w+": "[\w.]+"),$', ended.err, re.M) \
        == ['"load": "load"', '"sales_load": "sales.load"', '"report": "sales.report"']


@pytest.mark.parametrize("module, text", [
    ("sales.load", "def run(conn, **kwargs): print('it runs')"), (None, None)])
def test_what_is_told_of_an_unedited_copy_can_be_pasted_and_runs(sandbox, module, text):
    copy_unedited(sandbox)
    if module:
        sandbox.tool(module, text)
    ended = sandbox.run()
    assert ended.code == 2 and ("Write a tool, hello.py" in ended.err) is not bool(module)
    if not module:
        sandbox.tool("hello", "\n".join(re.findall(r"^def run.*\n.*$", ended.err, re.M)))
    paste(sandbox, ended.err)
    again = sandbox.run()
    assert again.code == 0 and again.out == ("it runs\n" if module else "hello\n"), again


def test_an_example_with_a_module_missing_is_told_as_any_other(sandbox):
    copy_unedited(sandbox).tool("example.fetch", "def run(): pass")
    ended = sandbox.run("fetch", "render")
    assert ended.code == 2 and "there is no module 'example.render'" in ended.err
