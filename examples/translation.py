"""Translation: an encoder and a decoder with attention turn number words from German into English.

A bidirectional LSTM reads a number as German writes it, letter by letter. A second LSTM starts from the
first one's final state and writes the number in English, word by word; for each word it looks back at the
letters and weighs them (Bahdanau, Cho & Bengio, 2015; the scores are those of Luong, Pham & Manning, 2015).
German has the ones before the tens, "einundzwanzig" is "twenty one", so attention has to go back and forth.

Data: numbers below a million as the package num2words writes them. All below a hundred and some thousand
others are for training; accuracy is the share of numbers never seen whose translation is right in every
word, by beam search and greedily. The baseline is a dictionary: word for word, in the order of the German.

    python examples/translation.py
    python examples/translation.py --number 97 --picture attention.png
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from keras import layers
from num2words import num2words

from fusedlstm.keras import LSTM

Tokens = tuple[str, ...]
PAD, START, END = 0, 1, 2
PROGRESS = 1 if sys.stdout.isatty() else 2  # a bar on a terminal, a line an epoch elsewhere


class Vocabulary:
    """Numbers for tokens, and for the ends of sentences."""

    def __init__(self, sentences: Sequence[Tokens]) -> None:
        self.tokens = ["", "<start>", "<end>", *sorted({token for tokens in sentences for token in tokens})]
        self.ids = {token: number for number, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, sentences: Sequence[Tokens]) -> np.ndarray:
        """(B, T): sentences between start and end, padded."""
        ids = np.full((len(sentences), max(map(len, sentences)) + 2), PAD, "int32")
        for row, tokens in zip(ids, sentences):
            if unknown := [token for token in tokens if token not in self.ids]:
                raise ValueError(f"not in the vocabulary: {', '.join(unknown)}")
            row[: len(tokens) + 2] = [START, *(self.ids[token] for token in tokens), END]
        return ids

    def decode(self, ids: Sequence[int]) -> Tokens:
        """The tokens of a sentence, which may have an end."""
        ids = list(ids)
        return tuple(self.tokens[n] for n in ids[: ids.index(END) if END in ids else None])


def embedding(tokens: int, units: int, mask_zero: bool = False) -> layers.Embedding:
    """Keras' own embeddings are below 0.05 at first, and the LSTM would hardly see them; ours are about 1."""
    return layers.Embedding(tokens, units, keras.initializers.RandomNormal(stddev=1.0), mask_zero=mask_zero)


