"""One test per kind of malformed store."""

import hashlib
import json
from pathlib import Path

import pytest
from store_fakes import FakeTeacher, capture_fake, make_prompts

from tdistill.errors import StoreCorruptError, StoreError, StoreIdentityError, StoreIncompleteError
from tdistill.store import Store, verify_store
from tdistill.store.schema import canonical_json, seal_manifest, unseal_manifest
from tdistill.store.write import shard_bytes


def shard(store: Path, number: int = 0) -> Path:
    return sorted(store.glob("shard-*.parquet"))[number]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nowhere.*Check the path, or run capture"):
        Store.open(tmp_path / "nowhere")


def test_missing_shard(small_store: Path) -> None:
    gone = shard(small_store, 1)
    gone.unlink()
    with pytest.raises(
        StoreCorruptError, match=f"{gone.name}: expected a shard of 1 rows, found no file.*capture again"
    ):
        Store.open(small_store, verify=True)
    assert Store.open(small_store)[0].answer_index == 0, "the other shard can be read"
    assert gone.name in verify_store(small_store)[0]


def test_truncated_shard(small_store: Path) -> None:
    file = shard(small_store)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        StoreCorruptError, match=f"{file.name}: expected {size:,} bytes, found {size - 1:,}.*capture again"
    ):
        Store.open(small_store, verify=True)


def test_longer_shard(small_store: Path) -> None:
    file = shard(small_store)
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(StoreCorruptError, match=file.name):
        Store.open(small_store, verify=True)


def test_missing_manifest(small_store: Path) -> None:
    (small_store / "manifest.json").unlink()
    for function in (Store.open, verify_store):
        with pytest.raises(StoreIncompleteError, match=r"2 shards and no manifest\.json.*capture again"):
            function(small_store)


def test_edited_manifest(small_store: Path) -> None:
    file = small_store / "manifest.json"
    content = json.loads(file.read_bytes())
    content["identity"]["sampling"]["p_max"] = 0.5
    file.write_bytes(canonical_json(content))
    with pytest.raises(StoreCorruptError, match=r"manifest\.json: expected the checksum"):
        Store.open(small_store, verify=True)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{}", b"\xff", b"[" * 100_000, b'{"manifest_sha256": 1}'])
def test_manifest_that_is_none(small_store: Path, data: bytes) -> None:
    (small_store / "manifest.json").write_bytes(data)
    with pytest.raises(StoreCorruptError, match=r"manifest\.json"):
        Store.open(small_store)


def test_other_format_version(small_store: Path) -> None:
    file = small_store / "manifest.json"
    content = unseal_manifest(file.read_bytes(), "manifest.json")
    file.write_bytes(seal_manifest({**content, "format_version": 1}))
    with pytest.raises(StoreError, match="version 1; this tdistill reads tdistill-store version 2"):
        Store.open(small_store)


def test_shard_of_another_store(tmp_path: Path) -> None:
    """A whole shard of another teacher under the name of one of ours."""
    capture_fake(tmp_path / "a", make_prompts(2), shard_prompts=1)
    capture_fake(tmp_path / "b", make_prompts(2), FakeTeacher(weights_sha256="dd" * 32), shard_prompts=1)
    ours, theirs = shard(tmp_path / "a"), shard(tmp_path / "b")
    ours.write_bytes(theirs.read_bytes())
    with pytest.raises(StoreCorruptError, match=f"{ours.name}: expected SHA-256"):
        Store.open(tmp_path / "a", verify=True)
    store = Store.open(tmp_path / "a")
    with pytest.raises(StoreCorruptError, match=f"{ours.name}: expected SHA-256"):
        store[0]
    assert store[1].prompt_id == "prompt-1"


def test_unfinished_shard_of_another_identity(tmp_path: Path) -> None:
    capture_fake(tmp_path, make_prompts(2), FakeTeacher(weights_sha256="dd" * 32))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StoreIdentityError) as error:
        capture_fake(tmp_path, make_prompts(2))
    assert f'teacher.weights_sha256: stored "{"dd" * 32}", asked "{"aa" * 32}"' in str(error.value)
    assert len(list(tmp_path.iterdir())) == 1


def test_every_flip_of_a_manifest_byte_is_noticed(small_store: Path) -> None:
    data = (small_store / "manifest.json").read_bytes()
    unseal_manifest(data, "whole")
    for place in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            with pytest.raises(StoreError):
                unseal_manifest(bytes(flipped), "flipped")


