"""Label pools (LPLD): labels for a share of all batches, from which each epoch of a student draws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dwa_fast import FkdConfig, InputError
from dwa_fast.data.images import FileSet
from dwa_fast.training import state
from dwa_fast.training.fkd_folder import FkdFolder
from dwa_fast.training.relabel import label_bytes
from tests.files import contents
from tests.nets import stop_at
from tests.training import public_fkd
from tests.training.fkd_setups import CUTMIX, MEAN, STD, exact_logits, students, write

POOL, SHARE = replace(CUTMIX, epochs=8), FkdConfig(pool_share=0.3, logits="fp32")  # 14.4 of 48 batches: two epochs of six, and two more


def test_pool_holds_a_share_of_all_batches(tmp_path: Path, images: FileSet) -> None:
    """The first ones, without the smaller last one of an epoch; LPLD's reader finds the teacher's logits."""
    fkd = write(tmp_path / "labels", images, POOL, SHARE)
    assert sorted(path.name for path in fkd.iterdir()) == ["epoch_0", "epoch_1", "epoch_2", "sampler_indices_epoch.json"]
    assert [len(list((fkd / f"epoch_{epoch}").iterdir())) for epoch in range(3)] == [6, 6, 2]
    found = list(public_fkd.pool_batches(fkd, images.folder, MEAN, STD))
    assert len(found) == int(0.3 * 8 * 6)
    for batch, logits in found:
        assert torch.allclose(logits.double(), exact_logits(batch, POOL), rtol=1e-5, atol=1e-5)
    order = json.loads((fkd / "sampler_indices_epoch.json").read_text())
    public = public_fkd.sampler(110, 16)
    for epoch in range(3):
        assert order[str(epoch)] == [index for indices in list(public)[: (6, 6, 2)[epoch]] for index in indices]
    whole = label_bytes(POOL, 110, 10, fkd=FkdConfig(logits="fp32"))
    assert label_bytes(POOL, 110, 10, fkd=SHARE) < 0.3 * whole
    written = sum(path.stat().st_size for path in fkd.rglob("*.tar"))
    assert abs(written - label_bytes(POOL, 110, 10, fkd=SHARE)) < 0.1 * written


def test_students_draw_from_the_pool(tmp_path: Path, images: FileSet) -> None:
    """As many batches as an epoch has, with replacement, by the seed and the number of the epoch alone."""
    fkd = write(tmp_path / "labels", images, POOL, SHARE)
    labels = FkdFolder(fkd, images, POOL)
    pool = [labels.read(*place) for place in labels.places()]

    def drawn(seed: int, epoch: int) -> list[int]:
        plans = labels.sampler(POOL, 110, 10, seed=seed).epoch(epoch)
        return [next(n for n, own in enumerate(pool) if torch.equal(own.logits, plan.logits)) for plan in plans]  # type: ignore[arg-type]

    rounds = [drawn(1, epoch) for epoch in range(30)]
    assert all(len(each) == 6 for each in rounds)
    assert {place for each in rounds for place in each} == set(range(14))
    assert any(len(set(each)) < 6 for each in rounds)
    assert len({tuple(each) for each in rounds}) == 30
    assert drawn(1, 17) == rounds[17]
    assert drawn(2, 17) != rounds[17]


def test_a_pool_of_less_than_an_epoch_does_not_shorten_the_training(tmp_path: Path, images: FileSet) -> None:
    """Four of 48 batches: an epoch still has six, drawn from these."""
    fkd = write(tmp_path / "labels", images, POOL, replace(SHARE, pool_share=0.1))
    labels = FkdFolder(fkd, images, POOL)
    assert (len(list(labels.places())), labels.steps) == (4, 6)
    plans = labels.sampler(POOL, 110, 10, seed=0).epoch(0)
    assert [len(plan.indices) for plan in plans] == [16] * 6
    calls: list[tuple[int, int]] = []
    students(images, fkd.parent, POOL, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (48, 48)


def test_students_of_a_pool_resume_to_the_same_bits(tmp_path: Path, images: FileSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_SECONDS", 0.0)
    labels = write(tmp_path / "labels", images, POOL, SHARE).parent

    def weights(name: str, stops: list[int]) -> dict[str, torch.Tensor]:
        for step in stops:
            with pytest.raises(KeyboardInterrupt):
                students(images, labels, POOL, resume_dir=tmp_path / name, progress=stop_at(step))
        content: dict[str, torch.Tensor] = torch.load(tmp_path / name / "student0.state", weights_only=True)["weights"]
        return content

    straight, resumed = weights("straight", [47]), weights("resumed", [8, 20, 47])
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    alone = students(images, labels, POOL, resume_dir=tmp_path / "resumed").accuracies
    assert alone == students(images, labels, replace(POOL, students=2), jobs=2).accuracies[:1]


def test_pools_are_resumed_and_cannot_grow(tmp_path: Path, images: FileSet) -> None:
    whole = write(tmp_path / "whole", images, POOL, SHARE)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "stopped", images, POOL, SHARE, progress=stop_at(9))
    fkd = write(tmp_path / "stopped", images, POOL, SHARE)
    assert contents(fkd) == contents(whole)
    (fkd / "sampler_indices_epoch.json").unlink()
    write(tmp_path / "stopped", images, POOL, SHARE)
    assert contents(fkd) == contents(whole)
    with pytest.raises(InputError, match=r"other settings \(epochs was 8, is 9\); choose another folder"):
        write(tmp_path / "stopped", images, replace(POOL, epochs=9), SHARE)
    (fkd / "sampler_indices_epoch.json").write_text('{"0": ["a"]}')
    with pytest.raises(InputError, match=r"sampler_indices_epoch\.json cannot be read: it holds something else than integers"):
        students(images, fkd, POOL)
    (fkd / "sampler_indices_epoch.json").write_text('{"0": [1, 2]}')
    with pytest.raises(InputError, match=r"holds labels of 16 images, expected \d+ in 0 … 109"):
        students(images, fkd, POOL)
