"""Throw-away servers of PostgreSQL and MariaDB, and ways to run tools given by their source."""
import glob
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from orchestrator import run_pipeline

HERE = Path(__file__).resolve().parent


def pytest_ignore_collect(collection_path, config):
    """Collect these tests only when they are named: the plain suite promises to need nothing."""
    # Both conftest.py are the module `conftest`, and this one has just taken the name. The tests
    # import helpers from the other, so that one gets it back, before any of them is imported.
    sys.modules["conftest"] = config.pluginmanager.get_plugin(str(HERE.parent / "conftest.py"))
    start = Path(config.invocation_params.dir)
    named = [(start / arg.split("::")[0]).resolve() for arg in config.args]
    return None if any(path == HERE or HERE in path.parents for path in named) else True


def find_programs():
    """Return the folder of PostgreSQL's own programs, the newest; None if there is none."""
    folders = sorted(glob.glob("/usr/lib/postgresql/*/bin"),
                     key=lambda folder: float(folder.split("/")[-2]), reverse=True)
    on_path = shutil.which("pg_ctl")
    folders += [os.path.dirname(on_path)] if on_path else []
    return next((each for each in folders if os.path.exists(os.path.join(each, "initdb"))), None)


class Cluster:
    """A PostgreSQL cluster in a folder. It listens on a Unix socket in that folder only."""

    def __init__(self, programs, folder):
        self.programs, self.folder = programs, folder
        self.dsn = f"host={folder} user=postgres dbname=postgres"
        self.url = f"postgresql+psycopg://postgres@/postgres?host={folder}"
        self.user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL does not run as root
        if self.user:
            shutil.chown(folder, self.user)

    def start(self):
        self.call("initdb", "-D", f"{self.folder}/data", "-U", "postgres", "-A", "trust",
                  "--no-sync", "-E", "UTF8", "--locale", "C")
        self.start_again()

    def start_again(self):
        self.call("pg_ctl", "start", "-w", "-D", f"{self.folder}/data", "-l",
                  f"{self.folder}/log", "-o",
                  f"-k {self.folder} -c listen_addresses='' -c fsync=off")

    def stop(self):
        self.call("pg_ctl", "stop", "-D", f"{self.folder}/data", "-m", "immediate")

    def call(self, program, *words):
        command = [os.path.join(self.programs, program), *words]
        if self.user:
            command = ["runuser", "-u", self.user, "--", *command]
        # Output goes to a file: a pipe would stay open in the server, and never end.
        with open(os.path.join(self.folder, f"{program}.out"), "w+", encoding="utf-8") as out:
            code = subprocess.call(command, cwd=self.folder, stdin=subprocess.DEVNULL,
                                   stdout=out, stderr=subprocess.STDOUT)
            out.seek(0)
            if code:
                raise RuntimeError(f"{program} ended with {code}:\n{out.read()}")


@pytest.fixture(scope="session")
def cluster():
    """Start a PostgreSQL cluster for the tests of this session; stop it whatever happens."""
    programs = find_programs() if os.name == "posix" else None
    if programs is None:
        pytest.skip("PostgreSQL's programs are not installed")
    if os.geteuid() == 0 and not shutil.which("runuser"):
        pytest.skip("PostgreSQL does not run as root, and there is no runuser to change that")
    # Not pytest's tmp_path, into which the user postgres may not look; and the path of a socket
    # may not be long.
    folder = tempfile.mkdtemp(prefix="orchestrator-pg-", dir="/tmp")
    try:
        cluster = Cluster(programs, folder)
        cluster.start()
        yield cluster
    finally:
        try:
            if os.path.exists(f"{folder}/data/postmaster.pid"):
                cluster.stop()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class Maria:
    """A MariaDB server on a folder. It listens on a Unix socket in that folder only."""

    def __init__(self, folder):
        self.folder, self.socket, self.process = folder, f"{folder}/socket", None
        self.user = []
        if os.geteuid() == 0:  # as root it refuses to run, but knows how to become another
            user = "mysql" if has_user("mysql") else "nobody"
            shutil.chown(folder, user)
            self.user = [f"--user={user}"]

    def start(self):
        with open(f"{self.folder}/log", "w", encoding="utf-8") as log:
            subprocess.run(
                ["mariadb-install-db", "--no-defaults", f"--datadir={self.folder}/data",
                 "--skip-test-db", "--auth-root-authentication-method=normal",
                 f"--tmpdir={self.folder}", *self.user],  # TMPDIR may be another user's
                check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            self.process = subprocess.Popen(
                [find_mariadbd(), "--no-defaults", f"--datadir={self.folder}/data",
                 f"--socket={self.socket}", f"--pid-file={self.folder}/pid", "--skip-networking",
                 "--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=32M",
                 "--character-set-server=utf8mb4", f"--tmpdir={self.folder}", *self.user],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.call("CREATE DATABASE test")

    def call(self, sql):
        """Execute a statement once the server answers; fail if it ends before."""
        import pymysql
        from conftest import wait_until

        def is_done():
            assert self.process.poll() is None, Path(self.folder, "log").read_text()
            try:
                conn = pymysql.connect(unix_socket=self.socket, user="root")
            except pymysql.OperationalError:
                return False
            with conn:
                conn.cursor().execute(sql)
            return True
        wait_until(is_done)

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()


def has_user(name):
    import pwd
    return any(each.pw_name == name for each in pwd.getpwall())


def find_mariadbd():
    """Return MariaDB's server, or None."""
    return shutil.which("mariadbd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/libexec")


@pytest.fixture(scope="session")
def maria():
    """Start a MariaDB server for the tests of this session; stop it whatever happens."""
    pytest.importorskip("pymysql")
    if os.name != "posix" or not find_mariadbd() or not shutil.which("mariadb-install-db"):
        pytest.skip("MariaDB's programs (mariadbd, mariadb-install-db) are not installed")
    folder = tempfile.mkdtemp(prefix="orchestrator-maria-", dir="/tmp")
    server = None
    try:
        server = Maria(folder)
        server.start()
        yield server
    finally:
        try:
            if server:
                server.stop()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run_tools(modules):
    """Run tools, each given by its source, in their order: run_tools(get_connection, a="...")."""
    def run(get_connection, *, options=None, **sources):
        modules(**sources)
        tool_map = {name: {"module": name, **(options or {})} for name in sources}
        return run_pipeline([], tool_map, get_connection=get_connection)
    return run
