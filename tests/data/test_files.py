from pathlib import Path

import pytest

from megatron_oreal.data.files import read_jsonl, write_jsonl


def read_text(folder: Path, text: str) -> list[tuple[int, dict[str, object]]]:
    path = folder / "rows.jsonl"
    path.write_text(text)
    return list(read_jsonl(path, "data.prompts"))


def test_written_rows_are_read_back_with_their_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "rows.jsonl"
    assert write_jsonl(path, [{"text": "π\n\u2028"}, {"number": 2}]) == 2
    assert list(read_jsonl(path, "data.prompts")) == [(1, {"text": "π\n\u2028"}), (2, {"number": 2})]
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


def test_blank_lines_count_but_are_no_rows(tmp_path: Path) -> None:
    assert read_text(tmp_path, '\n{"a": 1}\n  \n{"a": 2}') == [(2, {"a": 1}), (4, {"a": 2})]


def test_a_malformed_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.prompts: .*rows\.jsonl line 3 is not JSON .*fix the line$"):
        read_text(tmp_path, '{"a": 1}\n\n{"a": 2\n')


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2 must be a JSON object, not a list"):
        read_text(tmp_path, '{"a": 1}\n[1]\n')


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        list(read_jsonl(path, "data.prompts"))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.examples: .*none\.jsonl does not exist; give a JSONL file$"):
        list(read_jsonl(tmp_path / "none.jsonl", "data.examples"))


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl is empty; it needs at least one line"):
        read_text(tmp_path, text)


def test_a_line_that_ends_too_early_has_one_line_number_and_its_own_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"id": 1}\n{"id": 2, "prompt": "1+1=", "answer":\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl line 2 is not JSON \(Expecting value at column 38\); fix"):
        list(read_jsonl(file, "data.prompts"))
    file.write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"line 1 is not JSON \(it is nested too deeply\); fix the line"):
        list(read_jsonl(file, "data.prompts"))
