from __future__ import annotations

from django.db import models, transaction

from example_project.supplier import DayPrices


class Product(models.Model):
    """A foreign currency on sale."""

    sku = models.CharField("ISO 4217 code", max_length=3, unique=True)
    price = models.DecimalField("euro for one unit", max_digits=18, decimal_places=10)
    updated = models.DateField()

    def __str__(self) -> str:
        return self.sku


class Price(models.Model):
    """What a product cost on one day."""

    product = models.ForeignKey(Product, on_delete=models.CASCADE, related_name="prices")
    date = models.DateField()
    amount = models.DecimalField("euro for one unit", max_digits=18, decimal_places=10)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["product", "date"], name="one_price_a_day"),
        ]

    def __str__(self) -> str:
        return f"{self.product} on {self.date}"


def save_day(day: DayPrices) -> None:
    """Save one day's prices, all or none; saving the same day again replaces it.

    Commands that run at once must not end in a deadlock: each adds products in the index's order,
    each in a transaction of its own, and then locks those that are there in one order.
    """
    prices = dict(sorted(day.prices.items()))
    Product.objects.bulk_create(
        [Product(sku=sku, price=price, updated=day.date) for sku, price in prices.items()],
        ignore_conflicts=True,
    )
    with transaction.atomic():
        locked = Product.objects.select_for_update().order_by("pk")
        products = {product.sku: product for product in locked if product.sku in prices}
        for sku, product in products.items():
            product.price = prices[sku]
            product.updated = day.date
        Product.objects.bulk_update(products.values(), ["price", "updated"])
        Price.objects.filter(date=day.date).delete()
        Price.objects.bulk_create(
            Price(product=products[sku], date=day.date, amount=price)
            for sku, price in prices.items()
        )
