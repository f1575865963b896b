"""The article's table, and what is planned for the same job on five cards: what `memplan article` prints.

    python benchmarks/article.py [-o FILE]

Planned and predicted by data sheets; nothing is run. docs/article.md has the text.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for benchmarks, which are not installed

from benchmarks.machine import save
from memplan.article import account
from memplan.cli import ARTICLE_CARDS
from memplan.machines import machine


def main() -> None:
    """Plan, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", default="benchmarks/results/article.json")
    args = parser.parse_args()
    found = account([machine(name) for name in ARTICLE_CARDS], "64GB", progress=print)
    print(found)
    save(args.out, {"text": str(found).splitlines(), **dataclasses.asdict(found)})


if __name__ == "__main__":
    main()
