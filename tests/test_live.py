"""The live area, as a person sees it: what the program writes, read by a small terminal."""
import contextlib
import io
import os
import re
import select
import sys
import time

import pytest

from orchestrator import (
    Clock, Event, History, Outcome, Screen, Session, load_pipeline, make_plan, run_plan,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
RAN = r" *[\d.]+ s"
CODES = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])|\r|\n|\x07|[^\x1b\r\n\x07]|(\x1b.*)", re.S)


class Terminal:
    """A terminal that breaks lines anew when it is resized, as most do.

    `lines` are those that were written, however long; each takes as many rows as it needs. `line`
    and `at` are where the cursor is: in which of them, and how many letters from its beginning.
    """

    def __init__(self, columns, rows):
        self.columns, self.rows = columns, rows
        self.lines, self.line, self.at, self.breaks_lines, self.rest = [""], 0, 0, True, ""
        self.most = 0  # rows that the cursor ever went up at once

    def feed(self, text):
        """Take what a program writes."""
        self.rest += text
        while self.rest:
            found = CODES.match(self.rest)
            if found[3]:
                assert len(self.rest) < 20, f"an unknown code: {self.rest[:20]!r}"
                return  # the rest of it is to come
            self.rest = self.rest[found.end():]
            self.take(found[0], found[1], found[2])

    def take(self, letter, number, code):
        """Take a letter, or a code with its number."""
        if letter == "\r" or code == "G":
            self.at -= self.at % self.columns
        elif letter == "\n":
            self.go_down()
        elif code == "A":
            assert int(number) > 0  # 0 means 1 to terminals
            self.most = max(self.most, int(number))
            for _ in range(int(number)):
                self.go_up()
        elif code == "J":
            self.lines[self.line:] = [self.lines[self.line][:self.at]]
        elif code in ("l", "h"):
            assert number == "?7", number
            self.breaks_lines = code == "h"
        elif code is None and letter != "\x07":
            self.put(letter)
        else:
            assert code in (None, "m"), (number, code)

    def put(self, letter):
        """Take a letter."""
        if not self.breaks_lines and self.at and self.at % self.columns == 0:
            self.at -= 1
        line = self.lines[self.line].ljust(self.at)
        self.lines[self.line] = line[:self.at] + letter + line[self.at + 1:]
        self.at += 1

    def go_down(self):
        if self.at // self.columns < (len(self.lines[self.line]) - 1) // self.columns:
            self.at += self.columns
            return
        self.line, self.at = self.line + 1, self.at % self.columns
        if self.line == len(self.lines):
            self.lines.append("")

    def go_up(self):
        row, _ = self.find_cursor()
        if row <= max(0, len(self.find_rows()) - self.rows):
            return  # the top of the screen
        if self.at >= self.columns:
            self.at -= self.columns
            return
        self.line -= 1
        rows = max(0, len(self.lines[self.line]) - 1) // self.columns
        self.at += rows * self.columns

    def find_cursor(self):
        """Return the row, from the first that was ever written, and the column of the cursor."""
        above = sum(len(self.break_line(line)) for line in self.lines[:self.line])
        return above + self.at // self.columns, self.at % self.columns

    def break_line(self, line):
        return [line[at:at + self.columns] for at in range(0, len(line), self.columns)] or [""]

    def find_rows(self):
        return [row for line in self.lines for row in self.break_line(line)]

    def show(self):
        """Return the rows that are seen."""
        return self.find_rows()[-self.rows:]


