"""Lists of prompts: every format gives the same prompts, and a mistake is named with its file and line."""

import json
from pathlib import Path

import pytest

from nemo_ext.errors import NemoError
from nemo_ext.files import read_prompts
from nemo_ext.prompts import Prompt, labels_of, read_prompt_list

CAPTIONS = ["Silent Harvest by Nora Vale", 'Say "hello"; then wave, twice', "Café at night"]

#: The first rows of the published list of memorized prompts, with the quotes that pandas has written.
PUBLISHED = '''\
;Caption;URL;type;mean_sscd;max_sscd;Index
0;The No Limits Business Woman Podcast;https://example.org/0.jpg;VM;0.8392826318740845;0.8467365503311157;1030727993
1;"""Watch: Passion Pit's New Video, """"Lifted Up (1985)""""""";https://example.org/1.png?a=1;TM;;;567947515
'''


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def csv_of(delimiter: str, header: str = "Caption") -> str:
    quoted = ['"{}"'.format(caption.replace('"', '""')) for caption in CAPTIONS]
    rows = [delimiter.join(("id", header)), *(f"{place}{delimiter}{text}" for place, text in enumerate(quoted))]
    return "\n".join(rows) + "\n"


class TestFormats:
    def test_text_has_one_prompt_a_line_and_no_special_characters(self, tmp_path: Path) -> None:
        path = write(tmp_path, "a.txt", "\n".join(["", *CAPTIONS, "   ", " # no comment \u2028 here "]))
        assert read_prompts(path) == [*CAPTIONS, "# no comment \u2028 here"]

    @pytest.mark.parametrize("delimiter", [";", ",", "\t"])
    @pytest.mark.parametrize("header", ["Caption", "caption", "PROMPT", '"text"'])
    def test_csv_names_the_column_of_prompts(self, tmp_path: Path, delimiter: str, header: str) -> None:
        assert read_prompts(write(tmp_path, "a.csv", csv_of(delimiter, header))) == CAPTIONS

    def test_csv_with_one_column_needs_no_quotes(self, tmp_path: Path) -> None:
        path = write(tmp_path, "a.csv", 'caption\na fox; a cat, and a dog\n"a ""quoted"" one"\n')
        assert read_prompts(path) == ["a fox; a cat, and a dog", 'a "quoted" one']

    def test_csv_keeps_a_line_break_inside_quotes(self, tmp_path: Path) -> None:
        prompts = read_prompt_list(write(tmp_path, "a.csv", 'id,text\r\n1,"one\r\ntwo"\r\n\r\n2,three\r\n'))
        assert [(prompt.text, prompt.line) for prompt in prompts] == [("one\r\ntwo", 2), ("three", 5)]

    @pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json"])
    def test_json_lines_name_the_key_of_prompts(self, tmp_path: Path, ending: str) -> None:
        rows = [
            {"Caption": caption, "index": place, "mean_sscd": float("nan"), "nested": [{}]}
            for place, caption in enumerate(CAPTIONS)
        ]
        assert read_prompts(write(tmp_path, f"a.{ending}", "\n\n".join(map(json.dumps, rows)))) == CAPTIONS

    def test_the_published_list_is_read_with_its_labels_and_addresses(self, tmp_path: Path) -> None:
        first, second = read_prompt_list(write(tmp_path, "memorized.csv", PUBLISHED))
        assert first == Prompt("The No Limits Business Woman Podcast", "VM", "https://example.org/0.jpg", 2)
        assert second.text == '"Watch: Passion Pit\'s New Video, ""Lifted Up (1985)"""'
        assert (second.label, second.url, second.line) == ("TM", "https://example.org/1.png?a=1", 3)

    @pytest.mark.parametrize(
        ("label", "kept"), [('"VM"', "VM"), ('" odd one "', "odd one"), ("1", "1"), ("null", None), ('""', None)]
    )
    def test_any_label_is_kept_as_text(self, tmp_path: Path, label: str, kept: str | None) -> None:
        (prompt,) = read_prompt_list(write(tmp_path, "a.jsonl", f'{{"text": "a", "Label": {label}}}'))
        assert prompt.label == kept

    @pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
    def test_a_byte_order_mark_and_windows_line_ends_are_read(self, tmp_path: Path, name: str) -> None:
        content = {
            "a.txt": "é\r\nb\r\n",
            "a.csv": "caption\r\né\r\nb\r\n",
            "a.jsonl": '{"text":"é"}\r\n{"text":"b"}\r\n',
        }
        assert read_prompts(write(tmp_path, name, b"\xef\xbb\xbf" + content[name].encode())) == ["é", "b"]


