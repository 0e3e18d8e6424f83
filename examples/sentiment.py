"""Sentiment analysis: an LSTM reads reviews of films, in English or Chinese, and says if they are favourable.

The recipe is the classic one: lower-case the text, take the punctuation apart, number the words (in Chinese
the characters), then embedding, LSTM and a logistic output. An eighth of the labels it learns from are wrong.
Trained plainly for long enough, the model learns these by heart too. Three remedies are compared: to stop
early, when the loss on further reviews no longer falls, and keep the best weights; dropout with a penalty on
the weights (L2); and all of them. Of ten mistakes on new reviews the first avoids three, the second four, and
both together no more than that.

Data: reviews that this program makes from a grammar; nothing is downloaded. A review passes judgement in
several clauses, with intensifiers ("truly", "a bit"), negations ("not at all", "nobody could call it") and
quotations of what others think, which do not count. Its label is the sign of the sum of what the clauses say,
so knowing which words occur is not enough. There are two baselines, both logistic regressions: one on the
bag of words, and a stronger one on words, pairs and triples of words.

    python examples/sentiment.py
    python examples/sentiment.py "The plot was not boring at all, and I truly enjoyed the music."
    python examples/sentiment.py "剧情一点也不无聊，我非常喜欢音乐。"
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
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


def pick(options: Sequence[str], random: np.random.Generator) -> str:
    return options[random.integers(len(options))]


def clause(random: np.random.Generator) -> Clause:
    """One clause of an English review."""
    sign = int(random.choice([-1, 1]))
    adjective, verb = (pick(words, random) for words in ((GOOD, LIKE) if sign > 0 else (BAD, DISLIKE)))
    strength = pick(list(STRENGTHS), random)
    described = f"{strength} {adjective}".strip()
    score = sign * STRENGTHS[strength]
    aspect, others = f"the {pick(ASPECTS, random)}", pick(OTHERS, random)
    forms = [
        (f"{aspect} was {described}", score),
        (f"I {verb} {aspect}", sign * 2),
        (f"{aspect} was not {adjective} at all", -sign * 2),
        (f"nobody could call {aspect} {described}", -sign * 2),
        (f"{aspect} was anything but {adjective}", -sign * 2),
        (f"I never {verb} {aspect}", -sign * 2),
        (f"{others} {verb} {aspect}", 0),
        (f"{others} found {aspect} {described}", 0),
        (pick(FILLERS, random), 0),
    ]
    return Clause(*forms[random.integers(len(forms))])


def capitalised(text: str) -> str:
    """Sentences with capitals, and a full stop."""
    return re.sub(r"(^|[.!] )([a-z])", lambda start: start[0].upper(), text) + "."


GOOD_ZH = listed(
    """好, 棒, 精彩, 动人, 有趣, 出色, 迷人, 感人, 巧妙, 细腻,
    幽默, 流畅, 自然, 新颖, 真实, 优美, 温暖, 震撼, 完美, 深刻"""
)
BAD_ZH = listed(
    """差, 糟, 无聊, 沉闷, 拖沓, 混乱, 做作, 生硬, 平淡, 俗气,
    肤浅, 空洞, 尴尬, 乏味, 虚假, 粗糙, 难看, 陈旧, 可笑, 刺耳"""
)
LIKE_ZH, DISLIKE_ZH = listed("喜欢, 欣赏, 佩服, 享受"), listed("讨厌, 反感, 厌恶, 嫌弃")
STRENGTHS_ZH = {"很": 2, "非常": 4, "极其": 4, "实在": 4, "有点": 1, "比较": 1, "还算": 1}
ASPECTS_ZH = listed(
    """剧情, 故事, 演技, 音乐, 对白, 结局, 演员, 摄影, 剧本, 节奏,
    笑点, 剪辑, 服装, 导演, 配乐, 画面, 开头, 主角, 特效"""
)
OTHERS_ZH = listed("""我妹妹, 影评人, 大多数人, 我邻居, 报纸上, 朋友们, 同事""")
LINKS_ZH = ("。", "，而且", "，但是", "；", "！", "，虽然", "。另外，", "，不过")
FILLERS_ZH = listed(
    """那天下着雨, 片长两个小时, 我们坐在第二排,
    影院里一半是空的, 我读过原著, 这是导演的第三部电影"""
)


def clause_zh(random: np.random.Generator) -> Clause:
    """One clause of a Chinese review."""
    sign = int(random.choice([-1, 1]))
    adjective, verb = (
        pick(words, random) for words in ((GOOD_ZH, LIKE_ZH) if sign > 0 else (BAD_ZH, DISLIKE_ZH))
    )
    strength = pick(list(STRENGTHS_ZH), random)
    score = sign * STRENGTHS_ZH[strength]
    aspect, others = pick(ASPECTS_ZH, random), pick(OTHERS_ZH, random)
    forms = [
        (f"{aspect}{strength}{adjective}", score),
        (f"我{verb}{aspect}", sign * 2),
        (f"{aspect}一点也不{adjective}", -sign * 2),
        (f"谁也不会说{aspect}{strength}{adjective}", -sign * 2),
        (f"{aspect}算不上{adjective}", -sign * 2),
        (f"我从不{verb}{aspect}", -sign * 2),
        (f"{others}{verb}{aspect}", 0),
        (f"{others}说{aspect}{strength}{adjective}", 0),
        (pick(FILLERS_ZH, random), 0),
    ]
    return Clause(*forms[random.integers(len(forms))])


class Language(NamedTuple):
    """What reviews are made of."""

    clause: Callable[[np.random.Generator], Clause]
    links: Sequence[str]  # between two clauses
    written: Callable[[str], str]  # a review from its clauses
    sentence: str  # that is judged if none is given


LANGUAGES = {
    "en": Language(
        clause, LINKS, capitalised, "The plot was anything but boring, and I never disliked the music."
    ),
    "zh": Language(clause_zh, LINKS_ZH, "{}。".format, "剧情一点也不无聊，我从不讨厌音乐。"),
}


def language_of(sentence: str) -> str:
    """The language that has the characters of a sentence."""
    return "zh" if re.search("[\u4e00-\u9fff]", sentence) else "en"


def reviews(count: int, seed: int, wrong: float = 0.0, language: str = "en") -> tuple[list[str], np.ndarray]:
    """Texts of reviews, and 1 for those that are favourable and 0 for those that are not, or the other way
    round for a share that is labelled wrongly."""
    random, made = np.random.default_rng(seed), LANGUAGES[language]
    texts, labels = [], []
    while len(texts) < count:
        clauses = [made.clause(random) for _ in range(random.integers(1, 6))]
        score = sum(part.score for part in clauses)
        if score == 0:
            continue
        text = clauses[0].text
        for part in clauses[1:]:
            text += pick(made.links, random) + part.text
        texts.append(made.written(text))
        labels.append(score > 0)
    return texts, np.array(labels ^ (random.random(count) < wrong), "float32")


# --- From text to numbers -------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Lower-case words; marks of punctuation and Chinese characters are words of their own."""
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

