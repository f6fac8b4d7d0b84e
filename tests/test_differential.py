"""The engine of before, a commit that is known to be good, and that of this checkout do the same.

A seed makes a small pipeline: tools with all kinds of options, items and results, which fail and
die by a rule that both engines meet alike; and some starts of it, which resume, force, retry and
look. Both engines play it, and what can be seen from outside is compared: exit codes, output,
tables, ledger, history, logs.

    python -m pytest tests/test_differential.py                              the short set
    DIFFERENTIAL_SEEDS=300 python -m pytest -m sweep tests/test_differential.py     the long one
    DIFFERENTIAL_SEEDS=17-17 ...                                             one seed of it again

DIFFERENTIAL_OLD and DIFFERENTIAL_NEW name other engines: a commit, or an orchestrator.py.
"""
import concurrent.futures
import contextlib
import difflib
import functools
import importlib.util
import json
import os
import py_compile
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Tuple

import pytest
from conftest import ENGINE_MARK, ENVIRONMENT, TOP

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")

OLD = "ee3190e5598580c4ab106a90c5aad3eb90b70a95"  # the first with commands and results by name
SHORT = range(168, 192)  # three pipelines of each kind, which together meet much


def find_sweep():
    """Return the seeds of the long sweep: "300" are the first 300, "17-19" are three of them."""
    first, hyphen, last = os.environ.get("DIFFERENTIAL_SEEDS", "200").partition("-")
    return range(int(first), int(last) + 1) if hyphen else range(int(first))


# --- the pipelines ---

RULES = '''"""What all tools of this pipeline do, and by which rule they fail and die."""
import os
import signal
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROUND = int(os.environ["ROUND"])  # which start of the pipeline this is, counted from 1
# (tool, item): (how it fails, up to this try of the item or tool, up to this round)
FAIL = {fail}
# (tool, item), or (tool, n) for the n-th call of it: (which signal, to whom, how many times)
DIE = {die}


def count(name, *words):
    """Note words in a file, and return how many times that was done."""
    line = " ".join(map(str, words)) + "\\n"
    fd = os.open(os.path.join(HERE, name), os.O_RDWR | os.O_CREAT | os.O_APPEND)
    os.write(fd, line.encode())
    found = os.pread(fd, 10**6, 0).decode().splitlines(keepends=True).count(line)
    os.close(fd)
    return found


def work(conn, context, given=""):
    """Leave a row behind; then die or fail, if that is the rule."""
    key = context.tool, context.item
    row = *key, context.version, context.attempt, ROUND, repr(given)
    if conn is None:
        count("work", row)
    else:
        conn.execute("INSERT INTO work VALUES (?, ?, ?, ?, ?, ?)", row)
    die(key)
    die((context.tool, count("calls", context.tool)))
    print(*key, context.attempt, given)  # not before, since who dies may keep it to himself
    how, tries, rounds = FAIL.get(key, ("", 0, 0))
    if context.attempt > tries or ROUND > rounds:
        return
    if how == "raise":
        raise ValueError(f"{{context.item or context.tool}} is bad, try {{context.attempt}}")
    if how == "exit":
        print("nothing goes on", file=sys.stderr)
        sys.exit(3)
    if how == "text":
        sys.exit("here is where it ends")
    if how == "commit":
        conn.commit()
        raise KeyError("committed")
    if how == "swallow":
        try:
            conn.rollback()
        except Exception:
            pass


def die(key):
    """End this process or the whole run, by a signal, not more often than the rule says."""
    name, whom, times = DIE.get(key, ("", "", 0))
    if times and count("deaths", *key) <= times:
        os.kill(os.getpid() if whom == "self" else int(os.environ["RUN_PID"]),
                getattr(signal, name))
        time.sleep(20)


def look(context):
    """Fail in check(), if that is the rule."""
    how, tries, rounds = FAIL.get((context.tool, context.item), ("", 0, 0))
    if how == "check" and context.attempt <= tries and ROUND <= rounds:
        raise ValueError(f"{{context.item or context.tool}} is not good enough")
'''

