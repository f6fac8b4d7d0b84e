"""The report of a run: a page, a story, and data; and what is unusual of a run."""
import contextlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import TOP

from orchestrator import (
    Order, fill, find_unusual, format_page, format_story, lay_out, make_lanes, make_report, quote,
)

DATA = Path(__file__).with_name("data")
NO_DATABASE = "def get_connection():\n    return None\n\n"
EVIL = ["<script>EVIL()</script>", '"><img src=EVIL onerror=EVIL()>', "'onload='EVIL()",
        "</title></style></pre></svg>EVIL", "{style}{0.__class__}EVIL", "&lt;EVIL&#60;",
        "]]>--><!-- EVIL", "`EVIL` *EVIL* [EVIL](javascript:EVIL) | EVIL", "www.EVIL.com``` EVIL",
        "https://EVIL.com/_EVIL_ ~~EVIL~~", "\\`EVIL\\", "EVIL\x1b[31m\x00\u202e\x9b1m\rEVIL"]


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes; its texts; and values by attribute."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.values = [], [], {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, [name for name, _ in attrs]))
        for name, value in attrs:
            self.values.setdefault(name, set()).add(value)

    def handle_endtag(self, tag):
        self.tags.append(("/" + tag, []))

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        raise AssertionError(data)

    handle_pi = unknown_decl = handle_comment


@pytest.fixture
def line(quick):
    """A pipeline of four tools: of `load` half of the items fail; `check` fails; `publish` waits.
    """
    quick.pipeline(NO_DATABASE + textwrap.dedent("""
        TOOL_MAP = {
            "fetch": "m",
            "load": {"module": "items_of", "needs": ["fetch"]},
            "check": {"module": "m:verify", "needs": ["fetch"], "retries": 1, "retry_delay": 0},
            "publish": {"module": "m:publish", "needs": ["check", "load", "fetch"]},
        }
        STAGES = {"full": ["fetch", "load", "check", "publish"]}
        NAME = "line"
    """))
    quick.tool("m", """
        def run(): return 5
        def verify():
            print("looking at line 7")
            raise ValueError("line 7 is broken")
        def publish(): pass
    """)
    return quick.tool("items_of", """
        def items(): return [f"day {n}" for n in range(50)]
        def run(item):
            if int(item[4:]) % 2: raise ValueError(f"no {item}")
            return 3
    """)


def path_of(folder, name):
    """Return the history of the only pipeline in a folder, or another file beside it."""
    found, = (folder / ".orchestrator").glob("*/history.db")
    return found.parent / name


def change(folder, *statements):
    """Change a history by hand."""
    with contextlib.closing(sqlite3.connect(path_of(folder, "history.db"))) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()


def hold_time(folder):
    """Give the runs of a history moments that are always the same."""
    change(folder,
           "UPDATE runs SET started_at = 1357020000.0 + 86400 * run_id, duration_s = 90.0, "
           "version = '2.0.0', git_commit = '0123456789abcdef0123456789abcdef01234567'",
           "UPDATE attempts SET pid = 4711 WHERE attempt > 0",
           "UPDATE attempts SET started_at = 1357020000.0 + 86400 * run_id + 10 * "
           "(attempt_id - (SELECT first_attempt FROM runs r WHERE r.run_id = attempts.run_id))",
           "UPDATE attempts SET duration_s = 9.5 WHERE attempt > 0")


def of_json(pipeline, *words):
    ended = pipeline.run("--report", "r.json", *words)
    assert (ended.code, ended.out, ended.err) == (0, "r.json\n", ""), ended
    return json.loads(pipeline.read("r.json"))


# --- the three forms ---

def test_the_story_of_a_run_is_what_it_always_was(line):
    path = line.folder / "items_of.py"
    path.write_text(line.read(path).replace("range(50)", "range(4)"), encoding="utf-8")
    assert line.run("-q").code == 1
    hold_time(line.folder)
    ended = line.run("--report", "out/story.md", env={"TZ": "UTC"})
    assert (ended.code, ended.out, ended.err) == (0, "out/story.md\n", ""), ended
    story = re.sub(r'File "[^"]*[/\\\\](\w+.py)"', r'File "\1"', line.read("out/story.md"))
    story = re.sub(r"\n +[~^]+(?=\n)", "", story)  # which newer Pythons draw
    assert story == (DATA / "report.md").read_text(encoding="utf-8")


