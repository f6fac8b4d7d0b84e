"""A file beside the pipeline that hides a module of Python's own is told before all else."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOP

import orchestrator

PIPELINE = "def get_connection(): return None\nTOOL_MAP = {'a': 'a', 'b': 'b'}"
NAMES = ["argparse", "ast", "asyncio", "collections", "datetime", "difflib", "functools", "hashlib",
         "inspect", "json", "logging", "multiprocessing", "operator", "pickle", "random", "re",
         "select", "shlex", "shutil", "signal", "socket", "sqlite3", "subprocess", "tempfile",
         "threading", "token", "traceback", "types", "typing", "zlib"]


@pytest.fixture
def folder(sandbox):
    """A pipeline of two tools, whose part above the mark imports nothing."""
    sandbox.pipeline(PIPELINE)
    path = sandbox.folder / "orchestrator.py"
    path.write_text(sandbox.read(path).replace("from pathlib import Path\n", ""), encoding="utf-8")
    return sandbox.tool("a", "def run(): print('a was here')").tool("b", "def run(): pass")


def python(folder, *words, **more):
    """Run Python in a folder; return how that ended."""
    return subprocess.run([sys.executable, "-B", *words], cwd=folder, capture_output=True,
                          stdin=subprocess.DEVNULL, encoding="utf-8", timeout=60, **more)


def is_told(ended, path, name):
    """Return whether all that is said is that a file hides a module, and what to do."""
    said = ended.stderr.splitlines()
    return (ended.returncode, ended.stdout, len(said), said[0]) \
        == (2, "", 2, f"{path} hides Python's own {name}; rename it.") and said[1].startswith("  ")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_the_name_of_a_module_that_the_engine_needs_is_told(folder, name):
    folder.tool(name, "def run(): pass")
    ended = folder.run()
    assert (ended.code, ended.out) == (2, ""), ended
    assert ended.err.startswith(f"{folder.folder / name}.py hides Python's own {name}; rename it.")


@pytest.mark.parametrize("words", [[], ["a"], ["--check"], ["--list", "--json"], ["--plan"],
                                   ["--history"], ["--resume"], ["--help"], ["--version"],
                                   ["-j", "2"]], ids=" ".join)
@pytest.mark.parametrize("start", [["orchestrator.py"], ["-m", "orchestrator"]], ids=" ".join)
def test_every_command_tells_it(folder, start, words):
    folder.tool("json", "raise ValueError('imported')")
    ended = python(folder.folder, *start, *words)
    assert is_told(ended, folder.folder / "json.py", "json"), ended
    assert not (folder.folder / ".orchestrator").exists()


@pytest.mark.parametrize("name", ["logging", "argparse", "json"])
def test_a_package_hides_a_module_as_well_and_a_folder_does_not(folder, name):
    folder.tool(f"{name}.fetch", "def run(): pass")
    assert folder.run().code == 0
    folder.tool(f"{name}.__init__", "")
    assert is_told(python(folder.folder, "orchestrator.py"), folder.folder / name, name)


def test_all_of_them_are_told_at_once(folder):
    folder.tool("json", "").tool("signal", "").tool("random.__init__", "")
    ended = folder.run()
    assert [line.rpartition("/")[2].split()[0] for line in ended.err.splitlines()[:3]] \
        == ["json.py", "random", "signal.py"], ended


def test_one_that_the_users_own_part_has_imported_is_told(sandbox):
    sandbox.pipeline("import json\n" + PIPELINE).tool("json", "").tool("a", "").tool("b", "")
    assert "json.py hides Python's own json" in sandbox.run().err


def test_one_in_a_folder_of_pythonpath_is_told(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "shlex.py").write_text("", encoding="utf-8")
    ended = folder.run(env={"PYTHONPATH": str(other)})
    assert ended.err.startswith(f"{other / 'shlex.py'} hides Python's own shlex"), ended


@pytest.mark.parametrize("name", ["statistics", "calendar", "csv", "html", "queue", "secrets",
                                  "sched", "turtle", "time", "itertools"])
def test_a_module_that_the_engine_never_needs_may_be_hidden(folder, name):
    folder.tool(name, "def run(): print('mine')")
    is_built_in = name in sys.builtin_module_names
    if not is_built_in:
        path = folder.folder / "orchestrator.py"
        path.write_text(folder.read(path).replace("'b': 'b'", f"'b': '{name}'"), encoding="utf-8")
    for words in ([], ["-j", "2"], ["--check"]):
        ended = folder.run(*words)
        assert ended.code == 0, ended
        assert is_built_in or words or "mine" in ended.out


def test_one_in_the_working_folder_is_told_where_workers_would_import_it(folder, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("elsewhere")
    (cwd / "signal.py").write_text("raise ValueError('imported')", encoding="utf-8")
    assert folder.run(cwd=cwd).code == 0  # it hides nothing from this process
    ended = folder.run("-j", "2", cwd=cwd)
    assert ended.code == 2 and "signal.py hides Python's own signal" in ended.err, ended
    assert "ValueError" not in ended.err


def test_one_below_the_folder_hides_nothing(folder):
    folder.tool("tools.json", "").tool("tools.logging.__init__", "")
    assert folder.run().code == 0


TWO_FILES = """
    from orchestrator import UserError, main, run_pipeline
    def get_connection(): return None
    TABLES = {"a": "a"}, {}, get_connection
