"""What peers tell each other and which bytes they hold: notices, members, shards, merge records.

This package moves and checks bytes; what a shard's numbers mean is decided in ``training``.
"""
