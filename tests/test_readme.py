"""Every command of the README runs, and what it shows is what is printed."""
import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import textwrap

import pytest
from conftest import ENVIRONMENT, TOP, Sandbox

from orchestrator import OPTIONS

README = (TOP / "README.md").read_text(encoding="utf-8")
BLOCKS = [(kind, textwrap.dedent(body)) for kind, body in
          re.findall(r"^ *```(\w+)\n(.*?)^ *```$", README, re.M | re.S)]
FILES = ["orchestrator.py", "example"]


def blocks(kind, having=""):
    """Return the code blocks of a kind that hold some text."""
    found = [body for each, body in BLOCKS if each == kind and having in body]
    assert found, f"the README has no {kind} block with {having!r}"
    return found


def commands(body):
    """Return the commands of a shell block, without the comments behind them."""
    return [line.split("  #")[0].rstrip() for line in body.splitlines()]


SHELL = [command for kind, body in BLOCKS if kind == "sh" for command in commands(body)]
INLINE = re.findall(r"`(python [^`]*)`", re.sub(r"```.*?```", "", README, flags=re.S))


def run(command, cwd):
    """Run a command line of the README with this Python."""
    assert command.startswith("python ")
    return subprocess.run(f'"{sys.executable}"{command[len("python"):]}', shell=True, cwd=cwd,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          encoding="utf-8",
                          env={**ENVIRONMENT, "PYTHONIOENCODING": "utf-8"})


def normal(text):
    """Return the lines of an output without what differs from run to run, or from Python to
    Python: moments, durations, the folder, blanks, marks below a line of a traceback.
    """
    text = re.sub(r"\d\d:\d\d:\d\d", "HH:MM:SS", text)
    text = re.sub(r"\d+\.\d+ s\b", "TIME", text)
    text = re.sub(r'File ".*/(sales/\w+\.py)"', r'File "\1"', text)
    text = re.sub(r"^ *[~^]+$", "", text, flags=re.M)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def shows(screen, lines):
    """Return whether a screen shows these lines, where `...` stands for any others."""
    parts = ["(.*\n)*?" if line == "..." else re.escape(line) + "\n" for line in screen]
    return re.fullmatch("".join(parts), "".join(line + "\n" for line in lines))


@pytest.fixture
def example(tmp_path):
    """A copy of what the README's first commands run in."""
    for name in FILES:
        copy = shutil.copytree if (TOP / name).is_dir() else shutil.copy
        copy(TOP / name, tmp_path / name)
    return tmp_path


REPORT = '''"""Print what was sold."""

def run(conn, **kwargs):
    print(conn.execute("SELECT count(*), sum(price) FROM sales").fetchone())
'''


def write_copied(sandbox):
    """Write the pipeline that the README tells to write, with the tool with items."""
    tables = blocks("python", "TOOL_MAP = {")[0]
    last = '"report": "sales.report",\n'
    assert last in tables
    sandbox.pipeline(tables.replace(last, last + '    "load_files": "sales.load_files",\n'))
    sandbox.tool("sales.load_files", blocks("python", "def items():")[0])
    (sandbox.folder / "sales" / "inbox").mkdir()
    (sandbox.folder / "sales" / "inbox" / "monday.csv").write_text("item,price\napple,0.5\n")
    sandbox.tool("sales.load", blocks("python", '"""Load')[0])
    sandbox.tool("sales.report", REPORT)
    (sandbox.folder / "run_all.sh").write_text("python sales/load.py\npython sales/report.py\n")
    return sandbox


@pytest.fixture
def copied(sandbox):
    """The pipeline that the README tells to write, in an empty folder."""
    return write_copied(sandbox)


def test_a_screen_of_the_readme_is_what_is_printed(copied):
    screen, = blocks("console")
    copied.tool("sales.report", REPORT.replace("price", "prise"))
    for part in re.split(r"^\$ ", screen, flags=re.M)[1:]:
        command, _, shown = part.partition("\n")
        if command.startswith("python "):
            printed = run(command, copied.folder).stdout
            assert shows(normal(shown), normal(printed)), printed
        else:
            file, old, new = re.fullmatch(r"nano (\S+) +# (\w+) -> (\w+)", command).groups()
            assert old in copied.read(file)
            copied.folder.joinpath(file).write_text(copied.read(file).replace(old, new))


