"""Where a run goes, and which checkpoint it may continue."""

import dataclasses
import json
from pathlib import Path

import pytest

from oneb.checkpoints.rundir import check_resume, claimed, read_sidecar, run_directory, sidecar_path
from oneb.errors import OnebError
from oneb.presets import resolve


def config(tmp_path: Path, **given):
    return resolve({"root": str(tmp_path), "path": "demo", "size": "nano", **given})


def write_checkpoint(path: Path, model, **more) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")
    shape = model if isinstance(model, dict) else dataclasses.asdict(model)
    values = {"step": 7, "tokens": 70, "sha256": "0" * 64, "bytes": 7, "best_val_loss": 1.5, "model": shape, **more}
    sidecar_path(path).write_text(json.dumps(values))


NAME = "oneb_decoupled_seed1337"


def test_the_name_says_tag_variant_and_seed(tmp_path):
    assert run_directory(config(tmp_path)).path == tmp_path / NAME
    other = config(tmp_path, tag="mine", variant="gqa", seed=3)
    assert run_directory(other).path == tmp_path / "mine_gqa_seed3"
    assert list(tmp_path.iterdir()) == []  # asking creates nothing


def test_suffix_takes_the_first_free_number(tmp_path):
    for expected in (NAME, f"{NAME}_2", f"{NAME}_3", f"{NAME}_4"):
        directory = run_directory(config(tmp_path))
        assert directory.path == tmp_path / expected
        assert directory.resume_from is None
        assert not directory.skip
        directory.path.mkdir()


def test_error_and_skip(tmp_path):
    assert run_directory(config(tmp_path, if_exists="error")).path == tmp_path / NAME
    assert not run_directory(config(tmp_path, if_exists="skip")).skip
    (tmp_path / NAME).mkdir()
    with pytest.raises(OnebError, match=r"exists.*--tag"):
        run_directory(config(tmp_path, if_exists="error"))
    assert run_directory(config(tmp_path, if_exists="skip")).skip


def test_resume_if_there_is_something_to_resume(tmp_path):
    wanted = config(tmp_path, if_exists="resume")
    assert run_directory(wanted).resume_from is None
    (tmp_path / NAME).mkdir()
    assert run_directory(wanted).resume_from is None
    (tmp_path / NAME / "last.pt").write_bytes(b"copied without its sidecar: there was a run, so it must not start anew")
    with pytest.raises(OnebError, match=r"is whole: .*last\.pt has no last\.pt\.json"):
        run_directory(wanted)
    write_checkpoint(tmp_path / NAME / "last.pt", wanted.model)
    assert run_directory(wanted).resume_from == tmp_path / NAME / "last.pt"
    assert run_directory(wanted).path == tmp_path / NAME


def test_resume_continues_in_the_same_directory(tmp_path):
    wanted = config(tmp_path, resume=True)
    with pytest.raises(OnebError, match="no checkpoint"):
        run_directory(wanted)
    write_checkpoint(tmp_path / NAME / "last.pt", wanted.model)
    assert run_directory(wanted).path == tmp_path / NAME
    assert run_directory(wanted).resume_from == tmp_path / NAME / "last.pt"
    named = config(tmp_path, resume=True, ckpt=str(tmp_path / NAME / "step5.pt"))
    write_checkpoint(tmp_path / NAME / "step5.pt", wanted.model)
    assert run_directory(named).resume_from == tmp_path / NAME / "step5.pt"


@pytest.mark.parametrize("asked", [{"resume": True}, {"if_exists": "resume"}])
def test_the_newest_is_the_one_that_was_saved_last(tmp_path, asked):
    wanted = config(tmp_path, **asked)
    saved = {"step00000004.pt": (1, 4), "step00000008.pt": (2, 8), "last.previous.pt": (3, 6), "last.pt": (3, 6)}
    for name, (serial, step) in saved.items():
        write_checkpoint(tmp_path / NAME / name, wanted.model, serial=serial, step=step)
    write_checkpoint(tmp_path / NAME / "best.pt", wanted.model, serial=9, step=9)  # cannot be continued
    chosen = run_directory(wanted)
    order = [path.name for path in (chosen.resume_from, *chosen.older)]
    assert order == ["last.pt", "last.previous.pt", "step00000008.pt", "step00000004.pt"]
    (tmp_path / NAME / "last.pt").write_bytes(b"weigh")
    chosen = run_directory(wanted)
    assert chosen.resume_from.name == "last.previous.pt"
    assert "last.pt has 5 bytes, its sidecar says 7" in chosen.note
    for name in saved:
        sidecar_path(tmp_path / NAME / name).unlink()
    with pytest.raises(OnebError, match="is whole: ") as caught:
        run_directory(wanted)
    assert all(name in str(caught.value) for name in saved)