def test_the_data_of_a_run_has_all_figures(line):
    line.run("-q")
    hold_time(line.folder)
    shown = of_json(line)
    tools = {tool["tool"]: tool for tool in shown["tools"]}
    assert list(tools) == ["fetch", "load", "check", "publish"]
    assert {name: tool["status"] for name, tool in tools.items()} == {
        "fetch": "success", "load": "partial", "check": "failed", "publish": "skipped"}
    assert (shown["pipeline"], shown["run_id"], shown["status"], shown["duration_s"]) \
        == ("line", "1", "failed", 90.0)
    assert shown["started_at"] == "2013-01-02T06:00:00.000Z" and shown["planned"] == 4
    assert (shown["done"], shown["rows"], shown["broken"]) == (1, 5 + 25 * 3, ["check", "load"])
    assert shown["alone_s"] == 4 * 9.5 and shown["saved_s"] == 0.0
    assert shown["critical_path"] == ["fetch", "check"] and shown["path_s"] == 9.5 + 19.5
    assert tools["publish"]["needs"] == ["check", "load", "fetch"]
    assert [(each["attempt"], each["start_s"], each["end_s"], each["pid"], each["status"])
            for each in tools["check"]["tries"]] == [
        (1, 20.0, 29.5, 4711, "failed"), (2, 30.0, 39.5, 4711, "failed")]
    assert tools["check"]["log"] == ["looking at line 7"]
    assert tools["check"]["traceback"].endswith("ValueError: line 7 is broken\n")
    assert tools["load"]["items"] == {"listed": 50, "given_up": 0, "pending": 50, "passed": 25,
                                      "failed": 25, "elsewhere": 0, "unfit": 0}
    assert tools["load"]["failures"] \
        == {f"day {n}": f"ValueError: no day {n}" for n in range(1, 40, 2)}


def test_the_page_tells_what_went_wrong_first_and_then_the_rest(line):
    line.run("-q")
    ended = line.run("--report")
    file = path_of(line.folder, "reports/1.html")
    assert (ended.code, ended.err) == (0, "") and ended.out.strip() == os.path.relpath(
        file, line.folder)
    page = file.read_text(encoding="utf-8")
    texts = "\n".join(Tags(page).texts)
    heads = re.findall("<h2>(.*?)</h2>", page)
    assert heads == ["What went wrong first", "What else went wrong", "Graph", "Timeline", "Tools",
                     "Items", "Critical path"]
    first, rest = texts.split("What else went wrong")
    assert "looking at line 7" in first and "Traceback" in first and "no day 1" not in first
    assert "ValueError: no day 1" in rest
    assert "and 5 more" in rest and "needs check, which failed" in rest
    assert re.search(r"Run 1\s+failed at check\s+\.", texts)


def test_a_page_loads_nothing_runs_nothing_and_can_be_read_without_colours(line):
    line.run("-q")
    line.run("--report", "r.html")
    page = Tags(line.read("r.html"))
    names = {name for _, names in page.tags for name in names}
    assert not {name for name in names if name.startswith("on")} | names & {"href", "src", "id"}
    assert {"script", "link", "img", "iframe", "object", "form"}.isdisjoint(dict(page.tags))
    policy, = [each for each in page.values["content"] if "default-src" in each]
    assert policy == ("default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
                      "form-action 'none'")
    assert "url(" not in line.read("r.html") and "@import" not in line.read("r.html")
    texts = "\n".join(page.texts)
    assert "prefers-color-scheme: dark" in texts and "@media print" in texts
    assert texts.count("failed") > 3 and "The graph as a table" in texts
    assert "The timeline as a table" in texts


def test_every_tag_of_a_page_is_closed_in_its_order(line):
    line.run("-q")
    line.run("--report", "r.html")
    open_ones = []
    for tag, _ in Tags(line.read("r.html")).tags:
        if tag.startswith("/"):
            assert open_ones.pop() == tag[1:]
        elif tag != "meta":
            open_ones.append(tag)
    assert open_ones == []


# --- what comes from outside ---

