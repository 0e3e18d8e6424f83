"""Sentiment analysis: an LSTM reads reviews of films and says whether they are favourable.

The recipe is the classic one: lower-case the text, take the punctuation apart, number the words, then
embedding, LSTM and a logistic output. Trained plainly, the model learns its reviews by heart; dropout and a
penalty on the weights (L2) make it learn the rule instead. Both are shown.

Data: reviews that this program makes from a grammar; nothing is downloaded. A review passes judgement in
several clauses, with intensifiers ("truly", "a bit"), negations ("not at all", "nobody could call it") and
quotations of what others think, which do not count. Its label is the sign of the sum of what the clauses say,
so knowing which words occur is not enough. There are two baselines, both logistic regressions: one on the
bag of words, and a stronger one on words, pairs and triples of words.

    python examples/sentiment.py
    python examples/sentiment.py "The plot was not boring at all, and I truly enjoyed the music."
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from fusedlstm.keras import LSTM

VOCABULARY = 10_000  # words at most; 0 stands for no word, 1 for a word that is not known
PROGRESS = 1 if sys.stdout.isatty() else 2  # a bar on a terminal, a line an epoch elsewhere

# --- Data: reviews from a grammar -----------------------------------------------------------------------


def listed(text: str) -> list[str]:
    """What stands between the commas of a text."""
    return [part.strip() for part in text.split(",")]


GOOD = listed(
    """good, great, fine, superb, brilliant, delightful, charming, touching, gripping, clever, witty, funny,
    moving, elegant, thrilling, wonderful, excellent, fresh, original, convincing, memorable, impressive,
    inspired, enjoyable, lovely, remarkable, graceful, absorbing, splendid, subtle"""
)
BAD = listed(
    """bad, awful, poor, dreadful, boring, dull, tedious, clumsy, silly, stale, weak, lifeless, annoying,
    shallow, forgettable, terrible, horrible, lazy, confusing, predictable, unconvincing, painful, ugly,
    tiresome, messy, wooden, pointless, irritating, bland, sloppy"""
)
LIKE = listed("enjoyed, liked, loved, admired, praised, adored")
DISLIKE = listed("hated, disliked, detested, regretted, despised, loathed")
STRENGTHS = {"": 2, "very": 4, "truly": 4, "extremely": 4, "a bit": 1, "somewhat": 1, "rather": 1}
ASPECTS = listed(
    """plot, story, acting, music, dialogue, ending, cast, photography, script, pace, humour, editing,
    costumes, direction, soundtrack, scenery, beginning, hero, villain, romance"""
)
OTHERS = listed("my sister, the critics, most people, my neighbour, the newspapers, our friends")
LINKS = (". ", ", and ", ", but ", "; ", "! ", ", although ", ". Besides, ", ". Still, ")
FILLERS = listed(
    """I saw it on a rainy Tuesday, it lasts two hours, we sat in the second row, it was made in France,
    the cinema was half empty, I had read the book, it is the director's third film"""
)


class Clause(NamedTuple):
    text: str
    score: int  # what it adds to the judgement


def clause(random: np.random.Generator) -> Clause:
    """One clause of a review."""

    def pick(options: Sequence[str]) -> str:
        return options[random.integers(len(options))]

    sign = int(random.choice([-1, 1]))
    adjective, verb = (pick(GOOD), pick(LIKE)) if sign > 0 else (pick(BAD), pick(DISLIKE))
    strength = pick(list(STRENGTHS))
    described = f"{strength} {adjective}".strip()
    score = sign * STRENGTHS[strength]
    aspect = f"the {pick(ASPECTS)}"
    forms = [
        (f"{aspect} was {described}", score),
        (f"I {verb} {aspect}", sign * 2),
        (f"{aspect} was not {adjective} at all", -sign * 2),
        (f"nobody could call {aspect} {described}", -sign * 2),
        (f"{aspect} was anything but {adjective}", -sign * 2),
        (f"I never {verb} {aspect}", -sign * 2),
        (f"{pick(OTHERS)} {verb} {aspect}", 0),
        (f"{pick(OTHERS)} found {aspect} {described}", 0),
        (pick(FILLERS), 0),
    ]
    return Clause(*forms[random.integers(len(forms))])


def reviews(count: int, seed: int, wrong: float = 0.0) -> tuple[list[str], np.ndarray]:
    """Texts of reviews, and 1 for those that are favourable and 0 for those that are not, or the other way
    round for a share that is labelled wrongly."""
    random = np.random.default_rng(seed)
    texts, labels = [], []
    while len(texts) < count:
        clauses = [clause(random) for _ in range(random.integers(1, 6))]
        score = sum(part.score for part in clauses)
        if score == 0:
            continue
        text = clauses[0].text
        for part in clauses[1:]:
            text += LINKS[random.integers(len(LINKS))] + part.text
        texts.append(re.sub(r"(^|[.!] )([a-z])", lambda start: start[0].upper(), text) + ".")
        labels.append(score > 0)
    return texts, np.array(labels ^ (random.random(count) < wrong), "float32")


# --- From text to numbers -------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Lower-case words; marks of punctuation are words of their own."""
    return re.findall(r"[a-z0-9']+|[^\sa-z0-9']", text.lower())