class Watched:
    """A run on a terminal, whose tools wait until the test lets them go."""

    def __init__(self, sandbox, columns, rows, *words, env=None, stdout=None):
        import fcntl
        import pty
        self.fcntl, self.sandbox, self.raw = fcntl, sandbox, ""
        self.terminal = Terminal(columns, rows)
        self.master, slave = pty.openpty()
        self.resize(columns, rows)
        self.process = sandbox.start(*words, env={"TERM": "xterm-256color", **(env or {})},
                                     stdout=stdout or slave, stderr=slave)
        os.close(slave)

    def resize(self, columns, rows):
        """Give the terminal another size, as one does with a mouse."""
        import struct
        import termios
        self.terminal.columns, self.terminal.rows = columns, rows
        self.fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self):
        """Read what there is; return False at the end."""
        ready, _, _ = select.select([self.master], [], [], 30)
        assert ready, self.terminal.show()
        try:
            part = os.read(self.master, 65536)
        except OSError:  # Linux says so when the other side is closed
            part = b""
        self.raw += part.decode()
        self.terminal.feed(part.decode())
        return bool(part)

    def wait(self, *patterns):
        """Wait until the last rows of the terminal are like these."""
        def is_seen():
            rows = self.terminal.show()[-len(patterns):]
            return len(rows) == len(patterns) and all(map(re.fullmatch, patterns, rows))

        end_s = time.monotonic() + 60
        while not is_seen():
            assert self.read() and time.monotonic() < end_s, self.terminal.show()

    def go(self, tool):
        """Let a tool go on."""
        (self.sandbox.folder / f"{tool}.go").touch()

    def end(self, code=0):
        """Read to the end; return all lines that stand on the terminal then, without times."""
        while self.read():
            pass
        os.close(self.master)
        assert self.process.wait(30) == code
        return [re.sub(r"\d\d:\d\d:\d\d  |, [\d.]+ s|   +[\d.]+ s|  [\d.]+ s| in [\d.]+ s.*", "",
                       line).rstrip() for line in self.terminal.lines]


WAIT = """
    import os, time
    def wait(name):
        while not os.path.exists(name + ".go"):
            time.sleep(0.01)
"""


@pytest.fixture
def start(sandbox):
    """A function that starts a pipeline of tools, given by what they do, on a terminal."""
    sessions = []

    def start(tools, columns, rows, *words, **how):
        sandbox.pipeline("TOOL_MAP = {%s}\ndef get_connection(): pass" % ", ".join(
            f'"{name}": {{"module": "{name}", "needs": []}}' for name in tools))
        sandbox.tool("gate", WAIT)
        for name, body in tools.items():
            sandbox.tool(name, "from gate import wait\n" + body)
        sessions.append(Watched(sandbox, columns, rows, *words, **how))
        return sessions[-1]

    yield start
    sandbox.end()
    for session in sessions:
        with contextlib.suppress(OSError):
            os.close(session.master)


def waiting(*names):
    return {name: f"def run(): wait({name!r})" for name in names}


# --- as many tools as there are, on terminals of all widths ---

@pytest.mark.parametrize("columns", [20, 60, 200])
@pytest.mark.parametrize("count", [1, 3])
def test_each_tool_that_runs_has_a_line_that_fits(start, columns, count):
    names = ["one", "two", "three"][:count]
    width = max(map(len, names))
    session = start(waiting(*names), columns, 10, "-j", "4")

    session.wait(*[RAN + f"  {name:{width}}  running"[:columns - 3 - 8] for name in names])
    assert max(map(len, session.terminal.show())) <= columns - 3
    assert session.terminal.lines == session.terminal.show()  # and nothing else
    for name in names:
        session.go(name)
    text = session.end()

    assert sorted(text[:count]) == sorted(f"{name:{width}}  success" for name in names)
    assert text[count:count + 2] == ["", text[count + 1]] and "running" not in "".join(text)
    assert text[-2].startswith(f"success: {count} of {count} tool")


@pytest.mark.parametrize("columns", [20, 60, 200])
def test_of_more_tools_than_there_is_room_for_the_first_are_seen(start, columns):
    names = [f"t{number:02d}" for number in range(12)]
    session = start(waiting(*names), columns, 6, "-j", "12")

    shown = [RAN + f"  {name}  running"[:columns - 3 - 8] for name in names]
    session.wait(*shown[:4], " {10}" + "and 8 more"[:columns - 3 - 10])
    for name in names[2:]:
        session.go(name)
    session.wait(*shown[:2])
    session.go("t00")
    session.go("t01")
    text = session.end()

    assert sorted(text[:12]) == [f"{name}  success" for name in names]
    assert session.terminal.most == 4  # never above what it has drawn
    assert "running" not in "".join(text) and "more" not in "".join(text)


