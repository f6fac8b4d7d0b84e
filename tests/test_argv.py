"""sys.argv belongs to the orchestrator: a tool that reads it finds its own name, and no flags."""
import contextlib
import json
import os
import signal
import sys
import threading

import pytest
from conftest import SQLITE

from orchestrator import UserError, main, run_pipeline

WAYS = {"one after another": (), "side by side": ("--jobs", "2")}
ways = pytest.mark.parametrize("way", WAYS)
SPIES = """
    import json, os, sys
    HERE = os.path.dirname(os.path.abspath(__file__))

    def tell(where):
        with open(os.path.join(HERE, "told"), "a") as file:
            file.write(json.dumps([where, sys.argv]) + "\\n")

    tell("import")

    def run(conn, **kwargs):
        tell("run")

    def check(conn):
        tell("check")
"""
ITEMS = """
    def items(conn):
        tell("items")
        yield "a"
        tell("items")
        yield "b"
"""
TABLES = """
    TOOL_MAP = {"load": "load", "files": "files",
                "sent": {"module": "sent", "each": "files"},
                "alone": {"module": "alone", "isolate": True}}
    def add_arguments(parser):
        parser.add_argument("--region")
"""


def told(sandbox):
    """Return what the tools found in sys.argv: {(where, its text), ...}."""
    lines = sandbox.read("told").splitlines()
    (sandbox.folder / "told").unlink()
    return {(where, " ".join(argv)) for where, argv in map(json.loads, lines)}


@pytest.fixture
def spies(sandbox):
    """A pipeline of spies, whose get_connection needs its file, and so the top of one."""
    sandbox.pipeline(TABLES.replace("\n    ", "\n") + SQLITE)
    for name in ("load", "files", "sent", "alone"):
        sandbox.tool(name, SPIES + ITEMS * (name == "files"))
    return sandbox


# --- its name alone ---

@pytest.mark.parametrize("spawn", ["", "1"])
@ways
def test_a_tool_finds_its_name_alone_while_it_is_imported_and_called(spies, way, spawn):
    ended = spies.run("--force", "--region", "eu", *WAYS[way], env={"ORCHESTRATOR_SPAWN": spawn})
    assert ended.code == 0, ended
    steps = {"load": "import run check", "files": "import items run check",
             "sent": "import run check", "alone": "import run check"}
    assert told(spies) == {(step, tool) for tool in steps for step in steps[tool].split()}


@ways
def test_a_force_of_the_run_is_none_of_the_tools(sandbox, way):
    sandbox.pipeline('TOOL_MAP = {"load": "load"}' + SQLITE).tool("load", """
        import argparse
        def run(conn):
            parser = argparse.ArgumentParser()
            parser.add_argument("--force", action="store_true")
            conn.execute("CREATE TABLE IF NOT EXISTS sales (day)")
            if parser.parse_args().force:
                conn.execute("DROP TABLE sales")
    """)
    ended = sandbox.run("--force", *WAYS[way])
    assert ended.code == 0, ended
    assert sandbox.query("SELECT name FROM sqlite_master") == [("sales",)]


@ways
def test_a_module_of_several_tools_is_imported_under_the_first(quick, way):
    quick.pipeline('TOOL_MAP = {"a": "spy", "b": "spy"}' + SQLITE).tool("spy", SPIES)
    assert quick.run(*WAYS[way], "--exclude", "b").code == 0
    assert told(quick) == {("import", "a"), ("run", "a"), ("check", "a")}
    assert quick.run().code == 0
    assert told(quick) == {("import", "a"), ("run", "a"), ("check", "a"),
                           ("run", "b"), ("check", "b")}


@ways
def test_get_connection_is_the_programs_and_finds_its_words(sandbox, way):
    sandbox.pipeline("""
        import sys
        TOOL_MAP = {"load": "load", "files": "files"}
        def add_arguments(parser):
            parser.add_argument("--test", action="store_true")
        def get_connection():
            import sqlite3
            name = "test.db" if "--test" in sys.argv else "data.db"
            return sqlite3.connect(Path(__file__).with_name(name))
    """)
    sandbox.tool("load", SPIES).tool("files", SPIES + ITEMS)
    ended = sandbox.run("--test", *WAYS[way])
    assert ended.code == 0, ended
    assert (sandbox.folder / "test.db").exists() and not (sandbox.folder / "data.db").exists()
    assert {argv for _, argv in told(sandbox)} == {"load", "files"}


# --- what a tool makes of it ---

@pytest.mark.parametrize("makes", [
    "sys.argv += ['--day', '1']", "sys.argv = ['tool', 'x']", "sys.argv[:] = []", "del sys.argv[0]",
    "sys.argv.insert(0, 'x')", "del sys.argv",
])
@ways
def test_what_a_tool_makes_of_it_ends_with_the_call(quick, makes, way):
    quick.pipeline('TOOL_MAP = {"load": "load", "files": "files", "last": "spy"}' + SQLITE)
    meddles = SPIES.replace('tell("import")', 'tell("import")\n    ' + makes) \
        .replace('tell("run")', f'tell("run"); {makes}')
    quick.tool("load", meddles)
    quick.tool("files", meddles + ITEMS.replace("yield", makes + "\n        yield", 1)
               .replace('tell("items")\n        yield "b"', 'yield "b"'))
    quick.tool("spy", SPIES)
    ended = quick.run(*WAYS[way])
    assert ended.code == 0, ended
    assert {argv for _, argv in told(quick)} == {"load", "files", "last"}


@pytest.mark.parametrize("where", ["import", "run"])
@pytest.mark.parametrize("makes", ["sys.argv = ['other.py', '--flag']", "sys.argv[0] = 'other.py'",
                                   "sys.argv.clear()"])
