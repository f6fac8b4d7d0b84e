"""The room MODULES: which names are modules, and that a script is not run by its import."""
import os
import sys

import pytest
from conftest import SQLITE

NAMES = ["pipeline.02_build", "my-scripts.go", "2024.load", "2024.deep-er.3", "1"]
TOOL = '''
"""Builds it."""
def items(): return ["x", "y"]
def run(item, conn): print("ran", item)
'''
SCRIPT = """
from pathlib import Path
Path(__file__).with_name("was-run").touch()
print("the script has run")
"""
ways = pytest.mark.parametrize("words", [[], ["--jobs", "2"], ["--no-history"]], ids=" ".join)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_of_any_name_is_read_run_and_its_items_known(quick, name):
    quick.pipeline(SQLITE + f"TOOL_MAP = {{'t': {name!r}}}").tool(name, TOOL)
    assert quick.run("--check").out == "1 tool read, no mistakes found\n"
    assert "Builds it." in quick.run("--list").out
    assert "each item exactly once" in quick.run("--plan").out
    for words in ([], ["--jobs", "2"]):
        ended = quick.run(*words)
        assert ended.code == 0 and (words or ended.out == "ran x\nran y\n"), ended
    assert "success" in quick.run("--items", "t").out
    quick.tool(name, TOOL.replace("(item, conn)", "(item, nope)"))
    ended = quick.run("--check")
    path = os.path.join(*name.split(".")) + ".py"
    assert ended.code == 2 and ended.out.startswith(f"{path}:4: TOOL_MAP['t']: run() of {name}")


def test_such_a_module_runs_in_workers_of_a_fresh_program(sandbox):
    sandbox.pipeline("TOOL_MAP = {'a': 'my-scripts.go', 'b': '2024.02_load:do'}", file="my-pipe.py")
    sandbox.tool("my-scripts.go", "def run(): print('a ran')")
    sandbox.tool("2024.02_load", "def do(): print('b ran')")
    ended = sandbox.run("--jobs", "2", file="my-pipe.py")
    assert ended.code == 0 and sorted(ended.out.splitlines()) == ["a ran", "b ran"], ended


def test_a_name_that_is_not_there_is_answered_with_the_nearest(quick):
    quick.pipeline("TOOL_MAP = {'t': 'my-scripts.02_laod'}").tool("my-scripts.02_load", TOOL)
    ended = quick.run()
    assert ended.code == 2 and "Did you mean 'my-scripts.02_load'?" in ended.err, ended


def test_modules_of_such_names_are_proposed_for_the_first_table(sandbox):
    sandbox.pipeline('TOOL_MAP = {"fetch": "example.fetch"}')
    sandbox.tool("my-scripts.02_go", "def run(conn): pass")
    assert '"02_go": "my-scripts.02_go",' in sandbox.run().err


# --- a folder that a file hides ---

def test_a_folder_that_has_the_name_of_the_main_program_is_told_to_be_hidden(sandbox):
    sandbox.pipeline("TOOL_MAP = {'t': 'pipeline.02_build'}", file="pipeline.py")
    sandbox.tool("pipeline.02_build", "def run(): print('built')")
    for words in ([], ["--plan"], ["--check"]):
        ended = sandbox.run(*words, file="pipeline.py")
        said = ended.out + ended.err
        assert ended.code == 2 and ("there is no module 'pipeline.02_build': the file pipeline.py "
                                    "hides the folder pipeline from Python.\n") in said, ended
        assert "__init__.py" in said
    sandbox.tool("pipeline.__init__", "")  # the way out that it says
    for words in (["--check"], [], ["--jobs", "2"]):
        ended = sandbox.run(*words, file="pipeline.py")
        assert ended.code == 0, ended
    assert ended.out == "built\n"


def test_so_is_one_that_has_the_name_of_a_module_of_pythons_own(sandbox):
    sandbox.pipeline("TOOL_MAP = {'t': 'this.load'}").tool("this.load", "def run(): pass")
    ended = sandbox.run()
    assert ended.code == 2 and "this.py hides the folder this from Python." in ended.err, ended


# --- a script is not run by its import ---

