"""docs/data.md says what is read, line by line."""

from tests.data_docs import DOCS, FILES, LAYOUTS, gives, with_tables


def test_the_tables_are_what_is_read():
    document = DOCS.read_text(encoding="utf-8")
    assert with_tables(document) == document, "python tests/data_docs.py writes them anew"
    assert "nothing" not in "".join(line.split("|")[-2] for line in document.splitlines() if line.startswith("| "))


def test_every_example_is_read_as_a_person_would():
    """A few of them spelt out, so that a table made of faults would not pass for one of facts."""
    import json

    read = {name: gives(json.dumps(row).encode()) for name, row in LAYOUTS.items()}
    assert read["instruction, context, response"] == "demonstration: user `Who?\\n\\nA text.` → `A.`"
    assert read["messages, an answer not to be trained"] == "demonstration: user `Q?` → `A.`"
    assert read["... with scores (or ranks)"] == "comparison: user `Q?` → `A.` over `B.`"
    assert read["several rejected (or chosen) answers"] == (
        "comparison: user `Q?` → `A.` over `B.`; user `Q?` → `A.` over `C.`"
    )
    assert read["messages that end with a question"] == "demonstration: user `Q?` → `A.`"
    assert len(FILES) == 18
