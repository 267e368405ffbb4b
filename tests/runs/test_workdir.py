"""The one thing about a workdir that needs several hosts: that all see the same folder."""

import json

import pytest

from lowrank.errors import UserError
from lowrank.runs import workdir as workdir_lib


def test_a_process_that_sees_another_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_lib, "NFS_SECONDS", 1)
    with pytest.raises(UserError, match="is not the folder of that name of process 0; checkpoints need one that all"):
        workdir_lib.refuse_other_folder(tmp_path, at=5.0)  # nothing there
    (tmp_path / "config.json").write_text(json.dumps({"at": 4.0, "config": {}, "identity": {}}))
    with pytest.raises(UserError, match="is not the folder"):
        workdir_lib.refuse_other_folder(tmp_path, at=5.0)  # an earlier run's, of a folder that was copied
    workdir_lib.refuse_other_folder(tmp_path, at=4.0)
