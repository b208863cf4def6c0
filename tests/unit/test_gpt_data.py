"""The order and the content of the pre-training program's data."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from gpt_moe.arguments import ArgumentError  # noqa: E402
from gpt_moe.data import (  # noqa: E402
    BYTE_EOD,
    TokenStream,
    indexed_streams,
    parse_split,
    permute,
    rank_indices,
    text_streams,
)


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(position, size, key) for position in range(size)) == list(range(size))


def test_permute_depends_on_the_key_and_never_changes():
    first = [permute(position, 1000, 1) for position in range(1000)]
    assert first != [permute(position, 1000, 2) for position in range(1000)]
    assert first != list(range(1000))
    # A resumed run may use another version of Python or numpy: these numbers must never change.
    assert first[:4] == [982, 939, 296, 405]


def stream(length=1001, seq=10, **options):
    return TokenStream(np.arange(length, dtype=np.uint16), seq, seed=7, name="test", **options)


def test_an_epoch_visits_every_sample_once_and_epochs_differ():
    data = stream()
    assert len(data) == 100
    first = [data.sample_index(position) for position in range(100)]
    second = [data.sample_index(position) for position in range(100, 200)]
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second


def test_samples_overlap_by_the_last_target():
    data = stream(shuffled=False)
    assert data.sample(0).tolist() == list(range(11))
    assert data.sample(1).tolist() == list(range(10, 21))
    assert data.sample(100).tolist() == data.sample(0).tolist()
    assert data.batch([0, 1]).shape == (2, 11)
    assert data.batch([0]).dtype == np.int64


def test_the_last_sample_is_whole():
    assert len(stream(length=1000)) == 99
    assert len(stream(length=1)) == len(stream(length=0)) == 0


@given(
    st.integers(0, 10**9),
    st.sampled_from([(1, 8), (2, 4), (4, 2), (8, 1), (2, 2), (4, 1), (1, 2)]),
)
def test_the_global_batch_is_the_same_at_every_world_size(consumed, layout):
    world, micro = layout
    together = []
    for rank in range(world):
        steps = rank_indices(consumed, 8, micro, rank, world)
        assert all(len(step) == micro for step in steps)
        together += [position for step in steps for position in step]
    assert together == list(range(consumed, consumed + 8))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("969,30,1", (0.969, 0.999, 1.0)), ("9,1", (0.9, 1.0, 1.0)), ("1", (1.0, 1.0, 1.0)), ("90/5/5", (0.9, 0.95, 1.0))],
)
def test_split(text, expected):
    assert parse_split(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "a,b", "0,1", "1,-1,1", "1,1,1,1"])
def test_a_wrong_split_is_refused(text):
    with pytest.raises(ArgumentError):
        parse_split(text)


@pytest.fixture
def library(tmp_path):
    for number in range(40):
        (tmp_path / f"m{number}.py").write_bytes(b"x = %d\n" % number * 50)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_bytes(b"\xff" * 100)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "skipped.py").write_bytes(b"\xff" * 100)
    return tmp_path


def test_text_is_split_by_file_and_reproducible(library):
    train, valid, mark = text_streams(16, 1, "80,20,0", root=library, least_bytes=1)
    again, _, same = text_streams(16, 1, "80,20,0", root=library, least_bytes=1)
    assert mark == same
    assert np.array_equal(train.tokens, again.tokens)
    texts = [bytes(part.astype(np.uint8)) for part in np.split(train.tokens, np.flatnonzero(train.tokens == BYTE_EOD))]
    files = {path.read_bytes() for path in library.glob("*.py")}
    documents = [text.lstrip(b"\x00") for text in texts if text.lstrip(b"\x00")]
    assert set(documents) < files
    assert int((train.tokens == BYTE_EOD).sum()) + int((valid.tokens == BYTE_EOD).sum()) == 40
    assert 255 not in train.tokens  # tests and installed packages are left out
    assert train.shuffled and not valid.shuffled
    (library / "m3.py").write_bytes(b"changed")
    assert text_streams(16, 1, "80,20,0", root=library, least_bytes=1)[2] != mark


def test_a_file_stays_on_its_side_when_others_come_and_go(library):
    _, before, _ = text_streams(16, 1, "80,20,0", root=library, least_bytes=1)
    (library / "another.py").write_bytes(b"y")
    _, after, _ = text_streams(16, 1, "80,20,0", root=library, least_bytes=1)
    assert after.tokens.tobytes().endswith(before.tokens.tobytes())


def test_too_little_text_is_an_error(library):
    with pytest.raises(ArgumentError, match="--data-path"):
        text_streams(16, 1, "80,20,0", root=library)


def test_the_standard_library_is_enough():
    train, valid, _ = text_streams(128, 1, "969,30,1")
    assert len(train) > 10_000
    assert len(valid) > 64


def test_indexed_pair_round_trip(tmp_path):
    pytest.importorskip("megatron.core")
    (tmp_path / "a.txt").write_bytes(b"hello")
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "line {number}"}}\n' for number in range(99)))
    command = [sys.executable, str(SCRIPTS / "gpt_moe" / "make_indexed.py"), "--input", str(tmp_path / "a.txt")]
    command += [str(tmp_path / "b.jsonl"), "--output-prefix", str(tmp_path / "out" / "pair")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "100 documents" in done.stdout

    train, valid, mark = indexed_streams(str(tmp_path / "out" / "pair"), 4, 1, "90,10,0")
    assert bytes(train.tokens[:5].astype(np.uint8)) == b"hello"
    assert train.tokens[5] == BYTE_EOD
    assert int((train.tokens == BYTE_EOD).sum()) == 90
    assert bytes(valid.tokens[:7].astype(np.uint8)) == b"line 89"
    assert int((valid.tokens == BYTE_EOD).sum()) == 10
    assert len(train.sample(0)) == 5
    assert mark == indexed_streams(str(tmp_path / "out" / "pair"), 4, 1, "90,10,0")[2]


def test_a_missing_pair_is_named(tmp_path):
    pytest.importorskip("megatron.core")
    with pytest.raises(ArgumentError, match=r"nothing\.bin"):
        indexed_streams(str(tmp_path / "nothing"), 4, 1, "90,10,0")
