"""Stories in which something is made or learned: food, plants, buildings, skills, a picnic."""

from __future__ import annotations

from . import words
from .teller import Story


def cooking(s: Story) -> None:
    s.open()
    elder, call = s.elder()
    dish = s.rng.choice(list(words.DISHES))
    a, b, c, d = words.DISHES[dish]
    s.put(e=elder, call=call, dish=dish, a=a, b=b, c=c, d=d, when=s.when())
    s.put(n=words.NUMBERS[s.rng.randint(2, 12)], f=s.friend())
    s.say(
        "{when}, {h} and {e} wanted to make {dish}.",
        '{when}, {h} was hungry. "Let us make {dish}," said {e}.',
        '{when}, {h} asked, "{call}, can we make {dish}?" "Yes," said {e}.',
    )
    s.fact("What did they make?", "They made {dish}.")
    s.fact("Who cooked with {h}?", "{e} cooked with {h}.")
    s.say("{h} washed {h.his} [hands|hands and face].", p=0.4)
    s.say(
        "First they took {a}. Then they added {b} and {c}. Last of all came the {d}.",
        "They needed {a}, {b}, {c} and {d}. {h} mixed the {a} with the {b}. "
        "{e} added the {c} and the {d}.",
        "{h} put the {a} in a big bowl and added the {b}. Next came the {c}, and then the {d}.",
    )
    s.paragraph()
    s.say(
        "But oh no, {h} dropped the spoon, and there was {a} all over the floor! {e} laughed, and "
        "they cleaned it up together.",
        '{h} tasted a little and said, "It needs more {d}." So they added some more.',
        "{h} mixed and mixed until {h.his} arms were tired.",
        p=0.5,
    )
    s.say("They waited for {n} minutes.", "It took {n} minutes. {h} could not wait.", p=0.5)
    s.say(
        "Soon the whole house smelled [good|wonderful|sweet|warm].",
        "When it was ready, it smelled [wonderful|so good].",
    )
    s.say(
        "They ate it together, and it was [delicious|very good|warm and tasty].",
        "{f} came to visit, and everyone got a big plate.",
        '"This is the best food in the world," said {h}.',
    )
    s.close()


def growing(s: Story) -> None:
    s.open()
    plant = s.rng.choice(list(words.PLANTS))
    s.put(plant=plant, color=words.PLANTS[plant], e=s.elder()[0], p=words.PLACES[0])
    s.put(n=words.NUMBERS[s.rng.randint(2, 9)], day=s.rng.choice(words.DAYS), f=s.friend())
    s.say(
        "In the spring, {e} gave {h} a [tiny|small|little] seed.",
        "{h} found a small seed in the spring.",
        "In spring, {h} bought a seed at the market with {e}.",
    )
    s.say(
        '"What will it be?" asked {h}. "[Wait and see|Plant it, and you will see]," said {e}.',
        '"It will be a {plant}," said {e}.',
    )
    s.say(
        "{h} made a hole in the ground, put the seed in, and gave it some water.",
        "{h} planted the seed in the garden, where there was a lot of sun.",
    )
    s.fact("What did {h} plant?", "{h} planted a seed.")
    s.paragraph()
    s.say(
        "Every day {h.he} gave it water. But nothing happened.",
        "Each morning {h} looked at the ground. There was nothing to see.",
        "{h} waited one week, and then two weeks.",
    )
    s.say(
        '"[Maybe it is dead|It does not grow]," said {h}. "[Be patient|Give it time]," said {e}.',
        "{h} was sad, but {h.he} did not give up.",
        p=0.7,
    )
    s.say(
        "After {n} weeks, a small green leaf came out of the ground.",
        "Then, on {day}, there was a tiny green leaf!",
    )
    s.say(
        "In the summer, the {plant} was as tall as {h}, and it was {color}.",
        "By summer, {h} had a beautiful {plant}.",
        "All summer long it grew and grew. It was a [big|beautiful|tall] {plant}.",
    )
    s.fact("What did the seed become?", "The seed became a {plant}.")
    s.say(
        '"Look, {f}!" said {h}. "I grew it myself!"',
        "{h} showed it to {f}, and both were [proud|happy].",
        "{h} was very proud.",
    )
    s.say("Good things take time.", "{h} learned to wait.", p=0.4)
    s.close()


