"""Tokens of a reply to text that may be sent: whole characters, and nothing of a stop text."""

from collections.abc import Callable, Sequence


class Text:
    """The text of a growing reply.

    stopped: whether a stop text was written; text: what was given out so far, which ends before it; tokens: how many came.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        self._decode, self._stops, self._ids = decode, stops, list[int]()
        self.text, self.stopped = "", False

    @property
    def tokens(self) -> int:
        """How many tokens came."""
        return len(self._ids)

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """The text that can be given out now that these tokens came; `last`: no more will, so that nothing is kept back."""
        if self.stopped:
            return ""
        self._ids.extend(ids)
        whole = self._decode(self._ids)
        found = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
        if found:
            self.stopped, whole = True, whole[: min(found)]
        elif not last:
            whole = whole.rstrip("\ufffd")  # the first bytes of a character whose others are still to come
            whole = whole[: len(whole) - self._begun(whole)]
        new = whole[len(self.text) :]
        self.text += new
        return new

    def _begun(self, whole: str) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        sizes = (n for stop in self._stops for n in range(1, len(stop)) if whole.endswith(stop[:n]))
        return max(sizes, default=0)
