"""Downloads that give up soon where there is no network. Knows hosts; must not know what is downloaded.

HELM's scenarios download with urllib, which waits for ever, and with the Hugging Face hub, which retries every file
for half a minute.
"""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from http.client import HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPHandler, HTTPSHandler, Request, build_opener, install_opener

import datasets  # type: ignore[import-untyped]
import requests
from huggingface_hub import constants
from requests.adapters import HTTPAdapter

_TIMEOUT_S = 20.0
_PROBE_TIMEOUT_S = 3.0


@contextmanager
def impatient_downloads() -> Iterator[None]:
    """Ask no host again that could not be reached once, and the hub not at all if it cannot be reached."""
    with ExitStack() as stack:
        if not constants.HF_HUB_OFFLINE and not _hub_is_reachable():
            _set_hub_offline(True)
            stack.callback(_set_hub_offline, False)
        unreachable: set[str] = set()
        stack.callback(install_opener, vars(urllib.request)["_opener"])
        install_opener(build_opener(_HttpOnce(unreachable), _HttpsOnce(unreachable)))
        stack.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(_TIMEOUT_S)
        yield


@contextmanager
def no_downloads() -> Iterator[None]:
    """Ask nobody: neither hosts, by urllib or requests, nor the hub."""
    with ExitStack() as stack:
        if not constants.HF_HUB_OFFLINE:
            _set_hub_offline(True)
            stack.callback(_set_hub_offline, False)
        stack.callback(install_opener, vars(urllib.request)["_opener"])
        install_opener(build_opener(_Refuse(), _RefuseSecure()))
        stack.callback(setattr, HTTPAdapter, "send", HTTPAdapter.send)
        HTTPAdapter.send = _refuse_request  # type: ignore[method-assign, assignment]
        yield


def _set_hub_offline(is_offline: bool) -> None:
    """Do what the environment variable HF_HUB_OFFLINE does, which is only read at import."""
    constants.HF_HUB_OFFLINE = is_offline
    datasets.config.HF_HUB_OFFLINE = is_offline


@cache
def _hub_is_reachable() -> bool:
    try:
        build_opener().open(Request(constants.ENDPOINT, method="HEAD"), timeout=_PROBE_TIMEOUT_S).close()
    except HTTPError:
        return True  # it answered
    except OSError:
        return False
    return True


class _HttpOnce(HTTPHandler):
    def __init__(self, unreachable: set[str]):
        super().__init__()
        self._unreachable = unreachable

    def http_open(self, req: Request) -> HTTPResponse:
        return _open_once(super().http_open, req, self._unreachable)


class _HttpsOnce(HTTPSHandler):
    def __init__(self, unreachable: set[str]):
        super().__init__()
        self._unreachable = unreachable

    def https_open(self, req: Request) -> HTTPResponse:
        return _open_once(super().https_open, req, self._unreachable)


def _open_once(open_url: Callable[[Request], HTTPResponse], req: Request, unreachable: set[str]) -> HTTPResponse:
    if req.host in unreachable:
        raise URLError(f"{req.host} could not be reached before")
    try:
        return open_url(req)
    except URLError:
        unreachable.add(req.host)
        raise


def _refuse_request(adapter: HTTPAdapter, request: Any, *_: Any, **__: Any) -> Any:
    raise requests.ConnectionError("nothing is downloaded now", request=request)


class _Refuse(HTTPHandler):
    def http_open(self, req: Request) -> HTTPResponse:
        raise URLError("nothing is downloaded now")


class _RefuseSecure(HTTPSHandler):
    def https_open(self, req: Request) -> HTTPResponse:
        raise URLError("nothing is downloaded now")