def test_thirty_tools_side_by_side(start):
    names = [f"t{number:02d}" for number in range(30)]
    session = start(waiting(*names), 60, 40, "-j", "30")
    session.wait(*[f"{RAN}  {name}  running" for name in names])
    for name in names:
        session.go(name)
    text = session.end()
    assert sorted(text[:30]) == [f"{name}  success" for name in names]
    assert "running" not in "".join(text)


# --- what tools print, log and leave open ---

PRINTING = """
import os
def run(context):
    print("first of", context.tool)
    context.log.warning("mind")
    os.write(1, b"10%\\r20%\\n")
    print("\\x1b[32mgreen\\x1b[0m")
    print("open", end="")
    wait(context.tool)
"""


def test_what_tools_print_stands_above_the_area(start):
    session = start({"says": PRINTING, "too": PRINTING, **waiting("long")}, 60, 10, "-j", "3")
    session.wait(r"..:..:..  \w+ +warning: mind", f"{RAN}  says  running",
                 f"{RAN}  too   running", f"{RAN}  long  running")
    session.go("says")
    session.wait("first of says", "20%", "green", "open", "..:..:..  says  success  .*",
                 f"{RAN}  too   running", f"{RAN}  long  running")
    session.go("too")
    session.wait("first of too", "20%", "green", "open", "..:..:..  too   success  .*",
                 f"{RAN}  long  running")
    session.go("long")
    text = session.end()

    assert sorted(text[:2]) == ["says  warning: mind", "too   warning: mind"]
    assert text[2:13] == [
        "first of says", "20%", "green", "open", "says  success",
        "first of too", "20%", "green", "open", "too   success", "long  success"]


def test_what_is_followed_stands_above_the_area_line_by_line(start):
    session = start({"says": PRINTING, **waiting("long")}, 60, 10, "-j", "2", "-v")
    session.wait("says [|] green", f"{RAN}  says  running", f"{RAN}  long  running")
    session.go("says")
    session.wait("says [|] open", "..:..:..  says  success  .*", f"{RAN}  long  running")
    session.go("long")
    text = session.end()
    assert [line for line in text[:6] if "mind" not in line] == [
        "says | first of says", "20%s | 10%", "says | green", "says | open", "says  success"]


def test_an_area_on_stderr_alone_keeps_no_output_from_its_file(start, tmp_path):
    with open(tmp_path / "out", "w") as file:
        session = start({"says": PRINTING, **waiting("long")}, 60, 10, "-j", "2", stdout=file)
    session.wait(f"{RAN}  says  running", f"{RAN}  long  running")
    session.go("says")
    session.go("long")
    text = session.end()
    assert (tmp_path / "out").read_bytes() == \
        b"first of says\n10%\r20%\n\x1b[32mgreen\x1b[0m\nopen"
    assert sorted(text[:3]) == ["long  success", "says  success", "says  warning: mind"]


LOOPING = """
import os, subprocess, sys
def run(context):
    for number in context.progress(range(10**9)):
        if os.path.exists("loop.go"):
            break
    print("one line")
    print("two", file=sys.stderr)
    print("half", end="")
    for number in context.progress(range(1000)):
        pass
    sys.stdout.write("\\r50%")
    print(" done")
    context.log.info("more to come")
    for number in context.progress(range(10**9)):
        if os.path.exists("again.go"):
            break
    sys.stderr.write("bye\\n")
    raise SystemExit
"""