@pytest.mark.parametrize("which", ["manifest.json", "index", "shard"])
@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_every_flipped_byte_is_noticed_on_opening(small_store: Path, which: str, mask: int) -> None:
    file = next(small_store.glob(f"{which}*"))
    data = file.read_bytes()
    Store.open(small_store, verify=True)
    with file.open("r+b", buffering=0) as handle:
        for place in range(len(data)):
            handle.seek(place)
            handle.write(bytes([data[place] ^ mask]))
            with pytest.raises(StoreCorruptError, match=file.name):
                Store.open(small_store, verify=True)
            handle.seek(place)
            handle.write(data[place : place + 1])
    Store.open(small_store, verify=True)


@pytest.mark.parametrize("which", ["index", "shard"])
def test_every_flipped_byte_is_noticed_on_reading(small_store: Path, which: str) -> None:
    file = next(small_store.glob(f"{which}*"))
    data = file.read_bytes()
    with file.open("r+b", buffering=0) as handle:
        for place in range(0, len(data), 3):
            handle.seek(place)
            handle.write(bytes([data[place] ^ 0x10]))
            store = Store.open(small_store)
            with pytest.raises(StoreCorruptError, match=file.name):
                _ = store.response_lengths if which == "index" else [store[0], store[1]]
            handle.seek(place)
            handle.write(data[place : place + 1])


def test_missing_index(small_store: Path) -> None:
    (index,) = small_store.glob("index-*")
    index.unlink()
    with pytest.raises(StoreCorruptError, match=f"{index.name}: expected the index, found no file.*capture again"):
        Store.open(small_store)
    assert index.name in verify_store(small_store)[0]


def test_truncated_index(small_store: Path) -> None:
    (index,) = small_store.glob("index-*")
    size = index.stat().st_size
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(StoreCorruptError, match=f"{index.name}: expected {size:,} bytes, found {size - 1:,}"):
        Store.open(small_store)


def sealed_index(store: Path, data: bytes) -> str:
    """Put ``data`` in the place of the index, with all checksums right; returns the name of the file."""
    (old,) = store.glob("index-*")
    old.unlink()
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"index-{sha256[:16]}.parquet"
    (store / name).write_bytes(data)
    content = unseal_manifest((store / "manifest.json").read_bytes(), "manifest.json")
    content["index"] = {"file": name, "sha256": sha256, "bytes": len(data)}
    (store / "manifest.json").write_bytes(seal_manifest(content))
    return name


def test_index_that_is_no_parquet_file(small_store: Path) -> None:
    name = sealed_index(small_store, b"PAR1 nothing PAR1")
    with pytest.raises(StoreCorruptError, match=f"{name}: expected a readable index"):
        _ = Store.open(small_store).prompt_lengths


@pytest.mark.parametrize("rows", [1, 3])
def test_index_of_other_length(small_store: Path, rows: int) -> None:
    table = Store.open(small_store).index().take([0] * rows)
    name = sealed_index(small_store, shard_bytes(table, 10))
    with pytest.raises(StoreCorruptError, match=f"{name}: expected 2 rows, found {rows}"):
        _ = Store.open(small_store).jobs


def test_index_without_a_column(small_store: Path) -> None:
    table = Store.open(small_store).index().drop_columns(["prompt_tokens"])
    name = sealed_index(small_store, shard_bytes(table, 10))
    with pytest.raises(StoreCorruptError, match=name):
        _ = Store.open(small_store).prompt_lengths
    assert f"{name}: expected the columns ['prompt_tokens']" in verify_store(small_store)[0]


def test_index_with_another_type(small_store: Path) -> None:
    table = Store.open(small_store).index()
    table = table.set_column(1, "answer_index", table.column("answer_index").cast("int64"))
    name = sealed_index(small_store, shard_bytes(table, 10))
    assert f"{name}: the columns are" in verify_store(small_store)[0]


def test_every_cut_of_a_manifest_is_noticed(small_store: Path) -> None:
    data = (small_store / "manifest.json").read_bytes()
    for length in range(len(data)):
        with pytest.raises(StoreCorruptError):
            unseal_manifest(data[:length], "cut")


def test_golden_serialisation_of_a_manifest() -> None:
    """Pinned bytes: a reader in another language can be checked against them."""
    content = {"b": [1, 0.5, None, True], "a": {"ü": "\n", "A": -1}}
    expected = b'{"a":{"A":-1,"\\u00fc":"\\n"},"b":[1,0.5,null,true]}\n'
    assert canonical_json(content) == expected
    digest = hashlib.sha256(expected).hexdigest().encode()
    assert digest == b"c11bde4ecece498f0ff93d6f3462b8efe17cf6f0558a4383cbad8a6d9fc0c544"
    assert seal_manifest(content) == expected[:-2] + b',"manifest_sha256":"' + digest + b'"}\n'
