"""Items that are the files of a pattern, and the files that are written for each item."""
import json
import os

import pytest
from conftest import SQLITE

TOOL = """
    def run(conn, item, context):
        conn.execute("CREATE TABLE IF NOT EXISTS done (item, version, attempt)")
        conn.execute("INSERT INTO done VALUES (?, ?, ?)", (item, context.version, context.attempt))
        if item.endswith("bad.csv"):
            raise ValueError("broken " + item)
        return 2
"""
PARALLEL = pytest.mark.parametrize("words", [(), ("-j", "2")], ids=["one", "side by side"])


def make(sandbox, tools, *names):
    """Return a sandbox with a pipeline of some tools, the module `t`, and files."""
    sandbox.pipeline(f"TOOL_MAP = {tools!r}\nSTAGES = {{}}\n{SQLITE}").tool("t", TOOL)
    return write(sandbox, *names)


def write(sandbox, *names, text="x"):
    """Write files in a sandbox."""
    for name in names:
        path = sandbox.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return sandbox


def done(sandbox):
    """Return the items that were done, in order."""
    return [item for item, in sandbox.query("SELECT item FROM done ORDER BY rowid")]


def csv(**options):
    """Return a table with a tool whose items are the csv files of a folder."""
    return {"t": {"module": "t", "items": "raw/*.csv", **options}}


# --- which files there are ---

@PARALLEL
def test_each_file_of_a_pattern_is_done_once_and_again_when_it_changes(quick, words):
    make(quick, csv(), "raw/b.csv", "raw/a.csv", "raw/c.txt", "a.csv")
    (quick.folder / "raw" / "folder.csv").mkdir()
    assert quick.run(*words).code == 0
    assert sorted(done(quick)) == ["raw/a.csv", "raw/b.csv"]
    assert words or done(quick) == ["raw/a.csv", "raw/b.csv"]
    ended = quick.run(*words)
    assert ended.code == 0 and "none of 2 items is pending" in ended.err
    write(quick, "raw/a.csv", text="longer")
    write(quick, "raw/new.csv")
    assert "2 items done" in quick.run(*words).err
    assert sorted(done(quick)[2:]) == ["raw/a.csv", "raw/new.csv"]


def test_a_change_of_the_time_alone_is_a_change_of_a_file(quick):
    make(quick, csv(), "raw/a.csv")
    quick.run()
    os.utime(quick.folder / "raw" / "a.csv", ns=(10**18, 10**18 + 1))
    quick.run()
    assert quick.query("SELECT item, version FROM done")[1:] == [
        ("raw/a.csv", "1-1000000000000000001")]


@pytest.mark.parametrize("pattern, names", [
    ("**/*.csv", "a.csv b/a.csv b/c/a.csv"), ("b/**", "b/a.csv b/c/a.csv"), ("*", "a.csv x.txt"),
    ("*/*.csv", "b/a.csv"), ("a.csv", "a.csv"), (".*.csv", ".a.csv"), ("[ab]/*.csv", "b/a.csv"),
    ("?.csv", "a.csv"), ("**/c/*", "b/c/a.csv"), ("c", ""),
])
def test_a_pattern_means_what_glob_says(quick, pattern, names):
    make(quick, csv(items=pattern), "a.csv", "b/a.csv", "b/c/a.csv", "x.txt", ".a.csv", ".b/a.csv")
    keep = {"t.py", "orchestrator.py", "data.db", "data.db-journal"}
    quick.run()
    found = [name for name in done(quick) if name not in keep] if names else []
    assert found == names.split()


@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_pattern_may_leave_the_folder_and_names_are_the_paths_then(quick, tmp_path, is_absolute):
    beside = quick.folder.parent / f"{quick.folder.name}-beside"
    beside.mkdir()
    (beside / "a.csv").write_text("x")
    start = str(beside) if is_absolute else f"../{beside.name}"
    make(quick, csv(items=f"{start}/*.csv"))
    assert quick.run().code == 0
    assert done(quick) == [f"{start}/a.csv".replace(os.sep, "/")]