TREATMENTS = {
    "plain": {},
    "early stopping": {"patience": 3},
    "dropout and L2": {"dropout": 0.3, "l2": 1e-4},
    "dropout, L2, early stopping": {"dropout": 0.3, "l2": 1e-4, "patience": 3},
}


class Data(NamedTuple):
    """Reviews as numbers, and their labels."""

    x: np.ndarray  # (reviews, words)
    y: np.ndarray  # (reviews,)


def fit(
    learnt: Data, validation: Data, units: int, epochs: int, patience: int | None = None, **treatment: float
) -> tuple[keras.Model, dict[str, list[float]]]:
    """A model and its history; with patience, learning stops so many epochs after the best one, whose weights
    are kept."""
    model = sentiment_model(units, **treatment)
    stopping = keras.callbacks.EarlyStopping(patience=patience or 0, restore_best_weights=True)
    history = model.fit(
        *learnt,
        32,
        epochs,
        validation_data=tuple(validation),
        callbacks=[stopping] if patience else [],
        verbose=PROGRESS,
    )
    return model, history.history


def draw(path: str, histories: dict[str, dict[str, list[float]]], baselines: dict[str, float]) -> None:
    """Loss and accuracy after each epoch, in training and on the reviews for validation."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for n, name in enumerate(("plain", "dropout and L2")):  # early stopping takes a beginning of these
        history = histories[name]
        epochs = range(1, len(history["loss"]) + 1)
        for axis, key in zip(axes, ("loss", "accuracy")):
            axis.plot(epochs, history[key], "--", color=f"C{n}", label=f"{name}, training")
            axis.plot(epochs, history[f"val_{key}"], "o-", color=f"C{n}", label=f"{name}, validation")
    for style, (name, accuracy) in zip((":", "-."), baselines.items()):
        axes[1].axhline(accuracy, color="gray", linestyle=style, label=name)
    for axis, label in zip(axes, ("binary cross-entropy and penalty", "accuracy")):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def judgement(model: keras.Model, sentence: str, numbers: dict[str, int], length: int) -> str:
    """What the model says of a sentence, and how much of it the model knows."""
    words = words_of(sentence)
    unknown = [word for word in words if word not in numbers]
    if not any(word in numbers for word in words if re.match(r"\w", word)):
        return "none of its words is known: they occur in no review, so the model cannot judge it"
    probability = float(model.predict(encode([sentence], numbers, length), verbose=0)[0, 0])
    known = f" (not known: {', '.join(unknown)})" if unknown else ""
    return f"favourable with probability {probability:.3f}{known}"


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program and return its figures: accuracies on reviews that are held out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sentence", nargs="?", help="to be judged at the end")
    parser.add_argument("--language", choices=LANGUAGES, help="of the reviews; default: of the sentence")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--reviews", type=int, default=3000, help="to learn from; as many are held out")
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--words", type=int, default=50, help="of a review that the model reads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", metavar="FILE", help="save loss and accuracy after each epoch")
    options = parser.parse_args(argv)
    language = options.language or language_of(options.sentence or "")
    sentence = options.sentence or LANGUAGES[language].sentence

    texts, labels = reviews(options.reviews, 1, wrong=1 / 8, language=language)
    new_texts, new_labels = reviews(options.reviews, 2, language=language)
    other_texts, other_labels = reviews(options.reviews // 3, 3, language=language)
    numbers = vocabulary(texts)
    learnt, held_out, validation = (
        Data(encode(some, numbers, options.words), answers)
        for some, answers in ((texts, labels), (new_texts, new_labels), (other_texts, other_labels))
    )
    print(
        f"{len(texts)} reviews made to learn from, {len(other_texts)} for validation, {len(new_texts)} held "
        f"out, {len(numbers)} words"
    )
    for text, label in list(zip(texts, labels))[:2]:
        print(f"\n{text}\nfavourable: {'yes' if label else 'no'}")

    histories, accuracies = {}, {}
    for name, treatment in TREATMENTS.items():
        print(f"\nLSTM, {name}")
        keras.utils.set_random_seed(options.seed)
        model, histories[name] = fit(learnt, validation, options.units, options.epochs, **treatment)
        right = (model.predict(held_out.x, verbose=0)[:, 0] > 0.5) == held_out.y
        accuracies[f"LSTM, {name}"] = float(right.mean())

    baselines = {
        name: float((bag_of_words(texts, labels, new_texts, longest) == new_labels).mean())
        for name, longest in (("bag of words", 1), ("bag of words, pairs and triples", 3))
    }
    print("\naccuracy on held-out reviews")
    for name, accuracy in (accuracies | baselines).items():
        print(f"{name:36}{accuracy:.3f}")
    print(f"\n{sentence}\n{judgement(model, sentence, numbers, options.words)}")
    if options.picture:
        draw(options.picture, histories, baselines)
    figures = {f"accuracy, {name}": accuracy for name, accuracy in reversed(accuracies.items())}
    (best, accuracy), *others = figures.items()
    strongest_first = {f"accuracy, {name}": baselines[name] for name in reversed(baselines)}
    return {best: accuracy} | strongest_first | dict(others)


if __name__ == "__main__":
    for name, figure in main().items():
        print(f"{name}: {figure:.3f}")
