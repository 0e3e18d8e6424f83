"""The parts of the demo, against PyTorch, slow definitions and what they promise."""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusedlstm import LSTM, chinese, cli, demo, weights

TEXT = "".join(f"The {n}th line of a text that is easy to learn.\n\n" for n in range(200))
RANDOM = np.random.default_rng
ALPHABET = demo.RARE + "\n" + "".join(map(chr, range(32, 127)))


def encode(text: str) -> np.ndarray:
    return demo.encode(text, ALPHABET)


def small_model(hidden: int = 8, seed: int | None = None) -> demo.CharacterModel:
    return demo.CharacterModel(ALPHABET, "The ", hidden, seed)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


# --- The text -------------------------------------------------------------------------------------------


def test_the_text_that_ships_with_python_is_english() -> None:
    text = demo.read_text()
    assert len(text) > 300_000
    assert np.mean([letter in ALPHABET for letter in text]) > 0.99
    assert text.count(" the ") > 2000
    assert text.startswith("The ")  # what the sample begins with


def test_the_chinese_text_is_chinese_and_the_same_each_time() -> None:
    text = demo.read_text(language="zh")
    assert len(text) > 300_000
    assert np.mean([0x4E00 <= ord(letter) < 0xA000 for letter in text]) > 0.8
    assert text == demo.read_text(language="zh")
    assert 200 < len(demo.alphabet_of(text)) < 1000


def test_measure_words_and_pronouns_agree() -> None:
    measures = {thing: measure for measure, things in chinese.THINGS.items() for thing in things}
    found = re.findall(
        rf"[{''.join(chinese.NUMBERS)}](\w)({'|'.join(sorted(measures, key=len, reverse=True))})",
        chinese.text(days=200),
    )
    assert len(found) > 300
    assert all(measures[thing] == measure for measure, thing in found)
    for day in chinese.text(days=50).split("\n\n"):
        friend, pronoun = re.findall(r"今天送给(.*?)[一两三四五六七八九十].*，(他|她)", day)[-1]
        assert chinese.PEOPLE[friend] == pronoun
        assert day.count("“") == day.count("”")


@pytest.mark.parametrize(
    ("number", "words"), [(1, "一"), (10, "十"), (12, "十二"), (20, "二十"), (28, "二十八")]
)
def test_numbers_are_read_as_in_chinese(number: int, words: str) -> None:
    assert chinese.numeral(number) == words


def test_no_paragraph_is_repeated_so_that_what_is_held_out_is_new() -> None:
    paragraphs = Counter(demo.read_text().split("\n\n"))
    assert [text for text, count in paragraphs.items() if count > 1 and len(text) > 80] == []


def test_texts_of_any_language_are_kept_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text(
        "\t“Cafe\u0301” – ça va？\n\n你好，世界。\n\n你好，世界。\n\nПривет 한국어", encoding="utf-8"
    )
    assert demo.read_text(str(path)) == "    “Café” – ça va？\n\n你好，世界。\n\nПривет 한국어"


def test_the_alphabet_is_that_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.alphabet_of("好好学习, 天天向上") == demo.RARE + "天好"
    monkeypatch.setattr(demo, "MOST", 3)
    alphabet = demo.alphabet_of("aaabbbbcc" + demo.RARE)
    assert alphabet == demo.RARE + "ab"
    assert demo.encode("abcdb", alphabet).tolist() == [1, 2, 0, 0, 2]


def test_a_python_without_help_pages_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ImportError, match="give a text with --text"):
        demo.read_text()


def test_encoding_keeps_everything() -> None:
    assert "".join(ALPHABET[n] for n in encode(TEXT)) == TEXT


def test_the_split_is_without_overlap() -> None:
    learnt, held_out = demo.split(np.arange(1001))
    np.testing.assert_array_equal(np.concatenate([learnt, held_out]), np.arange(1001))
    assert len(held_out) == 101


# --- The 3-gram model -----------------------------------------------------------------------------------


def slow_trigram(text: str, a: str, b: str, c: str) -> float:
    """Interpolated Kneser-Ney smoothing, said with dictionaries."""

    def smoothed(counts: dict[str, Counter[str]], context: str, shorter: float) -> float:
        values = [count for counter in counts.values() for count in counter.values()]
        once, twice = values.count(1), values.count(2)
        discount = once / (once + 2 * twice) if once else 0.5
        here = counts.get(context)
        if not here:
            return shorter
        freed = discount * len(here) / here.total()
        return max(here[c] - discount, 0) / here.total() + freed * shorter

    three: dict[str, Counter[str]] = defaultdict(Counter)
    two: dict[str, Counter[str]] = defaultdict(Counter)
    one: dict[str, Counter[str]] = {"": Counter()}
    for x, y, z in zip(text, text[1:], text[2:]):
        three[x + y][z] += 1
    for context, counter in three.items():
        two[context[1]].update(counter.keys())
    for counter in two.values():
        one[""].update(counter.keys())
    probability = smoothed(one, "", 1 / len(ALPHABET))
    return smoothed(three, a + b, smoothed(two, b, probability))


