"""The programs in examples/ about text: their parts on cases made by hand, and each of them, small."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

from programs import RANDOM, small  # first: it makes the programs importable

# isort: split

import compare_layers
import keras
import model_selection
import numpy as np
import pages
import pytest
import sentiment
import sequence_labelling
import text_classification
import text_generation
from compare_layers import OURS, THEIRS

import fusedlstm.keras

# --- Text generation ------------------------------------------------------------------------------------


def test_the_help_pages_are_english_without_repetition() -> None:
    text = text_generation.read_text()
    assert len(text) > 300_000
    assert text == text.lower()
    assert np.mean([letter.isascii() for letter in text]) > 0.99
    assert text.count(" the ") > 2000
    assert "  " not in text


def test_words_are_told_apart_where_they_are_written_apart() -> None:
    assert text_generation.words_of("это — мир, cafés") == ["это", "—", "мир", ",", "cafés"]
    assert text_generation.words_of("今天天气很好。") == []


def test_symbols_are_numbered_by_frequency_and_rare_ones_are_one() -> None:
    ids, known = text_generation.encode("abacabad?", 3)
    assert known == ["?", "a", "b"]
    assert ids.tolist() == [1, 2, 1, 0, 1, 2, 1, 0, 0]


def test_windows_are_followed_by_what_comes_next() -> None:
    x, y = text_generation.windows(np.arange(100, 120), length=6, stride=5)
    assert x[:, 0].tolist() == [100, 105, 110]
    np.testing.assert_array_equal(x[0], np.arange(100, 106))
    np.testing.assert_array_equal(y, x + 1)


def test_the_bigram_model_is_witten_and_bells() -> None:
    text, held_out = RANDOM(0).integers(0, 4, 60), RANDOM(1).integers(0, 5, 40)

    def smoothed(following: list[int], symbol: int, shorter: float) -> float:
        kinds = len(set(following))
        return (following.count(symbol) + kinds * shorter) / (len(following) + kinds) if kinds else shorter

    def probability(before: int, symbol: int) -> float:
        every = smoothed(text[1:].tolist(), symbol, 1 / 5)
        return smoothed([b for a, b in pairwise(text.tolist()) if a == before], symbol, every)

    bits = [-np.log2(probability(*pair)) for pair in pairwise(held_out.tolist())]
    assert text_generation.bigram_bits(text, held_out, 5) == pytest.approx(np.mean(bits))


def test_the_temperature_divides_the_logarithms() -> None:
    probabilities = np.array([0.1, 0.6, 0.0, 0.3])
    assert text_generation.sample(probabilities, 0, RANDOM(0)) == 1
    for temperature in (0.5, 1.0, 2.0):
        random = RANDOM(0)
        drawn = [text_generation.sample(probabilities, temperature, random) for _ in range(3000)]
        wanted = probabilities ** (1 / temperature)
        np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 3000, wanted / wanted.sum(), atol=0.03)


def test_each_written_symbol_follows_from_the_window_before_it() -> None:
    def successor(window: np.ndarray) -> np.ndarray:  # (1, T): predicts the sum of the window modulo 7
        assert window.shape == (1, 3)
        return np.eye(7)[None, None, window.sum() % 7]

    written = text_generation.write(successor, np.array([1, 2, 3]), 5, 0, RANDOM(0))
    assert written == [6, 4, 6, 2, 5]


def test_text_generation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--characters", "12000", "--units", "24", "--vocabulary", "100", "--length", "9")
    effort = ("--epochs", "2", "--word-epochs", "2", "--temperature", "0.5")
    figures = small(text_generation, tmp_path, *size, *effort)
    assert list(figures)[:2] == ["bits per character, LSTM", "bits per character, bigram model"]
    assert figures["bits per character, LSTM"] < np.log2(60)  # what a model that knows nothing needs
    assert figures["bits per word, LSTM"] < np.log2(100)
    assert capsys.readouterr().out.count("temperature 0.5: ") == 2


def test_text_generation_in_chinese(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text(text_generation.read_text(language="zh")[:6000], encoding="utf-8")
    effort = ("--units", "24", "--length", "9", "--epochs", "1", "--temperature", "0.5")
    figures = small(text_generation, tmp_path, "--text", str(text), *effort)
    assert list(figures) == ["bits per character, LSTM", "bits per character, bigram model"]
    assert "6,000 characters; words are not written apart" in capsys.readouterr().out


# --- Sentiment ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", sentiment.LANGUAGES)
def test_reviews_are_balanced_and_those_held_out_are_others(language: str) -> None:
    texts, labels = sentiment.reviews(500, seed=1, language=language)
    again, _ = sentiment.reviews(500, seed=1, language=language)
    others, _ = sentiment.reviews(500, seed=2, language=language)
    assert texts == again
    _, changed = sentiment.reviews(500, seed=1, wrong=0.25, language=language)
    assert np.mean(labels != changed) == pytest.approx(0.25, abs=0.06)
    assert len(set(texts) & set(others)) < 20
    assert 0.4 < labels.mean() < 0.6
    if language == "en":
        assert all(text[0].isupper() and text.endswith(".") for text in texts)
    else:
        assert all(text.endswith("。") and not text.isascii() for text in texts)


@pytest.mark.parametrize(
    ("form", "sign"), [("{}一点也不", -1), ("{}算不上", -1), ("{}非常", 1), ("谁也不会说{}很", -1)]
)
def test_the_score_of_a_chinese_clause_follows_from_what_it_says(form: str, sign: int) -> None:
    random, seen = RANDOM(0), 0
    starts = {form.format(aspect) for aspect in sentiment.ASPECTS_ZH}
    for clause in (sentiment.clause_zh(random) for _ in range(4000)):
        for start in starts:
            adjective = clause.text.removeprefix(start)
            if adjective != clause.text and adjective in sentiment.GOOD_ZH + sentiment.BAD_ZH:
                assert np.sign(clause.score) == (sign if adjective in sentiment.GOOD_ZH else -sign)
                seen += 1
    assert seen > 10


def test_the_language_is_that_of_the_sentence() -> None:
    assert sentiment.language_of("Good. 好") == "zh"
    assert sentiment.language_of("Très bien") == "en"
    assert sentiment.words_of("剧情不好, ok!") == ["剧", "情", "不", "好", ",", "ok", "!"]


def test_a_sentence_without_a_known_word_is_not_judged() -> None:
    def model(x: np.ndarray, verbose: int) -> np.ndarray:
        return np.full((1, 1), 0.75)

    numbers, judge = {"good": 2, ".": 3}, SimpleNamespace(predict=model)
    assert "none of its words is known" in sentiment.judgement(judge, "Schlecht.", numbers, 9)
    assert sentiment.judgement(judge, "Good.", numbers, 9) == "favourable with probability 0.750"
    assert sentiment.judgement(judge, "So good.", numbers, 9).endswith("0.750 (not known: so)")


@pytest.mark.parametrize(
    ("start", "sign"), [("was not ", -1), ("was anything but ", -1), ("was very ", 1), ("was ", 1)]
)
def test_the_score_of_a_clause_follows_from_what_it_says(start: str, sign: int) -> None:
    random, seen = RANDOM(0), 0
    for clause in (sentiment.clause(random) for _ in range(2000)):
        subject, found, rest = clause.text.partition(f" {start}")
        adjective = rest.removesuffix(" at all")
        if found and subject.startswith("the ") and adjective in sentiment.GOOD + sentiment.BAD:
            assert np.sign(clause.score) == (sign if adjective in sentiment.GOOD else -sign)
            seen += 1
    assert seen > 10


def test_what_others_think_does_not_count() -> None:
    random = RANDOM(0)
    clauses = [sentiment.clause(random) for _ in range(500)]
    quoted = [clause for clause in clauses if clause.text.startswith(tuple(sentiment.OTHERS))]
    assert len(quoted) > 50
    assert all(clause.score == 0 for clause in quoted)


@pytest.mark.parametrize("program", [sentiment, text_classification])
def test_words_become_numbers(program: ModuleType) -> None:
    assert program.words_of("Not good, it's (bad)!")[:4] == [
        "not",
        "good",
        ",",
        "it" + "'s" * (program is sentiment),
    ]
    numbers = program.vocabulary(["a b a", "c a b"])
    assert numbers == {"a": 2, "b": 3, "c": 4}
    np.testing.assert_array_equal(program.encode(["b c", "x a"], numbers, 3), [[0, 3, 4], [0, 1, 2]])


def test_of_long_texts_the_end_is_read_and_of_long_lines_the_beginning() -> None:
    numbers = {"a": 2, "b": 3, "c": 4}
    assert sentiment.encode(["a b c"], numbers, 2).tolist() == [[3, 4]]
    assert text_classification.encode(["a b c"], numbers, 2).tolist() == [[2, 3]]


def test_a_bag_of_words_knows_words_and_runs_of_words_their_order() -> None:
    texts = ["not good but bad", "not bad but good"] * 10
    labels = np.array([0, 1] * 10)
    assert (sentiment.bag_of_words(texts, labels, texts) == labels).mean() == 0.5
    assert (sentiment.bag_of_words(texts, labels, texts, longest=2) == labels).all()


@pytest.mark.parametrize("sentence", ["Not good.", "剧情不好。"])
def test_sentiment(sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = small(sentiment, tmp_path, sentence, "--reviews", "64", "--epochs", "2", "--units", "8")
    assert list(figures)[:2] == [
        "accuracy, LSTM, dropout, L2, early stopping",
        "accuracy, bag of words, pairs and triples",
    ]
    assert len(figures) == 6
    assert all(0.2 < value <= 1 for value in figures.values())
    assert f"{sentence}\nfavourable with probability 0." in capsys.readouterr().out


def test_learning_stops_early_and_the_best_weights_are_kept() -> None:
    texts, labels = sentiment.reviews(64, seed=1)
    numbers = sentiment.vocabulary(texts)
    data = sentiment.Data(sentiment.encode(texts, numbers, 20), labels)
    wrong = sentiment.Data(data.x, 1 - labels)  # the more is learnt, the worse
    keras.utils.set_random_seed(0)
    model, history = sentiment.fit(data, wrong, 8, 12, patience=2)
    assert len(history["loss"]) < 12
    loss, _ = model.evaluate(*wrong, verbose=0)
    assert loss == pytest.approx(min(history["val_loss"]), rel=1e-4)


# --- Model selection ------------------------------------------------------------------------------------


def test_settings_are_drawn_within_bounds_and_differ() -> None:
    random = RANDOM(0)
    found = [model_selection.drawn(random) for _ in range(200)]
    assert len(set(found)) == 200
    assert all(1e-5 <= settings.l2 <= 1e-2 and 0 <= settings.dropout <= 0.4 for settings in found)
    assert np.median([settings.l2 for settings in found]) == pytest.approx(2e-4, rel=1)  # evenly by logarithm


def test_each_review_is_in_the_fold_kept_apart_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, apart = np.arange(20)[:, None], []

    class Fitted:
        def __init__(self, rows: np.ndarray) -> None:
            self.rows = rows

        def predict(self, x: np.ndarray, verbose: int) -> np.ndarray:
            assert not set(x[:, 0]) & set(self.rows)
            apart.extend(x[:, 0])
            return np.ones((len(x), 1))

    monkeypatch.setattr(model_selection.Task, "fitted", lambda self, settings, rows: Fitted(rows))
    task = model_selection.Task(x, np.arange(20) % 2 == 0, epochs=1, seed=0)
    accuracies = task.accuracies(model_selection.Settings(0.0), folds=5)
    assert sorted(apart) == list(range(20))
    assert accuracies.mean() == pytest.approx(0.5)


def test_model_selection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--reviews", "40", "--unseen", "20"]
    figures = small(model_selection, tmp_path, *size, "--folds", "2", "--trials", "2", "--epochs", "1")
    assert list(figures)[:2] == ["accuracy, random search", "accuracy, no penalty"]
    printed = capsys.readouterr().out
    assert printed.count(" +- ") == len(model_selection.STRENGTHS) + 2


# --- Text classification --------------------------------------------------------------------------------


def test_lines_are_of_the_modules_that_they_are_said_to_be_of() -> None:
    lines, labels = text_classification.read_lines()
    assert len(lines) == len(labels) > 10_000
    assert set(labels) == set(range(len(text_classification.MODULES)))
    assert labels[lines.index("class ArgumentParser(_AttributeHolder, _ActionsContainer):")] == 0


def test_text_classification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = small(text_classification, tmp_path, "self.pen()", "--lines", "300", "--epochs", "1")
    assert list(figures)[:2] == ["accuracy, stacked LSTM", "accuracy, bag of words"]
    assert all(0 <= value <= 1 for value in figures.values())
    *_, title, first, second, third = capsys.readouterr().out.splitlines()
    assert title == "self.pen()"
    assert all(line.split()[0] in text_classification.MODULES for line in (first, second, third))


# --- Sequence labelling ---------------------------------------------------------------------------------

SOURCE = '''\
if x1 == 2:  # if
    s = """a
