"""Questions and other texts that have nothing to do with the data: of other topics, in other languages, garbled; and
shuffled questions.

Made from the word lists below and by shuffling; nothing is fetched.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection
from functools import lru_cache

import numpy as np

from mamba3_jepa.data.plain_text import plain_text

# Words of everyday questions. Together they say nothing: what matters is that they are not about the picture.
_WORDS = {
    "english": """who what when where why how which is was will can did does the a an of in for with about my your""",
    "topics": """president minister king capital country france japan river ocean mountain planet moon earth weather
        tomorrow yesterday history war music song movie actor football team goal market price stock money bank
        loan company computer password email phone battery engine doctor medicine hospital disease recipe bread
        cheese coffee ticket train airport hotel school teacher homework grammar language translate poem
        joke story birthday wedding law judge tax energy climate vaccine zebra elephant dog bird telephone
        guitar bicycle""",
    "german": """wie was wer wo wann warum viele gibt es ist sind hat der die das ein eine von in auf mit und nicht
        gegenstände farbe form kreis stern bild größe rot grün blau haus katze hund straße bahn schule buch wetter
        morgen stadt könig wasser geld zeit freund arbeit essen trinken""",
    "french": """combien quelle quel qui où quand pourquoi est sont il y a de le la les un une des dans sur avec et pas
        objets couleur forme cercle étoile image taille rouge vert bleu maison chat chien rue école livre temps demain
        ville roi eau argent ami travail manger boire""",
    "spanish": """cuántos cuál qué quién dónde cuándo por es son hay de el la los las un una en sobre con y no objetos
        color forma círculo estrella imagen tamaño rojo verde azul casa gato perro calle escuela libro tiempo mañana
        ciudad rey agua dinero amigo trabajo comer beber""",
}
_TOPICS = _WORDS["topics"].split()
_LISTS = [
    _WORDS["english"].split() + _TOPICS,
    *(words.split() for name, words in _WORDS.items() if name not in ("english", "topics")),
]
_LARGE = ["zero", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty", "hundred", "thousand"]
_SENTENCES = (
    "The {} is a {}.", "the {} of the {}", "My {} has no {} today.", "A {} and a {} were seen.", "the {} costs two {}",
    "{} {} not found", "There is no {} in the {}.", "I do not know the {}.", "No {} here, only {}.",
)  # fmt: skip
_NOTHING = ("null", "None", "NaN", "{}", "[]", "()", "n/a")
_ALPHABET = list(string.ascii_lowercase)


def foreign_question(question: str, seed: int, things: Collection[str] = ()) -> str:
    """A question that nobody could answer from a picture; `seed`, not negative, decides everything random.

    In equal shares, as far as `question` allows: words of one of the languages, letters that are no words, `question`
    with the letters of each word in disorder, with letters replaced, and, where one of its words is one of `things`,
    about something else than those: "what color is the guitar?".

    Args:
        things: all words for what the pictures show, if they are known: what they do not show can then be named.
    """
    dice = np.random.default_rng(seed)
    way = int(dice.integers(5 if things else 4))
    if way == _OTHER_THINGS:
        other = _other_things(question, dice, things)
        if other != question:
            return other
        way = 0
    if way >= _FIRST_GARBLED:
        garbled = _GARBLED[way - _FIRST_GARBLED](question, dice)
        if plain_text(garbled) != plain_text(question):
            return garbled
    return _words(dice) if way % 2 == 0 else _letters(dice)


@lru_cache(maxsize=8192)  # a data set is told few texts, each to many samples
def foreign_text(seed: int, question: str = "") -> str:
    """What somebody could say, or a tool print, that answers no question about a picture; `seed`, not negative, decides
    everything random.

    In equal shares words of one of the languages, a sentence with them, letters that are no words, a number in words or
    digits, marks or what programs print for nothing, what else they print (markup, a record, an error), and, where
    there is one, words of `question` with others.
    """
    dice = np.random.default_rng(seed)
    words = _LISTS[int(dice.integers(len(_LISTS)))]
    some = " ".join(map(str, dice.choice(words, dice.integers(1, 7))))
    number = int(dice.integers(-99, 9999))
    asked = question.rstrip("?").split()
    made = (
        some,
        str(dice.choice(_SENTENCES)).format(*map(str, dice.choice(_TOPICS, 2))),
        _letters(dice),
        str(dice.choice([str(number), f"{number / 100:.2f}", str(dice.choice(_LARGE))])),
        str(dice.choice([*_NOTHING, str(dice.choice(list(".?!-_*#/"))) * int(dice.integers(1, 5))])),
        str(dice.choice([f"<p>{some}</p>", f'{{"{some}": {number}}}', f"error {abs(number)}: {some}", some.upper()])),
        f"{' '.join(asked[-int(dice.integers(1, 1 + len(asked))) :])} {some}" if asked else some,
    )
    return made[int(dice.integers(len(made)))]


def shuffled(question: str, seed: int) -> str:
    """`question` with its words in disorder. It may still be understood: "the square what color is?"."""
    return " ".join(np.random.default_rng(seed).permutation(question.split()))


def _words(dice: np.random.Generator) -> str:
    words = _LISTS[int(dice.integers(len(_LISTS)))]
    return " ".join(map(str, dice.choice(words, dice.integers(3, 9)))) + "?"


def _letters(dice: np.random.Generator) -> str:
    return " ".join("".join(dice.choice(_ALPHABET, dice.integers(2, 8))) for _ in range(dice.integers(2, 7)))


def _other_things(question: str, dice: np.random.Generator, things: Collection[str]) -> str:
    def replaced(match: re.Match[str]) -> str:
        word = match.group()
        return str(dice.choice(_TOPICS)) if word.lower() in things or word.lower().rstrip("s") in things else word

    return re.sub(r"\w+", replaced, question)


def _letters_in_disorder(question: str, dice: np.random.Generator) -> str:
    return " ".join("".join(dice.permutation(list(word))) for word in question.split())


def _letters_replaced(question: str, dice: np.random.Generator) -> str:
    return "".join(
        str(dice.choice(_ALPHABET)) if letter.isalpha() and dice.random() < 0.6 else letter for letter in question
    )


_GARBLED = (_letters_in_disorder, _letters_replaced)
_FIRST_GARBLED, _OTHER_THINGS = 2, 4
