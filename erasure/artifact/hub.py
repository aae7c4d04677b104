"""Erasures on the Hugging Face Hub: pushed in one commit or not at all, and every fault a sentence.

huggingface_hub retries by itself what may be asked twice (looking up, uploading: 429, 5xx, lost connections), and not
the commit, which may have been made although its answer was lost. So after a fault there the hub is asked what it
holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from erasure.artifact.files import CARD, CONFIG, SYSTEM, WEIGHTS
from erasure.io import printable

WANTED = [CONFIG, WEIGHTS, SYSTEM, CARD]  # of a repository, when it is loaded
IMAGES = "images"


def push(
    blobs: Mapping[str, bytes],
    repo_id: str,
    *,
    private: bool = False,
    commit_message: str = "Add erasure",
    token: str | None = None,
) -> str:
    """Put files into a repository, which is made if need be, in one commit; its address.

    Raises:
        ValueError: no such name of a repository.
        PermissionError: not logged in, or not allowed to.
        ConnectionError: the hub cannot be reached, asks to wait, or is at fault. The message says whether anything was
            published.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HFValidationError

    if not re.fullmatch(r"[^\s/]+/[^\s/]+", repo_id):
        raise ValueError(f"no name of a repository; got {repo_id!r}; give 'org/name'")
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        additions = [CommitOperationAdd(name, raw) for name, raw in blobs.items()]
        api.preupload_lfs_files(repo_id, additions, free_memory=False)
    except HFValidationError as error:
        raise ValueError(
            f"no name of a repository; got {repo_id!r}; give 'org/name' ({printable(str(error))})"
        ) from None
    except Exception as error:
        raise fault(error, repo_id, "nothing was published") from error
    try:
        return str(api.create_commit(repo_id, additions, commit_message=commit_message).commit_url)
    except Exception as error:
        refused = any(400 <= (_status(one) or 0) < 500 for one in _chain(error))
        state = False if refused else _holds(api, repo_id, blobs)
        if state:
            return f"{api.endpoint}/{repo_id}"
        told = (
            "nothing was published" if state is False else f"look at {api.endpoint}/{repo_id} whether it was published"
        )
        raise fault(error, repo_id, told) from error


def _holds(api: Any, repo_id: str, blobs: Mapping[str, bytes]) -> bool | None:
    """Whether a repository holds these files; None if it cannot be asked."""
    try:
        entries = {e.path: e for e in api.list_repo_tree(repo_id) if hasattr(e, "size")}
        if any(name.partition("/")[0] == name and name not in entries for name in blobs):
            return False
        config = api.hf_hub_download(repo_id, CONFIG, force_download=True)
        return Path(config).read_bytes() == blobs[CONFIG]
    except Exception:
        return None


def download(repo_id: str, *, revision: str | None, token: str | None) -> Path:
    """The files of an erasure on the hub, in its cache.

    Raises:
        FileNotFoundError: the hub has no such repository or revision, or it is private or gated.
        ConnectionError: the hub cannot be reached, asks to wait, or is at fault, and not all files are in the cache.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=WANTED))
    except Exception as error:
        raise fault(error, repo_id, f"no folder {repo_id!r} here either") from error


def fault(error: BaseException, repo_id: str, state: str) -> OSError:
    """What went wrong with the hub, in a sentence.

    Args:
        state: what came of it.
    """
    names = {type(one).__name__ for one in _chain(error)}
    code = next((c for one in _chain(error) if (c := _status(one))), None)
    at = printable(repo_id)
    if "GatedRepoError" in names:
        return FileNotFoundError(
            f"the hub's {at} is gated; {state}; accept its terms on its page there, then run `hf auth login`"
        )
    if "RevisionNotFoundError" in names:
        return FileNotFoundError(f"the hub's {at} has no such revision; {state}; check it on the repository's page")
    if "OfflineModeIsEnabled" in names:
        return FileNotFoundError(f"offline (HF_HUB_OFFLINE), and the cache holds no {at}; {state}; check the name")
    if code == 401:
        return PermissionError(
            f"the hub wants a login for {at} (401); {state}; check the name, run `hf auth login`, or give the token of "
            "an account that may do this"
        )
    if code == 403:
        return PermissionError(f"this account may not do that with {at} (403); {state}; use one that may")
    if code == 404 or "RepositoryNotFoundError" in names:
        return FileNotFoundError(
            f"the hub has no {at}, or it is private; {state}; check the name, and run `hf auth login` if it is yours"
        )
    if code == 429:
        return ConnectionError(
            f"the hub asks to wait: too many requests (429); {state}; try again in a few minutes, or log in, which "
            "raises the limit"
        )
    if code is not None and code >= 500:
        return ConnectionError(f"the hub is at fault: it answered {code}; {state}; try again later")
    if code is not None:
        return ConnectionError(f"the hub refused {at}: {code}, {printable(str(error), limit=200)}; {state}")
    last = list(_chain(error))[-1]
    return ConnectionError(
        f"the hub could not be reached, or the connection broke off ({type(last).__name__}); {state}; check the "
        "network and try again"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


__all__ = ["IMAGES", "download", "fault", "push"]