def make_evil(quick, words):
    """Run a pipeline in which all that comes from outside are some words; return its report."""
    quick.pipeline(NO_DATABASE + textwrap.dedent(f"""
        WORDS = {words!r}
        NAME = "n " + WORDS[0]
        clean = lambda word: "t " + "".join(c for c in word if c.isprintable()) + "."
        TOOL_MAP = {{clean(word): {{"module": "fails", "needs": []}} for word in WORDS}}
        TOOL_MAP["last"] = {{"module": "items_of", "needs": list(TOOL_MAP), "on_failure": "stop"}}
        for row in TOOL_MAP.values(): row["on_failure"] = "continue"
        STAGES = {{}}
        def add_arguments(parser):
            parser.add_argument("--word", default=WORDS)
    """))
    quick.tool("fails", f"""
        WORDS = {words!r}
        def run(context, word):
            print("\\n".join(WORDS))
            raise ValueError(" ".join(WORDS))
    """)
    quick.tool("items_of", f"""
        def items(): return [word.replace(chr(0), "") for word in {words!r}]
        def run(item, word): raise KeyError(item)
    """)
    assert quick.run("-q").code == 1
    hold_time(quick.folder)
    return quick


def test_no_text_from_outside_can_add_a_tag_or_an_attribute(tmp_path, quick):
    quiet = [f"w{i} quite harmless" for i in range(len(EVIL))]
    pages = []
    for words in (quiet, EVIL):
        shutil.rmtree(tmp_path / ".orchestrator", ignore_errors=True)
        make_evil(quick, words).run("--report", "r.html")
        pages.append(Tags(quick.read("r.html")))
    plain, evil = pages
    assert len(plain.tags) > 500
    assert evil.tags == plain.tags
    assert evil.values["class"] == plain.values["class"]
    assert evil.values["content"] == plain.values["content"]
    texts = "\n".join(evil.texts)
    for word in EVIL[:-1]:
        assert word in texts
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", quick.read("r.html"))


def strip_code(text):
    """Return Markdown without its blocks and spans of code (CommonMark 4.5 and 6.1)."""
    text = re.sub(r"^(`{3,})\n.*?\n\1`*$", "", text, flags=re.M | re.S)
    return re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", text)


def test_no_text_from_outside_can_be_markup_of_a_story(quick):
    make_evil(quick, EVIL).run("--report", "r.md")
    story = quick.read("r.md")
    assert story.count("EVIL") > 100
    assert "EVIL" not in strip_code(story)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", story)


@pytest.mark.parametrize("text, shown", [
    ("a *b*", "`a *b*`"), ("`", "`` ` ``"), ("a``b`c", "``` a``b`c ```"), ("a\nb\t c", "`a b c`"),
    ("", "`-`"), ("\x1b[1m\x07", "`-`"), ("\\", "`\\`")])
def test_a_text_of_a_story_is_a_span_of_code(text, shown):
    assert quote(text) == shown
    assert strip_code(shown) == ""


def test_markup_is_only_what_a_template_says():
    assert fill("<b a='{x}'>{y}</b>", x="'<>&\"", y=fill("<i>{n:.1f}</i>", n=2)) \
        == "<b a='&#39;&#60;&#62;&#38;&#34;'><i>2.0</i></b>"
    assert fill("{x}|{y}", x=["<", fill("<br>")], y=None) == "&#60;<br>|"
    assert fill("{x}", x="{y} {0} {x.__class__}") == "{y} {0} {x.__class__}"


@pytest.mark.parametrize("table, column, value", [
    ("runs", "edges", '{"fetch": 3}'), ("runs", "edges", "[1]"), ("runs", "edges", "{"),
    ("runs", "edges", '{"fetch": [1]}'), ("attempts", "failures", '[["a"]]'),
    ("attempts", "failures", '{"a": 1}'), ("attempts", "items", '{"passed": "a"}')])
def test_what_no_engine_has_recorded_is_refused(line, table, column, value):
    line.run("-q")
    change(line.folder, f"UPDATE {table} SET {column} = '{value}'")
    ended = line.run("--report")
    assert (ended.code, ended.out) == (2, "") and "is damaged" in ended.err, ended


def test_edges_in_a_circle_are_left_out(line):
    line.run("-q")
    change(line.folder, """UPDATE runs SET edges = '{"check": ["load", "check", "gone"],
                           "load": ["check"]}'""")
    tools = {tool["tool"]: tool for tool in of_json(line)["tools"]}
    assert (tools["check"]["needs"], tools["load"]["needs"]) == ([], ["check"])
    assert line.run("--report").code == 0


# --- runs of all kinds ---

