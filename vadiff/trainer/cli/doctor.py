"""`vadiff doctor`."""

from .command import command
from .parameters import Options

NAME = "doctor"
HELP = "print versions, devices, backends, what is missing and how to get it"
DESCRIPTION = (
    "Print versions, devices, backends, environment variables and optional packages, and how to get what is missing. "
    "Paste it into a bug report."
)
EXAMPLES = ("vadiff doctor",)


@command(NAME, HELP, DESCRIPTION, EXAMPLES)
def run(options: Options) -> None:
    from ..doctor import report

    print(report())