TABLES = '''"""A random pipeline, by seed {seed}."""
import os

os.environ.setdefault("RUN_PID", str(os.getpid()))  # workers find it there
NAME = "random"
TOOL_MAP = {{
{tools}
}}
STAGES = {stages}
LIMITS = {{"db": 1}}


def add_arguments(parser):
    parser.add_argument("--since", default="ever")
'''
CONNECTION = '''

def get_connection():
    import sqlite3
    conn = sqlite3.connect(os.path.join(os.path.dirname(os.path.abspath(__file__)), "data.db"),
                           timeout=30, isolation_level="IMMEDIATE")
    conn.execute("PRAGMA synchronous = OFF")
    return conn
'''
DOOR = '''

if __name__ == "__main__":
    import sys
    from orchestrator import main
    sys.exit(main(TOOL_MAP, STAGES, {get_connection}, name=NAME, add_arguments=add_arguments,
                  limits=LIMITS))
'''
SCHEMA = """
PRAGMA journal_mode = {journal};
CREATE TABLE work (tool, item, version, attempt, round, given);
CREATE TABLE inbox (name TEXT PRIMARY KEY, version);
INSERT INTO inbox VALUES ('mon', 1), ('tue', 1), ('wed', 1), ('thu', 1);
"""


class Kind(NamedTuple):
    """What the pipelines of a kind are like; numbers are chances."""
    items: float = 0.4
    failing: float = 0.35
    dying: float = 0.0
    caching: float = 0.1
    batching: float = 0.3
    jobs: float = 0.0
    isolated: float = 0.0
    database: float = 1.0
    whole: bool = False  # the run as a whole dies, while several tools may be at work
    special: Tuple[str, ...] = ()  # starts that others do not have


KINDS = (
    Kind(items=0.1, failing=0.5, special=("--fail-fast", "--mark-done")),
    Kind(items=0.5, jobs=0.7),
    Kind(items=0.6, failing=0.2, dying=0.5, batching=0.4),
    Kind(items=0.9, failing=0.6, batching=0.5),
    Kind(items=0.5, failing=0.0, dying=0.4, jobs=1.0, whole=True),
    Kind(items=0.1, failing=0.2, caching=0.8, special=("--force",)),
    Kind(items=0.5, failing=0.2, dying=0.4, jobs=0.6, isolated=0.2),
    Kind(items=0.4, failing=0.3, dying=0.1, database=0.5,
         special=("--backfill", "--no-history")),
)
NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
ITEMS = ("mon", "tue", "wed", "thu", "fri")
RESULTS = ("None", "7", '{"rows": 3, "of": [1, None]}', '"a text"', "[1.5, True]", "{2}", "b'x'")
LOOKS = (["--plan"], ["--plan", "--json"], ["--history"], ["--history", "1"],
         ["--history", "--json"], ["--status"], ["--status", "--json"], ["--list", "--json"],
         ["--logs"], ["--logs", "--run", "1"], ["--plan", "--resume"], ["--check"])


class Start(NamedTuple):
    """One start of the pipeline, and what is changed before it."""
    words: Tuple[str, ...]
    edits: Dict[str, str]
    sql: str


class Scenario(NamedTuple):
    """A pipeline and its starts."""
    seed: int
    kind: Kind
    files: Dict[str, str]
    schema: str
    starts: Tuple[Start, ...]
    program: str  # orchestrator.py if tables and engine are in one file
    tidy: Callable[[List[str]], List[str]]  # makes lines of output the same in each run
    hides_tails: bool  # of logs, which are cut: AGREED can not make them the same


