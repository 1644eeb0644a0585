"""The life of one peer: joins transport, gossip and training into a daemon and keeps its state on disk."""