@pytest.mark.parametrize("form", ["html", "md", "json"])
def test_any_run_has_a_report(line, form):
    line.run("-q")
    line.run("-q", "fetch")
    line.run("-q", "--exclude", "check", "--force")
    line.run("-q")
    assert "Marked" in line.run("--mark-done", "check").err
    for run in range(1, 6):
        ended = line.run("--report", f"{run}.{form}", "--run", str(run))
        assert (ended.code, ended.out, ended.err) == (0, f"{run}.{form}\n", ""), ended
        assert str(run) in line.read(f"{run}.{form}")
    assert line.run("--report", "last." + form).code == 0
    assert line.read("last." + form) == line.read("5." + form)


@pytest.mark.parametrize("form", ["html", "md"])
def test_a_run_that_was_killed_has_a_report(line, form):
    line.run("-q")
    change(line.folder, "UPDATE runs SET status = 'running', duration_s = NULL",
           "UPDATE attempts SET status = 'running', duration_s = NULL WHERE tool = 'load'",
           "DELETE FROM attempts WHERE tool IN ('check', 'publish')")
    ended = line.run("--report", "r." + form)
    assert ended.code == 0, ended
    shown = line.read("r." + form)
    assert "was interrupted at" in shown and "pending" in shown


def test_what_there_is_no_report_of_is_told_in_a_sentence(line):
    ended = line.run("--report")
    assert ended.code == 2 and "There is no history" in ended.err
    line.run("-q")
    ended = line.run("--report", "--run", "7")
    assert (ended.code, ended.out) == (2, "") and "There is no run '7'." in ended.err
    ended = line.run("--run", "1", "--status")
    assert ended.code == 2 and "--run goes with --logs, --report." in ended.err


@pytest.mark.parametrize("version, run", [(1, 1), (3, 5)])
def test_a_run_that_an_older_engine_recorded_has_a_report_without_a_graph(line, version, run):
    folder = line.folder / ".orchestrator" / "line"
    folder.mkdir(parents=True)
    shutil.copy(DATA / f"history-{version}.db", folder / "history.db")
    ended = line.run("--report", "r.html", "--run", str(run))
    assert ended.code == 0, ended
    texts = "\n".join(Tags(line.read("r.html")).texts)
    assert "The graph of this run is not recorded" in texts and "Timeline" in texts
    assert of_json(line, "--run", str(run))["tools"][0]["needs"] is None
    assert line.run("--report", "r.md", "--run", str(run)).code == 0


def test_a_report_is_of_the_graph_of_its_run_not_of_todays(line):
    line.run("-q")
    path = line.folder / "orchestrator.py"
    path.write_text(line.read(path).replace('"needs": ["check", "load", "fetch"]', '"needs": []'),
                    encoding="utf-8")
    assert {tool["tool"]: tool["needs"] for tool in of_json(line)["tools"]}["publish"] \
        == ["check", "load", "fetch"]


# --- files ---

def test_a_report_is_written_at_once_or_not_at_all(line):
    line.run("-q")
    (line.folder / "there").mkdir()
    (line.folder / "there" / "kept").touch()
    (line.folder / "file").write_text("mine")
    for file in ("there", "file/r.html"):
        ended = line.run("--report", file)
        assert (ended.code, ended.out) == (2, ""), ended
        assert ended.err.startswith(f"The report can not be written, {file}: ")
        assert ended.err.count("\n") == 2
    assert line.read("file") == "mine"
    left = {path.name for path in line.folder.iterdir()}
    assert left == {"there", "file", "orchestrator.py", "m.py", "items_of.py", ".orchestrator"}


def test_a_report_takes_the_place_of_the_one_before(line):
    line.run("-q")
    (line.folder / "r.md").write_text("old " * 100_000)
    inode = os.stat(line.folder / "r.md").st_ino
    assert line.run("--report", "r.md").code == 0
    assert "old" not in line.read("r.md") and os.stat(line.folder / "r.md").st_ino != inode


# --- of a stage ---

STAGED = NO_DATABASE + textwrap.dedent("""
    TOOL_MAP = {{"a": "m", "b": "m:fail"}}
    STAGES = {{"full": {{"tools": ["a"], "report": {file!r}}},
               "bad": {{"tools": ["a", "b"], "report": "bad.md"}}, "plain": ["a"]}}
""")
MODULE = "def run(): return 5\ndef fail(): raise ValueError('no')\n"


