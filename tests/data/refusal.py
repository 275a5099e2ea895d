"""What every refusal of a user's mistake must be: a `UserError` of one line that names the option."""

from collections.abc import Callable

import pytest

from mh_lightning.data import StreamDataModule
from mh_lightning.errors import UserError


def refused(action: Callable[[], object], *parts: str) -> str:
    """Run the action, and return the message of the refusal, which holds all the parts."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def refused_stream(stream: StreamDataModule, *parts: str) -> str:
    """The same for reading a stream."""
    return refused(lambda: stream.setup("fit"), *parts)
