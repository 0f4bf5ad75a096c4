from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django_dbhealth import LongRunningCommand
from example_project import supplier
from example_project.models import Product, save_day


class Command(LongRunningCommand):  # Edit 3: was BaseCommand.
    help = (
        "Refresh prices from the supplier: the work of refresh_prices_plain as a "
        "LongRunningCommand. No step holds a connection while it waits, so the server has none to "
        "drop; SIGTERM ends it after the day that is being saved."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        super().add_arguments(parser)
        supplier.add_arguments(parser)

    def handle(self, *args: Any, days: int, pause: float, **options: Any) -> None:
        self.stdout.write(f"{Product.objects.count()} products on sale.")

        with self.step("Download prices"):
            price_list = supplier.download(days=days, pause=pause)

        with self.step("Save prices"):
            for day in self.track(price_list, "days"):
                save_day(day)

        self.stdout.write(f"{Product.objects.count()} products on sale.")
