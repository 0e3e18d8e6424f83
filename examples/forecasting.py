"""Forecasting: an LSTM says how many sunspots the next eleven years will bring.

The model reads the last decades, one year at a time, and forecasts a whole solar cycle at once. Beside the
LSTM it has a linear part that sees the last two cycles (Lai, Chang, Yang & Liu, 2018): three hundred years
are few to learn from, and the LSTM alone learns them by heart. Spots are counted in square roots, whose
spread is more even. The mean of several such models, which differ in their first weights, is taken.

Data: the sunspot numbers of the years 1700 to 2008, which the package statsmodels carries (National
Geophysical Data Center). In the last quarter of the series each year in turn is the present, and the eleven
years after it are forecast. The models learn anew once a cycle, the baselines each year, from all that is
known by then: the seasonal naive one repeats the last eleven years; exponential smoothing (Holt, 1957;
Winters, 1960) has a season of eleven years; the autoregression is the one that Yule (1927) invented for this
very series, but over nine years.

    python examples/forecasting.py
    python examples/forecasting.py --past 66 --picture sunspots.png
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Sequence

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers
from numpy.lib.stride_tricks import sliding_window_view
from statsmodels.datasets import sunspots
from statsmodels.tools.sm_exceptions import ConvergenceWarning
from statsmodels.tsa.ar_model import AutoReg
from statsmodels.tsa.holtwinters import ExponentialSmoothing
from tqdm import tqdm

from fusedlstm.keras import LSTM

CYCLE = 11  # years, about
LARGE = 100.0  # a large number of sunspots; those of the models are in proportion to it

# --- The baselines: forecasts of a cycle from all years to the present ----------------------------------


def seasonal_naive(past: np.ndarray) -> np.ndarray:
    return past[-CYCLE:]


def exponential_smoothing(past: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return ExponentialSmoothing(past, seasonal="add", seasonal_periods=CYCLE).fit().forecast(CYCLE)


def autoregression(past: np.ndarray) -> np.ndarray:
    return AutoReg(past, lags=9).fit().forecast(CYCLE)


BASELINES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "seasonal naive": seasonal_naive,
    "exponential smoothing": exponential_smoothing,
    "autoregression": autoregression,
}

# --- The model ------------------------------------------------------------------------------------------


def forecasting_model(past: int, units: int) -> keras.Model:
    """The next years from the past ones (B, past, 1): a linear part and what the LSTM adds to it."""
    x = keras.Input((past, 1))
    recent = layers.Flatten()(x[:, -2 * CYCLE :])
    linear = layers.Dense(CYCLE, kernel_regularizer=keras.regularizers.L2(1e-3))(recent)
    added = layers.Dropout(0.3)(LSTM(units)(x))
    added = layers.Dense(CYCLE, kernel_initializer="zeros")(added)
    model = keras.Model(x, layers.Add()([linear, added]))
    model.compile(keras.optimizers.Adam(3e-3), "mean_absolute_error")
    return model


def windows(series: np.ndarray, past: int) -> np.ndarray:
    """Square roots, scaled, of all stretches of a series with as many years (count, past, 1)."""
    return np.sqrt(sliding_window_view(series, past) / LARGE, dtype="float32")[..., None]


def lstm_forecasts(series: np.ndarray, start: int, options: argparse.Namespace) -> np.ndarray:
    """Forecasts (presents, CYCLE) from each present from `start` on.

    Once a cycle new models learn from all that is known by then.
    """
    presents = range(start, len(series) - CYCLE + 1)
    forecasts = []
    for now in tqdm(presents[::CYCLE], "training", unit="cycle"):
        learnt = windows(series[:now], options.past + CYCLE)
        x, y = learnt[:, : options.past], learnt[:, options.past :, 0]
        present = windows(series[now - options.past : min(now + CYCLE - 1, presents[-1])], options.past)
        answers = []
        for _ in range(options.models):
            model = forecasting_model(options.past, options.units)
            model.fit(x, y, options.batch, options.epochs, verbose=0)
            answers.append(model.predict(present, verbose=0))
        forecasts.append(np.maximum(np.mean(answers, 0), 0) ** 2 * LARGE)
    return np.concatenate(forecasts)


# --- The program ----------------------------------------------------------------------------------------


def draw(
    path: str, years: np.ndarray, series: np.ndarray, start: int, forecasts: dict[str, np.ndarray]
) -> None:
    """Save the forecasts of the LSTM, a cycle each, and the errors by how far ahead they look."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), width_ratios=(2.2, 1), layout="constrained")
    shown = slice(start - 3 * CYCLE, None)
    left.plot(years[shown], series[shown], color="0.6", linewidth=3, label="observed")
    lstm = forecasts["LSTM"]
    for n in range(0, len(lstm), CYCLE):
        first = start + n
        left.plot(years[first : first + CYCLE], lstm[n], "C3", label="" if n else "forecast by the LSTM")
        left.axvline(years[first] - 0.5, color="0.85", linewidth=0.8, zorder=0)
    left.set(ylabel="sunspot number", title="each cycle as forecast from the year before it")
    truth = sliding_window_view(series[start:], CYCLE)
    for n, (name, forecast) in enumerate(forecasts.items()):
        color = "C3" if name == "LSTM" else f"C{n - 1}"
        right.plot(range(1, CYCLE + 1), np.abs(forecast - truth).mean(0), color, label=name)
    right.set(xlabel="years ahead", ylabel="mean absolute error", ylim=(0, None))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program and return its figures: the mean absolute errors of the LSTM and the baselines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--past", type=int, default=44, help="years that the model reads")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--units", type=int, default=8)
    parser.add_argument("--end", type=int, default=2008, help="the last year that is used")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", metavar="FILE", help="save forecasts beside what came")
    options = parser.parse_args(argv)
    keras.utils.set_random_seed(options.seed)

    data = sunspots.load_pandas().data
    data = data[data["YEAR"] <= options.end]
    years, series = data["YEAR"].to_numpy(int), data["SUNACTIVITY"].to_numpy()
    start = len(series) * 3 // 4
    presents = range(start, len(series) - CYCLE + 1)
    print(f"learning from {years[0]} to {years[start - 1]}, {len(presents)} forecasts after it")

    truth = sliding_window_view(series[start:], CYCLE)
    forecasts = {"LSTM": lstm_forecasts(series, start, options)}
    for name, forecast in BASELINES.items():
        forecasts[name] = np.array([forecast(series[:now]) for now in presents])
    errors = {name: float(np.abs(forecast - truth).mean()) for name, forecast in forecasts.items()}
    for name, error in errors.items():
        print(f"mean absolute error {error:6.2f}  {name}")
    if options.picture:
        draw(options.picture, years, series, start, forecasts)
    return {f"mean absolute error, {name}": error for name, error in errors.items()}


if __name__ == "__main__":
    main()
