"""Streaming through webdataset: endless, seeded, safe; and honest about what it cannot promise."""

from itertools import islice

import numpy as np
import pytest
import torch
import webdataset as wds

from data.making import encode, picture, write_shards, write_tar
from selfsup.data import sequential
from selfsup.data.images import ImageData
from selfsup.data.order import BatchPlan
from selfsup.data.sequential import BROKEN_PROMISES, sequential_batches

WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "hflip": 0.0}  # 8x8 stays 8x8


def take(folder, batches: int, plan: BatchPlan, workers: int = 0, seed: int = 0, **config):
    settings = ImageData(shards=str(folder), index="none", **config)
    stream = sequential_batches(settings, seed, 8, 3, plan, workers)
    taken = list(islice(stream, batches))
    stream.close()
    return taken


def identities(batches) -> list[int]:
    """Which picture each sample is, by its pixels."""
    known = {picture(i).transpose(2, 0, 1).tobytes(): i for i in range(60)}
    return [known[image.numpy().tobytes()] for batch in batches for image in batch.images]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_pass_has_every_sample_of_the_readers_shards(shards, workers):
    batches = take(shards, 60, BatchPlan(8, 8, 0, 1), workers, **WHOLE)
    first = batches[0]
    assert first.images.shape == (8, 3, 8, 8) and first.images.dtype == torch.uint8
    assert (first.index == -1).all() and first.seed == 0
    counts = np.bincount(identities(batches), minlength=40)
    assert counts.min() >= 3  # endless: 480 samples of 40
    if workers < 2:
        assert counts.max() - counts.min() <= 1


def test_positions_key_every_sample_anew(shards, monkeypatch):
    """Unique over ranks, workers and time: no two samples share their random numbers."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    positions = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        for batch in take(shards, 12, BatchPlan(8, 4, rank, 2), workers=2):
            assert (batch.epoch == 0).all()
            positions += batch.position.tolist()
    assert len(set(positions)) == len(positions) == 2 * 12 * 4


def test_ranks_and_workers_split_the_shards(shards, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        seen.append(set(identities(take(shards, 30, BatchPlan(8, 4, rank, 2), workers=2, **WHOLE))))
    assert seen[0] & seen[1] == set() and seen[0] | seen[1] == set(range(40))


def test_the_order_is_seeded_and_changes_from_pass_to_pass(shards):
    plan = BatchPlan(40, 40, 0, 1)
    one, two = (identities(take(shards, 2, plan, **WHOLE)) for _ in range(2))
    assert one == two
    assert one[:40] != one[40:] and sorted(one[:40]) == sorted(one[40:])
    assert identities(take(shards, 2, plan, seed=1, **WHOLE)) != one
    assert identities(take(shards, 1, plan, order="sequential", **WHOLE)) == list(range(40))


def test_shards_are_reshuffled_at_every_pass(shards, monkeypatch):
    """webdataset's plain seeded shuffle would repeat one order for ever."""
    monkeypatch.setattr(sequential, "_BUFFER", 1)
    passes = [tuple(identities([batch])) for batch in take(shards, 8, BatchPlan(40, 40, 0, 1), **WHOLE)]
    assert len(set(passes)) > 2 and len({frozenset(samples) for samples in passes}) == 1


def test_samples_without_an_image_are_passed_over(tmp_path):
    members = [("a.txt", b"x"), *[(f"{i}.png", encode(picture(i))) for i in range(3)], ("z.cls", b"1")]
    write_tar(tmp_path / "s.tar", members)
    batches = take(tmp_path, 2, BatchPlan(3, 3, 0, 1), order="sequential", **WHOLE)
    assert identities(batches) == [0, 1, 2, 0, 1, 2]


def test_fewer_shards_than_readers(shards):
    for world, workers in ((5, 0), (1, 5), (3, 2)):
        with pytest.raises(ValueError, match="got 4 shards; use fewer workers"):
            take(shards, 1, BatchPlan(60, 4, 0, world), workers)


def test_webdataset_and_the_plan_must_agree_on_the_rank(shards, monkeypatch):
    with pytest.raises(ValueError, match="process 0 of 1, expected 1 of 2"):
        take(shards, 1, BatchPlan(8, 4, 1, 2))


def test_only_plain_local_tars(shards, tmp_path):
    for url in ("pipe:cat x.tar", "http://host/x"):
        with pytest.raises(ValueError, match="local folder"):
            take(url, 1, BatchPlan(4, 4, 0, 1))
    (shards / "part-001.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(ValueError, match="part-001.tar: compressed with gzip"):
        take(shards, 1, BatchPlan(4, 4, 0, 1))
    take(write_shards(tmp_path / "fine", [4]), 1, BatchPlan(4, 4, 0, 1))
    assert wds.utils.enforce_security


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("a pickle in a shard was opened",))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_in_a_shard_is_unpickled(tmp_path, workers):
    import pickle

    evil = pickle.dumps(Payload())
    members = []
    for i in range(4):
        members.append((f"{i}.png", encode(picture(i))))
        members += [(f"{i}.{kind}", evil) for kind in ("pyd", "pickle", "pth")]
    write_tar(tmp_path / "s.tar", members)
    assert sorted(identities(take(tmp_path, 1, BatchPlan(4, 4, 0, 1), workers, **WHOLE))) == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_faults_are_raised_with_the_samples_name(tmp_path, workers):
    write_tar(tmp_path / "s.tar", [("a.txt", b"no image")])
    with pytest.raises(ValueError, match="hold no images"):
        take(tmp_path, 1, BatchPlan(4, 4, 0, 1), workers)
    write_tar(tmp_path / "s.tar", [("cat/1.jpg", b"junk")])
    with pytest.raises(ValueError, match=r"s\.tar: cat/1: cannot decode the image"):
        take(tmp_path, 1, BatchPlan(4, 4, 0, 1), workers)


def test_the_broken_promises_are_true_and_listed(shards):
    """A truncated shard: webdataset reads a shorter one and says nothing. The text says so."""
    path = shards / "part-001.tar"
    path.write_bytes(path.read_bytes()[: 512 * 8])
    assert len(set(identities(take(shards, 40, BatchPlan(8, 8, 0, 1), **WHOLE)))) == 22  # of 40
    for promise in ("resumed", "processes", "workers", "once per epoch", "damaged", "selfsup data index"):
        assert promise in BROKEN_PROMISES
