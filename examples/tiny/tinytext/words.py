"""The lexicon: people, animals, things, places, food, weather, feelings, numbers."""

# ruff: noqa: SIM905

from __future__ import annotations

from dataclasses import dataclass

GIRLS = (
    "Anna Mia Lily Rose Emma Sara Nora Ella Lucy Ruby Zoe Clara Ivy Maya Grace Hanna Alice Daisy "
    "Molly Nina Olive Penny Tess Wendy Amy Eva Jane Kate"
).split()
BOYS = (
    "Tom Ben Max Sam Leo Jack Tim Oscar Finn Hugo Noah Adam Paul Peter Felix Henry Jim Luke Mark "
    "Nick Omar Ray Theo Will Carl Dan Fred Joe"
).split()

ANIMALS = (
    "cat dog rabbit fox bear duck mouse owl frog pig hen goat pony turtle hedgehog squirrel"
).split()
ANIMAL_SOUNDS = {
    "cat": "meow",
    "dog": "woof",
    "duck": "quack",
    "mouse": "squeak",
    "owl": "hoot",
    "frog": "croak",
    "pig": "oink",
    "hen": "cluck",
    "cow": "moo",
    "sheep": "baa",
    "horse": "neigh",
    "lion": "roar",
    "bee": "buzz",
    "rooster": "cock-a-doodle-doo",
}
ANIMAL_BABIES = {
    "cat": "kitten",
    "dog": "puppy",
    "cow": "calf",
    "sheep": "lamb",
    "hen": "chick",
    "duck": "duckling",
    "horse": "foal",
    "bear": "cub",
    "goat": "kid",
    "pig": "piglet",
    "frog": "tadpole",
}
ANIMAL_HOMES = {
    "fish": "in the water",
    "bear": "in the forest",
    "bee": "in a hive",
    "bird": "in a nest",
    "rabbit": "in a hole under the ground",
    "cow": "on a farm",
    "frog": "by the pond",
    "owl": "in a tree",
    "spider": "in a web",
    "dog": "in a house with people",
    "horse": "in a stable",
    "mouse": "in a small hole",
}

COLORS = "red blue green yellow white black brown pink orange purple gray golden".split()
# thing -> plural
THINGS = {
    "ball": "balls",
    "kite": "kites",
    "hat": "hats",
    "scarf": "scarves",
    "book": "books",
    "key": "keys",
    "doll": "dolls",
    "drum": "drums",
    "cup": "cups",
    "spoon": "spoons",
    "lamp": "lamps",
    "basket": "baskets",
    "ring": "rings",
    "coin": "coins",
    "boat": "boats",
    "bell": "bells",
    "bag": "bags",
    "box": "boxes",
    "button": "buttons",
    "mitten": "mittens",
    "umbrella": "umbrellas",
    "shoe": "shoes",
    "blanket": "blankets",
    "bucket": "buckets",
    "whistle": "whistles",
    "pencil": "pencils",
    "train": "trains",
    "watch": "watches",
}
# small things one can count -> plural
COUNTABLES = {
    "apple": "apples",
    "pear": "pears",
    "plum": "plums",
    "egg": "eggs",
    "cookie": "cookies",
    "carrot": "carrots",
    "nut": "nuts",
    "shell": "shells",
    "stone": "stones",
    "flower": "flowers",
    "berry": "berries",
    "coin": "coins",
    "button": "buttons",
    "leaf": "leaves",
    "marble": "marbles",
    "feather": "feathers",
    "cherry": "cherries",
    "orange": "oranges",
}
IRREGULAR_PLURALS = {
    "mouse": "mice",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "man": "men",
    "woman": "women",
    "sheep": "sheep",
    "fish": "fish",
    "leaf": "leaves",
    "knife": "knives",
    "wolf": "wolves",
}
FOODS = (
    "bread|soup|cake|cheese|pie|honey|jam|rice|porridge|salad|ice cream|fruit|pancakes|sandwiches"
    "|cookies|potatoes|noodles|muffins"
).split("|")
DRINKS = "milk|water|tea|apple juice|hot chocolate|lemonade".split("|")
# dish -> ingredients, in the order they are used
DISHES = {
    "a cake": ("flour", "eggs", "sugar", "butter"),
    "an apple pie": ("flour", "butter", "apples", "sugar"),
    "pancakes": ("flour", "milk", "eggs", "honey"),
    "vegetable soup": ("water", "carrots", "potatoes", "salt"),
    "a loaf of bread": ("flour", "water", "salt", "seeds"),
    "a fruit salad": ("apples", "pears", "cherries", "honey"),
    "cookies": ("butter", "sugar", "flour", "nuts"),
    "tomato soup": ("tomatoes", "water", "salt", "cream"),
}


