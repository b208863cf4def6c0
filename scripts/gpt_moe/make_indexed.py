#!/usr/bin/env python3
"""Turn text into a Megatron `.bin/.idx` pair of byte tokens, for --data-path.

    python scripts/gpt_moe/make_indexed.py --input notes.txt book.txt --output-prefix data/mine
    python scripts/gpt_moe/make_indexed.py --input corpus.jsonl --output-prefix data/corpus
    python scripts/pretrain_gpt.py --preset tiny --data-path data/mine

A `.jsonl` file gives one document per line (its "text" key), any other file is one document. Every document ends with
the end-of-document token 256. Pairs made by Megatron's own tools/preprocess_data.py work as well; for those give
--tokenizer-type NullTokenizer --vocab-size N (the number of tokens without the end of document).
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: put scripts/ on the path instead of scripts/gpt_moe/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np

from gpt_moe.data import BYTE_EOD

__all__ = ["main", "make_indexed"]


def documents(path: Path) -> Iterator[bytes]:
    """Yield the documents of one input file.

    Args:
        path: a `.jsonl` file, or any text file.
    """
    if path.suffix != ".jsonl":
        yield path.read_bytes()
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            record = json.loads(line)
            if "text" not in record:
                raise ValueError(f"{path}:{number} has no key 'text'")
            yield record["text"].encode()


def make_indexed(inputs: Sequence[Path], prefix: Path) -> tuple[int, int]:
    """Write the pair.

    Args:
        inputs: the files, in this order.
        prefix: the output path without its suffix.

    Returns:
        The number of documents and of tokens.
    """
    warnings.filterwarnings("ignore")  # megatron-core reports which optional packages it lacks
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(get_bin_path(str(prefix)), dtype=np.uint16)
    count = tokens = 0
    for path in inputs:
        for text in documents(path):
            ids = np.append(np.frombuffer(text, dtype=np.uint8).astype(np.int32), BYTE_EOD)
            builder.add_document(torch.from_numpy(ids), [len(ids)])
            count += 1
            tokens += len(ids)
    builder.finalize(get_idx_path(str(prefix)))
    return count, tokens


def main(argv: Sequence[str] | None = None) -> None:
    """Run the converter.

    Args:
        argv: the arguments; the process's own if None.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--input", nargs="+", type=Path, required=True, help="text or .jsonl files")
    parser.add_argument("--output-prefix", type=Path, required=True, help="where the .bin and .idx files go")
    args = parser.parse_args(argv)
    missing = [str(path) for path in args.input if not path.is_file()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    count, tokens = make_indexed(args.input, args.output_prefix)
    print(f"{args.output_prefix}.bin and .idx: {count} documents, {tokens} tokens")


if __name__ == "__main__":
    main()
