"""Calibration data: anything a user has, to token windows of one length.

Texts are joined with blank lines, tokenized without special tokens, cut into windows that do not
overlap, and `nsamples` of them are drawn with the config's seed. Long sources are read only as far
as `_POOL` times the tokens needed.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

_POOL = 16
"""Windows are drawn from at most this many times the tokens needed."""
_CHUNK = 1 << 16
"""Characters tokenized at once: tokenizers slow down on much longer strings."""
_FILES = (".txt", ".jsonl", ".npy")


class CalibrationError(ValueError):
    """The calibration data cannot be used; says why and what to do."""


def load_calibration(
    config: Any, tokenizer_source: str, max_length: int | None, vocab_size: int | None
) -> torch.Tensor | None:
    """Token windows, int64 (n, seqlen) with n <= config.nsamples, or None without data.

    `config.dataset` is a list or iterable of strings (or of dicts with "text" or "input_ids"), a
    .txt, .jsonl or .npy file, a `datasets` id "name:config:split", a Dataset, or token ids: a 1-D
    or 2-D tensor or array, or lists of them. "#field" after a .jsonl file or an id names a field
    other than "text".
    Rows of 2-D tokens are windows; all are taken, in order, if there are no more than nsamples.

    max_length: the model's context in tokens. vocab_size: ids beyond it are refused. Raises
    `CalibrationError` for data that is missing, empty, unreadable or does not fit the model.
    """
    if config.dataset is None:
        logger.warning(
            "no calibration data: weights are quantized to minimise their own error, not the "
            "model's. At 2 to 3 bits expect a several times higher loss than with even a few "
            "thousand tokens of text; pass %s(dataset=...) for that.",
            type(config).__name__,
        )
        return None
    if config.seqlen and max_length and config.seqlen > max_length:
        raise CalibrationError(
            f"seqlen={config.seqlen} is longer than the model's context of {max_length} tokens; "
            f"the range is 8 to {max_length}"
        )
    seqlen = config.seqlen or min(2048, max_length or 2048)
    tokenizer = config.tokenizer if config.tokenizer is not None else tokenizer_source
    tokens = _load(config.dataset, tokenizer, config.nsamples * seqlen * _POOL)
    if tokens.numel() == 0:
        raise CalibrationError(
            f"the calibration data ({describe_dataset(config.dataset)}) is empty; pass texts or "
            "tokens, or dataset=None to quantize without data"
        )
    _check_ids(tokens, vocab_size)
    return _draw(_windows(tokens, seqlen), config.nsamples, config.seed)


def load_tokens(dataset: Any, tokenizer: Any) -> torch.Tensor:
    """All tokens of a dataset of any of these kinds, int64 (tokens,), windows put end to end.

    tokenizer: a tokenizer or the name of one; not looked at if `dataset` holds token ids.
    """
    tokens = _load(dataset, tokenizer, None).flatten()
    if tokens.numel() == 0:
        raise CalibrationError(f"the data ({describe_dataset(dataset)}) is empty")
    return tokens


def _load(dataset: Any, tokenizer: Any, enough: int | None) -> torch.Tensor:
    tokens = _as_tokens(dataset)
    return _tokenize(dataset, tokenizer, enough) if tokens is None else tokens


def describe_dataset(dataset: Any) -> str | None:
    """What to write down about a dataset: an id or a kind and size, never a local path."""
    if dataset is None:
        return None
    if isinstance(dataset, str):
        return os.path.basename(dataset) if _file_of(dataset) else dataset
    if isinstance(dataset, (torch.Tensor, np.ndarray)):
        return f"token ids of shape {list(dataset.shape)}"
    builder = getattr(dataset, "builder_name", None)
    if builder:
        config, split = getattr(dataset, "config_name", None), getattr(dataset, "split", None)
        return f"{builder}:{config}:{split}"
    if isinstance(dataset, (list, tuple)):
        kind = "strings" if isinstance(dataset[0], str) else "samples"
        return f"{len(dataset)} {kind}"
    return type(dataset).__name__


# -- sources ---------------------------------------------------------------------------


def _file_of(dataset: str) -> str | None:
    """The path in a dataset string that means a file, existing or not."""
    path = dataset.rpartition("#")[0] or dataset
    return path if path.endswith(_FILES) or os.path.isfile(path) else None


def _as_tokens(dataset: Any) -> torch.Tensor | None:
    """Token ids (1-D or 2-D, int64) if that is what `dataset` holds, else None (it holds text)."""
    path = _file_of(dataset) if isinstance(dataset, str) else None
    if path is not None and path.endswith(".npy"):
        try:
            dataset = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise CalibrationError(f"{path} is no readable array of tokens: {error}") from None
    if isinstance(dataset, np.ndarray):
        if dataset.dtype.kind not in "iu":
            raise CalibrationError(f"token ids must be integers, not {dataset.dtype}")
        dataset = torch.from_numpy(dataset.astype(np.int64))
    if isinstance(dataset, torch.Tensor):
        if dataset.is_floating_point() or dataset.is_complex() or dataset.dtype is torch.bool:
            raise CalibrationError(f"token ids must be integers, not {dataset.dtype}")
        if dataset.ndim not in (1, 2):
            raise CalibrationError(
                f"token ids must be (tokens) or (samples, tokens), not {list(dataset.shape)}"
            )
        return dataset.detach().to("cpu", torch.int64)
    if isinstance(dataset, (list, tuple)) and dataset:
        first = dataset[0]
        if isinstance(first, (int, np.integer)):
            return _as_tokens(np.asarray(dataset))
        if isinstance(first, (list, tuple, np.ndarray, torch.Tensor)):
            rows = [_row(sample) for sample in dataset]
            if len({len(row) for row in rows}) == 1:
                return torch.stack(rows)
            return torch.cat(rows)
    return None


def _row(sample: Any) -> torch.Tensor:
    tokens = _as_tokens(sample if isinstance(sample, torch.Tensor) else np.asarray(sample))
    assert tokens is not None
    return tokens.flatten()


def _records(dataset: Any) -> Iterator[str | torch.Tensor]:
    """Strings, or token ids where the samples are tokenized already, of any source."""
    field = "text"
    if isinstance(dataset, str):
        path = _file_of(dataset)
        stem, _, named = dataset.rpartition("#")
        field = named if stem else field
        dataset = _lines(path) if path else _hub_dataset(stem or dataset)
    elif not isinstance(dataset, Iterable) or isinstance(dataset, dict):
        raise CalibrationError(
            f"cannot read calibration data from {type(dataset).__name__}; pass strings, a file, a "
            "datasets id, a Dataset or token ids"
        )
    for number, record in enumerate(dataset):
        if isinstance(record, dict) and field not in record and "input_ids" in record:
            yield _row(record["input_ids"])
            continue
        if isinstance(record, (list, tuple, np.ndarray, torch.Tensor)):
            yield _row(record)
            continue
        text = record.get(field) if isinstance(record, dict) else record
        if not isinstance(text, str):
            have = f"fields {sorted(record)}" if isinstance(record, dict) else repr(record)[:60]
            raise CalibrationError(
                f"sample {number} of the calibration data has no string {field!r} ({have}); "
                "name the field with '#field' after a file or id"
            )
        if text.strip():
            yield text


def _lines(path: str) -> Iterator[Any]:
    if not path.endswith((".txt", ".jsonl")):
        raise CalibrationError(f"{path}: calibration files are {', '.join(_FILES)}")
    try:
        with open(path, encoding="utf-8") as file:
            if path.endswith(".txt"):
                # paragraphs, so that joining them with blank lines restores the text
                for blank, lines in itertools.groupby(file, key=str.isspace):
                    if not blank:
                        yield "".join(lines).rstrip("\n")
                return
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise CalibrationError(f"{path}:{number} is no JSON: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise CalibrationError(f"calibration file {path} cannot be read: {reason}") from None


def _hub_dataset(name: str) -> Iterable[Any]:
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"dataset={name!r} is no file, and loading it from the Hub needs `pip install datasets`"
        ) from None
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        return datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # the library raises a dozen kinds, network errors among them
        first = (str(error).strip().splitlines() or [""])[0]
        raise CalibrationError(
            f"dataset={name!r} is no existing file and cannot be loaded from the Hub as "
            f"name:config:split ({type(error).__name__}: {first}); check the spelling and the "
            "network, or pass a .txt, .jsonl or .npy file"
        ) from None


# -- tokens ----------------------------------------------------------------------------


def _tokenizer(tokenizer: Any) -> Any:
    if tokenizer is None:
        raise CalibrationError("texts need a tokenizer; pass tokenizer=..., or token ids")
    if not isinstance(tokenizer, str):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:  # OSError, ValueError, KeyError, ImportError, depending on the files
        first = (str(error).strip().splitlines() or [""])[0]
        raise CalibrationError(
            f"no tokenizer found at {tokenizer!r} ({type(error).__name__}: {first}); pass "
            "tokenizer=..., or token ids as the dataset"
        ) from None


def _tokenize(dataset: Any, tokenizer: Any, enough: int | None) -> torch.Tensor:
    found: list[torch.Tensor] = []
    total = 0
    for piece in _chunks(_records(dataset)):
        if isinstance(piece, str):
            # looked for only now: a missing file is a clearer complaint than a missing tokenizer
            tokenizer = _tokenizer(tokenizer)
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            piece = torch.as_tensor(ids, dtype=torch.int64)
        found.append(piece)
        total += piece.numel()
        if enough is not None and total >= enough:
            break
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)


def _chunks(records: Iterable[str | torch.Tensor]) -> Iterator[str | torch.Tensor]:
    """Strings of about _CHUNK characters, and the token ids between them as they are."""
    held: list[str] = []
    size = 0
    for record in records:
        if not isinstance(record, str):
            yield from ["".join(held)] if held else []
            held, size = [], 0
            yield record
            continue
        for start in range(0, len(record), _CHUNK):
            piece = record[start : start + _CHUNK]
            held.append(piece if start + _CHUNK < len(record) else piece + "\n\n")
            size += len(piece)
            if size >= _CHUNK:
                yield "".join(held)
                held, size = [], 0
    if held:
        yield "".join(held)


def _check_ids(tokens: torch.Tensor, vocab_size: int | None) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise CalibrationError(
            f"token id {low if low < 0 else high} is outside of the model's vocabulary of "
            f"{vocab_size} tokens; the data was tokenized for another model"
        )


def _windows(tokens: torch.Tensor, seqlen: int) -> torch.Tensor:
    length = min(seqlen, tokens.shape[-1])
    count = tokens.shape[-1] // length
    return tokens[..., : count * length].reshape(-1, length)


def _draw(windows: torch.Tensor, nsamples: int, seed: int) -> torch.Tensor:
    if len(windows) <= nsamples:
        if len(windows) < nsamples:
            logger.warning(
                "the calibration data fills %d of the %d windows of %d tokens asked for",
                len(windows),
                nsamples,
                windows.shape[1],
            )
        return windows.contiguous()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(windows), generator=generator)[:nsamples]
    return windows[chosen].contiguous()
