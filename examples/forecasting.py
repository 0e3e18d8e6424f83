"""Forecasting: what an LSTM adds to a straight line, in a series that is chaotic and in one that is not.

A ridge regression forecasts a whole stretch at once from the values before it, and an LSTM, which reads the
same values one at a time, learns what the regression leaves (Zhang, 2003). The sum of both is the forecast.

Data: two series. The carbon dioxide above Mauna Loa, months of 1958 to 2001, comes with the package
statsmodels (Keeling & Whorf); a year is forecast. The equation of Mackey & Glass (1977), whose blood cells
multiply as there were some 17 days ago, is solved by the program; fifty days are forecast. The last part of
each is the test: every place in it in turn is the present. Settings were chosen on the part before the test,
and the test was run once. The models learn once, from what is before the test; the baselines learn anew at
every present, from all that is known by then. Seasonal naive repeats the last season; exponential smoothing
is that of Holt (1957) and Winters (1960); autoregression that of Yule (1927).

The atmosphere leaves the LSTM nothing to learn: the straight line is as good without it. Chaos is another
matter: no linear forecast can follow it, and the error falls to a fraction.

    python examples/forecasting.py
    python examples/forecasting.py --series "carbon dioxide" --picture forecast.png
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from keras import layers
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.linear_model import Ridge
from statsmodels.datasets import co2
from statsmodels.tools.sm_exceptions import ConvergenceWarning
from statsmodels.tsa.ar_model import AutoReg
from statsmodels.tsa.holtwinters import ExponentialSmoothing
from tqdm import tqdm

from fusedlstm.keras import LSTM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# --- The baselines: forecasts from all that is known ----------------------------------------------------


class Task(NamedTuple):
    """What is to be forecast of a series."""

    season: int  # steps
    horizon: int  # steps that are forecast at once
    past: int  # steps to forecast from


def seasonal_naive(known: np.ndarray, task: Task) -> np.ndarray:
    return known[-task.season :][: task.horizon]


def exponential_smoothing(known: np.ndarray, task: Task) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = ExponentialSmoothing(known, trend="add", seasonal="add", seasonal_periods=task.season)
        return model.fit().forecast(task.horizon)


def autoregression(known: np.ndarray, task: Task) -> np.ndarray:
    return AutoReg(known, lags=task.past, trend="ct").fit().forecast(task.horizon)


# --- Data: two series -----------------------------------------------------------------------------------


class Series(NamedTuple):
    values: np.ndarray
    unit: str
    step: str
    task: Task
    baselines: tuple[Callable[[np.ndarray, Task], np.ndarray], ...]
    test: int  # steps at the end
    every: int  # steps from one forecast of the test to the next

    @property
    def presents(self) -> range:
        """The first step that is not known, of each forecast of the test."""
        return range(len(self.values) - self.test, len(self.values) - self.task.horizon + 1, self.every)


def mackey_glass(days: int = 2600, delay: int = 17, parts: int = 10) -> Series:
    """Solved in steps of a tenth of a day (Euler); the first three hundred days are left out."""
    x = np.full((300 + days) * parts, 1.2)
    for n in range(delay * parts, len(x) - 1):
        before = x[n - delay * parts]
        x[n + 1] = x[n] + (0.2 * before / (1 + before**10) - 0.1 * x[n]) / parts
    task = Task(season=51, horizon=50, past=50)
    return Series(
        x[300 * parts :: parts], "cells", "day", task, (autoregression, seasonal_naive), test=600, every=10
    )


def carbon_dioxide() -> Series:
    """Means of months; those without a measurement lie between their neighbours."""
    months = co2.load_pandas().data["co2"].resample("MS").mean().interpolate().to_numpy()
    task = Task(season=12, horizon=12, past=60)
    baselines = autoregression, exponential_smoothing, seasonal_naive
    return Series(months, "ppm", "month", task, baselines, test=120, every=1)


SERIES: dict[str, Callable[[], Series]] = {"Mackey-Glass": mackey_glass, "carbon dioxide": carbon_dioxide}

# --- The model ------------------------------------------------------------------------------------------


def forecasting_model(past: int, horizon: int, units: int, updates: int) -> keras.Model:
    """What the regression leaves of the next steps, from the past ones (B, past, 1)."""
    model = keras.Sequential([keras.Input((past, 1)), LSTM(units), layers.Dense(horizon)])
    rate = keras.optimizers.schedules.CosineDecay(5e-3, updates)
    model.compile(keras.optimizers.Adam(rate, clipnorm=1.0), "mean_squared_error")
    return model


def forecasts(series: Series, units: int, epochs: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the regression and of both models together: (presents, horizon) each.

    All is relative to the last known value, in standard deviations of what comes after it.
    """
    past, horizon = series.task.past, series.task.horizon
    start = series.presents[0]
    learnt = sliding_window_view(series.values[:start], past + horizon)
    learnt = learnt - learnt[:, past - 1 : past]
    scale = learnt[:, past:].std()
    x, y = np.split(learnt / scale, [past], axis=1)
    known = np.stack([series.values[now - past : now] for now in series.presents])
    last = known[:, -1:]

    linear = Ridge(0.1).fit(x, y)
    left = y - linear.predict(x)
    model = forecasting_model(past, horizon, units, epochs * -(-len(x) // batch))
    model.fit(x[..., None], left / left.std(), batch, epochs, verbose=0)

    x = (known - last) / scale
    straight = linear.predict(x)
    added = model.predict(x[..., None], verbose=0) * left.std()
    return last + scale * straight, last + scale * (straight + added)


# --- The program ----------------------------------------------------------------------------------------


def compare(series: Series, options: argparse.Namespace) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What came after each present, and what each method forecast (presents, horizon)."""
    truth = np.stack([series.values[now : now + series.task.horizon] for now in series.presents])
    linear, both = forecasts(series, options.units, options.epochs, options.batch)
    found = {"regression and LSTM": both}
    for baseline in series.baselines:
        name = baseline.__name__.replace("_", " ")
        presents = tqdm(series.presents, name, unit="forecast", leave=False)
        found[name] = np.stack([baseline(series.values[:now], series.task) for now in presents])
    return truth, found | {"regression": linear}


def draw_forecasts(axes: Axes, series: Series, found: dict[str, np.ndarray]) -> None:
    """The series with some forecasts, one after the other."""
    start, horizon = series.presents[0], series.task.horizon
    shown = np.arange(start - 2 * horizon, len(series.values))
    axes.plot(shown - start, series.values[shown], color="0.7", linewidth=3, label="observed")
    for method, color in {"regression": "C0", "regression and LSTM": "C3"}.items():
        for n in range(0, len(series.presents), -(-horizon // series.every)):
            steps = series.presents[n] - start + np.arange(horizon)
            axes.plot(steps, found[method][n], color, label="" if n else method)
    axes.set(xlabel=f"{series.step}s of the test", ylabel=series.unit)


def draw_errors(axes: Axes, series: Series, truth: np.ndarray, found: dict[str, np.ndarray]) -> None:
    """The error of each method by how far ahead it looks."""
    for n, (method, forecast) in enumerate(found.items()):
        color = {"regression": "C0", "regression and LSTM": "C3"}.get(method, f"C{n + 3}")
        axes.plot(range(1, series.task.horizon + 1), np.abs(forecast - truth).mean(0), color, label=method)
    axes.set(xlabel=f"{series.step}s ahead", ylabel="mean absolute error", ylim=(0, None))


def draw(path: str, results: dict[str, tuple[Series, np.ndarray, dict[str, np.ndarray]]]) -> None:
    """Save a row for each series."""
    import matplotlib.pyplot as plt

    size = (13, 4.5 * len(results))
    figure, rows = plt.subplots(len(results), 2, figsize=size, width_ratios=(2, 1), squeeze=False)
    for row, (name, (series, truth, found)) in zip(rows, results.items()):
        draw_forecasts(row[0], series, found)
        draw_errors(row[1], series, truth, found)
        row[0].set_title(name)
        for axes in row:
            # below the axes, where it covers no line
            axes.legend(
                frameon=False, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3
            )
            axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def verdict(figures: dict[str, float], name: str) -> str:
    """What the LSTM adds to the regression, in words."""
    both, linear = (
        figures[f"mean absolute error, {name}, {m}"] for m in ("regression and LSTM", "regression")
    )
    if both > 0.97 * linear:
        return "The LSTM adds nothing to the regression here."
    return f"The LSTM takes {1 - both / linear:.0%} of the regression's error away."


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the program and return its figures: the mean absolute errors of all methods in each series."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--series", choices=SERIES, nargs="+", default=list(SERIES))
    parser.add_argument("--validation", action="store_true", help="forecast what is before the test instead")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--units", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", metavar="FILE", help="save forecasts beside what came")
    options = parser.parse_args(argv)

    figures, results = {}, {}
    for name in options.series:
        keras.utils.set_random_seed(options.seed)
        series = SERIES[name]()
        if options.validation:
            series = series._replace(values=series.values[: -series.test])
        truth, found = compare(series, options)
        print(
            f"\n{name}: {len(truth)} forecasts of {series.task.horizon} {series.step}s, mean absolute error"
        )
        for method, forecast in found.items():
            error = figures[f"mean absolute error, {name}, {method}"] = float(np.abs(forecast - truth).mean())
            print(f"{error:12.4f} {series.unit}  {method}")
        print(verdict(figures, name))
        results[name] = series, truth, found
    if options.picture:
        draw(options.picture, results)
    return figures


if __name__ == "__main__":
    main()
