"""Put the years together: python 04_combine.py work/2021.json work/2022.json --out work/all.json"""
import argparse
import json

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("years", nargs="+")
parser.add_argument("--out", required=True)
args = parser.parse_args()

summaries = []
for path in args.years:
    with open(path, encoding="utf-8") as file:
        summaries.append(json.load(file))
with open(args.out, "w", encoding="utf-8") as file:
    json.dump(sorted(summaries, key=lambda summary: summary["year"]), file, indent=1)
print(f"{len(summaries)} years in {args.out}")
