"""Bronze: the records of each source as they came."""
import csv
import json


def trips(conn, sources):
    """Load the trips as they came."""
    return replace(conn, "trips", read_csv(sources / "trips.csv"))


def stations(conn, sources):
    """Load the stations as they came."""
    return replace(conn, "stations", read_json(sources / "stations.json"))


def weather(conn, sources):
    """Load the weather as it came."""
    return replace(conn, "weather", read_csv(sources / "weather.csv"))


def replace(conn, source, records):
    """Replace all records of one source; return how many there are."""
    conn.execute("DELETE FROM bronze WHERE source = ?", (source,))
    rows = [(source, number, json.dumps(record)) for number, record in enumerate(records, start=1)]
    conn.executemany("INSERT INTO bronze (source, number, record) VALUES (?, ?, ?)", rows)
    return len(rows)


def read_csv(path):
    """Return the lines of a CSV file as dicts of text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_json(path):
    """Return the records of a JSON file. Raise ValueError, with its name, if it is not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is no whole JSON: {error}") from None
