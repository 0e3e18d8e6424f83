"""Summarising: an encoder and a decoder that can copy write one line about the report of a match.

The model is that of translation.py with one thing more: at each word the decoder either writes from its
vocabulary or copies a word from the place of the text that it looks at (the pointer-generator network of See,
Liu & Manning, 2017). A report is full of names that never occurred before. Those are numbered as they come
within a text, so that the model sees which of them are the same, and has to copy them.

Data: reports that this program makes from a grammar; nothing is downloaded. To write the line one has to find
the teams, leave out chances and goals that did not count, count the others, and find the last goal of the
winner. All names in the test are new. The baseline is the lead, the first sentence of the report, which is
hard to beat in news; ROUGE-L (Lin, 2004) is the harmonic mean of the shares of the longest common
subsequence of words in what is written and in what is right.

    python examples/summarise.py
    python examples/summarise.py --report 3 --picture attention.png
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from keras import layers, ops
from translation import (
    Tokens,
    Translator,
    Vocabulary,
    accuracy,
    attending,
    draw_attention,
    encoder_model,
)

NAMES = 12  # different names in a text, at most
LONGEST = 14  # words of a line

# --- Data: reports and lines ----------------------------------------------------------------------------

SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeio"]
ENDINGS = ("n", "r", "s", "ck", "ll", "x")
WEATHER = ("on a cold evening", "in the rain", "under a clear sky", "in a strong wind", "on a dry field")
PEOPLE = ("the crowd sang", "the field was wet", "many came late", "the lights went out for a while")


def name(random: np.random.Generator) -> str:
    """A name that nobody has."""
    return "".join(random.choice(SYLLABLES, random.integers(2, 4))).capitalize() + random.choice(ENDINGS)


def names(count: int, random: np.random.Generator) -> list[str]:
    """Different names."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[name(random)] = None
    return list(found)


def report(random: np.random.Generator) -> tuple[str, str]:
    """The report of a match, and the line about it."""

    def pick(options: Sequence[str]) -> str:
        return options[random.integers(len(options))]

    place, *teams = names(3, random)
    players = [names(2, random) for _ in teams]
    order = random.permutation(2)
    sentences = [f"{pick(WEATHER)} {teams[order[0]]} met {teams[order[1]]} in {place} ."]
    score, scorer = [0, 0], ["", ""]
    for _ in range(random.integers(1, 5)):
        if random.random() < 0.4:
            sentences.append(f"{pick(PEOPLE)} .")
        side = random.integers(2)
        team, player = teams[side], pick(players[side])
        if random.random() < 0.25:
            sentences.append(
                pick([f"{player} of {team} hit the post .", f"a goal by {player} of {team} did not count ."])
            )
            continue
        score[side] += 1
        scorer[side] = player
        sentences.append(
            pick(
                [
                    f"{player} scored for {team} .",
                    f"{team} had a goal by {player} .",
                    f"then {player} of {team} found the net .",
                ]
            )
        )
    first = int(np.argmax(score))
    if score[0] == score[1]:
        first = order[0]
        line = f"{teams[first]} and {teams[1 - first]} drew {score[0]} all"
    else:
        result = f"{score[first]} to {score[1 - first]}"
        line = f"{teams[first]} beat {teams[1 - first]} {result} through {scorer[first]}"
    return " ".join(sentences), f"{line} ."


def numbered(text: Tokens, line: Tokens, known: set[str]) -> tuple[Tokens, Tokens, list[str]]:
    """Text and line with numbers in the place of words that are not known, and those words in their order."""
    found = list(dict.fromkeys(token for token in text if token not in known))
    numbers = {token: f"<{n % NAMES}>" for n, token in enumerate(found)}
    text, line = (tuple(numbers.get(token, token) for token in tokens) for tokens in (text, line))
    return text, line, found


def named(line: Tokens, found: Sequence[str]) -> Tokens:
    """A line with words in the place of their numbers."""
    words = {f"<{n}>": token for n, token in enumerate(found)}
    return tuple(words.get(token, token) for token in line)