class Maker:
    """Makes a scenario of a seed. All that is chosen is a function of the seed alone."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.seed, self.kind = seed, KINDS[seed % len(KINDS)]
        self.has_database = self.chance(self.kind.database)
        self.is_parallel = self.kind.jobs > 0
        self.fail, self.die = {}, {}
        self.options, self.modules, self.items = {}, {}, {}

    def chance(self, of_one):
        return self.rng.random() < of_one

    def some(self, choices, most):
        """Return one to `most` of some choices, in their order."""
        count = self.rng.randint(1, max(1, min(most, len(choices))))
        found = self.rng.sample(list(choices), count) if choices else []
        return [each for each in choices if each in found]

    def make(self):
        """Return the scenario."""
        names = NAMES[:self.rng.choice((2, 3, 3, 4, 4, 5, 7))]
        style = self.rng.choice(("list", "needs", "needs", "names", "mixed"))
        for name in names:
            self.make_tool(name, style)
        stages = {}
        if self.chance(0.4):
            stages["full"] = list(names) if self.chance(0.6) else self.some(names, len(names))
            stages["part"] = self.some(names, 2)
        starts = self.make_starts(list(names), stages)
        tables = TABLES.format(seed=self.seed, stages=stages, tools="\n".join(
            f"    {name!r}: {options!r}," for name, options in self.options.items()))
        tables += CONNECTION if self.has_database else ""
        is_one_file = self.seed % 24 == 5  # not many, since it takes a while to compile
        program = "orchestrator.py" if is_one_file else "pipeline.py"
        door = DOOR.format(get_connection="get_connection" if self.has_database else "None")
        files = {
            program: tables if is_one_file else tables + door,
            "rules.py": RULES.format(fail=format_table(self.fail), die=format_table(self.die)),
            "raw.txt": "1\n", **{f"{name}.py": text for name, text in self.modules.items()}}
        journal = "WAL" if self.is_parallel or self.chance(0.5) else "DELETE"
        return Scenario(self.seed, self.kind, files, SCHEMA.format(journal=journal),
                        tuple(starts), program, self.find_tidy(),
                        not {how for how, *_ in self.fail.values()}.isdisjoint({"exit", "text"}))

    def find_tidy(self):
        """Return what takes from lines what is chance or the engine's own affair: their order,
        side by side, where an item dies, and among those of an item that fails and says something;
        and what comes again with one that was in trouble, in its worker or in its batch.
        """
        troubled = [self.options[name] for name, _ in (*self.die, *self.fail)]
        if self.is_parallel and self.die or any("batch" in options for options in troubled):
            return lambda lines: sorted({*lines})
        has_mixed = any(self.items[name] for name, _ in self.die) or any(
            item and "context.log" in self.modules[name] for name, item in self.fail)
        return sorted if self.is_parallel or has_mixed else list

    # --- tools ---

    def make_tool(self, name, style):
        """Choose the options of a tool, write its module, and say how it fails."""
        before = list(self.options)
        options = self.options[name] = {"module": name}
        if style == "needs" or style == "mixed" and self.chance(0.5):
            options["needs"] = self.some(before, 2) if self.chance(0.8) else []
        if style == "names":
            self.add_names(options, name, before)
        with_items = [each for each in before if self.items.get(each)]
        self.items[name] = []
        if with_items and self.chance(0.4):
            options["each"] = self.rng.choice(with_items)
            self.items[name] = self.items[options["each"]]
        text = ""
        if "each" not in options and self.chance(self.kind.items):
            text = self.make_items(name)
        self.add_options(name, options)
        self.add_rules(name, options)
        self.modules[name] = self.make_module(name, options, before, text)

    def add_names(self, options, name, before):
        """Let a tool write a name of its own, and read those of others."""
        written = [each for other in before for each in self.options[other]["writes"]]
        options["reads"] = self.some(written + ["raw.txt"], 2) if self.chance(0.8) else []
        options["writes"] = [f"{name}_rows"]

    def add_options(self, name, options):
        """Choose how a tool is treated."""
        choose, has_items = self.rng.choice, bool(self.items[name])
        if self.chance(0.5):
            options.update(retries=choose((1, 1, 2)), retry_delay=0)
        if self.chance(0.3):
            options["on_failure"] = choose(
                ("continue", "skip") if self.is_parallel else ("continue", "stop", "skip"))
        if self.chance(0.12) and len(self.options) > 1:
            options["when"] = "always"
        if has_items and self.chance(self.kind.batching):
            options["batch"] = choose((2, 3, 500))
        if not has_items and self.chance(self.kind.caching):
            options["cache"] = choose((True, True, "24h"))
            if self.chance(0.4):
                options["reads"] = [*options.get("reads", ()), "raw.txt"]
        if self.chance(0.1):
            options["commits"] = True
        if self.chance(self.kind.isolated):
            options.update(choose(({"isolate": True}, {"timeout": "60s"})))
        if self.is_parallel and self.chance(0.1):
            options["uses"] = {"db": 1}
        if self.chance(0.1):
            options["estimate"] = "5m"

    def add_rules(self, name, options):
        """Choose what of a tool fails, and how."""
        most = 2 if self.kind.whole else 7 if self.is_parallel else 1
        if self.chance(self.kind.dying) and len(self.die) < most:
            victim = self.choose_victim(name, options)
            self.die[victim] = self.choose_death(victim)
            if self.is_parallel:  # of several in trouble the first is named
                return
        if self.chance(self.kind.failing):
            ways = ["raise", "raise", "exit", "text", "check"]
            ways += ["commit"] * self.has_database
            ways += ["swallow"] * (self.has_database and bool(self.items[name]))
            for item in self.some(self.items[name], 1 if self.is_parallel else 2) or [None]:
                self.fail[name, item] = (self.rng.choice(ways), self.rng.choice((1, 1, 2, 99)),
                                         self.rng.choice((1, 1, 2, 99)))
        if self.items[name] and "each" not in options and self.chance(self.kind.failing / 4):
            self.fail[name, "items()"] = ("raise", 99, 1)

    def choose_victim(self, name, options):
        """Return whether an item dies, or whoever is the n-th."""
        if not self.items[name]:
            return name, None
        is_counted = self.kind.whole or not (self.is_parallel or "batch" in options)
        if is_counted and self.chance(0.5):
            return name, self.rng.randint(1, 3)
        return name, self.rng.choice([*self.items[name], self.items[name][-1]])

    def choose_death(self, victim):
        """Return a signal, whom it reaches, and how many times."""
        if self.kind.whole:
            return "SIGKILL", "run", 1
        # Whether an item that died comes before the others or after them is the engine's affair:
        # one that is not the last dies once.
        name, item = victim
        is_last = not self.items[name] or item == self.items[name][-1]
        signals = ("SIGKILL", "SIGKILL", "SIGKILL", "SIGINT", "SIGTERM")
        return ("SIGKILL" if self.is_parallel else self.rng.choice(signals), "self",
                self.rng.choice((1, 3, 3)) if is_last else 1)

    def make_items(self, name):
        """Choose items, and return the function that tells them."""
        if self.has_database and self.chance(0.3):
            self.items[name] = sorted(ITEMS[:4])
            return '    return "SELECT name, version FROM inbox ORDER BY name"\n'
        found = self.items[name] = self.some(ITEMS, 5)
        if self.chance(0.3) and not self.kind.dying:
            more = self.some(ITEMS, 3)
            return f"    return {found} if ROUND == 1 else {found + more}\n"
        if self.chance(0.4):
            new = "1" if self.kind.dying else "ROUND // 2"
            return "".join(f"    yield {item!r}, {self.rng.choice(('1', new))}\n"
                           for item in found)
        return f"    return {found}\n"

    def make_module(self, name, options, before, items):
        """Return the text of a tool's module."""
        waits = options.get("needs", before if not {"reads", "writes", "each"} & {*options} else [])
        taken = self.some(waits, 2) if self.chance(0.4) else []
        default = "=None" * (self.chance(0.9) or self.kind.special != ())
        takes = ", item" * bool(self.items[name])
        # How many items were done in a run that goes on with one that was killed is chance.
        given = "".join(f"type({each}).__name__, " if self.items[each] else f"{each}, "
                        for each in taken)
        if "--backfill" in self.kind.special and self.chance(0.6):
            taken, given = [*taken, "period_start"], given + "str(period_start), "
        if self.chance(0.2):
            takes, given = takes + ", since", given + "since, "
        takes += "".join(f", {each}{default}" for each in taken)
        if self.chance(0.15):
            takes, given = takes + ", **more", given + "sorted(more.items()), "
        text = f'"""Do what {name} does."""\nfrom rules import FAIL, ROUND, look, work\n\n\n'
        if items:
            text += (f'def items(conn):\n    if ROUND <= FAIL.get(({name!r}, "items()"), (0, 0, 0)'
                     f')[2]:\n        raise OSError("nothing is there")\n{items}\n\n')
        text += f"def run(conn, context{takes}):\n    work(conn, context, ({given}))\n"
        if self.chance(0.2):
            text += '    context.log.warning("%s was seen", context.tool)\n'
        result = self.rng.choice(RESULTS[:3] if self.items[name] else RESULTS)
        text += f"    return {result}\n"
        return text + "\n\ndef check(context):\n    look(context)\n"

    # --- starts ---

    def make_starts(self, names, stages):
        """Return some starts: a first one, others that follow it, and a look."""
        name = self.rng.choice(names)
        starts = [self.make_start(self.rng.choice(
            ([], [], [], [], [], [], [f"+{name}"], [f"{name}+", "--force"],
             ["--exclude", names[-1]])))]  # which none needs: those go on without it now
        if self.chance(0.15) and not self.is_parallel:
            starts[0] = starts[0]._replace(words=(*starts[0].words, "--since", "2013"))
        if self.kind.whole:  # and then once that nothing dies
            return [*starts, *(self.make_start([]) for _ in self.die), Start((), {}, "")]
        for _ in range(self.rng.choice((1, 1, 2)) + bool(self.die)):
            starts.append(self.make_start(self.choose_words(names, stages)))
        if self.die and self.chance(0.5):
            starts.append(Start((), {}, ""))
        if self.chance(0.7):
            with_items = [name for name in names if self.items[name]]
            look = self.rng.choice(LOOKS)
            if with_items and self.chance(0.3):
                look = ["--items", self.rng.choice(with_items), "--json"]
            starts.append(Start(tuple(look), {}, ""))
        return starts

    def make_start(self, words):
        """Return a start with these words; something may change before it."""
        edits, sql = {}, ""
        if self.chance(self.kind.jobs):
            words = [*words, "--jobs", "2"]
        if self.chance(0.15):
            name = self.rng.choice(list(self.modules))
            edits[f"{name}.py"] = self.modules[name] + "\n\nCHANGED = True\n"
        if self.chance(0.15):
            edits["raw.txt"] = "2\n"
        if self.has_database and not self.kind.dying and self.chance(0.2):
            sql = self.rng.choice(("UPDATE inbox SET version = 2 WHERE name = 'tue'",
                                   "INSERT OR IGNORE INTO inbox VALUES ('sat', 1)",
                                   "DELETE FROM inbox WHERE name = 'mon'"))
        return Start(tuple(words), edits, sql)

    def choose_targets(self, names, stages):
        """Return words that say what is to be run."""
        name = self.rng.choice(names)
        words = self.rng.choice(([name], [f"+{name}"], [f"{name}+"], self.some(names, 3),
                                 ["--from", name], ["--exclude", names[-1]],
                                 [*list(stages)[-1:]]))
        return [*words, "--force"] if self.chance(0.5) else words

    def choose_words(self, names, stages):
        """Return the words of a start that is not the first."""
        special = self.kind.special
        if special and self.chance(0.3):
            name = self.rng.choice(names)
            word = self.rng.choice(special)
            return [word, *{"--backfill": ["2013-01-01..2013-01-02"], "--mark-done": [name],
                            "--fail-fast": ["--force"]}.get(word, [])]
        with_items = [name for name in names if self.items[name]]
        if with_items and self.chance(0.3):
            name = self.rng.choice(with_items)
            item = self.rng.choice(self.items[name])
            return self.rng.choice(([name, "--retry-items", name], ["--retry-items", name, item],
                                    [name, "--item", item], ["--resume", "--retry-items", name]))
        if self.chance(0.25):
            return self.choose_targets(names, stages)
        return ["--resume"] if self.chance(0.6) else []


