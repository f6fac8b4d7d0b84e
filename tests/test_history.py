"""The history: its folder, its schema, what is recorded and when, and how people look at it."""
import contextlib
import json
import os
import random
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SQLITE, TOP, wait_until

import orchestrator
from orchestrator import (
    APPLICATION_ID, SCHEMA, SCHEMA_VERSION, VERSION, Clock, Request, Session, UserError,
    find_git_commit, find_pipeline_folder, hold_history, load_pipeline, make_file_name, make_past,
    make_plan, run_pipeline, run_plan,
)

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="modes and signals of POSIX")
NO_DATABASE = """
def get_connection():
    return None

"""
FIXTURES = Path(__file__).parent / "data"


def open_history(folder):
    """Return a connection of our own to the only history in a folder, which closes itself."""
    path, = Path(folder).glob("**/history.db")
    conn = sqlite3.connect(path)
    conn.row_factory = sqlite3.Row
    return contextlib.closing(conn)


def ask(folder, sql, *values):
    """Return the rows of a query on the only history in a folder, as dicts."""
    with open_history(folder) as conn:
        return [dict(row) for row in conn.execute(sql, values)]


def of_json(sandbox, *words):
    """Return what a command prints with --json."""
    ended = sandbox.run(*words, "--json")
    assert ended.code == 0, ended
    return json.loads(ended.out)


@pytest.fixture
def line(quick):
    """A pipeline a - b - c of which b fails while the file `broken` is there."""
    quick.pipeline(NO_DATABASE + """
TOOL_MAP = {
    "a": {"module": "m", "needs": []},
    "b": {"module": "m", "needs": ["a"], "retries": 1, "retry_delay": 0},
    "c": {"module": "m", "needs": ["b"]},
}
STAGES = {"full": ["a", "b", "c"]}

def add_arguments(parser):
    parser.add_argument("--day", default="monday")
""").tool("m", """
        import os
        def run(context, day):
            print(context.tool, "speaks")
            if context.tool == "b" and os.path.exists("broken"):
                raise ValueError("b is broken")
            return {"rows": 3, "day": day}
    """)
    return quick


# --- the folder ---

@POSIX
def test_the_folder_is_for_its_owner_alone_and_git_ignores_it(line):
    assert line.run().code == 0
    home = line.folder / ".orchestrator"
    folder = home / line.folder.name if line.folder.name.isidentifier() else next(home.glob("*/"))
    modes = {str(path.relative_to(home)): stat.S_IMODE(path.stat().st_mode)
             for path in [home, *home.glob("**/*")]}
    assert set(modes.values()) == {0o700, 0o600}
    assert {name for name, mode in modes.items() if mode == 0o700} == {
        ".", folder.name, f"{folder.name}/logs", f"{folder.name}/logs/1"}
    assert (home / ".gitignore").read_text() == "*\n"
    assert sorted(path.name for path in folder.iterdir()) == ["history.db", "lock", "logs"]


@POSIX
def test_files_of_a_run_that_goes_on_are_for_its_owner_alone_too(line):
    line.tool("m", """
        import glob, os, stat
        def run(day):
            print("so that there is a log")
            found = {path: oct(stat.S_IMODE(os.stat(path).st_mode))
                     for path in glob.glob(".orchestrator/**", recursive=True)
                     + glob.glob(".orchestrator/*/logs/1/.*") if os.path.isfile(path)}
            assert len(found) >= 5, found  # with -wal, -shm and the log
            assert set(found.values()) == {"0o600"}, found
    """)
    ended = line.run("a")
    assert ended.code == 0, ended


@pytest.mark.parametrize("words, env, there", [
    ((), {}, ".orchestrator"), ((), {"ORCHESTRATOR_HOME": "else where"}, "else where")])
def test_the_home_is_beside_the_pipeline_or_where_the_environment_says(sandbox, words, env, there):
    sandbox.pipeline(NO_DATABASE + 'TOOL_MAP = {"t": "m"}').tool("m", "def run(): pass")
    elsewhere = sandbox.folder / "cwd"
    elsewhere.mkdir()
    env = {name: str(sandbox.folder / value) for name, value in env.items()}
    assert sandbox.run(*words, env=env, cwd=elsewhere).code == 0
    assert [path.name for path in sandbox.folder.iterdir() if (path / ".gitignore").exists()] \
        == [there]
    assert "success" in sandbox.run("--status", env=env, cwd=elsewhere).out


def test_no_history_writes_nothing(line):
    assert line.run("--no-history").code == 0
    assert not (line.folder / ".orchestrator").exists()
    for words in (["--list"], ["--plan"], ["--check"], ["--plan", "--json"]):
        assert line.run(*words).code == 0
    assert not (line.folder / ".orchestrator").exists()


@pytest.mark.parametrize("words", [["--status"], ["--history", "1"], ["--logs"], ["--prune", "1d"]])
def test_who_looks_into_the_history_is_not_told_what_is_so_without_it(line, words):
    assert line.run().code == 0
    ended = line.run("--no-history", *words)
    assert ended.code == 2 and ended.err.startswith(
        f"{words[0]} looks into the history for what was done; it does not go with --no-history.")


@pytest.mark.parametrize("words", [["--status"], ["--history"], ["--logs"], ["--resume"],
                                   ["--mark-done", "b"]])
def test_a_pipeline_of_another_name_is_told_of_the_history_beside(line, words):
    (line.folder / "broken").touch()
    assert line.run().code == 1
    [was] = [path.name for path in (line.folder / ".orchestrator").iterdir() if path.is_dir()]
    source = line.read("orchestrator.py")
    (line.folder / "orchestrator.py").write_text("NAME = 'renamed'\n" + source)
    ended = line.run(*words)
    assert (ended.code, ended.err) == (2, "There is no history in .orchestrator/renamed.\n"
                                          f"  There is one of {was!r}: NAME says which it is.\n")
    assert line.run("a").code == 0
    assert "There is one of" not in line.run(*words).err


@pytest.mark.parametrize("command", ["--status", "--history", "--logs"])
def test_who_looks_before_the_first_run_is_told_and_makes_nothing(line, command):
    ended = line.run(command)
    assert ended.code == 2 and ended.err == (
        "There is no history in .orchestrator/" + os.path.basename(find_pipeline_folder(
            ".", line.folder.name))
        + ".\n  Nothing has been run yet, or it was run with --no-history.\n")
    assert not (line.folder / ".orchestrator").exists()


ODD_NAMES = ["a/b", "a_b", "../x", "..", ".", ".hidden", "con: the pipe?", "naïve", "漢字",
             "\U0001d5ba" * 80, "x" * 500, "with\nline", "tab\t", "nul\0", "\udcff", " ", "a" * 81]


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_a_pipeline_of_any_name_keeps_its_history_inside_the_home(modules, name):
    folder = modules(works="def run(): return 1")
    home = folder / "deep" / "home"
    result = run_pipeline([], {"t": "works"}, name=name, home=str(home))
    assert result.run_id == "1"
    inside = [path for path in home.iterdir() if path.is_dir()]
    assert len(inside) == 1 and (inside[0] / "history.db").exists()
    assert list((folder / "deep").iterdir()) == [home]
    assert run_pipeline([], {"t": "works"}, name=name, home=str(home)).run_id == "2"


def test_different_names_never_come_to_one_folder():
    names = [make_file_name(name) for name in ODD_NAMES]
    assert len(set(names)) == len(names)
    assert all(len(os.fsencode(name)) <= 240 for name in names)