def test_a_screen_that_is_not_what_is_printed_is_found():
    assert shows(["a", "...", "c"], ["a", "c"]) and shows(["...", "c"], ["a", "b", "c"])
    assert not shows(["a", "...", "c"], ["a", "b"]) and not shows(["a", "c"], ["a", "b", "c"])


def test_the_first_commands_make_the_page_and_pull_the_plug(example):
    page, plug, _ = commands(blocks("sh")[0])
    assert run(page, example).returncode == 0
    assert "<svg" in (example / "output" / "flights.html").read_text(encoding="utf-8")
    ended = run(plug, example)
    assert ended.returncode == 0 and "each done once" in ended.stdout, ended.stdout


def test_the_readme_is_short_and_its_picture_small():
    assert len(README.splitlines()) <= 280
    assert (TOP / "example" / "flights.png").stat().st_size < 150_000


def test_every_file_and_folder_that_the_readme_names_is_there():
    named = re.findall(r"[`(]((?:example|tests)/[\w./]*)[`)]", README)
    assert len(named) > 5 and [each for each in named if not (TOP / each).exists()] == []


def test_every_option_of_a_tool_stands_in_the_readme():
    rows = " ".join(re.findall(r"^\| `.*", README, re.M))
    assert [name for name in OPTIONS if f'"{name}"' not in rows] == []


def test_the_file_may_have_any_name(copied):
    (copied.folder / "orchestrator.py").rename(copied.folder / "nightly.py")
    assert copied.run(file="nightly.py").code == 0
    ended = copied.run("nobody", file="nightly.py")
    assert ended.code == 2 and "no tool or stage 'nobody'" in ended.err
    assert "usage: nightly.py" in copied.run("--help", file="nightly.py").out


@pytest.fixture(scope="module")
def has_run(tmp_path_factory):
    """The same pipeline, which ran once. It is to be copied."""
    folder = tmp_path_factory.mktemp("has_run")
    write_copied(Sandbox(folder))
    for target in ("full", "load_files"):
        assert run(f"python orchestrator.py {target}", folder).returncode == 0
    return folder


@pytest.mark.parametrize("command", dict.fromkeys(
    [*(c for c in SHELL if " orchestrator.py" in c), *INLINE]))
def test_a_command_of_the_readme_works_in_the_pipeline_that_it_tells_to_write(has_run, tmp_path,
                                                                              command):
    folder = tmp_path / has_run.name  # by which history knows the pipeline
    shutil.copytree(has_run, folder)
    ended = run(command, folder)
    assert ended.returncode == 0, ended.stdout


def test_no_command_of_the_readme_is_left_out():
    page, plug, tests = commands(blocks("sh")[0])
    assert [c for c in SHELL if " orchestrator.py" not in c] == [plug, tests]


def test_the_tests_are_one_line_that_makes_its_own_environment():
    line, = [command for command in SHELL if "pytest" in command]
    assert line.startswith("python -m venv") and line.endswith("-m pytest -q -n 4")
    assert "pip install" in line


def test_every_python_block_is_python():
    for body in blocks("python"):
        compile(body, "README.md", "exec")


def test_every_get_connection_of_the_readme_imports_what_it_uses(tmp_path):
    for body in blocks("python", "sqlite3.connect(Path"):
        names = {"__file__": str(tmp_path / "orchestrator.py")}
        exec(body, names)
        names["get_connection"]().close()


def test_the_hooks_of_the_readme_work_above_the_mark(copied):
    copied.pipeline(blocks("python", "TOOL_MAP = {")[0] + blocks("python", "def add_arguments")[0])
    copied.tool("sales.load", blocks("python", '"""Load')[0].replace("(conn)", "(conn, since)"))
    assert "--since DATE" in run("python orchestrator.py --help", copied.folder).stdout
    for words, database in [("", "dev.db"), (" --since 2013-01-03 --env prod", "prod.db")]:
        ended = run(f"python orchestrator.py load{words}", copied.folder)
        assert ended.returncode == 0, ended.stdout
        with contextlib.closing(sqlite3.connect(copied.folder / database)) as conn:
            assert conn.execute("SELECT count(*) FROM sales").fetchone() == (2,)


