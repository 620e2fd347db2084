"""Stories about a thing: lost, shared, given, broken, bought, carried.

Each function tells one episode into a `Story`; `fact` notes what can be asked about it.
"""

from __future__ import annotations

from . import words
from .teller import Story


def lost_thing(s: Story) -> None:
    s.open()
    place, other = s.rng.sample(words.PLACES, 2)
    spots = s.rng.sample(place.spots, 3)
    helper = s.friend()
    s.put(o=s.thing(), p=place, p2=other, f=helper, s1=spots[0], s2=spots[1], s3=spots[2])
    s.put(when=s.when(), giver=s.elder()[0])
    s.say(
        "{h.He} had a {o.full} that {h.he} took everywhere.",
        "{h.His} [favorite|best] thing was a {o.full}.",
        "{h} had a {o.full} from {giver}, and {h.he} [loved it|took good care of it].",
    )
    s.paragraph()
    s.say(
        "{when}, {h} [lost|could not find] the {o.full} {p.at}.",
        "{when}, {h} went to {p}, and soon the {o.full} was gone.",
        "{when}, {h} played {p.at}. When it was time to go, the {o} was [gone|not there].",
    )
    s.fact("What did {h} lose?", "{h} lost a {o.full}.")
    s.fact("What color was the {o}?", "The {o} was {o.color}.")
    s.fact("Where did {h} lose the {o}?", "{h} lost it {p.at}.")
    s.say(
        '"Where is my {o}?" [asked|cried|said] {h}.',
        '"Oh no, my {o}!" [cried|said] {h}.',
        "{h} was very [sad|worried|upset].",
        "{h} [began|started] to cry.",
    )
    s.say(
        "{h.He} looked {s1}, but it was not there.",
        "First {h.he} looked {s1}. [No {o}.|Nothing was there.|There was only dust.]",
        "{h.He} looked {s1} and found [nothing|only an old shoe|only a beetle].",
    )
    s.say("Then {h.he} looked {s2}, but [it was not there|the {o} was not there].", p=0.6)
    s.paragraph()
    s.say(
        "{f} [came by|heard {h}|saw that {h} was sad]. "
        '"[What is wrong|Why are you sad|What happened]?" asked {f}.',
        "Then {h} met {f}, [a good friend|a {f.kind} who lived nearby].",
    )
    s.say(
        '"I lost my {o.full}," said {h}. "[I will help you|Let us look together|We will find it]," '
        "said {f}.",
        '"Can you help me find my {o}?" asked {h}. "[Of course|Yes, I can|Sure]," said {f}.',
    )
    s.say(
        "[They|The two friends] looked everywhere. At last, {f} looked {s3}, and there it was!",
        "{f} looked {s3} and [smiled|laughed|called out]. The {o.full} was right there!",
        "Together they looked {s3}. There was the {o.full}!",
    )
    s.fact("Where was the {o}?", "The {o} was {s3}.")
    s.fact("Who helped {h}?", "{f} helped {h}.")
    s.say(
        '"Thank you, {f}!" said {h}. "You are [a true friend|so kind|the best friend]."',
        '"You found it!" said {h}, and {h.he} gave {f} a big hug.',
        "{h} was so happy that {h.he} hugged {f}.",
    )
    s.say(
        "After that, {h} [kept it close|never lost the {o} again|took better care of the {o}].",
        p=0.5,
    )
    s.close()


def sharing(s: Story) -> None:
    s.open()
    thing = s.rng.choice(list(words.COUNTABLES))
    have, more = s.rng.randint(1, 9), s.rng.randint(1, 6)
    away = s.rng.randint(1, have + more - 1)
    s.put(f=s.friend(), p=s.place(), when=s.when(), things=words.COUNTABLES[thing])
    s.put(
        have=s.count(thing, have),
        more=words.NUMBERS[more],
        total=s.count(thing, have + more),
        gave=s.count(thing, away),
        left=s.count(thing, have + more - away),
    )
    s.say(
        "{when}, {h} [went to {p} and found|found] {have}.",
        "{when}, {h} went to {p} with {have} in a [bag|basket|box].",
        "{when}, {h} had {have}.",
    )
    s.fact("How many {things} did {h} have at first?", "{h} had {have} at first.")
    s.say(
        "Then {h.he} found {more} more. Now {h.he} had {total}.",
        "Later {h.he} got {more} more. That made {total}.",
        "{f} gave {h.him} {more} more, so {h} had {total}.",
    )
    s.fact("How many {things} did {h} have then?", "Then {h} had {total}.")
    s.paragraph()
    if s.rng.random() < 0.7:
        s.say(
            "{f} was [hungry|sad|watching] and had [nothing|no {things} at all].",
            '"[They look nice|How lucky you are|I have none]," said {f}.',
        )
        s.say(
            "{h} gave {f} {gave}. [Now|After that] {h} had {left}[ left|].",
            '"You can have some," said {h}, and gave {f} {gave}. Then {h.he} had {left}.',
        )
        s.fact("Who got some {things} from {h}?", "{f} got {gave} from {h}.")
        s.fact("How many {things} did {h} have in the end?", "In the end, {h} had {left}.")
        s.say(
            '"Thank you," said {f}. "[It is good to share|You are very kind|That is nice of you]."',
            "{f} [smiled|was very happy] and said thank you.",
            "They sat down {p.at} and [talked|laughed|sang] together.",
        )
    else:
        s.say(
            "On the way home, {h.he} dropped {gave}. Now {h.he} had {left}[ left|].",
            "{h} used {gave}. After that, {h.he} had {left}[ left|].",
        )
        s.fact("How many {things} did {h} have in the end?", "In the end, {h} had {left}.")
        s.say('"[That is enough|That is still good]," [said|thought] {h}.', p=0.7)
    s.close()


