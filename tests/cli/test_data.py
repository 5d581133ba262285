"""Data files of every kind against the tokens that they must give."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import secateur as sc
from secateur.cli.data import Data, overlap_note, read_data

BOS, EOS = 1, 2
Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]
Read = Callable[..., Data]
IDS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13]]


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def found(data: Data) -> list[list[int]]:
    return [row for batch in data.batches for row in batch["input_ids"].tolist()]


@pytest.fixture
def read(speaker: Path) -> Read:
    """`read_data` with the model of words; `samples=None` and windows of 4 if nothing else is said."""
    model = sc.load(speaker)

    def call(
        file: Path, task: str = "text-generation", samples: int | None = None, length: int = 4, **more: Any
    ) -> Data:
        return read_data(file, speaker, model, task, samples, length, **more)

    return call


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def written(folder: Path, kind: str, columns: dict[str, list[Any]]) -> Path:
    """The columns as a file or folder of a kind."""
    import datasets

    file = folder / f"data.{kind}"
    if kind == "json":
        file.write_text(json.dumps(next(iter(columns.values()))))
    elif kind == "jsonl":
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        datasets.disable_progress_bars()
        table = datasets.Dataset.from_dict(columns)
        if kind in ("parquet", "csv"):
            getattr(table, f"to_{kind}")(file)
        else:
            table.save_to_disk(file)
            file = next(file.glob("*.arrow")) if kind == "arrow" else file
    return file


KINDS = ["json", "jsonl", "parquet", "csv", "arrow", "folder"]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_every_kind_give_the_same_tokens(tmp_path: Path, read: Read, kind: str) -> None:
    file = written(tmp_path, kind, {"text": [words(ids) for ids in IDS], "other": ["w3", "w3", "w3"]})
    data = read(file)
    assert found(data) == [[BOS, 3, 4, 5], [BOS, 8, 9], [BOS, 10, 11, 12]]
    assert all(int(b["attention_mask"].min()) == 1 for b in data.batches)
    assert data.loss is not None and data.notes == ()
    assert found(read(file, samples=2)) == found(data)[:2]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "csv"])
def test_token_ids_of_every_kind_stay_what_they_are(tmp_path: Path, llama: Path, kind: str) -> None:
    file = written(tmp_path, kind, {"input_ids": IDS})
    # The folder has no tokenizer, and none is needed.
    data = read_data(file, llama, sc.load(llama), "text-generation", None, 4)
    assert found(data) == [[3, 4, 5, 6], [8, 9], [10, 11, 12, 13]]


def test_the_column_that_is_named(tmp_path: Path, read: Read) -> None:
    columns = {"text": ["w3 w4", "w5 w6"], "other": ["w7 w8", "w9 w10"], "n": [1, 2], "ids": [[3, 4], [5, 6]]}
    file = written(tmp_path, "parquet", columns)
    assert found(read(file)) == [[BOS, 3, 4], [BOS, 5, 6]]
    assert found(read(Path(f"{file}:other"))) == [[BOS, 7, 8], [BOS, 9, 10]]
    assert found(read(Path(f"{file}:ids"))) == [[3, 4], [5, 6]]
    odd = file.with_name("a[1]:b.parquet")
    shutil.copy(file, odd)
    assert found(read(Path(f"{odd}:ids"))) == [[3, 4], [5, 6]]


def test_rows_of_nothing_in_a_table_are_passed_over(tmp_path: Path, read: Read) -> None:
    file = written(tmp_path, "parquet", {"text": ["", " ", None, "w3 w4", "\n"]})
    data = read(file, samples=2)
    assert found(data) == [[BOS, 3, 4]]
    assert data.notes == (f"{file}:text gives 1 of the 2 examples asked for.",)


@pytest.mark.usefixtures("no_network")
def test_a_data_set_folder_runs_no_code(tmp_path: Path, read: Read) -> None:
    folder = written(tmp_path, "folder", {"text": ["w3 w4"]})
    mark = tmp_path / "ran"
    for name in (f"{folder.name}.py", "data.py", "__init__.py", "folder.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w')")
    assert found(read(folder)) == [[BOS, 3, 4]]
    (folder / "state.json").unlink()  # what is left is a folder with a script
    with pytest.raises(sc.SecateurError, match="save_to_disk"):
        read(folder)
    assert not mark.exists()


def test_labels_of_a_table(tmp_path: Path, read: Read) -> None:
    columns = {"text": [words(ids) for ids in IDS], "label": [2, 0, 1]}
    for kind in ("jsonl", "parquet"):
        data = read(written(tmp_path, kind, columns), "text-classification", samples=2)
        assert found(data) == [[BOS, 3, 4, 5], [BOS, 8, 9]]
        assert [int(b["labels"]) for b in data.batches] == [2, 0]
    data = read(tmp_path / "data.parquet", "text-classification", seed=1)
    by_first = {3: 2, 8: 0, 10: 1}
    assert all(by_first[int(b["input_ids"][0, 1])] == int(b["labels"]) for b in data.batches)


def test_windows_of_one_text(tmp_path: Path, read: Read) -> None:
    file = tmp_path / "text.txt"
    file.write_text(words(list(range(3, 14))))
    ids = [BOS, *range(3, 14)]
    assert found(read(file)) == [ids[0:4], ids[4:8], ids[8:12]]
    assert found(read(file, length=5)) == [ids[0:5], ids[5:10]]
    data = read(file, samples=7)
    assert data.notes == (f"{file} gives 3 of the 7 examples asked for.",)
    data = read(file, samples=1, length=40)
    assert found(data) == [ids]
    assert data.notes == (f"{file} holds 12 tokens, less than a window of 40.",)


def test_a_seed_draws_windows_anywhere_and_none_twice(tmp_path: Path, read: Read) -> None:
    file = tmp_path / "text.txt"
    file.write_text(words(list(range(3, 14))))
    ids = [BOS, *range(3, 14)]
    everywhere = [ids[i : i + 4] for i in range(9)]
    drawn = found(read(file, seed=5))
    assert drawn != everywhere and sorted(drawn) == sorted(everywhere)
    assert found(read(file, seed=5, samples=3)) == drawn[:3]
    assert found(read(file, seed=6, samples=9)) != drawn


def test_a_seed_draws_texts_in_random_order_and_a_window_of_each(tmp_path: Path, read: Read) -> None:
    file = written(tmp_path, "json", {"input_ids": [list(range(3, 63)), [3, 4], list(range(62, 2, -1))]})
    seen: set[tuple[int, ...]] = set()
    for seed in range(40):
        drawn = found(read(file, seed=seed))
        assert sorted(map(len, drawn)) == [2, 4, 4] and drawn == found(read(file, seed=seed))
        for window in drawn:
            steps = {b - a for a, b in pairwise(window)}
            assert window == [3, 4] or steps in ({1}, {-1})
        seen |= {tuple(window) for window in drawn}
    assert len(seen) > 30, "the places are drawn too"
    firsts = {len(found(read(file, seed=seed, samples=1))[0]) for seed in range(20)}
    assert firsts == {2, 4}, "the order is drawn"


def test_packing_joins_texts_with_the_end_of_text_token(tmp_path: Path, read: Read) -> None:
    joined = [BOS, 3, 4, 5, 6, 7, EOS, BOS, 8, 9, EOS, BOS, 10, 11, 12, 13]
    texts = written(tmp_path, "json", {"text": [words(ids) for ids in IDS]})
    assert found(read(texts, pack=True)) == [joined[i : i + 4] for i in (0, 4, 8, 12)]
    assert found(read(texts, pack=True, samples=2, length=5)) == [joined[0:5], joined[5:10]]
    ids = written(tmp_path, "parquet", {"input_ids": IDS})
    assert found(read(ids, pack=True, length=6)) == [[3, 4, 5, 6, 7, EOS], [8, 9, EOS, 10, 11, 12]]
    ended = written(tmp_path, "jsonl", {"input_ids": [[3, 4, EOS], [5, 6, EOS]]})
    assert found(read(ended, pack=True, length=6)) == [[3, 4, EOS, 5, 6, EOS]]
    one = tmp_path / "one.txt"
    one.write_text(words([3, 4, 5]))
    assert found(read(one, pack=True)) == [[BOS, 3, 4, 5]]


def test_packing_with_a_seed_joins_in_random_order(tmp_path: Path, read: Read) -> None:
    file = written(tmp_path, "json", {"input_ids": [[i, i] for i in range(3, 33)]})
    plain = sorted(i for row in found(read(file, pack=True, length=3)) for i in row if i != EOS)
    rows = found(read(file, pack=True, length=3, seed=1))
    assert all(a == b and e == EOS for a, b, e in rows), "every text is whole"
    assert sorted(i for row in rows for i in row if i != EOS) != plain or rows != sorted(rows)
    assert rows == found(read(file, pack=True, length=3, seed=1))
    assert rows != found(read(file, pack=True, length=3, seed=2))


def test_a_seed_draws_examples_of_tensors(tmp_path: Path, read: Read) -> None:
    file = tmp_path / "data.safetensors"
    ids = torch.arange(3, 23).view(20, 1).repeat(1, 4)
    save_file({"input_ids": ids, "labels": ids.clone()}, file)
    data = read(file, samples=12, seed=3)
    rows = found(data)
    assert len(set(map(tuple, rows))) == 12 and rows != ids[:12].tolist()
    assert [row for b in data.batches for row in b["labels"].tolist()] == rows
    assert found(read(file, samples=12)) == ids[:12].tolist()
    assert read(file, samples=30).notes == (f"{file} gives 20 of the 30 examples asked for.",)


def test_the_loss_is_that_of_the_tokens(tmp_path: Path, llama: Path, run: Run, capsys: Capture) -> None:
    ids = torch.randint(3, 64, (6, 9), generator=torch.Generator().manual_seed(1))
    file = written(tmp_path, "parquet", {"ids": ids.tolist()})
    assert run("eval", llama, "--data", f"{file}:ids", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        expected = float(sc.load(llama)(input_ids=ids, labels=ids).loss)
    assert printed["loss"] == pytest.approx(expected, rel=1e-6)
    assert (printed["tokens"], printed["examples"], printed["notes"]) == (6 * 8, 6, [])


def overlap(read: Read, tmp_path: Path, one: list[list[int]], other: list[list[int]]) -> str | None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(one))
    b.write_text(json.dumps(other))
    return overlap_note(read(a), read(b))


def test_test_data_that_is_calibration_data_is_told(tmp_path: Path, read: Read) -> None:
    assert overlap(read, tmp_path, [[3, 4, 5, 6], [7, 8, 9]], [[4, 5, 6, 7], [7, 8], [3, 4, 5]]) is None
    note = overlap(read, tmp_path, [[3, 4, 5, 6], [7, 8, 9]], [[9, 9], [7, 8, 9], [3, 4, 5, 6, 63]])
    assert note is not None and note.startswith("2 of the 3 examples"), "the window ends before 63"
    text = tmp_path / "text.txt"
    text.write_text(words(list(range(3, 43))))
    note = overlap_note(read(text, seed=3, samples=2, length=7), read(text, length=7))
    assert note is not None and str(text) in note
    assert overlap_note(read(text), None) is None and overlap_note(None, read(text)) is None


def test_masking_does_not_hide_an_overlap(
    tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.cli.data.batches import labelled, masked, of_tokens

    class Tokenizer:
        mask_token_id = 63

    ids = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))
    whole = Data([masked(of_tokens(ids), Tokenizer())], labelled)
    last = Data([masked(of_tokens(ids[3:]), Tokenizer())], labelled)
    note = overlap_note(whole, last)
    assert note is not None and note.startswith("1 of the 1")
    assert overlap_note(Data([{"pixel_values": torch.zeros(2, 3)}], None), last) is None


def test_columns_of_one_file_are_apart(tmp_path: Path, read: Read) -> None:
    file = written(tmp_path, "parquet", {"train": [words(IDS[0])], "test": [words(IDS[2])]})
    train, test = (read(Path(f"{file}:{name}")) for name in ("train", "test"))
    assert overlap_note(train, test) is None and overlap_note(train, train) is not None


def bad_files(folder: Path) -> Iterator[tuple[str, str]]:
    """A file as the user names it, and what must be said about it."""

    def put(name: str, content: str) -> str:
        (folder / name).write_text(content)
        return str(folder / name)

    yield put("a.txt", " \n"), "a.txt is empty"
    yield put("a.json", ""), "a.json is empty"
    yield put("b.json", "[]"), "list of texts or of lists of token ids"
    yield put("c.json", "[3, 4, 5]"), "must hold texts"
    yield put("d.json", '["w3", [4, 5]]'), "must hold texts"
    yield put("e.json", '["w3 w4", " "]'), "row 2 is not a text that is not empty"
    yield put("f.json", "[[3, 4], [5, 6.5]]"), "row 2 is not a list of token ids"
    yield put("g.json", "[[3, 4], []]"), "row 2 is not a list of token ids"
    yield put("h.json", "[[3, 4], [5, 64]]"), "has the token 64, but the model knows 64"
    yield put("i.jsonl", '{"input_ids": [3, -1]}'), "has the token -1, but the model knows 64"
    yield put("j.json", "[[3], [4]]"), "no text of at least two tokens"
    yield put("k.jsonl", '{"words": "w3"}'), "must hold texts"
    yield put("l.jsonl", "{"), "cannot be read as .jsonl"
    yield put("m.txt", "w3 w4") + ":text", "m.txt has no columns"
    yield put("n.parquet", "no"), "cannot be read as parquet"
    yield put("o.csv", ""), "o.csv cannot be read as csv"
    yield str(folder / "none.parquet:text"), "no data file"
    (folder / "plain").mkdir()
    yield str(folder / "plain"), "cannot be read as a data set that save_to_disk wrote"
    table = written(folder, "parquet", {"n": [1], "words": ["w3"], "ids": [[3, 99]]})
    yield str(table), "one of n, words, ids"
    yield f"{table}:text", "no column text"
    yield f"{table}:n", "neither texts nor lists of token ids"
    yield f"{table}:ids", "has the token 99, but the model knows 64"
    import datasets

    datasets.DatasetDict(a=datasets.Dataset.from_dict({"text": ["w3"]})).save_to_disk(folder / "splits")
    yield str(folder / "splits"), f"several splits: give one of {folder / 'splits' / 'a'}"
    save_file({"input_ids": torch.tensor([[3, 4], [5, 64]])}, folder / "p.safetensors")
    yield str(folder / "p.safetensors"), "has the token 64, but the model knows 64"


@pytest.mark.usefixtures("no_network")
def test_bad_files_are_told_in_a_sentence(speaker: Path, tmp_path: Path, run: Run, capsys: Capture) -> None:
    for file, words in bad_files(tmp_path):
        capsys.readouterr()
        out = tmp_path / "out"
        status = run("prune", speaker, "--out", out, "--method", "wanda", "--sparsity", 0.5, "--data", file)
        said = " ".join(capsys.readouterr().err.split())
        assert status == 1 and said.startswith("Error:") and words in said, (file, said)
        assert not out.exists()


def test_what_cannot_be_packed(tmp_path: Path, read: Read, speaker: Path) -> None:
    labelled = written(tmp_path, "jsonl", {"text": ["w3", "w4"], "label": [0, 1]})
    with pytest.raises(sc.SecateurError, match="have labels"):
        read(labelled, "text-classification", pack=True)
    save_file({"input_ids": torch.tensor([[3, 4]])}, tmp_path / "a.safetensors")
    with pytest.raises(sc.SecateurError, match="holds tensors"):
        read(tmp_path / "a.safetensors", pack=True)
    endless = tmp_path / "endless"
    shutil.copytree(speaker, endless)
    settings = json.loads((endless / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (endless / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(sc.SecateurError, match="no end-of-text token"):
        read_data(labelled, endless, sc.load(speaker), "text-generation", 2, 4, pack=True)


@pytest.mark.parametrize(("package", "extra"), [("datasets", "data"), ("lm_eval", "eval")])
def test_a_missing_package_is_told_with_the_command_that_brings_it(
    speaker: Path,
    tmp_path: Path,
    run: Run,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    extra: str,
) -> None:
    file = written(tmp_path, "parquet", {"text": ["w3 w4"]})
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    words = ["--tasks", "piqa"] if extra == "eval" else ["--data", file]
    assert run("eval", speaker, *words) == 1
    assert f"pip install 'secateur[{extra}]'" in capsys.readouterr().err