@ways
def test_a_script_is_refused_and_not_run_with_the_command_to_write(quick, words):
    quick.pipeline("TOOL_MAP = {'t': 'my-scripts.go'}").tool("my-scripts.go", SCRIPT)
    ended = quick.run(*words)
    path = os.path.join("my-scripts", "go.py")
    assert (ended.code, ended.out) == (2, "") and ended.err == (
        f"TOOL_MAP['t']: {path} has no function run().\n"
        '  Write "command": "python my-scripts/go.py", or `def run(conn, **kwargs):` in it.\n')
    assert not (quick.folder / "my-scripts" / "was-run").exists()


@pytest.mark.parametrize("words", [["--plan"], ["--check"]], ids=" ".join)
def test_plan_and_check_say_the_same(quick, words):
    quick.pipeline("TOOL_MAP = {'t': 'go'}").tool("go", SCRIPT)
    ended = quick.run(*words)
    assert ended.code == 2
    assert '\n  Write "command": "python go.py", or `def run(conn, **kwargs):` in it.\n' \
        in ended.out + ended.err


def test_all_scripts_are_told_at_once_and_none_has_run(quick):
    quick.pipeline("TOOL_MAP = {'a': 'a', 'b': 'b', 'c': 'c', 'd': 'a'}")
    quick.tool("a", SCRIPT).tool("b", SCRIPT).tool("c", SCRIPT + "def run(): pass")
    ended = quick.run()
    assert ended.code == 2 and [f"TOOL_MAP[{each!r}]" in ended.err for each in "abcd"] \
        == [True, True, False, True]
    assert not (quick.folder / "was-run").exists()


def test_of_a_tool_that_is_not_run_the_module_does_not_matter(quick):
    quick.pipeline("TOOL_MAP = {'a': 'a', 'b': 'b'}")
    quick.tool("a", SCRIPT).tool("b", "def run(): print('b')")
    assert quick.run("b").out == "b\n"


@pytest.mark.parametrize("source", [
    "run = None\ndef go(): pass\nrun = go", "from other import run", "from other import *",
    "import other as run", "class run:\n    def __init__(self): pass",
    "if True:\n    def run(): pass", "try:\n    run\nexcept NameError:\n    async def run(): pass",
    "for run in [lambda: 1]: pass",
    "with __import__('contextlib').nullcontext(lambda: 1) as run: pass",
    "text = '''\ndef run(): pass\n'''\nfrom other import run",
    "import sys\nasync def run(): pass", "def run (): pass",
], ids=range(12))
def test_a_module_that_gets_the_function_in_any_way_that_can_be_read_is_run(quick, source):
    quick.pipeline("TOOL_MAP = {'t': 't'}").tool("t", source)
    quick.tool("other", "def run(): pass\nsys = __import__('sys')\n"
                        "if __name__ == 'other': sys.modules['other'].__class__ = type(\n"
                        "    'M', (type(sys),), {'__call__': lambda self: None})")
    ended = quick.run()
    assert ended.code == 0, ended


@pytest.mark.parametrize("source", [
    "globals()['run'] = print", "def __getattr__(name): return print",
    "def main():\n    def run(): pass", "# def run(): pass",
    "class Tool:\n    def run(self): pass", "x = 'def run(): pass'"], ids=range(6))
def test_one_that_gets_it_in_no_way_that_can_be_read_is_refused_unrun(quick, source):
    quick.pipeline("TOOL_MAP = {'t': 't'}").tool("t", SCRIPT + source)
    assert quick.run().code == 2
    assert not (quick.folder / "was-run").exists()


def test_where_it_can_not_be_read_the_import_decides(quick):
    quick.pipeline("TOOL_MAP = {'t': 't', 'c': 'math:sqrt2'}").tool("t", "def run(:")
    ended = quick.run("t")
    assert ended.code == 2 and "importing t failed, t.py:1:" in ended.err, ended
    ended = quick.run("c")
    assert ended.code == 2 and "has no function sqrt2()" in ended.err, ended
    assert '"command"' not in ended.err


def test_another_function_than_run_is_no_hint_at_a_command(quick):
    quick.pipeline("TOOL_MAP = {'t': 't:daily'}").tool("t", SCRIPT)
    ended = quick.run()
    assert ended.code == 2 and ended.err.endswith("\n  Write `def daily(conn, **kwargs):` in it.\n")
    assert not (quick.folder / "was-run").exists()


def test_a_module_that_is_imported_already_is_asked_itself(modules):
    import orchestrator
    modules(made="x = 1")
    import made
    made.run = lambda: "made"
    assert orchestrator.run_pipeline([], {"t": "made"}).results["t"] == "made"
    assert sys.modules["made"] is made
