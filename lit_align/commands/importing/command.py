"""`lit-align import SOURCE`: makes shards with an index from published or local preference data.

A killed import resumes, and a finished one changes nothing. Rows left out are counted and listed.
"""

from collections.abc import Callable
from pathlib import Path

from lit_align.commands.importing.import_report import print_summary
from lit_align.common.sizes import format_bytes
from lit_align.user_errors import UserValueError

# Importers are imported by the functions that call them, so that --help imports no torch.


def pick_a_pic(
    output: str,
    files: str | list[str] | None = None,
    repo: str | None = None,
    revision: str = "main",
    pattern: str = "data/train-*.parquet",
    pairs_per_shard: int = 1000,
    workers: int | None = None,
) -> None:
    """Pick-a-Pic v1, v2 and sets with their columns: Parquet files, local or on the Hugging Face hub.

    Columns: jpg_0, jpg_1 (encoded images, copied byte for byte), label_0, label_1, caption (or original_prompt). Other
    columns are kept as JSON. Ties are kept; rows whose has_label is false are left out.

    Args:
        output: folder of the shards.
        files: Parquet files or URLs; braces `{000..127}` and wildcards `*`, in quotes, are expanded.
        repo: data set on the hub, OWNER/NAME, instead of files; uses the token of `hf auth login`.
        revision: branch of the data set, or a commit, which cannot change during the import.
        pattern: files of the data set to import.
        pairs_per_shard: rows of the source per shard; rows left out make the shard smaller.
        workers: processes; by default one per core, up to 16.

    Raises:
        UserValueError: if columns are missing, the folder holds another import, or no row is a pair.
    """
    from lit_align.data.importers.import_run import import_source
    from lit_align.data.importers.pick_a_pic import hub_files, open_files

    if (files is None) == (repo is None):
        raise UserValueError("Name --files or --repo, one of the two.")
    source = open_files(hub_files(repo, revision, pattern) if files is None and repo is not None else files or [])
    print(f"{len(source.tables)} files, {source.rows:,} rows, {format_bytes(source.bytes or 0)}")
    print_summary(import_source(source, output, pairs_per_shard, workers))


def table(
    output: str,
    files: str | list[str] | None = None,
    repo: str | None = None,
    revision: str = "main",
    pattern: str = "data/train-*.parquet",
    images: str | None = None,
    chosen_column: str | None = None,
    rejected_column: str | None = None,
    image_0_column: str | None = None,
    image_1_column: str | None = None,
    label_column: str | None = None,
    label_0_column: str | None = None,
    label_1_column: str | None = None,
    prompt_column: str | None = None,
    label_image_0: list[str] | None = None,
    label_image_1: list[str] | None = None,
    label_tie: list[str] | None = None,
    leave_out_undelivered: bool = False,
    pairs_per_shard: int = 1000,
    workers: int | None = None,
) -> None:
    """Tables of pairs: CSV, TSV, JSON, JSON lines or Parquet, local, at an address or on the Hugging Face hub.

    A cell holds an image as bytes, as a struct of bytes and path, as a path, URL or base64, or a list or message with
    one of these. Columns are found by names such as chosen and rejected, image_0, image_1 and label, or prompt, and the
    import says which it has found; where more than one could be meant, it asks you to name it. What labels mean is
    read from all of them: 1 and 0, 1 and -1, 1 and 2, true and false, left and right, `image 2`, shares such as 0.7.

    Args:
        output: folder of the shards.
        files: paths or URLs; braces `{000..127}` and wildcards `*`, in quotes, are expanded; or a folder with a
            metadata.jsonl.
        repo: data set on the hub, OWNER/NAME, instead of files; uses the token of `hf auth login`.
        revision: branch of the data set, or a commit, which cannot change during the import.
        pattern: files of the data set to import.
        images: folder or URL to which image paths are relative; by default the table's.
        chosen_column: column of the preferred image, in a table without labels.
        rejected_column: column of the rejected image.
        image_0_column: column of image 0, in a table with labels.
        image_1_column: column of image 1.
        label_column: column that says which image is preferred; 1: image 0 is; 0: image 1 is; 0.5: a tie.
        label_0_column: column with a label, number of votes or score of image 0; the larger one is preferred.
        label_1_column: such a column of image 1.
        prompt_column: column of the prompt.
        label_image_0: values of the label column that prefer image 0, in brackets, ["left"].
        label_image_1: values that prefer image 1.
        label_tie: values that prefer neither.
        leave_out_undelivered: leave out and count images that a server does not deliver at any attempt; by default they
            stop the import.
        pairs_per_shard: rows of the source per shard; rows left out make the shard smaller.
        workers: processes; by default one per core, up to 16.

    Raises:
        UserValueError: if columns or labels are not known, the folder holds another import, or no row is a pair.
    """
    from lit_align.data.importers.columns import Asked
    from lit_align.data.importers.import_run import import_source
    from lit_align.data.importers.label_encodings import Values
    from lit_align.data.importers.open_tables import open_tables
    from lit_align.data.importers.pick_a_pic import hub_files

    if (files is None) == (repo is None):
        raise UserValueError("Name --files or --repo, one of the two.")
    asked = Asked(
        image_0_column,
        image_1_column,
        label_column,
        label_0_column,
        label_1_column,
        chosen_column,
        rejected_column,
        prompt_column,
    )
    given = Values(tuple(label_image_0 or ()), tuple(label_image_1 or ()), tuple(label_tie or ()))
    named = hub_files(repo, revision, pattern) if files is None and repo is not None else files or []
    source = open_tables(named, asked, given, images, leave_out_undelivered)
    print(f"{len(source.tables)} files, {source.rows:,} rows")
    print_summary(import_source(source, output, pairs_per_shard, workers))


