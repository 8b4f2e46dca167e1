"""What a packed model inherits from the card of the model it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError

from hf_vq.hub.card_text import parse_card

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Fields of a card's metadata; all of them are about what the model may be used for."""


class Inherited(NamedTuple):
    """Fields of the base model's card, and why there are none where there are none."""

    fields: dict[str, Any]
    problem: str | None = None


def inherit(
    base: str | None,
    revision: str | None = None,
    folder: str | Path | None = None,
    token: Any = None,
) -> Inherited:
    """Read the card of the base model: from `folder` if that holds it, else from the Hub.

    base: its Hub id, or None where it has none. A card that cannot be read is no error: its
    license is then left to whoever publishes the packed model, and `problem` says so.
    """
    card = None if folder is None else Path(folder) / "README.md"
    if card is not None and card.is_file():
        return _fields(card.read_text(encoding="utf-8", errors="replace"), str(card.name))
    if base is None:
        return Inherited({}, "the base model has no name on the Hub")
    return _from_hub(base, revision, token)


def _from_hub(base: str, revision: str | None, token: Any) -> Inherited:
    try:
        file = hf_hub_download(base, "README.md", revision=revision, token=token, etag_timeout=5)
    except GatedRepoError:
        return Inherited({}, f"{base} is gated and this token has no access to its card")
    except Exception as error:  # whatever the client raises without a network or a card
        return Inherited({}, f"the card of {base} could not be read ({type(error).__name__})")
    return _fields(Path(file).read_text(encoding="utf-8", errors="replace"), f"{base}'s README.md")


def _fields(text: str, where: str) -> Inherited:
    try:
        data = parse_card(text, where).data
    except ValueError as error:
        return Inherited({}, str(error))
    found = {name: data.get(name) for name in INHERITED if data.get(name) is not None}
    if "license" not in found:
        return Inherited(found, f"{where} names no license")
    return Inherited(found)
