"""Line numbers of keys, in every shape that TOML allows."""

from __future__ import annotations

import tomllib

from miles.config.positions import key_lines

TEXT = '''\
# comment = 1
top = 1

[section]
plain = 1 # lr = 2
"quoted key" = 2
dotted.key = 3
array = [
  "a = 1", # ] b = 2
  "]",
]
nested = [
  ["b"],
  """
inside = 0
""",
]
after_array = 4
text = """
inside = 1
\\"""
[not.a.table]
"""
raw = \'\'\'
inside = 2\'\'\'
after_text = 5
inline = { x = 1, y = [1,
  2] }
   indented   =   6

  [ section . "sub table" ]
key = 7
[[list]]
item = 8
'''


def test_every_key_is_found_on_its_line() -> None:
    tomllib.loads(TEXT)
    lines = TEXT.splitlines()
    found = key_lines(TEXT)
    expected = {
        ("top",): "top = 1",
        ("section",): "[section]",
        ("section", "plain"): "plain = 1 # lr = 2",
        ("section", "quoted key"): '"quoted key" = 2',
        ("section", "dotted", "key"): "dotted.key = 3",
        ("section", "array"): "array = [",
        ("section", "nested"): "nested = [",
        ("section", "after_array"): "after_array = 4",
        ("section", "text"): 'text = """',
        ("section", "raw"): "raw = '''",
        ("section", "after_text"): "after_text = 5",
        ("section", "inline"): "inline = { x = 1, y = [1,",
        ("section", "indented"): "   indented   =   6",
        ("section", "sub table"): '  [ section . "sub table" ]',
        ("section", "sub table", "key"): "key = 7",
        ("list",): "[[list]]",
        ("list", "item"): "item = 8",
    }
    assert {path: lines[number - 1] for path, number in found.items()} == expected


def test_a_file_without_a_last_newline() -> None:
    assert key_lines("[a]\nb = 1") == {("a",): 1, ("a", "b"): 2}
