"""All story families, and one story out of them."""

from __future__ import annotations

import random
from collections.abc import Callable

from . import days, friends, making, things
from .teller import Story

# the order is part of what a seed means
FAMILIES: dict[str, Callable[[Story], None]] = {
    f.__name__: f
    for f in (
        things.lost_thing,
        things.sharing,
        things.gift,
        making.cooking,
        making.growing,
        things.broken,
        things.market,
        making.building,
        days.weather_day,
        friends.new_friend,
        friends.hurt_animal,
        making.learning,
        things.journey,
        days.noise,
        days.race,
        days.week,
        friends.fable,
        making.picnic,
    )
}


def tell(
    rng: random.Random, family: str | None = None, *, episodes: int = 1, **context: object
) -> Story:
    """One story: an episode of a given family or of any, then more episodes with the same hero."""
    story = Story(rng, **context)
    for i in range(episodes):
        story.last_episode = i == episodes - 1
        chosen = family if family and i == 0 else rng.choice(list(FAMILIES))
        while i > 0 and chosen == "fable":  # a fable brings its own hero
            chosen = rng.choice(list(FAMILIES))
        FAMILIES[chosen](story)
    return story