def test_two_pipelines_in_one_home_have_a_history_each(modules):
    folder = modules(works="def run(): return 1")
    for name in ("one", "two"):
        assert run_pipeline([], {"t": "works"}, name=name, home=str(folder / "h")).run_id == "1"


def test_run_pipeline_keeps_no_history_without_a_home(modules):
    folder = modules(works="def run(): return 1")
    before = sorted(folder.iterdir())
    run_pipeline([], {"t": "works"})
    after = [path for path in folder.iterdir() if path.name != "__pycache__"]
    assert sorted(after) == [path for path in before if path.name != "__pycache__"]


# --- the schema ---

def test_the_file_is_plain_sqlite_that_says_whose_it_is(line):
    line.run()
    with open_history(line.folder) as conn:
        assert conn.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION == 6
        assert conn.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
        assert conn.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert conn.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        for table in ("runs", "attempts"):
            described = re.search(rf"CREATE TABLE {table} \((.*?)\n\);", SCHEMA, re.S)[1]
            columns = re.findall(r"^    (\w+) +[A-Z]", described, re.M)
            found = [row[1] for row in conn.execute(f"PRAGMA table_info({table})")]
            assert found == columns and len(found) > 15


def write_history(line, make):
    """Run once, let `make(path)` replace the history, and return its path and content."""
    line.run()
    path, = line.folder.glob(".orchestrator/*/history.db")
    make(path)
    return path, path.read_bytes()


LOOKS = [["--status"], ["--history"], ["--history", "1"], ["--logs"], ["--resume"], [],
         ["--plan"], ["--prune", "1d"], ["--mark-done", "a"]]


def check_refused(line, path, content, *says, looks=LOOKS):
    """Check that all commands refuse a history in a sentence and leave it as it is."""
    for words in looks:
        ended = line.run(*words)
        assert ended.code == 2, (words, ended)
        assert ended.out == "" and "Traceback" not in ended.err and "success" not in ended.err
        assert len(ended.err.splitlines()) == 2, (words, ended)
        for each in says:
            assert each in ended.err, (words, ended)
        assert path.read_bytes() == content, words
    assert line.run("--no-history").code == 0  # the way out that is told


def test_a_history_of_a_newer_engine_is_refused_with_both_versions(line):
    def make_newer(path):
        with contextlib.closing(sqlite3.connect(path)) as conn:
            conn.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 6}")

    path, content = write_history(line, make_newer)
    check_refused(line, path, content, f"has schema version {SCHEMA_VERSION + 6}, and this engine",
                  VERSION, f"knows {SCHEMA_VERSION}.",
                  "Use the newer orchestrator.py that wrote it.")


def test_the_database_of_something_else_is_refused_and_left_alone(line):
    def make_foreign(path):
        path.unlink()
        with contextlib.closing(sqlite3.connect(path)) as conn:
            conn.execute("CREATE TABLE runs (speed)")
            conn.execute("INSERT INTO runs VALUES (42)")
            conn.commit()

    path, content = write_history(line, make_foreign)
    check_refused(line, path, content, "is a database of something else.")
    assert ask(line.folder, "SELECT * FROM runs") == [{"speed": 42}]


@pytest.mark.parametrize("content", [b"Dear diary, today I ran nothing at all.\n" * 100, b"ab",
                                     b"SQLite format 3\0", bytes(range(256)) * 20],
                         ids=["text", "two letters", "header only", "noise"])
def test_a_file_that_is_no_database_is_refused_and_left_alone(line, content):
    path, _ = write_history(line, lambda path: path.write_bytes(content))
    check_refused(line, path, content, "is damaged", "Move it away", looks=LOOKS[:3] + LOOKS[5:6])


def test_a_history_cut_anywhere_is_refused_and_left_alone(line):
    path, whole = write_history(line, lambda path: None)
    # a file of one byte counts as empty for SQLite, and an empty one is what a kill at the very
    # first write leaves
    sizes = [2, 15, 16, 50, 99, 100, 101, 511, 512, 1000, 4095, 4096, 4097, len(whole) // 2,
             len(whole) - 4096, len(whole) - 1]
    for size in sizes:
        path.write_bytes(whole[:size])
        for words in (["--status"], []):
            ended = line.run(*words)
            assert ended.code == 2 and ended.out == "", (size, ended)
            assert "is damaged" in ended.err and "Traceback" not in ended.err
            assert path.read_bytes() == whole[:size]
    path.write_bytes(whole)
    assert line.run("--status").code == 0


def test_a_history_with_a_page_of_zeros_is_refused_or_read_and_never_a_traceback(line):
    line.run()
    path, whole = write_history(line, lambda path: None)
    for start in range(0, len(whole), 4096):
        broken = whole[:start] + bytes(4096) + whole[start + 4096:]
        for words in (["--status"], ["--history"], []):
            path.write_bytes(broken)
            ended = line.run(*words)
            assert ended.code == 2 or start and ended.code == 0, (start, words, ended)
            assert "Traceback" not in ended.err
            if ended.code == 2:
                assert "is damaged" in ended.err and "success: " not in ended.err
        for side in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{path}{side}")


GARBAGE = ["'text'", "'{'", "'[1]'", "'[[]]'", "'null'", "'5'", "'{\"a\": 1}'", "7", "3.5", "9e999",
           "-1e300", "x'ff00'", "CAST(x'ff41' AS TEXT)", "NULL", "''",
           "'{\"reads\": {\"m.py\": [1]}, \"writes\": [1]}'"]
COLUMNS = re.findall(r"^ +(\w+) +(?:INTEGER|REAL|TEXT)", SCHEMA, re.M)
CACHED = """
TOOL_MAP = {"a": {"module": "m", "cache": True, "needs": [], "reads": ["m.py"]},
            "b": {"module": "m", "needs": ["a"], "retries": 1, "retry_delay": 0}}
"""


@pytest.fixture
def cached(line):
    """A history of a cached tool and one that failed last, and the file that holds it."""
    line.pipeline(NO_DATABASE + CACHED).tool("m", """
        import os
        def run(context):
            if context.last_success and context.tool == "b":
                raise ValueError("again")
            return [1]
    """)
    line.run()
    line.run()
    path, = line.folder.glob(".orchestrator/*/history.db")
    return line, path, path.read_bytes()


def look_at_damage(line, words):
    """Run a command and check that it shows what it can, or says what is wrong in a sentence."""
    ended = line.run(*words)
    assert ended.code in (0, 1, 2) and "bug in" not in ended.err, ended
    if ended.code == 2:
        assert len(ended.err.splitlines()) == 2, ended
    return ended


@pytest.mark.parametrize("column", range(len(COLUMNS)), ids=lambda i: f"{i}-{COLUMNS[i]}")
def test_garbage_in_a_column_is_damage_and_never_a_bug(cached, column):
    line, path, whole = cached
    table = "attempts" if column > COLUMNS.index("attempt_id") - 1 else "runs"
    looks = [["--status"], ["--history", "2"], ["--plan"], [], ["--resume"], ["--plan", "--resume"]]
    for i, garbage in list(enumerate(GARBAGE))[column % 3::3]:  # and others for the next column
        path.write_bytes(whole)
        with contextlib.closing(sqlite3.connect(path)) as conn, \
                contextlib.suppress(sqlite3.IntegrityError), conn:
            conn.execute(f"UPDATE {table} SET {COLUMNS[column]} = {garbage}")  # noqa: S608
        look_at_damage(line, looks[(i + column) % len(looks)])


