from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand

from example_project import supplier
from example_project.models import Product, save_day


class Command(BaseCommand):
    help = (
        "Refresh prices from the supplier: an ordinary Django command. Its connection idles while "
        "the supplier answers; on a server that drops it meanwhile (MySQL's wait_timeout below "
        "--pause) the save fails with (2006, 'Server has gone away'). refresh_prices does the same "
        "work and survives."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        supplier.add_arguments(parser)

    def handle(self, *args: Any, days: int, pause: float, **options: Any) -> None:
        self.stdout.write(f"{Product.objects.count()} products on sale.")

        self.stdout.write("Downloading prices; the supplier answers slowly ...")
        price_list = supplier.download(days=days, pause=pause)

        self.stdout.write(f"Saving the prices of {len(price_list)} days ...")
        for day in price_list:
            save_day(day)
        self.stdout.write(f"{Product.objects.count()} products on sale.")
