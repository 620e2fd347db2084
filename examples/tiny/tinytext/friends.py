"""Stories about friends: a new one, a hurt animal, a fable."""

from __future__ import annotations

from . import words
from .teller import Story


def new_friend(s: Story) -> None:
    s.open()
    s.put(f=s.friend(), p=s.place(), game=s.rng.choice(words.GAMES), when=s.when())
    s.put(hobby2=s.rng.choice(words.HOBBIES), trait3=s.rng.choice(words.TRAITS))
    s.say(
        "But {h} was lonely, because {h.he} was new in town.",
        "{h} had no one to play with.",
        "{h} [often|sometimes] felt lonely and wished for a friend.",
    )
    s.fact("Why was {h} sad?", "{h} was sad because {h.he} had no friends.")
    s.paragraph()
    s.say(
        "{when}, {h} saw a [new|small|{trait3}] {f.kind} {p.at}.",
        "{when}, a {f.kind} sat {p.at}, all alone.",
    )
    s.fact("Where did they meet?", "They met {p.at}.")
    s.say(
        '"Hello, my name is {h}," said {h}. "What is your name?" "I am {f}," said the {f.kind}.',
        '"Hi, I am {f}," said the {f.kind}. "Who are you?" "I am {h}."',
    )
    s.fact("What was the name of the {f.kind}?", "The name of the {f.kind} was {f}.")
    s.say(
        '"Do you like {hobby2}?" asked {f}. "[Yes, very much|I love it|A little]," said {h}.',
        '"Do you want to play with me?" asked {h}. "[Yes|I would like that|Sure]!" said {f}.',
        "At first {f} was shy, but {h} was very {trait}.",
    )
    s.say(
        "They played {game} until the sun went down.",
        "All afternoon they played {game} and talked about {hobby2}.",
    )
    s.fact("What did they play?", "They played {game}.")
    s.paragraph(0.3)
    s.say(
        '"Will you come back tomorrow?" asked {f}. "[Of course|Yes, I will|Every day]," said {h}.',
        "{h} was not lonely anymore.",
        "From then on, {h} and {f} were [best friends|always together].",
    )
    s.close()


def hurt_animal(s: Story) -> None:
    s.open()
    elder, call = s.elder()
    kind = s.rng.choice(["bird", "kitten", "puppy", "rabbit", "squirrel", "hedgehog", "duckling"])
    s.put(k=kind, e=elder, call=call, p=s.place(), when=s.when(), n=s.rng.choice(["leg", "foot"]))
    s.put(days=words.NUMBERS[s.rng.randint(2, 9)], color=s.rng.choice(words.COLORS[4:8]))
    s.put(food=s.rng.choice(["seeds", "milk", "bread", "some water", "a piece of apple"]))
    s.say(
        "{when}, {h} [heard a small sound|heard a cry|saw something move] {p.at}.",
        "{when}, {h} walked {p.at}. Something was there on the ground.",
    )
    s.say(
        "It was a little {color} {k} with a hurt {n}.",
        "A small {color} {k} was there. It could not walk, because its {n} was hurt.",
    )
    s.fact("What did {h} find?", "{h} found a little {color} {k}.")
    s.fact("Where did {h} find the {k}?", "{h} found it {p.at}.")
    s.say(
        '"[Poor little thing|Do not be afraid]," said {h}. "[I will help you|I am your friend]."',
        "{h} took the {k} home very carefully.",
    )
    s.paragraph()
    s.say(
        '"{call}, look!" said {h}. {e} put a bandage on the {n}.',
        "At home, {e} knew what to do. They put the {k} in a warm box.",
    )
    s.say(
        "{h} gave it {food} every [day|morning|evening].",
        "The {k} was hungry, so {h} gave it {food}.",
    )
    s.fact("What did {h} give the {k}?", "{h} gave it {food}.")
    s.say(
        "After {days} days, the {k} was [strong|well|healthy] again.",
        "Day by day the {k} got better.",
    )
    s.say(
        "{h} let it go. It was hard, but {h} knew that it was right.",
        "The {k} looked at {h} one last time and went back to its family.",
        'The {k} did not want to leave. "You can stay with us," said {h}.',
    )
    s.close()


def fable(s: Story) -> None:
    if "h" not in s.context or s.context["h"].kind in ("boy", "girl"):
        s.context.pop("h", None)
        s.put(h=s.animal())
    s.open()
    s.put(f=s.friend(), food=s.rng.choice(words.FOODS), p=s.place(), when=s.when())
    s.put(moral=s.rng.choice(words.MORALS[:1] + words.MORALS[2:3] + words.MORALS[5:6]))
    s.say(
        "{h} had a lot of {food}, but {h.he} did not want to share it.",
        "{h} found some {food} and hid it {p.at}.",
    )
    s.say(
        "{when}, a [hungry|poor|tired] {f.kind} named {f} came by.",
        "{when}, {f}, the {f.kind}, came to {h} and asked for help.",
    )
    s.fact("Who came to {h}?", "{f}, the {f.kind}, came to {h}.")
    s.say(
        '"Please give me a little {food}," said {f}. "No," said {h}. "It is [all|only] mine."',
        '"May I have some {food}?" asked {f}. "[Go away|No, you may not]," said {h}.',
    )
    s.fact("What did {f} want?", "{f} wanted some {food}.")
    s.say("So {f} went away, sad and hungry.", "{f} looked down and walked away.")
    s.paragraph()
    s.say(
        "[The next day|Soon after], {h} fell into [a deep hole|the cold river] and called for "
        "help.",
        "Then winter came, and {h} was [ill|sick] and could not get up.",
        "That night there was a storm, and {h} had no place to sleep.",
    )
    s.say(
        "Nobody came but {f}. [{f.He} was not angry|{f.He} did not think twice]. {f} helped {h}.",
        "It was {f} who came and helped.",
    )
    s.say(
        '"Why do you help me?" asked {h}. "Because [you need help|we are neighbors|I want to be'
        ' your friend]," said {f}.',
        '"I am sorry," said {h}. "I was not kind to you."',
    )
    s.say("After that, they always shared the {food}.", "From then on, {h} shared everything.")
    s.say("{moral}", p=0.7)