def test_a_pattern_is_seen_from_the_folder_of_get_connection_not_from_the_working_folder(
        sandbox, tmp_path_factory):
    make(sandbox, csv(), "raw/a.csv")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "raw").mkdir()
    (elsewhere / "raw" / "b.csv").write_text("x")
    for words in ((), ("-j", "2")):
        assert sandbox.run(*words, cwd=elsewhere).code == 0
    assert done(sandbox) == ["raw/a.csv"]


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path, quick):
    quick.folder = quick.folder / "a[b]*"
    quick.folder.mkdir()
    make(quick, csv(), "raw/a.csv")
    assert quick.run().code == 0
    assert done(quick) == ["raw/a.csv"]


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_a_link_to_a_file_is_a_file_and_one_to_nowhere_is_none(quick):
    make(quick, csv(), "raw/a.csv")
    os.symlink("a.csv", quick.folder / "raw" / "b.csv")
    os.symlink("nowhere", quick.folder / "raw" / "c.csv")
    os.mkfifo(quick.folder / "raw" / "d.csv")
    assert quick.run().code == 0
    assert done(quick) == ["raw/a.csv", "raw/b.csv"]


def test_no_file_is_a_success_that_names_the_pattern(quick):
    ended = make(quick, csv()).run()
    assert ended.code == 0
    assert f"no items; no file is named like raw/*.csv in {quick.folder}" in ended.err


# --- items as all others are ---

def test_files_that_fail_are_tried_again_given_up_and_asked_for(quick):
    make(quick, csv(retries=1, retry_delay=0), "raw/a.csv", "raw/bad.csv")
    assert "--retry-items t" in quick.run().err
    assert "1 item given up before: raw/bad.csv" in quick.run().err
    quick.tool("t", TOOL.replace('"bad.csv"', '"worse.csv"'))
    assert quick.run("t", "--item", "raw/bad.csv").code == 0
    assert done(quick) == ["raw/a.csv", "raw/bad.csv"]
    assert "2 done" in quick.run("--status").out
    shown = json.loads(quick.run("--items", "t", "--json").out)["items"]
    assert [item["item"] for item in shown] == ["raw/a.csv", "raw/bad.csv"]
    ended = quick.run("t", "--item", "raw/aa.csv")
    assert ended.code == 2 and "Did you mean 'raw/a.csv'" in ended.err


@PARALLEL
def test_files_may_be_done_in_batches(quick, words):
    make(quick, csv(batch=3), *(f"raw/{i}.csv" for i in range(7)), "raw/4bad.csv")
    assert quick.run(*words).code == 1
    assert sorted(done(quick)) == [f"raw/{i}.csv" for i in range(7)]


def test_another_tool_may_take_each_file_that_passed(quick):
    make(quick, {**csv(), "u": {"module": "u", "each": "t"}}, "raw/a.csv", "raw/bad.csv")
    quick.tool("u", "def run(item, context): print(item, context.version.partition('-')[0])")
    assert quick.run().out == "raw/a.csv 1\n"


def test_a_file_that_goes_before_its_turn_is_the_affair_of_the_tool(quick):
    make(quick, csv(), "raw/a.csv", "raw/b.csv")
    quick.tool("t", """
        from pathlib import Path
        def run(item):
            Path("raw/b.csv").unlink()
    """)
    ended = quick.run()
    assert ended.code == 1 and "raw/b.csv: FileNotFoundError" in ended.err
    assert "1 item done" not in quick.run().err  # it is no item any more


def test_a_plan_says_which_files(quick):
    assert "each item of raw/*.csv exactly once" in make(quick, csv()).run("--plan").out


# --- what is refused ---

