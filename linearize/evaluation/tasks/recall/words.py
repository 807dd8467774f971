"""Words for keys and values: common, short, and unlike each other. RULER takes its own from the package wonderwords."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

_ADJECTIVES = """
    able amber ancient angry bare bitter blank bold brave brief bright broad broken calm careful cheap clean clear
    clever cold common complex cruel curious dark dear deep distant double dry dull eager early easy empty equal exact
    faint fair false famous fast fierce final firm flat formal fragile free fresh gentle giant glad golden grand grave
    great handsome happy harsh heavy hidden hollow honest huge humble idle kind large late lazy light little lonely
    long loud lucky mellow mild modern narrow neat noble odd open pale patient plain polite proud pure quick quiet rapid
    rare rich rough round rural sad sharp shy silent silver simple slim slow small smooth soft solid sour steep stern
    strange strong sudden sweet tall tender thick thin tidy tiny tired upper useful vague vast vivid warm weak wet
    wide wild wise wooden young
"""
_NOUNS = """
    actor anchor apple arrow artist badge bakery banana bank barrel basket beach bell bird blanket boat bone book
    bottle bowl box branch bread brick bridge brush bucket butter button cabin cable camera candle canyon captain card
    carpet castle chain chair chalk cheese cherry circle cliff clock cloud coast coffee coin copper corner cotton
    cousin cradle crown cup curtain desert desk diamond dinner doctor dragon drawer dream drum eagle engine farmer
    feather fence field finger flag flame flower forest fork fountain fox garden garlic glass glove grape guitar hammer
    harbor hat helmet hill honey horse hotel island jacket jewel jungle kettle key kitchen kite knife ladder lake lamp
    leaf lemon letter library lion lock magnet maple marble market mask meadow mirror monkey moon mountain mouse museum
    needle nest ocean office onion orange orchard oven owl paint palace paper parrot pencil pepper piano picture pillow
    pilot planet plate pocket poem pond potato prince puzzle queen rabbit radio rain river road robot rocket roof rope
    rose saddle sailor salad salt sand school seed shadow sheep shell ship shirt shoe shop sister soldier song soup
    spider spoon square stable star station statue stone storm street sugar summer sunset table teacher temple thunder
    ticket tiger tower train tree tunnel turtle uncle valley village violin wagon wallet water whale wheel window winter
    wolf wood wool zebra
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())


def unique_keys(rng: Random, count: int) -> list[str]:
    """`count` different keys such as `vivid-harbor`; with one more adjective each where so many would not differ."""
    adjectives = 1
    while count > len(ADJECTIVES) ** adjectives * len(NOUNS) // 2:
        adjectives += 1
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys["-".join([*rng.choices(ADJECTIVES, k=adjectives), rng.choice(NOUNS)])] = None
    return list(keys)