"""
'''
DRAWN = """\
kk nn == 1=  ####
    n = ssss\
ssss
"""
MARKS = dict(zip(" nk1s=#", sequence_labelling.LABELS))


def test_characters_have_the_label_of_their_token() -> None:
    labels = [sequence_labelling.LABELS[n] for n in sequence_labelling.labels_of(SOURCE)]
    assert labels == [MARKS[mark] for mark in DRAWN.replace("\n", " ")]


def test_characters_are_numbered_and_foreign_ones_are_one() -> None:
    size = len(sequence_labelling.ALPHABET)
    assert sequence_labelling.encode("\n ~é").tolist() == [0, 1, size - 1, size]


def test_the_majority_is_the_most_frequent_label() -> None:
    characters, labels = np.array([[3, 3, 3, 5]]), np.array([[1, 4, 4, 2]])
    assert sequence_labelling.majority(characters, labels)[[3, 5]].tolist() == [4, 2]


def test_sequence_labelling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--characters", "20000", "--epochs", "1", "--units", "8", "--window", "40")
    figures = small(sequence_labelling, tmp_path, *size)
    assert list(figures)[:2] == ["mean F1, bidirectional LSTM", "mean F1, most frequent label"]
    assert figures["accuracy, bidirectional LSTM"] > 0.2
    printed = capsys.readouterr().out
    assert all(f"\n{label} " in printed for label in sequence_labelling.LABELS)


# --- The same with the layers of Keras ------------------------------------------------------------------

SMALL = {
    "text_generation": ["--characters", "9000", "--units", "24"],
    "sentiment": ["--reviews", "200", "--units", "16"],
    "translation": ["--sentences", "300", "--units", "16"],
}


@pytest.mark.parametrize("program", SMALL)
def test_a_program_learns_the_same_with_the_layers_of_keras(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, program, None)  # so that what was imported before is put back
    found = compare_layers.Comparison(
        *(compare_layers.first_batches(program, layers, 4, SMALL[program]) for layers in (OURS, THEIRS))
    )
    assert len(found.ours.losses) == len(found.theirs.seconds) == 4
    assert len(set(found.ours.losses)) == 4
    assert found.difference < 1e-5


LEARNER = """import keras
import numpy as np
from fusedlstm.keras import GRU, LSTM, SimpleRNN