# --- The model ------------------------------------------------------------------------------------------


def copying_model(tokens: int, units: int) -> keras.Model:
    """As the decoder of translation.py; what comes next is written, or copied from where it looks."""
    inputs, y, attention = attending(tokens, units)
    copies = layers.Dense(1, activation="sigmoid")(y)
    places = ops.one_hot(inputs[1], tokens)  # (B, S, tokens)
    written = layers.Dense(tokens, activation="softmax")(y)
    probabilities = (1 - copies) * written + copies * ops.matmul(attention, places)
    return keras.Model(inputs, [ops.log(probabilities + 1e-9), attention], name="decoder")


class Summariser(Translator):
    """A translator from a language into the same one, which can copy."""

    def __init__(self, known: Sequence[str], units: int) -> None:
        self.read = self.write = Vocabulary([tuple(known), tuple(f"<{n}>" for n in range(NAMES))])
        self.longest = LONGEST
        self.encoder = encoder_model(len(self.read), units)
        self.decoder = copying_model(len(self.read), units)


# --- How good a summary is ------------------------------------------------------------------------------


def common(a: Tokens, b: Tokens) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for token in a:
        diagonal = 0
        for n, other in enumerate(b, 1):
            diagonal, row[n] = row[n], diagonal + 1 if token == other else max(row[n], row[n - 1])
    return row[-1]


def rouge(found: Sequence[Tokens], right: Sequence[Tokens]) -> float:
    """The mean ROUGE-L."""
    return float(np.mean([2 * common(a, b) / (len(a) + len(b)) for a, b in zip(found, right, strict=True)]))


def lead(text: Tokens) -> Tokens:
    """The first sentence."""
    return text[: text.index(".") + 1]


# --- The program ----------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program and return its figures: ROUGE-L and the share of lines that are right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", type=int, default=0, help="number of the report to show at the end")
    parser.add_argument("--reports", type=int, default=4000, help="for training")
    parser.add_argument("--unseen", type=int, default=500, help="reports for the test")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--beam", type=int, default=4, help="width of the search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", metavar="FILE", help="save the attention of a line")
    options = parser.parse_args(argv)
    if not 0 <= options.report < options.unseen:
        parser.error(f"--report must be from 0 to {options.unseen - 1}, got {options.report}")
    keras.utils.set_random_seed(options.seed)

    random = np.random.default_rng(options.seed)
    made = [report(random) for _ in range(options.reports + options.unseen)]
    print(f"{options.reports} reports to learn from, such as\n{made[0][0]}\n-> {made[0][1]}")
    pairs = [(tuple(text.split()), tuple(line.split())) for text, line in made]
    # a name has a capital, and so it is told from a word however often it occurs
    known = {token for pair in pairs for tokens in pair for token in tokens if not token[0].isupper()}
    sources, targets, words = zip(*(numbered(*pair, known) for pair in pairs))
    end = options.reports

    model = Summariser(sorted(known), options.units)
    model.fit(sources[:end], targets[:end], options.epochs, options.batch)

    right = [line for _, line in pairs[end:]]
    written = {
        name: [named(*both) for both in zip(model.translate(sources[end:], width), words[end:])]
        for name, width in (("beam search", options.beam), ("greedy", 1))
    }
    leads = [lead(text) for text, _ in pairs[end:]]
    figures = {
        "ROUGE-L, beam search": rouge(written["beam search"], right),
        "ROUGE-L, lead": rouge(leads, right),
        "right lines, beam search": accuracy(written["beam search"], right),
        "right lines, greedy": accuracy(written["greedy"], right),
    }
    for name, value in figures.items():
        print(f"{name:28}{value:6.1%}")

    shown = end + options.report
    line = written["beam search"][options.report]
    print(f"\n{made[shown][0]}\n-> {' '.join(line)}")
    if options.picture:
        target = model.translate([sources[shown]], options.beam)[0]
        weights = model.attention(sources[shown], target)
        draw_attention(weights, pairs[shown][0], (*line, "(end)"), options.picture)
    return figures


if __name__ == "__main__":
    main()
