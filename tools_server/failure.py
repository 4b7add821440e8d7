"""How a tool fails: with a status that the wire knows and a reason for people."""

from typing import Literal

FailureStatus = Literal["timeout", "error", "malformed", "unavailable"]


class ToolFailure(Exception):
    """A tool gave no result. `reason` is one sentence that may be shown to anybody: it holds no secret."""

    def __init__(self, status: FailureStatus, reason: str):
        super().__init__(reason)
        self.status: FailureStatus = status
        self.reason = reason


class Busy(Exception):
    """More work waits than the server accepts; try again after `seconds`."""

    def __init__(self, seconds: float):
        super().__init__(f"too much work is waiting: try again in {seconds:g} s.")
        self.seconds = seconds
