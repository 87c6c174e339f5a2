"""A tool for `mamba3-jepa agent`: says what dictionary.txt knows about the thing that a question names, in a word.

    $ python3 dictionary.py "What colour is a banana?"
    yellow
"""

import re
import sys
from pathlib import Path


def main(question: str) -> None:
    asked = " ".join(re.findall(r"[\w']+", question.lower()))
    lines = Path(__file__).with_name("dictionary.txt").read_text(encoding="utf-8").splitlines()
    entries = [line.rpartition(": ") for line in lines]
    named = [(len(thing), word) for thing, _, word in entries if f" {thing.lower()} " in f" {asked} "]
    if named:
        print(max(named)[1])  # the longest: "blue whale" before "whale"


if __name__ == "__main__":
    main(sys.argv[1])
