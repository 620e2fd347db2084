"""Exchanges that need no memory: greetings, small facts, small sums, lists, advice."""

from __future__ import annotations

import random

from . import words
from .teller import Story

Turn = tuple[str, str]  # (user, assistant)


def phrase(rng: random.Random, template: str) -> str:
    """A template without anybody in it."""
    return Story(rng).expand(template)


def greeting(rng: random.Random) -> Turn:
    part = rng.choice(["morning", "afternoon", "evening"])
    return rng.choice(
        (
            (
                phrase(rng, "[Hello|Hi|Hey|Hello there|Hi there][!|.|]"),
                phrase(
                    rng, "[Hello|Hi]! [How can I help you?|It is nice to meet you.|How are you?]"
                ),
            ),
            (
                phrase(rng, f"Good {part}[!|.|]"),
                phrase(rng, f"Good {part}! [How can I help you?|How are you today?]"),
            ),
            (
                phrase(rng, "[How are you|How are you today|How do you do|How do you feel]?"),
                phrase(rng, "I am [fine|very well|happy], thank you. [How are you?|And you?]"),
            ),
            (
                phrase(rng, "[Who are you|What are you|What is your name]?"),
                "I am a very small language model. I can tell stories and answer easy questions.",
            ),
            (
                phrase(rng, "[What can you do|Can you help me|How can you help me]?"),
                "I can tell you a story, count, add small numbers and answer easy questions.",
            ),
        )
    )


def farewell(rng: random.Random) -> Turn:
    return rng.choice(
        (
            (
                phrase(rng, "[Thank you|Thanks|Thank you very much][!|.|]"),
                phrase(rng, "You are welcome! [Have a nice day.|I am happy to help.|]").strip(),
            ),
            (
                phrase(rng, "[Goodbye|Bye|See you later|Bye bye][!|.|]"),
                phrase(rng, "Goodbye! [Have a nice day.|See you soon.|Take care.]"),
            ),
            (phrase(rng, "Good night[!|.|]"), "Good night! Sleep well."),
        )
    )


def feeling(rng: random.Random) -> Turn:
    mood = rng.choice(list(words.FEELINGS))
    bad = mood in ("sad", "angry", "scared", "worried", "lonely", "tired", "bored", "hungry")
    advice = {
        "sad": "Talk to a friend, or listen to a happy song.",
        "angry": "Take a deep breath and count to ten.",
        "scared": "Turn on the light and hold somebody's hand.",
        "worried": "Tell somebody what is wrong. It often helps.",
        "lonely": "Call a friend, or go out and say hello to somebody.",
        "tired": "Go to bed early and sleep well.",
        "bored": "Read a book, or ask me for a story.",
        "hungry": f"Eat some {rng.choice(words.FOODS)}.",
    }
    ask = phrase(rng, f"[I am {mood}|I feel {mood}|I am so {mood} today|Today I feel {mood}].")
    if bad:
        return ask, phrase(rng, "[I am sorry to hear that.|Oh, I am sorry.] ") + advice[mood]
    return ask, phrase(rng, f"[That is nice|How nice|I am glad]! Why are you {mood}?")


def sums(rng: random.Random) -> Turn:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    plus = rng.random() < 0.6
    if not plus and a < b:
        a, b = b, a
    result = a + b if plus else a - b
    if rng.random() < 0.5:
        x, y, z = words.NUMBERS[a], words.NUMBERS[b], words.NUMBERS[result]
        op = "plus" if plus else "minus"
        return f"What is {x} {op} {y}?", f"{x} {op} {y} is {z}.".capitalize()
    op = "+" if plus else "-"
    ask = rng.choice((f"What is {a} {op} {b}?", f"{a} {op} {b} = ?", f"How much is {a} {op} {b}?"))
    return ask, f"{a} {op} {b} = {result}."


def sequence(rng: random.Random) -> Turn:
    what, items, cyclic = rng.choice(
        (
            ("day", words.DAYS, True),
            ("month", words.MONTHS, True),
            ("season", words.SEASONS, True),
            ("number", words.NUMBERS, False),
        )
    )
    i = rng.randint(1, len(items) - 2)
    if cyclic:
        i = rng.randrange(len(items))
    after = rng.random() < 0.6
    other = items[(i + (1 if after else -1)) % len(items)]
    word = "after" if after else "before"
    return (
        phrase(rng, f"[What {what} comes|Which {what} is] {word} {items[i]}?"),
        f"{other.capitalize()} comes {word} {items[i]}.",
    )


