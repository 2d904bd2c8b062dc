"""The base of all that is to be closed after use."""

from typing import Self


class Closeable:
    """Something to be closed after use: by `close` or `aclose`, or by leaving a ``with`` or ``async with``."""

    def close(self) -> None:
        """Give back what is held. Closing twice is harmless."""

    async def aclose(self) -> None:
        """Close from an event loop; see `close`."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