def test_a_bit_that_flipped_anywhere_is_damage_and_never_a_bug(cached):
    line, path, whole = cached
    chance = random.Random(6)  # noqa: S311
    for i in range(100):
        at = chance.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)])
                         + whole[at + 1:])
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{path}-wal")
        look_at_damage(line, LOOKS[i % len(LOOKS)])


@pytest.mark.parametrize("sql, words", [
    ("UPDATE runs SET targets = '{'", ["--history"]), ("UPDATE runs SET arguments = '[1]'", []),
    ("UPDATE runs SET started_at = 'noon'", ["--history"]),
    ("UPDATE runs SET words = '[1]'", ["--resume"]),
    ("UPDATE attempts SET result = '{'", []), ("UPDATE attempts SET needed = '[]'", []),
    ("UPDATE attempts SET inputs = '{\"reads\": 1}'", []),
    ("UPDATE attempts SET source = '{\"x\": 1}'", []),
    ("UPDATE attempts SET duration_s = 1e300", ["--status"]),
    ("UPDATE attempts SET reason = CAST(x'ff41' AS TEXT)", ["--status"]),
    ("ALTER TABLE attempts RENAME COLUMN log TO lob", ["--history", "1"]),
])
def test_what_the_engine_can_not_have_written_is_refused_and_left_alone(cached, sql, words):
    line, path, _ = cached
    with contextlib.closing(sqlite3.connect(path)) as conn, conn:
        conn.execute(sql)
    content = path.read_bytes()
    check_refused(line, path, content, "is damaged", "Move it away", looks=[words])


def test_a_run_that_resumes_itself_is_no_endless_search(cached):
    line, path, _ = cached
    with contextlib.closing(sqlite3.connect(path)) as conn, conn:
        conn.execute("UPDATE runs SET resumes = run_id")
    assert line.run("--resume", timeout=20).code in (1, 2)


@pytest.mark.parametrize("lose", [os.unlink, lambda path: open(path, "w").close()],
                         ids=["gone", "empty"])
def test_a_lost_history_is_told_and_its_logs_are_not_mixed_with_new_ones(line, lose):
    line.run()
    path, _ = write_history(line, lose) if lose is not os.unlink else (
        next(line.folder.glob(".orchestrator/*/history.db")), None)
    if lose is os.unlink:
        lose(path)

    looked, ended, again = line.run("--history"), line.run(), line.run()

    assert looked.code == 2 and "only the logs of former runs" in looked.err
    assert ended.code == again.code == 0
    told = [each for each in ended.err.splitlines() if "history is lost" in each]
    assert len(told) == 1 and "history is lost" not in again.err
    ids = [row["run_id"] for row in ask(line.folder, "SELECT run_id FROM runs")]
    assert ids[0] == 1 + max(1, *(int(each) for each in os.listdir(path.parent / "logs")
                                  if int(each) not in ids))


@pytest.mark.parametrize("words", [(), ("-j", "2")])
@pytest.mark.parametrize("fails", [False, True])
def test_a_history_that_is_removed_during_the_run_is_told_at_its_end(line, words, fails):
    line.tool("m", f"""
        import shutil
        def run(context):
            print("here")
            if context.tool == "a":
                shutil.rmtree(".orchestrator")
            assert not {fails}
    """)
    ended = line.run(*words)
    assert ended.code == fails and "bug in" not in ended.err
    assert "was removed during the run, which is therefore not recorded." in ended.err


@pytest.mark.parametrize("thing", ["home", "folder"])
def test_a_home_that_can_not_be_made_is_told_before_anything_has_run(line, thing):
    home = line.folder / ".orchestrator"
    if thing == "folder":
        home.mkdir()
        home = Path(find_pipeline_folder(str(home), line.folder.name))
    home.write_text("in the way")
    ended = line.run()
    assert ended.code == 2 and len(ended.err.splitlines()) == 2 and ended.out == ""
    assert "The history can not be used, " in ended.err and "--no-history" in ended.err


@POSIX
def test_a_history_that_can_not_be_written_is_told_before_anything_has_run(line):
    line.run()
    folder = next(line.folder.glob(".orchestrator/*/"))
    (folder / "lock").unlink()
    (folder / "lock").mkdir()
    ended = line.run()
    assert ended.code == 2 and "The history can not be used, " in ended.err
    assert len(ended.err.splitlines()) == 2


FILL = """
import os, resource, signal, sys
import sqlite3
limit = int(os.environ["LIMIT_BYTES"])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writes fail with EFBIG, as on a full disk
def start():
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
"""


@POSIX
def test_a_disk_that_is_full_in_the_middle_of_a_run_ends_it_in_a_sentence(sandbox):
    """From any point of its writing on: the user's own data stay, nothing is called a success,
    and when there is room again, a resume goes on.
    """
    sandbox.pipeline(SQLITE + 'TOOL_MAP = dict.fromkeys("abc", "m")').tool("m", """
        import resource, signal
        def run(conn, context):
            conn.execute("CREATE TABLE IF NOT EXISTS did (tool, run_id)")
            conn.execute("INSERT INTO did VALUES (?, ?)", (context.tool, context.run_id))
            conn.commit()
            if (context.tool, context.run_id) == ("b", "1"):
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
    """)
    ended = sandbox.run()
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err and "success: " not in ended.err
    assert "The history can not be used" in ended.err
    assert sandbox.query("SELECT tool FROM did") == [("a",), ("b",)]
    ended = sandbox.run("--resume")
    assert ended.code == 0 and "Run 1 was cut off" in ended.err
    assert sandbox.query("SELECT tool, run_id FROM did") \
        == [("a", "1"), ("b", "1"), ("b", "2"), ("c", "2")]


def put_fixture(line, version):
    """Give a pipeline the history that an engine of this schema version wrote; return its path."""
    folder = Path(find_pipeline_folder(str(line.folder / ".orchestrator"), line.folder.name))
    folder.mkdir(parents=True)
    return shutil.copy(FIXTURES / f"history-{version}.db", folder / "history.db")


@pytest.mark.parametrize("version, killed", [(1, 2), (3, 6)])
def test_a_history_written_by_an_older_engine_is_read_by_this_one(line, version, killed):
    """In both, a run failed in b, and the last one resumed it and was killed."""
    put_fixture(line, version)
    failed, resumed, after = killed - 1, str(killed), str(killed + 1)
    status = {t["tool"]: t["status"] for t in of_json(line, "--status")["tools"]}
    assert status == {"a": "cached", "b": "interrupted", "c": "skipped"}
    runs = of_json(line, "--history")["runs"]
    assert [(run["run_id"], run["status"]) for run in runs[:2]] == [
        (resumed, "interrupted"), (str(failed), "failed")]
    assert runs[1]["tools"][1]["error"] == "ValueError: b is broken"
    ended = line.run("--resume")
    assert ended.code == 0 and f"Run {resumed} was cut off" in ended.err, ended
    assert of_json(line, "--history")["runs"][0]["run_id"] == after
    assert [t["status"] for t in of_json(line, "--history")["runs"][0]["tools"]] \
        == ["cached", "success", "success"]