"""


@pytest.mark.parametrize("name", ["argparse", "json", "signal", "typing", "collections"])
def test_a_pipeline_that_imports_the_engine_is_told_by_main(folder, name):
    folder.tool("pipeline", TWO_FILES + "    import sys\n    sys.exit(main(*TABLES))")
    folder.tool(name, "")
    for start in (["pipeline.py"], ["-m", "pipeline"], ["pipeline.py", "--check"]):
        ended = python(folder.folder, *start)
        if "Could not import runpy" not in ended.stderr:  # else -m of Python itself needs it
            assert is_told(ended, folder.folder / f"{name}.py", name), ended


def test_run_pipeline_raises_it(folder):
    folder.tool("pipeline", TWO_FILES + """
    try:
        run_pipeline("a", *TABLES)
    except UserError as error:
        print(error)
    """).tool("json", "")
    ended = python(folder.folder, "pipeline.py")
    assert ended.stdout.startswith(f"{folder.folder / 'json.py'} hides Python's own json"), ended


# --- the text of names in the engine ---

FIND = """
import importlib, sys
always = {"_collections_abc", "genericpath", "os", "posixpath", "site", "stat", *sys.modules}
always.discard("linecache")  # which a start loads on some
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
ours = getattr(sys, "stdlib_module_names", sys.modules)
print(*{name.partition(".")[0] for name in sys.modules}.intersection(ours)
      - {*sys.builtin_module_names, *always, "_typing", "__mp_main__"})
"""


def find_pythons():
    """Return the interpreters here that the engine runs on."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    return [sys.executable, *(str(path) for minor in range(9, 20)
                              for path in root.glob(f"versions/3.{minor}.*/bin/python"))]


def find_imports(nodes):
    """Return the modules that some statements import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{each.name}" for each in node.names)


@pytest.mark.parametrize("python", find_pythons())
def test_the_names_are_all_that_the_engine_imports_and_what_that_imports(python):
    tree = ast.parse((TOP / "orchestrator.py").read_text(encoding="utf-8"))
    ended = subprocess.run([python, "-I", "-S", "-c", FIND, *find_imports(ast.walk(tree))],
                           capture_output=True, text=True, timeout=60)
    assert "json" in ended.stdout.split(), ended.stderr
    assert set(ended.stdout.split()) - set(orchestrator._NEEDED.split()) == set()


@pytest.mark.parametrize("python", find_pythons())
def test_the_names_at_the_top_are_all_that_is_loaded_with_the_file(python):
    use = ("import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules); "
           "import orchestrator; print(*set(sys.modules) - before)")
    ended = subprocess.run([python, "-B", "-S", "-c", use, str(TOP)], capture_output=True,
                           text=True, timeout=60)
    loaded = {name.partition(".")[0] for name in ended.stdout.split()}
    assert "argparse" in loaded, ended.stderr
    assert (loaded & set(orchestrator._NEEDED.split())) - set(orchestrator._AT_TOP.split()) == set()


def test_the_names_are_sorted_and_each_is_there_once():
    for names in (orchestrator._NEEDED, orchestrator._AT_TOP):
        assert names.split() == sorted(set(names.split()))

