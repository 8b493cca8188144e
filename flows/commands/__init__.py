"""Commands of `tanuki` by topic: typer in, flow or deploy out."""
