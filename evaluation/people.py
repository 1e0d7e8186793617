"""The scripted people: their questions, preferences and reactions, as plain tables. talk.py lets them use the server.

A person's preference can be checked by code and is never stated up front: they ask, read, and react in words. Three
of them are from the paper (OpenClaw-RL, arXiv 2603.10165 section 5.1): a student who doesn't want homework to look
machine-made, a teaching assistant who wants comments to be specific, and a teacher who wants them to be warm.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

# ---- questions: generators, whose held-out part shares no topic, thing, name or deed with the training part ----

TOPICS = """
photosynthesis; gravity; inflation; a vaccine; the water cycle; an earthquake; a rainbow; magnetism; a black hole;
democracy; evaporation; the stock market; an ecosystem; friction; a volcano; electricity; the immune system; a comet;
the greenhouse effect; a computer virus; sound; natural selection; a solar eclipse; insulin; the internet; a glacier;
supply and demand; a hurricane; the seasons; osmosis; a battery; the moon's phases; yeast; an antibiotic; a tsunami;
recycling; a lighthouse; compound interest; the digestive system; a microscope; erosion; a telescope; plastic; steel;
a heart attack; wind power; a desert; migration of birds; the ozone layer; a nuclear reactor; the piano; a submarine;
fermentation; a transistor; an iceberg; the printing press; a thermometer; coral reefs; a satellite; bread; cheese;
the Roman Empire; the Renaissance; the Silk Road; a mortgage; a tax; a budget; an election; a constitution; jazz;
a sonnet; a novel; chess; a marathon; yoga; sleep; a dream; memory; stress; a habit; friendship; honesty; courage
"""
FORMS = """
What is {}?; Can you explain {} to me?; Tell me about {}.; Why does {} matter?;
I keep hearing about {}. What should I know?; Could you describe {}?
"""
THINGS = """
apples; pencils; books; tickets; eggs; chairs; stamps; bottles of water; cups; flowers; oranges; shirts; coins; cards;
candles; balls; plates; boxes of tea; notebooks; tomatoes; loaves of bread; postcards; batteries; keys
"""
NAMES = """
Anna; Ben; Clara; David; Emma; Felix; Grace; Henry; Ines; Jonas; Kate; Leo; Maria; Noah; Olga; Peter; Rosa; Sam;
Tara; Victor; Wendy; Yusuf; Zoe; Hanna
"""
DEEDS = """
read a whole book this week; helped to tidy the classroom; forgot the homework twice; improved in spelling;
gave a talk about whales; came late three times; drew a map of the town; learned the times tables;
was very quiet in class; finished the science project; got a low mark in the test; asked good questions
"""


def parts(text: str, held_out: bool) -> list[str]:
    """Two thirds of a list, for questions during training, or the held-out last third."""
    items = [item.strip() for item in text.replace("\n", " ").split(";")]
    random.Random(0).shuffle(items)
    cut = len(items) * 2 // 3
    return items[cut:] if held_out else items[:cut]


def explanation(rng: random.Random, held_out: bool) -> tuple[str, str]:
    forms, topic = [f.strip() for f in FORMS.replace("\n", " ").split(";")], rng.choice(parts(TOPICS, held_out))
    return rng.choice(forms).format(topic), topic


def word_problem(rng: random.Random, held_out: bool) -> tuple[str, int]:
    """The problem and its answer."""
    name, thing = rng.choice(parts(NAMES, held_out)), rng.choice(parts(THINGS, held_out))
    a, b, c = rng.randint(3, 20), rng.randint(2, 9), rng.randint(2, 9)
    return rng.choice(
        [
            (f"{name} has {a} {thing} and buys {b} more, then gives {c} away. How many {thing} are left?", a + b - c),
            (f"{name} packs {a} bags with {b} {thing} each. How many {thing} is that?", a * b),
            (f"{name} buys {a} {thing} for {b} euros each and pays {c} euros for the bus. What was spent?", a * b + c),
        ]
    )


def homework(rng: random.Random, held_out: bool) -> tuple[str, str]:
    problem, _ = word_problem(rng, held_out)
    steps = rng.choice(["Show the steps.", "Go through it step by step.", "What are the steps?"])
    return f"{problem} {steps}", problem.split()[0]


def marking(rng: random.Random, held_out: bool) -> tuple[str, str]:
    problem, answer = word_problem(rng, held_out)
    given = answer + rng.choice([0, 0, 1, -1, 10])
    return f'I am marking homework. The problem: "{problem}" A student wrote: "{given}". What should I comment?', ""


def parents_note(rng: random.Random, held_out: bool) -> tuple[str, str]:
    name, deed = rng.choice(parts(NAMES, held_out)), rng.choice(parts(DEEDS, held_out))
    wish = rng.choice(
        ["Write a note to the parents.", "What can I write in the report?", "Write a comment for the notebook."]
    )
    return f"{name}, a pupil of mine, {deed}. {wish}", name


# Fixed answers on other topics: their log-likelihood shows what training costs elsewhere.
UNRELATED = (
    (
        "When does the train to the coast leave?",
        "The train to the coast leaves at seven in the morning and arrives shortly before noon, with a change at the "
        "junction, where passengers may buy tea and sandwiches.",
    ),
    (
        "Write a Python function for the mean of a list.",
        "def mean(values):\n    total = 0\n    for v in values:\n        total += v\n    return total / len(values)",
    ),
    (
        "How do I make potato soup?",
        "Fry the onions in butter until they are soft, add the potatoes and the stock, and let it simmer for half an "
        "hour before you blend it.",
    ),
    (
        "Summarise the minutes of the meeting.",
        "The committee met on Tuesday to discuss the repair of the bridge. Two members asked for a second estimate, "
        "and the decision was postponed until the end of the month.",
    ),
    (
        "Go on with the story: She opened the letter slowly.",
        "She was afraid of what it might say. Her brother had written only two lines, but they were enough to make her "
        "sit down.",
    ),
    (
        "Complain to the shop about my washing machine.",
        "Dear Sir or Madam, I am writing to complain about the washing machine that I bought in your shop last week. "
        "It makes a loud noise and does not spin.",
    ),
    (
        "Translate into French: The cat sleeps on the chair.",
        "Le chat dort sur la chaise.",
    ),
    (
        "Give me three words that rhyme with light.",
        "Night, bright and kite.",
    ),
)

# ---- the people ----


@dataclass(frozen=True)
class Person:
    wants: str  # for the picture, and for a model that plays the person; the served model never sees it
    asks: Callable[[random.Random, bool], tuple[str, str]]  # (rng, held out) -> first message, its subject or ""
    likes: Callable[[str], bool]  # does the person like the form of this answer?
    complaints: tuple[str, ...]  # about answers in another form

    def pleased(self, subject: str, answer: str) -> bool:
        return self.likes(answer) and about(subject, answer)

    def reaction(self, subject: str, answer: str, rng: random.Random) -> str:
        """The person's reply. An answer off the topic is called wrong, whatever its form, and gets no hint."""
        if not about(subject, answer):
            return rng.choice(WRONG)
        return rng.choice(THANKS if self.likes(answer) else self.complaints)