def format_table(table):
    """Return a dict as text, a line for each row."""
    rows = "".join(f"    {key!r}: {value!r},\n" for key, value in table.items())
    return f"{{\n{rows}}}" if rows else "{}"


# --- the engines ---

class Engine:
    """An engine, compiled once for all pipelines that import it."""

    def __init__(self, name, source, folder):
        self.name, self.text = name, source[source.index(ENGINE_MARK):]
        folder.mkdir()
        self.file, self.compiled = folder / "orchestrator.py", folder / "orchestrator.pyc"
        self.file.write_text('"""The engine."""\n\n' + self.text, encoding="utf-8")
        py_compile.compile(str(self.file), str(self.compiled), dfile="orchestrator.py",
                           doraise=True,
                           invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)

    def put(self, scenario, folder):
        """Write a pipeline with this engine into a folder."""
        folder.mkdir(parents=True)
        for name, text in scenario.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        if scenario.program == "orchestrator.py":
            with open(folder / scenario.program, "a", encoding="utf-8") as program:
                program.write("\n\n" + self.text)
            return
        cache = Path(importlib.util.cache_from_source(str(folder / "orchestrator.py")))
        cache.parent.mkdir()
        shutil.copy(self.file, folder / "orchestrator.py")
        shutil.copy(self.compiled, cache)