def gift(s: Story) -> None:
    s.open()
    giver = s.elder()[0] if s.rng.random() < 0.5 else s.friend()
    s.put(o=s.thing(), f=giver, n=words.NUMBERS[s.rng.randint(4, 10)], p=s.place())
    s.put(game=s.rng.choice(words.GAMES), food=s.rng.choice(words.FOODS))
    s.put(day=s.rng.choice(words.DAYS))
    s.say(
        "On {day}, it was {h.his} birthday. {h} was {n} years old.",
        "{h.His} birthday was on {day}. {h.He} was going to be {n}.",
        "It was {day}, and {h} turned {n} years old.",
    )
    s.fact("How old was {h}?", "{h} was {n} years old.")
    s.fact("What day was the birthday?", "The birthday was on {day}.")
    s.say("{h} was very excited.", "{h} woke up early and jumped out of bed.", p=0.6)
    s.say(
        "There was {food} for everyone, and they played {game}.",
        "All {h.his} friends came to the party {p.at}. They ate {food}.",
        "They had a party {p.at} with {food} and music.",
        p=0.8,
    )
    s.paragraph()
    s.say(
        "Then {f} [came with|brought|held out] a [big|small] box. "
        '"[This is for you|Open it|Happy birthday]," said {f}.',
        "{f} gave {h} a box with a [red|blue|yellow] ribbon. {h} opened it slowly.",
    )
    s.say(
        "Inside was a {o.full}!",
        "{h} looked inside and saw a [new|beautiful|shiny] {o.full}.",
        "In the box there was a {o.full}, just what {h} wanted.",
    )
    s.fact("What did {h} get?", "{h} got a {o.full}.")
    s.fact("Who gave {h} the {o}?", "{f} gave {h} the {o}.")
    s.fact("What color was the {o}?", "The {o} was {o.color}.")
    s.say(
        '"[I love it|It is so pretty|It is perfect]!" said {h}. "Thank you!"',
        "{h} hugged {f} and said thank you.",
        '"How did you know that I wanted a {o}?" asked {h}. {f} just smiled.',
    )
    s.close()


def broken(s: Story) -> None:
    s.open()
    elder, call = s.elder()
    s.put(o=s.thing(), e=elder, call=call, game=s.rng.choice(words.GAMES), p=s.place())
    s.put(when=s.when())
    s.put(glue=s.rng.choice(["glue", "a needle and thread", "some tape", "a hammer"]))
    s.say(
        "{when}, {h} [ran through|played in] the house and broke a {o.full}.",
        "{when}, {h} was playing {game}. Crash! {h.He} broke the {o.full}.",
    )
    s.say("It [was|had been] the {o} that {e} loved.")
    s.fact("What did {h} break?", "{h} broke a {o.full}.")
    s.say(
        "{h} was scared. {h.He} [hid the {o} under the bed|did not know what to do].",
        '"Nobody saw me," thought {h}. "[I can say that the wind did it|I can hide it]."',
        "{h} felt [bad|very bad|sick] and could not eat.",
    )
    s.paragraph()
    s.say(
        'Then {e} came in and asked, "What happened to my {o}?"',
        'That evening, {e} asked, "Where is my {o}?"',
    )
    s.say(
        '{h} took a deep breath. "I broke it," {h.he} said. "I am [very|so] sorry, {call}."',
        '"It was me," said {h} in a small voice. "I am sorry."',
    )
    s.fact("Did {h} tell the truth?", "Yes, {h} told the truth.")
    s.say(
        '{e} was not angry. "Thank you for telling the truth," {e.he} said.',
        '"I am a little sad," said {e}, "but I am glad that you told me the truth."',
    )
    s.say(
        "Together they fixed the {o} with {glue}.",
        "They took {glue} and repaired the {o}. It was almost like new.",
    )
    s.fact("How did they fix the {o}?", "They fixed it with {glue}.")
    s.say("It is best to tell the truth.", p=0.4)
    s.close()


