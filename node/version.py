"""The version of this program, as it tells people and peers."""

VERSION = "0.1.0"
