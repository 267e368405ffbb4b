"""Bases in a bucket: the same parameters to the bit, no more than its part for a shard, and little of it in memory."""

import socket
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest
import running

from lowrank.data.tokenizer import load_tokenizer
from lowrank.errors import UserError
from lowrank.families.config import ModelConfig
from lowrank.files.bucket import BucketPath
from lowrank.files.paths import path
from lowrank.model import decoder
from lowrank.model.decoder import Decoder
from lowrank.parallel import mesh as mesh_lib
from lowrank.weights import remote_file
from lowrank.weights.base import read_base
from lowrank.weights.load import load_params
from lowrank.weights.merged import write_huggingface
from lowrank.weights.remote_file import Kept, RemoteFile

FILE = "bucket/base/model.safetensors"
ROWS, COLUMNS = ("o_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(remote_file, "_kept", Kept())


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder of random weights, of which an eighth is much more than a fingerprint reads."""
    config = ModelConfig(vocab=512, embed=512, mlp=1024, layers=2, heads=8, kv_heads=8, head_dim=64, max_length=64)
    draw = np.random.default_rng(0)
    shapes = decoder.abstract(Decoder(config))[0]["params"]
    params = jax.tree.map(lambda leaf: draw.standard_normal(leaf.shape, np.float32), shapes)
    folder = tmp_path_factory.mktemp("wide") / "hf"
    write_huggingface(folder, params, config, dtype="float32")
    return folder


def shapes_of(base, dtype="float32", **mesh):
    """The shapes of its parameters, laid out over so many devices."""
    model = Decoder(base.config, None, np.dtype(dtype), np.dtype(dtype))
    shapes, axes = decoder.abstract(model)
    return mesh_lib.with_shardings(mesh_lib.make_mesh(mesh_lib.MeshConfig(**mesh)), axes, shapes)["params"]


def assert_bitwise(tree, reference):
    assert jax.tree.structure(tree) == jax.tree.structure(reference)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True):
        assert x.sharding == y.sharding and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("form", ["hf", "hf_sharded", "hf_bin", "meta"])
def test_a_base_in_a_bucket_is_the_same_base(bucket, shared_data, form):
    local = shared_data / "stories260k" / form
    bucket.put_folder("bucket/base", local)
    here, there = read_base(local), read_base("gs://bucket/base")
    assert (here.config, here.fingerprint) == (there.config, there.fingerprint)
    shapes = shapes_of(here, data=1, fsdp=4, tensor=2)
    assert_bitwise(load_params(there, shapes), load_params(here, shapes))


def test_a_native_base_in_a_bucket_is_the_same_base_and_its_check_sums_are_compared(bucket, demo_base, tmp_path):
    finished = running.run("convert", f"--from={demo_base}", f"--to={tmp_path / 'native'}")
    assert finished.code == 0, finished.err
    bucket.put_folder("bucket/base", tmp_path / "native")
    here, there = read_base(tmp_path / "native"), read_base("gs://bucket/base")
    assert here.fingerprint == there.fingerprint
    shapes = shapes_of(here, data=4, fsdp=2)
    assert_bitwise(load_params(there, shapes), load_params(here, shapes))
    name = "bucket/base/params-00001-of-00001.safetensors"
    content = bytearray(bucket.objects[name]["content"])
    content[-200] ^= 1
    bucket.put(name, content)
    remote_file._kept = Kept()
    with pytest.raises(UserError, match=r"gs://bucket/base.*(not what was written|other weights)"):
        load_params(read_base("gs://bucket/base"), shapes)


@pytest.mark.parametrize("where", ["stories260k/hf", pytest.param("tokenizers/llama3", marks=pytest.mark.slow)])
def test_the_tokenizer_beside_it_is_the_same(bucket, shared_data, where):
    folder = shared_data / where
    bucket.put_folder("bucket/base", folder)
    here, there = load_tokenizer(folder), load_tokenizer("gs://bucket/base")
    text = "Once upon a time, in  Łódź: 12345"
    assert here.encode(text) == there.encode(text)
    assert (here.vocab, here.bos_id, here.eos_id) == (there.vocab, there.bos_id, there.eos_id)


def test_a_shard_costs_its_share_of_the_bytes(bucket, wide):
    """What one of eight hosts reads: an eighth of the tensors that are cut by rows, and of the others the rows whole."""
    bucket.put_folder("bucket/base", wide)
    base = read_base("gs://bucket/base")
    assert bucket.read[FILE] < 0.1 * len(bucket.objects[FILE]["content"])  # header and fingerprint
    shapes = shapes_of(base, data=1, fsdp=8)
    device = jax.devices()[3]

    def read_shard(block, name):
        """The bytes that come from the bucket for one device's shard of a leaf, over those of the whole leaf."""
        remote_file._kept = Kept()
        before = bucket.read[FILE]
        leaf, wanted = (tree["layers"][block][name]["kernel"] for tree in (base.params, shapes))
        leaf.read(wanted.sharding.addressable_devices_indices_map(leaf.shape)[device], wanted.dtype)
        return (bucket.read[FILE] - before) / (np.prod(leaf.shape) * leaf.dtype.itemsize)

    blocks = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    found = {name: read_shard(block, name) for block, names in blocks.items() for name in names}
    assert found == dict.fromkeys(COLUMNS, 1.0) | dict.fromkeys(ROWS, 1 / 8)


def test_all_shards_together_read_every_byte_once(bucket, wide):
    bucket.put_folder("bucket/base", wide)
    base = read_base("gs://bucket/base")
    opened = bucket.read[FILE]
    load_params(base, shapes_of(base, data=1, fsdp=8))
    size = len(bucket.objects[FILE]["content"])
    assert 0.9 * size < bucket.read[FILE] - opened <= size


def test_little_of_a_base_is_kept_and_what_went_is_fetched_again(bucket, wide, monkeypatch):
    bucket.put_folder("bucket/base", wide)
    kept = Kept(limit=2**20)
    monkeypatch.setattr(remote_file, "_kept", kept)
    monkeypatch.setattr(remote_file, "PART_BYTES", 2**17)
    here, there = read_base(wide), read_base("gs://bucket/base")
    shapes = shapes_of(here, data=1, fsdp=2, tensor=4)
    assert_bitwise(load_params(there, shapes), load_params(here, shapes))
    assert sum(part.stop - part.start for part in kept.by_age.values()) == kept.nbytes <= 2**20
    assert sum(len(parts) for parts in kept.near.values()) == len(kept.by_age)


def test_any_bytes_come_in_parts_that_are_there_or_sent_for(bucket, monkeypatch):
    monkeypatch.setattr(remote_file, "PART_BYTES", 100)
    monkeypatch.setattr(remote_file, "CRUMB_BYTES", 0)
    content = np.random.default_rng(0).bytes(1234)
    bucket.put("bucket/file", content)
    file = RemoteFile(path("gs://bucket/file"))
    for start, stop in np.random.default_rng(1).integers(0, 1300, (100, 2)).tolist():
        file.expect(start + 7, stop + 50)
        assert bytes(file.held(start, stop)) == content[start:stop]
    assert file.checksum(0, 1234) == zlib.crc32(content)
    assert bucket.read["bucket/file"] == 1234  # nothing was fetched twice


def test_a_read_that_fails_is_one_line(bucket, demo_base):
    bucket.put_folder("bucket/base", demo_base)
    base = read_base("gs://bucket/base")
    bucket.refuse = lambda method, where: (403, "not any more") if "alt=media" not in where else None
    with pytest.raises(
        UserError, match=r"gs://bucket/base/model.safetensors: Google .* does not allow it \(not any more\)"
    ):
        load_params(base, shapes_of(base, data=8))


def test_a_truncated_file_is_refused_as_on_a_disk(bucket, demo_base):
    bucket.put_folder("bucket/base", demo_base)
    bucket.put(FILE, bucket.objects[FILE]["content"][:-10])
    with pytest.raises(UserError, match=r"gs://bucket/base: model.safetensors cannot be read .* truncated or corrupt"):
        read_base("gs://bucket/base")


def test_generate_answers_alike_from_a_bucket(bucket, demo_base):
    local = demo_base
    bucket.put_folder("bucket/base", local)
    here, there = (
        running.run("generate", f"--base={base}", "--prompt=Once upon a time", "--max_new_tokens=8", "--temperature=0")
        for base in (local, "gs://bucket/base")
    )
    assert (there.code, there.out) == (0, here.out), there.err


LOAD = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from jax.experimental import multihost_utils
from lowrank.weights.base import load_params, read_base
sys.path += [sys.argv[3], sys.argv[3] + "/weights"]
from test_weights_remote import shapes_of

here, there = read_base(sys.argv[4]), read_base("gs://bucket/base")
for mesh in ({"data": 1, "fsdp": 8}, {"data": 1, "fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}):
    shapes = shapes_of(here, **mesh)
    multihost_utils.sync_global_devices("opened")
    print("opened", flush=True)
    sys.stdin.readline()
    found = load_params(there, shapes)
    multihost_utils.sync_global_devices("loaded")
    print("loaded", flush=True)
    sys.stdin.readline()
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(load_params(here, shapes)), strict=True):
        assert x.sharding == y.sharding
        for part, expected in zip(x.addressable_shards, y.addressable_shards, strict=True):
            assert np.asarray(part.data).tobytes() == np.asarray(expected.data).tobytes()
    from lowrank.weights import remote_file
    remote_file._kept = remote_file.Kept()
"""


@pytest.mark.slow
def test_hosts_that_hold_other_columns_together_read_every_byte_once(bucket, wide):
    """Each fetches other rows, and their devices exchange what they hold of them: the same shards, to the bit."""
    bucket.put_folder("bucket/base", wide)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    words = [sys.executable, "-c", LOAD, coordinator]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    rest = (str(running.ROOT / "tests"), str(wide))
    processes = [subprocess.Popen([*words, str(i), *rest], env=running.environment(4), **pipes) for i in range(2)]
    read = []
    for _ in range(2 * 3):
        for process in processes:
            while not process.stdout.readline().endswith(("opened\n", "loaded\n")):  # gloo has things to say, too
                assert process.poll() is None
        read.append(bucket.read[FILE])
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
    assert [process.wait(120) for process in processes] == [0, 0]
    size = len(bucket.objects[FILE]["content"])
    shares = [(read[i + 1] - read[i]) / size for i in (0, 2, 4)]
    assert shares[:2] == pytest.approx([1, 1], abs=0.05)  # less what the fingerprint had fetched
    assert shares[2] == pytest.approx(2, abs=0.05)  # each host holds all of it


def test_a_part_that_could_not_be_had_is_asked_for_again(monkeypatch):
    asked = []

    def read_range(path, start, stop):
        asked.append((start, stop))
        if len(asked) == 1:
            raise UserError("the network is away")
        return b"x" * (stop - start)

    monkeypatch.setattr(BucketPath, "read_range", read_range)
    kept, file = Kept(), BucketPath("bucket/file")
    (part,) = kept.parts(file, 0, 10)
    with pytest.raises(UserError):
        part.content.result()
    (part,) = kept.parts(file, 0, 10)
    assert part.content.result() == b"x" * 10
    assert kept.nbytes == 10 and asked == [(0, 10)] * 2
