"""Add the names of airlines and airports, and sort every flight into a delay group."""

CREATE_ENRICHED = """
    CREATE TABLE IF NOT EXISTS enriched_flights (
        file TEXT, line INTEGER, flight_date TEXT NOT NULL, hour INTEGER NOT NULL,
        carrier TEXT NOT NULL, carrier_name TEXT NOT NULL, flight INTEGER NOT NULL,
        origin_name TEXT NOT NULL, dest_name TEXT NOT NULL,
        arr_delay_min INTEGER,      -- NULL: cancelled
        delay_group TEXT NOT NULL,  -- on time, up to 15, up to 60, over 60 (minutes), cancelled
        PRIMARY KEY (file, line)
    )"""

# Left joins, since a flight without a name is still a flight: it goes by its code.
INSERT_ENRICHED = """
    INSERT INTO enriched_flights
    SELECT file, line, flight_date, hour,
        flights.carrier, coalesce(airlines.name, flights.carrier), flight,
        coalesce(origins.name, origin), coalesce(dests.name, dest),
        arr_delay_min,
        CASE
            WHEN arr_delay_min IS NULL THEN 'cancelled'
            WHEN arr_delay_min <= 0 THEN 'on time'
            WHEN arr_delay_min <= 15 THEN 'up to 15'
            WHEN arr_delay_min <= 60 THEN 'up to 60'
            ELSE 'over 60'
        END
    FROM flights
    LEFT JOIN airlines ON airlines.carrier = flights.carrier
    LEFT JOIN airports AS origins ON origins.faa = flights.origin
    LEFT JOIN airports AS dests ON dests.faa = flights.dest
    WHERE flight_date >= ?"""

FIND_NAMELESS = """
    SELECT dest, count(*) FROM flights
    WHERE flight_date >= ? AND dest NOT IN (SELECT faa FROM airports)
    GROUP BY dest ORDER BY dest"""

COUNT_BOTH = """
    SELECT (SELECT count(*) FROM flights WHERE flight_date >= :since),
           (SELECT count(*) FROM enriched_flights WHERE flight_date >= :since)"""


def run(conn, context, since=None):
    """Replace the enriched flights of all days from `since` on; return how many there are."""
    conn.execute(CREATE_ENRICHED)
    conn.execute("DELETE FROM enriched_flights WHERE flight_date >= ?", (since or "",))
    rows = conn.execute(INSERT_ENRICHED, (since or "",)).rowcount
    for code, flights in conn.execute(FIND_NAMELESS, (since or "",)):
        context.log.warning("no airport is named %s, where %d flights went", code, flights)
    return rows


def check(conn, since=None):
    """Raise if there are no flights, or if the joins lost or doubled one."""
    before, after = conn.execute(COUNT_BOTH, {"since": since or ""}).fetchone()
    if not before:
        raise ValueError(f"there are no flights{' since ' + since if since else ''}")
    if before != after:
        raise ValueError(f"{before} flights went into the joins, {after} came out")
