"""Files that are damaged, hostile or unlucky, by kind: each generator writes one from a seed and gives its path."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

SUFFIXES = (".npz", ".npy", ".pt", ".csv")
WRITTEN = "code_ran"  # a file that only code of a hostile file would write


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def valid(suffix: str, rng: random.Random) -> bytes:
    """The bytes of a file that is right."""
    x, buffer = np.random.default_rng(rng.randrange(10**6)).random((6, 3), dtype=np.float32), io.BytesIO()
    if suffix == ".npz":
        np.savez(buffer, x=x, labels=np.arange(6))
    elif suffix == ".npy":
        np.save(buffer, x)
    elif suffix == ".pt":
        torch.save(torch.from_numpy(x), buffer)
    else:
        return ("a,b,c\n" + "\n".join(",".join(map(str, row)) for row in x)).encode()
    return buffer.getvalue()


def damaged(folder: Path, rng: random.Random) -> Path:
    """A right file with flipped bits, cut short, doubled, or with other bytes in the middle."""
    suffix = rng.choice(SUFFIXES)
    content = bytearray(valid(suffix, rng))
    how = rng.randrange(4)
    if how == 0:
        for _ in range(rng.randint(1, 20)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == 1:
        del content[rng.randrange(len(content)) :]
    elif how == 2:
        content += content[rng.randrange(len(content)) :]
    else:
        at = rng.randrange(len(content))
        content[at : at + 30] = rng.randbytes(30)
    path = folder / f"damaged{suffix}"
    path.write_bytes(content)
    return path


def foreign(folder: Path, rng: random.Random) -> Path:
    """Something else under the name of data: a web page, text, noise, nothing, a pickle that would run code."""
    contents: tuple[Callable[[], bytes], ...] = (
        lambda: b"<!doctype html><html>not found</html>",
        lambda: b"version https://git-lfs.github.com/spec/v1\n",
        lambda: rng.randbytes(rng.randrange(2000)),
        lambda: b"",
        lambda: pickle.dumps(Payload(folder / WRITTEN)),
        lambda: json.dumps([1, 2, 3]).encode(),
        lambda: b"[" * 5000,
        lambda: "ü\0\n".encode() * 50,
    )
    path = folder / f"foreign{rng.choice(SUFFIXES)}"
    path.write_bytes(rng.choice(contents)())
    return path


def objects(folder: Path, rng: random.Random) -> Path:
    """Arrays and tensors of objects, text, complex numbers, dates; empty, of no rows, of rank 0; NaN and infinity."""
    arrays = (
        np.array([Payload(folder / WRITTEN)] * 4, dtype=object), np.array([["a", "b"]] * 4), np.zeros((4, 2), complex),
        np.zeros((4, 2), "M8[s]"), np.zeros((0, 3)), np.zeros((4, 0)), np.float64(3), np.full((4, 2), np.nan),
        np.full((4, 2), np.inf), np.full((4, 2), 1e300), np.zeros(5), np.zeros((2, 2)),
    )  # fmt: skip
    x = arrays[rng.randrange(len(arrays))]
    path = folder / f"objects{rng.choice(('.npz', '.npy'))}"
    if path.suffix == ".npy":
        np.save(path, x, allow_pickle=True)
    else:
        np.savez(path, x=x)
    return path


def bombs(folder: Path, rng: random.Random) -> Path:
    """Files of a few kilobytes that stand for gigabytes: archives, headers, expanded tensors."""
    how = rng.randrange(4)
    if how == 0:  # declares 10 GB of zeros
        path = folder / "bomb.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.npy", valid(".npy", rng))
        content = bytearray(path.read_bytes())
        at = content.rindex(b"PK\x01\x02")
        content[at + 24 : at + 28] = (4 * 10**9 + rng.randrange(10**8)).to_bytes(4, "little")
        central = bytes(content[at : content.rindex(b"PK\x05\x06")])
        end = bytearray(content[content.rindex(b"PK\x05\x06") :])
        end[8:12] = (3).to_bytes(2, "little") * 2
        end[12:16] = (3 * len(central)).to_bytes(4, "little")
        path.write_bytes(bytes(content[:at]) + 3 * central + bytes(end))
        return path
    if how == 1:  # a header of a terabyte, without the numbers
        path = folder / "header.npy"
        content = io.BytesIO()
        shape = (10 ** rng.randint(11, 17), 10)
        np.lib.format.write_array_header_1_0(content, {"descr": "<f8", "fortran_order": False, "shape": shape})
        path.write_bytes(content.getvalue() + bytes(100))
        return path
    if how == 2:
        path = folder / "expanded.pt"
        torch.save(torch.zeros(1).expand(10 ** rng.randint(9, 12), 3), path)
        return path
    path = folder / "sparse.npz"
    size = 10 ** rng.randint(9, 12)
    np.savez(path, format=np.array(b"csr"), shape=np.array([size, size]), data=np.zeros(1), indices=[0], indptr=[0, 1])
    return path


def endless(folder: Path, rng: random.Random) -> Path:
    """What has no end: pipes, devices, links in a circle, folders below folders."""
    how = rng.randrange(4)
    path = folder / f"endless{rng.choice(SUFFIXES)}"
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/random", "/dev/tty")))
    elif how == 2:
        path.symlink_to(path)
    else:
        path = folder / "folders"
        path.mkdir()
        (path / "again").symlink_to(path)
        below = path
        for _ in range(rng.randint(45, 70)):
            below = below / "d"
            below.mkdir()
    return path


KINDS = {kind.__name__: kind for kind in (damaged, foreign, objects, bombs, endless)}
