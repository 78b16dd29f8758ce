"""Records of our own: every change of them is noticed, whatever they hold."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from br_jax.core.errors import UserError
from br_jax.core.records import file_hashes, read_record, require_unchanged, write_record

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4))
def test_what_is_written_is_read(tmp_path_factory, record):
    path = tmp_path_factory.mktemp("records") / "record.json"
    write_record(path, record)
    assert read_record(path) == record


def test_every_flipped_bit_is_noticed(tmp_path):
    """Or is in the seal's own name, without which the rest is as it was."""
    path, record = tmp_path / "record.json", {"loss": 0.5, "who": ["a", "b"], "n": {"x": 1, "y": None}}
    write_record(path, record)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                found = read_record(path)
            except UserError as error:
                assert "record.json" in str(error) and "\n" not in str(error)
            else:
                assert {name: found[name] for name in record} == record


def test_numbers_and_tuples_and_keys_are_json_s(tmp_path):
    write_record(tmp_path / "a.json", {"t": (1, 2), "k": {10: 1, 9: 2}, "f": 1e-300, "nan": float("nan")}, indent=None)
    found = read_record(tmp_path / "a.json")
    assert found["t"] == [1, 2] and found["k"] == {"10": 1, "9": 2} and found["nan"] != found["nan"]
    assert (tmp_path / "a.json").read_text().count("\n") == 1
    (tmp_path / "old.json").write_text(json.dumps({"loss": 1}))  # an earlier version's
    assert read_record(tmp_path / "old.json") == {"loss": 1}


def test_files_that_changed_or_went_are_named(tmp_path):
    for name in ("a.txt", "in/b.txt", "left/c.txt", ".lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    hashes = file_hashes(tmp_path, ["left"])
    assert [*hashes] == ["a.txt", "in/b.txt"]
    (tmp_path / "new.txt").write_text("more is no harm")
    require_unchanged(tmp_path, hashes, "do it again")
    (tmp_path / "in" / "b.txt").write_text("other")
    with pytest.raises(UserError, match=r"in/b\.txt: was changed or damaged since .*: do it again"):
        require_unchanged(tmp_path, hashes, "do it again")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt: is gone"):
        require_unchanged(tmp_path, hashes, "do it again")