def building(s: Story) -> None:
    s.open()
    a, b, c = s.friend(), s.friend(), s.friend()
    work, parts = s.rng.choice(
        (
            ("a tree house", ("wood", "nails", "a rope", "a ladder")),
            ("a sandcastle", ("a bucket", "a shovel", "some shells", "a small flag")),
            ("a snowman", ("a carrot", "an old hat", "two stones", "a scarf")),
            ("a small boat", ("wood", "a sail", "a rope", "some paint")),
            ("a bird house", ("wood", "nails", "some paint", "some seeds")),
        )
    )
    first, second, third = s.rng.sample(parts, 3)
    s.put(a=a, b=b, c=c, work=work, x=first, y=second, z=third, when=s.when())
    s.put(n=words.NUMBERS[s.rng.randint(2, 9)])
    s.say(
        "{when}, {h} [wanted to build|had the idea to build|decided to build] {work}.",
        '{when}, {h} said to {h.his} friends, "Let us build {work}!"',
    )
    s.fact("What did {h} want to build?", "{h} wanted to build {work}.")
    s.say(
        "But it was too much work for one. So {h} asked {a}, {b} and {c} to help.",
        "{a}, {b} and {c} came to help.",
    )
    s.say(
        "{a} brought {x}, {b} brought {y}, and {c} brought {z}.",
        "{a} came with {x}. {b} came with {y}. And {c} came with {z}.",
    )
    s.fact("What did {a} bring?", "{a} brought {x}.")
    s.fact("What did {b} bring?", "{b} brought {y}.")
    s.fact("Who brought {z}?", "{c} brought {z}.")
    s.paragraph()
    s.say(
        "They worked for {n} hours.",
        "They worked hard all [day|morning|afternoon].",
        "{a} and {b} did the [hard|heavy] work, and {c} sang a song to help.",
    )
    s.say(
        "Once it fell down, but they started again.",
        '"This is too hard," said {b}. "We can do it together," said {h}.',
        p=0.6,
    )
    s.say(
        "At last, the work was done. It was [beautiful|perfect|crooked, but they loved it].",
        "When they were done, everyone [cheered|clapped|laughed with joy].",
    )
    s.close()


def learning(s: Story) -> None:
    s.open()
    skill = s.rng.choice(list(words.SKILLS))
    place, tip, done = words.SKILLS[skill]
    s.put(skill=skill, place=place, tip=tip, done=done, when=s.when())
    s.put(f=s.friend() if s.rng.random() < 0.5 else s.elder()[0])
    s.say(
        "{h} wanted to learn to {skill}.",
        "All the others could {skill}, but {h} could not.",
        'One day {h} said, "I want to {skill}."',
    )
    s.fact("What did {h} want to learn?", "{h} wanted to learn to {skill}.")
    s.say(
        "{when}, {h.he} tried for the first time, but it [went wrong|did not work].",
        "The first time, {h} [failed|fell down|made a big mistake].",
    )
    s.say(
        '"I will never learn it," said {h}, and {h.he} was close to tears.',
        "{h} was [angry|sad] and wanted to stop.",
        '"[This is too hard|I cannot do it]," said {h}.',
    )
    s.paragraph()
    s.say(
        '"[Try again|Do not give up|Nobody can do it at first]," said {f}. "I will help you."',
        '{f} smiled and said, "Everyone makes mistakes. Try once more."',
    )
    s.fact("Who helped {h}?", "{f} helped {h}.")
    s.say(
        "The second time, {h} {tip}, and it was a little better.",
        "So {h} {tip}. [That helped|It was better than before].",
    )
    s.say(
        "{h} tried again the next day, and the day after that.",
        "Day after day, {h} went to {place} and tried again.",
        p=0.6,
    )
    s.say(
        "The third time, {h} {done}!",
        "And then, at last, {h} {done}!",
    )
    s.say(
        '"I did it!" [cried|shouted|called] {h}. "[I knew you could|Well done]," said {f}.',
        "{h} was very proud, and {f} was proud too.",
    )
    s.say("If you try again, you can do it.", p=0.3)
    s.close()


def picnic(s: Story) -> None:
    s.open()
    a, b = s.friend(), s.friend()
    x, y, z = s.rng.sample(words.FOODS, 3)
    s.put(a=a, b=b, x=x, y=y, z=z, p=s.place(), when=s.when(), d=s.rng.choice(words.DRINKS))
    s.put(game=s.rng.choice(words.GAMES), n=words.NUMBERS[s.rng.randint(3, 9)])
    s.put(thief=s.rng.choice(["a duck", "a dog", "a squirrel", "a big bird", "an ant"]))
    s.say(
        "{when}, {h}, {a} and {b} had a picnic {p.at}.",
        "{when}, {h} invited {a} and {b} to a picnic {p.at}.",
    )
    s.fact("Where was the picnic?", "The picnic was {p.at}.")
    s.say(
        "{h} brought {x}, {a} brought {y}, and {b} brought {z}.",
        "{a} brought {y}. {b} brought {z}. {h} had {x} and some {d}.",
    )
    s.fact("What did {h} bring?", "{h} brought {x}.")
    s.fact("What did {a} bring?", "{a} brought {y}.")
    s.fact("Who brought {z}?", "{b} brought {z}.")
    s.paragraph()
    s.say(
        "While they were playing {game}, {thief} came and ate the {y}!",
        "They put the food on a blanket. Then {thief} came and took the {y}!",
    )
    s.fact("Who took the {y}?", "It was {thief}.")
    s.say(
        '"My {y}!" cried {a}. "Do not worry," said {b}. "You can have some of my {z}."',
        "{a} was sad, so {h} gave {a.him} half of the {x}.",
    )
    s.say(
        "In the end there was enough for everyone.",
        "They laughed about it all the way home.",
        "After lunch, they played {game}.",
    )
    s.close()
