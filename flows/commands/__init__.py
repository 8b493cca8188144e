"""Commands of `tanuki`, a module a topic; flows/cli.py registers them."""