@functools.lru_cache(maxsize=None)
def read_engine(where):
    """Return the text of an engine: of a commit, or of a file. Skip where there is none."""
    if os.path.exists(where):
        return Path(where).read_text(encoding="utf-8")
    try:
        shown = subprocess.run(["git", "show", f"{where}:orchestrator.py"], cwd=TOP,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    except OSError:
        pytest.skip("git is not here, and so the engine of before is not")
    if shown.returncode:
        pytest.skip(f"the engine of {where} can not be had: "
                    + shown.stderr.decode(errors="replace").strip())
    return shown.stdout.decode("utf-8")


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Return the engine of before and that of this checkout."""
    folder = tmp_path_factory.mktemp("engines")
    sources = [read_engine(os.environ.get("DIFFERENTIAL_OLD", OLD)),
               read_engine(os.environ.get("DIFFERENTIAL_NEW", str(TOP / "orchestrator.py")))]
    return [Engine(name, source, folder / name) for name, source in zip(("old", "new"), sources)]


# --- playing, and what is seen ---

class Seen(NamedTuple):
    """What can be seen from outside of a scenario that an engine has played."""
    lines: List[str]
    history: Dict[str, List[Dict[str, object]]]


def play(scenario, engine, folder):
    """Return what is seen of all starts of a scenario."""
    engine.put(scenario, folder)
    with contextlib.closing(sqlite3.connect(folder / "data.db", isolation_level=None)) as conn:
        conn.execute("PRAGMA synchronous = OFF")
        conn.executescript(scenario.schema)
    lines = []
    for number, start in enumerate(scenario.starts, 1):
        for name, text in start.edits.items():
            (folder / name).write_text(text, encoding="utf-8")
        if start.sql:
            with contextlib.closing(sqlite3.connect(folder / "data.db")) as conn, conn:
                conn.execute(start.sql)
        said = run(scenario, folder, start.words, number)
        if scenario.kind.whole:  # who was where when the run was killed is chance
            said = said[:1] * (start == scenario.starts[-1])
        lines += [f"{number}: {line}" for line in [
            " ".join(["$", scenario.program, *start.words]), *said,
            *look(scenario, folder)] if not scenario.kind.whole or said]
    return Seen(lines, {} if scenario.kind.whole else read_history(folder))


def run(scenario, folder, words, number):
    """Return how a start of the pipeline ended and what it said, a line for each."""
    process = subprocess.Popen(
        [sys.executable, "-B", "-S", scenario.program, *words], cwd=folder,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, encoding="utf-8", errors="replace",
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": "0", "ROUND": str(number),
             "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"})
    try:
        texts = process.communicate(timeout=60)
        code = process.returncode
    except subprocess.TimeoutExpired:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        texts, code = process.communicate(), "it does not come to its end"
    texts = [TRACEBACK.sub("", normalize(text, folder)) for text in texts]  # the history has them
    lines = [[f"{name}| {line}" for line in text.splitlines()]
             for name, text in zip(("out", "err"), texts)]
    if code == -signal.SIGKILL:  # what of the output came out in time is chance; the logs have it
        lines[0] = []
    if scenario.hides_tails:
        lines[1] = [line for line in lines[1] if not line.startswith("err|  ")]
    tidy = sorted if "--logs" in words else scenario.tidy
    return [f"exit {code}", *tidy(lines[0]), *tidy(lines[1])]


WORK_IN_ORDER = "SELECT * FROM work ORDER BY rowid"
WORK = "SELECT * FROM work ORDER BY 1, 2, 3, 4, 5"
# Of items all rows, since each is to be there once; of tools that may have run before the run was
# killed, one.
WORK_OF_WHOLE = """
SELECT tool, item, version, given FROM work WHERE item IS NOT NULL
UNION ALL SELECT DISTINCT tool, item, version, given FROM work WHERE item IS NULL ORDER BY 1, 2, 3
"""


def look(scenario, folder):
    """Return what is in the tables that the tools and the engine wrote, a line for each row."""
    lines = [f"work| {row}" for row in select(folder / "data.db", WORK_OF_WHOLE if
             scenario.kind.whole else WORK_IN_ORDER if scenario.tidy is list else WORK)]
    if (folder / "work").exists():
        noted = (folder / "work").read_text(encoding="utf-8").splitlines()
        lines += [f"work| {line}" for line in scenario.tidy(noted)]
    columns = "pipeline, tool, item, version, passed, status"
    if not scenario.kind.whole:
        columns += ", attempts, deaths, substr(run_id, 1, instr(run_id, '.')), row_count, error"
    for file in (folder / "data.db", *folder.glob(".orchestrator/*/history.db")):
        lines += [f"ledger| {normalize(str(row), folder)}" for row in select(
            file, f"SELECT {columns} FROM orchestrator_items ORDER BY tool, item")]
    return lines


def select(file, sql):
    """Return the rows of a query; none where there is no such table."""
    with contextlib.closing(sqlite3.connect(file)) as conn:
        try:
            return conn.execute(sql).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise
            return []


def read_history(folder):
    """Return the rows of history.db and the logs, {kind: [row]}, without what is chance."""
    found = {"runs": [], "attempts": [], "logs": []}
    for file in folder.glob(".orchestrator/*/history.db"):
        with contextlib.closing(sqlite3.connect(file)) as conn:
            conn.row_factory = sqlite3.Row
            for table, key in (("runs", "run_id"), ("attempts", "attempt_id")):
                found[table] = [dict(row) for row in conn.execute(
                    f"SELECT * FROM {table} ORDER BY {key}")]
    whose = {row["attempt_id"]: f"{row['tool']} in run {row['run_id']}"
             for row in found["attempts"]}
    for row in found["attempts"]:
        row["work"] = whose.get(row["work"], row["work"])
        if row["work"] and '"passed": 0' in (row["items"] or ""):
            row["work"] = "its own, or that before"
    for log in sorted(folder.glob(".orchestrator/*/logs/*/*.log")):
        lines = normalize(log.read_text(encoding="utf-8"), folder).splitlines()
        found["logs"].append({"file": f"{log.parent.name}/{log.name}", "lines": sorted(lines)})
    for row in (row for rows in found.values() for row in rows):
        row.update((name, normalize(value, folder)) for name, value in row.items()
                   if isinstance(value, str))
    return found


# Columns that tell moments, processes, and fingerprints, which may be taken otherwise; and where
# a log is, since it is looked at itself.
CHANCE = {"started_at", "ended_at", "duration_s", "pid", "attempt_id", "first_attempt", "version",
          "git_commit", "tables", "sources", "source", "inputs", "needed", "log"}
NORMAL = [(re.compile(pattern), other) for pattern, other in (
    (r"\b20\d{6}T\d{6}Z-[0-9a-f]{4}\b", "RUN"),  # of a run without history
    (r"\b\d\d:\d\d:\d\d(\.\d+)?\b", "TIME"),
    (r"\b20[2-9]\d-\d\d-\d\d\b", "DATE"),
    (r"\b\d+(\.\d+)? (s|ms)\b|\b\d+m \d\ds\b", "SPAN"),
    (r'"(\w+_(?:at|s)|at|pid)": (?:"[^"]*"|[-+\d.e]+)', r'"\1": N'),
    (r"\b(process|pid) \d+", r"\1 N"),
    (r"\bversion +[\d.]+", "version N"),
    (r'Critical path: .*|"critical_path": \[[^]]*\]', "PATH"),  # the longest, by measured times
    (r"\bline \d+", "line N"),
    (r"\b0x[0-9a-f]+\b", "0xN"),
    (r"\b(\d+)\.[0-9a-f]{4}\b", r"\1.RUN"),
    (r"[ \t]+", " "),  # columns are as wide as their widest cell
    (r" $", ""),
)]


# What the engine of today says otherwise than that of before, and is meant to: (pattern, other).
AGREED: List[Tuple["re.Pattern[str]", str]] = []


# One that was shown for a try is not shown again for the next; its last line may be left to the
# line of the tool that follows.
TRACEBACK = re.compile(r"(CHAINED:\n+)?Traceback \(most recent call last\):\n(?: .*\n)*"
                       r"(?:(?!TIME ).*\n+)?")


def normalize(text, folder):
    """Return a text without what differs from run to run."""
    for name in {str(folder), str(folder.resolve())}:
        text = text.replace(name, "FOLDER")
    for pattern, other in NORMAL + AGREED:
        text = pattern.sub(other, text)
    return text


def format_history(scenario, history, other):
    """Return the rows of a history as lines, in the columns that the other one has, too."""
    lines = []
    for kind, rows in history.items():
        columns = {name for row in other[kind][:1] for name in row} - CHANCE
        told = [f"{kind}| " + json.dumps(
            {name: scenario.tidy(value) if isinstance(value, list) else value
             for name, value in row.items() if name in columns or not other[kind]})
            for row in rows]
        lines += told if scenario.tidy is list else sorted(told)
    return lines


MET = {}  # seed: what the engine of before does of it


def find_difference(scenario, engines, folder):
    """Return the lines of a diff between what both engines do; none if that is the same."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        old, new = pool.map(lambda engine: play(scenario, engine, folder / engine.name / "p"),
                            engines)
    before = MET[scenario.seed] = old.lines + format_history(scenario, old.history, new.history)
    after = new.lines + format_history(scenario, new.history, old.history)
    return list(difflib.unified_diff(before, after, "old", "new", lineterm="", n=4))