def test_the_trigram_is_kneser_neys() -> None:
    text = "".join(filter(ALPHABET.__contains__, demo.read_text()))[:5000]
    trigram = demo.Trigram(encode(text), len(ALPHABET))
    for start in range(0, 5000 - 3, 617):
        for last in "e\n~":
            a, b = text[start : start + 2]
            (probability,) = trigram(*encode(a + b + last)[:, None])
            assert probability == pytest.approx(slow_trigram(text, a, b, last))


def test_the_trigram_is_a_distribution_in_every_context() -> None:
    size = len(ALPHABET)
    first, second, third = np.indices((size,) * 3).reshape(3, -1)
    probabilities = demo.Trigram(encode(TEXT), size)(first, second, third).reshape((size,) * 3)
    assert probabilities.min() > 0
    np.testing.assert_allclose(probabilities.sum(-1), 1)


def test_the_trigram_knows_what_it_counted() -> None:
    text = encode(demo.read_text())
    trigram, letters = demo.Trigram(text, len(ALPHABET)), np.arange(len(ALPHABET))
    t, h, e = encode("the")
    after = trigram(np.full_like(letters, t), np.full_like(letters, h), letters)
    assert after.argmax() == e
    assert trigram.bits(encode("the")) == pytest.approx(-np.log2(after[e]))


def test_the_trigram_has_room_for_chinese() -> None:
    ids = RANDOM(0).integers(0, 4000, 3000)
    assert demo.Trigram(ids, 4000).bits(ids[::-1].copy()) > 11


# --- The model ------------------------------------------------------------------------------------------


def test_loss_and_gradient_are_pytorchs() -> None:
    model = small_model(19, seed=3)
    random = RANDOM(0)
    inputs, targets = random.integers(0, len(ALPHABET), (2, 7, 5))
    state = tuple(random.normal(size=(2, 2, 5, 19)).astype("float32"))
    bits, gradient, final = model.loss(inputs, targets, state)

    leaves = {name: torch.tensor(array, requires_grad=True) for name, array in model.arrays.items()}
    theirs = torch.nn.LSTM(demo.EMBEDDING, 19, num_layers=2)
    layer = {n.removeprefix("lstm."): leaf for n, leaf in leaves.items() if n.startswith("lstm.")}
    y, expected = torch.func.functional_call(
        theirs, layer, (leaves["embedding"][inputs], tuple(map(torch.tensor, state)))
    )
    logits = y @ leaves["output"].T + leaves["bias"]
    loss = torch.nn.functional.cross_entropy(logits.reshape(35, -1), torch.tensor(targets).reshape(-1))
    loss.backward()

    assert bits == pytest.approx(loss.item() / np.log(2), rel=1e-6)
    for ours, part in zip(final, expected):
        np.testing.assert_allclose(ours, part.detach(), atol=1e-6)
    for name, array in demo.views(gradient, model.arrays).items():
        np.testing.assert_allclose(array, leaves[name].grad, atol=1e-7, err_msg=name)


def test_bits_of_a_text_are_the_mean_over_all_its_characters_but_two() -> None:
    model, ids = small_model(8, seed=1), encode(TEXT[:5003])
    loss, _, _ = model.loss(ids[1:-1, None], ids[2:, None], None)
    assert model.bits(ids) == pytest.approx(loss, rel=1e-6)


def test_the_arrays_are_views_of_the_flat_one() -> None:
    model = small_model(8, seed=1)
    before = model.lstm.state_dict()
    model.flat += 1
    model.refresh()
    for name, array in model.lstm.state_dict().items():
        np.testing.assert_array_equal(array, before[name] + np.float32(1))
        np.testing.assert_array_equal(array, model.arrays[f"lstm.{name}"])
    assert sum(array.size for array in model.arrays.values()) == model.flat.size


def test_a_saved_model_is_the_same_when_loaded(tmp_path: Path) -> None:
    path = str(tmp_path / "model")
    model = small_model(8, seed=5)
    record = demo.Record(bits=2.5, trigram=3.5, characters=10, text="digest")
    model.save(path, record)
    loaded, known = demo.CharacterModel.load(path)
    assert known == record
    np.testing.assert_array_equal(loaded.flat, model.flat)
    assert list(islice(demo.write(loaded, 1, RANDOM(0)), 50)) == list(
        islice(demo.write(model, 1, RANDOM(0)), 50)
    )


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    LSTM(3, 5).save(path)
    with pytest.raises(ValueError, match="holds no model of this demo"):
        demo.CharacterModel.load(str(path))
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged"):
        demo.CharacterModel.load(str(path))
    model = small_model(8)
    del model.arrays["bias"]
    model.save(str(path), demo.Record(1, 1, 1, ""))
    with pytest.raises(ValueError, match="does not fit this version of the demo: 'bias'"):
        demo.CharacterModel.load(str(path))
    model.arrays["bias"] = np.zeros(1)
    model.save(str(path), demo.Record(1, 1, 1, ""))
    with pytest.raises(ValueError, match="bias is"):
        demo.CharacterModel.load(str(path))