def counting(rng: random.Random) -> Turn:
    a = rng.randint(1, 12)
    b = a + rng.randint(2, 8)
    if rng.random() < 0.3:
        a, b = b, a
    step = 1 if b > a else -1
    row = [words.NUMBERS[i] for i in range(a, b + step, step)]
    ask = f"Count from {row[0]} to {row[-1]}."
    return ask, (", ".join(row) + ".").capitalize()


def knowledge(rng: random.Random) -> Turn:
    def pick(d: dict) -> tuple:
        return rng.choice(list(d.items()))

    pluralof = {**words.THINGS, **words.COUNTABLES, **words.IRREGULAR_PLURALS}
    kind = rng.randrange(9)
    if kind == 0:
        a, b = pick(words.OPPOSITES)
        a, b = (a, b) if rng.random() < 0.5 else (b, a)
        return f"What is the opposite of {a}?", f"The opposite of {a} is {b}."
    if kind == 1:
        a, b = pick(words.ANIMAL_SOUNDS)
        return (
            phrase(rng, f"What [does a {a} say|sound does a {a} make]?"),
            phrase(rng, f"A {a} says {b}."),
        )
    if kind == 2:
        a, b = pick(words.ANIMAL_BABIES)
        return f"What is a baby {a} called?", f"A baby {a} is called a {b}."
    if kind == 3:
        a, b = pick(words.ANIMAL_HOMES)
        return phrase(rng, f"Where does a {a} live?"), phrase(rng, f"A {a} lives {b}.")
    if kind == 4:
        a, b = pick(words.COLOR_OF)
        return f"What color is {a}?", f"{a[0].upper()}{a[1:]} is {b}."
    if kind == 5:
        a, b = pick(pluralof)
        return f"What is the plural of {a}?", f"The plural of {a} is {b}."
    if kind == 6:
        a, b = pick(words.JOBS)
        return phrase(rng, f"What does a {a} do?"), phrase(rng, f"A {a} {b}.")
    if kind == 7:
        a, b = pick(words.USES)
        verb = "What is soap for?" if a == "soap" else f"What can you do with {a}?"
        return verb, f"You can use {a} to {b}."
    a, (_, take, good, _) = pick(words.WEATHER)
    return rng.choice(
        (
            (f"What should I take when it is {a}?", f"When it is {a}, you should take {take}."),
            (f"What can I do when it is {a}?", f"When it is {a}, you can {good}."),
        )
    )


def listing(rng: random.Random) -> Turn:
    what, items = rng.choice(list(words.KINDS.items()))
    n = rng.randint(2, min(5, len(items)))
    row = rng.sample(items, n)
    number = words.NUMBERS[n]
    ask = phrase(
        rng, f"[Name {number} {what}|Tell me {number} {what}|Can you name {number} {what}?]"
    )
    ask = ask if ask.endswith("?") else ask + "."
    return ask, (", ".join(row[:-1]) + f" and {row[-1]}.").capitalize()


def choosing(rng: random.Random) -> Turn:
    """Something to eat, to play, to do."""
    food, drink = rng.choice(words.FOODS), rng.choice(words.DRINKS)
    game, (a, b) = rng.choice(words.GAMES), rng.sample(words.HOBBIES, 2)
    return rng.choice(
        (
            (
                phrase(rng, "What should I [eat|have for lunch|cook|have for dinner]?"),
                phrase(rng, f"[You can have|Try|I like] {food}[ and {drink}|]."),
            ),
            (
                phrase(rng, "What [can we play|should we play|game do you know]?"),
                f"You can play {game}.",
            ),
            (f"Do you like {a} or {b}?", phrase(rng, f"I like {rng.choice((a, b))} more.")),
        )
    )


def small(rng: random.Random) -> Turn:
    """One exchange that needs no memory."""
    kinds = (knowledge, knowledge, knowledge, sums, sums, sequence, counting, listing, feeling)
    return rng.choice((*kinds, choosing))(rng)