def market(s: Story) -> None:
    s.open()
    thing = s.rng.choice(list(words.COUNTABLES))
    price, count = s.rng.randint(1, 3), s.rng.randint(2, 4)
    coins = price * count + s.rng.randint(1, 6)
    s.put(f=s.friend(), e=s.elder()[0], things=words.COUNTABLES[thing], when=s.when())
    s.put(
        coins=s.count("coin", coins),
        price=s.count("coin", price),
        n=s.count(thing, count),
        cost=s.count("coin", price * count),
        left=s.count("coin", coins - price * count),
        job=s.rng.choice(["an old man", "a friendly woman", "a young farmer", "a tall man"]),
    )
    s.say(
        "{when}, {e} gave {h} {coins} to spend at the market.",
        "{when}, {h} went to the market with {coins} in {h.his} pocket.",
    )
    s.fact("How many coins did {h} have at first?", "{h} had {coins} at first.")
    s.say(
        "There were [cheese and bread|flowers and fruit|toys and books|fish and eggs] everywhere.",
        "It was [loud|busy|full of people], and everything smelled good.",
        p=0.7,
    )
    s.paragraph()
    s.say(
        '{job} was selling {things}. "How much are they?" asked {h}. "{price} each," was the '
        "answer.",
        '{h} saw some nice {things}. "They cost {price} each," said {job}.',
    )
    s.say(
        '"I will take {n}, please," said {h}. That was {cost}.',
        "{h} bought {n} and paid {cost}.",
    )
    s.fact("What did {h} buy?", "{h} bought {n}.")
    s.fact("How much did {h} pay?", "{h} paid {cost}.")
    s.say(
        "Now {h.he} had {left} left.",
        "{h} counted the money. {h.He} still had {left}.",
    )
    s.fact("How many coins did {h} have left?", "{h} had {left} left.")
    s.say(
        'At home, {e} was [proud|happy] and said, "Well done!"',
        "On the way home, {h} met {f} and shared the {things}.",
        "{h} ran home to show {e} what was in the bag.",
    )
    s.close()


def journey(s: Story) -> None:
    s.open()
    a, b, goal = s.rng.sample(words.PLACES, 3)
    s.put(a=a, b=b, goal=goal, f=s.friend(), g=s.friend(), when=s.when(), e=s.elder()[0])
    s.put(food=s.rng.choice(words.FOODS), o=s.thing(), n=words.NUMBERS[s.rng.randint(2, 9)])
    s.say(
        '{when}, {e} said, "Please take this {o.full} to {f}. {f} is {goal.at}."',
        "{when}, {h} wanted to visit {f}, who was {goal.at}. {h.He} took a {o.full} as a present.",
    )
    s.fact("Where was {f}?", "{f} was {goal.at}.")
    s.fact("What did {h} take to {f}?", "{h} took a {o.full} to {f}.")
    s.say(
        "First {h} came to {a}. It was [quiet|very quiet|nice], and {h.he} rested a little.",
        "{h} walked for {n} minutes and came to {a}.",
    )
    s.say(
        "Then the road went on to {b}. There {h} met {g}.",
        "Next {h.he} came to {b}, where {g} was [sitting|waiting|singing].",
    )
    s.fact("Who did {h} meet on the way?", "{h} met {g}.")
    s.paragraph()
    s.say(
        '"Where are you going?" asked {g}. "To {goal}," said {h}. "[Have a good trip|It is not'
        ' far]," said {g}.',
        '"Do you know the way to {goal}?" asked {h}. "Yes," said {g}, "[go straight on|turn left|'
        'turn right]."',
    )
    s.say(
        "{h} was [tired|hungry], but {h.he} kept going.",
        "They ate some {food} together, and then {h} went on.",
        p=0.7,
    )
    s.say(
        "At last {h} came to {goal}, and there was {f}.",
        "Finally {h} saw {goal}. {f} was already there.",
    )
    s.say(
        '"[I am so glad to see you|You came all this way|Welcome]!" said {f}.',
        '"This {o} is for you," said {h}. "[Thank you|How nice|It is lovely]!" said {f}.',
    )
    s.close()
