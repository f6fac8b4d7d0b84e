"""Turn each raw file into typed rows; keep what is refused, with the reason, in `rejects`."""
import csv

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


# All other files are the flights of a day.
REPLACE_NAMES = {
    "airlines.csv": ("DELETE FROM airlines", "INSERT INTO airlines VALUES (:carrier, :name)"),
    "airports.csv": ("DELETE FROM airports", "INSERT INTO airports VALUES (:faa, :name)"),
}


def run(conn, item):
    """Replace the typed rows of one file; return how many flights there are, if it has some."""
    for statement in CREATE_TABLES:
        conn.execute(statement)
    if item in REPLACE_NAMES:
        delete, insert = REPLACE_NAMES[item]
        conn.execute(delete)
        conn.executemany(insert, [row for _, row in read_rows(conn, item)])
        return None
    flights, rejects = [], []
    for place, row in read_rows(conn, item):
        try:
            flights.append((*place, *parse_flight(row, day=place[2])))
        except ValueError as error:
            rejects.append((*place, str(error)))
    conn.execute("DELETE FROM flights WHERE file = ?", (item,))
    conn.execute("DELETE FROM rejects WHERE file = ?", (item,))
    conn.executemany("INSERT INTO flights VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", flights)
    conn.executemany("INSERT INTO rejects VALUES (?, ?, ?, ?)", rejects)
    return len(flights)


def check(conn, item):
    """Raise if so many flights of a file were refused that the format has changed."""
    kept, = conn.execute("SELECT count(*) FROM flights WHERE file = ?", (item,)).fetchone()
    lost, = conn.execute("SELECT count(*) FROM rejects WHERE file = ?", (item,)).fetchone()
    if lost > 0.05 * (kept + lost):
        raise ValueError(f"only {kept} of {kept + lost} flights could be read")


def read_rows(conn, file):
    """Yield ((file, line, day), row) for every data line of a file."""
    raw = conn.execute("SELECT day, text FROM raw WHERE file = ? ORDER BY line", (file,)).fetchall()
    reader = csv.DictReader(text for _, text in raw)
    for row in reader:
        yield (file, reader.line_num, raw[0][0]), row


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
