-- All tables of the pipeline; get_connection() makes those that are not there yet.

CREATE TABLE IF NOT EXISTS bronze (  -- every record of every source, as JSON
    source TEXT, number INTEGER, record TEXT NOT NULL, PRIMARY KEY (source, number));

CREATE TABLE IF NOT EXISTS silver_trips (
    trip INTEGER PRIMARY KEY, day TEXT NOT NULL, station TEXT NOT NULL, minutes INTEGER NOT NULL);

CREATE TABLE IF NOT EXISTS silver_stations (
    station TEXT PRIMARY KEY, name TEXT NOT NULL, docks INTEGER NOT NULL);

CREATE TABLE IF NOT EXISTS silver_weather (day TEXT PRIMARY KEY, rain_mm REAL NOT NULL);

CREATE TABLE IF NOT EXISTS gold_days (
    day TEXT PRIMARY KEY, trips INTEGER NOT NULL, minutes INTEGER NOT NULL,
    rain_mm REAL);  -- NULL: not known of that day

CREATE TABLE IF NOT EXISTS gold_stations (
    name TEXT PRIMARY KEY, trips INTEGER NOT NULL, trips_per_dock REAL NOT NULL);
