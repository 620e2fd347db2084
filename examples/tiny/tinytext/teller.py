"""The story state and the template language of the grammar.

A template is a plain string. `[a|b|c]` picks one alternative (nesting allowed) and `{h.his}` prints
an attribute of something in the story. Only the chosen sentence is expanded, so a template may
name anything that is in the story at that moment. The article "a" becomes "an" where it must, and
sentences start with a capital.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

from . import words
from .words import Place

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SENTENCE = re.compile(r'(?:^|(?<=[.!?] ))("?)([a-z])')
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU](?!ne\b))")


@dataclass(slots=True)
class Person:
    """Somebody in a story; `{h}` prints the name, `{h.his}` and so on the pronouns."""

    name: str
    kind: str
    female: bool

    def __str__(self) -> str:
        return self.name

    @property
    def he(self) -> str:
        return "she" if self.female else "he"

    @property
    def him(self) -> str:
        return "her" if self.female else "him"

    @property
    def his(self) -> str:
        return "her" if self.female else "his"

    @property
    def He(self) -> str:
        return self.he.capitalize()

    @property
    def His(self) -> str:
        return self.his.capitalize()


@dataclass(slots=True)
class Thing:
    """A thing with one color for the whole story; `{o}` is bare, `{o.full}` has the color."""

    name: str
    color: str

    def __str__(self) -> str:
        return self.name

    @property
    def full(self) -> str:
        return f"{self.color} {self.name}"


class Story:
    """Sentences said so far, who and what is in them, and questions one can ask about them."""

    def __init__(self, rng: random.Random, **context: Any) -> None:
        self.rng = rng
        self.context: dict[str, Any] = context
        self.used: set[str] = {str(p) for p in context.values() if isinstance(p, Person)}
        self.paragraphs: list[list[str]] = [[]]
        self.facts: list[tuple[str, str]] = []
        self.episodes = 0
        self.last_episode = True

    def put(self, **context: Any) -> None:
        self.context.update(context)

    def expand(self, template: str) -> str:
        def pick(match: re.Match[str]) -> str:
            return self.rng.choice(match.group(1).split("|"))

        while "[" in template:
            template = _CHOICE.sub(pick, template)
        text = _ARTICLE.sub(r"\1n ", template.format_map(self.context))
        return _SENTENCE.sub(lambda m: m.group(1) + m.group(2).upper(), text)

    def say(self, *templates: str, p: float = 1.0) -> None:
        """Adds one of the sentences; with probability 1 - p adds nothing."""
        if p >= 1.0 or self.rng.random() < p:
            self.paragraphs[-1].append(self.expand(self.rng.choice(templates)))

    def paragraph(self, p: float = 0.6) -> None:
        if self.paragraphs[-1] and self.rng.random() < p:
            self.paragraphs.append([])

    def fact(self, question: str, answer: str) -> None:
        """Notes a question that the text so far answers."""
        self.facts.append((self.expand(question), self.expand(answer)))

    def text(self) -> str:
        return "\n\n".join(" ".join(p) for p in self.paragraphs if p)

    # who and what

    def child(self) -> Person:
        female = self.rng.random() < 0.5
        names = words.GIRLS if female else words.BOYS
        name = self.rng.choice([n for n in names if n not in self.used])
        self.used.add(name)
        return Person(name, "girl" if female else "boy", female)

    def animal(self, but: str = "") -> Person:
        person = self.child()
        person.kind = self.rng.choice([a for a in words.ANIMALS if a != but])
        return person

    def hero(self) -> Person:
        """The hero the story was asked for, else a new one: a child or a named animal."""
        if "h" not in self.context:
            self.put(h=self.child() if self.rng.random() < 0.6 else self.animal())
        return self.context["h"]

    def friend(self) -> Person:
        hero = self.hero()
        is_child = hero.kind in ("girl", "boy")
        return self.child() if is_child else self.animal(but=hero.kind)

    def elder(self) -> tuple[Person, str]:
        """A grown-up of the hero's family and how the hero calls them."""
        word, call, female = self.rng.choice(
            (
                ("mother", "Mom", True),
                ("father", "Dad", False),
                ("grandmother", "Grandma", True),
                ("grandfather", "Grandpa", False),
                ("big sister", "Sister", True),
                ("big brother", "Brother", False),
                ("aunt", "Aunt", True),
                ("uncle", "Uncle", False),
            )
        )
        return Person(f"{self.hero().his} {word}", word, female), call

    def thing(self) -> Thing:
        if "o" in self.context:
            return self.context["o"]
        return Thing(self.rng.choice(list(words.THINGS)), self.rng.choice(words.COLORS))

    def place(self) -> Place:
        return self.rng.choice(words.PLACES)

    def count(self, name: str, number: int) -> str:
        """'one apple', 'three apples'."""
        word = name if number == 1 else {**words.THINGS, **words.COUNTABLES}[name]
        return f"{words.NUMBERS[number]} {word}"

    # sentences that every story can use

    def open(self) -> None:
        """Introduces the hero, or in a later episode goes on with the one we know."""
        trait, other = self.rng.sample(words.TRAITS, 2)
        hobby = self.rng.choice(words.HOBBIES)
        self.hero()
        self.put(trait=trait, trait2=other, hobby=hobby, home=self.rng.choice(words.PLACES[:6]))
        self.episodes += 1
        if self.episodes > 1:
            self.paragraphs.append([])
            self.say(
                "[Some days|A week|Not long] after that, {h} had another adventure.",
                "But that was not all.",
                "[Soon|Then] something else happened.",
                "And here is one more story about {h}.",
            )
            return
        self.say(
            "Once upon a time, there was a [{trait}|little|young|small] {h.kind} named {h}.",
            "Once upon a time, a {trait} {h.kind} named {h} lived near {home}.",
            "There was once a {trait} {h.kind} [called|named] {h}.",
            "{h} was a {trait} [little|young] {h.kind}.",
            "In a small [house|town|village] near {home} lived a {h.kind} named {h}.",
            "This is the story of {h}, a {trait} little {h.kind}.",
        )
        self.say(
            "{h.He} loved {hobby}.",
            "{h.He} was [very|always] {trait2}.",
            "Everyone said that {h} was {trait2}.",
            "[More than anything|Most of all], {h} loved {hobby}.",
            "{h} was {trait2}, and {h.he} [loved|liked] {hobby}.",
            p=0.6,
        )

    def when(self) -> str:
        """A time phrase to start a sentence with."""
        return self.expand(
            self.rng.choice(
                (
                    "One [day|morning|afternoon|evening]",
                    "One [sunny|rainy|windy|cold|warm|bright|cloudy] [day|morning|afternoon]",
                    "On " + self.rng.choice(words.DAYS),
                    "On " + self.rng.choice(words.DAYS) + " [morning|afternoon|evening]",
                    "Early in the [morning|spring|summer|fall]",
                    "Last " + self.rng.choice([*words.SEASONS, *words.DAYS]),
                )
            )
        )

    def close(self) -> None:
        if not self.last_episode:
            return
        self.say(
            "That night, {h} [slept well|had a sweet dream|fell asleep with a smile].",
            "{h} went home [happy|tired but happy|with a big smile].",
            "It was [a good day|the best day of the year|a day to remember].",
            "{h} never forgot that day.",
            "And from that day on, {h} was [happy|a little braver|a little wiser|never alone].",
            "In the evening, {h} told [the whole story|everything] at dinner.",
            '"What a day!" [said|thought|laughed] {h}.',
            "The end.",
            p=0.85,
        )
