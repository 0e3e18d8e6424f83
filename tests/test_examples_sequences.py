"""The programs in examples/ about sequences: their parts on cases made by hand, and each of them, small."""

from __future__ import annotations

import itertools
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from programs import RANDOM, small  # first: it makes the programs importable

# isort: split

import compare_cells
import dialogue
import forecasting
import keras
import numpy as np
import pytest
import speech
import summarise
import translation

# --- Translation ----------------------------------------------------------------------------------------


class Toy:
    """Log probabilities of five tokens that depend on all that is written: those from 2 on can follow."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def one(self, written: tuple[int, ...]) -> np.ndarray:
        weights = RANDOM([self.seed, *written]).random(5) ** 3
        weights[[translation.PAD, translation.START]] = 0
        with np.errstate(divide="ignore"):
            return np.log(weights / weights.sum())

    def __call__(self, written: np.ndarray) -> np.ndarray:
        return np.stack([self.one(tuple(row)) for row in written.tolist()])

    def score(self, sentence: tuple[int, ...]) -> float:
        beginnings = [(translation.START, *sentence[:n]) for n in range(len(sentence))]
        return sum(self.one(beginning)[token] for beginning, token in zip(beginnings, sentence))

    def sentences(self, longest: int) -> list[tuple[int, ...]]:
        """All that end, or are as long as can be; the likeliest first."""
        found = [()]
        for _ in range(longest):
            found = [s + t for s in found for t in ([()] if translation.END in s else [(2,), (3,), (4,)])]
        return sorted(found, key=self.score, reverse=True)


def beam(toy: Toy, width: int, longest: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
    found, scores = translation.beam_search(toy, 1, width, longest)
    return [tuple(n for n in row if n != translation.PAD) for row in found[0].tolist()], scores[0]


@pytest.mark.parametrize("seed", range(3))
def test_a_beam_that_holds_everything_finds_the_best_in_order(seed: int) -> None:
    toy = Toy(seed)
    right = toy.sentences(4)
    found, scores = beam(toy, len(right), 4)
    np.testing.assert_allclose(scores, [toy.score(sentence) for sentence in right])
    assert found == right


@pytest.mark.parametrize("seed", range(3))
def test_a_beam_of_one_is_greedy(seed: int) -> None:
    toy, greedy = Toy(seed), ()
    while len(greedy) < 6 and translation.END not in greedy:
        greedy += (int(toy.one((translation.START, *greedy)).argmax()),)
    (found,), (score,) = beam(toy, 1, 6)
    assert found == greedy
    assert score == pytest.approx(toy.score(greedy))


def test_beams_of_a_batch_do_not_mix() -> None:
    toys = Toy(1), Toy(2)

    def both(written: np.ndarray) -> np.ndarray:
        return np.concatenate([toy(part) for toy, part in zip(toys, np.split(written, 2))])

    found, scores = translation.beam_search(both, 2, 3, 5)
    for toy, sentences, score in zip(toys, found, scores):
        alone, expected = translation.beam_search(toy, 1, 3, 5)
        np.testing.assert_array_equal(sentences[:, : alone.shape[2]], alone[0])
        np.testing.assert_allclose(score, expected[0])


def test_a_vocabulary_brings_back_what_it_encoded() -> None:
    sentences = [("b", "a"), (), ("a", "c", "a")]
    vocabulary = translation.Vocabulary(sentences)
    ids = vocabulary.encode(sentences)
    assert ids.shape == (3, 5)
    assert [vocabulary.decode(row[1:]) for row in ids] == sentences
    assert ids[1].tolist() == [translation.START, translation.END] + 3 * [translation.PAD]
    with pytest.raises(ValueError, match="not in the vocabulary: x, y"):
        vocabulary.encode([("a", "x", "y")])


@pytest.mark.parametrize(
    ("number", "english", "dictionary"),
    [
        (16, "sixteen", "sixteen"),
        (57, "fifty seven", "seven fifty"),
        (240_611, "two hundred and forty thousand six hundred and eleven", None),
        (1000, "one thousand", "one thousand"),
        (100_001, "one hundred thousand and one", "one hundred and thousand one"),
    ],
)
def test_number_words(number: int, english: str, dictionary: str | None) -> None:
    assert " ".join(translation.english(number)) == english
    assert " ".join(translation.by_dictionary(translation.german(number))) == (dictionary or english)


def test_a_sentence_is_read_alike_alone_and_beside_longer_ones() -> None:
    keras.utils.set_random_seed(0)
    numbers = [7, 57_684]
    sources, targets = [*map(translation.german, numbers)], [*map(translation.english, numbers)]
    model = translation.Translator(sources, targets, units=8)
    written = model.write.encode(targets)[:1, :4]

    def log_probabilities(source: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        encoded = [array[:1] for array in model.encoder.predict_on_batch(source)]
        inputs = [written[:, :steps], source[:1], *encoded]
        return model.decoder.predict_on_batch(inputs)

    alone, attention = log_probabilities(model.read.encode(sources[:1]), 4)
    beside, padded = log_probabilities(model.read.encode(sources), 4)
    np.testing.assert_allclose(beside, alone, atol=1e-5)
    np.testing.assert_allclose(np.exp(alone).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(padded[..., attention.shape[-1] :], 0, atol=1e-7)
    shorter, _ = log_probabilities(model.read.encode(sources[:1]), 2)
    np.testing.assert_allclose(shorter, alone[:, :2], atol=1e-5)  # nothing looks ahead


def test_where_the_decoder_looks_adds_up_to_one_at_every_word() -> None:
    sources, targets = [translation.german(21)], [translation.english(21)]
    weights = translation.Translator(sources, targets, units=8).attention(sources[0], targets[0])
    assert weights.shape == (len(targets[0]) + 1, len(sources[0]) + 2)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_translation_runs(tmp_path: Path) -> None:
    options = ["--sentences", "110", "--unseen", "5", "--largest", "200", "--units", "16"]
    figures = small(translation, tmp_path, *options, "--epochs", "1", "--beam", "2", "--number", "21")
    assert list(figures)[:2] == ["accuracy, beam search", "accuracy of the dictionary"]


# --- Summarising ----------------------------------------------------------------------------------------


def test_the_line_follows_from_the_report() -> None:
    random, drawn = RANDOM(0), 0
    for _ in range(300):
        text, line = summarise.report(random)
        goals = re.findall(r"(\w+) scored for (\w+) \.|then (\w+) of (\w+) found the net", text)
        found = [(a or c, b or d) for a, b, c, d in goals]
        scored = Counter(team for _, team in found)
        scored.update(re.findall(r"(\w+) had a goal by", text))
        first, second = re.search(r" (\w+) met (\w+) in ", text).groups()
        if drew := re.fullmatch(r"(\w+) and (\w+) drew (\d) all \.", line):
            assert drew.groups() == (first, second, str(scored[first]))
            assert scored[first] == scored[second]
            drawn += 1
        else:
            won = re.fullmatch(r"(\w+) beat (\w+) (\d) to (\d) through (\w+) \.", line)
            winner, loser, most, least, scorer = won.groups()
            assert (int(most), int(least)) == (scored[winner], scored[loser])
            assert int(most) > int(least)
            last = [sentence for sentence in text.split(" . ") if is_goal(sentence, winner)][-1]
            assert scorer in last
    assert 10 < drawn < 150


def is_goal(sentence: str, team: str) -> bool:
    return (
        team in sentence
        and "post" not in sentence
        and "not count" not in sentence
        and " met " not in sentence
    )


def test_names_are_numbered_as_they_come_and_come_back() -> None:
    text, line = ("Ba", "met", "Co", "and", "Ba"), ("Co", "beat", "Ba")
    text, line, found = summarise.numbered(text, line, {"met", "and", "beat"})
    assert text == ("<0>", "met", "<1>", "and", "<0>")
    assert line == ("<1>", "beat", "<0>")
    assert summarise.named(line, found) == ("Co", "beat", "Ba")


def test_rouge_is_the_mean_of_the_shares_of_the_common_subsequence() -> None:
    a, b = tuple("abcde"), tuple("badxe")
    assert summarise.common(a, b) == 3
    assert summarise.rouge([a, a], [b, a]) == pytest.approx((3 / 5 + 1) / 2)
    assert summarise.lead(("a", "b", ".", "c", ".")) == ("a", "b", ".")


def test_what_comes_next_is_written_or_copied() -> None:
    keras.utils.set_random_seed(0)
    model = summarise.Summariser(["met", "beat", "."], units=8)
    source = model.read.encode([("<0>", "met", "<1>", "."), ("<1>", ".")])
    written = np.full((2, 3), translation.START)
    y, attention = model.decoder.predict_on_batch([written, source, *model.encoder.predict_on_batch(source)])
    assert y.shape == (2, 3, len(model.read))
    np.testing.assert_allclose(np.exp(y).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(attention[1, :, 4:], 0, atol=1e-7)  # padding
    *_, copies, written = [layer for layer in model.decoder.layers if isinstance(layer, keras.layers.Dense)]
    copies.set_weights([0 * w + 50 * (w.ndim == 1) for w in copies.get_weights()])  # always copies
    y, _ = model.decoder.predict_on_batch(
        [np.full((2, 3), translation.START), source, *model.encoder.predict_on_batch(source)]
    )
    assert np.exp(y[0, :, model.read.ids["beat"]]).max() < 1e-6  # which is not in the text
    assert np.exp(y[0, :, model.read.ids["met"]]).min() > 0.01


def test_summarising_runs(tmp_path: Path) -> None:
    size = ["--reports", "130", "--unseen", "6", "--units", "16"]
    figures = small(summarise, tmp_path, *size, "--epochs", "1", "--beam", "2", "--report", "5")
    assert list(figures)[:2] == ["ROUGE-L, beam search", "ROUGE-L, lead"]


# --- Dialogue -------------------------------------------------------------------------------------------


def meanings(say: object, values: range, draws: int) -> dict[str, int]:
    """What each phrase means; none means two things."""
    random, found = RANDOM(0), {}
    for value in values:
        for _ in range(draws):
            assert found.setdefault(say(value, random), value) == value
    return found


@pytest.fixture(scope="module")
def times() -> dict[str, int]:
    return meanings(dialogue.spoken_time, range(0, dialogue.DAY, dialogue.STEP), 20)


@pytest.fixture(scope="module")
def durations() -> dict[str, int]:
    return meanings(dialogue.spoken_duration, range(15, dialogue.LONGEST + 1, 15), 40)


def test_times_as_people_say_them(times: dict[str, int], durations: dict[str, int]) -> None:
    expected = {
        "midnight": "00:00",
        "twelve o'clock at night": "00:00",
        "five to noon": None,
        "twelve oh five am": "00:05",
        "half past three at night": "03:30",
        "a quarter to seven in the morning": "06:45",
        "noon": "12:00",
        "twelve thirty pm": "12:30",
        "five to one in the afternoon": "12:55",
        "twenty five past nine in the evening": "21:25",
        "five to twelve pm": "23:55",
    }
    for text, clock in expected.items():
        assert (dialogue.clock(times[text]) if text in times else None) == clock, text
    assert durations["three quarters of an hour"] == durations["forty five minutes"] == 45
    assert durations["two hours"] == 120


def test_answers_are_right(times: dict[str, int], durations: dict[str, int]) -> None:
    patterns = {
        r"i put the \w+ in at (?P<first>.*) and it takes (?P<takes>.*) when is it ready": "ready",
        r"the \w+ takes (?P<takes>.*) when will it be done if it goes in at (?P<first>.*)": "ready",
        r"how long is the [\w ]+ from (?P<first>.*) to (?P<last>(?:\S+ ){0,4}\S+)": "length",
        r"the [\w ]+ starts at (?P<first>.*) and ends at (?P<last>.*) how long does it take": "length",
    }
    questions, answers = dialogue.exchanges(400, RANDOM(1))
    seen = set()
    for question, answer in zip(questions, answers):
        assert "".join(dialogue.pieces(answer)) == answer
        for pattern, kind in patterns.items():
            if not (match := re.fullmatch(pattern, question)) or match["first"] not in times:
                continue
            first = times[match["first"]]
            if kind == "ready":
                minutes = durations[match["takes"]]
                end = dialogue.clock((first + minutes) % dialogue.DAY)
                assert answer == f"{dialogue.clock(first)} and {minutes} minutes make {end}."
            elif match["last"] in times:
                last = times[match["last"]]
                ends = f"{dialogue.clock(first)} to {dialogue.clock(last)}"
                assert answer == f"{ends} makes {(last - first) % dialogue.DAY} minutes."
            seen.add(pattern)
    assert seen == set(patterns)


def test_the_most_similar_question_shares_the_most_telling_words() -> None:
    known = ["call anna on friday", "feed the cat at noon", "feed the dog at noon"]
    assert dialogue.most_similar(known, ["at noon feed the dog", "please call anna"]) == [2, 0]


def test_dialogue_runs(tmp_path: Path) -> None:
    options = ["--questions", "150", "--unseen", "5", "--units", "16", "--epochs", "1", "--beam", "2"]
    small(dialogue, tmp_path, *options)


# --- Forecasting ----------------------------------------------------------------------------------------


def made(values: np.ndarray, *baselines: Callable[..., np.ndarray], test: int = 30) -> forecasting.Series:
    task = forecasting.Task(season=6, horizon=5, past=8)
    return forecasting.Series(values, "units", "hour", task, baselines, test=test, every=4)


@pytest.mark.parametrize(
    "baseline",
    [forecasting.seasonal_naive, forecasting.exponential_smoothing, forecasting.autoregression],
)
def test_baselines_forecast_a_series_that_repeats(baseline: Callable[..., np.ndarray]) -> None:
    season = 50 + 40 * np.sin(2 * np.pi * np.arange(6) / 6)
    known = np.tile(season, 12) + RANDOM(0).normal(0, 0.01, 72)
    np.testing.assert_allclose(baseline(known, made(known).task), season[:5], atol=0.5)


def test_the_chaotic_series_solves_its_equation() -> None:
    fine, coarse = (
        forecasting.mackey_glass(60, parts=100).values,
        forecasting.mackey_glass(60, parts=50).values,
    )
    slope = (fine[18:] - fine[16:-2]) / 2  # at days 17 to 58
    before, now = fine[:-18], fine[17:-1]
    np.testing.assert_allclose(slope, 0.2 * before / (1 + before**10) - 0.1 * now, atol=3e-3)
    np.testing.assert_allclose(coarse[:20], fine[:20], atol=0.02)


def test_the_last_forecast_ends_with_the_series() -> None:
    series = made(np.arange(100.0), test=29)
    assert list(series.presents) == [71, 75, 79, 83, 87, 91, 95]


def test_every_method_is_given_the_same_past_and_truth() -> None:
    seen = []

    def watcher(known: np.ndarray, task: forecasting.Task) -> np.ndarray:
        seen.append(known[-1])
        return known[-1] + 1 + np.arange(task.horizon)

    options = Namespace(units=2, epochs=1, batch=16)
    truth, found = forecasting.compare(made(np.arange(100.0), watcher), options)
    assert seen == [69, 73, 77, 81, 85, 89, 93]
    np.testing.assert_array_equal(found["watcher"], truth)
    np.testing.assert_allclose(found["regression"], truth, atol=0.1)  # a straight line


def test_models_do_not_learn_from_the_test() -> None:
    values = RANDOM(0).uniform(0, 100, 100)
    changed = np.concatenate([values[:74], np.zeros(26)])  # the second forecast is from here on
    forecasts = []
    for series in (made(values), made(changed)):
        keras.utils.set_random_seed(0)
        forecasts.append(forecasting.forecasts(series, units=4, epochs=1, batch=16))
    for one, other in zip(*forecasts):
        np.testing.assert_allclose(one[:2], other[:2], rtol=1e-6)
        assert (one[2] != other[2]).all()


def test_the_lstm_learns_what_a_regression_leaves() -> None:
    keras.utils.set_random_seed(0)
    series = made(np.abs((np.arange(400) * 0.37) % 4 - 2) ** 3)  # its slope changes with its place
    truth = np.stack([series.values[now : now + 5] for now in series.presents])
    linear, both = forecasting.forecasts(series, units=16, epochs=15, batch=16)
    assert np.abs(both - truth).mean() < 0.7 * np.abs(linear - truth).mean()


def test_forecasting_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waves = 50 + 40 * np.sin(np.arange(120)) + RANDOM(0).normal(0, 1, 120)
    baselines = forecasting.autoregression, forecasting.seasonal_naive
    monkeypatch.setattr(forecasting, "SERIES", {"waves": lambda: made(waves, *baselines)})
    figures = small(forecasting, tmp_path, "--epochs", "1", "--units", "4")
    methods = ["regression and LSTM", "autoregression", "seasonal naive", "regression"]
    assert list(figures) == [f"mean absolute error, waves, {method}" for method in methods]
    assert small(forecasting, tmp_path, "--epochs", "1", "--units", "4", "--validation") != figures


def test_the_series_are_as_described() -> None:
    months = forecasting.carbon_dioxide()
    assert len(months.values) == 526
    assert np.isfinite(months.values).all()
    assert 310 < months.values[0] < 320 < 365 < months.values[-1] < 375
    assert list(forecasting.SERIES) == ["Mackey-Glass", "carbon dioxide"]


# --- Speech ---------------------------------------------------------------------------------------------


def test_the_loudest_band_is_that_of_the_tone() -> None:
    seconds = np.arange(speech.RATE // 2) / speech.RATE
    peaks = speech.mel_filters().argmax(0) * speech.RATE / speech.FRAME  # hertz, of the bands
    for band in (5, 12, 20):
        features = speech.log_mel(np.sin(2 * np.pi * peaks[band] * seconds))
        assert features.shape == ((len(seconds) - speech.FRAME) // speech.HOP + 1, speech.BANDS)
        assert (features.argmax(1) == band).all()


def test_voices_of_one_name_are_not_parted() -> None:
    variants = [f"{name}{n}" for name in "abcdefghij" for n in ("", "2", "10")]
    known, unknown = speech.families(variants, RANDOM(0))
    assert sorted(known + unknown) == sorted(variants)
    assert len(unknown) == 6
    assert not {name[0] for name in known} & {name[0] for name in unknown}


def test_slow_speech_is_longer_and_voices_differ() -> None:
    synthesizer = speech.Synthesizer()
    waves = [synthesizer.say("three", voice, speed, 50) for voice, speed in [("en", 120), ("en", 220)]]
    assert len(waves[0]) > 1.3 * len(waves[1])
    assert 1000 < np.abs(waves[0]).max() < 2**15
    with pytest.raises(ValueError, match="no voice 'nobody'"):
        synthesizer.say("three", "nobody", 120, 50)


def test_repetitions_are_merged_and_blanks_dropped() -> None:
    best = [3, 3, speech.BLANK, 3, 5, 5, speech.BLANK, 7]
    scores = np.eye(len(speech.DIGITS) + 1, dtype="float32")[[best, best]]
    assert speech.read_off(scores, np.array([8, 5])) == [(3, 3, 5, 7), (3, 3, 5)]


def test_the_loss_sums_over_all_ways_to_place_the_digits() -> None:
    scores = RANDOM(0).normal(size=(2, 4, len(speech.DIGITS) + 1)).astype("float32")
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    said, frames = [(2, 2), (7,)], [4, 3]

    def merged(path: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n for n, _ in itertools.groupby(path) if n != speech.BLANK)

    expected = []
    for n, (digits, count) in enumerate(zip(said, frames)):
        paths = itertools.product([*set(digits), speech.BLANK], repeat=count)
        ways = [np.prod(probabilities[n, range(count), path]) for path in paths if merged(path) == digits]
        expected.append(-np.log(sum(ways)))
    utterances = [speech.Utterance(d, np.ones((t, speech.BANDS))) for d, t in zip(said, frames)]
    x, y = speech.arrays(utterances)
    assert x.shape == (2, 4, speech.BANDS)
    assert not x[1, 3].any()
    loss = speech.ctc_loss(keras.ops.convert_to_tensor(y), keras.ops.convert_to_tensor(scores))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(loss), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("heard", "said", "errors"),
    [("", "", 0), ("", "12", 2), ("123", "123", 0), ("1243", "123", 1), ("13", "123", 1), ("921", "123", 2)],
)
def test_word_errors(heard: str, said: str, errors: int) -> None:
    assert speech.word_errors(tuple(map(int, heard)), tuple(map(int, said))) == errors


def test_the_rate_is_of_all_words() -> None:
    utterances = [speech.Utterance(digits, np.zeros((1, 1))) for digits in [(1, 2, 3), (4,)]]
    assert speech.word_error_rate([(1, 3), (4, 4)], utterances) == 2 / 4


def test_stretched_templates_are_found() -> None:
    random = RANDOM(0)
    templates = [speech.Utterance((n,), random.normal(size=(6 + n, 4))) for n in range(4)]
    silence = speech.Utterance((), np.full((1, 4), -5.0))
    parts = [templates[2].features.repeat(2, axis=0), silence.features.repeat(3, axis=0)]
    parts += [templates[0].features, templates[3].features[::2], templates[3].features]
    noise = random.normal(0, 0.05, (sum(map(len, parts)), 4))
    assert speech.by_templates(np.concatenate(parts) + noise, [*templates, silence]) == (2, 0, 3, 3)


def test_speech_runs(tmp_path: Path) -> None:
    options = ["--utterances", "24", "--unheard", "4", "--templates", "1", "--epochs", "1", "--units", "8"]
    small(speech, tmp_path, *options, "--say", "31")


# --- Comparing cells ------------------------------------------------------------------------------------


def test_two_numbers_are_marked_and_their_sum_is_wanted() -> None:
    x, y = compare_cells.adding_problem(2000, 30, RANDOM(0))
    assert x.shape == (2000, 30, 2)
    marks = x[..., 1]
    np.testing.assert_array_equal(marks[:, :3].sum(1), 1)
    np.testing.assert_array_equal(marks[:, 15:].sum(1), 1)
    np.testing.assert_array_equal(marks.sum(1), 2)
    np.testing.assert_allclose(y[:, 0], x.prod(-1).sum(1))
    assert np.mean((y - 1) ** 2) == pytest.approx(compare_cells.BASELINE, rel=0.1)


@pytest.mark.parametrize("cell", ["RNN", "bidirectional LSTM"])
def test_gradients_are_differences(cell: str) -> None:
    keras.utils.set_random_seed(0)
    model = compare_cells.adding_model(cell, 8)
    x, _ = compare_cells.adding_problem(1, 5, RANDOM(0))
    step = 1e-2
    moved = (x + step * np.eye(10).reshape(10, 5, 2)).astype("float32")
    back = (x - step * np.eye(10).reshape(10, 5, 2)).astype("float32")
    slope = (model.predict_on_batch(moved) - model.predict_on_batch(back)) / (2 * step)
    norms = np.linalg.norm(slope.reshape(5, 2), axis=1)
    np.testing.assert_allclose(compare_cells.gradient_norms(model, x), norms[::-1], rtol=1e-2)


def test_a_curve_has_the_mean_loss_of_each_epoch() -> None:
    options = Namespace(seed=0, batch=4, steps=10, epochs=3, updates=2)
    model = compare_cells.adding_model("LSTM", 8)
    model.optimizer.learning_rate = 0.0
    curve = compare_cells.train(model, options, "LSTM")
    random = RANDOM(1)
    x, y = map(np.concatenate, zip(*(compare_cells.adding_problem(4, 10, random) for _ in range(6))))
    squares = (model.predict(x, verbose=0) - y) ** 2
    np.testing.assert_allclose(curve, squares.reshape(3, -1).mean(1), rtol=1e-4)


def test_comparing_cells_runs(tmp_path: Path) -> None:
    figures = small(
        compare_cells,
        tmp_path,
        "--steps",
        "10",
        "--epochs",
        "2",
        "--updates",
        "2",
        "--batch",
        "4",
        "--units",
        "8",
    )
    assert figures["mean squared error, always 1"] == compare_cells.BASELINE


# --- What a front page promises ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("both", "said"), [(1.0, "adds nothing"), (0.99, "adds nothing"), (0.5, "takes 50%")]
)
def test_the_program_says_what_the_lstm_adds(both: float, said: str) -> None:
    error = "mean absolute error, here, regression"
    assert said in forecasting.verdict({error: 1.0, f"{error} and LSTM": both}, "here")


def test_matplotlib_is_imported_where_a_picture_is_asked_for() -> None:
    """On a machine without it the programs run."""
    for program in sorted(Path(translation.__file__).parent.glob("*.py")):
        assert not re.search("^(import|from) matplotlib", program.read_text(encoding="utf-8"), re.MULTILINE)
