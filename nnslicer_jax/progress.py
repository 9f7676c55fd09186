"""One line of progress on standard error, rewritten as a long run goes on."""

import sys
import time


class Progress:
    """Says how far a run is, how fast it goes and how long it will still take.

    Attributes:
      verb: What is done to the items, past tense.
      total: How many there are, or None if unknown.
      unit: What they are.
    """

    def __init__(self, verb: str, total: int | None, unit: str, done: int = 0) -> None:
        self.verb, self.total, self.unit = verb, total, unit
        self._first, self._start, self._shown = done, time.monotonic(), 0.0

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        print(text, file=sys.stderr, flush=True)

    def at(self, done: int, note: str = "") -> None:
        """Shows that `done` items are done; at most once a second, and at the end."""
        now = time.monotonic()
        last = done == self.total
        if now - self._shown < 1 and not last:
            return
        self._shown = now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        text = f"{self.verb} {done:,}"
        if self.total is not None:
            left = (self.total - done) / rate if rate else 0
            text += f" of {self.total:,} {self.unit}, {rate:,.3g}/s, {left:,.0f} s left"
        else:
            text += f" {self.unit}, {rate:,.3g}/s"
        text += f", {note}" if note else ""
        # On a terminal the line is rewritten; in a log each stands on its own.
        ends = ("\r\x1b[K", "\n" if last else "") if sys.stderr.isatty() else ("", "\n")
        print(f"{ends[0]}{text}", end=ends[1], file=sys.stderr, flush=True)
