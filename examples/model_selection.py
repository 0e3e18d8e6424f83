"""Choosing a model: cross-validation of a penalty on the weights, and a random search over several settings.

How strong should regularisation be? The reviews that a model may learn from are cut into k folds; each
fold in turn is kept apart and the model learns from the others (Stone, 1974). The strength with the best mean
accuracy on the folds kept apart is chosen, and only then is there one look at the test. Several settings at
once are better drawn at random than taken from a grid, which tries few values of each (Bergstra & Bengio,
2012).

Data: the shorter reviews of sentiment.py, and fewer of them, an eighth with a wrong label, so that a model
without a penalty learns its folds by heart. The baseline is the model without one.

    python examples/model_selection.py
    python examples/model_selection.py --folds 10 --trials 20
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from keras import layers
from sentiment import VOCABULARY, encode, reviews, vocabulary, words_of
from sklearn.model_selection import KFold
from tqdm import tqdm

from fusedlstm.keras import LSTM

STRENGTHS = (0.0, 1e-4, 1e-3, 1e-2)
WRONG = 1 / 8  # of the labels that are learnt


class Settings(NamedTuple):
    """What is to be chosen."""

    l2: float  # strength of the penalty on all weights of the LSTM
    dropout: float = 0.0
    rate: float = 5e-3  # of learning
    units: int = 32

    def __str__(self) -> str:
        return f"L2 {self.l2:.1e}, dropout {self.dropout:.2f}, rate {self.rate:.1e}, {self.units} units"


def drawn(random: np.random.Generator) -> Settings:
    """Settings at random, strengths and rates evenly on a logarithmic scale."""
    return Settings(
        l2=float(10 ** random.uniform(-5, -2.5)),
        dropout=float(random.uniform(0, 0.4)),
        rate=float(10 ** random.uniform(-2.6, -2)),
        units=int(random.choice([32, 64])),
    )


def penalised_model(settings: Settings) -> keras.Model:
    """The probability that a review is favourable.

    Keras' own embeddings are below 0.05 and the LSTM would hardly see them at first; ours are about 1.
    """
    penalty = keras.regularizers.L2(settings.l2)
    wide = keras.initializers.RandomNormal(stddev=1.0)
    model = keras.Sequential(
        [
            layers.Embedding(VOCABULARY, 64, embeddings_initializer=wide),
            layers.SpatialDropout1D(settings.dropout),
            LSTM(settings.units, kernel_regularizer=penalty, recurrent_regularizer=penalty),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile(keras.optimizers.Adam(settings.rate), "binary_crossentropy", metrics=["accuracy"])
    return model


def short_reviews(count: int, words: int, seed: int, wrong: float = 0.0) -> tuple[list[str], np.ndarray]:
    """Reviews of at most so many words, and their labels."""
    texts, labels = reviews(4 * count, seed, wrong)  # a third of all have up to 14 words
    short = [n for n, text in enumerate(texts) if len(words_of(text)) <= words][:count]
    return [texts[n] for n in short], labels[short]


class Task(NamedTuple):
    """What is learnt, and how long."""

    x: np.ndarray  # (reviews, words)
    y: np.ndarray  # (reviews,)
    epochs: int
    seed: int

    def fitted(self, settings: Settings, rows: np.ndarray) -> keras.Model:
        """A model that has learnt some of the reviews."""
        keras.utils.set_random_seed(self.seed)
        model = penalised_model(settings)
        model.fit(self.x[rows], self.y[rows], 32, self.epochs, verbose=0)
        return model

    def accuracies(self, settings: Settings, folds: int) -> np.ndarray:
        """(folds,): on each fold of a model that learnt from the others."""
        found = []
        for learnt, apart in KFold(folds, shuffle=True, random_state=self.seed).split(self.x):
            model = self.fitted(settings, learnt)
            found.append(accuracy(model, self.x[apart], self.y[apart]))
        return np.array(found)


def accuracy(model: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    return float(((model.predict(x, verbose=0)[:, 0] > 0.5) == y).mean())


def draw(path: str, folds: dict[float, np.ndarray], trials: dict[Settings, np.ndarray]) -> None:
    """Accuracy by strength with its scatter over the folds, and the trials of the search, best first."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    places = range(len(folds))
    means, scatter = zip(*((found.mean(), found.std()) for found in folds.values()))
    for place, found in zip(places, folds.values()):
        left.plot([place] * len(found), found, ".", color="0.6")
    left.errorbar(places, means, scatter, fmt="o-", capsize=4, label="mean and standard deviation")
    left.plot([], [], ".", color="0.6", label="a fold")
    left.set_xticks(places, [f"{strength:g}" for strength in folds])
    left.set(xlabel="strength of the penalty (L2)", ylabel="accuracy on the fold kept apart")
    best = sorted(trials.values(), key=np.mean, reverse=True)
    means, scatter = zip(*((found.mean(), found.std()) for found in best))
    right.errorbar(range(1, len(best) + 1), means, scatter, fmt="o", capsize=4, color="C1")
    right.set(xlabel="trial of the random search, best first")
    left.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program and return its figures: accuracies on reviews that are held out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=3, help="of the random search")
    parser.add_argument("--reviews", type=int, default=800, help="to learn from")
    parser.add_argument("--unseen", type=int, default=1000, help="reviews for the test")
    parser.add_argument("--words", type=int, default=14, help="that a review has at most")
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", metavar="FILE", help="save the accuracies of folds and trials")
    options = parser.parse_args(argv)

    texts, y = short_reviews(options.reviews, options.words, seed=1, wrong=WRONG)
    new_texts, y_new = short_reviews(options.unseen, options.words, seed=2)
    numbers = vocabulary(texts)
    x, x_new = (encode(some, numbers, options.words) for some in (texts, new_texts))
    task = Task(x, y, options.epochs, options.seed)

    folds = {}
    print(
        f"{options.folds} folds of {len(x)} reviews: accuracy on the fold kept apart, with its wrong labels"
    )
    for strength in tqdm(STRENGTHS, "strengths", leave=False, file=sys.stderr):
        folds[strength] = task.accuracies(Settings(strength), options.folds)
        print(f"L2 {strength:<8g}{folds[strength].mean():.3f} +- {folds[strength].std():.3f}")
    strength = max(folds, key=lambda strength: folds[strength].mean())

    random = np.random.default_rng(options.seed)
    trials = {}
    print("\nrandom search")
    for settings in tqdm(
        [drawn(random) for _ in range(options.trials)], "trials", leave=False, file=sys.stderr
    ):
        trials[settings] = task.accuracies(settings, options.folds)
        print(f"{trials[settings].mean():.3f} +- {trials[settings].std():.3f}  {settings}")
    searched = max(trials, key=lambda settings: trials[settings].mean())

    everything = np.arange(len(x))
    chosen = {
        "random search": searched,
        "no penalty": Settings(0.0),
        "strength by cross-validation": Settings(strength),
    }
    figures = {
        f"accuracy, {name}": accuracy(task.fitted(settings, everything), x_new, y_new)
        for name, settings in chosen.items()
    }
    print(f"\n{len(x_new)} new reviews, all labels right; chosen were L2 {strength:g}, and {searched}")
    for name, value in figures.items():
        print(f"{name:40}{value:.3f}")
    if options.picture:
        draw(options.picture, folds, trials)
    return figures


if __name__ == "__main__":
    main()
