from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from taid_jax import sharding as sh


def test_parse_mesh_unnamed_axes_are_one():
    assert sh.parse_mesh("fsdp=-1") == {"data": 1, "fsdp": -1, "tensor": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "no axis is called 'model'"),
        ("data=two", "an integer"),
        ("data=0", "sizes >= 1"),
        ("data=-1,fsdp=-1", "only one axis"),
        ("data=1,data=1", "data is given twice"),
        ("data=2, fsdp=1, data =4", "data is given twice"),
        ("", "no axis is called ''"),
        ("data=1,", "no axis is called ''"),
        ("data=1,,fsdp=2", "no axis is called ''"),
        ("data", "an integer"),
        ("data=", "an integer"),
        ("data==1", "an integer"),
        ("data=1=1", "an integer"),
        ("data=1.0", "an integer"),
        ("data=1e3", "an integer"),
        ("data=1_0", "an integer"),
        ("data=1 0", "an integer"),
        ("data=+1", "an integer"),
        ("data=-2", "an integer"),
        ("data=\u0661", "an integer"),
        ("data=" + "9" * 5000, "an integer"),
        ("Data=1", "no axis is called 'Data'"),
        ("x" * 10**5, "no axis is called 'xxx"),
    ],
)
def test_parse_mesh_bad_text_says_why(text, message):
    with pytest.raises(sh.ShardingError, match=message) as caught:
        sh.parse_mesh(text)
    assert len(str(caught.value)) < 500


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("data=1,fsdp=-1,tensor=1", (1, 8, 1)),
        ("data=2,fsdp=2,tensor=2", (2, 2, 2)),
        ("tensor=4,data=-1", (2, 1, 4)),
    ],
)
def test_make_mesh_takes_the_devices_that_are_left(text, shape):
    assert sh.make_mesh(text).devices.shape == shape


@pytest.mark.multidevice
@pytest.mark.parametrize("text", ["data=3", "data=2,fsdp=2", "data=3,fsdp=-1"])
def test_make_mesh_wrong_number_of_devices_names_both(text):
    with pytest.raises(sh.ShardingError, match=r"8 device"):
        sh.make_mesh(text)


@pytest.mark.multidevice
def test_partition_spec_follows_the_table():
    mesh = sh.make_mesh("data=2,fsdp=2,tensor=2")
    spec = sh.partition_spec(("layers", "embed", "heads", None), (3, 4, 2, 5), mesh)
    assert spec == P(None, "fsdp", "tensor", None)
    assert sh.partition_spec(("batch", "length"), (8, 3), mesh) == P(
        ("data", "fsdp"), None
    )


@pytest.mark.multidevice
def test_partition_spec_axis_that_does_not_divide_stays_whole_and_says_so():
    mesh = sh.make_mesh("fsdp=4,tensor=2")
    with pytest.warns(UserWarning, match="layers.wq: axis heads of size 3"):
        spec = sh.partition_spec(("embed", "heads"), (8, 3), mesh, "layers.wq")
    assert spec == P("fsdp", None)


def test_partition_spec_unknown_axis_is_an_error():
    mesh = sh.make_mesh("data=1", jax.devices()[:1])
    with pytest.raises(sh.ShardingError, match="no logical axis is called 'emb'"):
        sh.partition_spec(("emb",), (4,), mesh)
    with pytest.raises(sh.ShardingError, match="2 dimensions"):
        sh.partition_spec(("embed",), (4, 4), mesh)


@pytest.mark.multidevice
def test_place_batch_shares_rows_out():
    mesh = sh.make_mesh("data=2,fsdp=4")
    batch = {"labels": np.arange(32, dtype=np.int32).reshape(16, 2)}
    placed = sh.place_batch(batch, mesh)["labels"]
    assert placed.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(placed, batch["labels"])


class _Device(NamedTuple):
    id: int
    process_index: int


class _Placed:
    """A sharding whose devices belong to several processes."""

    def __init__(self, rows):
        self.rows = rows  # of each device: process, first row, row behind the last

    def __call__(self, mesh, spec):
        return self

    def devices_indices_map(self, shape):
        return {
            _Device(number, process): (slice(start, stop),)
            for number, (process, start, stop) in enumerate(self.rows)
        }


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("rows", "process", "expected"),
    [
        ([(0, 0, 2), (0, 2, 4), (1, 4, 6), (1, 6, 8)], 1, (1, 2)),
        # The tensor axis spans processes 0 and 1, and 2 and 3.
        ([(0, 0, 4), (1, 0, 4), (2, 4, 8), (3, 4, 8)], 1, (0, 2)),
        ([(0, 0, 4), (1, 0, 4), (2, 4, 8), (3, 4, 8)], 2, (1, 2)),
        # Neighbours in the network that are not neighbours in the batch.
        ([(0, 0, 2), (1, 2, 4), (0, 4, 6), (1, 6, 8)], 1, (1, 2)),
    ],
)
def test_batch_part_is_that_of_the_devices(monkeypatch, rows, process, expected):
    mesh = sh.make_mesh("data=8")
    assert sh.batch_part(mesh) == (0, 1)
    monkeypatch.setattr(sh, "NamedSharding", _Placed(rows))
    monkeypatch.setattr(jax, "process_index", lambda: process)
    assert sh.batch_part(mesh) == expected


@pytest.mark.multidevice
def test_batch_part_uneven_processes_are_an_error(monkeypatch):
    rows = [(0, 0, 3), (1, 3, 8)]
    monkeypatch.setattr(sh, "NamedSharding", _Placed(rows))
    with pytest.raises(sh.ShardingError, match="unevenly"):
        sh.batch_part(sh.make_mesh("data=8"))


@pytest.mark.multidevice
def test_check_batch_names_both_numbers():
    mesh = sh.make_mesh("fsdp=-1")
    sh.check_batch(16, mesh)
    with pytest.raises(sh.ShardingError, match=r"12 sequences .* over 8 devices"):
        sh.check_batch(12, mesh)