def test_the_scripts_of_the_readme_run(copied):
    (copied.folder / "fetch.py").write_text("print('fetched')")
    (copied.folder / "train.py").write_text("import sys\nprint('trained', *sys.argv[1:])")
    copied.pipeline(blocks("python", '"command"')[0]
                    + "STAGES = {}\ndef get_connection(): return None\n")
    ended = run("python orchestrator.py", copied.folder)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.count("fetched") == 1
    for year in ("2013", "2014"):
        assert f"trained --year {year}" in ended.stdout


def test_the_python_lines_of_the_readme_run(copied):
    (copied.folder / "notebook.py").write_text(
        blocks("python", "from orchestrator import run_pipeline")[0])
    assert "success {'load': 2} {}" in run("python notebook.py", copied.folder).stdout


def test_a_row_that_was_committed_late_is_taken_and_none_twice(copied):
    copied.tool("sales.load", (TOP / "example" / "copy_changed.py").read_text())
    with contextlib.closing(sqlite3.connect(copied.folder / "sales.db")) as conn:
        conn.execute("CREATE TABLE incoming (id INTEGER, price REAL, changed_at TEXT)")
        conn.execute("CREATE TABLE copied (id INTEGER PRIMARY KEY, price REAL)")
        for rows in ([(1, 0, "now"), (2, 0, "now")], [(3, 5, "-9 minutes"), (1, 7, "now")]):
            for number, price, at in rows:
                conn.execute("INSERT INTO incoming VALUES (?, ?, datetime('now', ?))",
                             (number, price, at if at != "now" else "+0 days"))
            conn.commit()
            assert copied.run("load").code == 0
        assert conn.execute("SELECT * FROM copied").fetchall() == [(1, 7.0), (2, 0.0), (3, 5.0)]


def test_days_are_items_of_a_tool_that_lags_behind(copied):
    select, = re.findall(r'`(return "SELECT DISTINCT [^`]*)`', README)
    copied.tool("sales.load_files", f"def items(conn): {' '.join(select.split())}\n"
                                    "def run(conn, item): pass")
    with contextlib.closing(sqlite3.connect(copied.folder / "sales.db")) as conn:
        conn.execute("CREATE TABLE incoming (changed_at TEXT)")
        conn.execute("INSERT INTO incoming VALUES ('2013-01-01 10:00'), (datetime('now', '1 day'))")
        conn.commit()
    assert "1 item done" in copied.run("load_files").err


def test_the_module_can_be_compiled_beforehand(copied):
    command, = [each for each in INLINE if "compileall" in each]
    assert run(command, copied.folder).returncode == 0
    assert list((copied.folder / "__pycache__").glob("orchestrator.*.pyc"))


def test_a_second_pipeline_runs_on_the_same_engine(copied):
    first, last = re.findall(r"`(from orchestrator import main|if __name__ .*main\([^`]*)`", README)
    tables = blocks("python", "TOOL_MAP = {")[0]
    copied.pipeline(tables)
    (copied.folder / "second.py").write_text(f"{first}\n{tables}\n{last}\n")
    assert "report" in run("python second.py --list", copied.folder).stdout
    assert run("python second.py", copied.folder).returncode == 0


def test_the_tool_with_items_does_each_file_once_and_a_new_version_again(copied):
    inbox = copied.folder / "sales" / "inbox"
    for name, text, rows in [("tuesday.csv", "pear,1", 2), ("tuesday.csv", "pear,1\nfig,2", 3),
                             ("tuesday.csv", None, 3), ("bad.csv", "apple,none", 3)]:
        if text:
            (inbox / name).write_text(f"item,price\n{text}\n")
            os.utime(inbox / name, ns=(rows, rows))
        ended = copied.run("load_files")
        count = sqlite3.connect(copied.folder / "sales.db").execute("SELECT count(*) FROM orders")
        assert (ended.code, count.fetchone()[0]) == (int(name == "bad.csv"), rows)
    assert "could not convert string to float" in copied.run("--items", "load_files").out
