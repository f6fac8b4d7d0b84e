"""Print both gold tables, and say which of them this run could not renew."""

TABLES = {
    "gold_days": ("day             trips  minutes  rain", "{:<14}  {:>5}  {:>7}  {:>4}",
                  "SELECT day, trips, minutes, coalesce(rain_mm, '?') FROM gold_days ORDER BY 1"),
    "gold_stations": ("station         trips  per dock", "{:<14}  {:>5}  {:>8.2f}",
                      "SELECT name, trips, trips_per_dock FROM gold_stations ORDER BY 2 DESC, 1"),
}


def run(conn, context):
    """Print the tables; return which of them are of this run."""
    # What is skipped or has failed has no result, and its table is as the last good run left it.
    renewed = [tool for tool in TABLES if tool in context.results]
    for tool, (heading, line, query) in TABLES.items():
        print(tool if tool in renewed else f"{tool}: NOT RENEWED, as an earlier run left it")
        print(heading)
        for row in conn.execute(query):
            print(line.format(*row))
        print()
    return {"renewed": renewed}