def test_a_stage_writes_its_report_after_each_run_and_says_where(quick, tmp_path):
    quick.pipeline(STAGED.format(file="output/report.html")).tool("m", MODULE)
    ended = quick.run()
    assert ended.code == 0 and ended.err.endswith("\nReport: output/report.html\n"), ended
    assert "Run 1 <em" in quick.read("output/report.html")
    ended = quick.run("full", "-q")
    assert (ended.code, ended.err) == (0, ""), ended
    assert "Run 2 <em" in quick.read("output/report.html")
    ended = quick.run("bad", "plain")
    assert ended.code == 1 and ended.err.endswith("\nReport: bad.md\n")
    assert "failed at `b`" in quick.read("bad.md")
    ended = quick.run("--resume")
    assert ended.code == 1 and ended.err.endswith("\nReport: bad.md\n")
    assert "- resumes run: `3`" in quick.read("bad.md")
    for words in (["plain"], ["a"]):
        assert "Report" not in quick.run(*words).err


def test_the_report_of_a_stage_lies_where_the_pipeline_is(sandbox, tmp_path_factory):
    sandbox.pipeline(STAGED.format(file="r.html")).tool("m", MODULE)
    ended = sandbox.run(cwd=tmp_path_factory.mktemp("elsewhere"))
    assert ended.code == 0 and (sandbox.folder / "r.html").exists(), ended


@pytest.mark.parametrize("words, problem", [
    ([], "warning: The report can not be written, {}: "),
    (["--no-history"], "warning: There is no report of a run without history.")])
def test_a_report_that_can_not_be_written_is_a_warning(quick, words, problem):
    quick.pipeline(STAGED.format(file="m.py/r.html")).tool("m", MODULE)
    ended = quick.run(*words)
    assert ended.code == 0 and "success: 1 of 1" in ended.err, ended
    assert problem.format(quick.folder / "m.py/r.html") in ended.err


@pytest.mark.parametrize("row, problem", [
    ('{"tools": ["a"], "report": True}', "STAGES['s']: 'report' must be the name of a file, "
     "not True.\n  Write \"report\": \"output/report.html\".\n"),
    ('{"tools": ["a"], "report": "a\\0b"}', "STAGES['s']: 'report' must be the name of a file, "
     "not 'a\\x00b'.\n  Write \"report\": \"output/report.html\".\n"),
    ('{"tools": ["a"], "reports": "r"}', "STAGES['s']: there is no option 'reports'.\n"
     "  Did you mean 'report'?\n")])
def test_a_wrong_option_of_a_stage_is_refused(quick, row, problem):
    quick.pipeline(NO_DATABASE + f'TOOL_MAP = {{"a": "m"}}\nSTAGES = {{"s": {row}}}')
    ended = quick.tool("m", MODULE).run()
    assert (ended.code, ended.err) == (2, problem)


# --- what is unusual ---

def former(durations, rows=()):
    rows = rows or [None] * len(durations)
    return [{"duration_s": one, "rows": other} for one, other in zip(durations, rows)]


@pytest.mark.parametrize("value, before, is_unusual", [
    (9.0, [2.0] * 5, True),
    (9.0, [2.0] * 4, False),  # too few say nothing
    (9.0, [2.0] * 4 + [None] * 9, False),
    (0.02, [0.01] * 20, False),  # less than a second
    (2.9, [2.0] * 20, False),
    (14.0, [10.0] * 20, False),  # less than half of it
    (15.1, [10.0] * 20, True),
    (0.1, [600.0] * 20, True),  # too quick
    (20.0, [1.0, 5.0, 10.0, 15.0, 20.0] * 4, False),  # they differ much
    (16.0, [9.9, 10.0, 10.1] * 6 + [16.0] * 2, True),  # as were two of twenty
    (16.0, [9.9, 10.0, 10.1] * 6 + [16.0] * 3, False),  # that is not so rare
    (None, [2.0] * 20, False),
])
def test_a_duration_is_unusual_by_one_rule(value, before, is_unusual):
    found = find_unusual({"duration_s": value, "rows": None}, former(before))
    assert bool(found) == is_unusual


@pytest.mark.parametrize("value, before, is_unusual", [
    (0, [1000, 1010, 990] * 4, True), (880, [1000] * 5, True), (900, [1000] * 5, False),
    (0, [9] * 20, False), (0, [0] * 15 + [100] * 5, False), (100, [0] * 15 + [100] * 5, False),
    (5000, [0] * 20, True), (None, [1000] * 20, False)])
