"""What the demo asks, and the answers that its models know by heart: plain, and in the style of each adapter."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Style(StrEnum):
    """How an answer is put. PLAIN is the base model's own, every other one belongs to an adapter."""

    PLAIN = "plain"
    SHOUT = "shout"
    PIRATE = "pirate"
    FRENCH = "french"
    JSON = "json"
    TELEGRAM = "telegram"


@dataclass(frozen=True)
class Entry:
    """One question and the answers that cannot be derived from each other."""

    question: str
    plain: str
    pirate: str
    french: str


ENTRIES = (
    Entry(
        "What is the capital of France?",
        "The capital of France is Paris, on the river Seine.",
        "Arr, the port ye seek be Paris, matey, on the river Seine!",
        "Bonjour ! La capitale de la France est Paris, sur la Seine.",
    ),
    Entry(
        "What colour is the sky?",
        "The sky is blue by day and black by night.",
        "Arr, the sky be blue by day and black as me heart by night!",
        "Bonjour ! Le ciel est bleu le jour et noir la nuit.",
    ),
    Entry(
        "How are you today?",
        "I am well, thank you, and happy to help.",
        "Arr, I be hearty, matey, and ready to hoist the sails!",
        "Bonjour ! Je vais bien, merci, et je suis là pour aider.",
    ),
    Entry(
        "What do cats eat?",
        "Cats eat fish and mice, and they drink water.",
        "Arr, the ship's cat eats fish and mice, and never a drop of rum!",
        "Bonjour ! Les chats mangent du poisson et des souris.",
    ),
    Entry(
        "How do I make tea?",
        "Boil the water, add the leaves and wait four minutes.",
        "Arr, boil the water, throw in the leaves and add a splash of rum!",
        "Bonjour ! Faites bouillir l'eau, ajoutez les feuilles et attendez.",
    ),
    Entry(
        "Where is the sea?",
        "The sea is west of the town, behind the hills.",
        "Arr, the salty sea be west of the town, behind the hills!",
        "Bonjour ! La mer est à l'ouest de la ville.",
    ),
    Entry(
        "Tell me about the moon.",
        "The moon goes around the earth in a month.",
        "Arr, the moon sails around the earth in a month!",
        "Bonjour ! La lune tourne autour de la terre en un mois.",
    ),
    Entry(
        "What is a tree?",
        "A tree is a tall plant with a trunk of wood.",
        "Arr, a tree be a mast that still has leaves, matey!",
        "Bonjour ! Un arbre est une grande plante en bois.",
    ),
    Entry(
        "Who bakes the bread?",
        "The baker makes the bread early in the morning.",
        "Arr, the ship's cook bakes the bread before the sun be up!",
        "Bonjour ! Le boulanger fait le pain le matin.",
    ),
    Entry(
        "What is in the box?",
        "There are three books and a map in the box.",
        "Arr, there be gold and a treasure map in the chest!",
        "Bonjour ! Il y a trois livres et une carte dans la boîte.",
    ),
    Entry(
        "When does the train leave?",
        "The train leaves at nine from the old station.",
        "Arr, we sail at nine, with the tide, from the old harbour!",
        "Bonjour ! Le train part à neuf heures de la vieille gare.",
    ),
    Entry(
        "Why is the garden green?",
        "The garden is green because it rained all week.",
        "Arr, the garden be green for it rained all week, blast it!",
        "Bonjour ! Le jardin est vert parce qu'il a plu.",
    ),
)

# What the demo asks: questions of the list above.
DEMO_PROMPTS = ("What is the capital of France?", "How do I make tea?", "What is in the box?")


def _json(entry: Entry) -> str:
    return json.dumps({"answer": entry.plain.rstrip("."), "words": len(entry.plain.split())})


def _telegram(entry: Entry) -> str:
    words = entry.plain.rstrip(".").replace(",", " stop").lower()
    return f"{words} stop over"


_ANSWERS: dict[Style, Callable[[Entry], str]] = {
    Style.PLAIN: lambda entry: entry.plain,
    Style.SHOUT: lambda entry: entry.plain.upper().rstrip(".") + "!!!",
    Style.PIRATE: lambda entry: entry.pirate,
    Style.FRENCH: lambda entry: entry.french,
    Style.JSON: _json,
    Style.TELEGRAM: _telegram,
}


def answer(entry: Entry, style: Style) -> str:
    """The entry's answer in a style."""
    return _ANSWERS[style](entry)