class TestMistakes:
    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("a.csv", "a fox\na cat\n", "line 1: there is no column caption or prompt or text"),
            ("a.csv", "caption;url\n", "is empty"),
            ("a.csv", "caption;url\na;b\n\nc; d; e\n", "line 4: there are more values than columns"),
            ("a.csv", "caption,url\na,b\nc\n", "line 3: there are fewer values than columns"),
            ("a.csv", "caption,url\n,b\n", "line 2: the prompt is empty"),
            ("a.csv", "caption,text\na,b\n", "line 1: the columns caption and text have the same meaning"),
            ("a.csv", 'caption,url\na,b\n"c,d\n', "line 3 or after it: unexpected end of data"),
            ("a.csv", f"caption,url\n{'a' * 200_000},b\n", "line 2 or after it: field larger than field limit"),
            ("a.csv", "", "line 1: there is no column"),
            ("a.jsonl", '{"caption": "a"}\n{"caption": "b"', "line 2: the line is not a JSON object"),
            ("a.jsonl", '["a"]', "line 1: the line is not a JSON object, but list"),
            ("a.jsonl", '{"title": "a"}', "line 1: there is no key caption"),
            ("a.jsonl", '{"caption": null}', "line 1: 'caption' must be text, got null"),
            ("a.jsonl", '{"caption": ["a"]}', "line 1: 'caption' must be text"),
            ("a.jsonl", '{"caption": "a", "type": {}}', "line 1: 'type' must be text"),
            ("a.jsonl", '{"caption": " "}', "line 1: the prompt is empty"),
            ("a.jsonl", '{"caption": "\\ud800"}', "line 1: the prompt has half of a surrogate pair"),
            ("a.jsonl", "[" * 100_000, "line 1: the line is not a JSON object"),
            ("a.txt", PUBLISHED, "line 1: this looks like CSV, not like a prompt"),
            ("a.txt", '\n{"caption": "a"}', "line 2: this looks like JSONL, not like a prompt"),
            ("a.txt", "\n \n", "is empty"),
            ("a.txt", b"ok\ncaf\xe9", "isn't UTF-8 text (byte 6)"),
            ("a.csv", "caption\na\n".encode("utf-16"), "isn't UTF-8 text (byte 0)"),
            ("a.jsonl", '{"text": "a"}'.encode("utf-16-le"), "isn't UTF-8 text (a zero byte in line 1)"),
        ],
    )
    def test_are_named_with_file_and_line(self, tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
        path = write(tmp_path, name, content)
        with pytest.raises(NemoError) as raised:
            read_prompt_list(path)
        assert str(path) in str(raised.value)
        assert said in str(raised.value)

    def test_a_missing_file_and_a_folder_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(NemoError, match=r"none\.csv doesn't exist"):
            read_prompt_list(tmp_path / "none.csv")
        with pytest.raises(NemoError, match="can't be read"):
            read_prompt_list(tmp_path)

    @pytest.mark.parametrize("prompt", ["a photograph, with text, of a sign", "text; and more", '{"a": 1}', "caption"])
    def test_a_prompt_that_only_resembles_another_format_is_a_prompt(self, tmp_path: Path, prompt: str) -> None:
        assert read_prompts(write(tmp_path, "a.txt", prompt)) == [prompt]


class TestLabels:
    def test_are_a_mapping_of_the_prompts_that_have_one(self) -> None:
        prompts = [Prompt("a", "VM", None, 1), Prompt("b", None, None, 2), Prompt("a", "VM", None, 3)]
        assert labels_of(prompts, "list.csv") == {"a": "VM"}

    def test_of_one_prompt_are_not_two(self) -> None:
        prompts = [Prompt("a", "VM", None, 2), Prompt("a", "TM", None, 7)]
        with pytest.raises(NemoError, match=r"list\.csv, line 7: the label is TM, and an earlier line"):
            labels_of(prompts, "list.csv")
