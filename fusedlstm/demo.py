"""A two-layer LSTM that learns to write a text of any language, with NumPy and this package alone.

The program has five parts: the text, the 3-gram model that is to be beaten, the character model, its
training, and writing.  Sizes in the comments:

    T  characters of a window       V  characters of the alphabet      H  hidden units
    B  streams read side by side    E  numbers that stand for a character

Run it with ``fusedlstm demo``, on a text of yours with ``--text FILE``; ``fusedlstm demo --help`` lists what
can be changed.
"""

from __future__ import annotations

import hashlib
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from . import LSTM, cells, chinese, layers, weights
from .files import check_writable

HIDDEN = 256  # H
EMBEDDING = 128  # E
BATCH = 32  # B
WINDOW = 16  # T: gradients reach this many characters back
PEAK_RATE = 1e-2  # of learning
LARGEST_GRADIENT = 1.0  # norm; longer gradients are cut to it
SECONDS = 100.0  # of training, so that the whole program takes less than two minutes
SAMPLE = 600  # characters to write at the end
TEMPERATURE = 0.5
PROMPT = 4  # characters at the beginning of the text, from which the model goes on

# --- The text -------------------------------------------------------------------------------------------

RARE = "\N{REPLACEMENT CHARACTER}"  # stands for every character that is not in an alphabet
MOST = 4000  # characters of an alphabet
TEXTS = {"en": "Python's help pages", "zh": "a Chinese diary from a grammar"}  # by language


def read_text(path: str | None = None, language: str = "en") -> str:
    """The text of a file, or one that is at hand: Python's help pages, or a diary in Chinese.

    Paragraphs that stand in several places are kept once: else part of the text that is held out would
    have been read in training.  Characters that can be written in two ways are written in one.

    Raises:
        ValueError: if the file is not UTF-8.
        ImportError: if this Python has no help pages.
    """
    if path is not None:
        try:
            raw = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    elif language == "zh":
        raw = chinese.text()
    else:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise ImportError("this Python comes without its help pages; give a text with --text") from error
        raw = "\n\n".join(topics.values())
    plain = unicodedata.normalize("NFC", raw).expandtabs(4)
    return "\n\n".join(dict.fromkeys(plain.split("\n\n")))


def alphabet_of(text: str) -> str:
    """The characters to tell apart: those that occur more than once, at most `MOST`; the first is `RARE`.

    Those that occur once teach the model when something rare is to be expected.
    """
    frequent = [character for character, count in Counter(text).most_common(MOST - 1) if count > 1]
    return RARE + "".join(sorted(set(frequent) - {RARE}))


def encode(text: str, alphabet: str) -> np.ndarray:
    """The places of characters in the alphabet."""
    places = {character: place for place, character in enumerate(alphabet)}
    return np.array([places.get(character, 0) for character in text])


def split(text: Any) -> tuple[Any, Any]:
    """What to learn from, and the last tenth, which is held out."""
    end = len(text) * 9 // 10
    return text[:end], text[end:]


# --- The 3-gram model: what counting alone can do -------------------------------------------------------


class Trigram:
    """Probabilities of a character after two others.

    Interpolated Kneser-Ney smoothing (Chen & Goodman, 1998), which needs fewer bits here than Witten and
    Bell's, or than plain absolute discounting; three discounts instead of one would gain 0.01 bits.

    Args:
        ids: the text to count in.
        size: V.
    """

    def __init__(self, ids: np.ndarray, size: int) -> None:
        self.size = size
        after_two = _Counts(ids[:-2] * size + ids[1:-1], ids[2:], size)
        after_one = _Counts(
            after_two.pairs // size % size, after_two.pairs % size, size
        )  # in how many contexts
        after_none = _Counts(np.zeros_like(after_one.pairs), after_one.pairs % size, size)
        self.tables = after_none, after_one, after_two

    def __call__(self, first: np.ndarray, second: np.ndarray, third: np.ndarray) -> np.ndarray:
        """The probability of each third character after the first two."""
        probabilities = np.full(third.shape, 1 / self.size)
        for table, context in zip(self.tables, (0 * second, second, first * self.size + second)):
            probabilities = table.smoothed(context, third, probabilities)
        return probabilities

    def bits(self, ids: np.ndarray) -> float:
        """Bits per character that the model needs for a text, its first two characters given."""
        return float(-np.log2(self(ids[:-2], ids[1:-1], ids[2:])).mean())


