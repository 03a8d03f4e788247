"""The error of a query that cannot be read."""

from fastforward.exceptions import FastForwardError


class MPathParseError(FastForwardError, ValueError):
    """A query does not follow the grammar; the message shows the place.

    Args:
        reason: What is wrong.
        text: The query.
        position: Offset of the first character that does not fit.
    """

    def __init__(self, reason: str, text: str = "", position: int = 0) -> None:
        self.reason, self.text, self.position = reason, text, position
        pointer = f"\n  {text}\n  {' ' * position}^" if text else ""
        super().__init__(f"{reason}{pointer}")
