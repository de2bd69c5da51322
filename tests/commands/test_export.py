"""`lit-align export --overwrite` replaces exports, and nothing else."""

import pytest

from lit_align.commands.export import check_replaceable, export


@pytest.mark.parametrize(
    "names", [[], ["config.json", "diffusion_pytorch_model.safetensors"], ["pytorch_lora_weights.safetensors"]]
)
def test_an_export_may_be_replaced(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    check_replaceable(tmp_path)
    check_replaceable(tmp_path / "new")


@pytest.mark.parametrize("name", ["checkpoints", "config.yaml", "model_index.json", ".git"])
def test_a_folder_with_anything_else_stays(tmp_path, name):
    (tmp_path / "config.json").touch()
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=f"holds {name}, which no export writes, and --overwrite would delete it"):
        export(tmp_path / "any.ckpt", tmp_path, overwrite=True)


def test_a_file_and_a_link_stay(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError, match="is not a folder"):
            export(tmp_path / "any.ckpt", tmp_path / name, overwrite=True)
