"""Medallion: bike trips, stations and weather go from bronze to silver to gold.

From the root of the repository:

    python -m example.medallion.pipeline --jobs 4

This run fails, and is meant to: `sources/stations.json` breaks off in the middle. All that needs
it is skipped, `gold_stations` at its end; the rest goes on; the report is printed whatever became
of the others; the exit code is 1. With the file mended, the whole succeeds:

    cp -r example/medallion/sources mended
    echo '"docks": 8}]' >> mended/stations.json
    python -m example.medallion.pipeline --sources mended

A layer is a module here, and a tool is one function of it: `"module": "bronze:trips"`.
"""
import sqlite3
import sys
from pathlib import Path

# The root of the repository, for when this file is run by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrator import main

HERE = Path(__file__).resolve().parent

TOOL_MAP = {
    "bronze_trips":    {"module": "example.medallion.bronze:trips", "needs": []},
    "bronze_stations": {"module": "example.medallion.bronze:stations", "needs": []},
    "bronze_weather":  {"module": "example.medallion.bronze:weather", "needs": []},
    "silver_trips":    {"module": "example.medallion.silver:trips", "needs": ["bronze_trips"]},
    "silver_stations": {"module": "example.medallion.silver:stations",
                        "needs": ["bronze_stations"]},
    "silver_weather":  {"module": "example.medallion.silver:weather", "needs": ["bronze_weather"]},
    "gold_days":       {"module": "example.medallion.gold:days",
                        "needs": ["silver_trips", "silver_weather"]},
    "gold_stations":   {"module": "example.medallion.gold:stations",
                        "needs": ["silver_trips", "silver_stations"]},
    "report":          {"module": "example.medallion.report", "when": "always",
                        "needs": ["gold_days", "gold_stations"]},
}

STAGES = {
    "bronze": ["bronze_trips", "bronze_stations", "bronze_weather"],
    "silver": ["silver_trips", "silver_stations", "silver_weather"],
    "gold":   ["gold_days", "gold_stations"],
    "full":   ["bronze", "silver", "gold", "report"],
}


def add_arguments(parser):
    """Declare where the sources are."""
    parser.add_argument("--sources", type=Path, default=HERE / "sources", metavar="FOLDER",
                        help="folder of the source files (default: those of the example)")


def get_connection():
    """Return a connection to the database, which holds all tables from the start.

    Workers share the file, and one writes at a time: the others wait up to `timeout` seconds. But
    SQLite lets a transaction wait only if it begins by writing. So every tool that writes deletes
    its old rows first, and reads after that.
    """
    conn = sqlite3.connect(HERE / "medallion.db", timeout=60)
    conn.executescript((HERE / "tables.sql").read_text(encoding="utf-8"))
    return conn


if __name__ == "__main__":
    sys.exit(main(TOOL_MAP, STAGES, get_connection, name="medallion",
                  add_arguments=add_arguments))
