"""File ledger: files of orders arrive, and each is validated, loaded and transformed exactly once.

From the root of the repository:

    python -m example.file_ledger.pipeline
    python -m example.file_ledger.pipeline --items validate --failed

The first run is meant to fail: `inbox/orders-2024-05-03.csv` breaks off before its control total.
It is tried twice, then left alone and listed; the other files are published. A second run finds
nothing to do. Once the file is corrected it is another version, and goes through alone:

    cp -r example/file_ledger/inbox inbox
    echo 1304,market,2024-05-03,4.80 >> inbox/orders-2024-05-03.csv
    echo total,4,,57.30 >> inbox/orders-2024-05-03.csv
    python -m example.file_ledger.pipeline --inbox inbox

A tool with items takes each file of its own: that one is done is written in the transaction that
did it. `publish` has none; it runs every time, over whatever passed.
"""
import sqlite3
import sys
from pathlib import Path

# The root of the repository, for when this file is run by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrator import main

HERE = Path(__file__).resolve().parent

# "continue": when nothing but a broken file has come, what passed before is still carried on.
TOOL_MAP = {
    "validate":   {"module": "example.file_ledger.validate", "on_failure": "continue",
                   "retries": 1, "retry_delay": "0s"},
    "load_stage": {"module": "example.file_ledger.load_stage", "on_failure": "continue",
                   "each": "validate"},
    "transform":  {"module": "example.file_ledger.transform", "on_failure": "continue",
                   "each": "load_stage", "retries": 1, "retry_delay": "0s"},
    "publish":    {"module": "example.file_ledger.publish", "needs": ["transform"]},
}

STAGES = {
    "ingest": ["validate", "load_stage"],
    "full":   ["ingest", "transform", "publish"],
}


def add_arguments(parser):
    """Declare where the files arrive."""
    parser.add_argument("--inbox", type=Path, default=HERE / "inbox", metavar="FOLDER",
                        help="folder in which files arrive (default: that of the example)")


def get_connection():
    """Return a connection to the database, which holds all tables from the start.

    Workers share the file, and one writes at a time: IMMEDIATE lets the others wait for it.
    """
    conn = sqlite3.connect(HERE / "file_ledger.db", timeout=60, isolation_level="IMMEDIATE")
    conn.executescript((HERE / "tables.sql").read_text(encoding="utf-8"))
    return conn


if __name__ == "__main__":
    sys.exit(main(TOOL_MAP, STAGES, get_connection, name="file_ledger",
                  add_arguments=add_arguments))
