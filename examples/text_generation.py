"""Text generation: an LSTM learns a text character by character, another one word by word.

The first model is the textbook's: windows of 100 characters, one layer of 256 units, softmax over the
alphabet, RMSprop, batches of 128. The second does the same with words. Both predict the next symbol at every
place of a window, and write by drawing from what they predict: a low temperature takes the likely symbols, a
high one dares more.

Data: the pages of Python's help system, which come with Python (`pydoc_data.topics`); a Chinese diary that
fusedlstm makes from a grammar (`--language zh`); or a text of yours in any language, as UTF-8. Nothing is
downloaded. Where words are not written apart, as in Chinese, there is the model of characters only. The
last tenth is held out. The baseline is a bigram model: how often each symbol follows each other one,
smoothed after Witten and Bell (1991). Bits per symbol are the mean of -log2 of the probability that a model
gives to what comes next; fewer are better. There are plenty of characters, and the LSTM needs little more
than half the bits; of ninety thousand words most are rare, and with so few it is only a little ahead.

    python examples/text_generation.py
    python examples/text_generation.py --temperature 0.3 0.7 --length 400
    python examples/text_generation.py --language zh
    python examples/text_generation.py --text FILE
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from keras import layers

from fusedlstm import demo
from fusedlstm.keras import LSTM

PROGRESS = 1 if sys.stdout.isatty() else 2  # a bar on a terminal, a line an epoch elsewhere

# --- Data: a text as numbers ----------------------------------------------------------------------------


MOST_CHARACTERS = 3000  # that are told apart


def read_text(path: str | None = None, language: str = "en") -> str:
    """A text in lower case, with one space in the place of several; paragraphs that are repeated are kept
    once."""
    return re.sub(r"\s+", " ", demo.read_text(path, language).lower())


def words_of(text: str) -> list[str]:
    """Words and marks of punctuation; none if the text does not write words apart."""
    if re.search(r"[\u3040-\u30ff\u4e00-\u9fff\u0e00-\u0e7f]", text[:1000]):  # Japanese, Chinese, Thai
        return []
    return re.findall(r"\w+|[^\w\s]", text)


def encode(symbols: Sequence[str], most: int) -> tuple[np.ndarray, list[str]]:
    """Numbers of symbols, the most frequent first, and the symbols by number; rare ones are all "?"."""
    known = ["?"] + [symbol for symbol, _ in Counter(symbols).most_common(most) if symbol != "?"][: most - 1]
    numbers = {symbol: n for n, symbol in enumerate(known)}
    return np.array([numbers.get(symbol, 0) for symbol in symbols]), known


def windows(ids: np.ndarray, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of numbers (windows, length), and the numbers that come next at every place of them."""
    starts = np.arange(0, len(ids) - length, stride)
    pairs = ids[starts[:, None] + np.arange(length + 1)]
    return pairs[:, :-1], pairs[:, 1:]


# --- The baseline ---------------------------------------------------------------------------------------


def bigram_bits(ids: np.ndarray, held_out: np.ndarray, size: int) -> float:
    """Bits per symbol that a bigram model of a text needs for another text."""
    pairs = np.zeros((size, size))
    np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    probabilities = np.full(size, 1 / size)
    for counts in (pairs.sum(0), pairs):
        kinds = np.maximum((counts > 0).sum(-1, keepdims=True), 1)  # that follow: the weight of shorter ones
        probabilities = (counts + kinds * probabilities) / (counts.sum(-1, keepdims=True) + kinds)
    return float(-np.log2(probabilities[held_out[:-1], held_out[1:]]).mean())


# --- The models -----------------------------------------------------------------------------------------


def text_model(size: int, units: int, rate: float, updates: int, dropout: float) -> keras.Model:
    """Probabilities of the next symbol at every place.

    Keras' own embeddings are below 0.05 and the LSTM would hardly see them at first; ours are about 1.
    """
    wide = keras.initializers.RandomNormal(stddev=1.0)
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            layers.Embedding(size, 64, embeddings_initializer=wide),
            layers.Dropout(dropout),
            LSTM(units, return_sequences=True),
            layers.Dropout(dropout),
            layers.Dense(size, activation="softmax"),
        ]
    )
    decay = keras.optimizers.schedules.CosineDecay(rate, updates)
    model.compile(keras.optimizers.RMSprop(decay, clipnorm=1.0), "sparse_categorical_crossentropy")
    return model


# --- Writing --------------------------------------------------------------------------------------------


def sample(probabilities: np.ndarray, temperature: float, random: np.random.Generator) -> int:
    """Draw a number; the temperature divides the logarithms of the probabilities, 0 takes the likeliest."""
    if temperature == 0:
        return int(probabilities.argmax())
    logits = np.log(np.maximum(probabilities.astype("float64"), 1e-30)) / temperature
    powers = np.exp(logits - logits.max())
    return int(random.choice(len(powers), p=powers / powers.sum()))