def webdataset(shards: str | list[str], output: str | None = None, workers: int | None = None) -> None:
    """Tar shards of the right layout: reads them once and writes an index; copies nothing.

    Args:
        shards: tar files or URLs, folders of tar files, or an index.json; braces `{000..127}` and wildcards `*`, in
            quotes, are expanded.
        output: folder of the index, for shards on the network or a read-only disk; by default beside the shards.
        workers: processes; by default one per core, up to 16.

    Raises:
        UserValueError: if the folder has the index of other shards, or no sample is a pair.
    """
    from lit_align.data.importers.webdataset import index_shards

    print_summary(index_shards(shards, output, workers))


def hpd(
    output: str,
    annotations: str,
    images: str | None = None,
    pairs_per_shard: int = 1000,
    workers: int | None = None,
) -> None:
    """HPDv2: train.json or test.json with its folder of images; every two images of a prompt make a pair.

    Args:
        output: folder of the shards.
        annotations: JSON file, a list of entries with prompt, file_path or image_path (n images, which make
            n (n - 1) / 2 pairs in the file's order), and a judgement, the first found of: human_preference (a value per
            image, 1 for the preferred one; pairs of two unpreferred images are left out), raw_annotations (majority of
            the annotators' rankings; an even vote is a tie), rank (smaller is better).
        images: folder to which names are relative; by default beside the file, train/ for train.json.
        pairs_per_shard: pairs of the source per shard; pairs left out make the shard smaller.
        workers: processes; by default one per core, up to 16.

    Raises:
        UserValueError: if the folder holds another import, or there is no pair.
    """
    from lit_align.data.importers.hpd import open_annotations
    from lit_align.data.importers.import_run import import_source

    print_summary(import_source(open_annotations(annotations, images), output, pairs_per_shard, workers))


def folder(
    output: str,
    table: str | None = None,
    chosen: Path | None = None,
    rejected: Path | None = None,
    captions: Path | None = None,
    image_0_column: str = "image_0",
    image_1_column: str = "image_1",
    label_column: str = "label",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
    prompt_column: str = "prompt",
    pairs_per_shard: int = 1000,
    workers: int | None = None,
) -> None:
    """Your own pairs: a table (CSV, TSV, JSON lines) of image files, or a folder of chosen and one of rejected images.

    A hash of the pair's key decides whether the chosen image becomes image 0 or 1, so that its position is random.

    Args:
        output: folder of the shards.
        table: .csv, .tsv or .jsonl; its paths are relative to its folder; other columns are kept as JSON.
        chosen: folder of preferred images, searched with its subfolders, instead of a table.
        rejected: folder of rejected images with matching names; suffixes may differ.
        captions: folder of NAME.txt; by default beside the chosen images, else beside the rejected ones.
        image_0_column: column of image 0.
        image_1_column: column of image 1.
        label_column: column of labels; 1: image 0 is preferred; 0: image 1 is; 0.5: a tie.
        chosen_column: column of the preferred image, in a table without labels.
        rejected_column: column of the rejected image.
        prompt_column: column of the prompt.
        pairs_per_shard: rows of the source per shard; rows left out make the shard smaller.
        workers: processes; by default one per core, up to 16.

    Raises:
        UserValueError: if columns are missing, the folder holds another import, or no row is a pair.
    """
    from lit_align.data.importers.folders import open_folders
    from lit_align.data.importers.import_run import import_source
    from lit_align.data.importers.open_tables import Columns, open_table

    if table is not None and chosen is None and rejected is None and captions is None:
        names = (image_0_column, image_1_column, label_column, chosen_column, rejected_column, prompt_column)
        print_summary(import_source(open_table(table, Columns(*names)), output, pairs_per_shard, workers))
    elif table is None and chosen is not None and rejected is not None:
        print_summary(import_source(open_folders(chosen, rejected, captions), output, pairs_per_shard, workers))
    else:
        raise UserValueError("Name --table, or --chosen and --rejected (and --captions, if they lie elsewhere).")


IMPORTERS: dict[str, Callable[..., None]] = {
    "table": table,
    "pick-a-pic": pick_a_pic,
    "webdataset": webdataset,
    "hpd": hpd,
    "folder": folder,
}