@pytest.mark.parametrize("words", [(), ("--no-history",)])
def test_a_tool_of_this_process_prints_where_its_progress_stood(start, words):
    session = start({"loop": LOOPING}, 60, 10, *words)
    session.wait("..:..:..  loop  running", RAN + r"  loop  [\d,]+ of 1,000,000,000, \d.*")
    session.go("loop")
    session.wait("one line", "two", "50% done", "..:..:..  loop  more to come",
                 RAN + r"  loop  [\d,]+ of 1,000,000,000, \d.*")
    session.go("again")
    text = session.end()
    assert text[:7] == ["loop  running", "one line", "two", "50% done", "loop  more to come",
                        "bye", "loop  success"]
    assert "1,000,000,000" not in "".join(text)


def test_a_tool_of_this_process_that_tells_no_progress_is_not_drawn_over(start):
    session = start({"child": """
import subprocess, sys
def run(context):
    subprocess.run([sys.executable, "-c", "print('of a child', end='')"])
    wait("child")
    context.log.info("after")
"""}, 60, 10)
    session.wait("..:..:..  child  running", "of a child")
    session.go("child")
    session.end()
    assert "\x1b[A" not in session.raw and "\x1b[J" not in session.raw


# --- items ---

def test_items_have_a_count_a_rate_and_the_time_left(start):
    session = start({"each": """
def items(): return [f"{number:03d}" for number in range(100)]
def run(item):
    if item > "049":
        wait("each")
"""}, 60, 10, "-j", "2")
    session.wait(RAN + r"  each  50 of 100, [\d,.]+/s.*")
    session.go("each")
    text = session.end()
    assert text[0] == "each  success, 100 items done"


def test_items_that_take_longer_than_was_thought_are_told_one_by_one(sandbox, monkeypatch):
    now, events = [100.0], []
    sandbox.tool("slow_items", """
        now = None
        def items(): return list("abcdefghijk")
        def run(item): now[0] += item > "d"
    """)
    monkeypatch.syspath_prepend(str(sandbox.folder))
    import slow_items
    slow_items.now = now
    pipeline = load_pipeline({"t": "slow_items"}, {}, lambda: None)
    run_plan(Session(pipeline, make_plan(pipeline), {}, History(), on_event=events.append,
                     clock=Clock(lambda: now[0], lambda: now[0], lambda _: None)))
    assert [(event.done, event.total) for event in events if event.kind == "progress"] == [
        (0, 11), (1, 11), *((done, 11) for done in range(5, 12))]


# --- sizes ---

def test_a_terminal_that_is_resized_keeps_no_line_of_the_area(start):
    session = start({**waiting("a_name_of_some_length", "b"), "says": PRINTING},
                    70, 10, "-j", "3")
    lines = [f"{RAN}  {name:21}  running" for name in ("a_name_of_some_length", "b", "says")]
    session.wait("..:..:..  says .*mind", *lines)
    session.resize(20, 10)
    session.wait(*[f"{RAN}  {name:7.7}" for name in ("a_name_of_some_length", "b", "says")])
    session.go("says")
    session.wait(f"{RAN}  a_name_", f"{RAN}  b      ")
    session.resize(200, 10)
    session.wait("open", "..:..:..  says .*success .*", *lines[:2])
    session.resize(60, 2)
    session.wait(" {10}and 2 more")
    session.go("b")
    session.go("a_name_of_some_length")
    text = session.end()
    assert [re.sub("  +", " ", line) for line in text[:6]] == [
        "says warning: mind", "first of says", "20%", "green", "open", "says success"]
    assert sorted(re.sub("  +", " ", line) for line in text[6:8]) == [
        "a_name_of_some_length success", "b success"]
    assert "running" not in "".join(text) and "more" not in "".join(text)


@pytest.mark.parametrize("size, shown", [((0, 0), "1m 15s left"), (None, "1m 15s left"),
                                         ((8, 0), "")])
def test_the_area_fits_a_terminal_that_does_not_tell_its_size(monkeypatch, size, shown):
    def get_terminal_size(fd):
        if size is None:
            raise OSError("Inappropriate ioctl for device")
        return os.terminal_size(size)

    monkeypatch.setattr(os, "get_terminal_size", get_terminal_size)
    screen, terminal = make_screen(monkeypatch), Terminal(80, 24)
    screen.on_event(Event("tool_started", 1000.0, "run", "t"))
    screen.on_event(Event("progress", 1060.0, "run", "t", done=4, total=9))
    terminal.feed(screen.stream.getvalue().replace("\n", "\r\n"))
    assert shown in terminal.lines[1]
    assert len(terminal.lines[1]) < (size and size[0] or 80)