def write(
    model: keras.Model, seed: np.ndarray, length: int, temperature: float, random: np.random.Generator
) -> list[int]:
    """Numbers of new symbols, each drawn after a window of those before it; `seed` is the first window."""
    text = list(seed)
    for _ in range(length):
        window = np.array(text[-len(seed) :])[None]
        probabilities = keras.ops.convert_to_numpy(model(window))[0, -1]
        text.append(sample(probabilities, temperature, random))
    return text[len(seed) :]


# --- The program ----------------------------------------------------------------------------------------


class Course(NamedTuple):
    """How a model learns from a text."""

    length: int  # symbols of a window
    stride: int  # symbols from one window to the next
    batch: int  # windows
    epochs: int
    rate: float
    dropout: float


def learn(ids: np.ndarray, size: int, units: int, course: Course) -> tuple[keras.Model, list[float]]:
    """A model of the first nine tenths, and its bits per symbol of the last tenth after each epoch."""
    end = len(ids) * 9 // 10
    x, y = windows(ids[:end], course.length, course.stride)
    held_out = windows(ids[end:], course.length, course.length)
    updates = course.epochs * -(-len(x) // course.batch)
    model = text_model(size, units, course.rate, updates, course.dropout)
    print(f"{model.count_params():,} weights, {len(x):,} windows of {course.length}")
    history = model.fit(x, y, course.batch, course.epochs, validation_data=held_out, verbose=PROGRESS).history
    return model, [loss / math.log(2) for loss in history["val_loss"]]


def draw(path: str, curves: dict[str, list[float]], baselines: dict[str, float]) -> None:
    """Bits per symbol after each epoch, beside the baseline's."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(10, 4), layout="constrained", squeeze=False)
    for axis, (symbol, bits) in zip(axes[0], curves.items()):
        axis.plot(range(1, len(bits) + 1), bits, "o-", label="LSTM")
        axis.axhline(baselines[symbol], color="gray", linestyle="--", label="bigram model")
        axis.set(xlabel="epoch", ylabel=f"bits per {symbol} of held-out text", title=f"{symbol} by {symbol}")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program and return its figures: bits per character and per word, and the baselines'."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="learn another text, UTF-8, in any language")
    source.add_argument("--language", choices=demo.TEXTS, default="en", help="of the text at hand")
    parser.add_argument("--epochs", type=int, default=4, help="of the character model")
    parser.add_argument("--word-epochs", type=int, default=4, help="of the word model")
    parser.add_argument("--characters", type=int, help="of text to use; default: all")
    parser.add_argument("--units", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=2000, help="words that are told apart")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.2, 0.6, 1.0])
    parser.add_argument(
        "--length", type=int, default=150, help="characters to write, and a third as many words"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", metavar="FILE", help="save bits per symbol after each epoch")
    options = parser.parse_args(argv)
    keras.utils.set_random_seed(options.seed)
    random = np.random.default_rng(options.seed)

    text = read_text(options.text, options.language)[: options.characters]
    words = words_of(text)
    counted = f", {len(words):,} words" if words else "; words are not written apart"
    print(f"{options.text or demo.TEXTS[options.language]}: {len(text):,} characters{counted}")

    curves, baselines = {}, {}
    for symbol, symbols, most, course in (
        ("character", text, MOST_CHARACTERS, Course(100, 24, 128, options.epochs, rate=0.01, dropout=0.0)),
        ("word", words, options.vocabulary, Course(30, 10, 64, options.word_epochs, rate=0.003, dropout=0.3)),
    ):
        if not symbols:
            continue
        ids, known = encode(symbols, most)
        end = len(ids) * 9 // 10
        print(f"\n{symbol.capitalize()} by {symbol}, {len(known)} different: ", end="")
        model, curves[symbol] = learn(ids, len(known), options.units, course)
        baselines[symbol] = bigram_bits(ids[:end], ids[end:], len(known))
        print(f"bits per {symbol}: {curves[symbol][-1]:.2f}, bigram model {baselines[symbol]:.2f}")
        glue, count = ("", options.length) if symbol == "character" else (" ", options.length // 3)
        for temperature in options.temperature:
            written = write(model, ids[: course.length], count, temperature, random)
            print(f"\ntemperature {temperature}: {glue.join(known[n] for n in written)}")

    if options.picture:
        draw(options.picture, curves, baselines)
    return {
        f"bits per {symbol}, {name}": value
        for symbol in curves
        for name, value in (("LSTM", curves[symbol][-1]), ("bigram model", baselines[symbol]))
    }


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name}: {figure:.3f}")