@dataclass(slots=True, frozen=True)
class Place:
    """A place with its preposition and with spots where a thing can hide."""

    name: str
    prep: str
    spots: tuple[str, ...]

    def __str__(self) -> str:
        return f"the {self.name}"

    @property
    def at(self) -> str:
        return f"{self.prep} the {self.name}"


PLACES = tuple(
    Place(name, prep, tuple(spots.split("|")))
    for name, prep, spots in (
        ("garden", "in", "under a bush|behind the shed|next to the roses|under the apple tree"),
        ("park", "in", "under a bench|behind a tree|near the fountain|by the swings"),
        ("forest", "in", "under a pile of leaves|behind a rock|next to an old log|by the stream"),
        ("beach", "at", "under the sand|behind a rock|next to a boat|near the water"),
        ("farm", "on", "behind the barn|in the hay|next to the well|under a cart"),
        ("market", "at", "under a table|behind a big box|next to the flowers|near the gate"),
        ("school", "at", "under a desk|behind the door|next to the window|on a shelf"),
        ("kitchen", "in", "under the table|behind the stove|on a chair|next to the bread"),
        ("library", "in", "under a chair|between two books|on a high shelf|behind a lamp"),
        ("meadow", "in", "in the tall grass|behind a fence|under a tree|next to a stone"),
        ("playground", "on", "under the slide|behind the swings|near the gate|in the sand"),
        ("barn", "in", "in the hay|behind a ladder|under an old cart|next to the cow"),
        ("river", "by", "under the bridge|in the tall grass|behind a rock|next to a boat"),
        ("hill", "on", "behind a rock|under a tree|in the tall grass|next to the path"),
        ("train station", "at", "under a bench|behind a sign|next to the door|near the clock"),
        ("house", "in", "under the bed|behind the door|on the stairs|next to the sofa"),
    )
)

# weather -> (how it looks, what to take or wear, what it makes possible, what it spoils)
WEATHER = {
    "sunny": ("the sun was shining", "a hat", "play outside", "sleep late"),
    "rainy": ("the rain was falling", "an umbrella", "jump in puddles", "have a picnic"),
    "windy": ("the wind was blowing", "a warm jacket", "fly a kite", "play with paper boats"),
    "snowy": ("the snow was falling", "mittens", "build a snowman", "ride a bike"),
    "foggy": ("the fog was thick", "a lamp", "play hide and seek", "see the hills"),
    "stormy": ("the thunder was loud", "a thick coat", "stay inside and read", "go to the beach"),
    "cold": ("the air was cold", "a scarf", "drink hot chocolate", "swim in the lake"),
    "hot": ("the air was hot", "a bottle of water", "swim in the lake", "wear a coat"),
}

# feeling -> (causes as "because ..." clauses, what one does)
FEELINGS = {
    "happy": (("the day was so nice", "everyone was there"), ("smiled", "laughed", "sang a song")),
    "sad": (("nobody was there to play", "the day was over"), ("cried a little", "sat down alone")),
    "angry": (("nothing worked", "somebody was rude"), ("stamped one foot", "frowned")),
    "scared": (("it was very dark", "there was a loud noise"), ("hid under a blanket", "trembled")),
    "proud": (("the hard work was done", "the plan worked"), ("stood up tall", "smiled")),
    "tired": (("it was late", "the walk was long"), ("yawned", "sat down to rest")),
    "hungry": (("lunch was late", "there was no breakfast"), ("looked for food", "sighed")),
    "bored": (("there was nothing to do", "it rained all day"), ("sighed", "looked around")),
    "excited": (("the big day was here", "a trip was planned"), ("jumped up and down", "cheered")),
    "worried": (("it was getting late", "something was wrong"), ("walked up and down", "frowned")),
    "lonely": (("all the friends were away", "the house was empty"), ("sighed", "looked outside")),
    "surprised": (("nobody had said a word", "it came so fast"), ("gasped", "stared")),
}
TRAITS = (
    "kind brave clever shy cheerful curious gentle quiet funny careful friendly helpful".split()
)
MORALS = (
    "It is good to help others.",
    "A true friend is always there.",
    "It is better to share than to keep everything.",
    "Slow and steady work wins in the end.",
    "It is best to tell the truth.",
    "Small friends can be great friends.",
    "If you try again, you can do it.",
)

