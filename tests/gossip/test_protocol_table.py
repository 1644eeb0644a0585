"""docs/PROTOCOL.md says what the code does: its table is current, and every message survives the wire."""

from __future__ import annotations

from pathlib import Path

from gossip import messages
from gossip.messages import Message
from gossip.protocol_table import table, updated

DOCUMENT = Path(__file__).parents[2] / "docs" / "PROTOCOL.md"


def test_the_message_table_is_up_to_date():
    document = DOCUMENT.read_text()
    assert updated(document) == document, "run: python -m gossip.protocol_table docs/PROTOCOL.md"


def test_every_message_is_in_the_table():
    structs = [
        value for value in vars(messages).values() if isinstance(value, type) and issubclass(value, Message)
    ]
    rows = table()
    assert all(f"| `{struct.__name__}`" in rows for struct in structs if struct is not Message)


def test_every_message_is_frozen_and_refuses_unknown_fields():
    for value in vars(messages).values():
        if isinstance(value, type) and issubclass(value, Message):
            assert value.__struct_config__.frozen, value
            assert value.__struct_config__.forbid_unknown_fields, value


def test_every_protocol_is_described():
    document = DOCUMENT.read_text()
    names = [value for name, value in vars(messages).items() if name.endswith("_PROTOCOL")]
    assert len(names) == 11
    assert all(f"`{name}`" in document for name in names)
