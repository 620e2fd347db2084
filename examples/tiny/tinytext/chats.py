"""Whole chats: a name to remember, a story on request, a story told and asked about."""

from __future__ import annotations

import random

from . import words
from .answers import Turn, farewell, greeting, phrase, small
from .stories import FAMILIES, tell
from .teller import Story


def names(rng: random.Random) -> list[Turn]:
    """The user gives a name (and a fact) and asks for it later."""
    s = Story(rng)
    s.put(h=s.child(), color=rng.choice(words.COLORS), food=rng.choice(words.FOODS))
    s.put(n=words.NUMBERS[rng.randint(4, 19)], pet=s.animal())
    intro, extra, ask, answer = rng.choice(
        (
            ("", "", "What is my name?", "Your name is {h}."),
            (
                " I am {n} years old.",
                " {n} is a good age.",
                "How old am I?",
                "You are {n} years old.",
            ),
            (
                " My favorite color is {color}.",
                " I like {color} too.",
                "What is my favorite color?",
                "Your favorite color is {color}.",
            ),
            (
                " I like {food}.",
                " That sounds good.",
                "What do I like to eat?",
                "You like {food}.",
            ),
            (
                " I have a {pet.kind} named {pet}.",
                " {pet} is a nice name for a {pet.kind}.",
                "What is the name of my {pet.kind}?",
                "Your {pet.kind} is named {pet}.",
            ),
        )
    )
    turns = [
        (
            s.expand("[My name is|I am|Hello, I am|Hi, my name is] {h}." + intro),
            s.expand("[Hello|Hi|Nice to meet you], {h}!") + _after(s, extra),
        )
    ]
    turns += [small(rng) for _ in range(rng.randint(0, 2))]
    turns.append((s.expand(ask), s.expand(answer)))
    if extra and rng.random() < 0.4:
        turns.append(("What is my name?", s.expand("Your name is {h}.")))
    return turns


def _after(s: Story, template: str) -> str:
    return " " + s.expand(template.strip()) if template else ""


def story_request(rng: random.Random) -> list[Turn]:
    """A story about whom or what the user wants, then sometimes questions about it."""
    s = Story(rng)
    family = rng.choice(list(FAMILIES))
    if family == "fable":
        hero = s.animal()
    else:
        hero = s.child() if rng.random() < 0.5 else s.animal()
    context: dict[str, object] = {"h": hero}
    s.put(h=hero, o=s.thing(), day=rng.choice(words.DAYS))
    about = "a {h.kind} named {h}"
    roll = rng.random()
    if roll < 0.15:
        about, context = "a {h.kind}", {"h": hero}
    elif roll < 0.3 and hero.kind in ("boy", "girl"):
        about = "{h}"
        context = {"h": hero}
    elif roll < 0.5:
        about, family = "a {h.kind} named {h} who lost a {o.full}", "lost_thing"
        context["o"] = s.context["o"]
    elif roll < 0.6:
        about, family = "a {h.kind} named {h} who got a {o.full}", "gift"
        context["o"] = s.context["o"]
    elif roll < 0.65:
        about, family = "a {h.kind} named {h} who heard a noise", "noise"
    elif roll < 0.7:
        about, family = "a {h.kind} named {h} and a race", "race"
    ask = s.expand(
        f"[Tell me|Please tell me|Can you tell me|Write] a [short story|story] about {about}."
    )
    if ask.startswith("Can"):
        ask = ask[:-1] + "?"
    if rng.random() < 0.08:
        ask, context = phrase(rng, "[Tell me a story|Please tell me a story]."), {}
        family = rng.choice(list(FAMILIES))
    episodes = rng.choice((1, 1, 1, 1, 2))
    story = tell(rng, family, episodes=episodes, **context)
    # with two episodes a question may have two answers
    count = rng.choice((0, 0, 1, 2)) if episodes == 1 else 0
    return [(ask, story.text()), *rng.sample(story.facts, min(len(story.facts), count))]


def told_story(rng: random.Random) -> list[Turn]:
    """The user tells a story and asks about it."""
    story = tell(rng)
    questions = rng.sample(story.facts, min(len(story.facts), rng.randint(1, 4)))
    first, *rest = questions
    text = story.text().replace("\n\n", " ")
    if rng.random() < 0.5:
        ask = f"{text} {first[0]}"
    else:
        ask = phrase(rng, "[Here is a story|Read this story|Listen]: ") + f"{text}\n\n{first[0]}"
    return [(ask, first[1]), *rest]


def _casual(rng: random.Random, turn: Turn) -> Turn:
    """Now and then the user writes without capitals or without the last mark."""
    ask, answer = turn
    roll = rng.random()
    if roll < 0.1:
        ask = ask[0].lower() + ask[1:]
    elif roll < 0.15:
        ask = ask.rstrip(".?!") or ask
    elif roll < 0.2:
        ask = (ask[0].lower() + ask[1:]).rstrip(".?!") or ask
    return ask, answer


def chat(rng: random.Random) -> list[Turn]:
    """One whole chat of one or more turns."""
    return [_casual(rng, turn) for turn in _chat(rng)]


def _chat(rng: random.Random) -> list[Turn]:
    turns: list[Turn] = []
    if rng.random() < 0.3:
        turns.append(greeting(rng))
    roll = rng.random()
    if roll < 0.3:
        turns += [small(rng) for _ in range(rng.randint(1, 5))]
    elif roll < 0.55:
        turns += story_request(rng)
    elif roll < 0.85:
        turns += told_story(rng)
    else:
        turns += names(rng)
    if rng.random() < 0.3:
        turns.append(farewell(rng))
    return turns
