"""Contracts with the private parts of Lightning and torch: a failure here says what a new version has changed."""

import ast

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from lit_align import internals
from lit_align.commands.fit import ConfigCLI
from lit_align.diffusion import NoiseSchedule
from tests.support.paths import ROOT


def fit(callback, **options):
    """Train Lightning's small model with one callback on 5 batches an epoch."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {"max_epochs": 1, "limit_train_batches": 5, "limit_val_batches": 2, "num_sanity_val_steps": 0}
    settings = quiet | settings | options
    trainer = L.Trainer(accelerator="cpu", enable_model_summary=False, callbacks=[callback], **settings)
    trainer.fit(BoringModel())
    return trainer


def test_no_other_file_imports_private_parts():
    """Nor does this one import Lightning before a function needs it: rooms use it that must not know Lightning."""
    files = sorted((ROOT / "lit_align").rglob("*.py"))
    assert len(files) > 100
    for path in files:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("torch", "lightning"):
                private = "._" in node.module or any(alias.name.startswith("_") for alias in node.names)
                assert not private or path.name == "internals.py", f"{path}: {ast.unparse(node)}"
    at_once = ast.parse((ROOT / "lit_align/internals.py").read_text()).body
    assert not [node for node in at_once if isinstance(node, ast.ImportFrom) and node.module.startswith("lightning")]


class Accumulating(L.Callback):
    def __init__(self):
        self.seen, self.steps = [], []

    def on_train_batch_end(self, trainer, *_):
        self.seen.append(internals.is_accumulating(trainer))
        self.steps.append(trainer.global_step)


def test_is_accumulating():
    callback = Accumulating()
    fit(callback, accumulate_grad_batches=2, max_epochs=2)
    assert callback.seen == 2 * [True, False, True, False, False]
    assert callback.steps == [0, 1, 1, 2, 3, 3, 4, 4, 5, 6]


class Due(L.Callback):
    def __init__(self):
        self.predicted, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if internals.is_validation_due(trainer):
            self.predicted.append(batch_idx)

    def on_validation_start(self, trainer, *_):
        self.validated.append(trainer.fit_loop.epoch_loop.batch_idx)


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}, {"limit_val_batches": 0}])
def test_is_validation_due(options):
    callback = Due()
    fit(callback, **options)
    assert callback.predicted == callback.validated
    assert bool(callback.validated) == ("limit_val_batches" not in options)


class ValidateFirst(L.Callback):
    def __init__(self):
        self.steps, self.batches = [], []

    def on_train_start(self, trainer, *_):
        trainer.fit_loop.epoch_loop.val_loop.restarting = True  # as after a resume
        internals.run_validation(trainer)
        assert trainer.training
        assert not trainer.validating

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.steps.append(trainer.global_step)
        self.batches.append(batch_idx)


def test_run_validation():
    callback = ValidateFirst()
    assert fit(callback).global_step == 5
    assert callback.steps == [0, 0, 5, 5]
    assert callback.batches == [0, 1, 0, 1]


class Handlers(L.Callback):
    def __init__(self):
        self.calls = []

    def setup(self, trainer, pl_module, stage):
        internals.replace_signal_handlers(trainer, self.Object(self.calls))

    class Object:
        received_sigterm = False

        def __init__(self, calls):
            self.register_signal_handlers = lambda: calls.append("register")
            self.teardown = lambda: calls.append("teardown")


def test_replace_signal_handlers():
    callback = Handlers()
    trainer = fit(callback)
    assert callback.calls == ["register", "teardown"]
    assert trainer.received_sigterm is False


class Leaves(L.Callback):
    def __init__(self):
        self.ended = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            internals.leave_fit()

    def on_validation_start(self, *_):
        self.ended.append("validation")

    def on_train_epoch_end(self, *_):
        self.ended.append("epoch")

    def on_exception(self, *_):
        self.ended.append("exception")

    def teardown(self, trainer, pl_module, stage):
        self.ended.append("teardown")


def test_leave_fit():
    callback = Leaves()
    assert fit(callback).global_step == 2
    assert callback.ended == ["teardown"]


@pytest.mark.parametrize(
    ("environment", "local_rank", "expected"),
    [(LightningEnvironment, 1, True), (LightningEnvironment, 0, False), (TorchElasticEnvironment, 1, False)],
)
def test_is_lightning_child(monkeypatch, environment, local_rank, expected):
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    strategy = DDPStrategy()
    strategy._launcher = _SubprocessScriptLauncher(environment(), 2, 1)
    assert internals.is_lightning_child(strategy) is expected
    assert not internals.is_lightning_child(SingleDeviceStrategy())


def test_save_schedule():
    steps = L.pytorch.callbacks.ModelCheckpoint(every_n_train_steps=3, save_on_train_epoch_end=True)
    assert internals.save_schedule(steps) == (3, True)
    assert internals.save_schedule(L.pytorch.callbacks.ModelCheckpoint(every_n_epochs=1)) == (0, None)


def test_replace_link(tmp_path):
    made = []
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last="link", filename="x")
    internals.replace_link(checkpoint, lambda path, last: made.append((path.name, last.name)))
    fit(checkpoint, enable_checkpointing=True)
    assert made[0] == ("x.ckpt", "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()


def test_ddp_options():
    assert internals.ddp_options(DDPStrategy(gradient_as_bucket_view=True)) == {"gradient_as_bucket_view": True}
    assert internals.ddp_options(SingleDeviceStrategy()) == {}


def test_shard_over_all_devices():
    """`setup_environment` reads this attribute for its device mesh; test_sharding.py trains with it."""
    strategy = ModelParallelStrategy()
    assert strategy._data_parallel_size == "auto"
    internals.shard_over_all_devices(strategy, 8)
    assert strategy._data_parallel_size == 8


class KeepLoops(L.Callback):
    def __init__(self):
        self.loops = []

    def on_train_batch_end(self, trainer, *_):
        self.loops.append(trainer.fit_loop.state_dict())


def test_rewind_to_step():
    """The counters of a checkpoint after 3 of 5 batches, 2 a step; test_resume.py resumes from such checkpoints."""
    callback = KeepLoops()
    trainer = fit(callback, accumulate_grad_batches=2, limit_val_batches=0)
    for batch, unused in ((3, 1), (4, 0), (5, 0)):
        loops = {"fit_loop": callback.loops[batch - 1]}
        progress = loops["fit_loop"]["epoch_loop.batch_progress"]
        assert {name: progress["current"][name] for name in ("ready", "started", "processed", "completed")} == {
            "ready": batch,
            "started": batch,
            "processed": batch,
            "completed": batch - 1,
        }
        assert internals.rewind_to_step(loops, 2, trainer.num_training_batches) == unused
        assert progress["current"]["processed"] == progress["total"]["processed"] == batch - unused
        assert progress["current"]["completed"] == batch - 1 - unused


def test_unscales_gradients():
    weights = [torch.nn.Parameter(torch.ones(2))]
    assert internals.unscales_gradients(torch.optim.AdamW(weights, fused=True))
    assert not internals.unscales_gradients(torch.optim.AdamW(weights))
    # The scaler leaves gradients that it has divided before to such an optimizer as they are.
    scaler, fused = torch.amp.GradScaler("cpu", init_scale=4.0), torch.optim.SGD(weights, lr=1.0, fused=True)
    scaler.scale(weights[0].sum()).backward()
    scaler.unscale_(fused)
    scaler.step(fused)
    assert weights[0].tolist() == [0.0, 0.0]


def test_set_unscales_gradients():
    """A scaler gives its scale to an optimizer with the mark alone; else the step is made without it."""
    weights = [torch.nn.Parameter(torch.ones(2))]
    fused, plain = (torch.optim.AdamW(weights, fused=fused) for fused in (True, None))
    internals.set_unscales_gradients(fused, False)
    internals.set_unscales_gradients(plain, True)  # has no mark
    assert not internals.unscales_gradients(fused)
    assert not internals.unscales_gradients(plain)


def test_allow_graphs(monkeypatch):
    """Beyond the limit torch runs a function uncompiled."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def work(function):
        torch._dynamo.reset()
        graphs.clear()
        for size in range(2, 8):
            torch.compile(function, backend=count, dynamic=False)(torch.ones(size))
        return len(graphs)

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 3)
    assert work(lambda x: x + 1) == 3
    internals.allow_graphs(64)
    internals.allow_graphs(1)
    assert torch._dynamo.config.recompile_limit == 64
    assert work(lambda x: x + 1) == 6


