"""Hub loaders on local copies with the hub's own columns, local files, row checks."""

import json
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlkit.hub import HUB, load_file, load_hub, resolved_revision, validate_rows
from rlkit.verify import GoldError

COPIES = Path(__file__).parent / "fixtures" / "hub"


@pytest.fixture(autouse=True)
def _no_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def local(name, split=None, **kwargs):
    return load_hub(name, split=split, local=COPIES / name, **kwargs)


def row(**changes):
    good = {
        "problem_id": "a",
        "prompt": [{"role": "user", "content": "What is 2 + 3?"}],
        "answer": "5",
        "answer_type": "integer",
        "source": "test",
        "meta": "{}",
    }
    return good | changes


def test_aime_answers_lose_their_leading_zeros():
    rows = local("aime-2024")
    assert [r["answer"] for r in rows] == ["20", "21", "22"]
    assert rows[0] == {
        "problem_id": "aime-2024/train/60",
        "prompt": [{"role": "user", "content": "What is 0 + 20?"}],
        "answer": "20",
        "answer_type": "integer",
        "source": "HuggingFaceH4/aime_2024",
        "meta": '{"commit": null, "repo": "HuggingFaceH4/aime_2024", "row": 0, "split": "train"}',
    }
    assert [r["answer"] for r in local("aime-2025")] == ["7"]


def test_math_500_keeps_expressions():
    rows = local("math-500", "test")
    assert [r["answer"] for r in rows] == [r"\frac{1}{3}", r"\text{Evelyn}", "32348"]
    assert {r["answer_type"] for r in rows} == {"expression"}


def test_gsm8k_gold_stands_after_the_hashes():
    rows = local("gsm8k", "test")
    assert [r["answer"] for r in rows] == ["1296", "1297", "1298", "1299"]
    assert rows[0]["prompt"][0]["content"] == "Ann has 96 pens and gets 1200. How many?"


@pytest.mark.parametrize(("name", "count"), [("gsm8k", 96), ("still-3-rl-90k", 40)])
def test_train_and_validation_split_the_training_problems(name, count):
    train, validation = local(name, "train"), local(name, "validation")
    ids = [r["problem_id"] for r in train + validation]
    assert len(set(ids)) == len(ids) == count
    assert 0 < len(validation) < len(train)
    assert not {r["prompt"][0]["content"] for r in train} & {
        r["prompt"][0]["content"] for r in validation
    }
    assert local(name, "train") == train


def test_still_questions_are_taken_out_of_their_conversation():
    rows = local("still-3-rl-90k", "train", n=2)
    assert len(rows) == 2
    index = json.loads(rows[0]["meta"])["row"]
    question = rows[0]["prompt"][0]["content"]
    assert question == f"Compute {index}/7.\nGive a fraction."
    assert rows[0]["answer"] == rf"\frac{{{index}}}{{7}}"


@pytest.mark.parametrize("name", ["aime-2024", "aime-2025", "math-500"])
def test_benchmarks_cannot_be_trained_on(name):
    with pytest.raises(ValueError, match="testing only"):
        local(name, "train")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="aime-2024, aime-2025, math-500, gsm8k, still-3-rl-90k"):
        load_hub("aime-2023")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_hub("gsm8k", local="nowhere")


def one_file(tmp_path, rows, suffix=".parquet"):
    path = tmp_path / f"copy{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_single_file_is_a_local_copy_too(tmp_path, suffix):
    path = one_file(tmp_path, [{"problem": "2 + 2?", "answer": "4"}], suffix)
    assert [r["answer"] for r in load_hub("aime-2025", local=path)] == ["4"]


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("aime-2025", {"Problem": "2 + 2?", "answer": "4"}, "no column problem: found Problem"),
        ("aime-2024", {"problem": "2 + 2?", "answer": "4"}, "no column id"),
        ("aime-2025", {"problem": "2 + 2?", "answer": ""}, "test row 0 .* no gold answer"),
        ("aime-2025", {"problem": "2 + 2?", "answer": "four"}, "aime-2025/test/0.*not an integer"),
        ("aime-2025", {"problem": " ", "answer": "4"}, "test row 0 .* no question"),
        ("gsm8k", {"question": "2 + 2?", "answer": "2+2=4"}, "test row 0 .* no gold answer"),
        ("math-500", {"problem": "2 + 2?", "answer": r"\frac{"}, "math-500/test/0.*cannot be"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, record, words):
    with pytest.raises(ValueError, match=words):
        load_hub(name, split="test", local=one_file(tmp_path, [record]))


def test_a_still_prompt_without_conversation_is_named(tmp_path):
    record = {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "reward_model": {"ground_truth": "4"},
    }
    path = one_file(tmp_path, [record])
    with pytest.raises(ValueError, match=r"train row 0 .* no question in column 'prompt'"):
        load_hub("still-3-rl-90k", split="train", local=path)


def test_every_spec_says_where_its_columns_were_read():
    assert all(spec.source.startswith("https://") for spec in HUB.values())


def test_offline_there_is_no_resolved_revision(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolved_revision("gsm8k") is None
    with pytest.raises(ValueError, match="unknown"):
        resolved_revision("nothing")


def test_without_a_server_there_is_no_resolved_revision(monkeypatch):
    # Port 9 of this machine refuses the connection.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolved_revision("gsm8k") is None


def test_load_file_reads_both_formats(tmp_path):
    rows = [row(), row(problem_id="b", answer=r"\frac{1}{2}", answer_type="expression")]
    for suffix in (".jsonl", ".parquet"):
        assert load_file(one_file(tmp_path, rows, suffix)) == rows


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no rows"),
        ("{\n", "line 1: no valid JSON"),
        ("[1]\n", "line 1: expected a JSON object"),
        ('{"problem_id": "a", "question": "2?"}\n', "no column prompt, answer.*found problem_id"),
    ],
)
def test_bad_files_are_named(tmp_path, content, words):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"mine.jsonl.*{words}"):
        load_file(path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"\.jsonl or \.parquet"):
        load_file(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(ValueError, match="no readable Parquet"):
        load_file(tmp_path / "a.parquet")
    with pytest.raises(FileNotFoundError, match=r"b\.jsonl"):
        load_file(tmp_path / "b.jsonl")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "2 + 3?"}, "expected a list of messages"),
        ({"prompt": []}, "expected a list of messages"),
        ({"prompt": [{"role": "assistant", "content": "5"}]}, "ends with the user"),
        ({"prompt": [{"role": "user", "content": " "}]}, "ends with the user"),
        ({"answer": 5}, "answer=5, expected a string"),
        ({"answer": " "}, "'b' has an empty gold answer"),
        ({"answer": "five"}, "'b'.*is not an integer"),
        ({"answer_type": "number"}, "integer or expression"),
        ({"meta": "x"}, "no valid JSON"),
        ({"meta": "[]"}, "expected a JSON object"),
        ({"problem_id": "a"}, "problem_id='a' is also that of row 0"),
        ({"problem_id": ""}, "problem_id='' is empty"),
    ],
)
def test_bad_problem_rows_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        validate_rows([row(), row(**({"problem_id": "b"} | changes))], "set")


def test_validate_rows_drops_other_columns():
    assert validate_rows([row(extra=1)]) == [row()]
    with pytest.raises(GoldError):
        validate_rows([row(answer="")])
    with pytest.raises(ValueError, match="no rows"):
        validate_rows([])