def main(argv):
    model = keras.Sequential([keras.Input((3, 1)), *(layer(2, return_sequences=True) for layer in USED)])
    model.compile("sgd", "mse")
    seen = []
    counter = keras.callbacks.LambdaCallback(on_train_batch_begin=lambda batch, logs: seen.append(batch))
    try:
        model.fit(np.ones((9, 3, 1)), np.ones((9, 3, 2)), 1, callbacks=[counter], verbose=0)
    finally:
        argv += [LSTM, GRU, SimpleRNN, seen]


USED = [LSTM, GRU, SimpleRNN]
"""


@pytest.mark.parametrize(("layers", "source"), [(OURS, fusedlstm.keras), (THEIRS, keras.layers)])
def test_programs_are_given_the_layers_and_stopped(
    layers: str, source: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "learner.py").write_text(LEARNER)
    monkeypatch.setattr(compare_layers, "EXAMPLES", tmp_path)
    monkeypatch.setitem(sys.modules, "learner", None)
    fit, given = keras.Model.fit, []
    training = compare_layers.first_batches("learner", layers, 3, given)
    assert given == [source.LSTM, source.GRU, source.SimpleRNN, [0, 1, 2]]
    assert len(training.losses) == len(training.seconds) == 3
    assert all(seconds > 0 for seconds in training.seconds)
    assert keras.Model.fit is fit
    assert fusedlstm.keras.LSTM is not keras.layers.LSTM


def test_the_first_batches_are_not_timed() -> None:
    ours = compare_layers.Training([1.0, 2.0], [9.0] * compare_layers.FIRST + [0.1, 0.3, 0.2])
    theirs = compare_layers.Training([1.1, 2.0], [9.0, 0.5, 0.8])
    assert (ours.batch, theirs.batch) == (0.2, 0.8)
    found = compare_layers.Comparison(ours, theirs)
    assert found.faster == pytest.approx(4)
    assert found.difference == pytest.approx(0.1 / 1.1)


# --- Pages ----------------------------------------------------------------------------------------------

PROGRAM = '''\
"""A title: with words.