@pytest.mark.parametrize("options, module, says", [
    ({"each": "u"}, TOOL, "TOOL_MAP['t']: both 'each' and 'items' say which its items are.\n"),
    ({}, "def items(): return []\ndef run(item): pass",
     "its items are those of 'raw/*.csv', but t has a function items() too.\n"),
    ({}, "def run(conn): pass", "run() of t is called once per item, but does not take it.\n"),
    ({"cache": True}, "def run(item): pass", "'cache' is not for tools with items"),
    ({"items": "raw/{stem}.csv"}, TOOL, "'items' must be a pattern of files, without braces"),
], ids=["each", "own items()", "no item", "cache", "braces"])
@pytest.mark.parametrize("words", [(), ("--check",), ("--plan",)])
def test_what_a_pattern_does_not_go_with_is_refused(quick, words, options, module, says):
    make(quick, {"u": "u", **csv(**options)}).tool("t", module)
    quick.tool("u", "def items(): return ['a']\ndef run(item): print('ran')")
    ended = quick.run(*words)
    assert ended.code == 2 and says in ended.out + ended.err and "ran" not in ended.out


# --- what is written for each item ---

SORT = """
    from pathlib import Path
    def run(conn, item):
        conn.execute("CREATE TABLE IF NOT EXISTS done (item)")
        conn.execute("INSERT INTO done VALUES (?)", (item,))
        if not Path("lazy").exists() or Path("lazy").read_text() != item:
            path = Path("sorted", Path(item).stem + ".bam")
            path.parent.mkdir(exist_ok=True)
            path.write_text(item)
"""
SORTED = csv(writes="sorted/{stem}.bam")
NAMES = "raw/a.csv", "raw/b.csv", "raw/c.csv"


def make_sorted(sandbox, tools=SORTED, *names):
    """Return a sandbox with a tool that writes a file for each of some files."""
    return make(sandbox, tools, *(names or NAMES)).tool("t", SORT)


@PARALLEL
def test_an_item_whose_output_is_gone_is_done_again_and_the_run_says_why(quick, words):
    make_sorted(quick)
    assert quick.run(*words).code == 0
    assert "none of 3 items is pending" in quick.run(*words).err
    (quick.folder / "sorted" / "b.bam").unlink()
    ended = quick.run(*words)
    assert ended.code == 0 and done(quick)[3:] == ["raw/b.csv"]
    assert "1 of 3 items pending again: their output is gone: sorted/b.bam\n" in ended.err
    assert "gone" not in quick.run(*words).err
    assert (quick.folder / "sorted" / "b.bam").exists() and len(done(quick)) == 4


@pytest.mark.parametrize("source", [
    {"items": "raw/*.csv"}, {"each": "first"}, {"module": "own"}, {"module": "chosen"}],
    ids=["pattern", "each", "items()", "SELECT"])
def test_an_output_that_is_gone_is_found_whatever_says_which_items_there_are(quick, source):
    table = {"first": {"module": "first", "items": "raw/*.csv"}} if "each" in source else {}
    make_sorted(quick, {**table, "t": {"module": "t", "writes": ["sorted/{stem}.bam"], **source}})
    quick.tool("first", "def run(item): pass")
    quick.tool("own", f"def items(): return {NAMES}\nfrom t import run")
    quick.tool("chosen", """
        from t import run
        def items():
            return "SELECT 'raw/a.csv' UNION SELECT 'raw/b.csv' UNION SELECT 'raw/c.csv'"
    """)
    assert quick.run().code == 0
    (quick.folder / "sorted" / "c.bam").unlink()
    ended = quick.run()
    assert ended.code == 0 and "1 of 3 items pending again" in ended.err
    assert done(quick) == [*NAMES, "raw/c.csv"]


def test_what_was_given_up_does_not_come_again_for_want_of_its_output(quick):
    make_sorted(quick, csv(writes="sorted/{stem}.bam", retries=1, retry_delay=0))
    write(quick, "lazy", text="raw/b.csv")
    assert quick.run().code == 1
    ended = quick.run()
    assert "1 item given up before: raw/b.csv" in ended.err and "gone" not in ended.err


@pytest.mark.parametrize("batch", [1, 3])
@PARALLEL
def test_an_item_that_has_not_written_its_output_fails_and_is_rolled_back(quick, words, batch):
    make_sorted(quick, csv(writes="sorted/{stem}.bam", batch=batch))
    write(quick, "lazy", text="raw/b.csv")
    ended = quick.run(*words)
    assert ended.code == 1
    assert "raw/b.csv: it has not written sorted/b.bam" in ended.err
    assert "Traceback" not in ended.err
    assert sorted(done(quick)) == ["raw/a.csv", "raw/c.csv"]
    (quick.folder / "lazy").unlink()
    assert quick.run(*words).code == 0
    assert sorted(done(quick)) == [*NAMES]


