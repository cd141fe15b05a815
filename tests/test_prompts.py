import pytest

from dit_sparse import prompts


def test_one_prompt_a_line(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffa red ball \r\nein Ball, grün".encode())
    assert prompts.read(tmp_path / "p.txt") == ("a red ball", "ein Ball, grün")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no prompt: write one or more, one a line."),
        (b"  \n\n", "holds no prompt"),
        (b"one\n\ntwo\n", "Line 2 of .* is empty"),
        (b"one\ntwo \xff\n", "is not UTF-8: line 2 holds a byte"),
        (b"a\n" * 9, "holds 9 prompts, and at most 8 are taken."),
    ],
)
def test_other_files_are_refused(tmp_path, content, said):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        prompts.read(tmp_path / "p.txt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"prompts_file '.*p.txt' is no file"):
        prompts.read(tmp_path / "p.txt")