About it.
"""

import argparse


def tiny_model():
    return "the model"


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--picture")
    print("printed by", tiny_model())
    open(parser.parse_args(argv).picture, "wb").close()
    return {"accuracy, ours": 0.75, "accuracy, baseline": 0.5}
'''


MEASURED = compare_layers.Comparison(
    compare_layers.Training([1.0, 0.5], [0.02, 0.02]), compare_layers.Training([1.0, 0.501], [0.05, 0.05])
)


def test_pages_say_what_a_program_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sentiment.py").write_text(PROGRAM)
    monkeypatch.setattr(compare_layers, "EXAMPLES", tmp_path)
    monkeypatch.setitem(sys.modules, "sentiment", sentiment)  # so that it is put back
    docs = tmp_path / "docs"
    (docs / "programs").mkdir(parents=True)
    (docs / "pictures").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- programs: begin -->\nold\n<!-- programs: end -->\nafter\n")
    picture = docs / "pictures" / "program-sentiment.png"
    page = pages.run("sentiment", ["--picture", str(picture)])._replace(busy=False)
    for program in ("sentiment", "translation"):  # the second keeps the row of the first
        pages.write(docs, program, page, MEASURED)

    page = (docs / "programs" / "sentiment.md").read_text()
    parts = (
        "# A title\n\nWith words.\n\nAbout it.",
        "| accuracy, ours | 0.75 |",
        "def tiny_model",
        "printed by",
        "first\n2 batches agree up to 2e-03 of them.",
        "takes 50.0 ms there and 20.0 ms here: 2.5 times as fast.",
    )
    for part in parts:
        assert part in page
    assert "![A title](../pictures/program-sentiment.png)" in page
    records = json.loads((docs / "programs" / "figures.json").read_text())
    assert records["sentiment"]["figures"] == {"accuracy, ours": 0.75, "accuracy, baseline": 0.5}
    row = "sentiment.md) | accuracy, ours: 0.75 | accuracy, baseline: 0.5 | 0 | 2.5 times |"
    assert row in (docs / "programs" / "README.md").read_text()
    text = readme.read_text()
    assert "docs/programs/" + row in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text


def test_a_program_that_fails_does_not_keep_others_from_their_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(function: Callable[..., pages.Page], program: str, arguments: Sequence[str]) -> pages.Page:
        if program == "sentiment":
            raise SystemExit("of no use here")
        return pages.Page(program, "summary", "about", "model", {"ours": 2, "theirs": 1}, 3, True, "printed")

    monkeypatch.setattr(pages, "alone", run)
    monkeypatch.setattr(pages, "compare", lambda program: MEASURED)
    with pytest.raises(SystemExit, match=r"^failed: sentiment$"):
        pages.main(["speech", "sentiment", "dialogue", "--docs", str(tmp_path)])
    assert "| 3 (busy) |" in (tmp_path / "programs" / "README.md").read_text()
    made = {path.name for path in (tmp_path / "programs").iterdir()}
    assert made == {"speech.md", "dialogue.md", "README.md", "figures.json"}
    assert "of no use here" in capsys.readouterr().err


def test_a_process_of_its_own_reports_what_goes_wrong() -> None:
    assert compare_layers.alone(os.path.basename, "a/b") == "b"
    assert compare_layers.alone(os.getpid) != os.getpid()
    with pytest.raises(SystemExit):
        compare_layers.alone(sys.exit, 3)


def test_programs_that_are_not_there_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pages.main(["sentimental"])
    assert "no such program: sentimental; there are text_generation, " in capsys.readouterr().err


def test_every_page_has_a_program() -> None:
    assert all((compare_layers.EXAMPLES / f"{program}.py").exists() for program in pages.PROGRAMS)
