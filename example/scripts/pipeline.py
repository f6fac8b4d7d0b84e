"""Scripts: five plain files with flags of their own, as they are, become a pipeline.

From the root of the repository:

    python -m example.scripts.pipeline --jobs 4
    python -m example.scripts.pipeline --jobs 4 --least 400 --title "Busy months"

Nothing in the five knows of it. Each is a tool by its "command", which runs in this folder; what
stands in braces is a flag of add_arguments() below, or one of the tool's own "arguments": so the
same script runs for three years, side by side. What is fetched is good for a day. At the end
`notify`, which is a module, tells how the others ended.
"""
import sys
from pathlib import Path

# The root of the repository, for when this file is run by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrator import main

YEARS = [2021, 2022, 2023]

TOOL_MAP = {
    "fetch":   {"command": "python 01_fetch.py --source data/rides.csv --out work/raw.csv",
                "reads": ["data/rides.csv"], "writes": ["work/raw.csv"], "cache": "24h"},
    "clean":   {"command": "python 02_clean.py --raw work/raw.csv --out work/clean.csv"
                           " --least {least}",
                "reads": ["work/raw.csv"], "writes": ["work/clean.csv"]},
    **{f"year_{year}": {
        "command": "python 03_year.py --year {year} --clean work/clean.csv --out work/{year}.json",
        "arguments": {"year": year}, "timeout": "5m",
        "reads": ["work/clean.csv"], "writes": [f"work/{year}.json"]} for year in YEARS},
    "combine": {"command": ["python", "04_combine.py", *(f"work/{year}.json" for year in YEARS),
                            "--out", "work/all.json"],
                "reads": [f"work/{year}.json" for year in YEARS], "writes": ["work/all.json"]},
    "report":  {"command": "python 05_report.py --all work/all.json --title {title}",
                "reads": ["work/all.json"]},
    "notify":  {"module": "example.scripts.notify", "when": "always"},
}

STAGES = {
    "years": [f"year_{year}" for year in YEARS],
    "full":  ["fetch", "clean", "years", "combine", "report", "notify"],
}


def add_arguments(parser):
    """Declare the flags that commands have in braces."""
    parser.add_argument("--least", type=int, default=0, metavar="RIDES",
                        help="leave out months with fewer rides than that (0)")
    parser.add_argument("--title", default="Rides", help="of the report (Rides)")


if __name__ == "__main__":
    sys.exit(main(TOOL_MAP, STAGES, name="scripts", add_arguments=add_arguments))
