"""Speech: a bidirectional LSTM with CTC understands digits spoken by voices that it has never heard.

It is told what is said, not when. Connectionist temporal classification (Graves, Fernandez, Gomez &
Schmidhuber, 2006) adds an eleventh answer, blank, and sums over all ways to place the digits in time; the
answer is read off by merging repetitions and dropping blanks.

Data: the program makes them. The speech synthesizer eSpeak NG, which the package espeakng-loader carries with
its hundred voices, says one to five digits in eight accents of English, at random speed and pitch; some
noise is added. What the model gets is the logarithm of the power in 26 bands of the mel scale, fifty times a
second. For the test whole families of voices are kept back.

The figure of merit is the word error rate: words left out, put in and taken for others, in proportion to the
words that were said. The baseline is what was done before: the sequence of recorded digits that fits best
when they are stretched in time (dynamic time warping in one stage; Ney, 1984).

    python examples/speech.py
    python examples/speech.py --say 31415 --picture speech.png
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "torch")

import espeakng_loader
import keras
import numpy as np
from keras import layers, ops
from scipy.spatial.distance import cdist
from tqdm import tqdm

from fusedlstm.keras import LSTM

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BLANK = len(DIGITS)
ACCENTS = (
    "en",
    "en-gb-x-rp",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-us",
    "en-us-nyc",
    "en-029",
)
RATE = 22050  # samples a second
HOP, FRAME, BANDS = RATE // 50, 1024, 26
NOISE = 30.0  # of a wave whose samples reach 32767
PROGRESS = 1 if sys.stdout.isatty() else 2  # a bar on a terminal, a line an epoch elsewhere

Digits = tuple[int, ...]

# --- Data: speech ---------------------------------------------------------------------------------------


class Synthesizer:
    """eSpeak NG, through its C interface (speak_lib.h)."""

    SYNCHRONOUS, CHARACTERS, UTF8 = 2, 1, 1
    SPEED, PITCH = 1, 3

    def __init__(self) -> None:
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.library.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
            *(ctypes.c_void_p, ctypes.c_void_p),
        ]
        data = espeakng_loader.get_data_path()
        rate = self.library.espeak_Initialize(self.SYNCHRONOUS, 0, data.encode(), 0)
        if rate != RATE:
            raise RuntimeError(f"eSpeak NG answers {rate} instead of {RATE} samples a second")
        self.variants = sorted(path.name for path in Path(data, "voices", "!v").iterdir())
        self.pieces: list[np.ndarray] = []
        receiver = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
        )
        self.receive = receiver(self._receive)  # is kept, for the library calls it
        self.library.espeak_SetSynthCallback(self.receive)

    def _receive(self, samples: ctypes._Pointer, count: int, events: int) -> int:
        if samples and count > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).astype("float32"))
        return 0

    def say(self, text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
        """Samples of a text; speed in words a minute, pitch from 0 to 99."""
        self.pieces.clear()
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"eSpeak NG has no voice {voice!r}")
        self.library.espeak_SetParameter(self.SPEED, speed, 0)
        self.library.espeak_SetParameter(self.PITCH, pitch, 0)
        raw = text.encode()
        self.library.espeak_Synth(raw, len(raw) + 1, 0, self.CHARACTERS, 0, self.UTF8, None, None)
        return np.concatenate(self.pieces)


def families(variants: Sequence[str], random: np.random.Generator) -> tuple[list[str], list[str]]:
    """Voices to learn from, and a fifth to be tested on; voices of one name are not parted."""
    names = sorted({re.sub(r"\d+$", "", variant) for variant in variants})
    kept_back = set(random.choice(names, len(names) // 5, replace=False))
    parts: tuple[list[str], list[str]] = ([], [])
    for variant in variants:
        parts[re.sub(r"\d+$", "", variant) in kept_back].append(variant)
    return parts


@cache
def mel_filters() -> np.ndarray:
    """(FRAME // 2 + 1, BANDS): triangles whose corners are even on the mel scale, 100 to 8000 Hz."""
    low, high = (2595 * np.log10(1 + hertz / 700) for hertz in (100, 8000))
    corners = 700 * (10 ** (np.linspace(low, high, BANDS + 2) / 2595) - 1)
    hertz = np.fft.rfftfreq(FRAME, 1 / RATE)[:, None]
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    return np.clip(np.minimum((hertz - left) / (centre - left), (right - hertz) / (right - centre)), 0, None)


def log_mel(wave: np.ndarray) -> np.ndarray:
    """(T, BANDS): logarithm of the power in each band, most of it between -2 and 2.

    The wave has to have more samples than a frame.
    """
    frames = np.lib.stride_tricks.sliding_window_view(wave, FRAME)[::HOP] * np.hanning(FRAME)
    power = np.abs(np.fft.rfft(frames)) ** 2
    return ((np.log(power @ mel_filters()) - 14) / 4).astype("float32")


class Utterance(NamedTuple):
    """What was said, and what was heard."""

    digits: Digits
    features: np.ndarray  # (T, BANDS)


class Speaker:
    """Says digits in changing voices."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.synthesizer = Synthesizer()

    def say(self, digits: Digits, variants: Sequence[str]) -> Utterance:
        """Digits in one of the voices, with an accent, speed and pitch that chance gives."""
        voice = f"{self.random.choice(ACCENTS)}+{self.random.choice(variants)}"
        text = " ".join(DIGITS[digit] for digit in digits)
        wave = self.synthesizer.say(
            text, voice, int(self.random.integers(120, 221)), int(self.random.integers(20, 81))
        )
        return Utterance(digits, log_mel(wave + self.random.normal(0, NOISE, len(wave))))

    def say_some(self, count: int, variants: Sequence[str], most: int = 5) -> list[Utterance]:
        """Utterances of one digit to `most`."""
        return [
            self.say(
                tuple(map(int, self.random.integers(10, size=self.random.integers(1, most + 1)))), variants
            )
            for _ in tqdm(range(count), desc="speaking", leave=False)
        ]


# --- The baseline: templates stretched in time ----------------------------------------------------------


def spoken_part(features: np.ndarray) -> np.ndarray:
    """Features without the silence before and after."""
    loud = features.mean(1)
    places = np.flatnonzero(loud > loud.min() + 0.3 * np.ptp(loud))
    return features[places[0] : places[-1] + 1]


def by_templates(features: np.ndarray, templates: Sequence[Utterance]) -> Digits:
    """The digits of the sequence of templates that is nearest to features, each stretched to fit.

    A path goes through the frames of a template by steps of none, one or two, and from the last one to the
    first one of any other. Templates without digits are silence.
    """
    frames = np.concatenate([template.features for template in templates])
    lengths = [len(template.features) for template in templates]
    last = np.cumsum(lengths) - 1
    first = last - lengths + 1
    distance = cdist(features, frames)  # (T, all frames)
    cost = np.full(len(frames), np.inf)  # of the best path to each frame of a template
    cost[first] = distance[0, first]
    heard: list[Digits] = [()]  # on paths that came to the end of a template
    before = np.zeros(len(frames), int)  # the place in it of the best path to each frame
    for now in distance[1:]:
        end = int(cost[last].argmin())
        heard.append(heard[before[last[end]]] + templates[end].digits)
        one, two = np.roll(cost, 1), np.roll(cost, 2)
        one[first], two[first], two[(first + 1) % len(frames)] = cost[last[end]], np.inf, np.inf
        step = np.stack([cost, one, two]).argmin(0)
        cost = np.choose(step, [cost, one, two]) + now
        before = before[np.arange(len(frames)) - step]
        before[first[step[first] == 1]] = len(heard) - 1
    end = int(cost[last].argmin())
    return heard[before[last[end]]] + templates[end].digits


# --- The model ------------------------------------------------------------------------------------------


def speech_model(units: int) -> keras.Model:
    """Log probabilities of the digits and of the blank in each frame; frames of zeros are padding."""
    heard = keras.Input((None, BANDS))  # (B, T, BANDS)
    there = ops.any(heard != 0, axis=-1)
    x = layers.Bidirectional(LSTM(units, return_sequences=True))(heard, mask=there)
    x = layers.Bidirectional(LSTM(units, return_sequences=True))(x, mask=there)
    model = keras.Model(heard, ops.log_softmax(layers.Dense(len(DIGITS) + 1)(x)))
    model.compile(keras.optimizers.Adam(2e-3, clipnorm=1.0), ctc_loss)
    return model


def ctc_loss(said: Any, scores: Any) -> Any:
    """Of each utterance; `said` has the number of frames, then the digits, then blanks: (B, 1 + most)."""
    said = ops.cast(said, "int32")
    frames, digits = said[:, 0], said[:, 1:]
    count = ops.sum(ops.cast(digits != BLANK, "int32"), axis=1)
    return ops.ctc_loss(digits, scores, count, frames, mask_index=BLANK)


def arrays(utterances: Sequence[Utterance]) -> tuple[np.ndarray, np.ndarray]:
    """Padded features (B, T, BANDS), and for `ctc_loss` what was said."""
    x = np.zeros((len(utterances), max(len(u.features) for u in utterances), BANDS), "float32")
    y = np.full((len(utterances), 1 + max(len(u.digits) for u in utterances)), BLANK, "int32")
    for features, said, utterance in zip(x, y, utterances):
        features[: len(utterance.features)] = utterance.features
        said[: 1 + len(utterance.digits)] = [len(utterance.features), *utterance.digits]
    return x, y


def read_off(scores: np.ndarray, frames: np.ndarray) -> list[Digits]:
    """The digits of the best answers in each frame, repetitions merged and blanks dropped."""
    best, _ = ops.ctc_decode(scores, frames, strategy="greedy", mask_index=BLANK)
    return [tuple(int(n) for n in row if n >= 0) for row in ops.convert_to_numpy(best[0])]


# --- The program ----------------------------------------------------------------------------------------


def word_errors(heard: Sequence[int], said: Sequence[int]) -> int:
    """Words to leave out, put in and replace in what was heard to get what was said (Levenshtein, 1966)."""
    row = list(range(len(said) + 1))
    for n, word in enumerate(heard, 1):
        diagonal, row[0] = row[0], n
        for m, other in enumerate(said, 1):
            diagonal, row[m] = row[m], min(row[m] + 1, row[m - 1] + 1, diagonal + (word != other))
    return row[-1]


def word_error_rate(heard: Sequence[Digits], utterances: Sequence[Utterance]) -> float:
    """Errors in proportion to the words that were said."""
    errors = sum(word_errors(words, u.digits) for words, u in zip(heard, utterances, strict=True))
    return errors / sum(len(u.digits) for u in utterances)


def draw(path: str, utterance: Utterance, scores: np.ndarray, heard: Digits) -> None:
    """Save a picture of what comes in, and of what the model makes of each frame."""
    import matplotlib.pyplot as plt

    probabilities = np.exp(scores)
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(9, 5), layout="constrained")
    seconds = np.arange(len(scores)) * HOP / RATE
    extent = (0, seconds[-1], 0, BANDS)
    above.imshow(utterance.features.T, origin="lower", aspect="auto", cmap="magma", extent=extent)
    above.set(ylabel="band", title=f"said: {' '.join(DIGITS[n] for n in utterance.digits)}")
    below.fill_between(seconds, probabilities[:, BLANK], color="0.9", label="blank")
    for digit in sorted(set(heard)):
        below.plot(seconds, probabilities[:, digit], color=f"C{digit}", label=DIGITS[digit])
    below.set(xlabel="seconds", ylabel="probability", ylim=(0, 1.05))
    below.set_title(f"heard: {' '.join(DIGITS[n] for n in heard)}")
    below.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program and return its figures: the model's, the baseline's, and more."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--say", default="2025", help="digits to understand at the end")
    parser.add_argument("--utterances", type=int, default=3000, help="for training")
    parser.add_argument("--unheard", type=int, default=400, help="utterances for the test")
    parser.add_argument("--templates", type=int, default=10, help="of each digit, for the baseline")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--units", type=int, default=96, help="of each layer in each direction")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", metavar="FILE", help="save a picture of what is understood")
    options = parser.parse_args(argv)
    keras.utils.set_random_seed(options.seed)

    speaker = Speaker(np.random.default_rng(options.seed))
    known, unknown = families(speaker.synthesizer.variants, speaker.random)
    learnt = speaker.say_some(options.utterances, known)
    unheard = speaker.say_some(options.unheard, unknown)
    example = speaker.say(tuple(map(int, options.say)), unknown)
    print(f"{len(learnt)} utterances of {len(known)} voices to learn from,")
    print(f"{len(unheard)} of {len(unknown)} others to be tested on")

    x, said = arrays(learnt)
    model = speech_model(options.units)
    model.fit(x, said, options.batch, options.epochs, verbose=PROGRESS)

    def understand(utterances: Sequence[Utterance]) -> tuple[np.ndarray, list[Digits]]:
        x, said = arrays(utterances)
        scores = model.predict(x, 128, verbose=0)
        return scores, read_off(scores, said[:, 0])

    templates = [
        Utterance((digit,), spoken_part(speaker.say((digit,), known).features))
        for digit in range(10)
        for _ in range(options.templates)
    ]
    silence = Utterance((), unheard[0].features[-1:])
    stretched = [by_templates(u.features, [*templates, silence]) for u in tqdm(unheard, "stretching")]
    _, heard = understand(unheard)
    figures = {
        "word error rate": word_error_rate(heard, unheard),
        "word error rate of stretched templates": word_error_rate(stretched, unheard),
    }
    for name, value in figures.items():
        print(f"{name:39} {value:6.1%}")

    scores, (digits,) = understand([example])
    print(f"said {options.say}, heard {''.join(map(str, digits))}")
    if options.picture:
        draw(options.picture, example, scores[0], digits)
    return figures


if __name__ == "__main__":
    main()
