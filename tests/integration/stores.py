"""The databases and drivers that items are tried on, each behind the same few words."""
import json
import textwrap

from conftest import ENGINE_MARK

# What a tool needs to speak to any of them: do(conn, "... ?", value).
DO = '''
def do(conn, sql, *values):
    """Execute a statement, whose parameters are `?`, and return its rows, if it gives any."""
    if hasattr(conn, "exec_driver_sql"):
        cursor = conn.exec_driver_sql(sql.replace("?", MARK), values)
        return [tuple(row) for row in cursor] if cursor.returns_rows else None
    cursor = conn if KIND == "duckdb" else conn.cursor()
    if values:
        cursor.execute(sql.replace("?", MARK), values)
    else:
        cursor.execute(sql)
    if not cursor.description:
        return None
    return [tuple(row.values() if isinstance(row, dict) else row) for row in cursor.fetchall()]


def note(conn, item, note=""):
    """Be the work of an item: a row that nothing keeps from being there twice."""
    do(conn, "INSERT INTO work (item, note) VALUES (?, ?)", item, str(note))
'''


class Store:
    """A database and the way to it: `body`, that of get_connection(), and `mark`, its `?`."""

    def __init__(self, kind, body, mark="%s"):
        self.kind, self.mark = kind, mark
        self.source = "def get_connection():\n" + textwrap.indent(textwrap.dedent(body), "    ")
        self.do_source = f"KIND, MARK = {kind!r}, {mark!r}\n{DO}"
        space = {}
        exec(self.source + "\n" + self.do_source, space)
        self.get_connection, self._do = space["get_connection"], space["do"]

    def query(self, sql, *values):
        """Return the rows that another connection sees, and commit what it did."""
        conn = self.get_connection()
        try:
            rows = self._do(conn, sql, *values)
            try:
                conn.commit()
            except Exception as error:  # DuckDB, in whose mode nothing is open
                assert "no transaction" in str(error)
            return rows
        finally:
            conn.close()

    def clear(self):
        """Make the database empty but for the table `work`."""
        if self.kind == "postgresql":
            # What a failed test left behind must not block the next one with its locks.
            self.query("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                       " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'")
            self.query("DROP SCHEMA public CASCADE")
            self.query("CREATE SCHEMA public")
        if self.kind == "mariadb":
            self.query("CREATE OR REPLACE DATABASE test")
        self.query(f"CREATE TABLE work (item {self.text}, note {self.text}, seq {self.seq})")

    @property
    def text(self):
        return "LONGTEXT COLLATE utf8mb4_nopad_bin" if self.kind == "mariadb" else "TEXT"

    @property
    def seq(self):
        return {"postgresql": "SERIAL", "mariadb": "INTEGER PRIMARY KEY AUTO_INCREMENT",
                "duckdb": "INTEGER"}.get(self.kind, "INTEGER PRIMARY KEY")

    def work(self):
        """Return the items whose work is there, in the order in which it was done."""
        order = "rowid" if self.kind == "duckdb" else "seq"
        return [item for (item,) in self.query(f"SELECT item FROM work ORDER BY {order}")]

    def ledger(self, columns="item, status", tool="tool"):
        """Return rows of the ledger, by item."""
        return self.query(f"SELECT {columns} FROM orchestrator_items WHERE tool = ? "
                          "ORDER BY item", tool)


def make_psycopg(name, autocommit, dsn, more=""):
    body = f"import {name}\n"
    if more == "dict" and name == "psycopg":
        body += "from psycopg.rows import dict_row\n"
        body += f"conn = {name}.connect({dsn!r}, row_factory=dict_row)\n"
    elif more == "dict":
        body += "from psycopg2.extras import RealDictCursor\n"
        body += f"conn = {name}.connect({dsn!r}, cursor_factory=RealDictCursor)\n"
    else:
        body += f"conn = {name}.connect({dsn!r})\n"
    return Store("postgresql", body + f"conn.autocommit = {autocommit}\nreturn conn\n")


def make_pymysql(autocommit, socket, more=""):
    rows = ", cursorclass=pymysql.cursors.DictCursor" if more == "dict" else ""
    return Store("mariadb", "import pymysql\n"
                 f"return pymysql.connect(unix_socket={socket!r}, user='root', database='test', "
                 f"autocommit={autocommit}, init_command='SET innodb_lock_wait_timeout = 1'"
                 f"{rows})\n")


def make_alchemy(url, kind, mark="%s"):
    return Store(kind, f"import sqlalchemy\nengine = sqlalchemy.create_engine({url!r}, "
                       "poolclass=sqlalchemy.NullPool)\nreturn engine.connect()\n", mark)


class Pipeline:
    """A pipeline in a sandbox over a store."""

    def __init__(self, sandbox, store, **options):
        self.sandbox, self.store, self.options = sandbox, store, options
        sandbox.tool("work", store.do_source)
        self.write()

    def write(self, engine=None, **more):
        """Write the pipeline's file; `engine` changes the text of the engine."""
        options = {**self.options, **more}
        head = (f"NAME = 'p'\nTOOL_MAP = {{'tool': {{'module': 'tool', **{options!r}}}}}\n"
                f"STAGES = {{}}\n{self.store.source}")
        self.sandbox.pipeline(head)
        if engine is not None:
            text = self.sandbox.read("orchestrator.py")
            before, mark, after = text.partition(ENGINE_MARK)
            (self.sandbox.folder / "orchestrator.py").write_text(
                before + mark + engine(after), encoding="utf-8")

    def tool(self, run, items="", top=""):
        """Write the tool: the body of run(), and that of items()."""
        items = items or "return list('abcde')"
        self.sandbox.tool("tool", "from work import do, note\n" + textwrap.dedent(top)
                          + "\ndef items(conn):\n" + indent(items)
                          + "\ndef run(conn, item, context):\n" + indent(run))
        return self

    def run(self, *words, code=0, **start):
        """Run the pipeline, which must end with an exit code, and return how it ended."""
        ended = self.sandbox.run(*words, **start)
        assert ended.code == code, ended
        return ended

    def counts(self):
        """Return what --status says of the tool's items."""
        return json.loads(self.run("--status", "--json").out)["tools"][0]["items"]


def indent(body):
    return textwrap.indent(textwrap.dedent(body).strip("\n"), "    ") + "\n"


def patch(*changes):
    """Return a function that changes text, and fails where there is nothing to change."""
    def change(text):
        for old, new in changes:
            assert text.count(old) == 1, f"{text.count(old)} times in the engine: {old}"
            text = text.replace(old, new)
        return text
    return change


# What tools of two pipelines need to wait for one another: files in a folder that both know.
MEET = '''
import os, time
from pathlib import Path

def say(name):
    Path(__file__).with_name("said-" + name).touch()

def wait_for(*names):
    end = time.monotonic() + 20
    while not all(Path(__file__).with_name("said-" + name).exists() for name in names):
        assert time.monotonic() < end, f"nobody said {names}"
        time.sleep(0.001)

def meet(name):
    """Return once both pipelines have come here."""
    say(name + Path(os.environ["ORCHESTRATOR_HOME"]).name)
    wait_for(name + "one", name + "two")
'''


class Two:
    """Two coordinators, with a history each, of one pipeline on one database."""

    def __init__(self, sandbox, store, **options):
        self.pipeline = Pipeline(sandbox, store, **options)
        self.sandbox, self.store = sandbox, store
        sandbox.tool("meeting", MEET)

    def run(self, *words):
        """Run both at once and return how they ended."""
        for file in self.sandbox.folder.glob("said-*"):
            file.unlink()
        both = [self.sandbox.start(*words, env={"ORCHESTRATOR_HOME": str(
            self.sandbox.folder / home)}) for home in ("one", "two")]
        try:
            texts = [each.communicate(timeout=60) for each in both]
        finally:
            for each in both:
                each.kill()
        return [(each.returncode, *text) for each, text in zip(both, texts)]


ITEMS = [f"{i:02}" for i in range(20)]
CONTEND = {
    "top": "from meeting import meet",
    "items": "from pathlib import Path\nversion = Path(__file__).with_name('version').read_text()\n"
             f"return [(item, version) for item in {ITEMS!r}]",
    "run": """
        meet("")  # both have listed all, so each finds what the other has done
        note(conn, item)
        if item == "07" and context.attempt == 1:
            raise ValueError("a first try that fails")
    """}


def contend(two, rounds=3):
    """Have both do all items in several versions; return what is lost, and what is there twice."""
    two.pipeline.tool(**CONTEND)
    lost, twice = [], []
    for version in range(1, rounds + 1):
        two.sandbox.folder.joinpath("version").write_text(str(version))
        before = two.store.work()
        ended = two.run()
        done = two.store.work()[len(before):]
        lost += [item for item in ITEMS if item not in done]
        twice += [item for item in ITEMS if done.count(item) > 1]
    return lost, twice, ended


DELETES = patch((
    "        cursor = self.do(_UPDATE,",
    "        self.do('DELETE FROM orchestrator_items WHERE pipeline = ? AND tool = ? '\n"
    "                'AND item = ?', (*self.key, item.name))\n"
    "        return self.record(item._replace(is_seen=False), status, at, duration_s, rows,\n"
    "                           error)\n"
    "        cursor = self.do(_UPDATE,"))
RECORD = ('        ledger.record(item._replace(tries=item.tries + 1), "success", time.time(),\n'
          "                      time.monotonic() - self.started_s, rows)\n")
AFTER = patch((RECORD, "        self.database.commit(), self.database.begin()\n"
               + RECORD))
BEFORE = patch(
    ("        rows = count_rows(self._call_watched())\n",
     '        ledger.record(item._replace(tries=item.tries + 1), "success", time.time(), 0.0)\n'
     "        self.database.commit(), self.database.begin()\n"
     "        ledger.begin_item(ahead)\n"
     "        rows = count_rows(self._call_watched())\n"),
    (RECORD, ""))
MUTANTS = {"DELETE and INSERT": DELETES, "ledger after": AFTER, "ledger before": BEFORE}
