"""The ``gossamer`` command: typer commands and rich views that talk to a node through its control socket."""
