"""The original model's logits, computed once and compared with as many variants as one likes."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_vq.evaluation.generation import continuations
from hf_vq.evaluation.metrics import batches, evaluation_mode, model_logits, stored_bytes


class Teacher:
    """What the original says about some windows; takes the original's place in `compare`.

    Attributes:
        tokens: int64 (n, seqlen), the windows.
        logits: (n, seqlen, vocabulary) in the dtype the model gave, so that nothing is rounded; in
            memory, or mapped from a file.
        bytes: size of the original's stored tensors.
        generated: its greedy continuations (see `hf_vq.evaluation.generation`), by what was asked.
    """

    def __init__(self, tokens: Tensor, logits: Tensor, size: int, file: Path | None = None):
        self.tokens, self.logits, self.bytes = tokens, logits, size
        self.generated: dict[str, list[list[int]]] = {}
        self._model: nn.Module | None = None
        self._file = file

    @classmethod
    def measure(
        cls, model: nn.Module, tokens: Tensor, file: str | Path | None = None, source: str = ""
    ) -> Teacher:
        """Run `model` over windows (n, seqlen). file: where to keep the result, None: in memory.

        source: a name for the model; `load` asks for the same one. A file takes n * seqlen *
        vocabulary * 2 (bfloat16) or 4 bytes; FILE.json beside it says what it is of.
        """
        path = None if file is None else Path(file)
        partial = None if path is None else path.with_name(f"{path.name}.partial")
        logits: Tensor | None = None
        with torch.no_grad(), evaluation_mode(model):
            for start, chunk in batches(model, tokens.long()):
                part = model_logits(model, chunk, start).cpu()
                if logits is None:
                    shape = (*tokens.shape, part.shape[-1])
                    logits = _allocate(shape, part.dtype, partial)
                logits[start : start + chunk.shape[0]] = part
        assert logits is not None
        teacher = cls(tokens.long(), logits, stored_bytes(model), path)
        teacher._model = model
        if path is not None and partial is not None:
            teacher._write(source)
            partial.replace(path)
        return teacher

    @classmethod
    def load(cls, file: str | Path, tokens: Tensor, source: str = "") -> Teacher:
        """Read what `measure` kept; ValueError if it is of other windows or another model."""
        path = Path(file)
        try:
            about = json.loads(_beside(path).read_text(encoding="utf-8"))
            shape, dtype = tuple(about["shape"]), getattr(torch, about["dtype"])
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} holds no logits that hf_vq kept ({type(error).__name__}); delete it"
            ) from None
        if about["tokens"] != _digest(tokens) or about["source"] != source:
            what = "another model" if about["source"] != source else "other text or windows"
            raise ValueError(f"{path} holds logits of {what}; name another file, or delete it")
        if path.stat().st_size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path} is incomplete; delete it")
        flat = torch.from_file(str(path), shared=False, size=math.prod(shape), dtype=dtype)
        teacher = cls(tokens.long(), flat.view(shape), about["bytes"], path)
        teacher.generated = about["generated"]
        return teacher

    def continuations(self, prompts: Tensor, new_tokens: int) -> Tensor | None:
        """As `generation.continuations`; None if they are neither kept nor the model at hand."""
        key = f"{_digest(prompts)}:{new_tokens}"
        if key not in self.generated:
            if self._model is None:
                return None
            self.generated[key] = continuations(self._model, prompts, new_tokens).tolist()
            if self._file is not None:
                about = json.loads(_beside(self._file).read_text(encoding="utf-8"))
                self._write(about["source"])
        return torch.tensor(self.generated[key])

    def _write(self, source: str) -> None:
        assert self._file is not None
        about = {
            "source": source,
            "tokens": _digest(self.tokens),
            "shape": list(self.logits.shape),
            "dtype": str(self.logits.dtype).removeprefix("torch."),
            "bytes": self.bytes,
            "generated": self.generated,
        }
        _beside(self._file).write_text(json.dumps(about) + "\n", encoding="utf-8")


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, file: Path | None) -> Tensor:
    if file is None:
        return torch.empty(shape, dtype=dtype)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    size = math.prod(shape)
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def _digest(tokens: Tensor) -> str:
    text: Any = tokens.long().contiguous().numpy().tobytes()
    return hashlib.sha256(str(tuple(tokens.shape)).encode() + text).hexdigest()