class _Counts:
    """How often characters follow contexts; a table of all contexts would be too large for Chinese."""

    def __init__(self, contexts: np.ndarray, characters: np.ndarray, size: int) -> None:
        self.size = size
        self.pairs, self.counts = np.unique(contexts * size + characters, return_counts=True)
        self.contexts, place, self.kinds = np.unique(
            self.pairs // size, return_inverse=True, return_counts=True
        )
        self.totals = np.bincount(place, self.counts)
        once, twice = (self.counts == 1).sum(), (self.counts == 2).sum()
        self.discount = once / (once + 2 * twice) if once else 0.5

    def smoothed(self, contexts: np.ndarray, characters: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """Take a part of each count, and share it out as the model with a shorter context says."""
        counts = _found(contexts * self.size + characters, self.pairs, self.counts)
        totals = _found(contexts, self.contexts, self.totals)
        taken = self.discount * _found(contexts, self.contexts, self.kinds)
        kept = np.maximum(counts - self.discount, 0)
        return np.where(totals > 0, (kept + taken * shorter) / np.maximum(totals, 1), shorter)


def _found(keys: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values of keys, 0 for those that are not among the known ones, which are sorted."""
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[places] == keys, values[places], 0)


# --- The character model --------------------------------------------------------------------------------


class Record(NamedTuple):
    """What is known about a trained model."""

    bits: float  # per character of the held-out text
    trigram: float  # the same of the 3-gram model
    characters: int  # read in training
    text: str  # SHA-256 of all the text

    def __str__(self) -> str:
        return (
            f"{self.bits:.3f} bits per character after {self.characters:,} characters of training; "
            f"a 3-gram model needs {self.trigram:.3f}"
        )


class CharacterModel:
    """Embedding, two layers of LSTM, softmax.

    All parameters lie in one flat array, which the optimiser works on, and `arrays` gives them by name.

    Args:
        alphabet: the V characters that it tells apart.
        prompt: what it goes on from where it is not told from what.
        hidden: H.
        seed: of the first weights.
    """

    def __init__(self, alphabet: str, prompt: str, hidden: int = HIDDEN, seed: int | None = None) -> None:
        self.alphabet, self.prompt = alphabet, prompt
        lstm = LSTM(EMBEDDING, hidden, num_layers=2, seed=seed)
        random = np.random.default_rng(seed)
        bound = hidden**-0.5
        drawn = {
            "embedding": random.normal(0, 0.5, (len(alphabet), EMBEDDING)),
            "output": random.uniform(-bound, bound, (len(alphabet), hidden)),
            "bias": np.zeros(len(alphabet)),
        }
        self._hold(lstm, drawn)

    def _hold(self, lstm: LSTM, own: Mapping[str, np.ndarray]) -> None:
        """Take the layers, and copies of their weights and of the model's own arrays."""
        self.lstm = lstm
        arrays = {
            "embedding": own["embedding"],
            **{f"lstm.{name}": array for name, array in lstm.state_dict().items()},
            "output": own["output"],
            "bias": own["bias"],
        }
        self.flat = flatten(arrays)
        self.arrays = views(self.flat, arrays)

    def refresh(self) -> None:
        """Hand the LSTM its weights, after `flat` has changed."""
        named = self.arrays.items()
        self.lstm.load_state_dict({n[5:]: array for n, array in named if n.startswith("lstm.")})

    def logits(
        self,
        ids: np.ndarray,  # (T, B)
        state: Any = None,
        training: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, Any, Any]:
        """Logits of the next characters (T*B, V), outputs of the LSTM (T*B, H), final state, tape."""
        y, state, tape = self.lstm.forward(self.arrays["embedding"][ids], state, training=training)
        y = y.reshape(-1, self.lstm.hidden_size)
        return y @ self.arrays["output"].T + self.arrays["bias"], y, state, tape

    def bits(self, ids: np.ndarray) -> float:
        """Bits per character that the model needs for a text, its first two characters given."""
        inputs, targets = ids[1:-1, None], ids[2:]
        state, total = None, 0.0
        for start in range(0, len(targets), 2048):  # parts of a size that memory holds
            part = slice(start, start + 2048)
            logits, _, state, _ = self.logits(inputs[part], state)
            total += float(surprise(softmax(logits), targets[part]).sum())
        return total / len(targets)

    def loss(
        self,
        inputs: np.ndarray,  # (T, B)
        targets: np.ndarray,  # (T, B)
        state: Any,
    ) -> tuple[float, np.ndarray, Any]:
        """Bits per character; the gradient of the mean of the natural logarithm, flat; the final state."""
        logits, y, state, tape = self.logits(inputs, state, training=True)
        flat_targets = targets.reshape(-1)
        probabilities = softmax(logits)
        bits = float(surprise(probabilities, flat_targets).mean())

        dlogits = probabilities
        dlogits[np.arange(len(dlogits)), flat_targets] -= 1
        dlogits /= len(dlogits)
        dy = (dlogits @ self.arrays["output"]).reshape(*inputs.shape, -1)
        dx, _, dlstm = tape.backward(dy)
        gradients = {
            "embedding": summed(dx.reshape(-1, EMBEDDING), inputs.reshape(-1), len(self.alphabet)),
            **{f"lstm.{name}": gradient for name, gradient in dlstm.items()},
            "output": dlogits.T @ y,
            "bias": dlogits.sum(0),
        }
        return bits, flatten(gradients), state

    def save(self, path: str, record: Record) -> None:
        """Write the model to a safetensors file, and what is known about it."""
        own = {"hidden": self.lstm.hidden_size, "alphabet": self.alphabet, "prompt": self.prompt}
        facts = own | record._asdict()
        weights.write(path, self.arrays, {"demo": facts})

    @classmethod
    def load(cls, path: str) -> tuple[CharacterModel, Record]:
        """The model that :meth:`save` wrote, and what is known about it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or holds something else.
        """
        arrays, settings = weights.read(path)
        if "demo" not in settings:
            raise ValueError(f"{path} holds no model of this demo; make one with: fusedlstm demo --save FILE")
        try:
            facts = dict(settings["demo"])
            hidden, alphabet, prompt = (facts.pop(name) for name in ("hidden", "alphabet", "prompt"))
            record = Record(**facts)
            str(record)  # which shows whether the facts are of the kinds that they should be
            if not isinstance(alphabet, str) or not alphabet.startswith(RARE):
                raise ValueError("its alphabet is none")
            if not isinstance(prompt, str) or not prompt:
                raise ValueError("its prompt is none")
            # nothing is made before the arrays are known to have the sizes that the facts ask for
            size = len(alphabet)
            sizes = {"embedding": (size, EMBEDDING), "output": (size, hidden), "bias": (size,)}
            for name, shape in sizes.items():
                if arrays[name].shape != shape:
                    raise ValueError(f"{name} is {arrays[name].shape}, not {shape}")
            named = {name[5:]: array for name, array in arrays.items() if name.startswith("lstm.")}
            sizes_of_lstm = {"input_size": EMBEDDING, "hidden_size": hidden, "num_layers": 2}
            lstm = layers._rebuilt(LSTM, cells.lstm, sizes_of_lstm, named)
            assert isinstance(lstm, LSTM)
            model = object.__new__(cls)
            model.alphabet, model.prompt = alphabet, prompt
            model._hold(lstm, arrays)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} does not fit this version of the demo: {error}") from error
        return model, record


def flatten(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """One array of float32 with the elements of all."""
    return np.concatenate([array.ravel() for array in arrays.values()], dtype=np.float32, casting="same_kind")


def views(flat: np.ndarray, like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parts of a flat array, named and shaped as the arrays that it was made of."""
    ends = np.cumsum([array.size for array in like.values()])
    parts = np.split(flat, ends[:-1])
    return {name: part.reshape(array.shape) for (name, array), part in zip(like.items(), parts)}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (N, V) for logits (N, V)."""
    powers: np.ndarray = np.exp(logits - logits.max(-1, keepdims=True))
    powers /= powers.sum(-1, keepdims=True)
    return powers


def surprise(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Bits (N,) that a code made for the probabilities (N, V) needs for what came."""
    chosen = probabilities[np.arange(len(targets)), targets]
    return np.asarray(-np.log2(chosen))


def summed(rows: np.ndarray, ids: np.ndarray, size: int) -> np.ndarray:
    """Sums (V, E) of the rows (N, E) that have the same number (N,).

    By a product with ones and zeros, which is faster than to add row by row, for the numbers that occur.
    """
    sums = np.zeros((size, rows.shape[1]), np.float32)
    present, places = np.unique(ids, return_inverse=True)
    sums[present] = np.asarray(np.arange(len(present))[:, None] == places, np.float32) @ rows
    return sums


# --- Training -------------------------------------------------------------------------------------------


def windows(ids: np.ndarray, random: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Without end: inputs and targets (T, B), and whether a new pass over the text begins.

    The text is cut into streams that are read side by side, so that a window goes on where the one
    before ended and the state can be kept.  Each pass cuts elsewhere.
    """
    while True:
        ids = np.roll(ids, random.integers(len(ids)))
        steps = (len(ids) - 1) // BATCH
        inputs = ids[: steps * BATCH].reshape(BATCH, steps).T
        targets = ids[1 : steps * BATCH + 1].reshape(BATCH, steps).T
        for start in range(0, steps, WINDOW):
            yield inputs[start : start + WINDOW], targets[start : start + WINDOW], start == 0


class Adam:
    """Adaptive moments (Kingma & Ba, 2015) of one flat array."""

    PIECE = 1 << 14  # numbers that are worked on at once, so that they stay in a core's cache

    def __init__(self, size: int, decay: float = 0.9, square_decay: float = 0.99) -> None:
        self.decay, self.square_decay, self.count = decay, square_decay, 0
        self.mean, self.square = np.zeros((2, size), np.float32)

    def step(self, parameters: np.ndarray, gradient: np.ndarray, rate: float) -> None:
        """Change the parameters by about `rate`, against the gradient."""
        self.count += 1
        mean_weight, square_weight = 1 - self.decay**self.count, 1 - self.square_decay**self.count
        for start in range(0, len(parameters), self.PIECE):
            piece = slice(start, start + self.PIECE)
            g, mean, square = gradient[piece], self.mean[piece], self.square[piece]
            mean += (1 - self.decay) * (g - mean)
            square += (1 - self.square_decay) * (g * g - square)
            parameters[piece] -= rate / mean_weight * mean / (np.sqrt(square / square_weight) + 1e-8)


def learning_rate(progress: float) -> float:
    """Up for the first twentieth of the training, then down along a cosine to almost nothing."""
    warm = min(1.0, progress / 0.05)
    return float(PEAK_RATE * warm * (0.02 + 0.98 * (1 + np.cos(np.pi * progress)) / 2))


class Budget(NamedTuple):
    """How long to train: so many seconds, or so many steps, which gives the same model every time."""

    seconds: float = SECONDS
    steps: int | None = None

    def progress(self, steps: int, elapsed: float) -> float:
        """From 0 to 1."""
        return min(1.0, steps / self.steps if self.steps else elapsed / self.seconds)


class Step(NamedTuple):
    """What is told of a step of training."""

    progress: float  # from 0 to 1
    bits: float  # per character, smoothed
    speed: float  # characters per second


def train(
    model: CharacterModel,
    ids: np.ndarray,
    budget: Budget,
    random: np.random.Generator,
    report: Callable[[Step], None],
) -> int:
    """Fit the model to a text by truncated backpropagation through time; the characters read."""
    optimiser = Adam(model.flat.size)
    state, smooth, characters, start = None, np.log2(len(model.alphabet)), 0, time.perf_counter()
    for count, (inputs, targets, fresh) in enumerate(windows(ids, random)):
        progress = budget.progress(count, time.perf_counter() - start)
        if progress == 1:
            break
        bits, gradient, state = model.loss(inputs, targets, None if fresh else state)
        gradient *= LARGEST_GRADIENT / max(LARGEST_GRADIENT, float(np.linalg.norm(gradient)))
        optimiser.step(model.flat, gradient, learning_rate(progress))
        model.refresh()
        characters += inputs.size
        smooth += (bits - smooth) * max(0.05, 1 / (count + 1))
        report(Step(progress, smooth, characters / (time.perf_counter() - start)))
    return characters


# --- Writing --------------------------------------------------------------------------------------------


def write(
    model: CharacterModel, temperature: float, random: np.random.Generator, prompt: str | None = None
) -> Iterator[str]:
    """Without end: characters that follow the prompt, which is the model's own by default.

    A temperature below 1 makes likely characters more likely; at 0 the likeliest is always taken.  What is
    rare is never written, since it is not known which character it is.
    """
    logits, _, state, _ = model.logits(encode(prompt or model.prompt, model.alphabet)[:, None])
    while True:
        following = logits[-1].astype(np.float64)
        following[0] = -np.inf  # RARE
        if temperature == 0:
            chosen = int(following.argmax())
        else:
            probabilities = softmax(following[None] / temperature)[0]
            chosen = int(random.choice(len(probabilities), p=probabilities))
        yield model.alphabet[chosen]
        logits, _, state, _ = model.logits(np.array([[chosen]]), state)


# --- The program ----------------------------------------------------------------------------------------


def run(
    *,
    budget: Budget | None = None,
    seed: int = 1,
    hidden: int = HIDDEN,
    text: str | None = None,
    language: str = "en",
    save: str | None = None,
    load: str | None = None,
    generate: int = SAMPLE,
    temperature: float = TEMPERATURE,
    prompt: str | None = None,
) -> None:
    """Train or load a model, compare it with counting, save it, let it write.

    Args:
        budget: how long to train; by default the standard time, or not at all if a model is loaded.
        seed: of the weights, the windows and the sample.
        hidden: H of a new model.
        text: file to learn, by default the text at hand of the language.
        language: "en" or "zh"; without a meaning where there is a file.
        save, load: files to write the model to, and to read it from.
        generate: characters to write.
        temperature: of the sample; see :func:`write`.
        prompt: what the sample goes on from; by default the beginning of the text.

    Raises:
        ValueError, OSError: for a file that cannot be used.
    """
    if save is not None:
        check_writable(save)
    random, record = np.random.default_rng(seed), None
    if load is None:
        letters, budget = read_text(text, language), budget or Budget()
        model = CharacterModel(alphabet_of(split(letters)[0]), letters[:PROMPT], hidden, seed)
    else:
        model, record = CharacterModel.load(load)
        print(f"Loaded {load}: {record}.")
        letters = read_text(text, language) if budget is not None else ""
    if prompt and (unknown := sorted(set(prompt) - set(model.alphabet))):
        raise ValueError(f"the model does not know these characters of the prompt: {' '.join(unknown)}")
    if budget is not None:
        record = _fit(model, letters, budget, random, record)
        print(f"Held-out text: {record}.")
    elif text is not None:
        raise ValueError("a text is for training: say with --seconds or --steps for how long")
    if save is not None and record is not None:
        model.save(save, record)
        print(f"Saved; write more with: fusedlstm demo --load {save}")
    if generate:
        prompt = prompt or model.prompt
        print(f"\nA sample, temperature {temperature:g}:\n\n{prompt}", end="")
        for letter in islice(write(model, temperature, random, prompt), generate):
            print(letter, end="", flush=True)
        print()


def _fit(
    model: CharacterModel, text: str, budget: Budget, random: np.random.Generator, before: Record | None
) -> Record:
    """Train the model, further if there is a record of `before`, and compare it with counting."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    if before and before.text != digest:
        raise ValueError("the model was trained on another text, and may know what would be held out here")
    ids = encode(text, model.alphabet)
    learnt, held_out = split(ids)
    if len(held_out) < 100:
        raise ValueError(f"the text is too short to learn from: {len(text):,} characters")
    print(f"Text: {len(text):,} characters, of which {len(held_out):,} are held out.")
    print(f"Alphabet: {len(model.alphabet) - 1:,} characters", end="")
    if rare := int((ids == 0).sum()):
        print(f"; {rare:,} others in the text are rarer, and count as one", end="")
    print(".")
    counted = Trigram(learnt, len(model.alphabet)).bits(held_out)
    print(f"A 3-gram model needs {counted:.3f} bits per character of the held-out text.")
    print("Preparing the kernels; they are compiled on the first run ...", end=" ", flush=True)
    start = time.perf_counter()
    model.loss(learnt[:4].reshape(2, 2), learnt[1:5].reshape(2, 2), None)
    print(f"{time.perf_counter() - start:.1f} s")
    print(f"Training {model.lstm!r} and a softmax, {model.flat.size:,} parameters:")
    # an idle thread of NumPy's BLAS spins for a while, on a core that the layers need
    with Display(model) as display, threadpool_limits(1, user_api="blas"):
        characters = train(model, learnt, budget, random, display.show)
    if before:
        characters += before.characters
    return Record(model.bits(held_out), counted, characters, digest)


class Display:
    """A bar that shows how far the training is, and now and then a line that the model writes."""

    LINES_AT = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7)  # of the training
    FORMAT = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"

    def __init__(self, model: CharacterModel) -> None:
        from tqdm import tqdm

        self.model, self.lines = model, list(self.LINES_AT)
        self.random = np.random.default_rng(0)  # of its own: a line changes nothing in the training
        self.bar = tqdm(total=1.0, bar_format=self.FORMAT, dynamic_ncols=True, smoothing=0)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def show(self, step: Step) -> None:
        self.bar.set_postfix_str(f"{step.bits:.2f} bits/char, {step.speed:,.0f} chars/s", refresh=False)
        self.bar.update(step.progress - self.bar.n)
        if self.lines and step.progress >= self.lines[0]:
            del self.lines[0]
            letters = islice(write(self.model, TEMPERATURE, self.random), 70)
            line = (self.model.prompt + "".join(letters)).replace("\n", " ")
            self.bar.write(f"{step.progress:4.0%} {step.bits:5.2f} bits  {line}")