def test_earlier_versions_did_not_count_saves(tmp_path):
    wanted = config(tmp_path, resume=True)
    for step in (30, 4, 200):
        write_checkpoint(tmp_path / NAME / f"step{step:08d}.pt", wanted.model, step=step)
    write_checkpoint(tmp_path / NAME / "last.pt", wanted.model, step=200)
    chosen = run_directory(wanted)
    assert [path.name for path in (chosen.resume_from, *chosen.older)] == [
        "last.pt", "step00000200.pt", "step00000030.pt", "step00000004.pt"]
    write_checkpoint(tmp_path / NAME / "last.pt", wanted.model, step=31, serial=1)
    assert run_directory(wanted).resume_from.name == "last.pt"


def test_a_checkpoint_exists_only_once_its_sidecar_does(tmp_path):
    checkpoint = tmp_path / "last.pt"
    with pytest.raises(OnebError, match="no checkpoint at"):
        read_sidecar(checkpoint)
    checkpoint.write_bytes(b"weights")
    with pytest.raises(OnebError, match="cut short"):
        read_sidecar(checkpoint)
    for damage in ("", "{", "[]", "null", '{"step": 3}'):
        sidecar_path(checkpoint).write_text(damage)
        with pytest.raises(OnebError, match="damaged"):
            read_sidecar(checkpoint)
    write_checkpoint(checkpoint, config(tmp_path).model)
    assert read_sidecar(checkpoint)["step"] == 7


@pytest.mark.parametrize("given", [{"resume": True}, {"ckpt": "last.pt"}, {"ckpt": "last.pt", "resume": True}])
def test_weights_of_another_shape_are_refused_with_every_difference(tmp_path, given):
    if "ckpt" in given:
        given = {**given, "ckpt": str(tmp_path / NAME / "last.pt")}
    write_checkpoint(tmp_path / NAME / "last.pt", config(tmp_path).model)
    check_resume(config(tmp_path, **given))
    with pytest.raises(OnebError) as caught:
        check_resume(config(tmp_path, **given, n_layers=5, null_attn=True))
    assert "--layers is 5, the checkpoint has 4" in str(caught.value)
    assert "--null-attn is True, the checkpoint has False" in str(caught.value)


def test_a_longer_context_is_no_other_shape(tmp_path):
    write_checkpoint(tmp_path / NAME / "last.pt", config(tmp_path).model)
    check_resume(config(tmp_path, resume=True, max_seq_len=512))


def test_a_sidecar_of_another_version_is_an_error_and_not_a_crash(tmp_path):
    wanted = config(tmp_path, resume=True)
    for model in ({"depth": 3}, {}):
        write_checkpoint(tmp_path / NAME / "last.pt", model)
        with pytest.raises(OnebError):
            check_resume(wanted)


def test_two_processes_never_share_a_directory(tmp_path):
    wanted = config(tmp_path)
    chosen = run_directory(wanted)
    with claimed(wanted, chosen) as first:
        # Chosen before the first one made its directory: the second goes on to the next name.
        with claimed(wanted, chosen) as second:
            assert second.path.name == f"{first.path.name}_2"
        again = dataclasses.replace(chosen, is_new=False)
        with pytest.raises(OnebError, match="another process"), claimed(wanted, again):
            pass
    with claimed(wanted, again) as freed:
        assert freed.path == first.path


def test_another_runs_checkpoint_never_replaces_what_is_there(tmp_path):
    other = tmp_path / "other_decoupled_seed1337" / "last.pt"
    write_checkpoint(other, config(tmp_path).model)
    wanted = config(tmp_path, resume=True, ckpt=str(other))
    assert run_directory(wanted).path.name == NAME
    (tmp_path / NAME).mkdir()
    assert run_directory(wanted).path.name == f"{NAME}_2"
    assert run_directory(wanted).resume_from == other
    for policy in ("error", "resume"):
        with pytest.raises(OnebError, match="may not be written over"):
            run_directory(config(tmp_path, resume=True, ckpt=str(other), if_exists=policy))


def test_resume_alone_asks_which_of_several_runs(tmp_path):
    first, second = (tmp_path / name / "last.pt" for name in (NAME, f"{NAME}_2"))
    for path in (first, second):
        write_checkpoint(path, config(tmp_path).model)
    with pytest.raises(OnebError, match="cannot tell which"):
        run_directory(config(tmp_path, resume=True))
    assert run_directory(config(tmp_path, resume=True, ckpt=str(second))).path == second.parent


def test_a_root_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OnebError, match="is a file"):
        run_directory(config(tmp_path / "file"))
