"""What a person sees of a running job: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from megatron_progressive.config import RunConfig
from megatron_progressive.runtime.progress import short_time
from megatron_progressive.runtime.signals import outlives_its_reader

__all__ = ["Monitor", "short_time"]


class Monitor:
    """The progress of a run, with the time left as estimated from the FLOPs that remain.

    Steps before and after τ differ much in cost, so the time left is computed from the FLOPs that
    are left and the rate of the current phase, and not from steps.
    """

    def __init__(
        self,
        config: RunConfig,
        step_flops: Sequence[float],
        first_step: int,
        shows: bool,
        unit: str,
    ):
        """Begin to show a run. ``step_flops[i]`` is the cost of step i + 1, and ``unit`` is what
        speed is counted in."""
        self._config, self._shows, self._unit = config, shows, unit
        self._remaining = [0.0] * (len(step_flops) + 1)
        for i in range(len(step_flops) - 1, -1, -1):
            self._remaining[i] = self._remaining[i + 1] + step_flops[i]
        self._step_flops = step_flops
        self._rate: float | None = None
        self._last = time.monotonic()
        self._live: Progress | None = None
        if shows and sys.stderr.isatty():
            self._live = Progress(
                TextColumn(config.run.name),
                BarColumn(),
                TextColumn("{task.fields[line]}"),
                console=Console(stderr=True),
            )
            self._live.start()
            self._task = self._live.add_task(
                "", total=config.last_step, completed=first_step, line=""
            )

    def note(self, text: str) -> None:
        """Print one line that stays, such as an expansion, a warning or a save."""
        with outlives_its_reader():
            if self._live is not None:
                self._live.console.print(text, highlight=False)
            elif self._shows:
                print(f"{self._config.run.name}: {text}", file=sys.stderr, flush=True)

    def step(self, step: int, loss: float, lr: float, tokens_per_s: float) -> None:
        """Show that a training step is done."""
        now = time.monotonic()
        rate = self._step_flops[step - 1] / max(1e-9, now - self._last)
        self._last = now
        self._rate = rate if self._rate is None else 0.95 * self._rate + 0.05 * rate
        every, total = self._config.train.log_every, self._config.last_step
        if not self._shows or (self._live is None and step % every and step != total):
            return
        left = short_time(self._remaining[step] / self._rate)
        speed = f"{tokens_per_s / 1e3:.1f}k {self._unit}/s"
        line = f"loss {loss:.4f}  lr {lr:.2e}  {speed}  left {left}"
        if self._live is not None:
            with outlives_its_reader():
                self._live.update(self._task, completed=step, line=f"{step}/{total}  {line}")
        else:
            self.note(f"step {step}/{total}  {line}")

    def phase(self) -> None:
        """Forget the rate, because the next step has another cost."""
        self._rate = None
        self._last = time.monotonic()

    def resume_clock(self) -> None:
        """Leave the time spent outside of steps out of the rate."""
        self._last = time.monotonic()

    def close(self) -> None:
        if self._live is not None:
            with outlives_its_reader():
                self._live.stop()