def encoder_model(tokens: int, units: int) -> keras.Model:
    """Reads source (B, S): what it made of each token (B, S, units), and the decoder's first state."""
    source = keras.Input((None,), dtype="int32")
    x = embedding(tokens, units, mask_zero=True)(source)
    both_ways = layers.Bidirectional(LSTM(units // 2, return_sequences=True, return_state=True))
    memory, h_forward, c_forward, h_backward, c_backward = both_ways(x)
    h = layers.Concatenate()([h_forward, h_backward])
    c = layers.Concatenate()([c_forward, c_backward])
    return keras.Model(source, [memory, h, c], name="encoder")


def decoder_model(tokens: int, units: int) -> keras.Model:
    """From what is written so far (B, T), log probabilities (B, T, tokens) of what comes next."""
    inputs, y, attention = attending(tokens, units)
    y = layers.Dense(tokens, activation="log_softmax")(y)
    return keras.Model(inputs, [y, attention], name="decoder")


def attending(tokens: int, units: int) -> tuple[list[Any], Any, Any]:
    """The inputs of a decoder, what it makes of them (B, T, units), and where it looks (B, T, S).

    The inputs are what is written so far (B, T), the source (B, S), and what the encoder made of it.
    """
    written, source = keras.Input((None,), dtype="int32"), keras.Input((None,), dtype="int32")
    memory, h, c = keras.Input((None, units)), keras.Input((units,)), keras.Input((units,))
    y = LSTM(units, return_sequences=True)(embedding(tokens, units)(written), initial_state=[h, c])
    query = layers.Dense(units, use_bias=False)(y)
    context, attention = layers.Attention()(
        [query, memory], mask=[None, source != PAD], return_attention_scores=True
    )
    y = layers.Dense(units, activation="tanh")(layers.Concatenate()([context, y]))
    return [written, source, memory, h, c], y, attention


class Translator:
    """An encoder and a decoder with the vocabularies of their sentences."""

    def __init__(self, sources: Sequence[Tokens], targets: Sequence[Tokens], units: int) -> None:
        self.read, self.write = Vocabulary(sources), Vocabulary(targets)
        self.longest = max(map(len, targets)) + 1
        self.encoder = encoder_model(len(self.read), units)
        self.decoder = decoder_model(len(self.write), units)

    def fit(self, sources: Sequence[Tokens], targets: Sequence[Tokens], epochs: int, batch_size: int) -> None:
        """Learn to write each next token of a target from those before it, which are the right ones."""
        source, written = keras.Input((None,), dtype="int32"), keras.Input((None,), dtype="int32")
        model = keras.Model([source, written], self.decoder([written, source, *self.encoder(source)])[0])
        rate = keras.optimizers.schedules.CosineDecay(3e-3, epochs * -(-len(sources) // batch_size))
        model.compile(
            keras.optimizers.Adam(rate, clipnorm=1.0),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=PAD),
        )
        x, y = self.read.encode(sources), self.write.encode(targets)
        model.fit([x, y[:, :-1]], y[:, 1:], batch_size, epochs, verbose=PROGRESS)

    def translate(self, sources: Sequence[Tokens], width: int = 1, batch_size: int = 256) -> list[Tokens]:
        """What is written for each source, by a beam search; with a width of 1 it is greedy."""
        sentences = []
        for first in range(0, len(sources), batch_size):
            source = self.read.encode(sources[first : first + batch_size])
            encoded = [source, *self.encoder.predict_on_batch(source)]
            encoded = [np.repeat(array, width, axis=0) for array in encoded]

            def next_token(written: np.ndarray, encoded: Sequence[np.ndarray] = encoded) -> np.ndarray:
                return self.decoder.predict_on_batch([written, *encoded])[0][:, -1]

            found, _ = beam_search(next_token, len(source), width, self.longest)
            sentences += [self.write.decode(ids) for ids in found[:, 0]]
        return sentences

    def attention(self, source: Tokens, target: Tokens) -> np.ndarray:
        """(T + 1, S + 2): the weight of each token of the source, with its start and end, for each of the
        target, and for its end; the sum over the source is 1."""
        x, y = self.read.encode([source]), self.write.encode([target])
        encoded = self.encoder.predict_on_batch(x)
        attention = self.decoder.predict_on_batch([y[:, :-1], x, *encoded])[1]
        return attention[0]


def beam_search(
    next_token: Callable[[np.ndarray], np.ndarray], batch: int, width: int, longest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Likely sentences (batch, width, T), best first, and their log probabilities (batch, width).

    Of all continuations of the `width` likeliest beginnings of a sentence, the `width` likeliest are kept.
    `next_token` gives for beginnings (batch * width, t) the log probabilities of what follows.
    """
    written = np.full((batch, width, 1), START)
    total = np.full((batch, width), -np.inf)
    total[:, 0] = 0  # the beginnings are all the same: one counts
    for _ in range(longest):
        done = (written == END).any(-1)
        if done.all():
            break
        following = next_token(written.reshape(batch * width, -1)).reshape(batch, width, -1)
        tokens = following.shape[-1]
        nothing = np.where(np.arange(tokens) == PAD, 0, -np.inf)  # after the end
        following = np.where(done[..., None], nothing, following)
        candidates = (total[..., None] + following).reshape(batch, -1)
        best = np.argsort(-candidates, axis=1, kind="stable")[:, :width]
        total = np.take_along_axis(candidates, best, 1)
        parents, token = np.divmod(best, tokens)
        written = np.take_along_axis(written, parents[..., None], 1)
        written = np.concatenate([written, token[..., None]], -1)
    return written[..., 1:], total


def accuracy(found: Sequence[Tokens], right: Sequence[Tokens]) -> float:
    """The share of sentences that are right in every token."""
    return float(np.mean([a == b for a, b in zip(found, right, strict=True)]))


def english(number: int) -> Tokens:
    """The words of a number, without hyphens and commas."""
    return tuple(num2words(number, lang="en").replace("-", " ").replace(",", "").split())


def german(number: int) -> Tokens:
    """The letters of a number."""
    return tuple(num2words(number, lang="de"))


def by_dictionary(text: Tokens) -> Tokens:
    """The longest word that a text begins with is translated, then the rest."""
    known = {german(n): english(n) for n in [*range(1, 21), *range(30, 100, 10)]}
    known |= {tuple("ein"): ("one",), tuple("hundert"): ("hundred", "and"), tuple("tausend"): ("thousand",)}
    known[tuple("und")] = ()
    translated: Tokens = ()
    while text:
        word = max((word for word in known if text[: len(word)] == word), key=len)
        translated += known[word]
        text = text[len(word) :]
    return translated


def draw_attention(weights: np.ndarray, source: Tokens, target: Tokens, path: str) -> None:
    """Save a picture of the weights (T, S + 2)."""
    import matplotlib.pyplot as plt

    columns = ("(start)", *source, "(end)")
    figure, axes = plt.subplots(figsize=(1.5 + 0.2 * len(columns), 1 + 0.28 * len(target)))
    axes.imshow(weights, cmap="magma", aspect="auto", vmin=0, vmax=1)
    axes.set_xticks(range(len(columns)), columns, rotation=90)
    axes.set_yticks(range(len(target)), target)
    axes.tick_params(length=0)
    axes.set_title("Where the decoder looks as it writes each word", fontsize=11)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=57_684, help="a number to translate at the end")
    parser.add_argument("--largest", type=int, default=1_000_000, help="numbers are below this")
    parser.add_argument("--sentences", type=int, default=4000, help="for training")
    parser.add_argument("--unseen", type=int, default=500, help="numbers for the test")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--beam", type=int, default=4, help="width of the search")
    parser.add_argument("--picture", metavar="FILE", help="save the attention of the number")
    options = parser.parse_args(argv)

    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    numbers = 100 + random.choice(
        options.largest - 100, options.sentences + options.unseen - 100, replace=False
    )
    numbers = [*range(100), *map(int, numbers)]
    sources, targets = [german(n) for n in numbers], [english(n) for n in numbers]
    end = options.sentences
    print(f"{end} numbers to learn from, such as {''.join(sources[end - 1])}: {' '.join(targets[end - 1])}")

    translator = Translator(sources[:end], targets[:end], options.units)
    translator.fit(sources[:end], targets[:end], options.epochs, options.batch)

    unseen, right = sources[end:], targets[end:]
    figures = {
        "accuracy, beam search": accuracy(translator.translate(unseen, options.beam), right),
        "accuracy of the dictionary": accuracy([by_dictionary(text) for text in unseen], right),
        "accuracy, greedy": accuracy(translator.translate(unseen), right),
    }
    for name, value in figures.items():
        print(f"{name:28} {value:6.1%}")

    source = german(options.number)
    target = translator.translate([source], options.beam)[0]
    print(f"{options.number}: {''.join(source)} -> {' '.join(target)}")
    if options.picture:
        draw_attention(translator.attention(source, target), source, (*target, "(end)"), options.picture)
    return figures


if __name__ == "__main__":
    main()