def test_a_number_of_rows_is_unusual_by_one_rule(value, before, is_unusual):
    found = find_unusual({"duration_s": 1.0, "rows": value}, former([1.0] * len(before), before))
    assert bool(found) == is_unusual


def test_what_is_unusual_is_a_warning_in_the_summary_in_the_status_and_in_the_report(quick):
    quick.pipeline(NO_DATABASE + 'TOOL_MAP = {"a": "m", "b": "m:other"}')
    quick.tool("m", """
        from pathlib import Path
        def run(): return 1000 if not Path("few").exists() else 0
        def other(): pass
    """)
    for _ in range(5):
        assert "unusual" not in quick.run().err
    assert "unusual" not in quick.run("--status").out
    (quick.folder / "few").touch()
    ended = quick.run()
    assert ended.code == 0 and "success: 2 of 2" in ended.err
    assert re.search(r"\na +success +0 +\d.\d\d s  warning: unusual, 0 rows, usually 1,000\n",
                     ended.err), ended
    status = quick.run("--status")
    assert "warning: unusual, 0 rows, usually 1,000" in status.out
    shown = json.loads(quick.run("--status", "--json").out)
    assert [tool["unusual"] for tool in shown["tools"]] == [["0 rows, usually 1,000"], []]
    assert [tool["unusual"] for tool in of_json(quick)["tools"]] == [["0 rows, usually 1,000"], []]
    quick.run("--report", "r.html")
    page = quick.read("r.html")
    assert "Unusual: a." in page
    assert '<span class="warning">warning: unusual, 0 rows, usually 1,000</span>' in page
    change(quick.folder, "UPDATE attempts SET duration_s = 30 WHERE tool = 'b'")
    assert re.search(r"b +success +\d.\d\d s  warning: unusual, 0.00 s, usually 30.0 s\n",
                     quick.run().err)


def test_what_failed_is_not_unusual_besides(quick):
    quick.pipeline(NO_DATABASE + 'TOOL_MAP = {"a": "m"}')
    quick.tool("m", "def run(): return 1000")
    for _ in range(6):
        quick.run("-q")
    quick.tool("m", "def run(): raise ValueError")
    change(quick.folder, "UPDATE attempts SET duration_s = 30")
    assert "unusual" not in quick.run().err
    assert of_json(quick)["tools"][0]["unusual"] == []


# --- the graph and the timeline ---

def make_shown(needs, broken=(), **more):
    """Return the report of a run with these needs, of which some tools failed."""
    run = {"run_id": 1, "status": "success", "targets": [], "arguments": {}, "started_at": 1e9,
           "duration_s": 60.0, "planned": len(needs), "exclude": [], "start_from": None,
           "resumes": None, "pid": 1, "version": "2.0.0", "git_commit": None}
    attempts = [{"tool": tool, "status": "failed" if tool in broken else "success", "attempt": 1,
                 "reason": "", "error": "", "traceback": "", "started_at": 1e9 + i,
                 "duration_s": 1.0, "rows": None, "pid": 7, "items": None, "failures": None,
                 **more} for i, tool in enumerate(needs)]
    return make_report("p", run, attempts, needs, {}, {})


def count_nodes(page):
    return page.count('<svg class="node ')


def test_a_line_is_drawn_only_where_a_tool_waits_for_another_directly():
    needs = {"a": [], "b": ["a"], "c": ["a", "b"], "d": ["a", "b", "c"]}
    page = format_page(make_shown(needs))
    assert count_nodes(page) == 4 and page.count('class="strong edge"') == 3
    assert page.count(' edge"') == 3  # not the three that others imply


def test_a_line_that_passes_a_layer_bends_around_what_is_there():
    layers, lines, places = lay_out({"a": [], "b": ["a"], "c": ["b"], "d": [], "e": ["c", "d"]})
    assert layers == {"a": 0, "b": 1, "c": 2, "d": 0, ("d", 1): 1, ("d", 2): 2, "e": 3}
    assert lines["e"] == ["c", ("d", 2)] and lines["d", 2] == [("d", 1)]
    assert lines["d", 1] == ["d"]
    for layer in range(4):
        row = sorted(places[node] for node in layers if layers[node] == layer)
        assert all(after - before >= 0.7 for before, after in zip(row, row[1:]))


