"""Joining a generated card with one that somebody has edited.

What hf_vq writes stands between two comments, the first of which carries a hash of the text. As
long as the hash fits, nobody has edited the text and it can be replaced; text above and below the
comments is never touched. A card whose generated part was edited, or that has none, keeps all of
its text. The metadata (the YAML header) is merged field by field in any case.
"""

from __future__ import annotations

import hashlib
import logging
import re
from contextlib import contextmanager
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResult, ModelCard

TOOL = "hf-vq"
"""Value of `metric_args["tool"]` in results of ours: a later card replaces them."""

_BLOCK = re.compile(r"<!-- hf_vq ([0-9a-f]{16})\b[^>]*-->\n(.*?)\n<!-- /hf_vq -->", re.DOTALL)
# what Transformers pushes for a model that has no card: a form with some forty open questions
_BOILERPLATE, _OPEN_QUESTIONS = "[More Information Needed]", 30
# what only the model itself can say; anything else that somebody has set stays
_OURS = ("base_model", "base_model_relation", "library_name", "pipeline_tag")


class Merged(NamedTuple):
    """A card, and what its writer should know about how it came about."""

    text: str
    notes: list[str]


def seal(body: str) -> str:
    """`body` between the comments that tell later whether it was edited."""
    body = body.strip("\n")
    how = "generated, and replaced while unedited: write above or below"
    return f"<!-- hf_vq {_hash(body)}: {how} -->\n{body}\n<!-- /hf_vq -->\n"


def parse_card(text: str, where: str) -> ModelCard:
    """The card in `text`; raises ValueError that names `where` it is if its metadata is broken."""
    try:
        with _quiet():
            return ModelCard(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 2}"
        problem = getattr(error, "problem", None) or "invalid YAML"
        reason = f"{problem}{line}"
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    raise ValueError(
        f"the metadata of {where} is broken ({reason}): repair the part between its two lines of "
        "---, or delete the file to have it written anew"
    )


def has_generated_part(text: str) -> bool:
    """Whether some of the card `text` was written by hf_vq, edited or not."""
    return _BLOCK.search(text) is not None


def is_untouched(text: str) -> bool:
    """Whether nobody has written anything into the card `text`, metadata aside."""
    with _quiet():
        body = ModelCard(text, ignore_metadata_errors=True).text
    if body.count(_BOILERPLATE) >= _OPEN_QUESTIONS:
        return True
    found = _BLOCK.search(body)
    return found is not None and _intact(found) and not _BLOCK.sub("", body, count=1).strip()


def merge_cards(new: str, old: str, where: str) -> Merged:
    """The card `new` with what somebody wrote into `old`, which lies at `where`.

    Raises ValueError if the metadata of either is broken.
    """
    ours, theirs = parse_card(new, "the new card"), parse_card(old, where)
    theirs.data = _merge_data(theirs.data, ours.data)
    notes: list[str] = []
    found = _BLOCK.search(theirs.text)
    if is_untouched(old):
        body = ours.text
    elif found is not None and _intact(found):
        block = _BLOCK.search(ours.text)
        fresh = ours.text if block is None else block[0]
        body = theirs.text[: found.start()] + fresh + theirs.text[found.end() :]
    else:
        body = theirs.text
        if block := _BLOCK.search(ours.text):
            same = found is not None and found[1] == block[1]
            if not same:
                notes.append(
                    f"{where} was edited by hand: its text stays as it is, figures too; its "
                    "metadata was updated"
                )
    return Merged(_joined(theirs.data, body), notes)


def _joined(data: Any, body: str) -> str:
    return f"---\n{data.to_yaml()}\n---\n{body if body.startswith(chr(10)) else chr(10) + body}"


def _intact(found: re.Match[str]) -> bool:
    return found[1] == _hash(found[2])


def _hash(body: str) -> str:
    # editors on the way may change line ends and spaces there
    lines = [line.rstrip() for line in body.strip().splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _merge_data(theirs: Any, ours: Any) -> Any:
    tags = [tag for tag in theirs.tags or [] if not re.fullmatch(r"\d+-bit", tag)]
    results = _merge_results(theirs.eval_results or [], ours.eval_results or [])
    for name, value in ours.to_dict().items():
        if name in ("tags", "model-index"):
            continue
        if name in _OURS or theirs.get(name) is None:
            theirs[name] = value
    theirs.tags = list(dict.fromkeys([*tags, *(ours.tags or [])]))
    theirs.eval_results = results or None
    if results:
        theirs.model_name = theirs.get("model_name") or ours.get("model_name") or "model"
    return theirs


def _merge_results(old: list[EvalResult], new: list[EvalResult]) -> list[EvalResult]:
    """Ours replace all earlier ones of ours: those were measured of other weights."""
    kept = [r for r in old if (r.metric_args or {}).get("tool") != TOOL]
    return [*kept, *new]


@contextmanager
def _quiet() -> Any:
    """A card without metadata is fine here; huggingface_hub warns about it."""
    logger = logging.getLogger("huggingface_hub.repocard")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