def test_what_check_looks_at_is_written(quick):
    make_sorted(quick, csv(writes="sorted/{stem}.bam"), "raw/a.csv")
    quick.tool("t", SORT + "\n    def check(): print('checked')\n")
    write(quick, "lazy", text="raw/a.csv")
    assert quick.run().out == ""
    (quick.folder / "lazy").unlink()
    assert quick.run().out == "checked\n"


def test_the_braces_are_the_item_and_its_name_without_folder_and_last_suffix(quick):
    make(quick, csv(items="**/*.gz", writes=["out/{item}.ok", "{stem}+{stem}"]), "a/b/{item}.x.gz")
    quick.tool("t", """
        from pathlib import Path
        def run(item):
            if Path("once").exists():
                Path("{item}.x+{item}.x").touch()
            Path("once").touch()
            Path("out/a/b").mkdir(parents=True, exist_ok=True)
            Path("out", item + ".ok").touch()
    """)
    assert "it has not written {item}.x+{item}.x\n" in quick.run().err
    assert quick.run().code == 0


def test_who_reads_what_is_written_for_each_item_needs_who_writes_it(quick):
    make_sorted(quick, {"u": {"module": "u", "reads": "sorted/{stem}.bam"}, **SORTED})
    quick.tool("u", "def run(): print('last')")
    plan = json.loads(quick.run("--plan", "--json").out)
    assert [(step["tool"], step["needs"]) for step in plan["steps"]] == [("t", []), ("u", ["t"])]
    assert quick.run().out == "last\n"


def test_to_be_done_again_for_its_output_is_nothing_new_to_those_that_take_each(quick):
    make_sorted(quick, {**SORTED, "u": {"module": "u", "each": "t"}})
    quick.tool("u", "def run(item): print(item)")
    assert quick.run().out.split() == [*NAMES]
    (quick.folder / "sorted" / "a.bam").unlink()
    assert quick.run().out == ""
    assert done(quick)[3:] == ["raw/a.csv"]


@pytest.mark.parametrize("table, says", [
    ({"writes": "out/{stem}"}, "TOOL_MAP['t']: 'writes': 'out/{stem}' is for tools with items, "
                               "and t has no function items().\n"),
    ({"writes": "out/{year}"}, "'writes' must be a list of names, with no braces but {item} and "),
    ({"writes": "out/{year}", "items": "*.csv"}, "with no braces but {item} and {stem}, not"),
])
@pytest.mark.parametrize("words", [(), ("--check",), ("--plan",)])
def test_braces_that_stand_for_nothing_are_refused(quick, words, table, says):
    make(quick, {"t": {"module": "t", **table}}).tool("t", "def run(conn): print('ran')")
    ended = quick.run(*words)
    assert ended.code == 2 and says in ended.out + ended.err and ended.out.count("ran\n") == 0


def test_a_tool_without_items_may_share_its_module_with_one_that_writes_for_each(quick):
    make_sorted(quick, {**SORTED, "u": {"module": "t", "writes": "{stem}"}})
    ended = quick.run("u")
    assert ended.code == 2 and "TOOL_MAP['u']: 'writes': '{stem}' is for tools with" in ended.err


@PARALLEL
def test_two_items_that_would_write_one_file_are_refused_before_either_is_done(quick, words):
    make(quick, csv(items="raw/*/*.csv", writes=["out/{stem}.txt"]),
         "raw/2023/sales.csv", "raw/2024/sales.csv", "raw/2024/costs.csv")

    ended = quick.run(*words)

    assert ended.code == 1 and (
        "out/sales.txt would be written for two items, raw/2023/sales.csv and raw/2024/sales.csv: "
        "put {item} in place of {stem} into 'writes'") in ended.err, ended
    assert "done" not in [name for name, in quick.query("SELECT name FROM sqlite_master")]
