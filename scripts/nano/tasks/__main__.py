"""Prints items of a task."""

import argparse
from itertools import islice

from . import TASKS, items

parser = argparse.ArgumentParser(description="Items of a task, as the model reads them.")
parser.add_argument("task", choices=sorted(TASKS))
parser.add_argument("--count", type=int, default=3)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--split", choices=("train", "heldout"), default="train")
args = parser.parse_args()
for item in islice(items(args.task, args.split, args.seed), args.count):
    print(item.text, "\n" + "-" * 80)
