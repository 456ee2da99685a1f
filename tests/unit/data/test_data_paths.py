"""Path lists, path files, and the division of documents by --split."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config import DataConfig
from megatron.data.data_paths import Source, parse_data_path, read_data_path_file, split_documents, split_sources
from megatron.errors import UserError

PAIRS = (Source("data/a", 1.0), Source("data/b", 0.5))


@pytest.mark.parametrize("text", [
    '"1.0 data/a" "0.5 data/b"',
    '"1.0 data/a" "0.5 data/b"\n',
    "'1.0 data/a'   '0.5 data/b'",
    "1.0 data/a 0.5 data/b",
    "1.0 data/a\n0.5 data/b\n",
    '"1.0 data/a"\n"0.5 data/b"\n',
    '# a comment\n\n1.0 data/a\n  # another, with "a quote\n.5 data/b\n',
    '1e0 "data/a"\r\n5e-1 data/b\r\n',
])
def test_every_form_of_a_path_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "paths.txt").write_bytes(text.encode())
    assert read_data_path_file(str(tmp_path / "paths.txt"), "--train-data-path-file") == PAIRS


@pytest.mark.parametrize("text", ['"1 my data/set a"', '1 "my data/set a"',
                                  "1 my\\ data/set\\ a", "'1  my data/set a'"])
def test_names_with_spaces(tmp_path: Path, text: str) -> None:
    (tmp_path / "paths.txt").write_text(text)
    assert read_data_path_file(str(tmp_path / "paths.txt"), "--f") == (Source("my data/set a", 1.0),)


def test_prefixes_without_weights(tmp_path: Path) -> None:
    (tmp_path / "paths.txt").write_text("data/a\ndata/b#2\n")
    assert read_data_path_file(str(tmp_path / "paths.txt"), "--f") == (Source("data/a", None), Source("data/b#2", None))
    assert parse_data_path(["data/a"], "--f") == (Source("data/a", None),)
    assert parse_data_path(["1", "a", "2", "a"], "--f") == (Source("a", 1.0), Source("a", 2.0))
    assert parse_data_path(["1 a", "2 b c"], "--f") == (Source("a", 1.0), Source("b c", 2.0))


@pytest.mark.parametrize(("text", "line", "reason"), [
    ("1.0 data/a\n0.5\n", "line 2", "do not come in pairs"),
    ("1.0 data/a\n1.0 my data/b\n", "line 2", "do not come in pairs"),
    ("1.0 a b c\n", "line 1", "'b' stands where a weight is expected"),
    ("\n\n0 data/a\n", "line 3", "weight 0 of 'data/a' must be a number above 0"),
    ("-1 data/a\n", "line 1", "weight -1"),
    ("nan data/a\n", "line 1", "weight nan"),
    ("inf data/a\n", "line 1", "weight inf"),
    ('1.0 "data/a\n', "line 1", "No closing quotation"),
    ("data/a 1.0\n", "line 1", "'data/a' has no weight"),
    ("1.0 data/a\n\n# b has none\ndata/b\n", "line 4", "'data/b' has no weight and 'data/a' has one"),
    ("data/a data/c\n.5 data/b\n", "line 2", "'data/b' has a weight and 'data/a' has none"),
    ("# nothing\n", "", "names no data"),
    ("", "", "names no data"),
])
def test_wrong_path_files(tmp_path: Path, text: str, line: str, reason: str) -> None:
    path = tmp_path / "paths.txt"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        read_data_path_file(str(path), "--valid-data-path-file")
    message = str(raised.value)
    assert str(path) in message and line in message and reason in message and "\n" not in message
    assert line or "--valid-data-path-file" in message


def test_unreadable_path_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--train-data-path-file: cannot read .*absent.txt: No such file"):
        read_data_path_file(str(tmp_path / "absent.txt"), "--train-data-path-file")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"--f: .*binary is no text file"):
        read_data_path_file(str(tmp_path / "binary"), "--f")


def test_flags_choose_the_sources(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("1 v")
    config = DataConfig(train_data_path=("a",), valid_data_path_file=str(tmp_path / "v.txt"))
    train, valid, test = (split_sources(config, split) for split in ("train", "valid", "test"))
    assert train is not None and train.sources == (Source("a", None),) and not train.divided
    assert valid is not None and valid.sources == (Source("v", 1.0),)
    assert test is None
    divided = split_sources(DataConfig(data_path=("1", "a")), "test")
    assert divided is not None and divided.divided and divided.sources == (Source("a", 1.0),)


def test_split_of_a_thousand_documents() -> None:
    """969/30/1 of 1,000 by hand; and 10 documents, where rounding gives 10 + 0 + 0."""
    found = [split_documents((0.969, 0.03, 0.001), split, 1000) for split in ("train", "valid", "test")]
    assert found == [range(0, 969), range(969, 999), range(999, 1000)]
    assert [len(split_documents((0.969, 0.03, 0.001), split, 10)) for split in ("train", "valid", "test")] == [10, 0, 0]
    assert [len(split_documents((1.0, 0.0, 0.0), split, 10)) for split in ("train", "valid", "test")] == [10, 0, 0]
    assert split_documents((0.9, 0.1, 0.0), "valid", 50) == range(45, 50)
    # Half to even and the correction of all bounds, as Python's round and Megatron do: 0.5 * 5 -> 2, 2 (4), shifted by
    # -1.
    assert [split_documents((0.5, 0.5, 0.0), split, 5) for split in ("train", "valid")] == [range(0, 3), range(3, 5)]


@given(shares=st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any), documents=st.integers(1, 10**6))
def test_splits_cover_every_document_once(shares: list[int], documents: int) -> None:
    fractions = DataConfig(data_path=("a",), split=",".join(map(str, shares))).split_shares
    ranges = [split_documents(fractions, split, documents) for split in ("train", "valid", "test")]
    assert [ranges[0].start, ranges[1].start, ranges[2].start, documents] == [0] + [part.stop for part in ranges]
    for share, part in zip(shares, ranges):
        assert abs(len(part) - documents * share / sum(shares)) <= 2
