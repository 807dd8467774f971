"""Upload a checkpoint's folder to the Hub in one commit, with one-line errors.

Transferred files stay on the Hub even without a commit, so a repeated upload resumes. If a commit succeeded but its
response was lost, the next attempt finds the files on the Hub and makes no second commit.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from linearize.errors import HubError
from linearize.runtime.files import check_space

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_LOGIN = "log in with: hf auth login"
_AGAIN = "run the same command again: what has arrived is not sent twice"
# Seconds before each retry of the whole upload. The client retries transfers, but not `create_repo` or `create_commit`.
# Its `upload_large_folder` makes several commits and cannot delete files.
_WAITS = (1.0, 4.0)


@dataclass(frozen=True)
class Upload:
    """The result of an upload.

    Attributes:
        repo: its full name.
        url: of the repository.
        commit: the revision with the files.
        changed: True if a commit was made.
        private: True if the repository is private.
    """

    repo: str
    url: str
    commit: str
    changed: bool
    private: bool


class Hub:
    """A Hub client for the logged-in user.

    Raises:
        HubError: from every method, if the Hub cannot be reached or refuses.
    """

    def __init__(self) -> None:
        self.api = HfApi()

    def full_name(self, repo: str) -> str:
        """`owner/name`; the default owner is the logged-in user."""
        with _told(repo):
            user = self.api.whoami()["name"]
        return repo if "/" in repo else f"{user}/{repo}"

    def check_room(self) -> None:
        """Refuse a full disk at the client's cache for resumable uploads. The client does not report the needed size;
        weights are uploaded in place and need no copy.

        Raises:
            OutputError: the disk has too little space.
        """
        if find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET:
            check_space(Path(constants.HF_XET_CACHE), 0)

    def check(self, repo: str, *, public: bool) -> bool | None:
        """True if the repository is private; None if it does not exist.

        Raises:
            HubError: the repository is public, and `public` is False.
        """
        with _told(repo):
            info = self._info(repo)
        if info is not None and not info.private and not public:
            raise HubError(f"{repo}: is public already; pass --public to push to it, or name another repository")
        return None if info is None else bool(info.private)

    def upload(
        self,
        folder: Path,
        files: Sequence[str],
        repo: str,
        *,
        public: bool,
        message: str,
        say: Callable[[str], None] = lambda _: None,
    ) -> Upload:
        """Create the repository if needed, and commit the files."""
        with _told(repo):
            for wait in (*_WAITS, None):
                try:
                    return self._upload(folder, files, repo, public=public, message=message)
                except Exception as error:
                    if wait is None or not _passes(error):
                        raise
                    say(f"{_reason(error, repo)}; going on in {wait:.0f} s")
                    time.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _upload(self, folder: Path, files: Sequence[str], repo: str, *, public: bool, message: str) -> Upload:
        url = str(self.api.create_repo(repo, private=not public, exist_ok=True))
        info = self.api.model_info(repo)
        there = {file.rfilename for file in info.siblings or ()}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, folder / name) for name in files),
            *(CommitOperationDelete(name, is_folder=False) for name in sorted(stale(there, files))),
        ]
        # `upload_folder` would split a large folder into several commits.
        made = self.api.create_commit(repo, operations, commit_message=message, parent_commit=info.sha)
        return Upload(repo, url, made.oid, made.oid != info.sha, bool(info.private))

    def _info(self, repo: str) -> Any:
        try:
            return self.api.model_info(repo)
        except RepositoryNotFoundError:
            return None


def stale(there: set[str], files: Sequence[str]) -> set[str]:
    """Old shards and code of an earlier push that would be loaded instead of the new files."""
    return {
        name
        for name in there - set(files)
        if "/" not in name and name.endswith((".safetensors", ".safetensors.index.json", ".py"))
    }


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Turn the client's exceptions into a one-line `HubError` with the next step. The line holds no token, because
    tokens are only in the client's request headers."""
    try:
        yield
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(f"{repo}: {_reason(error, repo)}{_next(error)}") from error
    except Exception as error:
        if _is_transport(error):
            raise HubError(f"{repo}: {_reason(error, repo)}{_next(error)}") from error
        raise


def _root(error: BaseException) -> BaseException:
    """Unwrap the client's exception for a failed transfer."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _passes(error: BaseException) -> bool:
    """True if a retry may help. The client itself has already retried a failed transfer."""
    if isinstance(error, RuntimeError):
        return False
    status = _status(error)
    return _is_transport(error) if status is None else status in (408, 409, 412, 429) or status >= 500


def _is_transport(error: BaseException) -> bool:
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _reason(error: BaseException, repo: str) -> str:
    error = _root(error)
    status = _status(error)
    if status is not None:
        return {
            401: "the Hub wants a valid token",
            403: f"the token may not write to {repo}",
            404: "the Hub has no such repository",
            409: "somebody else changed it at the same time",
            412: "somebody else changed it at the same time",
            413: "the Hub finds a file too large",
            429: "the Hub asks to wait (429, too many requests)",
        }.get(status, f"the Hub answers {status}" if status >= 500 else f"the Hub refuses ({status}): {_first(error)}")
    if isinstance(error, LocalTokenNotFoundError):
        return "nobody is logged in to the Hub"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HFValidationError):
        return f"not the name of a repository: {_first(error)}"
    if _is_transport(error):
        return f"the connection to {constants.ENDPOINT} failed ({type(error).__name__})"
    return _first(error)


def _next(error: BaseException) -> str:
    error = _root(error)
    status = _status(error)
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return f"; {_LOGIN}"
    if status == 403:
        return f"; make one that may write at {constants.ENDPOINT}/settings/tokens, then {_LOGIN}"
    if isinstance(error, OfflineModeIsEnabled):
        return "; unset it to push"
    # xet raises other exceptions
    broken = isinstance(error, (ConnectionError, RuntimeError, TimeoutError)) or _is_transport(error)
    if broken or status in (409, 412, 429) or (status or 0) >= 500:
        return f"; {_AGAIN}"
    if isinstance(error, HFValidationError):
        return "; give OWNER/NAME"
    return ""


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # Errors in a card's front matter are described after the first line.
    return " ".join(lines) if lines[0].startswith("Invalid metadata") else lines[0]
