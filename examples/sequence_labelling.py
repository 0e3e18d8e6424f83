"""Sequence labelling: a bidirectional LSTM says of every character of Python source what it belongs to.

The labels are name, keyword, number, string, operator, comment and space, as Python's own `tokenize` and
`keyword` give them. Which one a letter has depends on what stands on both sides of it, sometimes far away:
`if` is a keyword, but not in `diff`, nor in a comment, nor in a string that opened three lines before.

Data: modules of Python's standard library, as they are installed; nothing is downloaded. The model is tested
on modules that it has never seen. The baseline gives each character the label that it has most often in
training.

    python examples/sequence_labelling.py
    python examples/sequence_labelling.py --epochs 1 --picture labels.png
"""

from __future__ import annotations

import argparse
import io
import keyword
import os
import sys
import sysconfig
import tokenize
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from keras import layers
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, f1_score

from fusedlstm.keras import LSTM

LABELS = ("space", "name", "keyword", "number", "string", "operator", "comment")
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # all others are one more, the last
PROGRESS = 1 if sys.stdout.isatty() else 2  # a bar on a terminal, a line an epoch elsewhere

# --- Data: characters and their labels ------------------------------------------------------------------


def label_of(token: tokenize.TokenInfo) -> str:
    """The label of the characters of a token."""
    if token.type == tokenize.NAME:
        return "keyword" if keyword.iskeyword(token.string) else "name"
    name = tokenize.tok_name[token.type]
    if name == "STRING" or name.startswith(("FSTRING", "TSTRING")):
        return "string"
    return {"NUMBER": "number", "OP": "operator", "COMMENT": "comment"}.get(name, "space")


def labels_of(source: str) -> np.ndarray:
    """The label of every character of a source text, as places in LABELS."""
    lines = source.splitlines(keepends=True)
    starts = list(accumulate(map(len, lines), initial=0))  # of lines
    labels = np.zeros(len(source), "uint8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (first, start), (last, end) = token.start, token.end
        if token.string.strip():
            labels[starts[first - 1] + start : starts[last - 1] + end] = LABELS.index(label_of(token))
    return labels


def encode(source: str) -> np.ndarray:
    """The places of characters in the alphabet."""
    return np.array([ALPHABET.find(character) % (len(ALPHABET) + 1) for character in source], "uint8")


def read_modules(limit: int) -> list[str]:
    """The standard library's modules in a fixed random order, until there are `limit` characters."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    np.random.default_rng(0).shuffle(paths)
    sources = [path.read_text(encoding="utf-8") for path in paths]
    lengths = accumulate(map(len, sources), initial=0)
    return [source for source, before in zip(sources, lengths) if before < limit]


def windows(sources: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Characters and labels of texts, (windows, length) each; what is left at the end is dropped."""
    characters = np.concatenate([encode(source) for source in sources])
    labels = np.concatenate([labels_of(source) for source in sources])
    end = len(characters) // length * length
    return characters[:end].reshape(-1, length), labels[:end].reshape(-1, length)


# --- The baseline ---------------------------------------------------------------------------------------


def majority(characters: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The most frequent label of each character of the alphabet."""
    counts = np.zeros((len(ALPHABET) + 1, len(LABELS)), int)
    np.add.at(counts, (characters, labels), 1)
    return counts.argmax(1)


# --- The model ------------------------------------------------------------------------------------------


def labelling_model(units: int) -> keras.Model:
    """Probabilities of the labels of every character."""
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(len(ALPHABET) + 1, 32),
            layers.Bidirectional(LSTM(units, return_sequences=True)),
            layers.Dense(len(LABELS), activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(5e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


# --- The program ----------------------------------------------------------------------------------------


def draw(path: str, truth: np.ndarray, answers: np.ndarray, scores: dict[str, np.ndarray]) -> None:
    """The confusion matrix, and the F1 of each label beside the baseline's."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    ConfusionMatrixDisplay.from_predictions(
        truth,
        answers,
        labels=range(len(LABELS)),
        display_labels=LABELS,
        normalize="true",
        values_format=".2f",
        cmap="Blues",
        xticks_rotation=45,
        colorbar=False,
        ax=left,
    )
    left.set(title="share of each true label", xlabel="label given", ylabel="true label")
    for n, (name, score) in enumerate(scores.items()):
        right.barh(np.arange(len(LABELS)) + 0.4 * n, score, 0.38, label=name)
    right.set(yticks=np.arange(len(LABELS)) + 0.2, yticklabels=LABELS, xlabel="F1 on modules never seen")
    right.invert_yaxis()
    right.legend(loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=2, frameon=False)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program and return its figures: the LSTM's, the baseline's, and more."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--characters", type=int, default=1_500_000, help="of source text")
    parser.add_argument("--window", type=int, default=128, help="characters that the model sees at once")
    parser.add_argument("--units", type=int, default=64, help="of the LSTM in each direction")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", metavar="FILE", help="save confusion matrix and F1")
    options = parser.parse_args(argv)
    keras.utils.set_random_seed(options.seed)

    sources = read_modules(options.characters)
    ends = np.cumsum([len(source) for source in sources])
    held_out = int(np.searchsorted(ends, ends[-1] / 8)) + 1  # modules with an eighth of all characters
    x, y = windows(sources[held_out:], options.window)
    x_test, y_test = windows(sources[:held_out], options.window)
    print(f"{len(sources)} modules of the standard library: {x.size:,} characters to learn from,")
    print(f"{x_test.size:,} of {held_out} other modules to be tested on")

    model = labelling_model(options.units)
    model.fit(x, y, 64, options.epochs, validation_data=(x_test, y_test), verbose=PROGRESS)

    answers = model.predict(x_test, 256, verbose=0).argmax(-1).ravel()
    guesses = majority(x, y)[x_test].ravel()
    truth = y_test.ravel()
    names = ("bidirectional LSTM", "most frequent label")
    scores = {
        name: f1_score(truth, labels, labels=range(len(LABELS)), average=None, zero_division=0)
        for name, labels in zip(names, (answers, guesses))
    }
    print(f"\nF1 of each label{names[0]:>24}{names[1]:>24}")
    for label, *row in zip(LABELS, *scores.values()):
        print(f"{label:16}" + "".join(f"{score:24.3f}" for score in row))
    if options.picture:
        draw(options.picture, truth, answers, scores)
    return {
        **{f"mean F1, {name}": float(score.mean()) for name, score in scores.items()},
        f"accuracy, {names[0]}": float(accuracy_score(truth, answers)),
        f"accuracy, {names[1]}": float(accuracy_score(truth, guesses)),
    }


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name}: {figure:.3f}")
