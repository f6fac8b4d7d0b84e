"""Fetch the raw counts: python 01_fetch.py --source data/rides.csv --out work/raw.csv"""
import argparse
import shutil
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--source", type=Path, required=True)
parser.add_argument("--out", type=Path, required=True)
args = parser.parse_args()

args.out.parent.mkdir(parents=True, exist_ok=True)
shutil.copyfile(args.source, args.out)
print(f"{args.out}: {args.out.stat().st_size:,} bytes")
