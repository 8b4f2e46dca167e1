"""Publishing a packed model: what would go, the card it goes with, and the upload.

Everything goes in one commit, so that nobody ever downloads half a model. The Hub keeps the large
files of an interrupted push; the next one sends only what is missing.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

from hf_vq.files import read_json
from hf_vq.formats import packed_settings
from hf_vq.hub.card import CARD_NAME, folder_card
from hf_vq.hub.card_text import Merged, merge_cards
from hf_vq.hub.checkpoint import read_checkpoint
from hf_vq.hub.errors import hub_errors
from hf_vq.hub.record import is_stale
from hf_vq.quantizer import EVALUATION_NAME

logger = logging.getLogger(__name__)

PATTERNS = (
    *("*.safetensors", "*.json", "*.jinja", "*.py", "*.model", "vocab.txt", "merges.txt"),
    *("LICENSE*", "NOTICE*", "additional_chat_templates/*.jinja", "assets/*.png", CARD_NAME),
)
"""Files that belong to a model; anything else in a folder may be private, and stays."""

_TEXT = (".json", ".jinja", ".md", ".py", ".txt")


@dataclass
class Contents:
    """What of a folder is published.

    files: path in the repository -> (file, bytes). left_out: path -> why it stays.
    """

    files: dict[str, tuple[Path, int]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(size for _, size in self.files.values())


def contents(folder: str | Path, include: Iterable[str] = ()) -> Contents:
    """The files of the packed model in `folder` that are published; include: more patterns.

    Raises:
        ValueError: no packed model is there, it is damaged, or a file names a place on this
            machine.
        OSError: the weights are missing.
    """
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise OSError(f"{folder} holds no model (it has no config.json)")
    if packed_settings(read_json(config)) is None:
        raise ValueError(
            f"{folder} holds no model packed by hf_vq; publish it with `hf upload` instead"
        )
    found = Contents()
    wanted = (*PATTERNS, *include)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")) and name not in include:
            continue
        if any(fnmatch.fnmatchcase(name, pattern) and _deep(name, pattern) for pattern in wanted):
            found.files[name] = path, path.stat().st_size
        else:
            found.left_out[name] = "not part of a model"
    if not any(name.endswith(".safetensors") for name in found.files):
        raise OSError(f"{folder} has no *.safetensors: there are no weights to publish")
    read_checkpoint(folder)  # or a damaged file would go out, to be found by whoever loads it
    if EVALUATION_NAME in found.files and is_stale(folder):
        del found.files[EVALUATION_NAME]
        found.left_out[EVALUATION_NAME] = "measured of other weights; run `hf-vq eval` again"
    _refuse_local_paths(found)
    return found


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: Iterable[str] = (),
    include: Iterable[str] = (),
    base_folder: str | Path | None = None,
    say: Callable[[str], None] = logger.warning,
) -> Any:
    """Publish the packed model in `folder` as `repo_id`, which is created if there is none.

    Args:
        private: of a repository that is created; None: the account's default.
        token: as for huggingface_hub. revision: branch, created if missing.
        create_pr: open a pull request instead of committing.
        tags: for the card. include: patterns of files that would be left out.
        base_folder: where the original lies on this machine, for its license.
        say: called with one line for everything that its owner should know.

    Returns:
        huggingface_hub's CommitInfo.

    Raises:
        PushError: the Hub refuses, or cannot be reached. The message says what to do.
        ValueError, OSError: as `contents`, or a card has broken metadata.
    """
    folder = Path(folder)
    found = contents(folder, include)

    def make_card(name: str) -> Merged:
        options = {"tags": tuple(tags), "token": token, "base_folder": base_folder}
        card = folder_card(folder, repository=name, **options)  # type: ignore[arg-type]
        assert card is not None  # contents() has seen the packed model
        return card

    make_card(repo_id)  # before anything is created: a card there may have broken metadata
    found = contents(folder, include)  # its pictures are there now
    api = HfApi(token=token)
    with hub_errors(repo_id, api.endpoint):
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        repo_id = created.repo_id
        if private is not None and api.repo_info(repo_id).private != private:
            kind = "public" if private else "private"
            say(f"{repo_id} exists and is {kind}; it stays so until its settings are changed")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        card = _joined_with_remote(make_card(repo_id), repo_id, revision, token)
        for note in card.notes:
            say(note)
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
            for name, (path, _) in found.files.items()
            if name != CARD_NAME
        ]
        _refuse_paths_in(CARD_NAME, card.text)
        operations.append(CommitOperationAdd(CARD_NAME, card.text.encode()))
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or "Upload a model packed by hf_vq",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def push_model(model: Any, repo_id: str, *, max_shard_size: Any = "50GB", **options: Any) -> Any:
    """Publish a packed model from memory, with the tokenizer it was loaded with.

    options: as for `push_folder`. Returns and raises what that does.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        _save_tokenizer(model, folder)
        source = model.name_or_path
        base = source if os.path.isdir(source) else None
        return push_folder(folder, repo_id, base_folder=base, **options)


def _save_tokenizer(model: Any, folder: str) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(model.name_or_path).save_pretrained(folder)
    except (OSError, ValueError, KeyError):
        logger.warning(
            "no tokenizer was found where the model was loaded from (%s); push it on its own with "
            "tokenizer.push_to_hub(...)",
            model.name_or_path or "memory",
        )


def _joined_with_remote(card: Merged, repo_id: str, revision: str | None, token: Any) -> Merged:
    try:
        file = hf_hub_download(
            repo_id, CARD_NAME, revision=revision, token=token, force_download=True
        )
    except (EntryNotFoundError, RevisionNotFoundError):
        return card
    where = f"the README.md of {repo_id}"
    remote = Path(file).read_text(encoding="utf-8", errors="replace")
    merged = merge_cards(card.text, remote, where)
    return Merged(merged.text, [*card.notes, *merged.notes])


def _deep(name: str, pattern: str) -> bool:
    """fnmatch lets * match slashes: a pattern without one means files of the folder itself."""
    return name.count("/") == pattern.count("/") or "**" in pattern


def _refuse_local_paths(found: Contents) -> None:
    for name, (path, _) in found.files.items():
        if path.suffix in (".json", ".md") and name != "tokenizer.json":
            _refuse_paths_in(name, path.read_text(encoding="utf-8", errors="replace"))


def _refuse_paths_in(name: str, text: str) -> None:
    home, here = os.path.expanduser("~"), os.getcwd()
    for place in {home, here, tempfile.gettempdir()}:
        # "/" and "/root" say nothing; a longer path would not stand in a model by chance
        if len(place) > 5 and f"{place.rstrip(os.sep)}{os.sep}" in text:
            raise ValueError(
                f"{name} names a place on this machine ({place}{os.sep}...), which would be "
                "published: edit the file and push again"
            )
