"""``optimum-cli guidedquant ...``: the commands of ``python -m hf_guidedquant``.

Optimum imports this file whenever its command line starts, so nothing is imported here that takes time.
"""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class GuidedQuantCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="guidedquant", help="2-4 bit language models, rounded by what it does to the end loss.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        commands = "plan, quantize, convert, evaluate, inspect, report or chat"
        parser.add_argument("command", nargs="?", help=f"{commands}; COMMAND --help explains it, none explains all")
        parser.add_argument("arguments", nargs=REMAINDER, help="what the command takes")

    def run(self) -> None:
        from hf_guidedquant.cli import main

        arguments = [self.args.command, *self.args.arguments] if self.args.command else ["--help"]
        raise SystemExit(main(arguments, program="optimum-cli guidedquant"))


REGISTER_COMMANDS = [GuidedQuantCommand]
