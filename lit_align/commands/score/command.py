"""`lit-align score`: score the pairs of shards, in side files beside them."""

from pathlib import Path

from lit_align.common.choices import OnError


def score(
    shards: str | list[str],
    scorers: str,
    presets: Path | None = None,
    output: str | None = None,
    batch_size: int = 16,
    on_error: OnError = "raise",
    overwrite: bool = False,
    report: bool = False,
    accelerator: str = "auto",
    devices: int | str = "auto",
) -> None:
    """Score both images of every pair, and write one side file per shard; a killed run resumes where it stopped.

    Under torchrun or SLURM, or with more than one device, the processes share the shards. Several commands may
    add scores of different scorers at once.

    Args:
        shards: tar files, folders of them, or the index.json of an import; braces `{000..127}` and wildcards `*`, in
            quotes, are expanded.
        scorers: names, separated by commas.
        presets: YAML file that defines the scorers; none: the presets of lit-align.
        output: folder of the side files; none: beside the shards.
        batch_size: pairs to score at a time.
        on_error: `raise` on a broken sample, or `skip` it: the log names it, and it gets no score.
        overwrite: replace scores of other weights or images, instead of raising an error.
        report: print and save how far the scorers agree with the human label and with each other.
        accelerator: `auto`, `cpu` or `gpu`.
        devices: number of devices of this machine, or `auto` for all; torchrun and SLURM set it themselves.

    Raises:
        SampleError: on a broken sample, unless `on_error` is `skip`.
        ValueError: if a side file holds scores of other weights, without `overwrite`.
        ModuleNotFoundError: if `report` is set and matplotlib is missing.
    """
    # Imported here, so that --help imports no torch.
    from lit_align.commands.score import scoring
    from lit_align.commands.score.agreement import report_agreement, require_matplotlib
    from lit_align.commands.shared.process_group import join_process_group
    from lit_align.data.labels.score_files import Identity, side_files
    from lit_align.data.read_options import ReadOptions
    from lit_align.data.shards.listing import name_shards
    from lit_align.scoring.presets import load_scorers, scorer_names

    names = scorer_names(scorers)
    paths = [file.path for file in name_shards(shards)]
    side_files(paths, output)  # refuses shards that would share one
    if report:
        require_matplotlib()
    group = join_process_group(accelerator, devices)
    loaded = load_scorers(names, presets)
    known = {name: Identity(scorer.version, scorer.fingerprint()) for name, scorer in loaded.items()}
    mine = paths[group.rank :: group.world_size]
    todo = list(scoring.unfinished(mine, output, known, overwrite))
    prepared = {name: scoring.LoadedScorer(loaded[name].prepare(group.device), known[name]) for name in names}
    options = ReadOptions(on_error)
    skipped = scoring.score_shards(todo, prepared, output, batch_size, options, hidden=group.rank > 0)
    print(f"{group}: scored {len(todo)} shards, {len(mine) - len(todo)} were done before, skipped {skipped} samples")
    group.wait()
    left = len(scoring.without_scores(paths, output, names))
    group.say_whole(left, len(paths), "shards' scores", f"all {len(paths)} shards have scores by {', '.join(names)}")
    if report and group.rank == 0:
        if group.world_size > 1:
            scoring.wait_for_others(paths, output, names)
        report_agreement(paths, output, names, options)
