"""``python -m deploy.serving``: the server without the command line around it."""

from deploy.serving.server import main

main(program="python -m deploy.serving")
