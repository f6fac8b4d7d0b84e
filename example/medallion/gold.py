"""Gold: the answers."""

# A left join, since a day without weather is still a day of trips.
INSERT_DAYS = """
    INSERT INTO gold_days
    SELECT day, count(*), sum(minutes), rain_mm
    FROM silver_trips LEFT JOIN silver_weather USING (day)
    GROUP BY day ORDER BY day"""

INSERT_STATIONS = """
    INSERT INTO gold_stations
    SELECT name, count(trip), 1.0 * count(trip) / docks
    FROM silver_stations LEFT JOIN silver_trips USING (station)
    GROUP BY station ORDER BY name"""


def days(conn):
    """Count the trips of each day, beside its rain."""
    conn.execute("DELETE FROM gold_days")
    return conn.execute(INSERT_DAYS).rowcount


def stations(conn):
    """Count the trips from each station, and set them against its size."""
    conn.execute("DELETE FROM gold_stations")
    return conn.execute(INSERT_STATIONS).rowcount
