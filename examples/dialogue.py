"""Dialogue: the encoder and decoder of translation.py answer questions about the time.

    - The bread takes three quarters of an hour. When will it be done if it goes in at ten to nine pm?
    - 20:50 and 45 minutes make 21:35.

The model is that of translation.py; here it reads words and writes words and numbers. Nothing tells it what a
clock is: that a quarter to seven in the evening is 18:45, and how to add and take minutes, it has to find in
the examples. Answers first say again what was asked: a sum is easier with both numbers written down.

Data: requests and answers that the program makes, from half a dozen patterns with many ways to say a time.
For the test it is asked questions that never occurred in training, in any wording, and only an answer that
is right in every word counts. The baseline gives the answer to the most similar question known, by TF-IDF
over words and pairs of words, as programs for answering frequent questions do.

    python examples/dialogue.py
    python examples/dialogue.py --ask "remind me to call anna on friday at half past four in the afternoon"
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from num2words import num2words
from sklearn.feature_extraction.text import TfidfVectorizer
from translation import Tokens, Translator, accuracy, draw_attention

STEP = 5  # minutes: all times of the day are multiples
HOUR, DAY = 60, 24 * 60
QUARTER, LONGEST = HOUR // 4, 2 * HOUR  # all things take multiples of the one, the other at most
TASKS = ("wake you", "call anna", "water the plants", "take the bus", "feed the cat", "leave")
DAYS = ["today", "tomorrow", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
BAKED = ("bread", "cake", "pizza", "lasagne")
EVENTS = ("film", "train ride", "meeting", "concert")

# --- Data: what is asked and what is answered -----------------------------------------------------------


def pick(random: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[random.integers(len(choices))]


def clock(minute: int) -> str:
    """A minute of the day as a digital clock shows it."""
    return f"{minute // HOUR:02}:{minute % HOUR:02}"


def spoken_time(minute: int, random: np.random.Generator) -> str:
    """A minute of the day as people say it, in one of several ways."""
    if minute % (DAY // 2) == 0 and random.random() < 0.5:
        return "noon" if minute else "midnight"
    hour, past = divmod(minute, HOUR)
    part = ("at night", "in the morning", "in the afternoon", "in the evening")[
        int(np.searchsorted((4, 12, 18), hour, "right"))
    ]
    part = pick(random, [part, "am" if hour < 12 else "pm"])
    this, following = (num2words((h - 1) % 12 + 1) for h in (hour, hour + 1))
    if past == 0:
        return f"{this} {part}" if part in ("am", "pm") else f"{this} o'clock {part}"
    digits = f"{this} {'oh ' if past < 10 else ''}{num2words(past).replace('-', ' ')}"
    count = {15: "a quarter", 30: "half"}
    if past <= 30:
        text = f"{count.get(past, num2words(past))} past {this}"
    else:
        text = f"{count.get(HOUR - past, num2words(HOUR - past)).replace('-', ' ')} to {following}"
    return f"{pick(random, [digits, text.replace('-', ' ')])} {part}"


def spoken_duration(minutes: int, random: np.random.Generator) -> str:
    """Some minutes as people say them, in one of several ways."""
    hours, rest = divmod(minutes, HOUR)
    plain = {0: "", 1: "an hour", 2: "two hours"}[hours]
    if rest:
        plain = " and ".join(filter(None, [plain, num2words(rest).replace("-", " ") + " minutes"]))
    special = {15: "a quarter of an hour", 30: "half an hour", 45: "three quarters of an hour"}
    special |= {75: "an hour and a quarter", 90: "an hour and a half"}
    return pick(random, [plain, special.get(minutes, plain)])


def exchange(random: np.random.Generator) -> tuple[tuple[object, ...], str, str]:
    """What is meant, how it is asked, and the answer."""
    kind = pick(random, ["reminder", "ready", "length"])
    start = STEP * int(random.integers(DAY // STEP))
    if kind == "reminder":
        task, day = pick(random, TASKS), pick(random, DAYS)
        date = f"on {day}" if day.endswith("day") and day != "today" else day
        when = f"at {spoken_time(start, random)}"
        when = pick(random, [f"{when} {date}", f"{date} {when}"])
        order = "wake me" if task == "wake you" else f"remind me to {task}"
        question = f"{pick(random, ['', 'please ', 'could you '])}{order} {when}"
        if task == "wake you":
            return (kind, start, task, day), question, f"I will wake you {date} at {clock(start)}."
        return (kind, start, task, day), question, f"I will remind you to {task} {date} at {clock(start)}."
    minutes = QUARTER * int(random.integers(1, LONGEST // QUARTER + 1))
    duration, end = spoken_duration(minutes, random), (start + minutes) % DAY
    first, last = spoken_time(start, random), spoken_time(end, random)
    if kind == "ready":
        thing = pick(random, BAKED)
        questions = [
            f"i put the {thing} in at {first} and it takes {duration} when is it ready",
            f"the {thing} takes {duration} when will it be done if it goes in at {first}",
        ]
        answer = f"{clock(start)} and {minutes} minutes make {clock(end)}."
        return (kind, start, minutes), pick(random, questions), answer
    thing = pick(random, EVENTS)
    questions = [
        f"how long is the {thing} from {first} to {last}",
        f"the {thing} starts at {first} and ends at {last} how long does it take",
    ]
    answer = f"{clock(start)} to {clock(end)} makes {minutes} minutes."
    return (kind, start, minutes), pick(random, questions), answer


def exchanges(count: int, random: np.random.Generator) -> tuple[list[str], list[str]]:
    """Questions and their answers; none means the same as another."""
    found: dict[tuple[object, ...], tuple[str, str]] = {}
    while len(found) < count:
        meaning, question, answer = exchange(random)
        found[meaning] = (question, answer)
    questions, answers = zip(*found.values())
    return list(questions), list(answers)


def words(question: str) -> Tokens:
    return tuple(re.findall(r"[a-z']+", question.lower()))


def pieces(answer: str) -> Tokens:
    """Words with the space before them, numbers and signs: together they are the answer again."""
    return tuple(re.findall(r" ?\w+|\W", answer))


# --- The baseline ---------------------------------------------------------------------------------------


def most_similar(known: Sequence[str], asked: Sequence[str]) -> list[int]:
    """For each question that is asked, the place of the one among those known that is most like it."""
    vectors = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"[a-z']+")
    similarity = vectors.fit_transform(known) @ vectors.transform(asked).T  # (known, asked), sparse
    return [int(n) for n in np.asarray(similarity.argmax(axis=0)).ravel()]


# --- The program ----------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ask", help="a question to answer at the end")
    parser.add_argument("--questions", type=int, default=6000, help="for training")
    parser.add_argument("--unseen", type=int, default=500, help="questions for the test")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--beam", type=int, default=4, help="width of the search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", metavar="FILE", help="save the attention of an answer")
    options = parser.parse_args(argv)
    keras.utils.set_random_seed(options.seed)

    end = options.questions
    questions, answers = exchanges(end + options.unseen, np.random.default_rng(options.seed))
    sources, targets = [words(q) for q in questions], [pieces(a) for a in answers]
    print(f"{end} questions with answers, such as")
    for question, answer in list(zip(questions, answers))[:3]:
        print(f"- {question}\n- {answer}")

    model = Translator(sources[:end], targets[:end], options.units)
    model.fit(sources[:end], targets[:end], options.epochs, options.batch)

    unseen, right = sources[end:], targets[end:]
    similar = [targets[n] for n in most_similar(questions[:end], questions[end:])]
    figures = {
        "right answers, beam search": accuracy(model.translate(unseen, options.beam), right),
        "right answers, most similar question": accuracy(similar, right),
        "right answers, greedy": accuracy(model.translate(unseen), right),
    }
    for name, value in figures.items():
        print(f"{name:37} {value:6.1%}")

    asked = words(options.ask) if options.ask else unseen[0]
    answer = model.translate([asked], options.beam)[0]
    print(f"- {' '.join(asked)}\n- {''.join(answer)}")
    if options.picture:
        draw_attention(model.attention(asked, answer), asked, (*answer, "(end)"), options.picture)
    return figures


if __name__ == "__main__":
    main()
