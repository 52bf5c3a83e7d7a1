"""What a run tells while it goes on: one live line for people, one JSON line per record for programs."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from typing import IO, Any

from etils.epath import Path

PLAIN_EVERY = 10.0  # seconds between lines where the output is not a terminal
BUCKET_EVERY = 60.0  # seconds between writes where the file is in a bucket, each of which writes it all


class Log:
    """Metrics by step, to a file of JSON lines and to a line of progress.

    Each line of the file is an object with "step" and the metrics, null for one that is not finite, which JSON has no
    number for. A run that is resumed takes up the file where its checkpoint stands: lines of later steps, and a line
    cut short by a kill, are dropped and will be written again.

    A file in a bucket cannot be appended to. There lines are held and the whole file is written now and then, and
    when `flush` says so.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, out: IO[str] | None = None) -> None:
        """Opens a log.

        Args:
            path: the file of JSON lines, in a bucket such as gs:// as well; None for none.
            out: where progress goes, standard output by default. A terminal gets one line that is rewritten, anything
                else plain lines.
        """
        self._path = None if path is None else Path(path)
        self._bucket = path is not None and "://" in os.fspath(path)
        self._whole: str | None = None  # what a file in a bucket is to hold; None: what it does hold
        self._held, self._flushed = False, -math.inf  # lines not in the bucket yet; when they last were
        self._out = sys.stdout if out is None else out
        self._live = self._out.isatty()
        self._first = self._first_step = self._last_plain = 0.0
        self._steps = self._batch = 0
        self._width = 0

    def begin(self, step: int, steps: int, batch: int) -> None:
        """Says that training starts, or goes on, after ``step`` of ``steps`` steps of ``batch`` examples."""
        self._first, self._first_step, self._last_plain = time.perf_counter(), step, -math.inf
        self._steps, self._batch = steps, batch
        self.flush()
        if self._path is not None and self._path.exists():
            kept = "".join(line + "\n" for line in _read(self._path).splitlines() if _step_of(line) <= step)
            temporary = self._path.with_name(self._path.name + ".tmp")
            temporary.write_text(kept)
            temporary.replace(self._path)
        self._whole = None

    def aside(self, seconds: float) -> None:
        """Says that so much time went into something else than training steps: it is not counted in their speed."""
        self._first += seconds

    def metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records a training step's metrics, numbers by name, and shows progress."""
        elapsed = time.perf_counter() - self._first
        rate = (step - self._first_step) / max(elapsed, 1e-9)
        speed = round(rate * self._batch, 1)
        self.record(step, {**metrics, "examples_per_second": speed})
        shown = " ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        left = (self._steps - step) / rate if rate > 0 else math.inf
        line = f"step {step}/{self._steps}  {shown}  {speed:.0f} images/s  {_clock(left)} left"
        if self._live:
            self._out.write("\r" + line.ljust(self._width))
            self._out.flush()
            self._width = len(line)
        elif elapsed - self._last_plain >= PLAIN_EVERY or step == self._steps:
            self._last_plain = elapsed
            print(line, file=self._out, flush=True)

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Records values of a step in the file alone."""
        if self._path is None:
            return
        line = {"step": step, **{name: _finite_or_none(value) for name, value in values.items()}}
        text = json.dumps(line, allow_nan=False) + "\n"
        if not self._bucket:
            with self._path.open("a") as file:
                file.write(text)
            return
        if self._whole is None:
            self._whole = _read(self._path) if self._path.exists() else ""
        self._whole, self._held = self._whole + text, True
        if time.perf_counter() - self._flushed >= BUCKET_EVERY:
            self.flush()

    def flush(self) -> None:
        """Writes lines that are held for a bucket, if there are any."""
        if self._path is not None and self._held:
            self._path.write_text(self._whole)
            self._held, self._flushed = False, time.perf_counter()

    def say(self, text: str) -> None:
        """Prints a line of its own, below the live one."""
        if self._live and self._width:
            self._out.write("\n")
            self._width = 0
        print(text, file=self._out, flush=True)


def _read(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