def make_screen(monkeypatch, quiet=False, env=(("TERM", "xterm"),), is_terminal=True):
    """Return the listener of a command line whose stderr is a terminal, or is not."""
    class Stream(io.StringIO):
        def isatty(self):
            return is_terminal

        def fileno(self):
            return 2

    for name, value in env:
        monkeypatch.setenv(name, value)
    return Screen(Stream(), quiet=quiet, verbose=False)


def test_wide_letters_do_not_break_the_area(monkeypatch):
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((20, 5)))
    screen = make_screen(monkeypatch)
    screen.on_event(Event("tool_started", 1000.0, "run", "名" * 30, output="log"))
    screen.on_event(Event("tick", 1001.0, "run"))
    assert re.search("\x1b\\[\\?7l {2}1.00 s {2}名{7}\x1b\\[\\?7h$", screen.stream.getvalue())


def test_it_changes_ten_times_a_second_at_most_each_time_in_one_piece(monkeypatch):
    screen, pieces = make_screen(monkeypatch), []
    screen.stream.write = pieces.append
    for name in "ab":
        screen.on_event(Event("tool_started", 1000.0, "run", name, output="log"))
    for hundredth in range(100):
        screen.on_event(Event("progress", 1000.0 + hundredth / 100, "run", "a", done=hundredth))
    assert 8 <= len(pieces) <= 10
    assert all(re.fullmatch("(\x1b\\[1A\x1b\\[G\x1b\\[J)?\x1b\\[\\?7l.*\n.*\x1b\\[\\?7h", piece)
               for piece in pieces)
    screen.on_event(Event("log", 1001.0, "run", "a", text="text", level=30))
    assert re.fullmatch("\x1b\\[1A\x1b\\[G\x1b\\[J.*text\n\x1b\\[\\?7l.*\n.*\x1b\\[\\?7h",
                        pieces[-1])


def test_no_line_of_the_area_is_left_of_a_run_that_is_refused(start):
    session = start({"each": """
def items():
    wait("each")
    return ["a"]
def run(item): pass
"""}, 60, 10, "-j", "2", "--item", "nobody")
    session.wait(f"{RAN}  each  running")
    session.go("each")
    text = session.end(2)
    assert text[0].startswith("--item: there is no item 'nobody'")
    assert "running" not in "".join(text)


def test_a_tool_that_ended_is_in_no_area_that_is_drawn_from_then_on(monkeypatch):
    screen = make_screen(monkeypatch)
    for name in "ab":
        screen.on_event(Event("tool_started", 1000.0, "run", name, output="log"))
    screen.on_event(Event("tick", 1001.0, "run"))
    assert [line[10:] for line in screen.drawn] == ["a  running", "b  running"]
    screen.on_event(Event("tool_ended", 1001.01, "run", "a", outcome=Outcome("success")))
    assert [line[10:] for line in screen.drawn] == ["b  running"]


def test_nothing_is_drawn_where_a_tool_left_a_line_open(monkeypatch):
    class Open(io.StringIO):
        is_open = True

    screen = make_screen(monkeypatch)
    monkeypatch.setattr(sys, "stdout", Open())
    screen.on_event(Event("tool_started", 1000.0, "run", "a"))
    sys.stdout.is_open = True
    screen.on_event(Event("progress", 1001.0, "run", "a", done=1))
    assert screen.drawn == []
    sys.stdout.is_open = False
    screen.on_event(Event("progress", 1002.0, "run", "a", done=2))
    assert [line[10:] for line in screen.drawn] == ["a  2, 1/s"]


# --- where there is no live area ---

