"""Where a pipeline is: its modules are found, and its history is one, however it is started."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, SQLITE

TOOLS = 'TOOL_MAP = {"a": "a", "b": {"module": "b", "isolate": True}}'


@pytest.fixture
def folder(sandbox):
    """A pipeline of two tools, one of them in a worker, that write down what they are told."""
    sandbox.pipeline(SQLITE + TOOLS).tool("a", "def run(): print('a was here')")
    return sandbox.tool("b", "import helper\ndef run(): print('b was here')").tool("helper", "")


def python(*words, cwd, **env):
    """Run Python; return how that ended."""
    return subprocess.run([sys.executable, "-B", *words], cwd=cwd, capture_output=True, timeout=60,
                          stdin=subprocess.DEVNULL, encoding="utf-8", errors="backslashreplace",
                          env={**ENVIRONMENT, **env})


@pytest.mark.parametrize("cwd", ["beside it", "elsewhere"])
@pytest.mark.parametrize("how", ["-P", "-I", "PYTHONSAFEPATH", "spawn", "plain"])
def test_modules_are_found_beside_the_file_however_python_is_started(folder, tmp_path_factory, how,
                                                                    cwd):
    if how in ("-P", "PYTHONSAFEPATH", "spawn") and sys.version_info < (3, 11):
        pytest.skip("-P is of 3.11")
    words = {"spawn": ["-P"], "plain": [], "PYTHONSAFEPATH": []}.get(how, [how])
    env = {"PYTHONSAFEPATH": "1" * (how == "PYTHONSAFEPATH"),
           "ORCHESTRATOR_SPAWN": "1" * (how == "spawn")}
    cwd = folder.folder if cwd == "beside it" else tmp_path_factory.mktemp("elsewhere")
    for more in ([], ["-j", "2"], ["--check"], ["--plan"]):
        ended = python(*words, str(folder.folder / "orchestrator.py"), *more, cwd=cwd, **env)
        assert ended.returncode == 0, ended
        assert more[:1] in (["--check"], ["--plan"]) or "b was here" in ended.stdout


def test_a_file_that_hides_a_module_is_told_also_where_python_would_not_look(folder):
    folder.tool("json", "")
    ended = python("-I", "orchestrator.py", cwd=folder.folder)
    assert ended.returncode == 2 and "json.py hides Python's own json" in ended.stderr, ended


@pytest.mark.skipif(sys.platform == "win32", reason="links of POSIX")
@pytest.mark.parametrize("words", [[], ["-j", "2"]], ids=" ".join)
def test_a_link_to_the_file_has_its_history_its_name_and_its_lock(folder, tmp_path_factory, words):
    link = tmp_path_factory.mktemp("bin") / "pipe.py"
    link.symlink_to(folder.folder / "orchestrator.py")
    assert python(str(folder.folder / "orchestrator.py"), cwd="/").returncode == 0
    ended = python(str(link), *words, cwd=link.parent)
    assert ended.returncode == 0 and "(run 2)" in ended.stderr, ended
    assert not (link.parent / ".orchestrator").exists()
    shown = python(str(link), "--history", "--json", cwd=link.parent)
    assert len(json.loads(shown.stdout)["runs"]) == 2
    assert len([path for path in (folder.folder / ".orchestrator").iterdir() if path.is_dir()]) == 1


@pytest.fixture
def no_text(tmp_path):
    """A pipeline in a folder, and in a file, whose names are bytes that are no text."""
    place = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        os.mkdir(place)
    except OSError:
        pytest.skip("this file system has texts as names")
    return os.fsdecode(place)


def write(folder, file, text):
    with open(os.path.join(folder, file), "w", encoding="utf-8") as out:
        out.write(text)


@pytest.mark.parametrize("file", [b"orchestrator.py", b"p\xe9.py"])
def test_a_folder_whose_name_is_no_text_is_a_place_like_any(sandbox, no_text, file):
    sandbox.pipeline("""
        TOOL_MAP = {"a": "a", "b": {"module": "b", "isolate": True}, "c": "c"}
        def add_arguments(parser):
            parser.add_argument("--since")
    """ + SQLITE.replace("\n", "\n        "))
    write(no_text, os.fsdecode(file), sandbox.read("orchestrator.py"))
    write(no_text, "a.py", "def run(since=None): return since or __file__\n")
    write(no_text, "b.py", "def run(context): print(context.results['a'])\n")
    write(no_text, "c.py", "def items(): return ['x', 'y']\ndef run(item): pass\n")
    path = os.path.join(no_text, os.fsdecode(file))
    for words in ([], ["-j", "2"], ["--since", os.fsdecode(b"\xe9")], ["--items", "c"],
                  ["--items", "c", "--json"], ["--history"], ["--history", "--json"], ["--status"],
                  ["--logs"], ["--logs", "--json"], ["--list", "--json"], ["--check"], ["--plan"]):
        ended = python(path, *words, cwd="/")
        assert ended.returncode == 0, (words, ended)
        assert "--json" not in words or json.loads(ended.stdout)
    ended = python(path, "--item", os.fsdecode(b"\xe9"), "c", cwd="/")
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 2, ended
    ended = python(path, os.fsdecode(b"\xe9"), cwd="/")
    assert ended.returncode == 2 and "There is no tool or stage" in ended.stderr, ended
