"""Fetches a URL with a client, as a row of `download` does."""

from __future__ import annotations

from pipeline.fetch.client import Client
from pipeline.fetch.reasons import FetchError


async def at_once() -> None:
    """For `Client.fetch`: the row may start when its host has room for it."""


async def body_or_failure(client: Client, url: str | None) -> bytes | FetchError:
    try:
        async with client.fetch(url, at_once) as fetched:
            return fetched.body
    except FetchError as failure:
        return failure
