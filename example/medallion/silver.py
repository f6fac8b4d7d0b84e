"""Silver: typed rows, without those that mean nothing."""
import json


def trips(conn, context):
    """Type the trips, and leave out those that never ended."""
    conn.execute("DELETE FROM silver_trips")
    trips = read_bronze(conn, "trips")
    ended = [trip for trip in trips if trip["minutes"]]
    if len(ended) < len(trips):
        context.log.warning("%d of %d trips never ended", len(trips) - len(ended), len(trips))
    rows = [(int(trip["trip"]), trip["started_at"][:10], trip["station"], int(trip["minutes"]))
            for trip in ended]
    conn.executemany("INSERT INTO silver_trips VALUES (?, ?, ?, ?)", rows)
    return len(rows)


def stations(conn):
    """Type the stations."""
    conn.execute("DELETE FROM silver_stations")
    rows = read_bronze(conn, "stations")
    conn.executemany("INSERT INTO silver_stations VALUES (:station, :name, :docks)", rows)
    return len(rows)


def weather(conn):
    """Type the weather."""
    conn.execute("DELETE FROM silver_weather")
    rows = [(day["day"], float(day["rain_mm"])) for day in read_bronze(conn, "weather")]
    conn.executemany("INSERT INTO silver_weather VALUES (?, ?)", rows)
    return len(rows)


def read_bronze(conn, source):
    """Return the records of one source."""
    query = "SELECT record FROM bronze WHERE source = ? ORDER BY number"
    return [json.loads(record) for record, in conn.execute(query, (source,))]
