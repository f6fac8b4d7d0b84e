-- All tables of the pipeline; get_connection() makes those that are not there yet. What became of
-- each file is in none of them: the engine keeps that in orchestrator_items, in this database.

CREATE TABLE IF NOT EXISTS files (  -- what validate has read last, and found good
    file TEXT PRIMARY KEY, version TEXT NOT NULL, orders INTEGER NOT NULL, cents INTEGER NOT NULL);

CREATE TABLE IF NOT EXISTS staged_orders (  -- as they came
    file TEXT, line INTEGER,  -- counted from 1, which is the header
    order_id TEXT NOT NULL, shop TEXT NOT NULL, day TEXT NOT NULL, amount TEXT NOT NULL,
    PRIMARY KEY (file, line));

CREATE TABLE IF NOT EXISTS orders (
    file TEXT, line INTEGER,
    order_id INTEGER NOT NULL, shop TEXT NOT NULL, day TEXT NOT NULL, cents INTEGER NOT NULL,
    PRIMARY KEY (file, line));

CREATE TABLE IF NOT EXISTS rejected_orders (
    file TEXT, line INTEGER, reason TEXT NOT NULL, PRIMARY KEY (file, line));

CREATE TABLE IF NOT EXISTS shop_days (  -- the data mart
    shop TEXT, day TEXT, orders INTEGER NOT NULL, cents INTEGER NOT NULL, PRIMARY KEY (shop, day));
