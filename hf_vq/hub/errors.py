"""What the Hub and its client raise, in one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_AGAIN = "push again to complete it: files that have arrived are not sent twice"


class PushError(OSError):
    """A push that did not happen, and what to do about it."""


@contextmanager
def hub_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Raise PushError in place of what goes wrong at the Hub inside."""
    try:
        yield
    except HFValidationError as error:
        said = _line(error).partition(" Use `repo_type`")[0]  # not something that one can do here
        raise PushError(f"{repo_id!r} is no name that the Hub accepts: {said}") from error
    except LocalTokenNotFoundError as error:
        raise PushError(_log_in()) from error
    except OfflineModeIsEnabled as error:
        raise PushError("HF_HUB_OFFLINE is set; unset it to push") from error
    except HfHubHTTPError as error:
        raise PushError(_refusal(error, repo_id)) from error
    except Exception as error:
        for cause in _causes(error):  # uploads of large files wrap what went wrong
            if isinstance(cause, HfHubHTTPError):
                raise PushError(f"{_refusal(cause, repo_id)}; {_AGAIN}") from error
            if "xet-write-token" in str(cause) and "404" in str(cause):
                raise PushError(
                    f"{endpoint} does not speak Xet, which hf_xet uploads with: set "
                    "HF_HUB_DISABLE_XET=1 to upload through LFS, and push again"
                ) from error
            # httpx, or httpx2, depending on the version of huggingface_hub; hf_xet has no class
            if type(cause).__module__.startswith("httpx") or type(cause) is ConnectionError:
                raise PushError(
                    f"{endpoint} could not be reached or broke off ({_line(cause)}); nothing was "
                    f"published, {_AGAIN}"
                ) from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _refusal(error: HfHubHTTPError, repo_id: str) -> str:
    status = getattr(error.response, "status_code", None)
    said = error.server_message or _line(error)
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision: {said}"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated, and this token has no access to it: ask for it on its page"
    if status == 401:
        return _log_in()
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} does not exist or is not visible with this token; {_log_in()}"
    if status == 403:
        return (
            f"this token may not write to {repo_id} ({said}): it belongs to somebody else, or the "
            "token is read-only. Push to a name of your own, or open a pull request (--create-pr, "
            "create_pr=True)"
        )
    if status == 400:
        return f"the Hub refuses {repo_id}: {said}"
    if status == 409:
        return f"{repo_id} was changed at the same time ({said}); push again"
    return f"the Hub failed ({status}: {said}); nothing was published, {_AGAIN}"


def _log_in() -> str:
    return (
        "the Hub does not know who you are: run `hf auth login`, or set HF_TOKEN to a token that "
        "may write"
    )


def _line(error: Any) -> str:
    return " ".join(str(error).split()) or type(error).__name__
