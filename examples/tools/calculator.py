"""A tool for `mamba3-jepa agent`: finds one small sum in a question and says what it makes, in a word.

    $ python3 calculator.py "How much is 8 - 6?"
    two
"""

import operator
import re
import sys

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
OPERATORS = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}
SIGNS = {"+": "plus", "-": "minus", "*": "times"}


def main(question: str) -> None:
    number = rf"({'|'.join(NUMBERS)}|\d+)"
    between = rf"({'|'.join([*OPERATORS, *map(re.escape, SIGNS)])})"
    found = re.search(rf"\b{number}\s*{between}\s*{number}\b", question.lower())
    if found is None:
        return  # nothing to say
    a, word, b = found.groups()
    print(spelled(OPERATORS[SIGNS.get(word, word)](value(a), value(b))))


def value(text: str) -> int:
    return NUMBERS.index(text) if text in NUMBERS else int(text)


def spelled(number: int) -> str:
    return NUMBERS[number] if 0 <= number < len(NUMBERS) else str(number)


if __name__ == "__main__":
    main(sys.argv[1])
