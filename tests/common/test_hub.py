"""Files of models: in local folders, offline, and on a hub that refuses."""

from types import SimpleNamespace

import pytest
from huggingface_hub import errors

from lit_align.common.hub import ModelLocation
from lit_align.user_errors import UserFileNotFoundError


def test_files_of_a_local_folder(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text("{}")
    location = ModelLocation(str(tmp_path), "vae")
    assert location.is_local
    assert location.find("config.json") == location.require("config.json") == tmp_path / "vae/config.json"
    assert location.find("model.safetensors") is None
    with pytest.raises(UserFileNotFoundError, match=r"vae holds no model\.safetensors\. Check repo"):
        location.require("model.safetensors")


def test_a_missing_file_names_the_reason(monkeypatch):
    location = ModelLocation("owner/name", "vae")
    assert location.find("config.json") is None
    with pytest.raises(UserFileNotFoundError, match=r"owner/name/vae holds no config\.json in the local cache"):
        location.require("config.json")  # tests are offline
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert str(location.missing("config.json")).endswith(
        "or the hub cannot be reached. Check repo, and filename where it is set."
    )


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    "error",
    [
        errors.RepositoryNotFoundError("404 Client Error", response=RESPONSE),
        errors.GatedRepoError("403 Client Error", response=RESPONSE),
        errors.RevisionNotFoundError("404 Client Error", response=RESPONSE),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_repository_that_cannot_be_read_is_the_users_to_correct(monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(UserFileNotFoundError, match=r"'owner/name' is neither .* revision \(v2\); for a private or"):
        ModelLocation("owner/name", revision="v2").find("config.json")


def test_a_malformed_id_is_refused():
    with pytest.raises(UserFileNotFoundError, match=r"'./nowhere' is neither a folder nor a repository of the hub"):
        ModelLocation("./nowhere").find("config.json")
