"""GGUF files as ordinary dense checkpoints, converted once.

transformers parses GGUF in Python (20 s and more for 135M parameters) and keeps the weights packed unless told to
dequantize them. The dense copy is a normal checkpoint directory that loads in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from kvgauge.user_cache import cache_root

CONVERSION = 1  # part of the cache key: raise it when the conversion itself changes


def dense_checkpoint(*pieces: Path) -> Path:
    """The directory of a dense bfloat16 copy of a GGUF file, made if it is not there yet.

    The directory's name holds the file's SHA-256, so another file never meets this one's copy. The copy appears whole
    or not at all, also when two processes make it at once.

    Args:
        pieces: of the file, first piece first; one where it is whole.
    """
    stem = pieces[0].name.partition(".gguf")[0]
    target = cache_root() / f"{stem}-{_sha256(pieces)[:12]}-v{CONVERSION}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        whole = pieces[0] if len(pieces) == 1 else _joined(pieces, scratch / f"{stem}.gguf")
        directory, name = str(whole.parent), whole.name
        model = AutoModelForCausalLM.from_pretrained(
            directory, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(directory, gguf_file=name).save_pretrained(scratch)
        config = json.loads((scratch / "config.json").read_text())
        config.pop("quantization_config", None)  # the copy is dense: nothing must try to quantize it again
        (scratch / "config.json").write_text(json.dumps(config, indent=2))
        if whole not in pieces:
            whole.unlink()
        try:
            scratch.replace(target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _joined(pieces: Sequence[Path], target: Path) -> Path:
    with target.open("wb") as whole:
        for piece in pieces:
            with piece.open("rb") as stream:
                shutil.copyfileobj(stream, whole, 1 << 20)
    return target


def _sha256(pieces: Sequence[Path]) -> str:
    value = hashlib.sha256()
    for piece in pieces:
        with piece.open("rb") as stream:
            while block := stream.read(1 << 20):
                value.update(block)
    return value.hexdigest()