@pytest.mark.parametrize("count, broken, shown", [
    (80, (), 80), (81, (), 81 // 2 + 1), (1000, (), 80), (1000, ("t500",), 5),
    (1000, [f"t{i}" for i in range(1000)], 80)])
def test_of_a_large_graph_only_what_did_not_succeed_is_drawn_with_its_neighbours(
        count, broken, shown):
    needs = {f"t{i}": [f"t{i - step}" for step in (2, 40) if i >= step] for i in range(count)}
    page = format_page(make_shown(needs, broken))
    assert count_nodes(page) == shown
    assert (f"{shown} of {count:,} tools: " in page) == (count > 80)
    assert ("and their neighbours" in page) == bool(broken)
    assert Order({"a": []}).tools == ["a"]


def test_of_very_many_failures_the_first_are_told_and_the_others_named():
    names = [f"t{i}" for i in range(23)]
    page = format_page(make_shown({name: [] for name in names}, names))
    assert page.count("<article>") == 20 and "Also in t20, t21, t22." in page
    story = format_story(make_shown({name: [] for name in names}, names))
    assert story.count("\n### ") == 20 and story.count("## What") == 2


def test_a_plan_of_one_tool_and_one_without_an_attempt_have_a_page():
    assert count_nodes(format_page(make_shown({"a": []}))) == 1
    shown = make_shown({"a": []})
    shown["tools"][0].update(tries=[], status="pending")
    assert "Timeline" not in format_page({**shown, "critical_path": []})
    assert "pending" in format_story(shown)


def test_running_side_by_side_is_told_with_what_it_saved():
    shown = make_shown({"a": [], "b": [], "c": ["b"]}, duration_s=30.0)
    assert shown["critical_path"] == ["b", "c"] and shown["saved_s"] == 30.0
    assert "All tools took 1m 30s together: running side by side saved 30.0 s." \
        in format_page(shown)
    assert "- Each waited for the one before it: `b` -&gt; `c`.".replace("&gt;", ">") \
        in format_story(shown)


def test_each_tool_has_a_lane_in_its_process_and_very_many_share_lanes():
    def make_try(tool, pid, start_s):
        return {"tool": tool, "pid": pid, "start_s": start_s, "end_s": start_s + 1.0}

    few = [make_try("a", 1, 0.0), make_try("b", 2, 0.0), make_try("a", 1, 2.0),
           make_try("c", 1, 4.0)]
    assert {pid: list(lanes) for pid, lanes in make_lanes(few).items()} \
        == {1: ["a", "c"], 2: ["b"]}
    many = [make_try(f"t{i}", i % 2, i / 2) for i in range(200)]
    assert [len(lanes) for lanes in make_lanes(many).values()] == [1, 1]
    at_once = [make_try(f"t{i}", 1, 0.0) for i in range(101)]
    assert [len(lanes) for lanes in make_lanes(at_once).values()] == [101]


def test_waiting_for_another_attempt_is_drawn(line):
    line.run("-q")
    hold_time(line.folder)
    line.run("--report", "r.html")
    assert line.read("r.html").count("<title>waiting for check, attempt 2</title>") == 1


# --- its cost ---

def test_a_plain_run_imports_nothing_for_reports(sandbox):
    sandbox.pipeline(NO_DATABASE + 'TOOL_MAP = {"a": "m"}\n'
                     "import atexit, sys\n"
                     "atexit.register(lambda: print(*sys.modules))").tool("m", MODULE)
    for words in ([], ["--report", "r.html"]):
        loaded = sandbox.run(*words).out.split()
        assert "sqlite3" in loaded
        assert {"html", "string", "xml", "statistics", "textwrap"}.isdisjoint(loaded)


def test_a_report_of_many_tools_grows_with_them_and_not_faster():
    sizes = [len(format_page(make_shown({f"t{i}": [] for i in range(count)})))
             for count in (200, 2000)]
    assert sizes[1] < 10 * sizes[0]


def test_the_file_is_one_that_python_3_9_reads():
    newest = subprocess.run([sys.executable, "-c", "import ast, sys; ast.parse("
                             "open(sys.argv[1], encoding='utf-8').read(), feature_version=(3, 9))",
                             str(TOP / "orchestrator.py")], capture_output=True)
    assert newest.returncode == 0