@pytest.mark.parametrize(
    "facts",
    [
        1,
        None,
        [],
        {"hidden": 10**9},
        {"hidden": []},
        {"bits": {}},
        {"hidden": 8, "other": 1},
        {"alphabet": 5},
        {"alphabet": "a"},
        {"prompt": ""},
    ],
    ids=str,
)
def test_files_with_facts_that_do_not_fit_are_refused(tmp_path: Path, facts: Any) -> None:
    path, model = tmp_path / "model", small_model(8)
    model.save(str(path), demo.Record(1, 1, 1, ""))
    arrays, settings = weights.read(path)
    changed = settings["demo"] | facts if isinstance(facts, dict) else facts
    weights.write(path, arrays, {"demo": changed})
    with pytest.raises(ValueError, match="does not fit this version of the demo"):
        demo.CharacterModel.load(str(path))


# --- Training -------------------------------------------------------------------------------------------


def test_windows_go_on_where_the_ones_before_ended() -> None:
    ids = np.arange(3000)
    steps = (len(ids) - 1) // demo.BATCH
    count = -(-steps // demo.WINDOW)
    first, second = [], []
    for n, (inputs, targets, fresh) in enumerate(islice(demo.windows(ids, RANDOM(0)), 2 * count)):
        assert fresh == (n % count == 0)
        np.testing.assert_array_equal((inputs + 1) % len(ids), targets)
        (first if n < count else second).append(inputs)
    passes = [np.concatenate(windows) for windows in (first, second)]
    for windows in passes:
        assert windows.shape == (steps, demo.BATCH)
        assert len(np.unique(windows)) == windows.size  # each character is read once a pass
        np.testing.assert_array_equal(np.diff(windows, axis=0) % len(ids), 1)
    assert (passes[0][0] != passes[1][0]).all()


def test_adam_is_pytorchs() -> None:
    random, size = RANDOM(0), 2 * demo.Adam.PIECE + 5
    ours = random.normal(size=size).astype("float32")
    theirs = torch.tensor(ours, requires_grad=True)
    optimiser = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.99))
    adam = demo.Adam(size)
    for _ in range(5):
        gradient = random.normal(size=size).astype("float32")
        theirs.grad = torch.tensor(gradient)
        optimiser.step()
        adam.step(ours, gradient, 0.01)
    np.testing.assert_allclose(ours, theirs.detach(), atol=1e-6)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [demo.learning_rate(progress) for progress in np.linspace(0, 1, 101)]
    assert rates[0] == 0
    assert 0 < rates[-1] < 0.05 * demo.PEAK_RATE
    peak = int(np.argmax(rates))
    assert peak <= 10
    assert rates[peak] == pytest.approx(demo.PEAK_RATE, rel=0.02)
    assert (np.diff(rates[:peak]) > 0).all()
    assert (np.diff(rates[peak:]) < 0).all()


def test_a_budget_is_of_steps_or_of_seconds() -> None:
    assert demo.Budget(seconds=10).progress(steps=7, elapsed=5) == 0.5
    assert demo.Budget(steps=4).progress(steps=3, elapsed=1e9) == 0.75
    assert demo.Budget(seconds=10).progress(steps=7, elapsed=11) == 1


def test_training_learns_and_the_same_seed_gives_the_same_model() -> None:
    ids = encode(TEXT)

    def trained() -> tuple[demo.CharacterModel, list[demo.Step]]:
        model, told = small_model(24, seed=2), []
        characters = demo.train(model, ids, demo.Budget(steps=60), RANDOM(2), told.append)
        assert len(told) == 60
        assert 50 * demo.BATCH * demo.WINDOW < characters <= 60 * demo.BATCH * demo.WINDOW
        return model, told

    model, told = trained()
    assert model.bits(ids) < 0.6 * told[0].bits
    np.testing.assert_array_equal(trained()[0].flat, model.flat)


# --- Writing --------------------------------------------------------------------------------------------


