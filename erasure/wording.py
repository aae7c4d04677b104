"""Names in sentences: spelled alike, with the article that English gives them, and found where they stand."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping

from erasure.io import shown

JOINERS = frozenset("\u200c\u200d")  # of Persian, of Hindi, of emoji
UNSEEN = ("Cc", "Cf", "Cs")  # controls, formats and directions, half characters


def nfc(text: str) -> str:
    """The text in Unicode's composed form, without characters that cannot be seen.

    "Beyoncé" is one name, whether its last letter is one character or two, and "super\u200bhero", as a page may have
    it, is the word that everybody types: to a text encoder it would be another one. Joiners join nothing at an end.
    """
    if not text.isprintable():
        text = "".join(c for c in text if c in JOINERS or c.isspace() or unicodedata.category(c) not in UNSEEN)
    return unicodedata.normalize("NFC", text).strip("".join(JOINERS))


def folded(name: str) -> str:
    """What two spellings of one name have in common: case, spaces and the form of accents do not count."""
    return nfc(" ".join(nfc(name).casefold().split()))


def same(a: str, b: str) -> bool:
    """Whether two names are one name; see :func:`folded`."""
    return folded(a) == folded(b)


# Names written small, the plural of Emoji World's captions, and nouns that are not counted.
BARE = frozenset(
    {"grapes", "santa", "father christmas", "dracula", "frosty"}
    | {"nudity", "nakedness", "pornography", "violence", "gore", "blood", "hate", "self-harm"}
)
DETERMINERS = frozenset(
    "a an the some any my your his her its our their this that these those each every another both several many few "
    "two three four five six seven eight nine ten eleven twelve someone somebody something anyone anybody anything "
    "everyone everybody everything nobody nothing".split()
)
DEMONYMS = frozenset(  # capitalised, and no names
    "european american african asian australian british english french german italian spanish russian chinese japanese "
    "korean indian persian arabian egyptian greek roman dutch swedish swiss mexican brazilian canadian irish scottish "
    "victorian siamese siberian bengal".split()
)
# The sound decides, not the letter: an hour, a unicorn, an umbrella, an x-ray, an 8-bit hero, an 18th-century house.
VOWEL = re.compile(
    r"(?!eu|ewe|uni(?![nmd])|u[bcfhjkqrst][aeiou]|ukr|u-|ones?\b|once\b|onesie|ouija)[aeiou]|hour|honest|honou?r|heir"
    r"|[fhlmnrsx](-|$)|8|(11|18)(\D|$)"
)
FUNCTION_WORDS = frozenset("of with in on at and or from for to by under over near that who which made".split())
PLURALS = frozenset("people men women children police feet teeth geese mice cattle".split())
SINGULARS = frozenset(  # for all their s
    "lens news species series canvas ananas atlas gas bias christmas alias cosmos chaos rhinoceros thermos corps "
    "gallows crossroads headquarters".split()
)


def with_article(noun: str) -> str:
    """``cat`` -> ``a cat``, ``hour`` -> ``an hour``. Names, plurals and what has an article already take none.

    Capitalised words are names (``Spiderman``), but for peoples before a noun (``a European castle``). Only words in
    Latin letters get an article.
    """
    words = noun.casefold().split()
    if not words or words[0] in DETERMINERS or words[0].isdigit() or noun.casefold() in BARE:
        return noun
    if noun[0].isupper() and not (words[0] in DEMONYMS and noun.split()[-1][0].islower()):
        return noun
    first = unicodedata.normalize("NFD", words[0])  # "éclair" begins like "eclair"
    if first[0].isalpha() and not "a" <= first[0] <= "z" or _is_plural(words):
        return noun
    return f"{'an' if VOWEL.match(first) else 'a'} {noun}"


def _is_plural(words: list[str]) -> bool:
    """Whether the noun that the others are about is one: "grapes in a bowl", but not "man in jeans"."""
    ends = (i for i, word in enumerate(words) if i and (word in FUNCTION_WORDS or word.endswith("ing")))
    head = words[next(ends, len(words)) - 1].strip(",.;:!?")
    regular = head.endswith("s") and len(head) > 3 and not head.endswith(("ss", "us", "is", "'s", "’s"))
    return head in PLURALS or regular and head not in SINGULARS


def is_name(phrase: str, prompt: str) -> bool:
    """Whether a prompt is a phrase and nothing else, with an article or without."""
    return same(phrase, prompt) or same(with_article(phrase), prompt)


def counted(number: int, noun: str) -> str:
    """``1 request``, ``2 requests``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def listed(values: str | Iterable[str]) -> list[str]:
    """Several strings as a list; one by itself is one, and not its letters.

    Raises:
        ValueError: one string with commas, which may be several; or no strings.
    """
    if not isinstance(values, str) and (isinstance(values, Mapping | bytes) or not isinstance(values, Iterable)):
        raise ValueError(f"one string or a list of strings is needed; got {shown(values)}")
    if isinstance(values, str) and "," in values:
        several = [part.strip() for part in values.split(",")]
        raise ValueError(f"one string with commas: give several as a list, {several}, or one as a list of one")
    found = [values] if isinstance(values, str) else list(values)
    if wrong := [value for value in found if not isinstance(value, str)]:
        raise ValueError(f"one string or a list of strings is needed; got {shown(wrong[0])} in it")
    return found


def naming(texts: Iterable[str], phrases: Iterable[str]) -> list[str]:
    """The texts that hold one of some phrases as whole words: "A cat, asleep" names a cat, "catfish" does not."""
    words = "|".join(re.escape(nfc(phrase)) for phrase in phrases)
    named = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)
    return [text for text in texts if named.search(nfc(text))]