def test_what_a_history_of_version_3_tells_of_items_and_backfills_is_read_on(line):
    """Of d, run 2 was partial and run 3 of a single item; run 4 was a period of a backfill."""
    path = put_fixture(line, 3)
    history = orchestrator.History(os.path.dirname(path), "")
    d, a = history.load_last_attempts()["d"], history.find_success("a")
    assert (history.find_called_in("d"), json.loads(d["called_items"])["listed"], d["status"]) \
        == (3, 2, "success")
    assert history.find_success("d", '{"day": "monday"}') is None
    assert (a.run_id, a.work) == ("5", 7)
    assert history.find_success("a", '{"day": "monday"}') == a
    assert history.find_success("c").run_id == "1"
    lasts = history.load_last_like(Request(("a",)))
    assert [(row["run_id"], json.loads(arguments)) for arguments, row in lasts.items()] \
        == [(4, {"day": "monday", "period_start": "2013-01-01", "period_end": "2013-01-02"})]
    history.close()


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
def test_a_history_of_each_version_is_brought_to_the_same_schema(line, version):
    path = put_fixture(line, 1)
    with contextlib.closing(sqlite3.connect(path)) as conn:
        for step in range(1, version):
            conn.executescript(orchestrator.UPGRADES[step])
        if version == 4:
            conn.execute("CREATE VIEW successes AS SELECT * FROM attempts")
        conn.execute(f"PRAGMA user_version = {version}")
    assert line.run("--status").code == 0
    orchestrator.open_database(str(line.folder / "new.db")).close()
    schemas = []
    for file in (path, line.folder / "new.db"):
        with contextlib.closing(sqlite3.connect(file)) as conn:
            schemas.append([sorted(row[1] for row in conn.execute(f"PRAGMA table_info({table})"))
                            for table in ("runs", "attempts")])
            schemas[-1] += conn.execute("SELECT name, sql FROM sqlite_master WHERE type IN "
                                        "('view', 'index') ORDER BY name").fetchall()
            assert conn.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION
    assert schemas[0] == schemas[1] and len(schemas[0]) == 8


# --- what is recorded ---

def test_the_row_of_a_run_says_what_was_asked_for_and_what_ran(line):
    line.run("b+", "a", "--exclude", "c", "--day", "tuesday", "-q")
    run, = ask(line.folder, "SELECT * FROM runs")
    assert json.loads(run["targets"]) == ["b+", "a"] and json.loads(run["exclude"]) == ["c"]
    assert json.loads(run["arguments"]) == {"day": "tuesday"}
    assert json.loads(run["words"]) == ["b+", "a", "--exclude", "c", "--day", "tuesday", "-q"]
    assert (run["status"], run["resumes"], run["start_from"]) == ("success", None, None)
    assert run["version"] == VERSION and run["pid"] != os.getpid() and run["first_attempt"] == 1
    assert list(json.loads(run["sources"])) == ["m"]
    assert 0 < run["duration_s"] < 60 and abs(run["started_at"] - os.times().elapsed) > 0
    line.run("--from", "b")
    before, after = ask(line.folder, "SELECT * FROM runs")
    assert after["start_from"] == "b" and after["first_attempt"] == 3
    assert after["tables"] == before["tables"]
    program = line.folder / "orchestrator.py"
    program.write_text(program.read_text().replace('"retries": 1', '"retries": 2'))
    line.tool("m", "def run(): pass")
    line.run()
    last = ask(line.folder, "SELECT * FROM runs")[-1]
    assert last["tables"] != before["tables"] and last["sources"] != before["sources"]


def test_each_try_of_a_tool_is_an_attempt_with_its_error_and_log(line):
    (line.folder / "broken").touch()
    line.run()
    rows = ask(line.folder, "SELECT * FROM attempts")
    assert [(r["tool"], r["attempt"], r["status"], r["reason"]) for r in rows] == [
        ("a", 1, "success", ""), ("b", 1, "failed", "try 1 of 2; again"),
        ("b", 2, "failed", "try 2 of 2"),
        ("c", 0, "skipped", "needs b, which failed")]
    a, b1, b2, c = rows
    assert (a["rows"], json.loads(a["result"]), a["kind"], a["work"]) \
        == (3, {"rows": 3, "day": "monday"}, None, a["attempt_id"])
    assert b2["error"] == "ValueError: b is broken" and b2["work"] is None
    assert b2["traceback"].startswith("Traceback") and "in run" in b2["traceback"]
    assert [r["log"] for r in rows] == ["logs/1/a.1.log", "logs/1/b.1.log", "logs/1/b.2.log", None]
    assert {r["pid"] for r in rows[:3]} == {ask(line.folder, "SELECT pid FROM runs")[0]["pid"]}
    assert (c["pid"], c["duration_s"], c["log"], c["result"]) == (None, None, None, None)
    assert all(0 <= r["duration_s"] < 60 for r in rows[:3])
    (line.folder / "broken").unlink()
    line.run("--resume")
    again = ask(line.folder, "SELECT * FROM attempts WHERE run_id = 2")
    assert [(r["tool"], r["attempt"], r["status"], r["reason"], r["work"]) for r in again] == [
        ("a", 0, "cached", "succeeded in run 1", 1), ("b", 1, "success", "", 6),
        ("c", 1, "success", "", 7)]


@POSIX
@pytest.mark.parametrize("words, options", [(("-j", "2"), ""), ((), '"isolate": True')])
def test_the_process_of_a_worker_is_noted_and_not_that_of_the_orchestrator(quick, words, options):
    quick.pipeline(f'{NO_DATABASE}TOOL_MAP = {{"t": {{"module": "m", {options}}}}}').tool(
        "m", "import os\ndef run(): return os.getpid()")
    quick.run(*words)
    row, = ask(quick.folder, "SELECT a.pid, rows, r.pid AS ours FROM attempts a, runs r")
    assert row["pid"] == row["rows"] != row["ours"]


@pytest.mark.parametrize("value, result, kind", [
    ("None", "null", None), ("7", "7", None), ("'é'", '"\\u00e9"', None), ("[1, {'a': None}]",
     '[1, {"a": null}]', None), ("(1, 2)", None, "a tuple"), ("{1: 2}", None, "a dict"),
    ("{1}", None, "a set"), ("float('nan')", None, "a float"), ("b'x'", None, "a bytes"),
    ("object()", None, "an object"), ("'x' * 2**21", None, "a str"), ("2**70", str(2**70), None),
    ("'\\udcff'", '"\\udcff"', None)])
@pytest.mark.parametrize("jobs", [1, 2])
def test_results_that_json_can_say_are_kept_and_of_others_the_type(
        modules, value, result, kind, jobs):
    folder = modules(m=f"def run(): return {value}")
    done = run_pipeline([], {"t": "m"}, home=str(folder / "home"), jobs=jobs)
    assert done.status == "success"
    row, = ask(folder, "SELECT result, kind, rows FROM attempts")
    assert (row["result"], row["kind"]) == (result, kind)
    assert row["rows"] == (7 if value == "7" else None)


def test_an_error_of_any_letters_is_recorded(modules):
    folder = modules(m=r"def run(): raise ValueError('\udcff \0 \x1b[31m 漢' + 'x' * 1000)")
    result = run_pipeline([], {"t": "m"}, home=str(folder / "home"))
    row, = ask(folder, "SELECT * FROM attempts")
    assert row["error"] == result.errors["t"] and len(row["error"]) == 300
    assert "漢" in row["traceback"] and "x" * 1000 in row["traceback"]