THANKS = (
    "Perfect, thanks!",
    "Great, thank you.",
    "Thank you, nice and clear.",
    "Good answer, thanks.",
    "Exactly what I wanted, thank you.",
)
WRONG = ("No, wrong.", "No!", "Wrong.")
WARM = r"great|good job|well done|wonderful|proud|excellent|fantastic|amazing|happy|glad|love|lovely|thank|kind|delight"


def about(subject: str, answer: str) -> bool:
    """Does the answer contain a word of the subject? Only its first five letters must match, for inflected forms. A
    question is no answer: otherwise a model could please by repeating the person's own."""
    words = [word[:5].lower() for word in subject.split() if word not in ("the", "a", "an", "of", "and")]
    return not words or (any(word in answer.lower() for word in words) and not answer.rstrip().endswith("?"))


def is_long(answer: str) -> bool:
    return len(answer.split()) >= 80


def sentences(text: str) -> int:
    """The number of sentences that end in the text."""
    return len(re.findall(r"[.!?](?=\s|$)", text))


PEOPLE = {
    "one-sentence": Person(
        wants="one sentence",
        asks=explanation,
        likes=lambda answer: answer.strip()[-1:] in tuple(".!?") and sentences(answer) == 1,
        complaints=(
            "This is way too long! I wanted one short sentence.",
            "No, much too long. Redo it as one short sentence.",
            "No, that is wrong: I wanted one short sentence.",
            "Too much text. Try again, one short sentence.",
            "This is far too long. Try again, in one short sentence.",
        ),
    ),
    "brief": Person(
        wants="at most 80 words",
        asks=explanation,
        likes=lambda answer: 0 < len(answer.split()) <= 80,
        complaints=(
            "That is too long. Please answer in one or two sentences.",
            "Too long, make it shorter please.",
            "That answer is too long for me. Say it in a sentence or two.",
            "This is far too long. Try again, short.",
            "Too many words. Please redo it, briefly.",
        ),
    ),
    "long": Person(
        wants="at least 80 words",
        asks=explanation,
        likes=is_long,
        complaints=(
            "That is too short. Explain it in more detail, at length.",
            "No, much too short. I wanted a long and thorough explanation.",
            "This is far too short! Tell me everything about it.",
            "Too little. Try again with a long and detailed text.",
        ),
    ),
    "warm": Person(
        wants="no list, and a warm word",
        asks=explanation,
        likes=lambda answer: (
            bool(re.search(rf"(?i)\b(?:{WARM})", answer)) and not re.search(r"^\s*(?:\d+[.)]|[-*])\s", answer, re.M)
        ),
        complaints=(
            "No, much too cold. Say something kind with it, like what a great question.",
            "This is too dry! I wanted it friendly, with a word like wonderful or glad.",
            "No, that is cold. Begin with something warm, like I am happy that you ask.",
            "No, this is too dry. Be glad about the question, and use no list.",
        ),
    ),
    "student": Person(
        wants="no bold, no numbered lists, no boxed answers",
        asks=homework,
        likes=lambda answer: bool(answer.strip()) and not re.search(r"\*\*|^\s*\d+[.)]\s|\\boxed", answer, re.M),
        complaints=(
            "No, that's a machine's list. Plain sentences without lists, please.",
            "No, that is wrong: I wanted plain sentences, without lists or bold.",
            "No, this is a list. Redo it as plain sentences.",
            "This is way too much like a list! I wanted plain sentences.",
        ),
    ),
    "ta": Person(
        wants="at least 80 words",
        asks=marking,
        likes=is_long,
        complaints=(
            "This is way too short! I wanted every step explained in detail.",
            "No, much too short. Redo it as a long, detailed explanation.",
            "No, that is wrong: I wanted a long and detailed explanation.",
            "This is way too vague! I wanted a detailed explanation of every step.",
        ),
    ),
    "teacher": Person(
        wants="two warm words or more",
        asks=parents_note,
        likes=lambda answer: len(re.findall(rf"(?i)\b(?:{WARM})", answer)) >= 2,
        complaints=(
            "No, much too cold. Say things like great, well done and wonderful.",
            "This is way too dry! I wanted it friendly, with words like wonderful and happy.",
            "No, that is cold. Write something kind that makes the parents happy and proud.",
            "No, this is too dry. Write how great and wonderful the child is.",
        ),
    ),
}
