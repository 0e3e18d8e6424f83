"""Text classification: two stacked LSTMs say which module of the standard library a line comes from.

Lower-case the line, take words and punctuation apart, number them, then embedding, LSTM(128) that hands on
every step, LSTM(64) that hands on the last, and a softmax over the modules.

Data: the lines of ten modules of Python's standard library, code and comments and documentation, as they are
installed; nothing is downloaded. Each different line is kept once, and a fifth of the lines is held out. The
baseline is logistic regression on the bag of words, which sees the same words without their order. It is hard
to beat: the words of a line tell most of where it is from, their order one or two lines of a hundred.

    python examples/text_classification.py
    python examples/text_classification.py "self.pen(fillcolor=color)"
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from keras import layers
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay

from fusedlstm.keras import LSTM

MODULES = ("argparse", "doctest", "inspect", "mailbox", "pickletools", "_pydecimal", "subprocess", "tarfile",
           "turtle", "typing")  # fmt: skip
VOCABULARY = 4000  # words at most; 0 stands for no word, 1 for a word that is not known
PROGRESS = 1 if sys.stdout.isatty() else 2  # a bar on a terminal, a line an epoch elsewhere

# --- Data: lines and the modules that they come from ----------------------------------------------------


def words_of(line: str) -> list[str]:
    """Lower-case words, the parts of a name apart, and every other mark as a word of its own."""
    return re.findall(r"[a-z]+|[^\sa-z]", line.lower())


def read_lines(shortest: int = 4) -> tuple[list[str], np.ndarray]:
    """Different lines of so many words or more, in a fixed random order, and their places in MODULES."""
    pairs = []
    for label, name in enumerate(MODULES):
        source = (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8")
        lines = dict.fromkeys(line.strip() for line in source.splitlines())
        pairs += [(line, label) for line in lines if len(words_of(line)) >= shortest]
    order = np.random.default_rng(0).permutation(len(pairs))
    lines, labels = zip(*(pairs[n] for n in order))
    return list(lines), np.array(labels)


def vocabulary(lines: Sequence[str]) -> dict[str, int]:
    """Numbers from 2 on for the most frequent words."""
    counts = Counter(word for line in lines for word in words_of(line))
    return {word: n for n, (word, _) in enumerate(counts.most_common(VOCABULARY - 2), 2)}


def encode(lines: Sequence[str], numbers: dict[str, int], length: int) -> np.ndarray:
    """The first `length` words of each line as numbers (lines, length), zeros before the shorter ones."""
    encoded = np.zeros((len(lines), length), "int32")
    for row, line in zip(encoded, lines):
        known = [numbers.get(word, 1) for word in words_of(line)][:length]
        row[length - len(known) :] = known
    return encoded


# --- The baseline ---------------------------------------------------------------------------------------


def bag_of_words(lines: Sequence[str], labels: np.ndarray, new: Sequence[str]) -> np.ndarray:
    """Labels of new lines by logistic regression on the counts of words."""
    counter = CountVectorizer(tokenizer=words_of, token_pattern=None)
    return (
        LogisticRegression(max_iter=1000)
        .fit(counter.fit_transform(lines), labels)
        .predict(counter.transform(new))
    )


# --- The model ------------------------------------------------------------------------------------------


def classification_model(classes: int) -> keras.Model:
    """Probabilities of the modules."""
    model = keras.Sequential(
        [
            layers.Embedding(VOCABULARY, 300),
            layers.Dropout(0.5),
            LSTM(128, return_sequences=True),
            layers.Dropout(0.5),
            LSTM(64),
            layers.Dropout(0.5),
            layers.Dense(classes, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


# --- The program ----------------------------------------------------------------------------------------


def draw(path: str, truth: np.ndarray, answers: np.ndarray, history: dict, baseline: float) -> None:
    """Accuracy after each epoch, and the confusion matrix."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", width_ratios=(2, 3))
    epochs = range(1, len(history["accuracy"]) + 1)
    left.plot(epochs, history["accuracy"], "--", color="C0", label="LSTM, training (with dropout)")
    left.plot(epochs, history["val_accuracy"], "o-", color="C0", label="LSTM, held out")
    left.axhline(baseline, color="gray", linestyle=":", label="bag of words, held out")
    left.set(xlabel="epoch", ylabel="accuracy")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    ConfusionMatrixDisplay.from_predictions(
        truth,
        answers,
        labels=range(len(MODULES)),
        display_labels=MODULES,
        normalize="true",
        values_format=".2f",
        cmap="Blues",
        xticks_rotation=45,
        colorbar=False,
        ax=right,
    )
    right.set(title="share of each module's lines", xlabel="module given", ylabel="true module")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program and return its figures: accuracies on lines that are held out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "Return the signature of the callable object."
    parser.add_argument("line", nargs="?", default=default, help="to be classified at the end")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--lines", type=int, help="to use; default: all")
    parser.add_argument("--words", type=int, default=32, help="of a line that the model reads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", metavar="FILE", help="save accuracies and confusion matrix")
    options = parser.parse_args(argv)
    keras.utils.set_random_seed(options.seed)

    lines, labels = read_lines()
    lines, labels = lines[: options.lines], labels[: options.lines]
    end = len(lines) * 4 // 5
    numbers = vocabulary(lines[:end])
    x = encode(lines, numbers, options.words)
    print(
        f"{end:,} lines of {len(MODULES)} modules to learn from, {len(lines) - end:,} held out; for example"
    )
    for line, label in list(zip(lines, labels))[:3]:
        print(f"    {MODULES[label]:12}{line}")

    model = classification_model(len(MODULES))
    history = model.fit(
        x[:end], labels[:end], 64, options.epochs, validation_data=(x[end:], labels[end:]), verbose=PROGRESS
    ).history

    truth = labels[end:]
    answers = model.predict(x[end:], 256, verbose=0).argmax(-1)
    figures = {
        "accuracy, stacked LSTM": float((answers == truth).mean()),
        "accuracy, bag of words": float(
            (bag_of_words(lines[:end], labels[:end], lines[end:]) == truth).mean()
        ),
        "accuracy, most frequent module": float((np.bincount(labels[:end]).argmax() == truth).mean()),
    }
    probabilities = model.predict(encode([options.line], numbers, options.words), verbose=0)[0]
    print(f"\n{options.line}")
    for label in probabilities.argsort()[:-4:-1]:
        print(f"    {MODULES[label]:12}{probabilities[label]:.3f}")
    if options.picture:
        draw(options.picture, truth, answers, history, figures["accuracy, bag of words"])
    return figures


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name}: {figure:.3f}")
