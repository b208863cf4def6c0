"""Training data: a long row of tokens, cut into samples, in an order that the position alone determines.

Two sources: the Python standard library's own source files as bytes (real text that every machine has), or a
Megatron `.bin/.idx` pair. Both end as a `TokenStream`. Sample n of the training order depends on (seed, n) only: no
iterator, no worker, no random state. A resumed run, at any world size, therefore continues with the very next sample.

Nothing here imports torch or megatron, except `indexed_streams`, which asks megatron-core to read the index.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt_moe.arguments import ArgumentError

__all__ = [
    "BYTE_EOD",
    "BYTE_VOCAB",
    "TokenStream",
    "build_streams",
    "indexed_streams",
    "parse_split",
    "permute",
    "rank_indices",
    "text_streams",
    "vocabulary",
]

BYTE_EOD = 256
BYTE_VOCAB = 257
_SKIPPED_DIRS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_LEAST_BYTES = 500_000
_ROUNDS = 4
_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """Scramble 64 bits (the finaliser of splitmix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def permute(position: int, size: int, key: int) -> int:
    """Return where a keyed permutation of range(size) sends a position.

    A Feistel network over the next even number of bits, walked until it lands inside the range: no table, the same
    on every machine and library version.

    Args:
        position: 0 <= position < size.
        size: length of the permutation.
        key: which permutation.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = position >> half, position & low
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(_mix(key + number) ^ right) & low)
        position = (left << half) | right
        if position < size:
            return position


@dataclass(frozen=True)
class TokenStream:
    """A row of tokens cut into samples of seq_length + 1 that overlap by one token.

    Attributes:
        tokens: the row; may be a memory map.
        seq_length: tokens per sample, without the last target.
        seed: selects the order of the samples.
        name: for messages.
        shuffled: False keeps the samples in the row's order (validation).
    """

    tokens: np.ndarray
    seq_length: int
    seed: int
    name: str
    shuffled: bool = True

    def __len__(self) -> int:
        """Return the number of samples in one epoch."""
        return max(0, (len(self.tokens) - 1) // self.seq_length)

    def sample_index(self, position: int) -> int:
        """Return which sample comes at a position of the endless training order.

        Args:
            position: samples consumed before this one, over all epochs.
        """
        epoch, place = divmod(position, len(self))
        return permute(place, len(self), _mix(_mix(self.seed) ^ epoch)) if self.shuffled else place

    def sample(self, position: int) -> np.ndarray:
        """Return the seq_length + 1 tokens at a position, as int64.

        Args:
            position: samples consumed before this one, over all epochs.
        """
        start = self.sample_index(position) * self.seq_length
        return np.asarray(self.tokens[start : start + self.seq_length + 1], dtype=np.int64)

    def batch(self, positions: Sequence[int]) -> np.ndarray:
        """Return the samples at the given positions, stacked.

        Args:
            positions: see `sample`.
        """
        return np.stack([self.sample(position) for position in positions])


def rank_indices(consumed: int, global_batch: int, micro_batch: int, rank: int, world_size: int) -> list[list[int]]:
    """Return one rank's positions in the next global batch, one list for each micro-step.

    The ranks' slices, in rank order, are exactly the positions consumed .. consumed + global_batch - 1.

    Args:
        consumed: samples consumed so far by the whole run.
        global_batch: samples per iteration.
        micro_batch: samples per micro-step of one rank.
        rank: this rank.
        world_size: the number of ranks.
    """
    share = global_batch // world_size
    first = consumed + rank * share
    return [list(range(first + at, first + at + micro_batch)) for at in range(0, share, micro_batch)]


def parse_split(text: str) -> tuple[float, float, float]:
    """Turn Megatron's "969,30,1" into cumulative shares of train, validation and test that end at 1.

    Args:
        text: up to three weights.

    Raises:
        ArgumentError: if a weight is no number, negative, or the training weight is zero.
    """
    try:
        weights = [float(part) for part in text.replace("/", ",").split(",") if part.strip()]
    except ValueError as error:
        raise ArgumentError(f"--split {text!r}: {error}") from error
    weights += [0.0] * (3 - len(weights))
    if len(weights) != 3 or min(weights) < 0 or weights[0] <= 0:
        raise ArgumentError(f"--split {text!r}: expected up to three weights, the first above zero")
    total = sum(weights)
    return weights[0] / total, (weights[0] + weights[1]) / total, 1.0


def library_files(root: Path | None = None) -> list[tuple[str, Path]]:
    """List the standard library's source files as (relative name, path), sorted by name.

    Args:
        root: another directory to take the `.py` files from.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not _SKIPPED_DIRS.intersection(relative.parts):
            found.append((relative.as_posix(), path))
    return sorted(found)


def _place(name: str) -> float:
    """Hash a file's name to [0, 1)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def text_streams(
    seq_length: int, seed: int, split: str, root: Path | None = None, least_bytes: int = _LEAST_BYTES
) -> tuple[TokenStream, TokenStream, str]:
    """Build the streams of byte tokens from the standard library.

    Args:
        seq_length: tokens per sample.
        seed: selects the order.
        split: see `parse_split`; a file's name alone decides which part it belongs to.
        root: another directory of `.py` files.
        least_bytes: complain when there is less text than this.

    Returns:
        Training stream, validation stream, and a fingerprint of the text.

    Raises:
        ArgumentError: if there is too little text.
    """
    train_end, valid_end, _ = parse_split(split)
    parts: dict[str, list[bytes]] = {"train": [], "valid": []}
    digest = hashlib.blake2b(digest_size=8)
    for name, path in library_files(root):
        place = _place(name)
        if place >= valid_end:
            continue
        text = path.read_bytes()
        digest.update(f"{name}\0{len(text)}\0".encode())
        digest.update(text)
        parts["train" if place < train_end else "valid"].append(text)
    if sum(map(len, parts["train"])) < least_bytes:
        where = root or sysconfig.get_path("stdlib")
        raise ArgumentError(f"too little text in {where} to train on: give --data-path a .bin/.idx prefix")
    train = TokenStream(_byte_tokens(parts["train"]), seq_length, seed, "standard library, train")
    valid = TokenStream(_byte_tokens(parts["valid"]), seq_length, seed, "standard library, validation", shuffled=False)
    return train, valid, digest.hexdigest()


def _byte_tokens(texts: Sequence[bytes]) -> np.ndarray:
    tokens = np.full(sum(len(text) + 1 for text in texts), BYTE_EOD, dtype=np.uint16)
    at = 0
    for text in texts:
        tokens[at : at + len(text)] = np.frombuffer(text, dtype=np.uint8)
        at += len(text) + 1
    return tokens


def indexed_streams(prefix: str, seq_length: int, seed: int, split: str) -> tuple[TokenStream, TokenStream, str]:
    """Build the streams of a Megatron `.bin/.idx` pair; documents are split in file order, as Megatron does.

    Args:
        prefix: the path without `.bin` and `.idx`.
        seq_length: tokens per sample.
        seed: selects the order.
        split: see `parse_split`.

    Returns:
        Training stream, validation stream, and a fingerprint of the index.

    Raises:
        ArgumentError: if the pair does not exist or is not contiguous.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset, get_bin_path, get_idx_path

    for path in (get_bin_path(prefix), get_idx_path(prefix)):
        if not Path(path).is_file():
            raise ArgumentError(f"--data-path {prefix}: {path} does not exist")
    index: Any = IndexedDataset(prefix, multimodal=False, mmap=True).index
    lengths = np.asarray(index.sequence_lengths, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    pointers = np.asarray(index.sequence_pointers, dtype=np.int64)
    if not np.array_equal(pointers, starts[:-1] * np.dtype(index.dtype).itemsize):
        raise ArgumentError(f"--data-path {prefix}: its sequences do not follow each other in the .bin file")
    tokens = np.memmap(get_bin_path(prefix), dtype=index.dtype, mode="r")
    documents = starts[np.asarray(index.document_indices, dtype=np.int64)]
    train_end, valid_end, _ = parse_split(split)
    count = len(documents) - 1
    train_cut, valid_cut = documents[round(train_end * count)], documents[round(valid_end * count)]
    digest = hashlib.blake2b(lengths.tobytes() + str(index.dtype).encode(), digest_size=8).hexdigest()
    train = TokenStream(tokens[:train_cut], seq_length, seed, f"{prefix}, train")
    valid = TokenStream(tokens[train_cut:valid_cut], seq_length, seed, f"{prefix}, validation", shuffled=False)
    return train, valid, digest


def build_streams(args: Any) -> tuple[TokenStream, TokenStream, str]:
    """Build training and validation streams from the arguments.

    Args:
        args: data_path, seq_length, seed, split, eval_iters.

    Returns:
        Training stream, validation stream (may be empty when no evaluation is asked for), fingerprint.

    Raises:
        ArgumentError: if a part has not one whole sample.
    """
    if args.data_path is None:
        streams = text_streams(args.seq_length, args.seed, args.split)
    else:
        streams = indexed_streams(args.data_path, args.seq_length, args.seed, args.split)
    for stream, needed in ((streams[0], True), (streams[1], args.eval_iters > 0)):
        if needed and len(stream) == 0:
            raise ArgumentError(f"{stream.name}: not one sample of {args.seq_length} tokens (--split {args.split})")
    return streams


def vocabulary(args: Any) -> int:
    """Return the padded size of the embedding.

    Args:
        args: tokenizer_type, vocab_size, make_vocab_size_divisible_by.
    """
    size = BYTE_VOCAB if args.tokenizer_type == "ByteTokenizer" else args.vocab_size + 1
    unit = max(1, args.make_vocab_size_divisible_by)
    return -(-size // unit) * unit
