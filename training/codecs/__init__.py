"""Forms in which values travel: exact, quantised and sparse ones, and the error feedback that lossy ones need."""