@pytest.mark.parametrize("env, words, has_area", [
    ({"TERM": "xterm"}, (), True), ({"NO_COLOR": "1"}, (), True), ({"TERM": "dumb"}, (), False),
    ({}, ("-q",), False)])
def test_the_area_is_for_terminals_that_know_how_and_people_who_want_it(
        start, env, words, has_area):
    session = start({"both": "def run():\n    open('begun', 'w').close()\n    wait('both')\n"},
                    60, 10, "-j", "2", *words, env=env)
    if has_area:
        session.wait(f"{RAN}  both  running")
    session.go("both")
    session.end()
    assert ("\x1b[?7l" in session.raw) is has_area
    if env == {"TERM": "dumb"} or words:
        assert "\x1b" not in session.raw
    if "NO_COLOR" in env:
        assert not re.search("\x1b\\[\\d*m", session.raw)


@pytest.mark.parametrize("env, is_terminal", [((), False), ((("TERM", "dumb"),), True)])
def test_elsewhere_long_tools_have_a_line_every_half_minute(monkeypatch, env, is_terminal):
    screen = make_screen(monkeypatch, env=env, is_terminal=is_terminal)
    screen.width = 4
    screen.on_event(Event("tool_started", 1000.0, "run", "each", output="log"))
    screen.on_event(Event("tool_started", 1000.1, "run", "t", output="log"))
    for tenth in range(1, 1000):
        screen.on_event(Event("tick", 1000.0 + tenth / 10, "run"))
        if tenth == 500:
            screen.on_event(Event("progress", 1050.0, "run", "each", done=0, total=100))
            screen.on_event(Event("tool_started", 1050.1, "run", "new", output="log"))
        if tenth == 550:
            screen.on_event(Event("progress", 1055.0, "run", "each", done=50, total=100))
    screen.on_event(Event("tool_ended", 1100.0, "run", "each", outcome=Outcome("success")))
    lines = [line[10:] for line in screen.stream.getvalue().splitlines()]
    assert lines == [
        "each  running", "t     running",
        "each  still running, 30.0 s", "t     still running, 29.9 s",
        "new   running",
        "each  still running, 1m 00s, 50 of 100, 5.1/s, 9.61 s left",
        "t     still running, 59.9 s",
        "each  still running, 1m 30s, 50 of 100, 1.3/s, 38.4 s left",
        "t     still running, 1m 30s",
        "new   still running, 39.9 s", "each  success"]


def test_quiet_says_nothing_of_what_runs(monkeypatch):
    screen = make_screen(monkeypatch, quiet=True)
    screen.on_event(Event("tool_started", 1000.0, "run", "t", output="log"))
    screen.on_event(Event("progress", 1100.0, "run", "t", done=50, total=100))
    assert screen.stream.getvalue() == ""


# --- how a count goes on ---

def find_progress(monkeypatch, *events):
    """Return what is shown of a tool after events at seconds since it started."""
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((80, 24)))
    screen = make_screen(monkeypatch)
    screen.on_event(Event("tool_started", 1000.0, "run", "t"))
    for at, done in events:
        screen.on_event(Event("progress", 1000.0 + at, "run", "t", done=done, total=100))
    return screen.drawn[0].partition("  t  ")[2]


def test_a_rate_is_that_of_the_loop_that_goes_on(monkeypatch):
    assert find_progress(monkeypatch, (10, 50)) == "50 of 100, 5/s, 10.0 s left"
    # a second loop in the same tool
    assert find_progress(monkeypatch, (10, 100), (20, 10)) == "10 of 100, 1/s, 1m 30s left"
    assert find_progress(monkeypatch, (10, 100), (20, 10), (21, 10)) == \
        "10 of 100, 0.91/s, 1m 39s left"
    # items, which took a while to list
    assert find_progress(monkeypatch, (60, 0), (70, 20)) == "20 of 100, 2/s, 40.0 s left"


def test_a_clock_that_is_put_back_stops_nothing(monkeypatch):
    assert find_progress(monkeypatch, (7200, 50), (3600, 60)).startswith("60 of 100")
