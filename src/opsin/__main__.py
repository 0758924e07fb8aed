"""`python -m opsin`, and the `opsin` command."""

import os
import signal


def main() -> None:
    """Run the command. Ctrl-C ends it with 130, without a word where it has not begun yet."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from opsin.cli.app import main as run

    try:
        signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
        run()
    except KeyboardInterrupt:  # in the moment before `run` takes care of it
        os._exit(130)


if __name__ == "__main__":
    main()