def vocabulary(texts: Sequence[str]) -> dict[str, int]:
    """Numbers from 2 on for the most frequent words."""
    counts = Counter(word for text in texts for word in words_of(text))
    return {word: n for n, (word, _) in enumerate(counts.most_common(VOCABULARY - 2), 2)}


def encode(texts: Sequence[str], numbers: dict[str, int], length: int) -> np.ndarray:
    """The last `length` words of each text as numbers (texts, length), zeros before the shorter ones."""
    encoded = np.zeros((len(texts), length), "int32")
    for row, text in zip(encoded, texts):
        known = [numbers.get(word, 1) for word in words_of(text)][-length:]
        row[length - len(known) :] = known
    return encoded


# --- The baseline ---------------------------------------------------------------------------------------


def bag_of_words(
    texts: Sequence[str], labels: np.ndarray, new: Sequence[str], longest: int = 1
) -> np.ndarray:
    """Labels of new texts by logistic regression on the words, or on runs of words up to the longest."""
    counter = CountVectorizer(tokenizer=words_of, token_pattern=None, ngram_range=(1, longest))
    counts = counter.fit_transform(texts)
    return LogisticRegression(max_iter=2000).fit(counts, labels).predict(counter.transform(new))


# --- The model ------------------------------------------------------------------------------------------


def sentiment_model(units: int, dropout: float = 0.0, l2: float = 0.0) -> keras.Model:
    """The probability that a review is favourable."""
    model = keras.Sequential(
        [
            layers.Embedding(VOCABULARY, 128),
            layers.SpatialDropout1D(dropout),
            LSTM(units, kernel_regularizer=keras.regularizers.L2(l2), recurrent_dropout=dropout),
            layers.Dropout(dropout),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile(keras.optimizers.Adam(2e-3), "binary_crossentropy", metrics=["accuracy"])
    return model


# --- The program ----------------------------------------------------------------------------------------


def draw(path: str, histories: dict[str, dict[str, list[float]]], baselines: dict[str, float]) -> None:
    """Loss and accuracy after each epoch, in training and on reviews that are held out."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for n, (name, history) in enumerate(histories.items()):
        epochs = range(1, len(history["loss"]) + 1)
        for axis, key in zip(axes, ("loss", "accuracy")):
            axis.plot(epochs, history[key], "--", color=f"C{n}", label=f"{name}, training")
            axis.plot(epochs, history[f"val_{key}"], "o-", color=f"C{n}", label=f"{name}, held out")
    for style, (name, accuracy) in zip((":", "-."), baselines.items()):
        axes[1].axhline(accuracy, color="gray", linestyle=style, label=name)
    for axis, label in zip(axes, ("binary cross-entropy and penalty", "accuracy")):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program and return its figures: accuracies on reviews that are held out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "The plot was anything but boring, and I never disliked the music."
    parser.add_argument("sentence", nargs="?", default=default, help="to be judged at the end")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--reviews", type=int, default=3000, help="to learn from; as many are held out")
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--words", type=int, default=50, help="of a review that the model reads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", metavar="FILE", help="save loss and accuracy after each epoch")
    options = parser.parse_args(argv)
    keras.utils.set_random_seed(options.seed)

    texts, labels = reviews(options.reviews, seed=1, wrong=1 / 8)
    new_texts, new_labels = reviews(options.reviews, seed=2)
    numbers = vocabulary(texts)
    x, x_new = (encode(some, numbers, options.words) for some in (texts, new_texts))
    print(f"{len(texts)} reviews made to learn from, {len(new_texts)} held out, {len(numbers)} words")
    for text, label in list(zip(texts, labels))[:2]:
        print(f"\n{text}\nfavourable: {'yes' if label else 'no'}")

    histories = {}
    for name, treatment in {"plain": {}, "dropout and L2": {"dropout": 0.3, "l2": 1e-4}}.items():
        print(f"\nLSTM, {name}")
        model = sentiment_model(options.units, **treatment)
        histories[name] = model.fit(
            x, labels, 32, options.epochs, validation_data=(x_new, new_labels), verbose=PROGRESS
        ).history

    accuracies = {f"LSTM, {name}": history["val_accuracy"][-1] for name, history in histories.items()}
    baselines = {
        name: float((bag_of_words(texts, labels, new_texts, longest) == new_labels).mean())
        for name, longest in (("bag of words", 1), ("bag of words, pairs and triples", 3))
    }
    print("\naccuracy on held-out reviews")
    for name, accuracy in (accuracies | baselines).items():
        print(f"{name:32}{accuracy:.3f}")
    probability = float(model.predict(encode([options.sentence], numbers, options.words), verbose=0)[0, 0])
    print(f"\n{options.sentence}\nfavourable with probability {probability:.3f}")
    if options.picture:
        draw(options.picture, histories, baselines)
    return {
        "accuracy, LSTM with dropout and L2": accuracies["LSTM, dropout and L2"],
        **{f"accuracy, {name}": baselines[name] for name in reversed(baselines)},  # the stronger first
        "accuracy, LSTM without": accuracies["LSTM, plain"],
    }


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name}: {figure:.3f}")