CALLBACK = """
    import glob, sqlite3
    def statuses():
        conn = sqlite3.connect(glob.glob("home/*/history.db")[0])
        found = dict(conn.execute("SELECT tool, status FROM attempts ORDER BY attempt_id"))
        found["run"], = conn.execute("SELECT status FROM runs").fetchone()
        conn.close()
        return found
    def run(context):
        if context.tool == "b" and context.attempt == 1:
            raise ValueError("not yet")
        return statuses()
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_change_of_a_status_is_committed_before_the_next_thing_happens(
        modules, monkeypatch, jobs):
    """Seen by a second connection from inside the tools and from inside on_event. An engine that
    commits once per run or per tool shows less.
    """
    folder = modules(m=CALLBACK)
    monkeypatch.chdir(folder)
    sys.modules.pop("m", None)
    from m import statuses
    seen = []
    tools = {"a": {"module": "m", "needs": []},
             "b": {"module": "m", "needs": ["a"], "retries": 1, "retry_delay": 0},
             "c": {"module": "m", "needs": ["b"]}}
    result = run_pipeline([], tools, home="home", jobs=jobs, on_event=lambda event: seen.append(
        (event.kind, event.tool, statuses())) if event.kind != "tick" else None)
    assert result.results == {
        "a": {"run": "running", "a": "running"},
        "b": {"run": "running", "a": "success", "b": "running"},
        "c": {"run": "running", "a": "success", "b": "success", "c": "running"}}
    told = [(kind, tool, now.get(tool or "run")) for kind, tool, now in seen]
    assert told == [
        ("run_started", "", "running"),
        ("tool_started", "a", "running"), ("tool_ended", "a", told[2][2]),
        ("tool_started", "b", "running"), ("tool_retried", "b", told[4][2]),
        ("tool_started", "b", "running"), ("tool_ended", "b", told[6][2]),
        ("tool_started", "c", "running"), ("tool_ended", "c", "success"),
        ("run_ended", "", "success")]
    # the next tool may have been recorded in the same breath, but never the end too late
    assert told[2][2] == "success" and told[4][2] in ("failed", "running")
    assert told[6][2] == "success"


def test_what_is_skipped_is_recorded_before_it_is_told(modules, monkeypatch):
    folder = modules(m=CALLBACK, bad="def run(): raise ValueError('no')")
    monkeypatch.chdir(folder)
    sys.modules.pop("m", None)
    from m import statuses
    seen = {}
    run_pipeline([], {"a": "bad", "b": "m", "c": "m"}, home="home", on_event=lambda event:
                 seen.update({event.tool: statuses()}) if event.kind == "tool_ended" else None)
    assert {tool: now[tool] for tool, now in seen.items()} \
        == {"a": "failed", "b": "skipped", "c": "skipped"}


# --- the commit of git ---

def git(folder, *words):
    """Run git and return what it prints."""
    return subprocess.run(
        ["git", "-c", "user.name=n", "-c", "user.email=e@x", *words], cwd=folder, check=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git")
    folder = tmp_path / "repo"
    (folder / "deep" / "er").mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / "file").write_text("x")
    git(folder, "add", "file")
    assert find_git_commit(str(folder)) is None  # there is none yet
    git(folder, "commit", "-qm", "first")
    return folder


@pytest.mark.parametrize("change", [
    [], [["pack-refs", "--all"]], [["checkout", "-q", "--detach"]],
    [["checkout", "-qb", "feature/one"]], [["checkout", "-qb", "a/b"], ["pack-refs", "--all"]]])
def test_the_commit_around_a_folder_is_found_as_git_says(repository, change):
    for words in change:
        git(repository, *words)
    assert find_git_commit(str(repository / "deep" / "er")) == git(repository, "rev-parse", "HEAD")


def test_a_worktree_has_no_commit_and_never_that_of_a_repository_around_it(repository):
    git(repository, "worktree", "add", "-qb", "other", str(repository / "deep" / "tree"))
    assert find_git_commit(str(repository / "deep" / "tree")) is None


def test_no_repository_and_a_broken_one_have_no_commit(tmp_path):
    assert find_git_commit(str(tmp_path)) is None or TOP in tmp_path.parents
    (tmp_path / ".git").write_bytes(b"\xff\xfe nonsense")
    assert find_git_commit(str(tmp_path)) is None


def test_the_commit_noted_is_that_of_the_pipeline_wherever_its_history_is(
        repository, sandbox, tmp_path):
    sandbox.folder = repository / "deep"
    sandbox.pipeline(NO_DATABASE + 'TOOL_MAP = {"t": "m"}').tool("m", "def run(): pass")
    sandbox.run(env={"ORCHESTRATOR_HOME": str(tmp_path / "else")})
    assert ask(tmp_path / "else", "SELECT git_commit FROM runs")[0]["git_commit"] \
        == git(repository, "rev-parse", "HEAD")


# --- looking ---

def test_the_json_of_status_and_history_has_the_shape_that_scripts_rely_on(line):
    (line.folder / "broken").touch()
    line.run()
    shown = of_json(line, "--status")
    assert list(shown) == ["running", "tools"] and shown["running"] is None
    assert [t["tool"] for t in shown["tools"]] == ["a", "b", "c"]
    assert {"tool", "status", "run_id", "started_at", "duration_s", "rows", "reason", "error"} \
        <= set(shown["tools"][0])
    assert [(t["status"], t["run_id"], t["error"]) for t in shown["tools"]] == [
        ("success", "1", ""), ("failed", "1", "ValueError: b is broken"), ("skipped", "1", "")]

    run, = of_json(line, "--history")["runs"]
    assert set(run) == {"run_id", "status", "targets", "arguments", "planned", "started_at",
                        "ended_at",
                        "duration_s", "tools"}
    assert (run["run_id"], run["status"], run["targets"], run["arguments"]) \
        == ("1", "failed", [], {"day": "monday"})
    moment = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(moment, run["started_at"]) and re.fullmatch(moment, run["ended_at"])
    assert run["started_at"] <= run["ended_at"]
    b = run["tools"][1]
    assert set(b) == {"tool", "status", "reason", "attempts", "started_at", "duration_s", "rows",
                      "error"}
    assert (b["tool"], b["status"], b["attempts"]) == ("b", "failed", 2)

    detailed, = of_json(line, "--history", "1")["runs"]
    assert set(run) < set(detailed) and detailed["version"] == VERSION
    assert detailed["tools"][1]["traceback"].startswith("Traceback")

    listed = {t["name"]: t["last"] for t in of_json(line, "--list")["tools"]}
    assert {name: (last["status"], last["run_id"]) for name, last in listed.items()} \
        == {"a": ("success", "1"), "b": ("failed", "1"), "c": ("skipped", "1")}


def test_the_text_of_history_shows_the_runs_and_all_of_one(line):
    (line.folder / "broken").touch()
    line.run("--day", "friday")
    line.run("a")
    lines = line.run("--history").out.splitlines()
    assert lines[0].split() == ["run", "status", "started", "duration", "tools", "targets"]
    assert lines[1].split()[:2] == ["2", "success"] and lines[1].endswith("1 of 1  a")
    assert lines[2].split()[:2] == ["1", "failed"] and lines[2].endswith("1 of 3")
    assert len(line.run("--history", "--last", "1").out.splitlines()) == 2
    one = line.run("--history", "1").out
    for text in ('{"day": "friday"}', "ValueError: b is broken", "Traceback", "needs b, which",
                 "/logs/1/b.2.log", VERSION):
        assert text in one
    assert line.run("--status").out.splitlines()[-1] == "Nothing runs now."
    assert line.run("--status", "a").out.count("\n") == 4
    assert re.search(r"a +success$", line.run("--list").out, re.M)


# --- what a failure says of what changed ---

FAILURE = re.compile(r"\n\n(\w+ failed in run \d+, and succeeded last in run .*?)\n\n", re.S)


def find_failure(ended):
    """Return the lines of the block on a tool that failed and had succeeded before."""
    found, = FAILURE.findall(ended.err)
    return found.splitlines()


def test_a_failure_tells_the_last_good_run_and_what_changed_since(line):
    assert line.run().code == 0 and line.run("--day", "sunday").code == 0
    (line.folder / "m.py").write_text("# changed\n" + line.read("m.py"))
    (line.folder / "broken").touch()

    ended = line.run()

    head, *facts = find_failure(ended)
    assert re.fullmatch(r"b failed in run 3, and succeeded last in run 2 \(\S+ \S+\):", head)
    assert [" ".join(each.split()) for each in facts] == [
        "error ValueError: b is broken", "at m.py:7", "changed m, day (monday, was sunday)"]
    assert ended.err.index(head) < ended.err.index("Next: ")


@pytest.mark.parametrize("words", [("-q",), ("--no-history",)])
def test_a_failure_says_nothing_of_changes_where_nobody_asks_or_knows(line, words):
    line.run()
    (line.folder / "broken").touch()
    assert "succeeded last" not in line.run(*words).err


def test_the_first_failure_of_all_has_nothing_to_be_compared_with(line):
    (line.folder / "broken").touch()
    assert "succeeded last" not in line.run().err
    (line.folder / "broken").unlink()
    assert "succeeded last" not in line.run().err


def test_a_failure_without_a_change_says_so(line):
    line.run()
    (line.folder / "broken").touch()
    assert find_failure(line.run())[-1].split(None, 1) \
        == [
            "changed", "none of the tables, the tools' own modules and the arguments"]


def test_a_failure_tells_the_commits_between_and_does_without_git(line):
    def commit(text):
        git(line.folder, "commit", "-q", "--allow-empty", "-m", text)

    git(line.folder, "init", "-q")
    commit("before")
    line.run()
    for i in range(7):
        commit(f"change {i}")
    (line.folder / "broken").touch()

    lines = find_failure(line.run())
    without = find_failure(line.run(env={"PATH": "/nowhere"}))

    assert [each.split(None, 2)[2] for each in lines if each.split()[0] == "commit"] \
        == [f"change {i}" for i in range(6, 1, -1)]
    assert len(lines) < 11 and not [each for each in without if "commit" in each]


@pytest.mark.parametrize("words", [["--history", "7"], ["--logs", "--run", "7"],
                                   ["--history", "\udcff"], ["--logs", "a", "--run", "x"]])
def test_a_run_that_is_not_there_is_told_with_the_last_that_is(line, words):
    line.run()
    ended = line.run(*words)
    assert ended.code == 2 and ended.err.startswith("There is no run ")
    assert ended.err.endswith(".\n  The last run is 1; --history shows which there are.\n")


@pytest.mark.parametrize("words, says", [
    (["--logs", "bb"], "There is no tool 'bb'."), (["--status", "bb"], "There is no tool or stage"),
    (["--last", "2"], "--last goes with --history."), (["--tail", "2"], "--tail goes with --logs."),
    (["--follow", "--list"], "--follow goes with --logs."), (["--run", "1"], "--run goes with"),
    (["--json"], "--json goes with --list, --plan, --graph, --why, --status, --history, --logs, "
      "--items."),
    (["--prune", "soon"], "--prune: 'soon' is no duration like \"90s\", \"10m\" or \"7d\"."),
    (["--wait", "soon"], "'soon' is no duration like"), (["--wait", "-5"], "--wait"),
    (["--status", "--history"], "not allowed with"),
])
def test_words_that_say_nothing_together_are_refused(line, words, says):
    line.run()
    ended = line.run(*words)
    assert ended.code == 2 and says in ended.err and "Traceback" not in ended.err


def test_a_duration_on_the_command_line_may_be_a_number_of_seconds(line):
    assert line.run("--wait", "5").code == 0
    assert line.run("--prune", "86400").out == "no runs forgotten\n"


def test_logs_shows_the_last_run_or_one_tool_or_the_last_lines(line):
    (line.folder / "broken").touch()
    line.run()
    line.run("a")
    assert "a speaks\n" in line.run("--logs").out and "b speaks" not in line.run("--logs").out
    out = line.run("--logs", "--run", "1").out
    assert [text.split(" (")[0] for text in out.splitlines() if "attempt" in text] \
        == ["a, attempt 1", "b, attempt 1", "b, attempt 2"]
    assert line.run("--logs", "b").out == "b speaks\nb speaks\n"  # of the run in which it ran
    assert line.run("--logs", "b", "--tail", "0").out == ""
    shown = of_json(line, "--logs", "b")["logs"]
    assert [(each["run_id"], each["tool"], each["attempt"], each["status"], each["lines"])
            for each in shown] == [("1", "b", n, "failed", ["b speaks"]) for n in (1, 2)]
    assert Path(shown[0]["path"]).read_text() == "b speaks\n"


def test_logs_of_a_tool_that_was_not_run_again_are_those_of_when_it_was(line):
    (line.folder / "broken").touch()
    line.run()
    line.run("--resume")
    assert line.run("--logs", "a").out == "a speaks\n"


@POSIX
def test_status_tells_of_a_run_that_goes_on_and_of_one_that_was_killed(sandbox):
    sandbox.pipeline(NO_DATABASE + 'TOOL_MAP = {"quick": "m", "slow": "m", "last": "m"}').tool(
        "m", """
        import os, time
        def run(context):
            end_s = time.monotonic() + 30
            while context.tool == "slow" and not os.path.exists("go") and time.monotonic() < end_s:
                open("began", "w").close()
                time.sleep(0.005)
    """)
    process = sandbox.start()
    wait_until((sandbox.folder / "began").exists)
    now = of_json(sandbox, "--status")
    assert now["running"]["run_id"] == "1" and now["running"]["pid"] == process.pid
    assert now["running"]["tools"] == ["slow"]
    assert [t["status"] for t in now["tools"]] == ["success", "running", "pending"]
    assert of_json(sandbox, "--history")["runs"][0]["status"] == "running"
    out = sandbox.run("--status").out.splitlines()[-1]
    assert out.startswith(f"Run 1 goes on, process {process.pid}, since ")
    assert out.endswith(": slow")
    process.kill()
    process.communicate()
    now = of_json(sandbox, "--status")
    assert now["running"] is None
    assert [t["status"] for t in now["tools"]] == ["success", "interrupted", "pending"]
    run, = of_json(sandbox, "--history")["runs"]
    assert run["status"] == "interrupted" and run["ended_at"] is None
    assert [t["status"] for t in run["tools"]] == ["success", "interrupted"]
    assert of_json(sandbox, "--list")["tools"][1]["last"]["status"] == "interrupted"
    assert ask(sandbox.folder, "SELECT status FROM runs") == [{"status": "running"}]  # who looks
    # writes nothing; the next start does
    (sandbox.folder / "go").touch()
    assert "Run 1 was cut off" in sandbox.run("--resume").err
    rows = ask(sandbox.folder, "SELECT status, reason FROM attempts WHERE run_id = 1")
    assert rows[1] == {"status": "interrupted", "reason": "its run was cut off"}


# --- forgetting ---

def test_prune_keeps_the_newest_run_and_the_last_successes_and_removes_logs(line):
    line.run()                                   # 1: all succeed; c never again
    line.run("a")                                # 2
    line.run("a", "b")                           # 3: the last success of a and b
    (line.folder / "broken").touch()
    line.run("b")                                # 4
    line.run("b")                                # 5: the newest
    assert line.run("--prune", "1h").out == "no runs forgotten\n"
    assert line.run("--prune", "0s").out == "2 runs forgotten\n"
    assert [run["run_id"] for run in ask(line.folder, "SELECT run_id FROM runs")] == [1, 3, 5]
    logs = next(line.folder.glob(".orchestrator/*/logs"))
    assert sorted(path.name for path in logs.iterdir()) == ["1", "3", "5"]
    assert ask(line.folder, "SELECT DISTINCT run_id FROM attempts ORDER BY 1") \
        == [{"run_id": 1}, {"run_id": 3}, {"run_id": 5}]
    assert line.run("c").code == 1 or line.run("--plan", "c").code == 0  # needs are still met
    assert [run["run_id"] for run in of_json(line, "--history")["runs"]][0] > "5"


@pytest.mark.parametrize("python", [sys.executable, *map(str, sorted(
    Path.home().glob(".pyenv/versions/3.1[2-9]*/bin/python")))],
    ids=lambda path: path.split(os.sep)[-3])
def test_no_command_uses_what_python_will_drop(sandbox, monkeypatch, python):
    monkeypatch.setattr(sys, "executable", python)
    sandbox.pipeline(NO_DATABASE + CACHED)
    sandbox.tool("m", "def run(context): print(context.last_success)")
    for words in ([], ["--force"], *LOOKS[:4], ["--prune", "0s"], ["--plan", "--jobs", "2"],
                  ["a", "-j", "2"]):
        ended = sandbox.run(*words, env={"PYTHONWARNINGS": "error"})
        assert ended.code == 0 and "Warning" not in ended.err, ended


def test_ids_are_never_given_again(line):
    (line.folder / "broken").touch()
    for _ in range(2):
        line.run("b", "--force")
    assert line.run("--prune", "0s").out == "1 run forgotten\n"
    with open_history(line.folder) as conn:  # even if somebody took all of it
        conn.execute("DELETE FROM attempts")
        conn.execute("DELETE FROM runs")
        conn.commit()
    line.run("a")
    assert ask(line.folder, "SELECT run_id FROM runs") == [{"run_id": 3}]


def test_a_cached_tool_outlives_the_pruning_of_the_runs_between(line):
    program = line.folder / "orchestrator.py"
    program.write_text(program.read_text().replace('"needs": []', '"needs": [], "cache": True'))
    for _ in range(4):
        line.run("a")
    line.run("--prune", "0s")
    assert ask(line.folder, "SELECT run_id FROM runs") == [{"run_id": 1}, {"run_id": 4}]
    assert {s["action"] for s in of_json(line, "--plan", "a")["steps"]} == {"cached"}


# --- durations and clocks ---

class Past:
    """A history into which a test writes runs by a clock that it holds."""

    def __init__(self, folder, tools):
        self.pipeline = load_pipeline(tools, {}, name="p")
        self.folder, self.now, self.step_s = str(folder / "home" / "p"), 1e9, 0.0
        self.ticks = 0.0
        self.base = str(folder)

    def tick(self):
        self.ticks += self.step_s
        return self.ticks

    def plan(self, history):
        past = make_past(self.pipeline, history, {}, self.now, {}, False)
        return make_plan(self.pipeline, past=past)

    def run(self):
        with hold_history(self.folder, self.base) as history:
            plan = self.plan(history)
            return run_plan(Session(
                self.pipeline, plan, {}, history,
                clock=Clock(wall=lambda: self.now, monotonic=self.tick)))

    def steps(self):
        with hold_history(self.folder, self.base) as history:
            return {step.tool: step for step in self.plan(history).steps}


@pytest.fixture
def past(modules):
    return lambda tools, **sources: Past(modules(**sources), tools)


def test_the_expected_duration_is_the_median_of_the_last_successes(past):
    line = past({"t": "m"}, m="def run(): return 1")
    assert line.steps()["t"].expected_s is None
    for took_s in (1.0, 500.0, 3.0, 2.0, 4.0):
        line.step_s = took_s
        line.run()
    durations = [row["duration_s"] for row in ask(line.folder, "SELECT duration_s FROM attempts")]
    assert line.steps()["t"].expected_s == sorted(durations)[2] < max(durations) / 10
    for _ in range(11):  # what was long ago counts no more
        line.step_s = 50.0
        line.run()
    assert line.steps()["t"].expected_s == pytest.approx(durations[1] / 10, rel=0.1)


def test_a_failure_says_nothing_of_how_long_a_tool_takes(past):
    line = past({"t": {"module": "m", "estimate": 7}}, m="def run(): raise ValueError")
    line.step_s = 100.0
    line.run()
    assert line.steps()["t"].expected_s == 7


@pytest.mark.parametrize("jobs", [1, 2])
def test_last_success_is_when_the_last_successful_attempt_began(modules, jobs):
    folder = modules(m="""
        import pathlib
        def run(context):
            with open(pathlib.Path(__file__).with_name("seen"), "a") as file:
                file.write(f"{context.last_success and context.last_success.isoformat()}\\n")
            if context.run_id == "2":
                raise ValueError("no")
    """)
    for _ in range(3):
        run_pipeline([], {"t": "m"}, home=str(folder / "home"), jobs=jobs)
    first, second, third = (folder / "seen").read_text().split()
    assert first == "None" and second == third and second.endswith("+00:00")
    import datetime
    at = ask(folder, "SELECT started_at FROM attempts")[0]["started_at"]
    assert datetime.datetime.fromisoformat(second).timestamp() == pytest.approx(at, abs=1e-5)


def test_a_clock_set_back_makes_no_negative_ages_and_nothing_fresh(past):
    line = past({"t": {"module": "m", "cache": "1h"}}, m="def run(): return 1")
    line.run()
    line.now += 3599
    assert line.steps()["t"].action == "cached"
    line.now -= 2 * 3600
    step = line.steps()["t"]
    assert (step.action, step.reason) \
        == ("run", "in TOOL_MAP; succeeded in the future, if the clock is right")
    from orchestrator import format_status, make_status
    with hold_history(line.folder, line.base) as history:
        shown = make_status(["t"], history.load_last_attempts().get, None, [], line.now, {}, {})
        assert shown["tools"][0]["age_s"] == 0.0 and "-" not in format_status(
            shown, orchestrator.Style())


def test_a_need_from_the_future_is_not_fresh(past):
    line = past({"a": {"module": "m", "needs": [], "fresh_for": "1h"},
                 "b": {"module": "m", "needs": ["a"]}}, m="def run(): return 1")
    line.run()
    line.now -= 3600
    with hold_history(line.folder, line.base) as history:
        with pytest.raises(UserError, match="succeeded in the future, if the clock is right, in"):
            make_plan(line.pipeline, ["b"],
                      past=make_past(line.pipeline, history, {}, line.now, {}, False))


def test_a_run_takes_no_negative_time_although_the_wall_clock_is_set_back(past):
    line = past({"t": "m"}, m="def run(): return 1")
    times = iter([1e9, 1e9 - 50, *[1e9 - 100] * 20])
    with hold_history(line.folder, line.base) as history:
        result = run_plan(Session(line.pipeline, line.plan(history), {}, history,
                                  clock=Clock(wall=lambda: next(times))))
    assert result.duration_s >= 0 and result.outcomes["t"].duration_s >= 0
    assert ask(line.folder, "SELECT min(duration_s) AS d FROM attempts")[0]["d"] >= 0


# --- no cost grows faster than its work: counted in steps of SQLite and in calls, by no clock ---

@pytest.fixture
def made(tmp_path):
    """Make a history with many runs: made(count, tools, status) -> (History, its steps so far)."""
    histories = []

    def make(count, tools=("a", "b"), status="success", cached=0):
        """The last `cached` runs only note each tool as cached."""
        folder = tmp_path / str(len(histories))
        folder.mkdir()
        history, steps = orchestrator.History(str(folder), ""), [0]
        histories.append(history)
        runs, attempts = [], []
        for run_id in range(1, count + 1):
            is_cached = run_id > count - cached
            runs.append((run_id, status, "[]", "[]", json.dumps({"day": run_id}), len(tools),
                         float(run_id), 1.0, 1, len(attempts) + 1, "1", "t", "{}"))
            for tool in tools:
                work = len(attempts) + 1
                if is_cached:
                    work = next(row[0] for row in reversed(attempts)
                                if row[2] == tool and row[3]) if run_id == count - cached + 1 \
                        else next(row[7] for row in attempts[-len(tools):] if row[2] == tool)
                attempts.append((len(attempts) + 1, run_id, tool, int(not is_cached),
                                 "cached" if is_cached else status, float(run_id), 1.0, work))
        history.do("BEGIN")
        for table, columns, rows in [
                ("runs", "run_id, status, targets, exclude, arguments, planned, started_at, "
                 "duration_s, pid, first_attempt, version, tables, sources", runs),
                ("attempts", "attempt_id, run_id, tool, attempt, status, started_at, duration_s, "
                 "work", attempts)]:
            marks = ", ".join("?" * len(rows[0]))
            history._cursor.executemany(f"INSERT INTO {table} ({columns}) VALUES ({marks})", rows)
        history.do("COMMIT")
        history._cursor.connection.set_progress_handler(
            lambda: steps.__setitem__(0, steps[0] + 1), 10)
        return history, steps

    yield make
    for history in histories:
        history.close()


def count_steps(made, look, **how):
    """Return what a look costs at 200 runs and at 2,000, in steps of SQLite."""
    costs = []
    for count in (200, 2000):
        history, steps = made(count, **{name: value(count) if callable(value) else value
                                        for name, value in how.items()})
        assert look(history) is not None
        costs.append(steps[0] + 1)
    return costs


@pytest.mark.parametrize("cached", [0, lambda count: count - 1], ids=["called", "cached"])
def test_the_status_of_tools_costs_the_same_however_often_they_ran(made, cached):
    def look(history):
        assert history.find_running() is None
        lasts = history.load_last_attempts()
        assert {tool: row["status"] for tool, row in lasts.items()} \
            == dict.fromkeys("ab", "cached" if cached else "success")
        assert {row["called_at"] for row in lasts.values()} \
            == {1.0 if cached else lasts["a"]["started_at"]}
        return lasts

    few, many = count_steps(made, look, cached=cached)
    assert many < 1.5 * few


@pytest.mark.parametrize("look", [
    lambda history: history.load_attempts(7), lambda history: history.find_done(7),
    lambda history: history.find_success("a"), lambda history: history.find_expected_s("a"),
    lambda history: history.load_last_runs(10), lambda history: history.find_run("3")])
def test_what_is_asked_of_one_run_or_tool_costs_the_same_however_many_there_are(made, look):
    few, many = count_steps(made, look)
    assert many < 1.5 * few


@pytest.mark.parametrize("look", [
    lambda history: history.prune(1e9),
    lambda history: history.load_last_like(Request()),
    lambda history: history.find_resumable("1")], ids=["prune", "periods", "resume"])
def test_what_is_asked_of_all_runs_costs_as_much_more_as_there_are_more(made, look):
    few, many = count_steps(made, look, status="failed")
    assert many < 13 * few


def test_prune_leaves_of_each_run_all_or_nothing(made):
    history, _ = made(30, tools=("a", "b", "c"), status="failed")
    # what stays: 5 and 9, which hold the last successes of a and b, and 30, the newest
    history.do("UPDATE attempts SET work = NULL")
    for run_id, tool in [(3, "a"), (5, "a"), (4, "b"), (9, "b")]:
        history.do("UPDATE attempts SET status = 'success', work = attempt_id "
                   "WHERE run_id = ? AND tool = ?", (run_id, tool))
    before = {run_id: history.load_attempts(run_id) for run_id in range(1, 31)}
    gone = history.prune(1e9)
    assert gone == [str(run_id) for run_id in range(1, 30) if run_id not in (5, 9)]
    assert [run["run_id"] for run in history.load_last_runs(99)] == [30, 9, 5]
    assert {run_id: history.load_attempts(run_id) for run_id in (5, 9, 30)} \
        == {run_id: before[run_id] for run_id in (5, 9, 30)}
    left, = history.load("SELECT count(*) AS n FROM attempts")
    assert left["n"] == 9 and {len(rows) for rows in before.values()} == {3}
    assert history.prune(1e9) == []


def count_calls(monkeypatch, owner, name):
    """Return a list that grows with each call of a function."""
    calls, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: calls.append(args) or function(*args))
    return calls


@pytest.mark.parametrize("is_line", [True, False], ids=["a plain list", "independent"])
def test_cached_tools_ask_history_once_or_twice_each_and_hash_their_module_once(
        modules, monkeypatch, is_line):
    folder = modules(m="def run(): return 1")
    finds = count_calls(monkeypatch, orchestrator.History, "find_success")
    hashes = count_calls(monkeypatch, orchestrator, "read_source")
    costs = []
    for count in (30, 300):
        tools = {f"t{i}": {"module": "m", "cache": True, **({} if is_line else {"needs": []})}
                 for i in range(count)}
        for names in ([f"t{i}" for i in range(count)], [], []):
            del finds[:], hashes[:]
            result = run_pipeline([], tools, home=str(folder / str(count)))
            assert len(hashes) <= 3  # for the plan, its function, and the run
            costs.append(len(finds) / count)
            assert (result.succeeded, len(result.cached)) == (names, count - len(names))
    assert hashes and max(costs) < 4


def test_the_newest_work_of_all_before_a_tool_is_right_in_any_order(tmp_path):
    """Against the maximum over all of them, while tools of a plain list succeed at random."""
    import random
    chance = random.Random(7)
    names = [f"t{i}" for i in range(20)]
    pipeline = load_pipeline(dict.fromkeys(names, "m"), name="p")
    history, works = orchestrator.History(str(tmp_path), ""), {}
    plan = make_plan(pipeline)
    history.begin_run(plan, Request(), {}, {"tables": "", "sources": {}}, 0.0)
    for _ in range(200):
        tool, did = chance.choice(names), chance.choice(names)
        expected = max([works.get(name, 0) for name in names[:names.index(tool)]], default=0)
        assert history.find_needed_works(pipeline, tool) == {"*": expected}
        history.begin_attempt(did, 1, 0.0, 1)
        works[did] = history.open[did]
        history.end_attempt(did, orchestrator.Outcome("success"), {})
    history.close()


# --- no history is one that is empty ---

def test_without_a_history_nothing_is_opened_or_written(modules, monkeypatch):
    modules(works="def run(context): return context.last_success")
    opened = count_calls(monkeypatch, orchestrator, "open_database")
    locked = count_calls(monkeypatch, orchestrator, "open_lock")
    result = run_pipeline([], {"t": {"module": "works", "cache": True}, "u": "works"})
    assert result.status == "success" and result.results == {"t": None, "u": None}
    assert [path for path, in opened if path != ":memory:"] == locked == []
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{4}", result.run_id)


def test_a_history_in_memory_answers_as_one_that_is_empty(tmp_path):
    kept = orchestrator.History(str(tmp_path), "")
    for history in (orchestrator.History(), kept):
        assert history.find_success("t") is history.find_last_success_at("t") is None
        assert history.find_expected_s("t") is history.find_running() is None
        assert history.load_last_attempts() == history.load_last_like(Request()) == {}
        assert history.load_last_runs(9) == []
        with pytest.raises(UserError, match="There is no run '1'"):
            history.find_run("1")
        history.close()