def format_scenario(scenario):
    """Return all that somebody needs to play a scenario by hand."""
    files = "\n".join(f"--- {name}\n{text.rstrip()}" for name, text in scenario.files.items())
    starts = "\n".join(
        f"{number}. {' '.join([scenario.program, *start.words])}"
        + "".join(f"\n   after {what}" for what in (*start.edits, start.sql) if what)
        for number, start in enumerate(scenario.starts, 1))
    return f"seed {scenario.seed}\n{files}\n--- data.db\n{scenario.schema}\n--- starts\n{starts}\n"


def check_same(seed, engines, folder):
    """Fail, with all that is needed to look into it, if the engines differ on a seed."""
    scenario = Maker(seed).make()
    difference = find_difference(scenario, engines, folder)
    if difference:
        pytest.fail(format_scenario(scenario) + "\n".join(["--- difference", *difference]),
                    pytrace=False)


# --- the tests ---

@pytest.mark.parametrize("seed", SHORT)
def test_the_engine_does_what_the_engine_of_before_did(seed, engines, tmp_path):
    check_same(seed, engines, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", find_sweep())
def test_the_engine_does_what_the_engine_of_before_did_on_many_more(seed, engines, tmp_path):
    check_same(seed, engines, tmp_path)


@pytest.mark.sweep
def test_the_short_set_meets_all_that_can_become_of_a_run(engines, tmp_path):
    for seed in {*SHORT} - MET.keys():
        scenario = Maker(seed).make()
        seen = play(scenario, engines[0], tmp_path / str(seed))
        MET[seed] = seen.lines + format_history(scenario, seen.history, seen.history)
    met = "\n".join(line for seed in SHORT for line in MET[seed])

    for end in ("exit 0", "exit 1", "exit 2", "exit -9", "exit 130", "exit 143"):
        assert f": {end}\n" in met, end
    for status in ("success", "partial", "cached", "failed", "skipped", "interrupted"):
        assert f'"status": "{status}", "reason"' in met, status
    for status in ("success", "failed", "quarantined"):
        assert re.search(rf"ledger\| .*'{status}'", met), status
    for word in ("--jobs", "--resume", "--force", "--retry-items", "--item ", "--exclude",
                 "--backfill", "--fail-fast", "--no-history"):
        assert re.search(rf"\$ .*{word}", met), word


# What of the engine of before becomes what. That engine stands still, and so do these.
FAILURE_SWALLOWED = ('if policy != "continue" and status == "failed":\n', "if False:\n")
FAILED_ITEM_PASSES = ('            status = "failed"\n        ledger.record(item',
                      '            status = "success"\n        ledger.record(item')
RETRY_SKIPPED = ("and work.number <= work.tool.retries", "and work.number < work.tool.retries")
TRY_SKIPPED = ("elif item.tries > self.tool.retries", "elif item.tries >= self.tool.retries")
BEGUN = """        return self.change(
            "INSERT INTO attempts (run_id, tool, attempt, status, started_at, pid, reason, work, "
            "rows) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (self.run_id, tool, attempt, status, at, pid, reason, work, rows))
"""
ROW_TWICE = (BEGUN, BEGUN.replace("return ", "") + BEGUN)


@pytest.mark.parametrize("mutant, seed", [  # which is known to show it, and so comes first
    (FAILURE_SWALLOWED, 183), (FAILED_ITEM_PASSES, 185), (RETRY_SKIPPED, 176), (TRY_SKIPPED, 185),
    (ROW_TWICE, 189),
], ids=["failure swallowed", "failed item passes", "retry skipped", "try skipped", "row twice"])
def test_an_engine_that_does_otherwise_is_caught_by_the_short_set(mutant, seed, engines, tmp_path):
    text = engines[0].text
    assert text.count(mutant[0]) == 1
    other = Engine("mutant", text.replace(*mutant), tmp_path / "mutant")

    assert any(find_difference(Maker(each).make(), [engines[0], other], tmp_path / str(each))
               for each in sorted(SHORT, key=lambda each: each != seed))