# job -> (gender-free title works for both, what one does)
JOBS = {
    "baker": "bakes bread",
    "farmer": "grows food",
    "teacher": "teaches children",
    "doctor": "helps sick people",
    "gardener": "takes care of plants",
    "painter": "paints pictures",
    "sailor": "sails on the sea",
    "singer": "sings songs",
    "cook": "cooks food",
    "tailor": "makes clothes",
    "pilot": "flies planes",
    "builder": "builds houses",
    "writer": "writes books",
    "driver": "drives a bus",
    "firefighter": "puts out fires",
}
SKILLS = {
    "swim": ("the lake", "moved both arms", "swam all the way to the other side"),
    "ride a bike": ("the street", "held on tight", "rode to the end of the street"),
    "whistle": ("the yard", "blew very softly", "whistled a whole song"),
    "paint": ("the table", "mixed the colors", "painted a picture of the house"),
    "skate": ("the ice", "took one small step", "skated around the pond"),
    "climb": ("the old tree", "looked for a good branch", "climbed to the top"),
    "dance": ("the big room", "listened to the music", "danced until the music stopped"),
    "cook": ("the kitchen", "stirred the pot slowly", "cooked dinner for everyone"),
    "read": ("the library", "looked at every letter", "read a whole page"),
    "play the drum": ("the music room", "counted to four", "played without a mistake"),
}
PLANTS = {
    "sunflower": "yellow",
    "rose": "red",
    "tulip": "pink",
    "daisy": "white",
    "bean plant": "green",
    "pumpkin": "orange",
    "violet": "purple",
    "strawberry plant": "red",
}
GAMES = (
    "hide and seek|tag|catch|chess|cards|a guessing game|ball|hopscotch|pirates|a quiet game"
).split("|")
HOBBIES = (
    "reading|singing|painting|swimming|dancing|cooking|running|fishing|drawing|climbing trees"
    "|telling jokes|flying kites"
).split("|")

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
SEASONS = "spring summer fall winter".split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
ORDINALS = "first second third fourth fifth".split()

OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "happy": "sad",
    "fast": "slow",
    "day": "night",
    "up": "down",
    "open": "closed",
    "wet": "dry",
    "full": "empty",
    "old": "new",
    "loud": "quiet",
    "light": "dark",
    "hard": "soft",
    "long": "short",
    "near": "far",
    "clean": "dirty",
    "early": "late",
    "high": "low",
    "left": "right",
    "strong": "weak",
}
COLOR_OF = {
    "grass": "green",
    "the sky": "blue",
    "snow": "white",
    "a banana": "yellow",
    "a strawberry": "red",
    "a carrot": "orange",
    "the night": "black",
    "the sun": "yellow",
    "milk": "white",
    "a leaf in summer": "green",
    "a tomato": "red",
    "chocolate": "brown",
    "an elephant": "gray",
    "a plum": "purple",
    "a frog": "green",
    "a pig": "pink",
}
KINDS = {
    "animals": "cats dogs horses bears birds foxes frogs cows sheep ducks".split(),
    "fruits": "apples pears plums cherries oranges bananas grapes peaches".split(),
    "colors": "red blue green yellow white black pink purple brown".split(),
    "vegetables": "carrots potatoes tomatoes beans onions pumpkins peas".split(),
    "toys": "balls kites dolls drums trains blocks puzzles".split(),
    "clothes": "hats coats shoes scarves shirts socks mittens".split(),
    "drinks": ["milk", "water", "tea", "juice", "lemonade"],
    "things in a kitchen": "cups spoons plates pots knives forks bowls".split(),
    "things in a garden": "flowers trees bushes roses bees leaves".split(),
}
USES = {
    "an umbrella": "keep dry in the rain",
    "a spoon": "eat soup",
    "a key": "open a door",
    "a lamp": "see in the dark",
    "a pencil": "write and draw",
    "a boat": "go across the water",
    "a clock": "know the time",
    "a bed": "sleep",
    "a broom": "clean the floor",
    "a blanket": "keep warm",
    "a basket": "carry things",
    "a map": "find the way",
    "a ladder": "reach high places",
    "a knife": "cut bread",
    "a book": "read a story",
    "soap": "wash your hands",
}
