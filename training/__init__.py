"""The mathematics of a run: spec, model, data, inner steps, mixing, exact merge arithmetic, export.

Pure and synchronous: no event loop, no network. Everything here can be called from a notebook.
"""
