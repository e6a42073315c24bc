"""What example 03 trains on: the bytes of a folder's files, and batches that any number of ranks cuts up alike."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


class Text:
    """The files of a folder as one run of bytes; the last twentieth is held out for evaluation."""

    def __init__(self, folder: Path | None, most_bytes: int = 16 << 20) -> None:
        """None takes the sources of Python's standard library, without its tests."""
        files = _python_library() if folder is None else sorted(path for path in folder.rglob("*") if path.is_file())
        pieces: list[bytes] = []
        size = 0
        for path in files:
            if size >= most_bytes:
                break
            pieces.append(path.read_bytes()[: most_bytes - size])
            size += len(pieces[-1])
        data = torch.frombuffer(bytearray(b"".join(pieces) or b"\0"), dtype=torch.uint8)
        cut = len(data) - len(data) // 20
        self.num_files, self.train, self.held_out = len(pieces), data[:cut], data[cut:]

    def batch(self, seed: int, batch_size: int, length: int, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Bytes [B, S] and the bytes that follow them; the same on every rank that asks with the same seed."""
        data = self.held_out if held_out else self.train
        if len(data) <= length + 1:
            raise SystemExit(f"the text has {len(data)} bytes {'held out' if held_out else ''}, fewer than a sequence")
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(data) - length - 1, (batch_size, 1), generator=generator)
        windows = data[starts + torch.arange(length + 1)].long()
        return windows[:, :-1], windows[:, 1:]


def _python_library() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return (path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts))