def test_writing_follows_the_probabilities() -> None:
    model = small_model(8, seed=1)
    model.arrays["bias"][encode("ab")] = 20, 20 - np.log(3)
    letters = Counter(islice(demo.write(model, 1, RANDOM(0)), 2000))
    assert set(letters) == {"a", "b"}
    wanted = demo.softmax(model.logits(encode("The ")[:, None])[0][-1:])[0]
    assert letters["b"] / 2000 == pytest.approx(wanted[encode("b")[0]], abs=0.05)


def test_what_is_rare_is_not_written() -> None:
    model = small_model(8, seed=1)
    model.arrays["bias"][0] = 30
    for temperature in (0, 1):
        assert demo.RARE not in islice(demo.write(model, temperature, RANDOM(0)), 50)


def test_a_low_temperature_takes_the_likeliest() -> None:
    model = small_model(8, seed=1)
    cold = list(islice(demo.write(model, 0, RANDOM(0)), 30))
    assert cold == list(islice(demo.write(model, 1e-4, RANDOM(1)), 30))
    assert cold != list(islice(demo.write(model, 1, RANDOM(0)), 30))


# --- The program ----------------------------------------------------------------------------------------


def shown(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert cli.main(["demo", *options]) == 0
    return capsys.readouterr().out


def test_the_program_trains_compares_saves_and_writes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(file.with_name("model"))
    common = ["--text", str(file), "--generate", "40", "--seed", "7"]
    trained = shown(capsys, *common, "--steps", "8", "--hidden", "8", "--save", model)
    assert "3-gram model needs" in trained
    assert "Held-out text:" in trained
    sample = trained.rpartition("\n\nThe ")[2]
    assert len(sample) == 40 + 1

    loaded = shown(capsys, "--load", model, "--generate", "0")
    assert f"Loaded {model}" in loaded
    assert "Training" not in loaded
    assert "sample" not in loaded

    assert cli.main(["demo", "--load", model, "--text", str(file)]) == 2
    assert "--seconds or --steps" in capsys.readouterr().err

    further = shown(capsys, "--load", model, *common, "--steps", "2")
    read = [int(text.split()[-4].replace(",", "")) for text in (loaded, further) for text in [told(text)]]
    assert read[0] < read[1]


def told(output: str) -> str:
    """How much the model has read, of the last line that says so."""
    line = [line for line in output.splitlines() if "characters of training" in line][-1]
    return line.partition(" of training")[0] + " of training"


def test_a_model_is_not_trained_further_on_another_text(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(file.with_name("model"))
    shown(capsys, "--text", str(file), "--steps", "1", "--hidden", "8", "--save", model)
    file.write_text(TEXT[: len(TEXT) // 2])
    assert cli.main(["demo", "--load", model, "--text", str(file), "--steps", "1"]) == 2
    assert "another text" in capsys.readouterr().err


def test_the_program_learns_chinese_and_goes_on_from_a_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = str(tmp_path / "model"), tmp_path / "text"
    text.write_text(chinese.text(days=30), encoding="utf-8")
    common = ["--steps", "2", "--hidden", "8", "--generate", "9"]
    trained = shown(capsys, "--text", str(text), *common, "--save", model)
    assert "Left out" not in trained
    assert "\n\n今天是" in trained
    loaded = shown(capsys, "--load", model, "--prompt", "小红", "--generate", "9")
    assert len(loaded.rpartition("\n\n小红")[2]) == 9 + 1
    assert cli.main(["demo", "--load", model, "--prompt", "小鑫z"]) == 2
    assert "characters of the prompt: z 鑫" in capsys.readouterr().err


def test_the_lstm_beats_counting_in_chinese() -> None:
    """As `fusedlstm demo --language zh` does by far, in a few seconds on a part of the text."""
    text = chinese.text(days=200)
    learnt, held_out = demo.split(text)
    alphabet = demo.alphabet_of(learnt)
    model = demo.CharacterModel(alphabet, text[:4], hidden=64, seed=1)
    learnt, held_out = demo.encode(learnt, alphabet), demo.encode(held_out, alphabet)
    demo.train(model, learnt, demo.Budget(steps=300), RANDOM(1), lambda step: None)
    assert model.bits(held_out) < demo.Trigram(learnt, len(alphabet)).bits(held_out)


def test_the_language_is_that_of_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    told = shown(capsys, "--language", "zh", "--steps", "1", "--hidden", "8", "--generate", "0")
    assert "Alphabet: " in told
    assert "3-gram model needs" in told


def test_a_text_that_is_too_short_is_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("Too short.")
    assert cli.main(["demo", "--text", str(file)]) == 2
    assert "too short" in capsys.readouterr().err


def test_a_line_of_the_display_changes_nothing_in_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model(8, seed=1)
    with demo.Display(model) as display:
        before = model.flat.copy()
        display.show(demo.Step(0.5, 2.25, 1000.0))
    np.testing.assert_array_equal(model.flat, before)
    assert " 2.25 bits  The " in capsys.readouterr().out
