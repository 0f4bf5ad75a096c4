from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django_dbhealth import LongRunningCommand
from example_project import supplier
from example_project.models import save_day


class Command(LongRunningCommand):
    help = (
        "Save the supplier's newest prices again and again, as a bot does. Between two rounds it "
        "holds no connection. Stop it with Ctrl-C, or with SIGTERM as systemd and Docker do: a "
        "pause ends at once, a round that has begun is finished first."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        super().add_arguments(parser)
        supplier.add_pause_argument(parser, pause=0)
        parser.add_argument(
            "--interval",
            type=supplier.seconds,
            default=60,
            metavar="SECONDS",
            help="how long to sleep between two rounds (default: %(default)s)",
        )

    def handle(self, *args: Any, interval: float, pause: float, **options: Any) -> None:
        while True:
            with self.step("Download the newest prices"):
                price_list = supplier.download(days=1, pause=pause)
            with self.step("Save them"):
                for day in price_list:
                    save_day(day)
            self.sleep(interval)
