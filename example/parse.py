"""Turn raw lines into typed rows; keep what is refused, with the reason, in `rejects`."""
import csv
from itertools import groupby

CREATE_TABLES = (
    "CREATE TABLE IF NOT EXISTS airlines (carrier TEXT PRIMARY KEY, name TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS airports (faa TEXT PRIMARY KEY, name TEXT NOT NULL)",
    """CREATE TABLE IF NOT EXISTS flights (
        file TEXT, line INTEGER, flight_date TEXT NOT NULL, hour INTEGER NOT NULL,
        carrier TEXT NOT NULL, flight INTEGER NOT NULL, origin TEXT NOT NULL, dest TEXT NOT NULL,
        arr_delay_min INTEGER,  -- negative: early; NULL: cancelled
        PRIMARY KEY (file, line))""",
    """CREATE TABLE IF NOT EXISTS rejects (
        file TEXT, line INTEGER, flight_date TEXT NOT NULL, reason TEXT NOT NULL,
        PRIMARY KEY (file, line))""",
)


def run(conn, context, since=None):
    """Replace the typed rows of all days from `since` on; return how many, and how many refused."""
    for statement in CREATE_TABLES:
        conn.execute(statement)
    conn.execute("DELETE FROM flights WHERE flight_date >= ?", (since or "",))
    conn.execute("DELETE FROM rejects WHERE flight_date >= ?", (since or "",))
    conn.execute("DELETE FROM airlines")
    conn.execute("DELETE FROM airports")
    flights, rejects = [], []
    for place, row in read_rows(conn, "flights-*.csv", since):
        try:
            flights.append((*place, *parse_flight(row, day=place[2])))
        except ValueError as error:
            rejects.append((*place, str(error)))
    conn.executemany("INSERT INTO flights VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", flights)
    conn.executemany("INSERT INTO rejects VALUES (?, ?, ?, ?)", rejects)
    conn.executemany("INSERT INTO airlines VALUES (:carrier, :name)",
                     [row for _, row in read_rows(conn, "airlines.csv")])
    conn.executemany("INSERT INTO airports VALUES (:faa, :name)",
                     [row for _, row in read_rows(conn, "airports.csv")])
    context.log.info("refused %d of %d flights", len(rejects), len(flights) + len(rejects))
    return {"rows": len(flights), "rejects": len(rejects)}


def check(conn, since=None):
    """Raise if there are no flights, or if so many were refused that the format has changed."""
    days = (since or "",)
    kept = conn.execute("SELECT count(*) FROM flights WHERE flight_date >= ?", days).fetchone()[0]
    lost = conn.execute("SELECT count(*) FROM rejects WHERE flight_date >= ?", days).fetchone()[0]
    if kept == 0 or lost > 0.05 * (kept + lost):
        raise ValueError(f"only {kept} of {kept + lost} flights could be read; see table rejects")


def read_rows(conn, pattern, since=None):
    """Yield ((file, line, day), row) for every data line of the files that match `pattern`."""
    query = """SELECT file, day, text FROM raw
        WHERE file GLOB ? AND (day IS NULL OR day >= ?) ORDER BY file, line"""
    lines = conn.execute(query, (pattern, since or ""))
    for (file, day), group in groupby(lines, key=lambda line: line[:2]):
        reader = csv.DictReader(text for _, _, text in group)
        for row in reader:
            yield (file, reader.line_num, day), row


def parse_flight(row, day):
    """Return the typed columns of one flight; raise ValueError with the reason to refuse it."""
    if None in row or None in row.values():
        raise ValueError("not as many values as the header has columns")
    if "{year}-{month:0>2}-{day:0>2}".format(**row) != day:
        raise ValueError("not a flight of the day that the file is named after")
    departed = row["dep_time"] != "NA"
    if departed and row["arr_time"] == "NA":
        raise ValueError("departed, but no arrival is recorded")
    if departed and row["arr_delay"] == "NA":
        raise ValueError("arrived, but how late is not recorded")
    codes = row["carrier"], int(row["flight"]), row["origin"], row["dest"]
    return (int(row["hour"]), *codes, int(row["arr_delay"]) if departed else None)
