"""Stories about what a day brings: weather, a noise at night, a race, a whole week."""

# ruff: noqa: SIM905

from __future__ import annotations

from . import words
from .teller import Story


def weather_day(s: Story) -> None:
    s.open()
    kind = s.rng.choice(list(words.WEATHER))
    look, take, good, bad = words.WEATHER[kind]
    s.put(w=kind, look=look, take=take, good=good, bad=bad, e=s.elder()[0], f=s.friend())
    s.put(day=s.rng.choice(words.DAYS), p=s.place(), food=s.rng.choice(words.FOODS))
    s.put(drink=s.rng.choice(words.DRINKS))
    s.say(
        "It was a {w} {day}, and {look}.",
        "On {day}, {h} looked out of the window. It was {w}, and {look}.",
        "{h} woke up on {day}. Outside, {look}.",
    )
    s.fact("What was the weather like?", "It was {w}.")
    s.fact("What day was it?", "It was {day}.")
    s.say(
        '"We cannot {bad} today," said {e}.',
        "{h} wanted to {bad}, but it was too {w}.",
    )
    s.fact("Why could {h} not {bad}?", "Because it was too {w}.")
    s.say("{h} was [sad|a little sad|not happy].", '"[Oh no|What a pity]," said {h}.', p=0.6)
    s.paragraph()
    s.say(
        '"But we can {good}," said {f}.',
        'Then {f} came to the door. "Come, let us {good}!" {f.he} said.',
        '"Why do you not {good}?" asked {e}.',
    )
    s.say(
        "So {h} took {take}, and they had fun together.",
        "{h} thought about it and smiled. {h.He} got {take}, just in case.",
        '"[Good idea|What a good idea]!" said {h}, and {h.he} got {take}.',
    )
    s.fact("What did {h} take?", "{h} took {take}.")
    s.say(
        "They had so much fun that they forgot the time.",
        "Later they ate {food} and drank {drink}.",
        "In the end, the {w} day was [a very good day|the best day of the week].",
    )
    s.close()


def noise(s: Story) -> None:
    s.open()
    who, sound, why = s.rng.choice(
        (
            ("the cat", "scratch, scratch", "it wanted to come in"),
            ("the wind", "whoo, whoo", "the window was open"),
            ("a little mouse", "crunch, crunch", "it was eating a nut"),
            ("a branch of the tree", "tap, tap, tap", "the wind was moving it"),
            ("an owl", "hoot, hoot", "it was calling to its friends"),
            ("the old clock", "tick, tock", "it never sleeps"),
            ("a puppy", "whine, whine", "it was cold and alone"),
        )
    )
    s.put(who=who, sound=sound, why=why, e=s.elder()[0], light=s.rng.choice(["lamp", "candle"]))
    s.say(
        "One night, {h} could not sleep. There was a strange noise in the dark.",
        "It was late at night. {h} was in bed and heard a noise.",
        "In the middle of the night, a noise woke {h} up.",
    )
    s.say('"{sound}," [it went|went the noise].', '"{sound}." There it was again!')
    s.fact("What did {h} hear?", "{h} heard a strange noise.")
    s.say(
        "{h} hid under the blanket. [{h.His} heart beat fast|{h.He} was very scared].",
        '"Who is there?" [whispered|asked] {h}. [There was no answer|Nobody answered].',
    )
    s.paragraph()
    s.say(
        "Then {h} took a {light} and walked slowly to the [door|window].",
        "{h} called {e}, and together they went to look.",
    )
    s.say(
        "{h} looked outside and [laughed|had to smile]. It was only {who}, because {why}.",
        "And what was it? It was only {who}! There was a noise because {why}.",
    )
    s.fact("What made the noise?", "It was only {who}.")
    s.fact("Why was there a noise?", "Because {why}.")
    s.say(
        "After that, {h} was not afraid of the dark.",
        '"[I was afraid of nothing|There is no need to be afraid]," said {h}.',
        "{h} went back to bed and fell asleep at once.",
    )
    s.close()


def race(s: Story) -> None:
    s.open()
    a, b = s.friend(), s.friend()
    hero = s.hero()
    order = [hero, a, b]
    s.rng.shuffle(order)
    s.put(a=a, b=b, w=order[0], x=order[1], y=order[2], p=s.place(), when=s.when())
    s.put(kind=s.rng.choice(["race", "swimming race", "boat race"]))
    s.put(prize=s.rng.choice(words.FOODS))
    s.say(
        "{when}, there was a [big|small|great] {kind} {p.at}.",
        '{when}, {a} said, "Let us have a {kind}!"',
    )
    s.say("{h}, {a} and {b} wanted to win.", "{a} and {b} came too.")
    s.say(
        '"I am the fastest," said {a}. "[We will see|Are you sure]," said {b}.',
        "{h} was [nervous|excited] and looked at the others.",
        p=0.7,
    )
    s.say('"One, two, three, go!"', "Ready, set, go!", "The bell rang, and off they went!")
    s.paragraph()
    s.say(
        "{y} was too sure and stopped to [rest|eat|look at the flowers].",
        "{y} started fast but was soon tired.",
        p=0.7,
    )
    s.say(
        "{x} was close behind {w} all the way.",
        "{w} and {x} were side by side until the very end.",
        p=0.6,
    )
    s.say(
        "In the end, {w} was first, {x} was second, and {y} was third.",
        "{w} came in first. {x} came in second, and {y} was third.",
        "The winner was {w}! {x} was second, and {y} was last.",
    )
    s.fact("Who won the race?", "{w} won the race.")
    s.fact("Who was second?", "{x} was second.")
    s.fact("Who was last?", "{y} was last.")
    s.say(
        "{w} shared the prize with the others. They all got {prize}.",
        '"[Good race|Well done], {w}," said {y}, and they all laughed.',
        "Slow and steady work wins in the end.",
    )
    s.close()


def week(s: Story) -> None:
    s.open()
    start, length = s.rng.randint(0, 6), s.rng.randint(4, 7)
    acts = s.rng.sample(
        (
            "went to the market|played {g}|baked bread|read a book|visited {f}|painted a picture"
            "|helped {e}|went to the beach|cleaned the house|flew a kite|planted flowers"
            "|climbed a tree|went fishing|sang with {f}|wrote a letter|rode a bike"
            "|made soup|slept all day|walked in the forest|swam in the lake"
        ).split("|"),
        length,
    )
    s.put(f=s.friend(), e=s.elder()[0], g=s.rng.choice(words.GAMES))
    s.say(
        "{h} had a [busy|good|long|wonderful] week.",
        "Every day of the week, {h} did something [new|different].",
        "Let me tell you about the week that {h} had.",
    )
    s.paragraph(0.3)
    for i, act in enumerate(acts):
        day = words.DAYS[(start + i) % 7]
        s.say(f"On {day}, {{h}} {act}.", f"On {day}, {{h.he}} {act}.")
        s.fact(f"What did {{h}} do on {day}?", f"On {day}, {{h}} {act}.")
    s.say(
        '"What a week!" said {h}.',
        "Then {h} was tired and [slept for a long time|had a good rest].",
        "And then a new week began.",
    )
