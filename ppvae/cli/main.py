"""The command line: `ppvae new | fit | evaluate | examine | compare | generate | check | data`."""

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

USAGE = """usage: ppvae COMMAND ...

Deep latent-variable models as probabilistic programs.

  ppvae new NAME                  write a pair to start from, and a test of it
  ppvae fit PAIR [options]        train a model/guide pair with SVI
  ppvae evaluate RUN [options]    estimate log p(x) of a run's test data; --method annealed is tighter
  ppvae examine RUN [options]     where the nats go: gaps, what the latents carry, calibration, checks
  ppvae compare RUN RUN ...       paired differences of log p(x) between runs
  ppvae generate RUN [options]    samples, reconstructions, interpolations, traversals of a run
  ppvae check PAIR [options]      check a pair against the contract and say what it is
  ppvae data NAME [options]       load a data set and say what it is

PAIR is a factory that returns (model, guide) or something with .model and .guide:
ppvae.models:vae, my_package.pairs:my_pair, pairs.py:my_pair. Its flags come from its signature.
RUN is a run folder, or a run's name below runs/. `ppvae COMMAND --help` lists the options of a command,
`ppvae fit PAIR --help` those of the pair too."""

COMMANDS = ("new", "fit", "evaluate", "examine", "compare", "generate", "check", "data")  # each a module of this room

RESUME_HINTS = {
    "fit": "; the same command with --name NAME --resume goes on from the last checkpoint",
    "evaluate": "; the same command goes on from the finished blocks",
    "examine": "; the same command goes on from the finished blocks of gaps",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a scheduler sends it: the command ends as it does on Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    An error is at most three lines, below a traceback only where PPVAE_TRACEBACK is set.
    """
    try:
        with _sigterm_raises():
            status = _dispatch(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside the block; a second one ends the process at once."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # the caller has a handler of its own
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    try:
        signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _dispatch(argv: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if args else 2
    if args[0] == "--version":
        from ppvae import __version__

        print(f"ppvae {__version__}")
        return 0
    if args[0] not in COMMANDS:
        from ppvae.errors import did_you_mean

        return _fail(f"no command {args[0]!r}{did_you_mean(args[0], COMMANDS)} (one of {', '.join(COMMANDS)})", 2)
    size = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and size.isdigit() and int(size) > 1:  # started by torchrun
        from ppvae.distributed import run_on_all_ranks

        return run_on_all_ranks(args[0], args[1:], _run, _fail)
    return _run(args[0], args[1:], _fail)


def _run(command: str, args: list[str], fail: Callable[[str, int], int]) -> int:
    """Runs a command; its modules are loaded inside, so that signals meanwhile end it as they do later."""
    try:
        return _run_command(command, args, fail)
    except Terminated:
        group = int(os.environ.get("WORLD_SIZE", "1")) > 1  # torchrun ends all processes where one has ended
        what = "terminated, as another process of the group ended, or on demand" if group else "terminated"
        return fail(what + RESUME_HINTS.get(command, ""), 143)
    except KeyboardInterrupt:
        return fail("interrupted" + RESUME_HINTS.get(command, ""), 130)
    except (ImportError, MemoryError) as error:  # of torch, or another library
        if os.environ.get("PPVAE_TRACEBACK"):
            raise
        text = " ".join(str(error).split())[:200] or type(error).__name__
        return fail(f"a library cannot be loaded ({text}): too little memory, or a damaged installation", 1)


def _run_command(command: str, args: list[str], fail: Callable[[str, int], int]) -> int:
    from ppvae.cli.flags import HelpShown
    from ppvae.errors import PpvaeError, UsageError
    from ppvae.errors.memory import memory_failure

    module = importlib.import_module(f"ppvae.cli.{command}")
    try:
        return module.run(args)
    except HelpShown:
        return 0
    except UsageError as error:
        return fail(str(error), 2)
    except PpvaeError as error:
        return fail(str(error), 1)
    except BrokenPipeError:
        raise
    except Exception as error:
        if memory_failure(error):
            return fail(f"out of memory ({' '.join(str(error).split())[:200] or type(error).__name__})", 1)
        if os.environ.get("PPVAE_TRACEBACK"):
            raise
        text = " ".join(str(error).split())[:300]
        return fail(f"{type(error).__name__}: {text} (PPVAE_TRACEBACK=1 shows where)", 1)


def _fail(text: str, status: int) -> int:
    """Prints an error; below the traceback of the exception that is handled, where PPVAE_TRACEBACK asks for it."""
    if os.environ.get("PPVAE_TRACEBACK") and sys.exc_info()[0] is not None:
        import traceback

        traceback.print_exc()
    lines = [line for line in text.splitlines() if line.strip()]
    print("ppvae: error: " + "\n".join(lines[:3]), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
