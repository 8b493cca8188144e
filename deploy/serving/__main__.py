"""``python -m deploy.serving``: the server without the command line around it."""

from deploy.serving.command import main

main(program="python -m deploy.serving")
