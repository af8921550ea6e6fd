"""Plain English captions of scenes: varied wording, each attribute stated or left open.

`describe` returns the sentence and what it states, so that fidelity can be asked of the stated
attributes and consistency of the open ones.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

from training import world
from training.world import Character, Scene

KIND_WORDS = {
    "cat": ("cat", "kitten"),
    "rabbit": ("rabbit", "bunny"),
    "bear": ("bear", "teddy bear"),
    "frog": ("frog", "toad"),
    "elephant": ("elephant",),
    "duck": ("duck", "duckling"),
}
COLOR_WORDS = {name: (name,) for name in world.COLORS} | {"purple": ("purple", "violet")}
CLOTHES_WORDS = {
    "shirt": ("shirt", "sweater", "jumper"),
    "dress": ("dress",),
    "overalls": ("overalls", "dungarees"),
    "coat": ("coat", "raincoat"),
}
PATTERN_WORDS = {
    "plain": ("plain",),
    "striped": ("striped",),
    "spotted": ("spotted", "polka dot"),
}
HAT_WORDS = {
    "top hat": ("top hat",),
    "party hat": ("party hat", "pointed hat"),
    "crown": ("crown",),
    "beanie": ("beanie", "woolly hat"),
    "bow": ("bow", "hair bow"),
    "scarf": ("scarf", "long scarf"),
}
ACTION_WORDS = {
    "standing": ("is standing", "stands"),
    "walking": ("is walking", "walks", "takes a walk"),
    "jumping": ("is jumping", "jumps", "jumps for joy"),
    "waving": ("is waving", "waves", "says hello"),
    "sitting": ("is sitting", "sits", "sits down"),
    "reading": ("is reading", "reads a book", "is reading a book"),
}
PLACE_WORDS = {
    "forest": ("in the forest", "in a forest", "in the woods", "among the trees"),
    "beach": ("at the beach", "on the beach", "by the sea"),
    "city": ("in the city", "in a city street", "in town"),
    "mountains": ("in the mountains", "below the mountains"),
    "desert": ("in the desert", "among the cacti"),
    "meadow": ("in a meadow", "in the meadow", "among the flowers"),
    "castle": ("at the castle", "in front of a castle"),
    "farm": ("on the farm", "at a farm", "by the barn"),
    "bedroom": ("in the bedroom", "in a bedroom", "at home"),
    "library": ("in the library", "in a library", "among the books"),
}
TIME_WORDS = {
    "day": ("during the day", "by day", "in the daytime"),
    "sunset": ("at sunset", "in the evening", "at dusk"),
    "night": ("at night", "in the night", "late at night"),
}
WEATHER_WORDS = {
    "clear": ("under a clear sky", "in fine weather"),
    "rain": ("in the rain", "while it rains", "on a rainy day"),
    "snow": ("in the snow", "while it snows", "on a snowy day"),
}
FRAMING_WORDS = {
    "close-up": ("close-up", "seen up close"),
    "medium": ("medium shot",),
    "far": ("far away", "seen from afar", "wide shot"),
}
POSITION_WORDS = {
    "left": ("on the left",),
    "middle": ("in the middle", "in the center"),
    "right": ("on the right",),
}
OPENINGS = ("", "", "", "a picture of", "a storybook illustration of", "a drawing of")
LAYOUT_WORDS = {
    "twins": ("twins,", "the same character twice,", "two of the same,"),
    "triplets": ("triplets,", "the same character three times,", "three of the same,"),
    "strip": ("a comic strip of", "a comic about"),
    "sheet": ("a character sheet of", "three drawings of"),
    "mirror": ("in the mirror,", "a mirror and"),
}


@dataclass(frozen=True)
class Caption:
    """A sentence about a scene, and the attributes it states of its first and second character."""

    text: str
    stated: frozenset[str]
    stated_other: frozenset[str] = frozenset()


def subject(who: Character, stated: Collection[str], rng: random.Random) -> str:
    """'a red cat in a blue striped dress and a green top hat', as far as `stated` goes."""
    kind = rng.choice(KIND_WORDS[who.kind]) if "kind" in stated else rng.choice(("animal", "character"))
    words = [rng.choice(COLOR_WORDS[who.fur])] if "fur" in stated else []
    noun = " ".join([*words, kind])
    items = []
    if {"clothes", "clothes_color", "pattern"} & set(stated):
        garment = [rng.choice(COLOR_WORDS[who.clothes_color])] if "clothes_color" in stated else []
        if "pattern" in stated:
            garment.append(rng.choice(PATTERN_WORDS[who.pattern]))
        garment.append(rng.choice(CLOTHES_WORDS[who.clothes]) if "clothes" in stated else "clothes")
        plural = garment[-1] in ("overalls", "dungarees", "clothes")
        items.append(("" if plural else article(garment[0]) + " ") + " ".join(garment))
    if "hat" in stated and who.hat != "none":
        hat = [rng.choice(COLOR_WORDS[who.hat_color])] if "hat_color" in stated else []
        hat.append(rng.choice(HAT_WORDS[who.hat]))
        items.append(article(hat[0]) + " " + " ".join(hat))
    if rng.random() < 0.2:
        items.reverse()
    text = f"{article(noun)} {noun}"
    if items:
        text += " " + rng.choice(("wearing", "in", "with", "dressed in")) + " " + " and ".join(items)
    if "hat" in stated and who.hat == "none":
        text += rng.choice((" without a hat", " with a bare head"))
    return text


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def choose_stated(rng: random.Random, always: Collection[str] = ()) -> frozenset[str]:
    """Each attribute stated or left open at random; how talkative a caption is varies too."""
    talk = rng.choice((0.35, 0.6, 0.85))
    stated = {name for name in world.ATTRIBUTES if rng.random() < talk} | set(always)
    if rng.random() < 0.7:
        stated |= {"kind", "place"}
    if rng.random() < 0.5:  # it can be told of single pictures only, which makes it rare
        stated.add("action")
    if rng.random() < 0.5:
        stated -= {"framing", "position"}
    if "hat" not in stated:
        stated.discard("hat_color")
    return frozenset(stated)


def describe(scene: Scene, rng: random.Random, stated: Collection[str] | None = None) -> Caption:
    """A caption of `scene`; `stated` fixes which attributes of a single picture it tells."""
    cell = scene.cells[0]
    figure = cell.figures[0]
    told = set(choose_stated(rng) if stated is None else stated)
    if scene.layout != "single":
        told -= {"framing", "position", "action"}
    if scene.layout == "sheet":
        told -= {"place", "time", "weather"}
    if scene.layout == "strip":
        told -= {"time", "weather"}
    if cell.place in world.INDOORS:
        told.discard("weather")
    if scene.framing == "close-up" or figure.moving:
        told.discard("action")
    if scene.layout == "crowd":
        text = rng.choice(("a crowd of animals", "many animals"))
    else:
        text = subject(figure.character, told, rng)
    told_other: frozenset[str] = frozenset()
    if scene.layout == "pair":
        told_other = choose_stated(rng)
        meeting = rng.choice((" and ", " next to ", " meets "))
        text += meeting + subject(cell.figures[1].character, told_other, rng)
    text = " ".join([*filter(None, [rng.choice(LAYOUT_WORDS.get(scene.layout, ("",)))]), text])
    if "action" in told:
        text += " " + rng.choice(ACTION_WORDS[figure.action])
    setting = []
    if "place" in told:
        places = [rng.choice(PLACE_WORDS[c.place]) for c in scene.cells]
        setting.append(" and ".join(places[: rng.choice((1, len(places)))] if len(places) > 1 else places))
    if "time" in told:
        setting.append(rng.choice(TIME_WORDS[cell.time]))
    if "weather" in told:
        setting.append(rng.choice(WEATHER_WORDS[cell.weather]))
    framing = [rng.choice(FRAMING_WORDS[scene.framing])] if "framing" in told else []
    framing += [rng.choice(POSITION_WORDS[scene.position])] if "position" in told else []
    front = bool(setting) and rng.random() < 0.15
    if front:
        text = f"{setting.pop()}, {text}"
    elif opening := rng.choice(OPENINGS):
        text = f"{opening} {text}"
    if rng.random() < 0.3:
        rng.shuffle(setting)
    text = " ".join([text, *setting])
    return Caption(", ".join([text, *framing]), frozenset(told), told_other)


def vocabulary() -> list[str]:
    """Every word captions are made of, sorted: what the model understands."""
    rng = random.Random(0)
    words: set[str] = set()
    for _ in range(6000):
        words |= set(describe(world.sample_scene(rng), rng).text.replace(",", " ").split())
    return sorted(words)