def test_the_command_to_type_next_names_the_program(sandbox, makes, where):
    at_import = makes if where == "import" else ""
    in_run = makes if where == "run" else "pass"
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool("t", f"""
        import sys
        {at_import}
        def run():
            {in_run}
            raise ValueError("no")
    """)
    for flags, again in (("", "--resume"), ("--no-history", "--no-history --from t")):
        ended = sandbox.run(*flags.split())
        file = sandbox.folder / "orchestrator.py"
        assert ended.err.splitlines()[-1].endswith(f" {file} {again}"), ended


def test_the_command_to_type_next_is_right_off_the_main_thread_too(modules, capsys, monkeypatch):
    modules(m="import sys\ndef run():\n    sys.argv = ['other.py']\n    raise ValueError")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    before = sys.argv
    try:
        thread = threading.Thread(target=main, args=({"t": "m"},), kwargs={"argv": []})
        thread.start()
        thread.join()
    finally:
        sys.argv = before
    err = capsys.readouterr().err
    assert "Next: " in err and "other.py" not in err


# --- put back ---

@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("ends", [
    "pass", "raise ValueError", "sys.exit()", "sys.exit(3)", "raise BaseException",
    "raise KeyboardInterrupt", "os.kill(os.getpid(), signal.SIGINT)",
])
@pytest.mark.parametrize("where", ["import", "run", "check", "items", "item"])
def test_the_same_list_is_back_afterwards_however_a_tool_ends(modules, ends, where):
    at = dict.fromkeys(["import", "run", "check", "items", "item"], "pass")
    at[where] = ends
    has_items = where in ("items", "item")
    folder = modules()
    (folder / "m.py").write_text(f"""
import os, signal, sys
seen = [sys.argv]
sys.argv = [*sys.argv]
{at["import"]}
def run(**kwargs):
    seen.append(sys.argv)
    {at["item" if has_items else "run"]}
def check():
    seen.append(sys.argv)
    {at["check"]}
""" + f"""
def items():
    seen.append(sys.argv)
    {at["items"]}
    return ["a"]
""" * has_items)
    before, words = sys.argv, [*sys.argv]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with contextlib.suppress(BaseException):
            run_pipeline([], {"t": "m"})
    finally:
        signal.signal(signal.SIGINT, handler)
    assert sys.argv is before and sys.argv == words
    if where != "import":
        assert {*map(tuple, sys.modules["m"].seen)} == {("t",)}


def test_a_run_within_a_tool_gives_the_tool_its_own_back(modules):
    modules(inner="import sys\ndef run(): return list(sys.argv)", outer="""
        import sys
        from orchestrator import run_pipeline
        def run():
            return [run_pipeline([], {"small": "inner"}).results["small"], list(sys.argv)]
    """)
    assert run_pipeline([], {"big": "outer"}).results == {"big": [["small"], ["big"]]}


def test_off_the_main_thread_it_stays_the_host_programs(modules):
    modules(m="import sys\ndef run(): return list(sys.argv)")
    before, found = sys.argv, []
    thread = threading.Thread(
        target=lambda: found.append(run_pipeline([], {"t": "m"}).results["t"]))
    thread.start()
    thread.join()
    assert sys.argv is before and found == [before]
    assert run_pipeline([], {"t": "m"}).results == {"t": ["t"]}
    if hasattr(os, "fork"):  # a worker has a main thread of its own
        thread = threading.Thread(target=lambda: found.append(run_pipeline(
            [], {"t": {"module": "m", "isolate": True}}, None, no_connection).results["t"]))
        thread.start()
        thread.join()
        assert found[1:] == [["t"]]


def no_connection():
    """Be a get_connection that a fresh interpreter can import."""


# --- a parser of arguments in a tool ---

PARSES = """
    import argparse
    def main(argv=None, **kwargs):
        parser = argparse.ArgumentParser()
        parser.add_argument("--day", required=True)
        parser.parse_args(argv)
"""
WHY = ("argparse found nothing in sys.argv, which is the tool's name alone: declare what it needs "
       "in add_arguments(), and let its function take that by name")


@ways
def test_a_tool_that_parses_words_which_it_needs_fails_and_says_why(sandbox, way):
    sandbox.pipeline('TOOL_MAP = {"load": "load:main"}').tool("load", PARSES)
    ended = sandbox.run(*WAYS[way])
    assert ended.code == 1
    assert f"sys.exit(2), {WHY}" in ended.err
    assert "usage: load [-h] --day DAY" in ended.err + ended.out


def test_an_item_that_parses_words_which_it_needs_fails_and_says_why(modules):
    modules(load="def items(): return ['a']\n" + PARSES.replace("\n    ", "\n"))
    assert f"sys.exit(2); {WHY}" in run_pipeline([], {"load": "load:main"}).errors["load"]


def test_items_that_parse_words_which_they_need_fail_and_say_why(modules):
    modules(load=PARSES.replace("\n    ", "\n").replace("main", "items") + "def run(item): pass")
    outcome = run_pipeline([], {"load": "load"}).outcomes["load"]
    assert (outcome.error, outcome.reason) == ("sys.exit(2)", WHY)
    modules(own="import sys\ndef items(): sys.exit(2)\ndef run(item): pass")  # no parser did it
    outcome = run_pipeline([], {"own": "own"}).outcomes["own"]
    assert (outcome.error, outcome.reason) == ("sys.exit(2)", "")


def test_a_module_that_parses_words_when_it_is_imported_is_refused_with_the_way_out(modules):
    modules(load=PARSES.replace("\n    ", "\n") + "main()\ndef run(): pass")
    with pytest.raises(UserError) as caught:
        run_pipeline([], {"load": "load"})
    assert "called sys.exit(2)" in str(caught.value) and WHY in str(caught.value)
