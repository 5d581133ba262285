"""One method, one data order, three loops: plain, transformers' Trainer and Lightning end bit-identical."""

import copy
import itertools
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import secateur as sc
from secateur.core.errors import ArtifactError, MaskError, ScheduleError
from secateur.training.state_file import load_state, save_state

STEPS, BATCH, ACCUMULATED = 12, 8, 2

METHODS = {
    "gradual": lambda m: sc.Gradual(
        m, sc.Magnitude(), sc.cubic(0, 0.8, begin=1, end=10), when=sc.every(3), allocation=sc.global_
    ),
    "rigl": lambda m: sc.Dynamic(m, sc.RigL(), 0.7, end=9, when=sc.every(3)),
    "set": lambda m: sc.Dynamic(m, sc.SET(), 0.7, end=9, when=sc.every(3)),
    "movement": lambda m: sc.Movement(m, sc.cubic(0, 0.7, begin=1, end=9), when=sc.every(2)),
    "str": lambda m: sc.STR(m, sc.linear(0, 0.7, begin=1, end=9), when=sc.every(3)),
    "acdc": lambda m: sc.ACDC(m, sc.Magnitude(), 0.7, sc.Phases((2, 4, 8))),
}


class Net(nn.Module):
    """Gives its loss where labels are given, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 3)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        loss = F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Rows(Dataset):
    def __init__(self, steps=STEPS):
        self.steps = steps

    def __len__(self):
        return self.steps * BATCH * ACCUMULATED

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        return {"x": torch.randn(6, generator=g), "labels": torch.randint(0, 3, (), generator=g)}


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def plain(make):
    """The loop that the others are compared with: accumulated batches, clipped gradients."""
    model = Net()
    method, optimizer = make(model), adamw(model)
    with method.attach(optimizer):
        for i, batch in enumerate(DataLoader(Rows(), BATCH)):
            (model(**batch)["loss"] / ACCUMULATED).backward()
            if i % ACCUMULATED == ACCUMULATED - 1:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    return model, method


def agree(a, b, masks_a, masks_b):
    assert masks_a.masks == masks_b.masks and masks_a.history == masks_b.history
    assert masks_a.step == masks_b.step == STEPS
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


# ------ transformers


def hugging_face(method, model, folder, resume=False, eval_dataset=None, **more):
    from transformers import Trainer, TrainingArguments

    from secateur.integrations.transformers import PruneCallback

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED,
        max_grad_norm=0.5,
        max_steps=STEPS,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", **more},
    )
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    seen = itertools.count()
    trainer = InOrder(
        model,
        arguments,
        train_dataset=Rows(),
        eval_dataset=eval_dataset,
        compute_metrics=lambda _: {"step": next(seen)},
        optimizers=(optimizer, schedule),
        callbacks=[PruneCallback(method)],
    )
    # The loss of the accumulated batches is their mean, as in the plain loop.
    trainer.model_accepts_loss_kwargs = False
    trainer.train(resume_from_checkpoint=resume)


@pytest.mark.parametrize("kind", METHODS)
def test_the_trainer_of_transformers_is_the_plain_loop(kind, tmp_path):
    model = Net()
    method = METHODS[kind](model)
    hugging_face(method, model, tmp_path)
    agree(*(x for pair in zip((model, method), plain(METHODS[kind]), strict=True) for x in pair))


@pytest.mark.parametrize("kind", METHODS)
def test_the_trainer_resumes(kind, tmp_path):
    whole, method = plain(METHODS[kind])
    model = Net()
    hugging_face(METHODS[kind](model), model, tmp_path, save_strategy="steps", save_steps=5)
    assert (tmp_path / "checkpoint-5" / "secateur_training.safetensors").is_file()
    model = Net()
    again = METHODS[kind](model)
    hugging_face(
        again, model, tmp_path, resume=str(tmp_path / "checkpoint-5"), save_strategy="steps", save_steps=5
    )
    agree(whole, model, method, again)


def test_what_goes_wrong_with_the_trainer(tmp_path):
    late = sc.cubic(0, 0.8, begin=0, end=STEPS + 1)
    model = Net()
    with pytest.raises(ScheduleError, match="ends at step 13, but training takes 12"):
        hugging_face(sc.Gradual(model, sc.Magnitude(), late), model, tmp_path)
    model = Net()
    hugging_face(METHODS["gradual"](model), model, tmp_path, save_strategy="steps", save_steps=5)
    (tmp_path / "checkpoint-5" / "secateur_training.safetensors").unlink()
    model = Net()
    with pytest.raises(ArtifactError, match="no state"):
        hugging_face(METHODS["gradual"](model), model, tmp_path, resume=str(tmp_path / "checkpoint-5"))


def test_a_state_of_other_weights_is_not_taken_up(tmp_path):
    for name, more in (("mine", 0.0), ("elsewhere", 0.1)):
        model = Net()
        with torch.no_grad():
            next(model.parameters()).add_(more)
        hugging_face(METHODS["gradual"](model), model, tmp_path / name, save_strategy="steps", save_steps=5)
    model = Net()
    other = str(tmp_path / "elsewhere" / "checkpoint-5")
    with pytest.raises(ArtifactError, match="is of other weights"):
        hugging_face(METHODS["gradual"](model), model, tmp_path / "mine", resume=other)
    model = Net()
    hugging_face(METHODS["gradual"](model), model, tmp_path / "elsewhere", resume=other)


# ------ Lightning


def lightning_module(model, by_step):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = model

        def training_step(self, batch, _):
            if by_step:  # Lightning begins an epoch that was interrupted with its first batch
                rows = [Rows()[self.global_step * BATCH + i] for i in range(BATCH)]
                batch = torch.utils.data.default_collate(rows)
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            return adamw(self.net)

    return Module()


def fit(method, model, folder, resume=None, by_step=False, callbacks=()):
    import lightning

    from secateur.integrations.lightning import PruneCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about workers, loggers and folders
        trainer = lightning.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            accumulate_grad_batches=1 if by_step else ACCUMULATED,
            gradient_clip_val=0.5,
            logger=False,
            enable_checkpointing=bool(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[PruneCallback(method), *callbacks],
        )
        trainer.fit(lightning_module(model, by_step), DataLoader(Rows(), BATCH), ckpt_path=resume)


@pytest.mark.parametrize("kind", METHODS)
def test_lightning_is_the_plain_loop(kind, tmp_path):
    model = Net()
    method = METHODS[kind](model)
    fit(method, model, tmp_path)
    agree(*(x for pair in zip((model, method), plain(METHODS[kind]), strict=True) for x in pair))


@pytest.mark.parametrize("kind", METHODS)
def test_lightning_resumes(kind, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    whole, model = Net(), Net()
    method = METHODS[kind](whole)
    fit(method, whole, tmp_path, by_step=True)
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    fit(METHODS[kind](model), model, tmp_path, by_step=True, callbacks=[saved])
    model = Net()
    again = METHODS[kind](model)
    fit(again, model, tmp_path, by_step=True, resume=str(tmp_path / "step=5.ckpt"))
    agree(whole, model, method, again)


def test_lightning_says_that_training_is_too_short(tmp_path):
    model = Net()
    method = sc.Gradual(model, sc.Magnitude(), sc.cubic(0, 0.8, begin=0, end=STEPS + 1))
    with pytest.raises(ScheduleError, match="ends at step 13"):
        fit(method, model, tmp_path)


# ------ accelerate, and the file of a state


def test_accelerate_is_the_plain_loop():
    from accelerate import Accelerator

    for make in METHODS.values():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
        model = Net()
        method = make(model)
        prepared, optimizer, loader = accelerator.prepare(model, adamw(model), DataLoader(Rows(), BATCH))
        with method.attach(optimizer):
            for batch in loader:
                with accelerator.accumulate(prepared):
                    accelerator.backward(prepared(**batch)["loss"])
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
        agree(*(x for pair in zip((model, method), plain(make), strict=True) for x in pair))


def test_a_state_in_a_file_is_the_same_state(tmp_path):
    model, method = plain(METHODS["gradual"])
    save_state(method.state_dict(), tmp_path / "state.safetensors")
    state = load_state(tmp_path / "state.safetensors")
    again = METHODS["gradual"](copy.deepcopy(model))
    again.load_state_dict(state)
    assert again.masks == method.masks and again.history == method.history and again.step == method.step
    (tmp_path / "state.safetensors").write_bytes(b"not one")
    with pytest.raises(ArtifactError, match="damaged"):
        load_state(tmp_path / "state.safetensors")
    with pytest.raises(ArtifactError, match="no state"):
        load_state(tmp_path / "nothing")
    method.masks.save(tmp_path / "masks")
    with pytest.raises(ArtifactError, match="not the state"):
        load_state(tmp_path / "masks")


def test_a_best_model_from_before_the_end_is_not_silently_dense(tmp_path):
    """Trainer loads the best checkpoint at the end: one from before the last change has too many weights."""
    model = Net()
    best = {
        "load_best_model_at_end": True,
        "eval_dataset": Rows(1),
        "eval_strategy": "steps",
        "eval_steps": 5,
        "metric_for_best_model": "step",  # the first is the best
        "greater_is_better": False,
    }
    with pytest.raises(MaskError, match=r"load_best_model_at_end loaded .*checkpoint-5"):
        hugging_face(METHODS["gradual"](model), model, tmp_path, save_strategy="steps", save_steps=5, **best)