def test_shut_down_workers():
    loader = DataLoader(range(8), num_workers=1, persistent_workers=True)
    internals.shut_down_workers(loader)  # nothing has started
    iterator = iter(loader)
    next(iterator)
    (worker,) = iterator._workers
    assert worker.is_alive()
    internals.shut_down_workers(loader)
    assert not worker.is_alive()
    assert [int(value) for value in loader] == list(range(8))  # it can begin again
    internals.shut_down_workers(loader)


def test_storage_key():
    first, second = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    assert internals.storage_key(first.untyped_storage()) == internals.storage_key(first[1:].untyped_storage())
    assert internals.storage_key(first.untyped_storage()) != internals.storage_key(second.untyped_storage())


def test_operators_are_recognised():
    seen = {}

    class Watch(internals.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[func.name()] = internals.reads_a_number(func), internals.returns_nothing(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        (torch.ones(1) + 1).item()
        torch._foreach_add_([torch.ones(1)], 1)
    assert seen["aten::_local_scalar_dense"] == (True, False)
    assert seen["aten::add.Tensor"] == (False, False)
    assert seen["aten::_foreach_add_.Scalar"] == (False, True)


def test_trees():
    tree = (1, [2, {"a": 3}], None)
    assert internals.tree_leaves(tree) == [1, 2, 3, None]
    assert internals.tree_map(lambda leaf: leaf, tree) == tree


class CountCalls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.sin
        return func(*args, **(kwargs or {}))


def test_backward_keeps_function_modes():
    """Torch's own disables them, so that a recomputation in it would escape; if not any more, `backward` can go."""
    counts = []
    for backward in (internals.backward, lambda loss: loss.backward()):
        weight = torch.ones(2, requires_grad=True)
        with CountCalls() as mode:
            backward(torch.utils.checkpoint.checkpoint(torch.sin, weight, use_reentrant=False).sum())
        assert torch.equal(weight.grad, torch.ones(2).cos())
        counts.append(mode.calls)
    assert counts[0] == 2
    assert counts[1] < 2


def test_attention_kernels():
    """As `lit_align/memory/autocast.py` calls them, on meta tensors, for the sizes of their outputs."""
    query = torch.empty(1, 2, 8, 16, device="meta", dtype=torch.bfloat16)
    flash = internals.attention_kernel("flash_attention")(query, query, query, 0.0, False, scale=None)
    efficient = internals.attention_kernel("efficient_attention")(query, query, query, None, True, 0.0, False)
    on_cpu = internals.attention_kernel("flash_attention_for_cpu")(query, query, query, 0.0, False)
    assert {flash[0].shape, efficient[0].shape, on_cpu[0].shape} == {query.shape}


def test_overridden_private_methods_exist():
    """Subclasses override these by name; a library that renames them would silently call its own instead."""
    for kind, name in ((L.pytorch.cli.LightningCLI, "_set_seed"), (torch.nn.Module, "_apply")):
        assert callable(getattr(kind, name))
    assert "_set_seed" in vars(ConfigCLI)
    assert callable(L.pytorch.cli.LightningCLI._instantiate_trainer)
    assert "_apply" in vars(NoiseSchedule)
    assert L.LightningModule()._trainer is None
    assert vars(torch.nn.Module())["_modules"] == {}  # where `Encoders` looks for loaded parts
